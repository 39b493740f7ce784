"""Multi-head self-attention, and the maps of where each token looks."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from siglip_lib.backends.dispatch import attend, attend_packed, check_backend_name
from siglip_lib.base.checks import check_tokens, positive_int, probability


class Attention(nn.Module):
    """Multi-head self-attention over tokens, without a mask.

    Args:
        dim: channels D; a multiple of ``num_heads``.
        num_heads: number of heads; each has ``head_dim = D / num_heads`` channels.
        qkv_bias: bias in the q, k, v projection.
        qk_norm: normalise q and k over the channels of each head before their product.
        attn_drop: dropout of attention weights while training, in [0, 1).
        proj_drop: dropout of the output while training, in [0, 1).
        norm_layer: class of ``q_norm`` and ``k_norm``.
        deterministic: the same bits on every run, backward pass included.
        backend: ``auto`` for the first that can run on the input, in the order that notebook 04 measured, or
            ``triton``, ``cudnn``, ``flash_attn``, ``sdpa``, ``xformers``, ``eager``; ``attention_backends`` tells which
            can.

    Shapes: x (B, N, D) to (B, N, D).

    Source: Vaswani et al., Attention Is All You Need (2017), section 3.2.2; qk-norm: Dehghani et al., Scaling Vision
    Transformers to 22 Billion Parameters (2023), section 2; parameter names are timm's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        deterministic: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        dim, num_heads = positive_int("dim", dim), positive_int("num_heads", num_heads)
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.deterministic = deterministic
        self.backend = check_backend_name(backend)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(probability("attn_drop", attn_drop))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(probability("proj_drop", proj_drop))

    def forward(self, x: Tensor) -> Tensor:
        options = {
            "backend": self.backend,
            "dropout": _drop_probability(self.attn_drop),
            "deterministic": self.deterministic,
            "scale": self.scale,
        }
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            out = attend_packed(self._packed(x), **options)  # (B, N, heads, head_dim)
        elif self.backend == "triton":  # the norms made new tensors, and it needs all in one
            out = attend_packed(torch.stack(self._heads(x), 2), **options)
        else:
            out = attend(*self._heads(x), **options)
        return self.proj_drop(self.proj(out.flatten(2)))  # (B, N, D)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the attention weights (B, heads, N, N) for the input x (B, N, D), in float32, without dropout."""
        q, k, _ = self._heads(x)
        return attention_weights(q, k, self.scale)

    def _packed(self, x: Tensor) -> Tensor:
        """Project: x (B, N, D) to q, k and v in one tensor (B, N, 3, heads, head_dim)."""
        check_tokens("x", x, self.num_heads * self.head_dim)
        return self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project and split: x (B, N, D) to q, k, v, each (B, N, heads, head_dim), views of one tensor."""
        q, k, v = self._packed(x).unbind(2)
        # autocast runs a LayerNorm in float32; the product with v needs one dtype
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v


def _drop_probability(attn_drop: nn.Module) -> float:
    """Return what part of the attention weights ``attn_drop`` would drop, for the backend to drop it."""
    if type(attn_drop) is nn.Dropout:  # what a subclass does, no backend does for it
        return attn_drop.p if attn_drop.training else 0.0
    if isinstance(attn_drop, nn.Identity):
        return 0.0
    wanted = "it must be nn.Dropout or nn.Identity: the backend drops for it"
    raise TypeError(f"attn_drop is {type(attn_drop).__name__}; {wanted}")


def attention_weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return softmax(q @ k.T * scale) in float32: q (B, M, heads, head_dim), k (B, N, ...) to (B, heads, M, N)."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, heads, M or N, head_dim)
    with torch.autocast(q.device.type, enabled=False):
        return (q.float() * scale @ k.float().transpose(-2, -1)).softmax(dim=-1)


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
    def store(
        name: str, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        maps[name] = module.attention_map(*inputs, **named)

    handles = [
        module.register_forward_pre_hook(partial(store, name), with_kwargs=True)
        for name, module in (found[i] for i in chosen)
    ]
    try:
        with uncompiled():
            yield maps
    finally:
        for handle in handles:
            handle.remove()


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
