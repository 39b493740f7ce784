"""Checks of notebook 01, truncated-normal sampling."""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import first_match, near


@exercise("01.1")
def beyond(answer) -> str | None:
    one = answered(answer(1.0))
    mistakes = {
        "that is one side only; draws below -z count too": 0.1586553,
        "that is the share within z, not beyond it": 0.6826895,
    }
    if reason := first_match(one, mistakes, near(1e-3)):
        return reason
    if math.isclose(one, 0.1572992, rel_tol=1e-5):
        return "the argument of erf and erfc is z / sqrt(2), not z"
    if not math.isclose(one, 0.3173105, rel_tol=1e-5):
        return f"beyond(1) is {one:.4f}, but must be .3173 (computed, not sampled)"
    if not math.isclose(answer(10.0), 1.523971e-23, rel_tol=1e-3):
        return f"beyond(10) is {answer(10.0)}, not 1.52e-23: a difference of two numbers near 1"
    return None


@exercise("01.2")
def truncated_std(answer) -> str | None:
    two = answered(answer(2.0))
    density, share, phi = 0.0539910, 0.9544997, 0.9772499
    half, by_phi = 1 - 2 * density / share, 1 - 4 * density / phi
    mistakes = {
        "that is the variance; the standard deviation is its square root": 0.7737413,
        "cutting both ends off makes the spread smaller than 1": 1.0,
        "that is the factor to raise std by; return its inverse": 1 / 0.8796257,
        "the factor 2 c is 4 at c = 2; you have only part of it": half**0.5,
        "divide by 2 Phi(c) - 1, the share inside, not by Phi(c)": by_phi**0.5,
    }
    if reason := first_match(two, mistakes, near(1e-4)):
        return reason
    for c, right in ((2.0, 0.8796257), (1.0, 0.5395601), (3.0, 0.9865784)):
        if not math.isclose(answer(c), right, rel_tol=1e-4):
            return f"truncated_std({c:.0f}) is {answer(c):.4f}, but must be {right:.4f}"
    return None


@exercise("01.3")
def count_values(answer) -> str | None:
    answered(answer(1.0, 2.0))
    cases = (1.0, 2.0, True), (1.0, 1.5, True), (0.01, 0.02, False), (0.049, 0.05, False)
    for a, b, both_inside in cases:
        right, found = len(_bfloat16_between(a, b)), int(answer(a, b))
        if found == right - 1 and both_inside:
            return f"count_values({a}, {b}) is {found}, one short: both ends count"
        if found != right:
            return f"count_values({a}, {b}) is {found}, but must be {right}: are both bounds rounded inwards?"
    return None


@exercise("01.4")
def trustworthy(answer) -> str | None:
    found = _verdict(answered(answer(_sampler(seed=0))))
    if not isinstance(found, bool):
        return f"trustworthy returns {found!r}; it must return True or False"

    seeds = itertools.count()  # two samplers of one seed would have as many outliers

    def trusted(tests: int, **fault: float) -> int:
        samplers = (_sampler(next(seeds), **fault) for _ in range(tests))
        return sum(_verdict(answer(sampler)) for sampler in samplers)

    if (refused := 6 - trusted(6)) > 1:
        return f"your test refuses {refused} of 6 right samplers"
    for width, word in ((1.05, "large"), (0.95, "small")):
        if trusted(1, width=width):
            return f"your test trusts a sampler whose standard deviation is 5 % too {word}"
    tests = 16
    low, high = (trusted(tests, outlier=outlier) for outlier in (-100, 100))
    if low + high > 1:  # a single one does not show that more than one in a hundred is missed
        samplers = "samplers with one draw in 2**18"
        return (
            f"your test trusts {low} of {tests} {samplers} at -100 sigma, and {high} of {tests} at +100 sigma: look at"
            " both sides, and take more draws"
        )
    return None


def _verdict(value: object) -> object:
    """Return the bool that a tensor of one element holds, all else as it is."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _sampler(seed: int, width: float = 1.0, outlier: float = 0.0) -> Callable[..., Tensor]:
    """A sampler in place: the standard deviation is wrong, or one draw in 2**18 is ``outlier`` standard deviations."""
    generator = torch.Generator().manual_seed(seed)

    def sample(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
        drawn = torch.empty(tensor.numel()).normal_(mean, width * std, generator=generator)
        if outlier:
            rate = torch.tensor(len(drawn) * 2.0**-18)
            count = int(torch.poisson(rate, generator=generator))
            drawn[torch.randint(len(drawn), (count,), generator=generator)] = mean + outlier * std
        return tensor.copy_(drawn.view(tensor.shape))

    return sample


def _bfloat16_between(a: float, b: float) -> torch.Tensor:
    positive = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16).double()
    return positive[(positive >= a) & (positive <= b)]
