"""The roles of kernels/hopper_attention.py as steps of the model in classroom/schedule.py, for one thread block.

The order of all waits, copies and products is the kernel's; the arithmetic is PyTorch's. Times are a bound, not a
forecast: of all arithmetic the model counts products and exponentials, and it does not know that a product holds the
warps that start it, nor that they wait for each other.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_lib.base.checks import positive_int
from siglip_lib.classroom.schedule import (
    Arrive,
    Barrier,
    Buffer,
    Copy,
    Exponentials,
    Finish,
    Product,
    Span,
    Store,
    Sums,
    Wait,
    run,
)

LARGEST_SUM = 2.0**64  # of a row's weights, unless its reference is lost


@dataclass(frozen=True)
class Costs:
    """Cycles for 64 queries and 64 keys at head_dim 72: counted from rates, not measured.

    Products and exponentials go at the peak rates of an H100; of copies no rate is published, so theirs is a guess.

    Args:
        scores: 64 x 64 x 80 products, 2048 a cycle.
        values: 64 x 64 x 72 products.
        exponentials: 64 x 64, 16 a cycle.
        copy: 64 rows of 160 bytes, 32 bytes a cycle.
        latency: of a copy.
    """

    scores: float = 160
    values: float = 144
    exponentials: float = 256
    copy: float = 320
    latency: float = 600


class ThreadBlock:
    """What the roles of one thread block share, and the roles.

    Args:
        q: queries (pairs, N, channels), of pairs of sample and head; every tile of them is this thread block's.
        k: keys, as q.
        v: values, as q.
        consumers: warpgroups that compute.
        stages: blocks of keys and values that the ring holds.
        rows: queries of a consumer, and keys of a block; a power of two. The kernel has 64.
        exact: whether each row keeps its largest score so far, or the largest of its first block.
        parts: of a block's weights, each of which goes into its product as soon as it is computed; 1, 2, 4 ...
        costs: cycles of the steps.

    Its ``out`` is (pairs, N, channels) when the roles have ended, its ``lse`` the log2 of each row's sum of
    exp2(scores), (pairs, N); NaN where the largest of the first block was a bad reference, for ``redo``.

    Raises:
        ValueError: shapes that differ, or sizes that can't be; the message says which.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        consumers: int = 4,
        stages: int = 4,
        rows: int = 64,
        exact: bool = True,
        parts: int = 2,
        costs: Costs | None = None,
    ):
        if not (q.dim() == 3 and q.shape == k.shape == v.shape):
            shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
            raise ValueError(f"q, k, v have shapes {shapes}; all must be one (pairs, N, channels)")
        for name, size in dict(consumers=consumers, stages=stages, rows=rows, parts=parts).items():
            positive_int(name, size)
        if rows & (rows - 1) or rows % parts:
            raise ValueError(f"rows={rows} must be a power of two and a multiple of parts={parts}")
        self.q, self.k, self.v, self.out = q, k, v, torch.full_like(q, math.nan)
        self.lse = torch.full_like(q[..., 0], math.nan)
        self.consumers, self.stages, self.rows = consumers, stages, rows
        self.exact, self.parts, self.costs = exact, parts, costs or Costs()
        self.scale = q.shape[-1] ** -0.5 * math.log2(math.e)
        self.blocks = -(-q.shape[1] // rows)
        self.last = q.shape[1] - (self.blocks - 1) * rows  # keys of the last block
        self.tail = 1 << (self.last - 1).bit_length()
        owners, ring = range(consumers), range(stages)
        # two places for the queries of each consumer: of this tile, and of the next
        self.places = [[Buffer(f"q[{i}, {j}]") for j in owners] for i in range(2)]
        self.q_full = [[Barrier(f"q_full[{i}, {j}]", 1) for j in owners] for i in range(2)]
        self.q_empty = [[Barrier(f"q_empty[{i}, {j}]", 1) for j in owners] for i in range(2)]
        self.keys = [Buffer(f"k[{i}]") for i in ring]
        self.values = [Buffer(f"v[{i}]") for i in ring]
        self.full = [Barrier(f"full[{i}]", 1) for i in ring]
        self.empty = [Barrier(f"empty[{i}]", consumers) for i in ring]

    def tiles(self) -> list[tuple[int, int]]:
        """Pair and first query of each tile."""
        firsts = range(0, self.q.shape[1], self.rows * self.consumers)
        return [(pair, first) for pair in range(len(self.q)) for first in firsts]

    def copied(self, x: Tensor, first: int) -> Tensor:
        """Rows from ``first`` on, zeros past the end, as the TMA unit copies them."""
        rows = x[first : first + self.rows]
        return F.pad(rows, (0, 0, 0, self.rows - len(rows)))

    def next(self, stage: int, phase: int) -> tuple[int, int]:
        """The next stage of the ring; a barrier's phase changes each time round."""
        return (stage + 1, phase) if stage + 1 < self.stages else (0, phase ^ 1)

    def producer(self) -> Generator:
        """Have queries, keys and values copied, each as soon as its buffer is empty."""
        stage, phase = 0, 1
        for turn, (pair, first) in enumerate(self.tiles()):
            for i in range(self.consumers):
                yield Wait(self.q_empty[turn % 2][i], (turn // 2 % 2) ^ 1)
                full = self.q_full[turn % 2][i]
                yield Arrive(full, copies=1)
                queries = self.copied(self.q[pair], first + i * self.rows)
                yield Copy(queries, self.places[turn % 2][i], full, self.costs.copy)
            for block in reversed(range(self.blocks)):
                yield Wait(self.empty[stage], phase)
                yield Arrive(self.full[stage], copies=2)
                for x, ring in ((self.k, self.keys), (self.v, self.values)):
                    block_rows = self.copied(x[pair], block * self.rows)
                    yield Copy(block_rows, ring[stage], self.full[stage], self.costs.copy)
                stage, phase = self.next(stage, phase)

    def consumer(self, index: int) -> Generator:
        """Compute the output of some queries of each tile."""
        tiles = self.tiles()
        yield Wait(self.q_full[0][index], 0)
        yield Wait(self.full[0], 0)
        tail = yield from self._scores(self.places[0][index], 0, self.tail)
        yield Finish(Product)
        stage = 0  # of the block whose scores are there
        ahead, phase = self.next(0, 0)  # of the block after it
        for turn, (pair, first) in enumerate(tiles):
            here, other = turn % 2, (turn + 1) % 2
            o = Sums()
            masked = torch.arange(self.tail) < self.last
            s = tail.value.masked_fill(~masked, -math.inf) * self.scale
            m = s.amax(1, keepdim=True)
            total = torch.zeros_like(m)
            total = yield from self._weights_and_values(s, m, total, o, stage, parts=1)
            for block in range(1, self.blocks):
                yield Wait(self.full[ahead], phase)
                scores = yield from self._scores(self.places[here][index], ahead, self.rows)
                yield Finish(Product)
                yield Arrive(self.empty[stage])
                if block == 1:
                    yield from self._release(turn, index)
                stage = ahead
                ahead, phase = self.next(stage, phase)
                s = scores.value * self.scale
                if self.exact:
                    most = torch.maximum(m, s.amax(1, keepdim=True))
                    shrink = torch.exp2(m - most)
                    m, total, o.value = most, total * shrink, o.value * shrink
                total = yield from self._weights_and_values(s, m, total, o, stage, self.parts)
            if self.blocks == 1:
                yield from self._release(turn, index)
            if turn + 1 < len(tiles):  # the first scores of the next tile
                yield Wait(self.full[ahead], phase)
                yield Wait(self.q_full[other][index], (turn + 1) // 2 % 2)
                tail = yield from self._scores(self.places[other][index], ahead, self.tail)
            yield Finish(Product)
            yield Arrive(self.empty[stage])
            stage = ahead
            ahead, phase = self.next(stage, phase)
            mine = first + index * self.rows
            to = self.out[pair, mine : mine + self.rows]
            yield Store(o.value / total, self.places[here][index], to, self.costs.copy)
            lse = m + total.log2()
            if not self.exact:
                lse = lse.where(total < LARGEST_SUM, math.nan)
            self.lse[pair, mine : mine + self.rows] = lse[: len(to), 0]
        yield Finish(Store)

    def redo(self) -> int:
        """Compute each tile again, in the exact way, of which a row has no lse; return how many. The second kernel."""
        lost = [
            (pair, slice(first, first + self.rows))
            for pair in range(len(self.q))
            for first in range(0, self.q.shape[1], self.rows)
            if self.lse[pair, first : first + self.rows].isnan().any()
        ]
        for pair, rows in lost:
            s = self.q[pair, rows] @ self.k[pair].T * self.scale
            m = s.amax(1, keepdim=True)
            p = torch.exp2(s - m)
            total = p.sum(1, keepdim=True)
            self.out[pair, rows] = p @ self.v[pair] / total
            self.lse[pair, rows] = (m + total.log2())[:, 0]
        return len(lost)

    def _release(self, turn: int, index: int) -> Generator:
        """Give back the place of the last tile's queries, once its output has left it."""
        yield Finish(Store)
        if turn > 0:
            yield Arrive(self.q_empty[(turn + 1) % 2][index])

    def _scores(self, place: Buffer, stage: int, width: int) -> Generator:
        sums, cycles = Sums(), self.costs.scores * width / self.rows
        rows = slice(0, width)
        yield Product(place, self.keys[stage], rows, sums, cycles, transposed=True)
        return sums

    def _weights_and_values(
        self, s: Tensor, m: Tensor, total: Tensor, o: Sums, stage: int, parts: int
    ) -> Generator:
        """Part by part: the product of one part runs while the next is computed. Returns the new total."""
        width = s.shape[1] // parts
        share = width / self.rows
        for start in range(0, s.shape[1], width):
            rows = slice(start, start + width)
            yield Exponentials(self.costs.exponentials * share)
            p = torch.exp2(s[:, rows] - m)
            total = total + p.sum(1, keepdim=True)
            yield Product(p, self.values[stage], rows, o, self.costs.values * share)
        return total


def attention(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, list[Span]]:
    """Compute attention by the kernel's schedule.

    Args:
        q: queries (pairs, N, channels).
        k: keys, as q.
        v: values, as q.
        options: of ``ThreadBlock``.

    Returns:
        The output (pairs, N, channels), and what the units did, without ``redo``.

    Raises:
        Deadlock: as ``run``; with one stage, because a consumer needs the next block before it is done with this one.
        Race: as ``run``; never with the roles as they are.
    """
    block = ThreadBlock(q, k, v, **options)
    roles = {f"consumer {i}": block.consumer(i) for i in range(block.consumers)}
    spans = run({"producer": block.producer()} | roles, block.costs.latency)
    block.redo()
    return block.out, spans
