"""Checks of notebook 16, the Hopper kernel and the model of its schedule."""

import math
from collections.abc import Generator, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import first_match, number, two_numbers
from siglip_lib.classroom.schedule import (
    Arrive,
    Barrier,
    Buffer,
    Copy,
    Deadlock,
    Finish,
    Product,
    Race,
    Sums,
    Wait,
    run,
)

# stages, and blocks of each tile: with why it goes wrong where all before it went right
_RINGS = [
    (2, [1], "The first copy finds a new barrier, which lets a wait for phase 1 pass"),
    (2, [2], "The second block has the second stage"),
    (2, [5], "Each time round the ring the phase changes"),
    (3, [7], "A ring has len(ring.full) stages, not always two"),
    (1, [3], "A ring can have one stage, and its phase changes with each block"),
    (2, [4, 4, 4], "Where the ring stands does not depend on where a tile begins"),
    (2, [2, 2], "A tile does not begin with phase 1, but with the phase that the ring is in"),
    (3, [3, 3, 3], "A tile does not begin with phase 1, but with the phase that the ring is in"),
    (2, [3, 2, 1], "A tile does not begin with stage 0, but with the stage that follows"),
    (3, [1, 0, 8, 2], "A tile can have any number of blocks, none too"),
]


class _NoStep(Exception):
    """What the answer yields is no step of a producer."""


def _steps(steps: Iterator, most: int) -> Generator:
    for place, step in enumerate(steps):
        if not isinstance(step, (Wait, Arrive, Copy)):
            raise _NoStep(f"it yields {type(step).__name__}; a producer yields Wait, Arrive, Copy")
        if place == most:
            raise _NoStep(f"after {most} steps it has not ended")
        yield step


