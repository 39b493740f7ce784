"""Checks of notebook 10, SigLIP trained."""

import math
from functools import partial

import torch

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import (
    first_match,
    is_tensor,
    near,
    number,
    was_changed,
)


def _softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@exercise("10.1")
def start_loss(answer) -> str | None:
    for batch, bias in ((512, -10.0), (64, -2.0), (1, 0.5)):
        yes, no = _softplus(-bias), _softplus(bias)
        right = yes + (batch - 1) * no
        returned = answered(answer(batch, bias))
        if (found := number(returned)) is None:
            return f"your function returns {returned!r}; it must return a number"
        if math.isclose(found, right, rel_tol=1e-6):
            continue
        mistakes = {
            "the B - 1 texts that do not belong to the picture are missing": yes,
            "a picture has one text of its own and B - 1 others, not B": yes + batch * no,
            "yes and no are exchanged: yes costs -log sigmoid(b)": no + (batch - 1) * yes,
            "the text that does belong to the picture is missing": (batch - 1) * no,
            "that is the sum; SigLIP divides it by the number of pictures": batch * right,
            "that is divided by B twice; divide the sum over B² pairs by B": right / batch,
            "the sign is wrong: a loss is positive": -right,
        }
        if reason := first_match(found, mistakes, near(1e-6)):
            return reason
        return f"for B = {batch}, b = {bias} your loss is {found:.4g}; it must be {right:.4g}"
    return None


@exercise("10.2")
def recall_at(answer) -> str | None:
    # ranks of the right answers: 1, 2, 3, and 2 by a tie
    similarity = torch.tensor(
        [[0.9, 0.1, 0.3, 0.2], [0.5, 0.4, 0.1, 0.0], [0.5, 0.3, 0.2, 0.9], [0.1, 0.0, 0.2, 0.2]]
    )
    right = torch.tensor([0, 1, 1, 3])
    before = similarity.clone()
    found = [number(answered(answer(similarity, right, k))) for k in (1, 2, 3)]
    if None in found:
        return "the result must be one number"
    if was_changed(similarity, before):
        return "your function changed the similarities"
    if found == [0.5, 0.75, 1.0]:
        return "a wrong answer that is as similar as the right one must count as being before it"
    if found == [0.0, 0.25, 0.75]:
        return "the right answer itself counts as being before itself"
    if max(found) > 1:
        return "recall is a share between 0 and 1, not a number of queries or percent"
    if any(abs(a - b) > 1e-6 for a, b in zip(found, (0.25, 0.75, 1.0), strict=True)):
        return f"for ranks 1, 2, 3 and 2 your recall at 1, 2 and 3 is {found}; it must be [0.25, 0.75, 1.0]"
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
