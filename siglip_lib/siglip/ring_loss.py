"""SigLIP's loss of a batch that many processes share: each keeps its images, and the texts go round.

The ranks stand in a ring. One round takes a block of texts of every rank through all ranks, in as many hops as there
are ranks. In a hop, a rank

1. begins to send the block that it holds to the next rank, and with it the gradient that the rank before finished;
2. meanwhile computes its images' loss against this block, and the block's gradient from its own images;
3. waits for what the rank before sent: the next block, and the gradient that the ranks before found for the block just
   computed. To that it adds its own.

So a block's gradient follows the block one hop behind. After the last hop of a round it has one hop to go, to the rank
whose texts these are: it travels in the first hop of the next round, or by itself after the last round.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from siglip_lib.base.checks import positive_int
from siglip_lib.siglip.loss_pairs import LossSums, Pairs, check_pairs, loss_with_gradients

# Of a block. It is large, as a GPU computes one while Python prepares the next and its exchange; it has fewer texts
# than images, since what travels is kept several times over.
IMAGES, TEXTS = 16_384, 4096


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

    Texts and their gradients travel while the next block is computed, see the module's head. No rank ever holds more
    than its own vectors and a few blocks, whatever the number of ranks. As in ``sigmoid_loss`` the forward pass forms
    the gradients, so the texts go round once.

    Every rank of the group has to call it. They compare their arguments before any vectors travel. This goes from CPU
    to CPU where the group can do so, as with the backend "cpu:gloo,cuda:nccl", PyTorch's default; with "nccl" alone
    each call waits for the GPU.

    Args:
        image: this rank's image vectors (B, D), as for ``sigmoid_loss``; B, D and the dtype are the same on all ranks.
        text: its text vectors (M, D) of the same dtype, M the same on all ranks; without ids M is B.
        logit_scale: as for ``sigmoid_loss``; equal on all ranks.
        logit_bias: the same.
        image_ids: integers (B,). A pair belongs together where its two ids are equal, on whichever ranks the two are.
            Without ids image i of a rank belongs to text i of the same rank alone.
        text_ids: integers (M,).
        chunk: images, and texts, of a block; 16,384 images and 4096 texts if None.
        group: the processes that share the batch; all if None.

    Returns:
        The loss, shape (), in float32, or float64 if the vectors are, as in ``sigmoid_loss``.

    Raises:
        TypeError, ValueError: as for ``sigmoid_loss``; the ranks differ in sizes, dtype, ids, ``chunk`` or in whether
            gradients are recorded. If one rank's arguments are wrong, every rank raises.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (2023), section 3.3.
    """
    pairs = Pairs(image, text, logit_scale, logit_bias, image_ids, text_ids)
    check_all_ranks(pairs, chunk, group)
    ids = image_ids, text_ids
    return loss_with_gradients(
        pairs[:4],
        lambda learned, wanted: _loss_and_gradients(Pairs(*learned, *ids), wanted, chunk, group),
    )


def _loss_and_gradients(
    pairs: Pairs, with_gradients: bool, chunk: int | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, ...]:
    """Return what ``LossSums.loss_and_gradients`` does."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    images, texts = (chunk, chunk) if chunk else (IMAGES, TEXTS)
    sums = LossSums(pairs, with_gradients)
    image, text = sums.image, sums.text
    if pairs.image_ids is not None:  # a few bytes a pair: every rank may have them all
        all_ids = torch.empty(world, len(text), dtype=torch.int64, device=text.device)
        dist.all_gather(list(all_ids), pairs.text_ids.to(torch.int64), group)
        image_ids = pairs.image_ids.to(torch.int64)

    def visit(source: int, first: int, block: Tensor, d_block: Tensor) -> None:
        for i in range(0, len(image), images):
            rows = slice(i, i + images)
            positive = (rank * len(image) + i) - (source * len(text) + first)
            if pairs.image_ids is not None:
                positive = image_ids[rows, None] == all_ids[source, first : first + len(block)]
            sums.add(rows, block, positive, d_block)

    go_round(text, sums.d_text, texts, visit, group)
    return sums.loss_and_gradients()


def go_round(
    text: Tensor,
    d_text: Tensor,
    texts: int,
    visit: Callable[[int, int, Tensor, Tensor], None],
    group: dist.ProcessGroup | None,
) -> None:
    """Let every rank's texts visit every rank, ``texts`` at a time, and bring their gradients home.

    Args:
        text: this rank's texts (M, D); M is the same on all ranks.
        d_text: (M, D) or, without gradients, (M, 0); it becomes the sum of what all ranks found for these texts.
        texts: of a block.
        visit: called as ``visit(source, first, block, d_block)`` with a block (m, D) that begins at text ``first`` of
            rank ``source``; it adds this rank's part of the block's gradient to ``d_block``, which is 0.
        group: the ranks.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    held, coming = (_Parcel(text[:texts], d_text[:texts]) for _ in range(2))
    d_block = torch.empty_like(held.gradient)
    for first in range(0, len(text), texts):
        columns = slice(first, first + texts)
        m = len(text[columns])  # the last block may be narrower, what travels may not
        held.texts[:m] = text[columns]
        for hop in range(world):
            source = (rank - hop) % world  # whose texts these are
            exchange = _pass_on(held, coming, hop < world - 1, first > 0 or hop > 0, group)
            d_block.zero_()
            visit(source, first, held.texts[:m], d_block[:m])
            for work in exchange:
                work.wait()
            if hop:
                coming.gradient[:m] += d_block[:m]
            else:  # what came is the whole gradient of this rank's block before
                if first:
                    d_text[first - texts : first] = coming.gradient
                coming.gradient[:m] = d_block[:m]
            held, coming = coming, held
    for work in _pass_on(held, coming, False, True, group):
        work.wait()
    d_text[columns] = coming.gradient[:m]


