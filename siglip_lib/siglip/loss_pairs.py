"""What the sigmoid loss on one process and on many share: the arguments, the sums over blocks, the backward pass."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from siglip_lib.siglip.loss_block import sigmoid_loss_block, wide_dtype

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Pairs(NamedTuple):
    """The arguments of SigLIP's loss, which ``sigmoid_loss`` describes; the first four are learned."""

    image: Tensor
    text: Tensor
    logit_scale: Tensor
    logit_bias: Tensor
    image_ids: Tensor | None = None
    text_ids: Tensor | None = None

    def recorded(self) -> bool:
        """Whether autograd wants the gradient by any of these."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in self[:4])


def loss_with_gradients(
    pairs: Pairs, compute: Callable[[Pairs, bool], tuple[Tensor, ...]]
) -> Tensor:
    """Return the loss that ``compute`` gives; autograd gets the gradients that it forms beside it.

    ``compute`` takes the pairs, with ``logit_scale`` and ``logit_bias`` of shape (), and whether gradients are wanted.
    It returns what ``LossSums.loss_and_gradients`` does.
    """
    image, text, scale, bias, *ids = pairs
    pairs = Pairs(image, text, scale.reshape(()), bias.reshape(()), *ids)
    recorded = pairs.recorded()
    with torch.autocast(image.device.type, enabled=False):
        with torch.no_grad():
            loss, *gradients = compute(pairs, recorded)
        return _KnownGradients.apply(loss, *gradients, *pairs[:4]) if recorded else loss


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients are known in the forward pass; the backward pass only multiplies them."""

    @staticmethod
    def forward(ctx, loss, d_image, d_text, d_scale, d_bias, *learned):
        # kept in float32: a gradient scaler's factor comes in first, then the rounding to float16
        ctx.save_for_backward(d_image, d_text, d_scale, d_bias)
        ctx.dtypes = [x.dtype for x in learned]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, incoming):
        saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[5:], strict=True)
        found = [(x * incoming).to(dtype) if needed else None for x, dtype, needed in saved]
        return *[None] * 5, *found


class LossSums:
    """The loss of some images and its gradients, added up block by block.

    Attributes:
        image: the images' vectors (B, D), in the dtype in which they are multiplied.
        text: the texts' vectors (M, D), in the same.
        d_image: the sum for the images, see ``sigmoid_loss_block``: (B, D) in ``wide_dtype``; (B, 0) if no gradients
            are wanted.
        d_text: the sum for the texts, (M, D) or (M, 0).
    """

    def __init__(self, pairs: Pairs, with_gradients: bool) -> None:
        wide = wide_dtype(pairs.image)
        # a CPU's matrix product has no float32 result for half precision
        dtype = pairs.image.dtype if pairs.image.is_cuda else wide
        self.image, self.text = pairs.image.to(dtype), pairs.text.to(dtype)
        self._scale, self._bias = pairs.logit_scale.to(wide).exp(), pairs.logit_bias.to(wide)
        self._with_gradients = with_gradients
        self.d_image, self.d_text = (
            torch.zeros(len(x), x.shape[1] if with_gradients else 0, dtype=wide, device=x.device)
            for x in (self.image, self.text)
        )
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: slice, text: Tensor, positive: int | Tensor, d_text: Tensor) -> None:
        """Add the pairs of the images ``rows`` and the texts (m, D), and to ``d_text`` the sum for these texts."""
        sums = (self.d_image[rows], d_text) if self._with_gradients else None
        block = self.image[rows], text, self._scale, self._bias, positive, sums
        self._parts.append(sigmoid_loss_block(*block))

    def loss_and_gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the loss and its gradients by image, text, logit_scale and logit_bias; once, as the sums are changed.

        If no gradients are wanted, zeros of shape () stand for them.
        """
        images, parts = len(self.image), zip(*self._parts, strict=True)
        loss, d_bias = (torch.stack(values).sum() / images for values in parts)
        if not self._with_gradients:
            return loss, *(torch.zeros_like(loss) for _ in range(4))
        self.d_image *= self._scale / images
        self.d_text *= self._scale / images
        # the sum over all pairs of d_logits * exp(logit_scale) * image @ text.T; d_image holds all but the image
        d_scale = (self.d_image * self.image).sum()
        return loss, self.d_image, self.d_text, d_scale, d_bias


def check_pairs(pairs: Pairs) -> None:
    """Raise the errors of ``sigmoid_loss``, but for those of ``chunk``."""
    image, text = pairs.image, pairs.text
    check_vectors(image, text)
    check_scalar("logit_scale", pairs.logit_scale, image)
    check_scalar("logit_bias", pairs.logit_bias, image)
    ids = {"image_ids": (pairs.image_ids, image), "text_ids": (pairs.text_ids, text)}
    if pairs.image_ids is None and pairs.text_ids is None:
        ids = {}
        if len(text) != len(image):
            raise ValueError(
                f"text has {len(text)} rows; without ids it must have {len(image)}, as image has"
            )
    for name, (value, vectors) in ids.items():
        if value is None:
            raise ValueError(f"{name}=None must be given, as the other ids are")
        _check_tensor(name, value)
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} is {value.dtype}; it must be of integers")
        _check_shape(name, value, value.shape == (len(vectors),), f"({len(vectors)},)")
        _check_device(name, value, image)


def check_vectors(image: Tensor, text: Tensor) -> None:
    """Raise an error unless these are vectors (B, D) and (M, D) of one dtype on one device."""
    for name, value, shape in (("image", image, "(B, D)"), ("text", text, "(M, D)")):
        _check_tensor(name, value, floats=True)
        fits = value.ndim == 2 and 0 not in value.shape
        _check_shape(name, value, fits, f"{shape}, each at least 1")
    _check_shape("text", text, text.shape[1] == image.shape[1], f"(M, {image.shape[1]})")
    if text.dtype != image.dtype:
        raise TypeError(f"text is {text.dtype}; it must be {image.dtype}, as image is")
    _check_device("text", text, image)


def check_scalar(name: str, value: Tensor, image: Tensor) -> None:
    """Raise an error unless this is one floating-point element on the device of ``image``."""
    _check_tensor(name, value, floats=True)
    _check_shape(name, value, value.shape in ((), (1,)), "() or (1,)")
    _check_device(name, value, image)


def _check_tensor(name: str, value: Tensor, floats: bool = False) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if floats and value.dtype not in _DTYPES:
        raise TypeError(f"{name} is {value.dtype}; allowed are float16, bfloat16, float32, float64")


def _check_shape(name: str, value: Tensor, fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {wanted}")


def _check_device(name: str, value: Tensor, image: Tensor) -> None:
    if value.device != image.device:
        raise ValueError(f"{name} is on {value.device}; it must be on {image.device}, as image is")
