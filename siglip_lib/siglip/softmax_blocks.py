"""CLIP's loss in blocks: a first pass over the pairs for the sums of rows and columns, a second for the gradients."""

import math

import torch
from torch import Tensor

from siglip_lib.siglip.loss_block import add_gradients, product, unit_of
from siglip_lib.siglip.loss_pairs import GradientSums


def softmax_by_blocks(
    image: Tensor, text: Tensor, logit_scale: Tensor, chunk: int, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what ``GradientSums.after`` does: the loss, and its gradients by image, text and logit_scale.

    Source: Cheng et al., Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss (2024).
    """
    sums = GradientSums(image, text, logit_scale, with_gradients)
    parts = [slice(i, i + chunk) for i in range(0, len(image), chunk)]
    blocks = [(rows, columns) for rows in parts for columns in parts]
    right = sums.scale.new_empty(len(image))  # the logits of the pairs that belong together
    of_rows, of_columns = (SumsOfExp(right) for _ in range(2))
    for rows, columns in blocks:
        logits = logits_of(sums, rows, sums.text[columns])
        of_rows.add(rows, logits)
        of_columns.add(columns, logits.t())
        if rows == columns:
            right[rows] = logits.diagonal()
        del logits  # its memory is needed
    loss = sum(x.peak - right + x.total.log() for x in (of_rows, of_columns)).mean() / 2
    for rows, columns in blocks if with_gradients else ():
        logits = logits_of(sums, rows, sums.text[columns])
        diagonal = rows.start - columns.start
        d_logits = d_logits_of(
            logits, of_rows, rows, of_columns, columns, diagonal, sums.text.dtype
        )
        of_block = sums.d_image[rows], sums.d_text[columns]
        del logits
        add_gradients(d_logits, sums.image[rows], sums.text[columns], of_block)
        del d_logits
    return sums.after(loss)


class SumsOfExp:
    """Of each row of a matrix that comes in blocks, the sum of exp: ``total * exp(peak)``.

    The peak is the largest element so far, so no exponent is above 0. Peak and total stay apart, since the logarithm
    of their product would keep fewer digits of a small total beside a large peak.
    """

    def __init__(self, like: Tensor) -> None:
        self.peak, self.total = torch.full_like(like, -math.inf), torch.zeros_like(like)

    def add(self, rows: slice, block: Tensor) -> None:
        old, peak = self.peak[rows], torch.maximum(self.peak[rows], block.amax(1))
        new = (block - peak[:, None]).exp_().sum(1)
        self.total[rows] = self.total[rows] * (old - peak).exp() + new
        self.peak[rows] = peak


def logits_of(sums: GradientSums, rows: slice, text: Tensor) -> Tensor:
    """Return the logits (b, m) of the images ``rows`` with texts (m, D), without a bias."""
    return product(sums.image[rows], text.t()).mul_(sums.scale)


def d_logits_of(
    logits: Tensor,
    of_rows: SumsOfExp,
    rows: slice,
    of_columns: SumsOfExp,
    columns: slice,
    diagonal: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the derivatives by a block's logits, times B: the mean of both softmaxes, less 1 where a pair is right.

    Args:
        logits: (b, m), overwritten.
        of_rows: the sums of whole rows.
        rows: which of them are the block's.
        of_columns: the sums of whole columns.
        columns: which of them are the block's.
        diagonal: of the block, on which the pairs are right, as ``positive`` in ``sigmoid_loss_block``.
        dtype: of the vectors and of what is returned, in units of ``unit_of``.
    """
    one = 1 / unit_of(dtype)
    found = (logits - of_rows.peak[rows, None]).exp_().mul_(one / 2 / of_rows.total[rows, None])
    logits.sub_(of_columns.peak[columns]).exp_()  # a third matrix is not needed
    found.addcmul_(logits, one / 2 / of_columns.total[columns])
    found.diagonal(diagonal).sub_(one)
    return found.to(dtype)
