"""The roles of kernels/hopper_backward.py as steps of the model in classroom/schedule.py, for one thread block.

Waits, arrivals, copies and products come in the kernel's order; the arithmetic is PyTorch's.
"""

import math
from collections.abc import Generator

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_lib.classroom.hopper_schedule import Costs
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

COSTS = Costs()  # of a product with the sums as of one with the values


class Pass:
    """What the roles of a thread block share, in the pass of the keys or of the queries.

    Args:
        own: both tensors (pairs, N, channels) of which a consumer owns rows: k and v, or q and d_out.
        read: the two that it reads: q and d_out, or k and v.
        lse: (pairs, N), in base 2.
        delta: as lse.
        keys: whether it is the pass of the keys.
        consumers: warpgroups that compute.
        stages: of the ring.
        rows: of a consumer.
        block: rows of a block of the ring.
        turns: whether consumers use the tensor cores one after the other.
    """

    def __init__(
        self, own, read, lse, delta, *, keys, consumers=2, stages=3, rows=64, block=64, turns=False
    ):
        self.own, self.read, self.keys = own, read, keys
        self.consumers, self.stages, self.rows, self.block = consumers, stages, rows, block
        self.tokens = own[0].shape[1]
        extra = -self.tokens % 128
        self.lse = F.pad(lse, (0, extra), value=math.inf)
        self.delta = F.pad(delta, (0, extra))
        self.plain_scale = own[0].shape[2] ** -0.5
        self.scale = self.plain_scale * math.log2(math.e)
        self.blocks = -(-self.tokens // block)
        self.last = self.tokens - (self.blocks - 1) * block
        self.tail = max(min(block, 16), 1 << (self.last - 1).bit_length())
        self.outs = [torch.full_like(own[0], math.nan) for _ in range(1 + keys)]
        places, ring = range(2 * consumers), range(stages)
        self.owned = [[Buffer(f"own {n}[{i}]") for i in places] for n in range(2)]
        self.ring = [[Buffer(f"ring {n}[{i}]") for i in ring] for n in range(2)]
        self.lines = [Buffer(f"lines[{i}]") for i in ring]
        self.own_full = [Barrier(f"own_full[{i}]", 1) for i in places]
        self.own_empty = [Barrier(f"own_empty[{i}]", 1) for i in places]
        self.full = [Barrier(f"full[{i}]", 1) for i in ring]
        self.empty = [Barrier(f"empty[{i}]", consumers) for i in ring]
        self.starts = [Barrier(f"starts[{i}]", 1) for i in range(consumers)]
        self.starts *= turns and self.blocks > 1

    def tiles(self) -> list[tuple[int, int]]:
        firsts = range(0, self.tokens, self.rows * self.consumers)
        return [(pair, first) for pair in range(len(self.own[0])) for first in firsts]

    def cut(self, x: Tensor, first: int, rows: int) -> Tensor:
        x = x[first : first + rows]
        return F.pad(x, (0, 0, 0, rows - len(x)))

    def next(self, stage: int, phase: int) -> tuple[int, int]:
        return (stage + 1, phase) if stage + 1 < self.stages else (0, phase ^ 1)

    def producer(self) -> Generator:
        stage, phase = 0, 1
        for turn, (pair, row) in enumerate(self.tiles()):
            for i in range(self.consumers):
                here = (turn & 1) * self.consumers + i
                yield Wait(self.own_empty[here], ((turn >> 1) & 1) ^ 1)
                yield Arrive(self.own_full[here], copies=2)
                for x, place in zip(self.own, self.owned, strict=True):
                    rows = self.cut(x[pair], row + i * self.rows, self.rows)
                    yield Copy(rows, place[here], self.own_full[here], COSTS.copy)
            for block in reversed(range(self.blocks)):
                first = block * self.block
                yield Wait(self.empty[stage], phase)
                yield Arrive(self.full[stage], copies=2 + self.keys)
                for x, place in zip(self.read, self.ring, strict=True):
                    rows = self.cut(x[pair], first, self.block)
                    yield Copy(rows, place[stage], self.full[stage], COSTS.copy)
                if self.keys:
                    both = torch.stack([self.lse[pair], self.delta[pair]])
                    both = both[:, first : first + self.block]
                    yield Copy(both, self.lines[stage], self.full[stage], 1)
                stage, phase = self.next(stage, phase)

    def consumer(self, index: int) -> Generator:
        tiles = self.tiles()
        yield Wait(self.own_full[index], 0)
        yield Wait(self.full[0], 0)
        tail = []
        for n in range(2):
            tail.append((yield from self.score(n, index, 0, self.tail)))
        yield Finish(Product)
        start = 1 if index == 0 else 0
        stage = 0
        ahead, phase = self.next(0, 0)
        for turn, (pair, row) in enumerate(tiles):
            here = (turn & 1) * self.consumers + index
            other = self.consumers - here + 2 * index
            row += index * self.rows
            sums = Sums(), Sums()
            if not self.keys:
                outside = torch.arange(self.tail) >= self.last
                tail[0].value = tail[0].value.masked_fill(outside, -math.inf)
            yield from self.products(tail, sums, stage, pair, row, index, start)
            for block in range(1, self.blocks):
                yield Wait(self.full[ahead], phase)
                scores, start = yield from self.scores(here, ahead, self.block, index, start)
                yield Finish(Product)
                yield Arrive(self.empty[stage])
                if block == 1:
                    yield from self.release(turn, other)
                stage = ahead
                ahead, phase = self.next(stage, phase)
                yield from self.products(scores, sums, stage, pair, row, index, start)
            if self.blocks == 1:
                yield from self.release(turn, other)
            if turn + 1 < len(tiles):
                yield Wait(self.full[ahead], phase)
                yield Wait(self.own_full[other], ((turn + 1) >> 1) & 1)
                tail, start = yield from self.scores(other, ahead, self.tail, index, start)
            elif self.starts:
                yield Arrive(self.starts[(index + 1) % self.consumers])
            yield Finish(Product)
            yield Arrive(self.empty[stage])
            stage = ahead
            ahead, phase = self.next(stage, phase)
            for i, (out, factor) in enumerate(
                zip(self.outs, (self.plain_scale, 1.0), strict=False)
            ):
                to = out[pair, row : row + self.rows]
                yield Store(sums[i].value * factor, self.owned[i][here], to, COSTS.copy)
        yield Finish(Store)

    def release(self, turn: int, other: int) -> Generator:
        yield Finish(Store)
        if turn > 0:
            yield Arrive(self.own_empty[other])

    def scores(self, here: int, stage: int, width: int, index: int, start: int) -> Generator:
        s = yield from self.score(0, here, stage, width)
        if self.starts:
            yield Arrive(self.starts[(index + 1) % self.consumers])
        dp = yield from self.score(1, here, stage, width)
        return (s, dp), start ^ 1

    def score(self, which: int, here: int, stage: int, width: int) -> Generator:
        sums, cycles = Sums(), COSTS.scores * width / self.block
        own, read = self.owned[which][here], self.ring[which][stage]
        yield Product(own, read, slice(0, width), sums, cycles, transposed=True)
        return sums

    def products(
        self, scores, sums, stage: int, pair: int, row: int, index: int, start: int
    ) -> Generator:
        s, dp = (x.value for x in scores)
        width = s.shape[1]
        if self.keys:
            lse, delta = self.lines[stage].content[:, None, :width]
        else:
            rows = slice(row, row + self.rows)
            lse, delta = (
                F.pad(x[pair, rows], (0, self.rows - len(x[pair, rows])), value=value)[:, None]
                for x, value in ((self.lse, math.inf), (self.delta, 0.0))
            )
        yield Exponentials(COSTS.exponentials * width / self.block)
        p = torch.exp2(s * self.scale - lse)
        ds = p * (dp - delta)
        if self.starts:
            yield Wait(self.starts[index], start)
        cycles = COSTS.values * width / self.block
        if self.keys:
            yield Product(p, self.ring[1][stage], slice(0, width), sums[1], cycles)
        yield Product(ds, self.ring[0][stage], slice(0, width), sums[0], cycles)


def backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, **options: object
) -> tuple[list[Tensor], list[Span]]:
    """Compute dq, dk and dv (pairs, N, channels) of attention by the kernel's schedule, and what the units did."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    out = scores.softmax(-1) @ v
    lse, delta = scores.logsumexp(-1) * math.log2(math.e), (out * d_out).sum(-1)
    found, spans = [], []
    for keys in (False, True):
        own, read = ((k, v), (q, d_out)) if keys else ((q, d_out), (k, v))
        block = Pass(own, read, lse, delta, keys=keys, **options)
        roles = {f"consumer {i}": block.consumer(i) for i in range(block.consumers)}
        spans += run({"producer": block.producer()} | roles)
        found += block.outs
    return found, spans
