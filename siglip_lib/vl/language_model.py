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


class CausalAttention(Attention):
    """Self-attention in which a token attends to itself and to those before it.

    The library's own kernel has no mask, because no picture needs one; PyTorch's attention has this one, and leaves out
    the blocks of pairs that it hides.
    """

    def forward(self, x: Tensor, past: KV | None = None) -> tuple[Tensor, KV]:
        """Return the output (B, N, D), and k and v of all tokens so far; after a ``past`` N is 1."""
        q, *kv = self._heads(x)
        if past is not None:
            kv = [torch.cat(both, dim=1) for both in zip(past, kv, strict=True)]
        parts = (part.transpose(1, 2) for part in (q, *kv))  # (B, heads, N, head_dim)
        # after a past the newest token may see them all
        out = F.scaled_dot_product_attention(*parts, is_causal=past is None, scale=self.scale)
        return self.proj(out.transpose(1, 2).flatten(2)), tuple(kv)

    def attention_map(self, x: Tensor, past: KV | None = None) -> Tensor:
        """Return the weights (B, heads, N, keys) in float32; keys are those of a past, then those of x (B, N, D)."""
        q, k, _ = self._heads(x)
        k = k if past is None else torch.cat((past[0], k), dim=1)
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.einsum("bqhd, bkhd -> bhqk", self.scale * q.float(), k.float())
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
        return scores.masked_fill(later, -torch.inf).softmax(-1)


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
        context_length: most tokens of a sequence, those of pictures included.
        width: channels E.
        depth: number of blocks.
        num_heads: heads of each attention; divides ``width``.

    Shapes: x (B, N, E) to logits (B, N, V) and the past, of each block. After a past x is the one next token, N = 1.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), section 2.3 (pre-norm decoder);
    Press and Wolf, Using the Output Embedding to Improve Language Models (2017).
    """

    def __init__(
        self, vocab_size: int, context_length: int, width: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        width = positive_int("width", width)
        self.token_embed = nn.Embedding(positive_int("vocab_size", vocab_size), width)
        positions = torch.empty(1, positive_int("context_length", context_length), width)
        self.pos_embed = nn.Parameter(positions)
        depth = positive_int("depth", depth)
        self.blocks = nn.ModuleList(DecoderBlock(width, num_heads) for _ in range(depth))
        self.norm = LAYER_NORM(width)
        for table in (self.token_embed.weight, self.pos_embed):
            nn.init.normal_(table, std=width**-0.5)
        named_apply(init_rule("big_vision"), self.blocks, "blocks")

    def forward(self, x: Tensor, past: list[KV] | None = None) -> tuple[Tensor, list[KV]]:
        longest, width = self.pos_embed.shape[1:]
        length = check_tensor("x", x, ("B", "N", width), empty=False)[1]
        before = past[0][0].shape[1] if past else 0
        if past and length > 1:
            raise ValueError(f"x holds {length} tokens after a past; it must be one at a time")
        if before + length > longest:
            raise ValueError(f"{before + length} tokens are more than context_length={longest}")
        x = x + self.pos_embed[:, before : before + length]
        seen = []
        for block, before in zip(self.blocks, past or [None] * len(self.blocks), strict=True):
            x, kv = block(x, before)
            seen.append(kv)
        return self.norm(x) @ self.token_embed.weight.T, seen

    def caption_logits(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits (B, T, V) of each of a caption's tokens (B, T), after a prefix (B, N, E)."""
        batch, length, _ = check_tensor("prefix", prefix, ("B", "N", self.norm.normalized_shape[0]))
        check_tensor("tokens", tokens, (batch, "T"), dtypes=INTEGERS, empty=False)
        x = torch.cat((prefix, self.token_embed(tokens[:, :-1]).to(prefix.dtype)), dim=1)
        return self(x)[0][:, length - 1 :]  # the last of the prefix tells the first

    @torch.no_grad()
    def write(self, prefix: Tensor, most: int) -> Tensor:
        """Return the likeliest token after a prefix (B, N, E), the likeliest after that, and so on: (B, T) int64.

        T is at most ``most``; after ``</s>`` a row holds ``</s>`` alone. Of tokens before the newest k and v are kept.
        """
        most = positive_int("most", most)
        logits, past = self(prefix)
        written = [logits[:, -1].argmax(1)]
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
