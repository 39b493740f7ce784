"""SigLIP's loss of a block of pairs in one Triton kernel: from dot products to losses and their derivatives.

Written out, it is a dozen passes over a matrix with an element for each pair. Here each element is read once, and what
leaves is its derivative, in the dtype of the matrix product that comes next. Of the losses only a sum leaves.

How the work is split: a thread block has a tile of the matrix, some rows by some columns, in registers. It adds up its
own losses and stores the sum at its own index; the sum of these sums has the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 4, 1024  # of a tile: 32 elements for each of 4 warps' threads


def pair_losses(
    dots: Tensor,
    scale: Tensor,
    bias: Tensor,
    positive: int | Tensor,
    dtype: torch.dtype | None,
    unit: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what a block of pairs adds to SigLIP's loss, and the derivatives.

    With ``logits = scale * dots + bias``, and z = 1 for a pair that belongs together and -1 for any other, a pair's
    loss is ``softplus(-z * logits)``. All arithmetic is in float32. The caller has checked the arguments.

    Args:
        dots: dot products (b, m), float32, contiguous; on a GPU, or on a CPU in Triton's interpreter.
        scale: shape (), float32.
        bias: shape (), float32.
        positive: which pairs belong together: booleans (b, m), or the number of a diagonal, as in
            ``sigmoid_loss_block``.
        dtype: of the derivatives; None if none is wanted.
        unit: what the derivatives are divided by before they are rounded.

    Returns:
        The sum of the losses, shape (), float32; its derivative by the bias, shape (), float32; and its derivatives by
        the logits over ``unit``, (b, m). The last two are 0 and None if no ``dtype`` is given.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (2023), section 3.2.
    """
    rows, columns = dots.shape
    across = triton.cdiv(columns, _COLUMNS)
    programs = triton.cdiv(rows, _ROWS) * across
    loss = dots.new_empty(programs)
    # without gradients the kernel looks at neither
    d_bias = loss if dtype is None else torch.empty_like(loss)
    d_logits = loss if dtype is None else torch.empty_like(dots, dtype=dtype)
    matrix = isinstance(positive, Tensor)
    together = positive.contiguous().view(torch.uint8) if matrix else dots
    given = (dots, together, d_logits, loss, d_bias, scale, bias, 0 if matrix else positive)
    constants = dict(MATRIX=matrix, GRADIENTS=dtype is not None, ROWS=_ROWS, COLUMNS=_COLUMNS)
    with torch.cuda.device_of(dots):  # Triton launches on the current GPU, not on the tensor's
        _kernel[(programs,)](*given, rows, columns, across, 1 / unit, **constants)
    if dtype is None:
        return loss.sum(), torch.zeros_like(bias), None
    return loss.sum(), d_bias.sum(), d_logits


# else some diagonals would have the kernel compiled anew
@triton.jit(do_not_specialize=["diagonal"])
def _kernel(
    dots, positive, d_logits, loss, d_bias, scale, bias, diagonal, rows, columns,
    across,  # tiles side by side
    factor,  # of the derivatives
    MATRIX: tl.constexpr, GRADIENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row = (tile // across * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tile % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < columns)
    place = row.to(tl.int64) * columns + column  # there may be more than 2**31 pairs
    logits = tl.load(dots + place, mask=inside, other=0.0) * tl.load(scale) + tl.load(bias)
    if MATRIX:  # noqa: SIM108  known at compile time
        together = tl.load(positive + place, mask=inside, other=0) != 0
    else:
        together = column - row == diagonal

    # -z * logits: the loss is log(1 + exp(wrong)) and its derivative sigmoid(wrong)
    wrong = tl.where(together, -logits, logits)
    small = tl.exp(-tl.abs(wrong))  # at most 1, so nothing overflows
    above = 1.0 + small
    # log(1 + small) to the last digit where most of small is lost in the sum
    kept = tl.where(above == 1.0, 1.0, above - 1.0)
    log = tl.where(above == 1.0, small, tl.log(above) * (small / kept))
    losses = tl.where(inside, tl.maximum(wrong, 0.0) + log, 0.0)
    tl.store(loss + tile, tl.sum(losses))
    if GRADIENTS:
        slope = tl.where(wrong >= 0, 1.0, small) / above
        slope = tl.where(together, -slope, slope)
        tl.store(d_bias + tile, tl.sum(tl.where(inside, slope, 0.0)))
        tl.store(d_logits + place, (slope * factor).to(d_logits.dtype.element_ty), mask=inside)
