"""CLIP's loss of a batch that many processes share, over the ring: what the sigmoid loss's ring is compared with.

The texts go round twice. In the first turn every rank adds up exp over the rows of its images and, for each text of all
ranks, over its images' part of the column; two all-reduces, of a number for each text, join the columns' parts.
In the second turn the gradients are formed and travel as those of ``ring_sigmoid_loss`` do.
"""

import torch.distributed as dist
from torch import Tensor

from siglip_lib.siglip.loss_block import add_gradients
from siglip_lib.siglip.loss_pairs import GradientSums, Pairs, loss_with_gradients
from siglip_lib.siglip.ring_loss import IMAGES, TEXTS, check_all_ranks, go_round
from siglip_lib.siglip.softmax_blocks import SumsOfExp, d_logits_of, logits_of


def ring_softmax_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    chunk: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return CLIP's loss of this rank's images, which pick among all ranks' texts, and of its texts, among all images.

    The mean of what the ranks return is ``softmax_loss`` of the whole batch; gradients, ranks and checks are as in
    ``ring_sigmoid_loss``. No rank holds more than its own vectors, a few blocks, and two numbers for each text of all
    ranks.

    Args:
        image: this rank's image vectors (B, D), as for ``softmax_loss``; B, D and the dtype are the same on all ranks.
        text: its text vectors (B, D); image i of a rank belongs to text i of the same rank alone.
        logit_scale: as for ``softmax_loss``; equal on all ranks.
        chunk: images, and texts, of a block; 16,384 images and 4096 texts if None.
        group: the processes that share the batch; all if None.

    Returns:
        The loss, shape (), in float32, or float64 if the vectors are.

    Raises:
        TypeError, ValueError: as ``ring_sigmoid_loss`` without ids.

    Source: Cheng et al., Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss (2024),
    which passes the vectors round in the same way.
    """
    check_all_ranks(Pairs(image, text, logit_scale, logit_scale), chunk, group)  # there is no bias
    return loss_with_gradients(
        (image, text, logit_scale),
        lambda learned, wanted: _loss_and_gradients(*learned, wanted, chunk, group),
    )


def _loss_and_gradients(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    with_gradients: bool,
    chunk: int | None,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, ...]:
    """Return what ``GradientSums.after`` does."""
    rank, world, pairs = dist.get_rank(group), dist.get_world_size(group), len(image)
    images, texts = (chunk, chunk) if chunk else (IMAGES, TEXTS)
    sums = GradientSums(image, text, logit_scale, with_gradients)
    parts = [slice(i, i + images) for i in range(0, pairs, images)]
    right = sums.scale.new_empty(pairs)  # the logits of the pairs that belong together
    of_rows = SumsOfExp(right)
    of_columns = SumsOfExp(sums.scale.new_empty(world * pairs))

    def place(source: int, first: int, block: Tensor) -> slice:
        start = source * pairs + first
        return slice(start, start + len(block))

    def add_up(source: int, first: int, block: Tensor, _: Tensor) -> None:
        for rows in parts:
            logits = logits_of(sums, rows, block)
            of_rows.add(rows, logits)
            of_columns.add(place(source, first, block), logits.t())
            if source == rank:
                found, start = logits.diagonal(rows.start - first), max(rows.start, first)
                right[start : start + len(found)] = found
                del found  # it lies in the logits
            del logits  # its memory is needed

    def differentiate(source: int, first: int, block: Tensor, d_block: Tensor) -> None:
        columns = place(source, first, block)
        for rows in parts:
            logits = logits_of(sums, rows, block)
            diagonal = rank * pairs + rows.start - columns.start
            d_logits = d_logits_of(
                logits, of_rows, rows, of_columns, columns, diagonal, sums.text.dtype
            )
            del logits
            add_gradients(d_logits, sums.image[rows], block, (sums.d_image[rows], d_block))
            del d_logits

    go_round(sums.text, sums.d_text[:, :0], texts, add_up, group)
    peak = of_columns.peak.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    of_columns.total *= (of_columns.peak - peak).exp()
    of_columns.peak = peak
    dist.all_reduce(of_columns.total, group=group)
    mine = slice(rank * pairs, (rank + 1) * pairs)
    rows = of_rows.peak - right + of_rows.total.log()
    columns = of_columns.peak[mine] - right + of_columns.total[mine].log()
    loss = (rows + columns).mean() / 2
    if with_gradients:
        go_round(sums.text, sums.d_text, texts, differentiate, group)
    return sums.after(loss)
