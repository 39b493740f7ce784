"""What a batch of image and text vectors is trained on: SigLIP's loss in blocks, and CLIP's to compare with.

Neither has to hold the matrix of logits. They differ in what a block needs. SigLIP's loss of a block, and its
gradients, need the block's own images and texts: one pass over the blocks does it, and over many GPUs only texts and
their gradients travel. CLIP's need the sums of whole rows and columns: a pass for these, one for the gradients, and
over many GPUs an exchange of the sums in between.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_lib.base.checks import positive_int
from siglip_lib.base.operators import operators_of, register_operator
from siglip_lib.siglip.loss_block import wide_dtype
from siglip_lib.siglip.loss_pairs import (
    LossSums,
    Pairs,
    check_learned,
    check_pairs,
    loss_with_gradients,
)
from siglip_lib.siglip.softmax_blocks import softmax_by_blocks

_CHUNK = 4096  # blocks of 8192 take half the time on an H200 and three times the memory


def plain_sigmoid_loss(image, text, logit_scale, logit_bias, image_ids=None, text_ids=None):
    """Return SigLIP's loss in ten lines: what ``sigmoid_loss`` and ``ring_sigmoid_loss`` must equal.

    It holds the whole matrix of logits, leaves the gradients to autograd, computes in the dtypes that it is given, and
    checks nothing. Arguments are those of ``sigmoid_loss``.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (2023), Algorithm 1; the ids are not in it.
    """
    if image_ids is None:
        image_ids = text_ids = torch.arange(len(image), device=image.device)
    logits = logit_scale.exp() * image @ text.t() + logit_bias  # (B, M)
    z = 2 * (image_ids[:, None] == text_ids).to(logits.dtype) - 1  # 1 and -1
    return -F.logsigmoid(z * logits).sum() / len(image)


def plain_softmax_loss(image, text, logit_scale):
    """Return CLIP's loss in ten lines: what ``softmax_loss`` must equal.

    It holds the B x B logits, in float32 or float64, and more matrices of their size for autograd; it checks nothing.
    Arguments are those of ``softmax_loss``.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), figure 3.
    """
    image, text, logit_scale = (x.to(wide_dtype(image)) for x in (image, text, logit_scale))
    logits = logit_scale.exp() * (image @ text.t())  # (B, B)
    right = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.t(), right)) / 2


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
    pairs = Pairs(image, text, logit_scale, logit_bias, image_ids, text_ids)
    check_pairs(pairs)
    chunk = _CHUNK if chunk is None else positive_int("chunk", chunk)
    # compiled code takes an operator of its own, as it would unroll the loops
    compiled = torch.compiler.is_compiling()
    blocks = torch.ops.siglip_lib.sigmoid_loss if compiled else _sigmoid_by_blocks
    ids = image_ids, text_ids
    return loss_with_gradients(
        pairs[:4], lambda learned, wanted: blocks(*learned, *ids, chunk, wanted)
    )


def softmax_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, *, chunk: int | None = None
) -> Tensor:
    """Return CLIP's loss: each image picks its text among all of the batch, and each text its image.

    With ``logits = exp(logit_scale) * image @ text.T`` it is the mean of two cross entropies, along the rows and along
    the columns, the diagonal being right. It is here to compare with.

    As in ``sigmoid_loss`` only a block of the logits is held at a time, the gradients are formed in the forward pass,
    and nothing waits for a value on a GPU. A pair's gradient depends on the sums of its whole row and column, so there
    are two passes over the blocks: one for the sums, and if a gradient is recorded one for the gradients. The second
    makes each block's logits anew, and so computes four matrix products a block where ``sigmoid_loss`` has three.

    Args:
        image: image vectors (B, D), of length 1 in CLIP; float16, bfloat16, float32 or float64.
        text: text vectors (B, D) of the same dtype; image i belongs to text i alone.
        logit_scale: log of the temperature, shape () or (1,), one of the four dtypes.
        chunk: images, and texts, of a block; 4096 if None.

    Returns:
        The loss, shape (); dtypes and rounding, also of the gradients, are those of ``sigmoid_loss``.

    Raises:
        TypeError, ValueError: as ``sigmoid_loss`` without ids.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), figure 3;
    Cheng et al., Breaking the Memory Barrier: Near Infinite Batch Size Scaling for Contrastive Loss (2024), for the
    blocks.
    """
    check_learned(image, text, logit_scale=logit_scale)
    if len(text) != len(image):
        raise ValueError(f"text has {len(text)} rows; it must have {len(image)}, as image has")
    chunk = _CHUNK if chunk is None else positive_int("chunk", chunk)
    compiled = torch.compiler.is_compiling()
    blocks = torch.ops.siglip_lib.softmax_loss if compiled else softmax_by_blocks
    return loss_with_gradients(
        (image, text, logit_scale), lambda learned, wanted: blocks(*learned, chunk, wanted)
    )


def _sigmoid_by_blocks(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor,
    image_ids: Tensor | None, text_ids: Tensor | None, chunk: int, with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what ``LossSums.loss_and_gradients`` does. An operator takes no ``Pairs``."""
    pairs = Pairs(image, text, logit_scale, logit_bias, image_ids, text_ids)
    sums = LossSums(pairs, with_gradients)
    for i in range(0, len(pairs.image), chunk):
        for j in range(0, len(pairs.text), chunk):
            rows, columns = slice(i, i + chunk), slice(j, j + chunk)
            positive = i - j
            if pairs.image_ids is not None:
                positive = pairs.image_ids[rows, None] == pairs.text_ids[columns]
            sums.add(rows, sums.text[columns], positive, sums.d_text[columns])
    return sums.loss_and_gradients()


def _fake_sigmoid(image, text, scale, bias, image_ids, text_ids, chunk, with_gradients):
    return _fake_results(image, text, 2, with_gradients)


def _fake_softmax(image, text, scale, chunk, with_gradients):
    return _fake_results(image, text, 1, with_gradients)


def _fake_results(image: Tensor, text: Tensor, scalars: int, with_gradients: bool):
    vectors = (image.shape, text.shape) if with_gradients else ((), ())
    shapes = (), *vectors, *[()] * scalars
    return tuple(image.new_empty(shape, dtype=wide_dtype(image)) for shape in shapes)


_operators = operators_of(__name__)
register_operator(_operators, "sigmoid_loss", _sigmoid_by_blocks, _fake_sigmoid)
register_operator(_operators, "softmax_loss", softmax_by_blocks, _fake_softmax)
