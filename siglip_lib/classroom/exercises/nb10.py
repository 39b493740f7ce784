"""Checks of notebook 10, SigLIP trained."""

import math
from functools import partial

import torch

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import (
    first_match,
    is_tensor,
    number,
    was_changed,
)


def _best_bias(scores: torch.Tensor, yes: torch.Tensor) -> float:
    low, high = -1000.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if (scores + middle).sigmoid().sum() > yes.sum() else (middle, high)
        )
    return low


@exercise("10.1")
def best_bias(answer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns, spread, mean in (
        (40, 40, 2.0, 0.0),
        (16, 24, 5.0, 8.0),
        (64, 64, 1.0, -6.0),
    ):
        scores = spread * torch.randn(rows, columns, generator=generator) + mean
        yes = torch.rand(rows, columns, generator=generator) < 1 / rows
        scores += 2 * spread * yes
        before = scores.clone(), yes.clone()
        returned = answered(answer(scores, yes))
        if (found := number(returned)) is None:
            return f"your function returns {returned!r}; it must return a number"
        if was_changed(scores, before[0]) or was_changed(yes, before[1]):
            return "your function changed the scores or yes"
        right = _best_bias(scores.double(), yes)
        if abs(found - right) <= 0.0101:
            continue
        share = yes.double().mean()
        mistakes = {
            "the sign is wrong: b is added to the scores": -right,
            "that is the bias if all scores were 0: log of the odds of a yes": share.logit().item(),
            "the probabilities must add up to the pairs that belong together, not the logits above 0": -(
                scores.double().flatten().sort(descending=True).values[yes.sum()].item()
            ),
            "a yes and a no must count alike: each pair is one term of the loss": _balanced(
                scores, yes
            ),
        }
        # by their distance, as a descent that stopped too early may come near one of them
        if reason := first_match(found, mistakes, lambda a, b: abs(a - b) <= 0.0101):
            return reason
        early = "; if you descend, go on for longer" if 0 < found / right < 1 else ""
        return f"your bias is {found:.3f}; the loss is least at {right:.3f}{early}"
    return None


def _balanced(scores: torch.Tensor, yes: torch.Tensor) -> float:
    """The bias where pull and push are equal if each yes weighs as much as all no together do for one yes."""
    low, high = -1000.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        said = (scores.double() + middle).sigmoid()
        low, high = (low, middle) if said[~yes].mean() > (1 - said[yes]).mean() else (middle, high)
    return low


@exercise("10.2")
def recall_at(answer) -> str | None:
    # ranks of the right answers: 1, 2, 3, and twice 2 by a tie, with the wrong one on either side
    similarity = torch.tensor(
        [
            [0.9, 0.1, 0.3, 0.2],
            [0.5, 0.4, 0.1, 0.0],
            [0.5, 0.3, 0.2, 0.9],
            [0.1, 0.0, 0.2, 0.2],
            [0.1, 0.4, 0.4, 0.3],
        ]
    )
    right = torch.tensor([0, 1, 1, 3, 1])
    before = similarity.clone()
    found = [number(answered(answer(similarity, right, k))) for k in (1, 2, 3)]
    if None in found:
        return "the result must be one number"
    if was_changed(similarity, before):
        return "your function changed the similarities"

    def is_near(*shares: float) -> bool:
        return all(abs(a - b) <= 1e-6 for a, b in zip(found, shares, strict=True))

    if is_near(0.6, 0.8, 1.0):
        return "a wrong answer that is as similar as the right one must count as being before it"
    if is_near(0.4, 0.8, 1.0):
        return (
            "of two that are equally similar yours takes the one whose column it meets first; "
            "the wrong one must count as being before the right one, whichever column it has"
        )
    if is_near(0.0, 0.2, 0.8):
        return "the right answer itself counts as being before itself"
    if max(found) > 1:
        return "recall is a share between 0 and 1, not a number of queries or percent"
    if not is_near(0.2, 0.8, 1.0):
        return f"for ranks 1, 2, 3, 2 and 2 your recall at 1, 2 and 3 is {found}; it must be [0.2, 0.8, 1.0]"
    for bad in (math.nan, math.inf, -math.inf):
        for place in ((0, 0), (0, 2), (3, 1)):
            broken = similarity.clone()
            broken[place] = bad
            try:
                answer(broken, right, 1)
            except ValueError:
                continue
            return f"with a similarity of {bad} it must raise a ValueError"
    return None


@exercise("10.3")
def ensemble(answer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(4, 3, 5, generator=generator), dim=-1)
    mean = vectors.mean(0)
    right = mean / mean.norm(dim=-1, keepdim=True)
    before = vectors.clone()
    found = answered(answer(vectors))
    if not isinstance(found, torch.Tensor):
        return "the result must be a tensor"
    if was_changed(vectors, before):
        return "your function changed the vectors it was given"
    if not is_tensor(found, 3, 5):
        return f"the result has shape {tuple(found.shape)}; of (4, 3, 5) it must be (3, 5)"
    same = partial(torch.allclose, atol=1e-6)
    found = found.float()
    if same(found, right):
        return None
    mistakes = {
        "a mean of unit vectors is shorter than 1: bring it to length 1 again": mean,
        "each class's vector must have length 1, not all of them together": mean / mean.norm(),
        "the length is that along D, the last axis": mean / mean.norm(dim=0, keepdim=True),
    }
    if reason := first_match(found, mistakes, same):
        return reason
    if torch.allclose(found.norm(dim=-1), torch.ones(3), atol=1e-5):
        return "the vectors have length 1, but another direction than the mean over the templates"
    return "the result is not the mean over the templates, brought to length 1"
