"""What a batch of image and text vectors is trained on: SigLIP's loss in blocks, and CLIP's to compare with."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from siglip_lib.base.checks import positive_int
from siglip_lib.base.operators import operators_of, register_operator
from siglip_lib.siglip.loss_block import finished, sigmoid_loss_block, wide_dtype

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHUNK = 4096  # blocks of 8192 take half the time on an H200 and three times the memory


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Return SigLIP's loss: of every image and every text it is asked whether the two belong together.

    With ``logits = exp(logit_scale) * image @ text.T + logit_bias``, and z = 1 for a pair that belongs together and
    -1 for any other, the loss is ``-logsigmoid(z * logits)``, summed over all pairs and divided by the number of
    images.

    The matrix of logits is never held, only a block of ``chunk`` x ``chunk`` at a time. The loss is one number, so the
    forward pass can form its gradients beside it, and the backward pass has only to multiply them by the gradient that
    comes in. If no gradient is recorded they are left out. Nothing waits for a value on a GPU, so a CUDA graph can
    hold the call; compiled code keeps it as one operator. There are no second derivatives.

    Args:
        image: image vectors (B, D), of length 1 in SigLIP; float16, bfloat16, float32 or float64.
        text: text vectors (M, D) of the same dtype; without ids M is B.
        logit_scale: log of the temperature t, shape () or (1,), one of the four dtypes. SigLIP starts at log(10).
        logit_bias: shape () or (1,), one of the four dtypes. SigLIP starts at -10.
        image_ids: integers (B,). A pair belongs together where its two ids are equal, so an image may have several
            texts or none, and a text several images. Without ids image i belongs to text i alone.
        text_ids: integers (M,).
        chunk: images, and texts, of a block; 4096 if None: 64 MiB of float32 logits.

    Returns:
        The loss, shape (), in float32, or float64 if the vectors are. So are all logits and sums, also under autocast;
        a gradient is rounded to its argument's dtype at the end. One more rounding happens on a GPU to float16 and
        bfloat16 vectors: the derivatives by the logits enter the matrix products in the vectors' dtype.

    Raises:
        TypeError: an argument is not a tensor or not of an allowed dtype, or those of ``image`` and ``text`` differ.
        ValueError: a shape, a device or ``chunk`` is not as described, or one of the ids is given without the other.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (2023), section 3.2 and Algorithm 1; section 3.3
    for the blocks. Several positives are not in the paper.
    """
    check_arguments(image, text, logit_scale, logit_bias, image_ids, text_ids)
    chunk = _CHUNK if chunk is None else positive_int("chunk", chunk)
    learned = (image, text, logit_scale.reshape(()), logit_bias.reshape(()))
    with torch.autocast(image.device.type, enabled=False):
        if torch.is_grad_enabled() and any(x.requires_grad for x in learned):
            return SigmoidLoss.apply(*learned, image_ids, text_ids, chunk)
        return _loss_and_gradients()(*learned, image_ids, text_ids, chunk, False)[0]


