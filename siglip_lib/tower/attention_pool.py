"""Pooling by attention: one learned query reads all tokens of a picture."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from siglip_lib.backends.dispatch import attend, check_backend_name
from siglip_lib.base.checks import (
    check_tensor,
    finite,
    one_of,
    plain_shape,
    positive_int,
    probability,
)
from siglip_lib.tower.attention import attention_weights
from siglip_lib.tower.layers import GELU_TANH, Mlp
from siglip_lib.tower.trunc_normal import trunc_normal_


class AttentionPoolLatent(nn.Module):
    """Attention from learned queries to the tokens, then a residual MLP; the head of SigLIP's image tower.

    Args:
        in_features: channels D of the tokens; a multiple of ``num_heads``.
        num_heads: heads of the attention.
        feat_size: number of tokens N, needed for a position embedding.
        mlp_ratio: hidden channels of the MLP over D, rounded down.
        qkv_bias: biases in the q and kv projections.
        qk_norm, deterministic, backend: see ``Attention``.
        latent_len: number of learned queries.
        latent_dim: channels of a learned query; D if None.
        pos_embed: ``abs`` adds a learned vector to each token, the empty string none.
        pool_type: ``token`` returns what the first query read, ``avg`` the mean over the queries.
        norm_layer: class of the norm before the MLP, and of those of q and k; no norm before the MLP if None.
        act_layer: class of the MLP's activation. Some of timm's weights were trained with ``nn.GELU``.
        drop: dropout after the output projection, in [0, 1).

    Shapes: x (B, N, D) to (B, D).

    Source: Zhai et al., Scaling Vision Transformers (2022), section 3.2 (multihead attention pooling, MAP); Lee et al.,
    Set Transformer (2019), section 3.2; parameter names are timm's.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int = 8,
        feat_size: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        latent_len: int = 1,
        latent_dim: int | None = None,
        pos_embed: str = "",
        pool_type: str = "token",
        norm_layer: Callable[[int], nn.Module] | None = None,
        act_layer: Callable[[], nn.Module] = GELU_TANH,
        drop: float = 0.0,
        *,
        deterministic: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        dim = positive_int("in_features", in_features)
        num_heads = positive_int("num_heads", num_heads)
        if dim % num_heads:
            raise ValueError(f"in_features={dim} must be a multiple of num_heads={num_heads}")
        if one_of("pos_embed", pos_embed, ("", "abs")) and feat_size is None:
            raise ValueError("pos_embed='abs' needs feat_size, the number of tokens")
        if feat_size is not None:
            feat_size = positive_int("feat_size", feat_size)
        mlp_ratio = finite("mlp_ratio", mlp_ratio)
        latent_len = positive_int("latent_len", latent_len)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.pool_type = one_of("pool_type", pool_type, ("token", "avg"))
        self.deterministic = deterministic
        self.backend = check_backend_name(backend)
        self.latent_dim = dim if latent_dim is None else positive_int("latent_dim", latent_dim)

        self.pos_embed = nn.Parameter(torch.empty(feat_size, dim)) if pos_embed else None
        self.latent = nn.Parameter(torch.empty(1, latent_len, self.latent_dim))
        self.q = nn.Linear(self.latent_dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        qk_norm_layer = norm_layer or nn.LayerNorm
        self.q_norm = qk_norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = qk_norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(probability("drop", drop))
        self.norm = nn.Identity() if norm_layer is None else norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw ``pos_embed`` and ``latent`` anew: std is the width to the power -1/2."""
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=self.pos_embed.shape[1] ** -0.5)
        trunc_normal_(self.latent, std=self.latent_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(x)
        x = attend(q, k, v, backend=self.backend, deterministic=self.deterministic).flatten(2)
        x = self.proj_drop(self.proj(x))  # (B, latents, D)
        x = x + self.mlp(self.norm(x))
        return x[:, 0] if self.pool_type == "token" else x.mean(1)  # (B, D)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return where the queries look in x (B, N, D): weights (B, heads, latents, N), float32."""
        q, k, _ = self._heads(x)
        return attention_weights(q, k, self.head_dim**-0.5)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project and split: x (B, N, D) to q (B, latents, heads, head_dim), k and v (B, N, heads, head_dim)."""
        _, num_tokens, _ = check_tensor("x", x, ("B", "N", self.num_heads * self.head_dim))
        if self.pos_embed is not None:
            feat_size = plain_shape(self.pos_embed)[0]
            if num_tokens != feat_size:
                raise ValueError(f"x has {num_tokens} tokens; feat_size is {feat_size}")
            x = x + self.pos_embed.to(x.dtype)
        q = self.q(self.latent).unflatten(-1, (self.num_heads, self.head_dim))
        q = q.expand(x.shape[0], -1, -1, -1)  # the queries are the same for every picture
        # views of one tensor
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(2)
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v