def _empties(ring: SimpleNamespace, count: int, read: list[Tensor]) -> Generator:
    """A consumer that takes what lies in the stages, one after the other."""
    eye, stages = torch.eye(2, dtype=torch.float64), len(ring.full)
    for block in range(count):
        stage, sums = block % stages, Sums()
        yield Wait(ring.full[stage], block // stages % 2)
        yield Product(eye, ring.buffers[stage], slice(0, 2), sums, 100)
        yield Finish(Product)
        read.append(sums.value)
        yield Arrive(ring.empty[stage])


@exercise("16.1")
def mended(answer) -> str | None:
    for stages, lengths, why in _RINGS:
        ring = SimpleNamespace(
            buffers=[Buffer(f"v[{i}]") for i in range(stages)],
            full=[Barrier(f"full[{i}]", 1) for i in range(stages)],
            empty=[Barrier(f"empty[{i}]", 1) for i in range(stages)],
        )
        count = sum(lengths)
        blocks = torch.arange(1.0, 1 + 4 * count, dtype=torch.float64).view(count, 2, 2)
        tiles, read = [list(tile) for tile in blocks.split(lengths)], []
        steps = answered(answer(ring, tiles))
        if not isinstance(steps, Generator):
            return "mended must be a generator: its steps are yielded"
        where = f"with {stages} stages and tiles of {lengths} blocks"
        producer = _steps(steps, 10 + 10 * count)
        try:
            run({"producer": producer, "consumer": _empties(ring, count, read)})
        except Deadlock as found:
            return f"{where} a deadlock: {found}. {why}"
        except Race as found:
            return f"{where} a race: {found}. {why}"
        except _NoStep as found:
            return f"{where}: {found}"
        if not torch.equal(torch.stack(read), blocks):
            return f"{where} the consumer reads other blocks than it should, and no barrier minds"
    return None


_SHARED = 226 * 1024  # without the KiB for barriers and mask
_HEADS = [(64, 4), (72, 4), (80, 3), (96, 3), (128, 3), (72, 2)]


def _most(
    *,
    shared: float = _SHARED,
    places: int = 2,
    owners: int | None = None,
    halves: int = 2,
    size: int = 2,
    wide=lambda dim: 64 + max(16, dim - 64) if dim > 64 else 64,
    more: int = 0,
) -> list[int]:
    """The most stages of each of ``_HEADS``; with keywords a wrong count."""
    found = []
    for dim, consumers in _HEADS:
        block = 64 * wide(dim) * size
        queries = places * (owners or consumers) * block
        found.append(int((shared - queries) // (halves * block)) + more)
    return found


# of a head: how busy 2, 3, 4 ... stages keep the tensor cores, and the least that is within .01 of the last
_BUSY = [
    ((64, 4), [0.60, 0.923, 0.953, 0.973, 0.982, 0.981, 0.980, 0.980, 0.980], 5),
    ((72, 4), [0.50, 0.503, 0.506, 0.90, 0.981, 0.984], 6),  # it stands still, and rises again
    ((72, 4), [0.60, 0.80, 0.90, 0.976, 0.997, 0.979], 5),  # the best is not the largest
    ((72, 4), [0.10, 0.20, 0.30, 0.40, 0.50, 0.60], 7),
    ((72, 4), [0.60, 0.975, 0.95, 0.98, 0.983, 0.981], 3),  # not the last of a row, counted down
    ((72, 4), [0.10, 0.20, 0.30, 0.492, 0.497, 0.50], 5),  # .01, and not a hundredth of the best
]


@exercise("16.2")
def stages(answer) -> str | None:
    most = _most()
    pairs = []
    for dim, consumers in _HEADS:
        pair = two_numbers(answered(answer(dim, consumers, lambda n: 1 - 0.5 ** max(2, n))))
        if pair is None:
            return "stages must return two numbers, the least number of stages and the largest"
        pairs.append(pair)
    if [pair[0] for pair in pairs] == most and [pair[1] for pair in pairs] != most:
        return "the least number of stages comes first, then the largest"
    if (found := [pair[1] for pair in pairs]) != most:
        mistakes = {
            "227 KiB are 227 x 1024 bytes, one of them for barriers and the mask": (
                _most(shared=226_000),
                _most(shared=227_000),
            ),
            "each consumer has two places for its queries": _most(places=1),
            "queries need room, too": _most(places=0),
            "each consumer has queries of its own": _most(owners=1),
            "a stage holds keys and values": _most(halves=1),
            "a number of bfloat16 takes two bytes": (_most(size=4), _most(size=1)),
            "channels are copied in two parts, and the second has 16 at least": _most(
                wide=lambda dim: dim
            ),
            "nothing is padded to a power of two: 64 channels and the others": _most(
                wide=lambda dim: 64 if dim == 64 else 128
            ),
            "what fits only in part does not fit: round down": _most(more=1),
        }
        if reason := first_match(found, mistakes, list.__eq__):
            return reason
        place = next(i for i, (a, b) in enumerate(zip(found, most, strict=True)) if a != b)
        dim, consumers = _HEADS[place]
        return f"at head_dim {dim} with {consumers} consumers {most[place]} stages fit; yours are {found[place]}"
    return _least(answer)


def _least(answer) -> str | None:
    for head, shares, right in _BUSY:

        def busy(n: int, shares: list[float] = shares) -> float:
            if n < 2:
                raise Deadlock("one stage; begin with two")
            return shares[min(n - 2, len(shares) - 1)]

        least, largest = answer(*head, busy)
        if least == right:
            continue
        ring = range(2, len(shares) + 2)
        mistakes = {
            "that is the largest ring; a smaller one may be as busy but for .01": largest,
            "compare with the largest ring, not with the best one": next(
                n for n in ring if busy(n) >= max(shares) - 0.01
            ),
            "compare with the largest ring, not with the next one": next(
                (n for n in ring[:-1] if busy(n + 1) - busy(n) < 0.01), largest
            ),
            "a ring that is .01 less busy than the largest is good enough": next(
                n for n in ring if busy(n) >= shares[-1]
            ),
            "count stages, and not places in a list": (right - 2, right - 1),
        }
        reason = first_match(least, mistakes, lambda a, b: a == b) or "look for the first of those"
        listed = ", ".join(f"{n}: {busy(n)}" for n in ring)
        return f"for busy of {listed} the least is {right}; yours is {least}: {reason}"
    return None


def _mask(last: int, width: int) -> Tensor:
    return torch.zeros(width).masked_fill(torch.arange(width) >= last, -math.inf)


@exercise("16.3")
def tail_mask(answer) -> str | None:
    for tokens in (729, 17, 65, 1, 16, 33, 300, 64, 256, 1024, *range(1, 200)):
        found, last = answered(answer(tokens)), (tokens - 1) % 64 + 1
        width = max(16, 1 << (last - 1).bit_length())
        if not isinstance(found, Tensor) or found.dim() != 1:
            return "tail_mask must return a tensor (width,)"
        has = f"with {tokens} tokens the last block has {last} keys"
        if found.dtype is torch.bool or bool((found == 1).any()):
            return "the mask is added to scores: zeros where a key is, and -inf where none is"
        if not ((found == 0) | (found == -math.inf)).all():
            return "a mask of zeros and -inf: any other number leaves a key some weight, or moves its score"
        if len(found) < last:
            zero = " (tokens % 64 is 0 there)" if tokens % 64 == 0 else ""
            return f"{has}{zero}; your mask has only {len(found)} columns, so keys are left out"
        if len(found) != width:
            return f"{has}, and {width} columns hold them; your mask has {len(found)}"
        if torch.equal(found, _mask(last, width)):
            continue
        kept = int((found == 0).sum())
        if torch.equal(found == 0, _mask(last, width) != 0) and last < width:
            return f"{has}; your mask keeps the others, those past the end"
        if kept == 0:
            return f"{has}; your mask leaves none, and a row without a key becomes nan"
        return f"{has}; your mask keeps {kept}"
    return None


def _needs(dim: int, ahead: bool, *, weights: int = 16, twice: str = "s", rest: int = 28) -> int:
    """Registers of a thread; with keywords a wrong count, ``twice`` naming what is there twice."""
    scores, out, twice = 32, dim // 2, twice if ahead else ""
    return (
        scores * (1 + ("s" in twice))
        + weights * (1 + ("w" in twice))
        + out * (1 + ("o" in twice))
        + rest
    )


def _gets(
    consumers: int, *, start: int = 8, end: int = 8, producer: float = 24, all_of_it: bool = False
) -> int:
    """Registers that a thread of a consumer gets; with keywords a wrong count."""
    groups = consumers + 1
    first = 65_536 / 128 if all_of_it else 65_536 // (128 * groups) // start * start * groups
    return int((first - producer) // consumers // end * end)


@exercise("16.4")
def registers(answer) -> str | None:
    cases = [
        (dim, n, ahead) for dim in (72, 64, 128) for n in (4, 3, 2, 5) for ahead in (False, True)
    ]
    pairs = []
    for case in cases:
        pair = two_numbers(answered(answer(*case)))
        if pair is None:
            return "registers must return two numbers: what a thread needs, and what it gets"
        pairs.append(pair)
    needs = [_needs(dim, ahead) for dim, _, ahead in cases]
    gets = [_gets(n) for _, n, _ in cases]
    if pairs == [*zip(gets, needs, strict=True)]:
        return "what a thread needs comes first, then what it gets"

    def needed(**wrong: object) -> list[int]:
        return [_needs(dim, ahead, **wrong) for dim, _, ahead in cases]

    def given(**wrong: object) -> list[int]:
        return [_gets(n, **wrong) for _, n, _ in cases]

    no_output = [need - dim // 2 for need, (dim, *_) in zip(needs, cases, strict=True)]
    both = [
        (
            [pair[0] for pair in pairs],
            needs,
            "needs",
            {
                "two weights of bfloat16 lie in one register": needed(weights=32),
                "the weights are needed, too": needed(weights=0),
                "beside scores, weights and output 28 are for all else": needed(rest=0),
                "the output is needed, too": no_output,
                "with the next scores in flight there are scores twice, nothing else": (
                    needed(twice="sw"),
                    needed(twice="swo"),
                    needed(twice="so"),
                ),
                "with the next block's scores in flight there are scores twice": needed(twice=""),
            },
        ),
        (
            [pair[1] for pair in pairs],
            gets,
            "gets",
            {
                "the block has what its warpgroups start with, which are multiples of 8 and fewer than 65,536 in all": (
                    given(all_of_it=True),
                    given(start=1),
                ),
                "a thread's registers are a multiple of 8": (given(end=1), given(end=1, start=1)),
                "the producer keeps 24 a thread": given(producer=0),
                "the producer's warpgroup has 128 threads, like all, and not 32": given(producer=6),
                "the consumers share what the producer gives back": [
                    65_536 // (128 * (n + 1)) // 8 * 8 for _, n, _ in cases
                ],
                "the producer's warpgroup starts with registers, too": [
                    65_536 // (128 * n) // 8 * 8 for _, n, _ in cases
                ],
            },
        ),
    ]
    for found, right, verb, mistakes in both:
        if found == right:
            continue
        reason = first_match(found, mistakes, list.__eq__)
        place = next(i for i, (a, b) in enumerate(zip(found, right, strict=True)) if a != b)
        dim, consumers, ahead = cases[place]
        if reason is None:
            reason = f"yours {verb} {number(found[place]):g}"
        return f"at head_dim {dim}, {consumers} consumers, ahead={ahead} a thread {verb} {right[place]}: {reason}"
    return None
