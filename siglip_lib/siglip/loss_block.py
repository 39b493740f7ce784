"""One block of SigLIP's loss: of some images and some texts, the loss of each pair and its gradients.

Below it stands what CLIP's loss in blocks uses as well: the matrix products, and their dtypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_lib.base.observers import takes_kernel

# pairs of a block, 128 MiB in float32, from which the kernel runs, in one pass over memory: what is smaller stays in a
# GPU's cache from one plain pass to the next. Replayed from a graph the kernel is faster on an H200 down to 512 x 512
# (notebook 14, section 5); blocks that Python launches one by one were not compared.
_LARGE = 2**25


def sigmoid_loss_block(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    positive: int | Tensor,
    sums: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Return the loss of one block of pairs and its derivative by the bias, and add up the gradients.

    The gradient by ``logit_scale`` needs no look at the pairs: it is ``scale * (d_image * image).sum()`` in the end.

    Args:
        image: (b, D), float32 or float64, on a GPU also float16 or bfloat16.
        text: (m, D) of the same dtype.
        scale: the temperature itself, shape (), float32, or float64 if the vectors are.
        bias: shape () of the dtype of ``scale``.
        positive: which pairs belong together: a boolean tensor (b, m), or the number of a diagonal. 0 begins in the
            upper left corner, k > 0 k columns to its right, k < 0 -k rows below it, and one outside the block means
            that there are none.
        sums: d_image (b, D) and d_text (m, D) of the dtype of ``scale``, to which the gradients of this block's loss by
            ``scale * image`` and by ``scale * text`` are added, or None if no gradient is wanted.

    Returns:
        The sum of the loss over the pairs, shape (), and its derivative by the bias, shape (), 0 if ``sums`` is None.
    """
    dots = product(image, text.t())  # (b, m)
    unit = unit_of(image.dtype)
    dtype = None if sums is None else image.dtype  # the products need one dtype
    large = dots.dtype == torch.float32 and dots.numel() >= _LARGE
    if large and takes_kernel(dots):
        from siglip_lib.kernels.pair_losses import pair_losses as of_pairs
    else:
        of_pairs = _pair_losses
    loss, d_bias, d_logits = of_pairs(dots, scale, bias, positive, dtype, unit)
    del dots  # its memory is needed
    if sums is not None:
        add_gradients(d_logits, image, text, sums)
    return loss, d_bias


def _pair_losses(
    dots: Tensor,
    scale: Tensor,
    bias: Tensor,
    positive: int | Tensor,
    dtype: torch.dtype | None,
    unit: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what ``pair_losses`` of ``siglip_lib.kernels`` does, from any float dtype; ``dots`` is overwritten."""
    # wrong = -z * logits. The loss is log(1 + exp(wrong)) and its derivative sigmoid(wrong): small where a pair is
    # right, and never the difference of two large numbers. The matrix is overwritten at each step to stay in the cache.
    wrong = _change_sign(torch.addcmul(bias, dots, scale, out=dots), positive)
    d_bias, d_logits = torch.zeros_like(bias), None
    if dtype is not None:
        d_logits = torch.empty_like(wrong, dtype=dtype)
        if unit == 1.0:
            torch.sigmoid(wrong, out=d_logits)
        else:
            torch.mul(wrong.sigmoid(), 1 / unit, out=d_logits)
        _change_sign(d_logits, positive)
        d_bias = d_logits.sum(dtype=wrong.dtype) * unit
    # beyond the threshold softplus(x) is x: right to float64's last digit from 50 on, not yet from the usual 20 on
    return F.softplus(wrong, threshold=50, out=wrong).sum(), d_bias, d_logits


def _change_sign(x: Tensor, positive: int | Tensor) -> Tensor:
    """Change the sign of ``x`` (b, m) in place where ``positive`` says that a pair belongs together; return it."""
    if isinstance(positive, int):
        x.diagonal(positive).neg_()
        return x
    return x.addcmul_(x, positive, value=-2)  # x - 2x, without a second matrix of x's dtype


def add_gradients(
    d_logits: Tensor, image: Tensor, text: Tensor, sums: tuple[Tensor, Tensor]
) -> None:
    """Add to ``sums``, as ``sigmoid_loss_block`` has them, what the derivatives (b, m) by a block's logits make.

    ``d_logits`` has the dtype of the vectors and is in units of ``unit_of``.
    """
    d_image, d_text = sums
    unit = unit_of(d_logits.dtype)
    d_image.add_(product(d_logits, text), alpha=unit)
    d_text.add_(product(d_logits.t(), image), alpha=unit)


def unit_of(dtype: torch.dtype) -> float:
    """Return the unit in which derivatives by logits are rounded to ``dtype``; they are at most 1.

    Of a pair with logit -18 or less float16 would make a derivative of 0. In units of 2**-15 it reaches down to -27,
    and what was at most 1 is at most 32768, which it still holds.
    """
    return 2.0**-15 if dtype == torch.float16 else 1.0


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` in float32, or float64 if they are. ``product_dtype`` says who has such a product."""
    if a.dtype == wide_dtype(a):
        return a @ b
    return torch.mm(a, b, out_dtype=wide_dtype(a))


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which vectors ``x`` are multiplied: a CPU has no float32 product of half precision."""
    return x.dtype if x.is_cuda else wide_dtype(x)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the logits and sums for vectors ``x``."""
    return torch.promote_types(x.dtype, torch.float32)
