"""A small decoder-only language model: each token sees those before it, and tells which comes next."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_lib.base.checks import INTEGERS, check_tensor, positive_int
from siglip_lib.siglip.text import EOS
from siglip_lib.tower.attention import Attention
from siglip_lib.tower.block import Block
from siglip_lib.tower.layers import GELU_TANH, LAYER_NORM
from siglip_lib.tower.weight_init import init_rule, named_apply

KV = tuple[Tensor, Tensor]  # k and v of the tokens so far, each (B, N, heads, head_dim)
Past = list[KV]  # of each block


def rotate(x: Tensor, first: int = 0) -> Tensor:
    """Turn each token's vectors (B, N, heads, head_dim) by angles that grow with its place, ``first`` and on.

    Channel i and channel i + head_dim / 2 are turned as one point of a plane, by place * 10000 ** (-2 i / head_dim). So
    the product of a turned q and a turned k depends on how far their places are apart, not on where they are.

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding (2021), section 3.2.2.
    """
    half = x.shape[-1] // 2
    places = torch.arange(first, first + x.shape[1], device=x.device, dtype=torch.float32)
    channels = torch.arange(half, device=x.device, dtype=torch.float32)
    angles = (places[:, None] * 10_000.0 ** (-channels / half))[:, None]  # (N, 1, half)
    cos, sin = angles.cos(), angles.sin()
    u, v = x.chunk(2, dim=-1)
    return torch.cat((u * cos - v * sin, u * sin + v * cos), dim=-1).to(x.dtype)


class CausalAttention(Attention):
    """Self-attention in which a token attends to itself and to those before it, and knows how far they are away.

    Places are told by turning q and k, however long the text (``rotate``): no table holds a vector for each. The
    library's own kernel has no mask, because no picture needs one; PyTorch's has, and leaves out what it hides.
    """

    def forward(self, x: Tensor, past: KV | None = None) -> tuple[Tensor, KV]:
        """Return the output (B, N, D), and k and v of all tokens so far: those of a ``past``, then those of x."""
        q, k, v = self._turned(x, past)
        seen = {"is_causal": True} if past is None else {"attn_mask": self._seen(q, k)}
        parts = (part.transpose(1, 2) for part in (q, k, v))  # (B, heads, N, head_dim)
        out = F.scaled_dot_product_attention(*parts, scale=self.scale, **seen)
        return self.proj(out.transpose(1, 2).flatten(2)), (k, v)

    def attention_map(self, x: Tensor, past: KV | None = None) -> Tensor:
        """Return the weights (B, heads, N, keys) in float32; keys are those of a past, then those of x (B, N, D)."""
        q, k, _ = self._turned(x, past)
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.einsum("bqhd, bkhd -> bhqk", self.scale * q.float(), k.float())
        return scores.masked_fill(~self._seen(q, k), -torch.inf).softmax(-1)

    def _turned(self, x: Tensor, past: KV | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return q of the newest tokens, and k and v of all so far, each (B, N, heads, head_dim)."""
        q, k, v = self._heads(x)
        first = 0 if past is None else past[0].shape[1]
        q, k = rotate(q, first), rotate(k, first)
        if past is not None:
            k, v = (torch.cat(both, dim=1) for both in zip(past, (k, v), strict=True))
        return q, k, v

    @staticmethod
    def _seen(q: Tensor, k: Tensor) -> Tensor:
        """Return which of the keys each of the newest tokens sees (queries, keys): all up to itself."""
        queries, keys = q.shape[1], k.shape[1]
        return torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)


