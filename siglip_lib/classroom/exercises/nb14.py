"""Checks of notebook 14, many GPUs."""

import itertools
import math
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import first_match, is_tensor, near, number, two_numbers
from siglip_lib.siglip.losses import sigmoid_loss


@exercise("14.1")
def meets(answer) -> str | None:
    def hops(hop: Callable[[int, int], object]) -> list[list[object]]:
        return [[hop(i, j) for j in range(5)] for i in range(5)]

    returned = hops(lambda i, j: answered(answer(i, j, 5)))
    found = [[*map(number, row)] for row in returned]
    right = hops(lambda i, j: (i - j) % 5)
    for i, j in itertools.product(range(5), repeat=2):
        if not isinstance(found[i][j], int):
            return f"your function returns {returned[i][j]!r}; a hop is an integer"
    if found == right:
        if answer(1, 6, 7) != 2:
            return "right for 5 ranks, but not for 7: is a number fixed in your code?"
        return None
    backwards = hops(lambda i, j: (j - i) % 5)
    negative, distance = hops(lambda i, j: i - j), hops(lambda i, j: abs(i - j))
    mistakes = {
        "those are hops of texts that go to the rank before; they go to the next one": backwards,
        "where the texts come from a higher rank yours is negative: they go on from the last rank to rank 0": negative,
        "the distance of the two ranks is not enough: texts go round one way only": distance,
        "one too many: at hop 0 each rank has its own texts": hops(lambda i, j: (i - j) % 5 + 1),
    }
    if reason := first_match(found, mistakes, operator.eq):
        return reason
    i, j = next((i, j) for i in range(5) for j in range(5) if found[i][j] != right[i][j])
    meet = f"the images of rank {i} meet the texts of rank {j} at hop {right[i][j]}"
    return f"of 5 ranks: {meet}, you say {found[i][j]}"


@exercise("14.2")
def sent(answer) -> str | None:
    returned = answered(answer(4, 100, 8))
    if (found := two_numbers(returned)) is None:
        return f"your function returns {returned!r}; it must return two numbers: bytes of the ring, of the all-gather"
    ring, gathered = found
    texts, gradients = 2 * 100 * 8, 4 * 100 * 8  # bytes of a block
    both = texts + gradients
    if not math.isclose(ring, 3 * texts + 4 * gradients):
        mistakes = {
            "that is of the texts alone: their gradients travel too": 3 * texts,
            "the gradient starts a hop later and has to come home: how often is it sent?": 3 * both,
            "at the last hop no texts leave: nobody would need them": 4 * both,
            "a gradient is in float32, 4 bytes a number": 7 * texts,
            "a gradient is in float32, and it has to come home: one send more": 6 * texts,
            "that is of all ranks together": 4 * (3 * texts + 4 * gradients),
        }
        if reason := first_match(ring, mistakes, math.isclose):
            return f"the ring: {reason}"
        return f"the ring, 4 ranks, 100 pairs a rank, width 8: {ring:g} bytes is not right"
    if not math.isclose(gathered, 6 * texts):
        mistakes = {
            "that is the way there; the gradients come back": 3 * texts,
            "nobody sends a block to itself: of 4 blocks 3 travel": 8 * texts,
            "here the gradients travel in bfloat16": 3 * both,
            "the way back takes 3 blocks, as a rank keeps its own": 7 * texts,
            "that is of all ranks together": 24 * texts,
        }
        if reason := first_match(gathered, mistakes, math.isclose):
            return f"the all-gather: {reason}"
        return (
            f"the all-gather, 4 ranks, 100 pairs a rank, width 8: {gathered:g} bytes is not right"
        )
    ring, gathered = answer(2, 3, 5)
    if not (math.isclose(ring, 150) and math.isclose(gathered, 60)):
        return "right for 4 ranks, 100 pairs and width 8 alone: is a number fixed in your code?"
    return None


@exercise("14.3")
def rank_loss(answer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    world, pairs, width = 3, 4, 5

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    raw = draw(world * pairs, width), draw(world * pairs, width)
    weights = draw(width, width), draw(width, width)
    scalars = torch.tensor([1.5, -1.0], dtype=torch.float64)
    learned = [x.clone().requires_grad_() for x in (*weights, *scalars)]

    def towers() -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(F.normalize(x @ w, dim=1) for x, w in zip(raw, learned[:2], strict=True))

    total, image, texts = 0, *towers()
    values = []
    for rank in range(world):
        mine = image[rank * pairs : (rank + 1) * pairs]
        found = answered(answer(mine, texts, learned[2], learned[3], rank))
        if not is_tensor(found):
            return "the result must be this rank's loss, a tensor of shape ()"
        values.append(found)
        total = total + found / world  # what averaging makes of the ranks' gradients
    right = sigmoid_loss(*towers(), *learned[2:])
    # each mistake's mean over the ranks
    z = 2 * torch.eye(world * pairs, dtype=torch.float64) - 1
    shifted = 2 * torch.eye(pairs, world * pairs, dtype=torch.float64).repeat(world, 1) - 1
    beginning = -torch.ones_like(z)  # image i of rank r takes text r + i for its own
    for rank in range(world):
        beginning[rank * pairs : (rank + 1) * pairs].diagonal(rank).fill_(1)
    logits = learned[2].exp() * image @ texts.T + learned[3]
    colder = learned[2] * image @ texts.T + learned[3]
    own = sum(
        sigmoid_loss(x, y, *learned[2:])
        for x, y in zip(image.split(pairs), texts.split(pairs), strict=True)
    )

    def per_image(products: torch.Tensor) -> torch.Tensor:
        return -F.logsigmoid(products).sum() / (world * pairs)

    first, begun = per_image(shifted * logits), per_image(beginning * logits)
    mistakes = {
        "averaging divides by the number of ranks; you have done so already": right / world,
        "the sum over pairs has to be divided by this rank's number of images": right * pairs,
        "that is too large by the number of ranks: who adds up what?": right * world,
        "divide by the number of images, not of pairs": -F.logsigmoid(z * logits).mean(),
        "on every rank you take the first texts for its own: image i's text is number rank · B + i": first,
        "the diagonal of a rank's own texts begins at column rank · B": begun,
        "logit_scale is t', and the temperature its exponential": per_image(z * colder),
        "a rank's images are never asked about the others' texts": own / world,
    }
    value = total.item()
    if not math.isclose(value, right.item(), rel_tol=1e-9):
        same = near(1e-9)
        if reason := first_match(value, mistakes, lambda x, wrong: same(x, wrong.item())):
            return reason
        return f"the mean of 3 ranks' values must be {right.item():.6f}; yours is {value:.6f}"
    if not total.requires_grad:
        return "right, but no gradient can flow back from your result: keep it a tensor"
    gradients = torch.autograd.grad(total, learned, allow_unused=True)
    wanted = torch.autograd.grad(right, learned)
    names = "the image tower", "the text tower", "logit_scale", "logit_bias"
    for name, a, b in zip(names, gradients, wanted, strict=True):
        if a is None or not torch.allclose(a, b):
            return f"the loss is right, but the averaged gradient of {name} is not"
    return None