class _Parcel:
    """Room for texts and for a gradient like these: in one piece, as each message costs time."""

    def __init__(self, texts: Tensor, gradient: Tensor) -> None:
        self._cut = gradient.nbytes
        self._bytes = torch.empty(self._cut + texts.nbytes, dtype=torch.uint8, device=texts.device)
        self.gradient = self._bytes[: self._cut].view(gradient.dtype).view(gradient.shape)
        self.texts = self._bytes[self._cut :].view(texts.dtype).view(texts.shape)

    def part(self, texts: bool, gradient: bool) -> Tensor:
        """Return the bytes of what shall travel."""
        return self._bytes[0 if gradient else self._cut : None if texts else self._cut]


def _pass_on(
    held: _Parcel, coming: _Parcel, texts: bool, gradient: bool, group: dist.ProcessGroup | None
) -> list[dist.Work]:
    """Begin to send a parcel to the next rank, and to fill another from the one before; both stay until waited for."""
    leaving, arriving = held.part(texts, gradient), coming.part(texts, gradient)
    if not len(leaving):
        return []
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if world == 1:  # what leaves has arrived
        arriving.copy_(leaving)
        return []
    after, before = (
        dist.get_global_rank(group or dist.group.WORLD, (rank + step) % world) for step in (1, -1)
    )
    send = dist.P2POp(dist.isend, leaving, after, group)
    receive = dist.P2POp(dist.irecv, arriving, before, group)
    return dist.batch_isend_irecv([send, receive])


def check_all_ranks(pairs: Pairs, chunk: int | None, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank if one has wrong arguments, or others than the rest: else some would wait for ever."""
    world = dist.get_world_size(group)
    names = ("refused", "images", "texts", "channels", "bits", "ids", "chunk", "gradients")
    wrong, mine = None, [1] + [0] * (len(names) - 1)
    try:
        check_pairs(pairs)
        block = 0 if chunk is None else positive_int("chunk", chunk)
        image, text, ids = pairs.image, pairs.text, pairs.image_ids
        # bfloat16 and float16 both have 16
        kind = torch.finfo(image.dtype).bits + (image.dtype == torch.float16)
        mine = [0, len(image), *text.shape, kind, ids is not None, block, pairs.recorded()]
    except (TypeError, ValueError) as error:
        wrong = error
    where = "cpu" if "cpu:" in dist.get_backend_config(group) else "cuda"
    table = torch.empty(world, len(names), dtype=torch.int64, device=where)
    dist.all_gather(list(table), torch.tensor(mine, dtype=torch.int64, device=where), group)
    if wrong:
        raise wrong
    columns = dict(zip(names, table.T.tolist(), strict=True))
    if 1 in columns["refused"]:
        raise ValueError(f"the arguments of rank {columns['refused'].index(1)} were refused there")
    if differ := {name: found for name, found in columns.items() if len(set(found)) > 1}:
        raise ValueError(
            f"the ranks' arguments differ, rank by rank: {differ}; they must not, so leave out an uneven last batch"
        )
