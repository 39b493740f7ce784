"""Checks of notebook 09, the sigmoid loss."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import (
    ShapesMade,
    first_match,
    is_tensor,
    near,
    number,
    was_changed,
)
from siglip_lib.siglip.losses import sigmoid_loss


def _softmax(logits: Tensor) -> Tensor:
    return -(logits.log_softmax(0) + logits.log_softmax(1)).diagonal().mean() / 2


_LOSSES = {  # by what couples the pairs: a loss, and what it reaches among B * B
    "each pair alone": (lambda s: F.softplus(s).sum() - s.trace(), lambda side: 1),
    "a softmax along rows and columns": (_softmax, lambda side: 2 * side - 1),
    "a softmax along the rows": (lambda s: -s.log_softmax(1).diagonal().mean(), lambda side: side),
    "a softmax along the columns": (
        lambda s: -s.log_softmax(0).diagonal().mean(),
        lambda side: side,
    ),
    "the sum of all pairs": (lambda s: s.sum().square(), lambda side: side**2),
    "nothing: it is linear": (lambda s: (s * s.new_tensor(range(len(s)))).sum(), lambda side: 0),
}


@exercise("09.1")
def reach(answer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    for side in (5, 6):
        logits = torch.randn(side, side, generator=generator, dtype=torch.float64)
        for coupled, (loss, reached) in _LOSSES.items():
            given, right = logits.clone(), reached(side)  # own ones, as a gradient may stay in them
            returned = answered(answer(loss, given))
            if was_changed(given, logits):
                return "your function changed the logits that it was given"
            if (found := number(returned)) is None:
                return f"your function returns {returned!r}; it must return a number"
            if found != right:
                return _why_not_reached(found, right, coupled, side)
    return None


def _why_not_reached(found: float, right: int, coupled: str, side: int) -> str:
    told = f"a loss of {side} pictures and texts, coupled by {coupled}: you say {found:g}"
    mistakes = {
        "that many gradients are not 0; count those that change": side**2,
        "that many stay as they were": side**2 - right,
        "the gradient by the logit that changes counts as well": right - 1,
        "the row is not all, nor is the column": side if right == 2 * side - 1 else None,
        "the pair in row and column 0 stands in both, and counts once": right + 1,
    }
    reason = first_match(found, mistakes, lambda a, b: a == b)
    return f"{told}; {reason or f'there are {right} that change'}"


@exercise("09.2")
def by_logits(answer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    yes = torch.rand(4, 6, generator=generator) < 0.3  # some rows have several, some none
    z = 2.0 * yes - 1.0
    before = logits.clone()
    found = answered(answer(logits, yes.clone()))
    if not is_tensor(found, 4, 6):
        return "the result must be a tensor of the shape of the logits: a gradient for each"
    if was_changed(logits, before):
        return "your function changed the logits that it was given"
    # the probabilities that were given to the wrong and to the right answer
    wrongly, rightly = torch.sigmoid(-z * logits), 1 - torch.sigmoid(-z * logits)
    right = -z * wrongly / 4
    softmax = logits.softmax(1) - yes.double()
    mistakes = {
        "that is of the sum over pairs; the loss is divided by the number of pictures": 4 * right,
        "you divide by the number of pairs, the loss is divided by that of pictures": right / 6,
        "you divide by the number of texts, the loss is divided by that of pictures": right * 4 / 6,
        "the sign is wrong: of a pair that belongs together a step must raise the logit": -right,
        "that treats all pairs as wrong: what does a yes change?": logits.sigmoid() / 4,
        "that is the loss of each pair, not its derivative": -F.logsigmoid(z * logits) / 4,
        "a softmax couples the pairs of a row; here each stands alone": softmax / 4,
        "small must be the gradient of a pair that is right; yours is large": -z * rightly / 4,
    }
    same = partial(torch.allclose, atol=1e-7)
    if same(found.double(), right):
        return None
    if reason := first_match(found.double(), mistakes, same):
        return reason
    where = (found - right).abs().argmax().item()
    row, column = divmod(where, 6)
    return (
        f"for a {'yes' if yes[row, column] else 'no'} with the logit {logits[row, column]:.2f} you give "
        f"{found[row, column]:.4f} where it must be {right[row, column]:.4f} (4 pictures)"
    )


@exercise("09.3")
def in_halves(answer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 16, 3, generator=generator, dtype=torch.float64)
    image, text = (F.normalize(x, dim=1).requires_grad_() for x in vectors)
    scalars = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (1.5, -1.0)]
    learned = image, text, *scalars
    with ShapesMade() as made:
        found = answered(answer(*learned))
    if not is_tensor(found):
        return "the result must be the loss, a tensor of shape ()"
    if found.dtype != torch.float64:
        return f"the result has dtype {str(found.dtype).removeprefix('torch.')}; that of the vectors is float64"
    value = found.item()

    def part(i: int, j: int, ids: bool = True) -> float:
        x, y = image.chunk(2)[i], text.chunk(2)[j]
        numbers = torch.arange(16).chunk(2)
        given = (numbers[i], numbers[j]) if ids else ()
        return sigmoid_loss(x, y, *scalars, *given).item()

    half, others = part(0, 0) + part(1, 1), (part(0, 1), part(1, 0))
    crossed = half + sum(others)
    quarter, corners = crossed / 4, (half / 2, half)
    whole = sum(part(i, j, ids=False) for i in (0, 1) for j in (0, 1))
    without_ids = whole / 2, whole
    twice = tuple((half + 2 * other) / 2 for other in others)
    mistakes = {
        "every call divides by 8 pictures, and the whole loss by 16: twice too large": crossed,
        "half of what it must be: every call divides by 8 pictures, the whole loss by 16": quarter,
        "the first pictures are never asked about the second texts, nor the second about the first": corners,
        "without ids the first picture and the ninth text are taken to belong together": without_ids,
        "one pair of halves comes twice, and another never": twice,
    }
    right = sigmoid_loss(*learned)
    if not math.isclose(value, right.item(), rel_tol=1e-9):
        if reason := first_match(value, mistakes, near(1e-9)):
            return reason
        return f"the loss of 16 pairs is {right:.6f}; you return {value:.6f}"
    if made.most_elements >= 256:
        return "right, but the matrix of all pairs was formed: no call may see more than half of the pictures"
    if made.most_elements > 64:
        return "right, but a call saw more than one half of the pictures and one half of the texts"
    if not found.requires_grad:
        return "right, but no gradient can flow back from your result: keep it a tensor"
    gradients = torch.autograd.grad(found, learned, allow_unused=True)
    wanted = torch.autograd.grad(right, learned)
    if any(a is None or not torch.allclose(a, b) for a, b in zip(gradients, wanted, strict=True)):
        return "the loss is right, but its gradients are not: some part of it is cut off"
    return None
