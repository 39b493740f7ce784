"""SigLIP's loss of a batch that many processes share: each keeps its images, and the texts go round."""

import torch
import torch.distributed as dist
from torch import Tensor

from siglip_lib.base.checks import positive_int
from siglip_lib.siglip.loss_block import finished, sigmoid_loss_block, wide_dtype
from siglip_lib.siglip.losses import SigmoidLoss, check_arguments

# Of a block. It is large, as a GPU computes one while Python prepares the next and its exchange; it has fewer texts
# than images, since what travels is kept several times over.
_IMAGES, _TEXTS = 16_384, 4096


def ring_sigmoid_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    *,
    chunk: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Return the loss of this rank's images against the texts of all ranks.

    The mean of what the ranks return is ``sigmoid_loss`` of the whole batch. Each rank calls ``backward`` on its own
    value. The gradients that arrive are those of the sum of all ranks' values: an image's from its own rank, a text's
    from every rank. So whoever averages the parameters' gradients over the ranks, as DDP and FSDP do, has those of the
    whole batch's loss; ``logit_scale`` and ``logit_bias``, of which each rank has a copy, are averaged like any other.
    What comes into the backward pass has to be the same number on every rank.

    A block of texts passes through all ranks, and its gradient follows one rank behind; both travel while the next
    block is computed. No rank ever holds more than its own vectors and a few blocks, whatever the number of ranks. As
    in ``sigmoid_loss`` the forward pass forms the gradients, so the texts go round once.

    Every rank of the group has to call it. They compare their arguments before any vectors travel. This goes from CPU
    to CPU where the group can do so, as with the backend "cpu:gloo,cuda:nccl", PyTorch's default; with "nccl" alone
    each call waits for the GPU.

    Args:
        image: this rank's image vectors (B, D), of length 1 in SigLIP; float16, bfloat16, float32 or float64. B, D and
            the dtype are the same on all ranks.
        text: its text vectors (M, D) of the same dtype, M the same on all ranks; without ids M is B.
        logit_scale: log of the temperature, shape (), one of the four dtypes, equal on all ranks.
        logit_bias: shape (), one of the four dtypes, equal on all ranks.
        image_ids: integers (B,). A pair belongs together where its two ids are equal, on whichever ranks the two are.
            Without ids image i of a rank belongs to text i of the same rank alone.
        text_ids: integers (M,).
        chunk: images, and texts, of a block; 16,384 images and 4096 texts if None.
        group: the processes that share the batch; all if None.

    Returns:
        The loss, shape (), in float32, or float64 if the vectors are, as in ``sigmoid_loss``.

    Raises:
        TypeError: an argument is not a tensor or not of an allowed dtype, or those of ``image`` and ``text`` differ.
        ValueError: a shape, a device or ``chunk`` is not as described, one of the ids is given without the other, or
            the ranks differ in sizes, dtype, ids, ``chunk`` or in whether gradients are recorded. If one rank's
            arguments are wrong, every rank raises.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (2023), section 3.3.
    """
    learned = (image, text, logit_scale, logit_bias)
    _check_all_ranks(*learned, image_ids, text_ids, chunk, group)
    chunk = None if chunk is None else int(chunk)
    learned = (image, text, logit_scale.reshape(()), logit_bias.reshape(()))
    with torch.autocast(image.device.type, enabled=False):
        if _recorded(learned):
            return _RingSigmoidLoss.apply(*learned, image_ids, text_ids, chunk, group)
        return _loss_and_gradients(*learned, image_ids, text_ids, chunk, group, False)[0]


class _RingSigmoidLoss(SigmoidLoss):
    """The loss, with its gradients formed in the forward pass; the backward pass is ``SigmoidLoss``'s."""

    @staticmethod
    def forward(ctx, image, text, logit_scale, logit_bias, image_ids, text_ids, chunk, group):
        learned = (image, text, logit_scale, logit_bias)
        loss, *gradients = _loss_and_gradients(*learned, image_ids, text_ids, chunk, group, True)
        return SigmoidLoss.keep(ctx, learned, loss, gradients)


