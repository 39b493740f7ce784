"""Checks of notebook 14, many GPUs."""

import itertools
import math
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import (
    Clock,
    first_match,
    is_tensor,
    near,
    number,
    two_numbers,
)
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


_START, _PER_PAIR = 3.0, 2e-6  # of the call that exercise 14.2 times, in ms
_FIRST, _DISTURBED = 40.0, 20.0  # how much longer, in ms


@exercise("14.2")
def start_and_rate(answer) -> str | None:
    def measured(start: float, per_pair: float) -> tuple[object, list[int], bool]:
        """What is returned for such a call, the sizes that were asked for, and whether by a clock of Python's."""
        sizes: list[int] = []

        def ms(_: int) -> float:
            again = sizes.count(sizes[-1])
            extra = _FIRST if again == 1 else _DISTURBED if again == 3 else 0.0
            return start + per_pair * sizes[-1] ** 2 + extra

        with Clock() as clock:
            wait = clock.function(ms)

            def call(pairs: int) -> None:
                if number(pairs) not in (256, 1024):
                    raise ValueError(f"call({pairs!r}): measure at 256 and at 1,024 pairs")
                sizes.append(int(pairs))
                wait()

            return answered(answer(call)), sizes, clock.was_read

    returned, sizes, was_read = measured(_START, _PER_PAIR)
    if (found := two_numbers(returned)) is None:
        return f"your function returns {returned!r}; it must return two numbers: a and k in seconds"
    if set(sizes) != {256, 1024}:
        return "your function must call the one that it measures, at 256 and at 1,024 pairs"
    if min(map(sizes.count, (256, 1024))) < 4:
        return "call it at least four times at each size: the first call is left out, and a median needs three others"
    # a real clock is a little late now and then
    same = near(1e-6 if was_read else 0.15)

    def is_(a: float, k: float) -> bool:
        return same(found[0], a) and same(found[1], k)

    a, k = _START / 1e3, _PER_PAIR / 1e3
    if is_(a, k):
        returned, *_ = measured(5.0, 4e-6)
        again = two_numbers(returned)
        if again is None or not (same(again[0], 5e-3) and same(again[1], 4e-9)):
            return "right for one call, but not for a second one: is a number fixed in your code?"
        return None
    if is_(_START, _PER_PAIR):
        return "those are milliseconds; a and k are wanted in seconds"
    if is_(k, a):
        return "a comes first, then k"
    if same(found[1], _PER_PAIR / 1e3 * (1024 + 256)):
        return "the work grows with the square of the pairs, not with the pairs"
    if same(found[0], a + k * 256**2):
        return "that is the whole time of the small call: a is what remains of it without the work"
    if same(found[1], k + a / 1024**2):
        return "of the large call a part is start, too: take the difference of both sizes"
    busy = "" if was_read else " If they are, the machine is busy: check again."
    return (
        f"a and k are {a:.2g} and {k:.2g} s, you find {found[0]:.2g} and {found[1]:.2g}: "
        f"are first calls left out, and a disturbed one now and then?{busy}"
    )


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
