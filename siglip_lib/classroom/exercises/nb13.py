"""Checks of notebook 13, the flash attention kernel."""

import itertools
import math
import operator

import torch
from torch import Tensor

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import ShapesMade, first_match, is_tensor, number


def _part(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a program that saw these keys ends with: the maximum, the sum and the output, not divided."""
    if scores.shape[1] == 0:
        m = scores.new_full((len(scores),), -math.inf)
        return m, torch.zeros_like(m), scores.new_zeros(len(scores), values.shape[1])
    m = scores.amax(1)
    p = (scores - m[:, None]).exp()
    return m, p.sum(1), p @ values


@exercise("13.1")
def merge(answer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(6, 10, generator=generator, dtype=torch.float64)
    values = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    first, second = _part(scores[:, :7], values[:7]), _part(scores[:, 7:], values[7:])
    found = answered(answer(*(tuple(x.clone() for x in part) for part in (first, second))))
    if (problem := _no_triple(found, 6, 4)) is not None:
        return problem
    right = _part(scores, values)
    o = right[2] / right[1][:, None]
    as_they_came = "is the sum of the two as they came: each is relative to its own m"
    if torch.allclose(found[2], o) and not torch.allclose(found[2], right[2]):
        return "a is divided already; a third part could not be merged into that"
    smaller = torch.minimum(first[0], second[0])
    mistakes = {
        "m": {
            "m must be the larger of the two, row by row; yours is the smaller": smaller,
            "m must be the larger of the two; yours is their sum": first[0] + second[0],
            "m of the second part is never looked at": first[0],
            "m of the first part is never looked at": second[0],
        },
        "l": {f"l {as_they_came}": first[1] + second[1]},
        "a": {f"a {as_they_came}": first[2] + second[2]},
    }
    for name, a, b in zip(mistakes, found, right, strict=True):
        if torch.allclose(a, b):
            continue
        if reason := first_match(a, mistakes[name]):
            return reason
        return f"in the first row {name} is {a.flatten()[0]:.4f}; of all keys together it is {b.flatten()[0]:.4f}"
    return _merge_extremes(answer, scores, values)


def _no_triple(found, rows: int, columns: int) -> str | None:
    if not isinstance(found, (tuple, list)) or len(found) != 3:
        return "merge must return three tensors, m, l and a"
    shapes = tuple(tuple(getattr(x, "shape", ())) for x in found)
    if shapes != ((rows,), (rows,), (rows, columns)):
        return (
            f"the shapes must be (N,), (N,) and (N, D); here they are {', '.join(map(str, shapes))}"
        )
    return None


def _merge_extremes(answer, scores: Tensor, values: Tensor) -> str | None:
    """Scores that overflow unless the maximum is subtracted, and a part without keys."""
    large = 1000 * scores
    parts = _part(large[:, :7], values[:7]), _part(large[:, 7:], values[7:])
    found, right = answer(*parts), _part(large, values)
    if not all(map(torch.allclose, found, right)):
        return "right for small scores; with scores in the thousands the exponentials leave float64: subtract m first"
    empty, full = _part(scores[:, :0], values[:0]), _part(scores, values)
    for parts in ((empty, full), (full, empty)):
        if not all(map(torch.allclose, answer(*parts), full)):
            return "right for two parts with keys; a part without any (m = -inf, l = 0, a = 0) must change nothing"
    return None


@exercise("13.2")
def lazy(answer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 40, 4, generator=generator, dtype=torch.float64)
    scale, block = 1.3, 8
    for threshold in (0, 1, 2.5):
        returned = answer(q.clone(), k.clone(), v.clone(), scale, block, threshold)
        returned = answered(returned) if threshold == 0 else returned
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            return "lazy must return two things: the output, and how many times an m has risen"
        found, risen = returned[0], number(returned[1])
        if not is_tensor(found, 40, 4):
            return "the output must be a tensor (N, D)"
        if risen is None:
            return f"the rises must be a number; yours are {returned[1]!r}"
        if not torch.allclose(found, (scale * q @ k.T).softmax(-1) @ v):
            return f"with the threshold {threshold} the output is not the softmax's: both sums are relative to m"
        if risen != _rises(scale * q @ k.T, block, threshold):
            beyond_all = number(answer(q.clone(), k.clone(), v.clone(), scale, block, 1e6)[1])
            return _wrong_rises(scale * q @ k.T, block, threshold, risen, beyond_all)
    large = answer(400 * q, k, v, scale, block, 1)[0]
    if not torch.allclose(large, (400 * scale * q @ k.T).softmax(-1) @ v):
        return "right for small scores; with scores in the thousands the exponentials leave float64: subtract m first"
    return None


def _rises(
    scores: Tensor, block: int, threshold: float, *, largest: bool = False, start: bool = True
) -> int:
    """The right count; with a keyword a wrong one: against the largest score so far, or without the first block's."""
    m = so_far = torch.full_like(scores[:, 0], -math.inf)
    risen = 0
    for place, part in enumerate(scores.split(block, 1)):
        most = part.amax(1)
        rises = most > (so_far if largest else m) + threshold
        risen += int(rises.sum()) if start or place else 0
        m, so_far = torch.where(rises, most, m), torch.maximum(so_far, most)
    return risen


def _wrong_rises(
    scores: Tensor, block: int, threshold: float, risen: float, beyond_all: float | None
) -> str:
    """What is wrong with a count; ``beyond_all`` is the count with a threshold that is above all scores."""
    shape = -(-scores.shape[1] // block)
    unconditional = _rises(scores, block, 0), len(scores) * shape
    if risen in unconditional and beyond_all == len(scores):
        return "as soon as one query's score exceeds its m by more than the threshold, yours raises the m of others too"
    mistakes = {
        "m rises from -inf in the first block, and that counts": _rises(
            scores, block, threshold, start=False
        ),
        "every m rises in every block": len(scores) * shape,
        "yours does not depend on the threshold": _rises(scores, block, 0),
        "compare with m as it is, which may lie below the largest score so far": _rises(
            scores, block, threshold, largest=True
        ),
        "count queries and blocks, not the blocks in which some m rises": sum(
            bool(rises) for rises in _by_block(scores, block, threshold)
        ),
    }
    if reason := first_match(risen, mistakes, operator.eq):
        return reason
    wanted = _rises(scores, block, threshold)
    return (
        f"with the threshold {threshold} an m rises {wanted} times in 40 queries, and not {risen}"
    )


def _by_block(scores: Tensor, block: int, threshold: float) -> list[int]:
    """How many queries' m rises in each block."""
    ends = range(block, scores.shape[1] + block, block)
    counts = [0, *(_rises(scores[:, :end], block, threshold) for end in ends)]
    return [after - before for before, after in itertools.pairwise(counts)]


@exercise("13.3")
def causal(answer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 23, 4, generator=generator, dtype=torch.float64)
    scale, block = 0.7, 8
    with ShapesMade() as made:
        found = answered(answer(q, k, v, scale, block))
    if not is_tensor(found, 23, 4):
        return "the result must be the output, a tensor (N, D)"
    if found.dtype != q.dtype:
        return f"the output is in {found.dtype}, and q, k and v are in {q.dtype}"
    s, number = scale * q @ k.T, torch.arange(23)

    def masked(forbidden: Tensor, by: float = -math.inf) -> Tensor:
        return s.masked_fill(forbidden, by).softmax(-1) @ v

    after = number > number[:, None]
    from_block = masked(number % block > number[:, None])
    mistakes = {
        "every query sees all keys": s.softmax(-1) @ v,
        "the other way round: a query must see the keys up to itself": masked(after.T),
        "a key's number is counted from its block's start; it must be from the first of all": from_block,
        "a score of 0 is a weight of 1, not of 0: what score gives none?": masked(after, 0.0),
        "one key too many: the next token is seen": masked(number > number[:, None] + 1),
    }
    right = masked(after)
    if not torch.allclose(found, right):
        rows = found.isnan().any(1).nonzero()
        if len(rows):
            row = int(rows[0, 0])
            return f"query {row} becomes nan: your mask leaves it no key in the first block; key 0 is for every query"
        if reason := first_match(found, mistakes):
            return reason
        row = int((found - right).abs().amax(1).argmax())
        return f"query {row} of 23 is wrong: {found[row, 0]:.4f} in its first channel, and not {right[row, 0]:.4f}"
    large = (300 * s).masked_fill(after, -math.inf).softmax(-1) @ v
    if not torch.allclose(answer(300 * q, k, v, scale, 5), large):
        return "right for small scores; with scores in the thousands it is not: does a forbidden score raise m?"
    held = max(shape[1] for shape in made.shapes if len(shape) == 2 and shape[0] == 23)
    if held > block:
        return f"right, but a tensor of (23, {held}) was held at once, scores or a mask; a block has {block} columns"
    return None
