"""Checks of notebook 07, patches and positions."""

import math

import torch
import torch.nn.functional as F

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import (
    Clock,
    is_tensor,
    number,
    two_numbers,
    was_changed,
)


@exercise("07.1")
def count(answer) -> str | None:
    for height, width, patch in ((384, 384, 14), (224, 224, 14), (100, 37, 16)):
        for pad in (False, True):
            call = f"count({height}, {width}, {patch}, {pad})"
            returned = answered(answer(height, width, patch, pad))
            if (found := two_numbers(returned)) is None:
                return f"{call} is {returned!r}; it must be a pair, (tokens, pixels)"
            if problem := _count_problem(height, width, patch, pad, *found):
                return f"{call} is {found}: {problem}"
    return None


def _count_problem(height, width, patch, pad, tokens, unseen) -> str | None:
    rows, columns = height // patch, width // patch
    up = -(-height // patch) * -(-width // patch)
    right = (up, 0) if pad else (rows * columns, height * width - rows * columns * patch**2)
    if (tokens, unseen) == right:
        return None
    if tokens != right[0]:
        if not pad and tokens == height * width // patch**2:
            return "patches are not glued together from strips; divide each side by itself"
        if not pad and tokens == up:
            return "without padding only whole patches count"
        if pad and tokens == (rows + 1) * (columns + 1):
            return "a side that is a multiple of the patch needs no padding"
        if pad and tokens == rows * columns:
            return "with padding incomplete patches become tokens too"
        return "the number of tokens is wrong"
    if pad:
        return "with padding every pixel of the picture is in some patch"
    if unseen == (height - rows * patch) * (width - columns * patch):
        return "that is the corner where the two strips cross; the strips are longer"
    if unseen == (height - rows * patch) * width + (width - columns * patch) * height:
        return "the corner where the strips cross is counted twice"
    if unseen == 3 * right[1]:
        return "pixels are asked for, not colour values"
    return "the number of pixels is wrong"


@exercise("07.2")
def to_convolution(answer) -> str | None:
    draw = torch.Generator().manual_seed(0)
    for p in (4, 6):
        weight = torch.randn(5, 3 * p * p, generator=draw)
        before = weight.clone()
        found = answered(answer(weight))
        if was_changed(weight, before):
            return "your function changed its input; the caller still needs it"
        if not is_tensor(found, 5, 3, p, p):
            shape = _shape(found)
            return f"for a weight of shape (5, {3 * p * p}) p is {p}; the result must be (5, 3, {p}, {p}), not {shape}"
        tiles = weight.unflatten(1, (p, p, 3))  # (D, row, column, colour)
        if torch.equal(found, tiles.permute(0, 3, 1, 2)):
            continue
        if torch.equal(found, weight.reshape(5, 3, p, p)):
            return "reshape alone keeps the order of the numbers, and theirs has the colour last"
        if torch.equal(found, tiles.permute(0, 3, 2, 1)):
            return "rows and columns of the patch are exchanged"
        return "shape right, order wrong: give the 3p² inputs their three axes, then permute"
    return None


def _shape(found: object) -> object:
    return tuple(found.shape) if isinstance(found, torch.Tensor) else found


@exercise("07.3")
def enlarge(answer) -> str | None:
    draw = torch.Generator().manual_seed(0)
    for p, q in ((4, 6), (5, 7)):
        weight = torch.randn(6, 3, p, p, generator=draw)
        patches = torch.randn(20, 3, p, p, generator=draw, dtype=torch.float64)
        found = answered(answer(weight, q))
        if not is_tensor(found, 6, 3, q, q):
            shape = _shape(found)
            return f"for weights (6, 3, {p}, {p}) and q = {q} the result must be (6, 3, {q}, {q}), not {shape}"
        larger = F.interpolate(patches, size=(q, q), mode="bilinear")
        wanted = patches.flatten(1) @ weight.double().flatten(1).T
        tokens = larger.flatten(1) @ found.double().flatten(1).T
        if torch.allclose(tokens, wanted, atol=1e-4):
            continue
        plain = F.interpolate(weight.double(), size=(q, q), mode="bilinear")
        if torch.allclose(found.double(), plain, atol=1e-4):
            return "these are the interpolated weights: tokens come out too large, as q² > p² products are summed"
        if torch.allclose(found.double(), plain * (p / q) ** 2, atol=1e-4):
            return "interpolated and scaled weights give tokens of the right size, but not the same tokens"
        error = ((tokens - wanted).norm() / wanted.norm()).item()
        return (
            f"the tokens of enlarged patches are off by {error:.0%}; they must satisfy v · Bx = w · x for all x."
            " (Section 4 has the tool, `torch.linalg.pinv`; and B is what `F.interpolate` makes of the identity.)"
        )
    return None


@exercise("07.4")
def times_as_long(answer) -> str | None:
    for slow, fast in ((5, 2), (2, 4)):
        with Clock() as clock:
            first, second = (
                clock.function(lambda call, ms=ms: ms + _INTERRUPTION * (call % 4 == 0))
                for ms in (slow, fast)
            )
            returned = answered(answer(first, second))
        if (found := number(returned)) is None:
            return f"your function returns {returned!r}; it must return a number"
        calls = [*map(len, clock.seconds)]
        if min(calls) < 3:
            times = " and ".join(map(str, calls))
            return f"it called them {times} times; the first call takes longer than the rest"
        if math.isclose(found, slow / fast, rel_tol=0.2):
            continue
        case = f"of two functions that take {slow} and {fast} ms yours says {found:.2f}"
        if math.isclose(found, fast / slow, rel_tol=0.2):
            return f"{case}: that is how many times as long the second takes; divide the other way"
        more = _INTERRUPTION / 4  # in the mean
        if math.isclose(found, (slow + more) / (fast + more), rel_tol=0.2):
            return f"{case}: the interrupted calls weigh too much; take the median, not the mean"
        return f"{case}; the ratio is {slow / fast}"
    return None


_INTERRUPTION = 16  # ms, in every fourth call from the first on