def _loss_and_gradients(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    chunk: int | None,
    group: dist.ProcessGroup | None,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss and its gradients by image, text, logit_scale and logit_bias; zeros unless wanted."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    images, texts = (chunk, chunk) if chunk else (_IMAGES, _TEXTS)
    wide, device = wide_dtype(image), image.device
    if not image.is_cuda:  # a CPU's matrix product has no float32 result for half precision
        image, text = image.to(wide), text.to(wide)
    scale, bias = logit_scale.to(wide).exp(), logit_bias.to(wide)
    d_image = torch.zeros(image.shape if with_gradients else (), dtype=wide, device=device)
    d_text = torch.empty(text.shape if with_gradients else (), dtype=wide, device=device)
    if image_ids is not None:  # a few bytes a pair: every rank may have them all
        all_ids = torch.empty(world, len(text), dtype=torch.int64, device=device)
        dist.all_gather(list(all_ids), text_ids.to(torch.int64), group)
        image_ids = image_ids.to(torch.int64)

    count = min(texts, len(text))
    held, coming = (_Parcel(text[:count], wide, with_gradients) for _ in range(2))
    d_here = torch.empty(held.texts.shape if with_gradients else (), dtype=wide, device=device)
    parts = []
    home = None  # where the gradient ends that is on its way
    for first in range(0, len(text), texts):
        columns = slice(first, first + texts)
        m = len(text[columns])  # the last block may be narrower, what travels may not
        held.texts[:m] = text[columns]
        for hop in range(world):
            source = (rank - hop) % world  # whose texts these are
            follows = with_gradients and (hop > 0 or home is not None)
            exchange = _pass_on(held, coming, hop < world - 1, follows, group)
            here, d_part = held.texts[:m], d_here[:m].zero_() if with_gradients else None
            for i in range(0, len(image), images):
                rows = slice(i, i + images)
                if image_ids is None:
                    positive = (rank * len(image) + i) - (source * len(text) + first)
                else:
                    positive = image_ids[rows, None] == all_ids[source, columns]
                sums = (d_image[rows], d_part) if with_gradients else None
                part = sigmoid_loss_block(image[rows], here, scale, bias, positive, sums)
                parts.append(part)
            for work in exchange:
                work.wait()
            if with_gradients:
                if hop:  # what the ranks before found for these texts
                    coming.gradient[:m] += d_part
                else:  # what all ranks found for the texts before
                    if home is not None:
                        home.copy_(coming.gradient)
                    coming.gradient[:m] = d_part
            held, coming = coming, held
        home = d_text[columns] if with_gradients else None
    if with_gradients:
        for work in _pass_on(held, coming, False, True, group):
            work.wait()
        home.copy_(coming.gradient[: len(home)])
    return finished(parts, image, d_image, d_text, scale, with_gradients)


class _Parcel:
    """Texts, and the gradient that follows its texts one rank behind: in one piece, as each message costs time."""

    def __init__(self, like: Tensor, wide: torch.dtype, with_gradients: bool) -> None:
        self._cut = like.numel() * wide.itemsize if with_gradients else 0
        size = self._cut + like.numel() * like.element_size()
        self._bytes = torch.empty(size, dtype=torch.uint8, device=like.device)
        shape = (*like.shape[:-1], -1)
        self.gradient = self._bytes[: self._cut].view(wide).view(shape) if with_gradients else None
        self.texts = self._bytes[self._cut :].view(like.dtype).view(shape)

    def part(self, texts: bool, gradient: bool) -> Tensor:
        """Return the bytes of what shall travel."""
        return self._bytes[0 if gradient else self._cut : None if texts else self._cut]


def _pass_on(
    held: _Parcel, coming: _Parcel, texts: bool, gradient: bool, group: dist.ProcessGroup | None
) -> list[dist.Work]:
    """Begin to send a parcel to the next rank, and to fill another from the one before; both stay until waited for."""
    if not texts and not gradient:
        return []
    leaving, arriving = held.part(texts, gradient), coming.part(texts, gradient)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if world == 1:  # what leaves has arrived
        arriving.copy_(leaving)
        return []
    everyone = group or dist.group.WORLD
    after = dist.get_global_rank(everyone, (rank + 1) % world)
    before = dist.get_global_rank(everyone, (rank - 1) % world)
    sends = dist.P2POp(dist.isend, leaving, after, group)
    receives = dist.P2POp(dist.irecv, arriving, before, group)
    return dist.batch_isend_irecv([sends, receives])


def _recorded(learned: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in learned)


def _check_all_ranks(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    chunk: int | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Raise on every rank if one has wrong arguments, or others than the rest: else some would wait for ever."""
    world = dist.get_world_size(group)
    names = ("refused", "images", "texts", "channels", "bits", "ids", "chunk", "gradients")
    refused, mine = None, [1] + [0] * (len(names) - 1)
    try:
        check_arguments(image, text, logit_scale, logit_bias, image_ids, text_ids)
        block = 0 if chunk is None else positive_int("chunk", chunk)
        # bfloat16 and float16 both have 16
        kind = torch.finfo(image.dtype).bits + (image.dtype == torch.float16)
        recorded = _recorded((image, text, logit_scale, logit_bias))
        mine = [0, *image.shape[:1], *text.shape, kind, image_ids is not None, block, recorded]
    except (TypeError, ValueError) as error:
        refused = error
    where = "cpu" if "cpu:" in dist.get_backend_config(group) else "cuda"
    table = torch.empty(world, len(names), dtype=torch.int64, device=where)
    dist.all_gather(list(table), torch.tensor(mine, dtype=torch.int64, device=where), group)
    if refused:
        raise refused
    columns = dict(zip(names, table.T.tolist(), strict=True))
    if 1 in columns["refused"]:
        raise ValueError(f"the arguments of rank {columns['refused'].index(1)} were refused there")
    if differ := {name: found for name, found in columns.items() if len(set(found)) > 1}:
        raise ValueError(
            f"the ranks' arguments differ, rank by rank: {differ}; they must not, so leave out an uneven last batch"
        )
