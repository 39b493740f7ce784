"""Checks of notebook 13, the flash attention kernel."""

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
def resident(answer) -> str | None:
    cases = [  # registers, threads, own, read, width, stages
        (128, 256, 128, 64, 80, 3),
        (158, 256, 128, 64, 128, 2),
        (64, 128, 64, 64, 128, 4),
        (168, 128, 64, 32, 80, 3),
        (100, 256, 128, 114, 128, 1),
        (32, 64, 64, 16, 64, 1),
    ]
    found = []
    for case in cases:
        returned = answered(answer(*case)) if case == cases[0] else answer(*case)
        if (one := number(returned)) is None:
            return f"your function returns {returned!r}; it must return a number"
        found.append(one)
    if found == [_resident(*case) for case in cases]:
        return None
    no_files = dict(files=False)
    mistakes = {
        "the shared memory is forgotten: count q, k and v": dict(shared=False),
        "the registers are forgotten: a program has some for each of its threads": no_files,
        "a program has its registers for each of its threads": dict(per_thread=False),
        "every program loses 1 KiB of shared memory to the system": dict(lost=0),
        "k and v both lie in shared memory; you count one of them": dict(tensors=1),
        "only k and v lie there once for each stage, q lies there once": dict(stages_of_q=True),
        "only one stage of k and v is counted": dict(one_stage=True),
        "a number takes 2 bytes, not 4": dict(size=4),
        "a number takes 2 bytes": dict(size=1),
    }
    wrong = {
        reason: [_resident(*case, **changes) for case in cases]
        for reason, changes in mistakes.items()
    }
    if reason := first_match(found, wrong, operator.eq):
        return reason
    for case, mine in zip(cases, found, strict=True):
        if mine != int(mine):
            return f"resident{case} is {mine:.2f}, and a program is there or it is not: round down"
        if mine != _resident(*case):
            return f"resident{case} is {mine}; {_resident(*case)} fit"
    return None


def _resident(
    registers: int, threads: int, own: int, read: int, width: int, stages: int, *,
    shared: bool = True, files: bool = True, per_thread: bool = True, lost: int = 1024, tensors: int = 2,
    stages_of_q: bool = False, one_stage: bool = False, size: int = 2,
) -> int:  # fmt: skip
    """The right answer, or with a keyword a wrong one."""
    q, keys = own * width * (stages if stages_of_q else 1), tensors * read * width
    taken = size * (q + keys * (1 if one_stage else stages)) + lost
    limits = [65536 // (registers * (threads if per_thread else 1))] if files else []
    return min(limits + ([228 * 1024 // taken] if shared else []))


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
            return f"query {row} becomes nan: it has no key in the first block, and each must see key 0 and itself"
        if reason := first_match(found, mistakes):
            return reason
        row = int((found - right).abs().amax(1).argmax())
        return f"query {row} of 23 is wrong: {found[row, 0]:.4f} in its first channel, and not {right[row, 0]:.4f}"
    large = (300 * s).masked_fill(after, -math.inf).softmax(-1) @ v
    if not torch.allclose(answer(300 * q, k, v, scale, 5), large):
        return "right for small scores; with scores in the thousands it is not: does a forbidden score raise m?"
    held = max(shape[1] for shape in made.shapes if len(shape) == 2 and shape[0] == 23)
    if held > block:
        return f"right, but {held} scores of a query were held at once; a block has {block}"
    return None
