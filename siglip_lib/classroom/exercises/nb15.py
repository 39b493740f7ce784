"""Checks of notebook 15, from the tower to a language model."""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import (
    first_match,
    has_no_code,
    is_tensor,
    number,
    was_changed,
)
from siglip_lib.siglip.text import EOS
from siglip_lib.vl import candidate_resolutions, choose_resolution, lay_out

_SIZES = ((384, 384), (800, 800), (1000, 600), (600, 1000), (3000, 400), (90, 1900))


def _tokens(resolution: tuple[int, int]) -> int:
    rows, columns = (14 * side // 384 for side in resolution)
    return 14 * 15 + 1 + rows * (columns + 1)


@exercise("15.1")
def tokens_of(answer) -> str | None:
    found = [number(answered(answer(size))) for size in _SIZES]
    if None in found:
        return "the result must be one number"
    chosen = [choose_resolution(size, candidate_resolutions()) for size in _SIZES]
    right = [_tokens(resolution) for resolution in chosen]
    if found == right:
        return None
    grids = [(high // 384, wide // 384) for high, wide in chosen]
    mistakes = {
        "the thumbnail is missing: 14 rows of 14, each with a newline, and then the separator": [
            count - 211 for count in right
        ],
        "the separator between the thumbnail and the tiles is missing": [n - 1 for n in right],
        "each row ends with a newline, those of the tiles and those of the thumbnail": [
            196 * (m * n + 1) + 1 for m, n in grids
        ],
        "the tiles' rows run through all tiles beside each other: one newline for the row of all, and not of each": [
            211 + 14 * m * n * 15 for m, n in grids
        ],
        "each row ends with a newline, and the separator stands between the views: those are tokens, too": [
            196 * (m * n + 1) for m, n in grids
        ],
        "a tile's 27 by 27 tokens become 14 by 14 in the adaptor": [
            27 * 28 + 1 + 27 * m * (27 * n + 1) for m, n in grids
        ],
        "rows and columns are exchanged: a size is height and width, a grid rows and columns": [
            211 + 14 * n * (14 * m + 1) for m, n in grids
        ],
    }
    return first_match(found, mistakes, lambda a, b: a == b) or (
        f"for {_SIZES[2][0]} x {_SIZES[2][1]} pixels you count {found[2]}; it must be {right[2]}"
    )


def faulty_lay_out(
    thumbnail: Tensor, tiles: Tensor, grid: tuple[int, int], newline: Tensor, separator: Tensor
) -> Tensor:
    """Lay out as exercise 15.2's colleague does; what is wrong is the question."""
    return lay_out(thumbnail, tiles, (grid[1], grid[0]), newline, separator)


@exercise("15.2")
def repaired(answer) -> str | None:
    for grid, side in (((2, 2), 3), ((2, 3), 2), ((3, 1), 4), ((1, 4), 3)):
        count = math.prod(grid)
        thumbnail = torch.arange(2.0 * side * side * 5).view(2, side, side, 5)
        tiles = 1000 + torch.arange(2.0 * count * side * side * 5).view(2, count, side, side, 5)
        arguments = thumbnail, tiles, grid, torch.full((5,), -1.0), torch.full((5,), -2.0)
        wrong, right = faulty_lay_out(*arguments), lay_out(*arguments)
        given = wrong.clone()
        found = answered(answer(given, grid, side))
        if was_changed(given, wrong):
            return "your function changed the tokens that it was given"
        where = f"for {grid[0]} x {grid[1]} tiles of {side} x {side} tokens"
        if not isinstance(found, Tensor) or found.ndim != 3 or len(found) != 2:
            return "the result must be a tensor (B, N, E)"
        if is_tensor(found, *right.shape) and torch.equal(found, right):
            continue
        if is_tensor(found, *wrong.shape) and torch.equal(found, wrong):
            return f"{where} nothing is repaired; give the colleague's function tiles whose tokens are their numbers"
        if found.shape != right.shape:
            wanted = tuple(right.shape)
            return f"{where} the result has shape {tuple(found.shape)}, not {wanted}: how many rows end with a newline?"
        if torch.equal(found[0], right[0]):
            return f"{where} the second picture of the batch is not as it should be"
        if not torch.equal(found[:, : side * (side + 1) + 1], right[:, : side * (side + 1) + 1]):
            return f"{where} thumbnail and separator are not as they were; the bug is in the tiles"
        newlines = (found == -1).all(-1), (right == -1).all(-1)
        if not torch.equal(*newlines):
            return f"{where} the newlines stand at wrong places: one after each row of all tiles beside each other"
        return f"{where} the newlines are right, and tokens of tiles stand at wrong places"
    return None


def _shown(size: tuple[int, int], resolution: tuple[int, int]) -> int:
    (h, w), (high, wide) = size, resolution
    return min(min(high, h * wide // w) * min(wide, w * high // h), h * w)


def _measured(sizes: Sequence[tuple[int, int]], three: Sequence) -> tuple[int, int]:
    """Pixels shown and tokens spent, over all pictures."""
    chosen = [choose_resolution(size, three) for size in sizes]
    return sum(map(_shown, sizes, chosen)), sum(map(_tokens, chosen))


@exercise("15.3")
def best_list(answer) -> str | None:
    portraits = [(800, 800), (820, 790), (780, 810), (900, 640), (1000, 700), (400, 390)]
    pages = [(1650, 1275), (1275, 1650), (1100, 850), (300, 2000)]
    # here the largest part of each picture, as a mean, would be another list
    mixed = [(300, 900), (900, 300), (1400, 1400), (2000, 900)]
    small = [(200, 200), (300, 300), (250, 350), (1000, 700)]  # which no candidate shows larger
    cases = ((portraits, 1100), (pages, 1600), (mixed, 1300), (small, 1050), (portraits, 300))
    for sizes, most in (*cases, (mixed, 1079)):  # the best list costs just as much
        right = None
        for three in itertools.combinations(candidate_resolutions(), 3):
            pixels, tokens = _measured(sizes, three)
            if tokens <= most * len(sizes) and (right is None or pixels > right):
                right = pixels
        given = list(sizes)
        found = answer(given, most)
        if given != sizes:
            return "your function changed the list of sizes"
        if right is None:
            if found is None:
                continue
            return f"no list keeps to {most} tokens for these pictures; the result must be None"
        if found is None:
            if has_no_code(answer):
                answered(None)
            return f"some lists keep to {most} tokens a picture, as a mean over all; your result is None"
        if not isinstance(found, (list, tuple)) or len(found) != 3:
            return f"the result must be a list of three candidates, and is {found!r}"
        three = [tuple(each) if isinstance(each, (list, tuple)) else each for each in found]
        if any(each not in candidate_resolutions() for each in three):
            return f"{three} holds what is none of candidate_resolutions()"
        pixels, tokens = _measured(sizes, three)
        if tokens > most * len(sizes):
            spent = tokens / len(sizes)
            return f"your list costs {spent:.0f} tokens a picture of the {most} that there are"
        if pixels < right:
            share = 100 * pixels / right
            return (
                f"your list keeps to the tokens and shows {share:.1f} % of what the best one shows"
            )
    return None


@exercise("15.4")
def nats(answer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4, 5, 7, generator=generator)
    tokens = torch.tensor([[3, 4, EOS, EOS, EOS], [EOS] * 5, [2, 5, 6, 3, EOS], [2, 3, 4, 5, 6]])
    before = logits.clone(), tokens.clone()
    found = answered(answer(logits, tokens))
    if was_changed(logits, before[0]) or was_changed(tokens, before[1]):
        return "your function changed the logits or the tokens"
    if not is_tensor(found, 4):
        return "the result must be a tensor of shape (B,): one number for each answer"
    each = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    ends = (tokens == EOS).cumsum(1) - (tokens == EOS).long()
    counts = ends == 0
    right = (each * counts).sum(1)
    if torch.allclose(found.float(), right, atol=1e-5):
        return None
    mistakes = {
        "the first </s> ends the text; those that fill it up don't count": each.sum(1),
        "the first </s> counts too: that the answer ends here is a part of it": (
            each * (tokens != EOS)
        ).sum(1),
        "that is the mean over the tokens; of a long name all must be paid": right / counts.sum(1),
        "that is minus the loss, the log-probability": -right,
        "that is a probability; the loss is minus its logarithm": torch.exp(-right),
        "that is the loss of all answers together": each[counts].mean().expand(4),
    }
    return first_match(found.float(), mistakes) or (
        "the losses are wrong; is each minus the sum of log-probabilities of the answer's tokens?"
    )
