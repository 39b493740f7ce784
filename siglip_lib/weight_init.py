"""Weight initialisation as timm and SigLIP do it: one rule, applied to every submodule."""

from collections.abc import Callable

from torch import nn

from siglip_lib.trunc_normal import trunc_normal_


def named_apply(
    fn: Callable[[nn.Module, str], object],
    module: nn.Module,
    name: str = "",
    depth_first: bool = True,
    include_root: bool = True,
) -> nn.Module:
    """Call ``fn(module=..., name=...)`` on every submodule and return ``module``.

    Children come in the order of their registration, as ``module.named_children()`` gives them.

    Args:
        fn: called with the keyword arguments ``module`` and ``name``, the dotted path from the root.
        module: the root.
        name: the root's own name, put before those of its children.
        depth_first: children before their parent, the root last; otherwise the parent first.
        include_root: whether ``fn`` sees the root. timm's default is False, and a model whose own ``init_weights``
            calls this must pass False, or it would call itself without end.

    Source: timm, models/_manipulate.py (names and order).
    """
    if not depth_first and include_root:
        fn(module=module, name=name)
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        named_apply(fn, child, path, depth_first, include_root=True)
    if depth_first and include_root:
        fn(module=module, name=name)
    return module


def init_weights_vit_timm(module: nn.Module, name: str = "") -> None:
    """Initialise one module in place: a Linear by the rule of the ViT, another by its own ``init_weights()``, if any.

    Linear: weight from a truncated normal of std .02 (bounds -2 and 2), bias zero. LayerNorm and activations are left
    as they are.

    Args:
        module: the module to initialise.
        name: its path; unused here, part of the signature that ``named_apply`` calls.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (2021), code; timm's ``init_weights_vit_timm``.
    """
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif hasattr(module, "init_weights"):
        module.init_weights()
