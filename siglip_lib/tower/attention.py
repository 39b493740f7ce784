"""Multi-head self-attention."""

import torch
from torch import Tensor, nn

from siglip_lib.backends.dispatch import attend, attend_packed, check_backend_name, takes_packed
from siglip_lib.base.checks import check_tensor, positive_int, probability
from siglip_lib.tower.layers import passed


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
            ``triton``, ``cudnn``, ``flash_attn``, ``sdpa``, ``xformers``, ``eager``, ``hopper``;
            ``attention_backends`` tells which can.

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
        options = dict(backend=self.backend, deterministic=self.deterministic, scale=self.scale)
        options["dropout"] = _drop_probability(self.attn_drop)
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            out = attend_packed(self._packed(x), **options)  # (B, N, heads, head_dim)
        elif takes_packed(self.backend):  # the norms made new tensors
            out = attend_packed(torch.stack(self._heads(x), 2), **options)
        else:
            out = attend(*self._heads(x), **options)
        return passed(self.proj_drop, self.proj(out.flatten(2)))  # (B, N, D)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the attention weights (B, heads, N, N) for the input x (B, N, D), in float32, without dropout."""
        q, k, _ = self._heads(x)
        return attention_weights(q, k, self.scale)

    def _packed(self, x: Tensor) -> Tensor:
        """Project: x (B, N, D) to q, k and v in one tensor (B, N, 3, heads, head_dim)."""
        check_tensor("x", x, ("B", "N", self.num_heads * self.head_dim))
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
