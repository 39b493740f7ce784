"""Weight initialisation: one rule, applied to every submodule. timm's is SigLIP's here; two others by name."""

import math
from collections.abc import Callable
from functools import partial

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


def init_weights_vit_jax(module: nn.Module, name: str = "", head_bias: float = 0.0) -> None:
    """Initialise one module in place as big_vision does; arguments as ``init_weights_vit_timm``.

    Linear: weight uniform with variance 2 / (inputs + outputs), bias zero, or of std 1e-6 in an MLP. The classifier
    (``head``): weight zero, bias ``head_bias``. Convolution: truncated normal of variance 1 / inputs, bias zero.

    Source: big_vision, models/vit.py; timm's ``init_weights_vit_jax``.
    """
    if isinstance(module, nn.Linear) and name.startswith("head"):
        nn.init.zeros_(module.weight)
        nn.init.constant_(module.bias, head_bias)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.normal_(module.bias, std=1e-6 if "mlp" in name else 0.0)
    elif isinstance(module, nn.Conv2d):
        # cut at 2 sigma, a normal keeps .8796 of its standard deviation
        std = module.weight[0].numel() ** -0.5 / 0.87962566103423978
        trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif hasattr(module, "init_weights"):
        module.init_weights()


def init_weights_vit_moco(module: nn.Module, name: str = "") -> None:
    """Initialise one module in place as MoCo v3 does; arguments as ``init_weights_vit_timm``.

    Linear: weight uniform with variance 2 / (inputs + outputs), where q, k and v count as three layers; bias zero.

    Source: Chen et al., An Empirical Study of Training Self-Supervised Vision Transformers (2021), code.
    """
    if isinstance(module, nn.Linear):
        parts = 3 if "qkv" in name else 1
        limit = math.sqrt(6 / (module.out_features // parts + module.in_features))
        nn.init.uniform_(module.weight, -limit, limit)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif hasattr(module, "init_weights"):
        module.init_weights()


def init_rule(weight_init: str, num_classes: int) -> Callable[[nn.Module, str], None]:
    """Return the rule that a ``VisionTransformer`` with that ``weight_init`` applies to its submodules."""
    rules = {
        "": init_weights_vit_timm,
        "jax": init_weights_vit_jax,
        # "negative log head bias": every class starts at probability 1 / num_classes under a sigmoid
        "jax_nlhb": partial(init_weights_vit_jax, head_bias=-math.log(max(num_classes, 1))),
        "moco": init_weights_vit_moco,
    }
    if weight_init not in rules:
        raise ValueError(
            f"weight_init={weight_init!r} is unknown; allowed are {', '.join(map(repr, rules))}, 'skip'"
        )
    return rules[weight_init]