def softmax_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Return CLIP's loss: each image picks its text among all of the batch, and each text its image.

    With ``logits = exp(logit_scale) * image @ text.T`` it is the mean of two cross entropies, along the rows and along
    the columns, the diagonal being right. A softmax needs its whole row or column before it knows any gradient, so
    this form holds the B x B logits and more matrices of their size. It is here to compare with.

    Args:
        image: image vectors (B, D), of length 1 in CLIP; float16, bfloat16, float32 or float64.
        text: text vectors (B, D) of the same dtype.
        logit_scale: log of the temperature, shape () or (1,), one of the four dtypes.

    Returns:
        The loss, shape (), in float32, or float64 if the vectors are; so are the logits, also under autocast.

    Raises:
        TypeError: an argument is not a tensor or not of an allowed dtype, or those of ``image`` and ``text`` differ.
        ValueError: a shape or a device is not as described.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), figure 3.
    """
    _check_vectors(image, text)
    _check_scalar("logit_scale", logit_scale, image)
    if len(text) != len(image):
        raise ValueError(f"text has {len(text)} rows; it must have {len(image)}, as image has")
    logit_scale = logit_scale.reshape(())
    wide = wide_dtype(image)
    with torch.autocast(image.device.type, enabled=False):
        logits = logit_scale.to(wide).exp() * (image.to(wide) @ text.to(wide).t())  # (B, B)
        right = torch.arange(len(image), device=image.device)
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.t(), right)) / 2


class SigmoidLoss(torch.autograd.Function):
    """The loss, with its gradients formed in the forward pass."""

    @staticmethod
    def forward(ctx, image, text, logit_scale, logit_bias, image_ids, text_ids, chunk):
        learned = (image, text, logit_scale, logit_bias)
        loss, *gradients = _loss_and_gradients()(*learned, image_ids, text_ids, chunk, True)
        return SigmoidLoss.keep(ctx, learned, loss, gradients)

    @staticmethod
    def keep(ctx, learned, loss, gradients):
        # kept in float32: a gradient scaler's factor comes in first, then the rounding to float16
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [x.dtype for x in learned]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, incoming):
        saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:4], strict=True)
        found = [(x * incoming).to(dtype) if needed else None for x, dtype, needed in saved]
        return *found, *[None] * (len(ctx.needs_input_grad) - 4)


def _loss_and_gradients():
    """Return the function below, as an operator of its own for compiled code, which would unroll its loops."""
    if torch.compiler.is_compiling():
        return torch.ops.siglip_lib.sigmoid_loss
    return _loss_and_gradients_by_blocks


def _loss_and_gradients_by_blocks(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    chunk: int,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss and its gradients by image, text, logit_scale and logit_bias; zeros unless wanted."""
    wide, device = wide_dtype(image), image.device
    if not image.is_cuda:  # a CPU's matrix product has no float32 result for half precision
        image, text = image.to(wide), text.to(wide)
    scale, bias = logit_scale.to(wide).exp(), logit_bias.to(wide)
    d_image = torch.zeros(image.shape if with_gradients else (), dtype=wide, device=device)
    d_text = torch.zeros(text.shape if with_gradients else (), dtype=wide, device=device)
    parts = []
    for i in range(0, len(image), chunk):
        for j in range(0, len(text), chunk):
            rows, columns = slice(i, i + chunk), slice(j, j + chunk)
            positive = i - j if image_ids is None else image_ids[rows, None] == text_ids[columns]
            sums = (d_image[rows], d_text[columns]) if with_gradients else None
            part = sigmoid_loss_block(image[rows], text[columns], scale, bias, positive, sums)
            parts.append(part)
    return finished(parts, image, d_image, d_text, scale, with_gradients)


def _fake(image, text, logit_scale, logit_bias, image_ids, text_ids, chunk, with_gradients):
    shapes = ((), image.shape, text.shape, (), ()) if with_gradients else ((),) * 5
    return tuple(image.new_empty(shape, dtype=wide_dtype(image)) for shape in shapes)


register_operator(operators_of(__name__), "sigmoid_loss", _loss_and_gradients_by_blocks, _fake)


def check_arguments(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
) -> None:
    """Refuse what ``sigmoid_loss`` does not take."""
    _check_vectors(image, text)
    _check_scalar("logit_scale", logit_scale, image)
    _check_scalar("logit_bias", logit_bias, image)
    _check_ids(image_ids, text_ids, image, text)


def _check_vectors(image: Tensor, text: Tensor) -> None:
    for name, value, shape in (("image", image, "(B, D)"), ("text", text, "(M, D)")):
        _check_float_tensor(name, value)
        if value.ndim != 2 or 0 in value.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it must be {shape}, each at least 1"
            )
    if text.shape[1] != image.shape[1]:
        raise ValueError(f"text has shape {tuple(text.shape)}; it must be (M, {image.shape[1]})")
    if text.dtype != image.dtype:
        raise TypeError(f"text is {text.dtype}; it must be {image.dtype}, as image is")
    _check_device("text", text, image)


def _check_scalar(name: str, value: Tensor, image: Tensor) -> None:
    _check_float_tensor(name, value)
    if value.shape not in ((), (1,)):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be () or (1,)")
    _check_device(name, value, image)


def _check_ids(
    image_ids: Tensor | None, text_ids: Tensor | None, image: Tensor, text: Tensor
) -> None:
    if image_ids is None and text_ids is None:
        if len(image) != len(text):
            raise ValueError(
                f"text has {len(text)} rows; without ids it must have {len(image)}, as image has"
            )
        return
    for name, ids, length in (
        ("image_ids", image_ids, len(image)),
        ("text_ids", text_ids, len(text)),
    ):
        if ids is None:
            raise ValueError(f"{name}=None must be given, as the other ids are")
        if not isinstance(ids, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(ids).__name__}")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise TypeError(f"{name} is {ids.dtype}; it must be of integers")
        if ids.shape != (length,):
            raise ValueError(f"{name} has shape {tuple(ids.shape)}; it must be ({length},)")
        _check_device(name, ids, image)


def _check_float_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name} is {value.dtype}; allowed are float16, bfloat16, float32, float64")


def _check_device(name: str, value: Tensor, image: Tensor) -> None:
    if value.device != image.device:
        raise ValueError(f"{name} is on {value.device}; it must be on {image.device}, as image is")
