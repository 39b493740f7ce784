"""Attention maps of any model, collected while it runs: where each token looks."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn


class AttentionMaps(dict[str, Tensor]):
    """Attention weights by layer name, each (B, heads, queries, keys) in float32."""

    @property
    def nbytes(self) -> int:
        """Memory that the maps hold, in bytes."""
        return sum(weights.nbytes for weights in self.values())


@contextmanager
def attention_maps(
    model: nn.Module, layers: Iterable[int] | None = None
) -> Iterator[AttentionMaps]:
    """Collect the attention maps of ``model`` while it runs, beside whatever backend runs.

    A map is computed from the layer's own input, so the model's output does not change by a bit. Each chosen layer
    projects q and k a second time and holds ``4 * B * heads * N**2`` bytes: at SO400M's 16 heads and 729 tokens 34 MB
    for a picture and layer, 918 MB for its 27 layers. A later run overwrites the maps of an earlier one. What
    ``torch.compile`` made runs as it was written meanwhile, since compiled code would pass the layers by.

    Args:
        model: any module that contains ``Attention`` or ``AttentionPoolLatent``; maps of the latter are
            (B, heads, latents, N).
        layers: which of its attention layers, counted in the order of ``model.named_modules()``, a pooling head after
            the blocks; negative numbers count from the last. All if None.

    Yields:
        A dict from layer name, as it is without ``torch.compile``, to weights (B, heads, N, N), float32, detached, on
        the model's device; filled when the model runs.

    Raises:
        ValueError: the model has no attention layer, or not the one asked for.

    Example:
        >>> with attention_maps(model, layers=[0, -1]) as maps:
        ...     model(x)
    """
    found = list(attention_layers(model).items())
    if not found:
        raise ValueError(f"model={type(model).__name__} contains no attention layer")
    most = len(found)
    chosen = range(most) if layers is None else list(layers)
    for layer in chosen:
        if not -most <= layer < most:
            raise ValueError(f"layers contains {layer}; allowed are {-most} to {most - 1}")
    maps = AttentionMaps()

    @torch.no_grad()
    def store(name: str, module: nn.Module, inputs: tuple, named: dict[str, Tensor]) -> None:
        maps[name] = module.attention_map(*inputs, **named)

    with ExitStack() as hooks, uncompiled():
        for name, module in (found[i] for i in chosen):
            hook = module.register_forward_pre_hook(partial(store, name), with_kwargs=True)
            hooks.enter_context(hook)
        yield maps


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attention layers of ``model``, by name and in order, a pooling head after the blocks."""
    # where torch.compile keeps the module that it wraps, whose attributes it shows
    wrapper = "_orig_mod"
    return {
        ".".join(part for part in name.split(".") if part != wrapper): module
        for name, module in model.named_modules()
        if hasattr(module, "attention_map") and wrapper not in module._modules
    }


def uncompiled() -> AbstractContextManager[object]:
    """Run compiled modules as they were written: hooks set after the compilation do not fire in compiled code."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
