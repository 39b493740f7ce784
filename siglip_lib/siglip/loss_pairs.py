"""What the losses in blocks share: the arguments, the sums over blocks, the backward pass."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from siglip_lib.base.checks import INTEGERS, check_tensor
from siglip_lib.siglip.loss_block import product_dtype, sigmoid_loss_block, wide_dtype


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
        return _is_recorded(self[:4])


def _is_recorded(learned: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in learned)


def loss_with_gradients(
    learned: tuple[Tensor, ...],
    compute: Callable[[tuple[Tensor, ...], bool], tuple[Tensor, ...]],
) -> Tensor:
    """Return the loss that ``compute`` gives; autograd gets the gradients that it forms beside it.

    ``learned`` are image, text and scalars. ``compute`` takes them, the scalars with shape (), and whether gradients
    are wanted. It returns what ``GradientSums.after`` does: the loss, and a gradient for each.
    """
    image, text, *scalars = learned
    learned = image, text, *(x.reshape(()) for x in scalars)
    recorded = _is_recorded(learned)
    with torch.autocast(image.device.type, enabled=False):
        with torch.no_grad():
            loss, *gradients = compute(learned, recorded)
        return _KnownGradients.apply(loss, *gradients, *learned) if recorded else loss


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients are known in the forward pass; the backward pass only multiplies them."""

    @staticmethod
    def forward(ctx, loss, *gradients_and_learned):
        half = len(gradients_and_learned) // 2
        # kept in float32: a gradient scaler's factor comes in first, then the rounding to float16
        ctx.save_for_backward(*gradients_and_learned[:half])
        ctx.dtypes = [x.dtype for x in gradients_and_learned[half:]]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, incoming):
        known = len(ctx.dtypes)
        needs = ctx.needs_input_grad[1 + known :]
        saved = zip(ctx.saved_tensors, ctx.dtypes, needs, strict=True)
        found = [(x * incoming).to(dtype) if needed else None for x, dtype, needed in saved]
        return *[None] * (1 + known), *found


class GradientSums:
    """A loss's vectors, and its gradients by them, added up block by block.

    Attributes:
        image: the images' vectors (B, D), in the dtype in which they are multiplied.
        text: the texts' vectors (M, D), in the same.
        scale: the temperature itself, shape (), in ``wide_dtype``.
        d_image: the sum for the images, see ``sigmoid_loss_block``: (B, D) in ``wide_dtype``; (B, 0) if no gradients
            are wanted.
        d_text: the sum for the texts, (M, D) or (M, 0).
    """

    def __init__(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, with_gradients: bool
    ) -> None:
        wide, dtype = wide_dtype(image), product_dtype(image)
        self.image, self.text = image.to(dtype), text.to(dtype)
        self.scale = logit_scale.to(wide).exp()
        self._with_gradients = with_gradients
        self.d_image, self.d_text = (
            torch.zeros(len(x), x.shape[1] if with_gradients else 0, dtype=wide, device=x.device)
            for x in (image, text)
        )

    def after(self, loss: Tensor, *d_scalars: Tensor) -> tuple[Tensor, ...]:
        """Return the loss, its gradients by image, text and logit_scale, and ``d_scalars``, those by other scalars.

        It can be called once, as the sums are changed. If no gradients are wanted, zeros of shape () stand for them.
        """
        if not self._with_gradients:
            return loss, *(torch.zeros_like(loss) for _ in range(3 + len(d_scalars)))
        images = len(self.image)
        self.d_image *= self.scale / images
        self.d_text *= self.scale / images
        # the sum over all pairs of d_logits * exp(logit_scale) * image @ text.T; d_image holds all but the image
        d_scale = (self.d_image * self.image).sum()
        return loss, self.d_image, self.d_text, d_scale, *d_scalars


class LossSums(GradientSums):
    """SigLIP's loss of some images and its gradients, added up block by block."""

    def __init__(self, pairs: Pairs, with_gradients: bool) -> None:
        super().__init__(pairs.image, pairs.text, pairs.logit_scale, with_gradients)
        self._bias = pairs.logit_bias.to(self.scale.dtype)
        self._parts: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: slice, text: Tensor, positive: int | Tensor, d_text: Tensor) -> None:
        """Add the pairs of the images ``rows`` and the texts (m, D), and to ``d_text`` the sum for these texts."""
        sums = (self.d_image[rows], d_text) if self._with_gradients else None
        block = self.image[rows], text, self.scale, self._bias, positive, sums
        self._parts.append(sigmoid_loss_block(*block))

    def loss_and_gradients(self) -> tuple[Tensor, ...]:
        """Return the loss and its gradients by image, text, logit_scale and logit_bias, as ``after`` does."""
        parts = zip(*self._parts, strict=True)
        return self.after(*(torch.stack(values).sum() / len(self.image) for values in parts))


def check_pairs(pairs: Pairs) -> None:
    """Raise the errors of ``sigmoid_loss``, but for those of ``chunk``."""
    image, text, logit_scale, logit_bias, image_ids, text_ids = pairs
    check_learned(image, text, logit_scale=logit_scale, logit_bias=logit_bias)
    if image_ids is None and text_ids is None:
        if len(text) != len(image):
            raise ValueError(
                f"text has {len(text)} rows; without ids it must have {len(image)}, as image has"
            )
        return
    for name, ids, vectors in (("image_ids", image_ids, image), ("text_ids", text_ids, text)):
        if ids is None:
            raise ValueError(f"{name}=None must be given, as the other ids are")
        check_tensor(name, ids, (len(vectors),), dtypes=INTEGERS, like=("image", image))


def check_learned(image: Tensor, text: Tensor, **scalars: Tensor) -> None:
    """Raise an error unless these are vectors (B, D) and (M, D) of one dtype and scalars, all on one device."""
    _, width = check_tensor("image", image, ("B", "D"), empty=False)
    like = "image", image
    check_tensor("text", text, ("M", width), empty=False, like=like)
    if text.dtype != image.dtype:
        raise TypeError(f"text is {text.dtype}; it must be {image.dtype}, as image is")
    for name, value in scalars.items():
        check_tensor(name, value, (), (1,), like=like)
