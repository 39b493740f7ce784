"""SigLIP's loss of a batch that many processes share, each of which gets all texts: what the ring is compared with."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from siglip_lib.siglip.loss_pairs import LossSums, Pairs, loss_with_gradients
from siglip_lib.siglip.ring_loss import IMAGES, TEXTS, check_all_ranks

# from torch 2.13 on they have other names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gathered_sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the loss of this rank's images against the texts of all ranks, in the usual form.

    Every rank has all texts, holds the logits of its images with them, and leaves the gradients to autograd. Loss,
    gradients and arguments are those of ``ring_sigmoid_loss`` without ids, but it computes all of it in the vectors'
    dtype, and the loss, shape (), has it too. It checks nothing.
    """
    texts = _AllGather.apply(text, group)  # (R B, D)
    mine = dist.get_rank(group) * len(image)  # where this rank's own texts begin
    return loss_against_all(image, texts, logit_scale, logit_bias, mine)


def loss_against_all(
    image: Tensor, texts: Tensor, logit_scale: Tensor, logit_bias: Tensor, mine: int
) -> Tensor:
    """Return the loss of images (B, D) against all texts (R B, D); image i belongs to text ``mine + i``."""
    scale, bias = logit_scale.exp().to(image.dtype), logit_bias.to(image.dtype)
    logits = scale * image @ texts.t() + bias  # (B, R B)
    signs = torch.full_like(logits, -1)
    signs.diagonal(mine).fill_(1)
    return -F.logsigmoid(signs * logits).sum() / len(image)


def chunked_sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    chunk: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the loss of this rank's images against the texts of all ranks, with a block of the logits at a time.

    Every rank has all texts and, in the dtype of the sums, their gradients, but of the logits only a block, as large as
    the ring's. As there the forward pass forms the gradients; in it a reduce-scatter brings those of the texts home.

    Args, Returns, Raises: as ``ring_sigmoid_loss`` without ids.
    """
    pairs = Pairs(image, text, logit_scale, logit_bias)
    check_all_ranks(pairs, chunk, group)
    images, texts = (chunk, chunk) if chunk else (IMAGES, TEXTS)

    def compute(learned: tuple[Tensor, ...], with_gradients: bool) -> tuple[Tensor, ...]:
        image, text, *scalars = learned
        start = dist.get_rank(group) * len(image)  # of this rank's texts among all
        sums = LossSums(Pairs(image, _gathered(text, group), *scalars), with_gradients)
        for j in range(0, len(sums.text), texts):
            columns = slice(j, j + texts)
            for i in range(0, len(image), images):
                block = slice(i, i + images), sums.text[columns], start + i - j
                sums.add(*block, sums.d_text[columns])
        loss, d_image, d_texts, *d_scalars = sums.loss_and_gradients()
        return loss, d_image, _scattered(d_texts, group) if with_gradients else d_texts, *d_scalars

    return loss_with_gradients(pairs[:4], compute)


class _AllGather(torch.autograd.Function):
    """All ranks' vectors one below the other; what comes back to them is added up where they came from."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return _scattered(gradient, ctx.group), None


def _gathered(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    _all_gather(out, x.contiguous(), group=group)
    return out


def _scattered(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum over all ranks of this rank's rows of ``x``."""
    out = x.new_empty(len(x) // dist.get_world_size(group), *x.shape[1:])
    _reduce_scatter(out, x.contiguous(), group=group)
    return out