class DecoderBlock(Block):
    """The block of the series, with causal attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, act_layer=GELU_TANH, norm_layer=LAYER_NORM)
        self.attn = CausalAttention(dim, num_heads, qkv_bias=True)

    def forward(self, x: Tensor, past: KV | None = None) -> tuple[Tensor, KV]:
        branch, seen = self.attn(self.norm1(x), past)
        x = x + branch
        return x + self.mlp(self.norm2(x)), seen


class LanguageModel(nn.Module):
    """Vectors of tokens, or of what stands in their place, to the logits of the next token.

    Args:
        vocab_size: number of tokens V; the embedding of each is also the row that makes its logit.
        width: channels E.
        depth: number of blocks.
        num_heads: heads of each attention; ``width`` is an even multiple of it.

    Shapes: x (B, N, E) to logits (B, N, V) and the past, of each block. After a past x are the tokens that come next.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), section 2.3 (pre-norm decoder);
    Press and Wolf, Using the Output Embedding to Improve Language Models (2017).
    """

    def __init__(self, vocab_size: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        width, num_heads = positive_int("width", width), positive_int("num_heads", num_heads)
        if width % (2 * num_heads):
            raise ValueError(f"width={width} must be a multiple of 2 * num_heads={2 * num_heads}")
        self.token_embed = nn.Embedding(positive_int("vocab_size", vocab_size), width)
        depth = positive_int("depth", depth)
        self.blocks = nn.ModuleList(DecoderBlock(width, num_heads) for _ in range(depth))
        self.norm = LAYER_NORM(width)
        nn.init.normal_(self.token_embed.weight, std=width**-0.5)
        named_apply(init_rule("big_vision"), self.blocks, "blocks")

    def forward(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        x, past = self.read(x, past)
        return F.linear(x, self.token_embed.weight), past

    def read(self, x: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """Return the tokens (B, N, E) as the last norm gives them, of which the logits are made, and the past."""
        check_tensor("x", x, ("B", "N", self.norm.normalized_shape[0]), empty=False)
        past = [*(past or [None] * len(self.blocks))]
        for i, block in enumerate(self.blocks):
            x, past[i] = block(x, past[i])
        return self.norm(x), past

    def caption_logits(self, prefix: Tensor, tokens: Tensor, past: Past | None = None) -> Tensor:
        """Return the logits (B, T, V) of each of a caption's tokens (B, T), after a prefix (B, N, E) and a past."""
        batch, length, _ = check_tensor("prefix", prefix, ("B", "N", self.norm.normalized_shape[0]))
        check_tensor("tokens", tokens, (batch, "T"), dtypes=INTEGERS, empty=False)
        x = torch.cat((prefix, self.token_embed(tokens[:, :-1]).to(prefix.dtype)), dim=1)
        x = self.read(x, past)[0][:, length - 1 :]  # the last of the prefix tells the first
        return F.linear(x, self.token_embed.weight)

    @torch.no_grad()
    def write(self, prefix: Tensor, most: int) -> Tensor:
        """Return the likeliest token after a prefix (B, N, E), the likeliest after that, and so on: (B, T) int64.

        T is at most ``most``; after ``</s>`` a row holds ``</s>`` alone. Of tokens before the newest k and v are kept.
        """
        most = positive_int("most", most)
        x, past = self.read(prefix)
        written = [F.linear(x[:, -1], self.token_embed.weight).argmax(1)]  # the last alone tells
        while len(written) < most and not (written[-1] == EOS).all():
            x = self.token_embed(written[-1])[:, None].to(prefix.dtype)
            logits, past = self(x, past)
            written.append(torch.where(written[-1] == EOS, EOS, logits[:, -1].argmax(1)))
        return torch.stack(written, dim=1)


def caption_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats, of all captions' tokens, up to the first ``</s>`` of each and with it.

    Shapes: logits (B, T, V), of which token stands at each place, and tokens (B, T) int64, those that do.
    """
    batch, length, _ = check_tensor("logits", logits, ("B", "T", "V"), empty=False)
    check_tensor("tokens", tokens, (batch, length), dtypes=(torch.int64,))
    ended = (tokens == EOS).cumsum(1) - (tokens == EOS).long() > 0  # one stood before
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.masked_fill(ended, -100).flatten())
