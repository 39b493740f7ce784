"""Weight initialisation: one rule, applied to every submodule. timm's is the default; others by name."""

import math
from collections.abc import Callable
from functools import partial

from torch import nn

from siglip_lib.base.checks import one_of
from siglip_lib.tower.attention_pool import AttentionPoolLatent
from siglip_lib.tower.trunc_normal import trunc_normal_


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
    as they are. ``name``, the module's path, is unused here: ``named_apply`` calls with both.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (2021), code; timm's ``init_weights_vit_timm``.
    """
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        _fill_bias(module, 0.0)
    elif hasattr(module, "init_weights"):
        module.init_weights()


def init_weights_vit_jax(module: nn.Module, name: str = "", head_bias: float = 0.0) -> None:
    """Initialise one module in place by what timm made of big_vision's rule; arguments as ``init_weights_vit_timm``.

    Linear: weight uniform with variance 2 / (inputs + outputs), bias zero, or of std 1e-6 in an MLP. The classifier
    (``head``): weight zero, bias ``head_bias``. Convolution: truncated normal of variance 1 / inputs, bias zero.

    It is not what big_vision does: here q, k and v are one matrix with three times the outputs, k and v of a pooling
    head one with twice the outputs, and so their variance is a half or two thirds of big_vision's. See
    ``init_weights_big_vision``.

    Source: timm's ``init_weights_vit_jax``.
    """
    _as_big_vision_(module, name, head_bias, parts={})


def init_weights_big_vision(module: nn.Module, name: str = "") -> None:
    """Initialise one module in place as big_vision does; arguments as ``init_weights_vit_timm``.

    As ``init_weights_vit_jax``, but q, k and v count as layers of their own, and the learned queries of a pooling head
    are uniform with variance 2 / (queries + channels). What belongs to no layer, as positions, its model draws.

    Source: big_vision, models/vit.py, whose attention is flax's, with a matrix each for q, k and v. Where that file
    names no rule, flax's own holds.
    """
    _as_big_vision_(module, name, head_bias=0.0, parts={"qkv": 3, "kv": 2})
    if isinstance(module, AttentionPoolLatent):
        nn.init.xavier_uniform_(module.latent.detach()[0])  # (queries, channels)


def _as_big_vision_(module: nn.Module, name: str, head_bias: float, parts: dict[str, int]) -> None:
    """What both rules share; ``parts`` says by a layer's own name as how many layers it counts, one if not there."""
    if isinstance(module, nn.Linear) and name.startswith("head"):
        nn.init.zeros_(module.weight)
        _fill_bias(module, head_bias)
    elif isinstance(module, nn.Linear):
        for part in module.weight.detach().chunk(parts.get(name.rpartition(".")[2], 1)):
            nn.init.xavier_uniform_(part)
        if module.bias is not None:
            nn.init.normal_(module.bias, std=1e-6 if "mlp" in name else 0.0)
    elif isinstance(module, nn.Conv2d):
        lecun_normal_(module)
    elif hasattr(module, "init_weights"):
        module.init_weights()


def lecun_normal_(module: nn.Linear | nn.Conv2d) -> None:
    """Draw the weight from a normal of variance 1 / inputs, cut at two standard deviations; the bias is zero."""
    # cut at 2 sigma, a normal keeps .8796 of its standard deviation
    std = module.weight[0].numel() ** -0.5 / 0.87962566103423978
    trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    _fill_bias(module, 0.0)


def _fill_bias(module: nn.Linear | nn.Conv2d, value: float) -> None:
    if module.bias is not None:
        nn.init.constant_(module.bias, value)


def init_weights_vit_moco(module: nn.Module, name: str = "") -> None:
    """Initialise one module in place as MoCo v3 does; arguments as ``init_weights_vit_timm``.

    Linear: weight uniform with variance 2 / (inputs + outputs), where q, k and v count as three layers; bias zero.

    Source: Chen et al., An Empirical Study of Training Self-Supervised Vision Transformers (2021), code.
    """
    if isinstance(module, nn.Linear):
        parts = 3 if "qkv" in name else 1
        limit = math.sqrt(6 / (module.out_features // parts + module.in_features))
        nn.init.uniform_(module.weight, -limit, limit)
        _fill_bias(module, 0.0)
    elif hasattr(module, "init_weights"):
        module.init_weights()


def reset_parameters(model: nn.Module) -> None:
    """Let every part of ``model`` but itself start anew as its constructor does, in the order in which it was built.

    Raises:
        TypeError: a part has weights of its own and no method ``reset_parameters`` or ``init_weights``.
    """
    starts = []

    def find(module: nn.Module, name: str) -> None:
        start = getattr(module, "reset_parameters", getattr(module, "init_weights", None))
        if start is not None:
            starts.append(start)
        elif [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            raise TypeError(
                f"{name} is a {type(module).__name__}, whose weights can't be drawn anew: "
                "its class has neither reset_parameters() nor init_weights()"
            )

    named_apply(find, model, include_root=False)
    for start in starts:  # none before all are known to be there
        start()


def init_rule(weight_init: str, num_classes: int = 0) -> Callable[[nn.Module, str], None]:
    """Return the rule that a model with that ``weight_init`` applies to its submodules."""
    rules = {
        "": init_weights_vit_timm,
        "jax": init_weights_vit_jax,
        # "negative log head bias": every class starts at probability 1 / num_classes under a sigmoid
        "jax_nlhb": partial(init_weights_vit_jax, head_bias=-math.log(max(num_classes, 1))),
        "big_vision": init_weights_big_vision,
        "moco": init_weights_vit_moco,
        "skip": lambda module, name="": None,
    }
    return rules[one_of("weight_init", weight_init, rules)]
