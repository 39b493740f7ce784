"""Checks of notebook 05, LayerScale and DropPath."""

import itertools
import math

import torch
from torch import nn

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import (
    first_match,
    near,
    two_numbers,
    was_changed,
)


class _Unknown(nn.Module):
    """A DropPath whose settings can't be read."""

    def __init__(self, p: float, factor: float) -> None:
        super().__init__()
        self._run = lambda x: torch.where(_kept(x, p), factor * x, 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(x) if self.training else x


def _kept(x: torch.Tensor, p: float) -> torch.Tensor:
    """Draw which samples of x (B, ...) are kept: (B, 1, ...) bool."""
    return torch.rand(x.shape[:1], device=x.device).view(-1, *(1,) * (x.ndim - 1)) >= p


@exercise("05.1")
def measure_drop(answer) -> str | None:
    layers = (0.25, 1 / 0.75), (0.6, 1.0), (0.1, 1.0), (0.4, 2.0)
    for (p, factor), seed in itertools.product(layers, range(5)):
        torch.manual_seed(seed)
        layer = _Unknown(p, factor).train()
        if (found := two_numbers(answered(answer(layer)))) is None:
            return "return two numbers: the share dropped and the factor"
        if not layer.training:
            return "the layer was set to eval, where it drops nothing"
        share, scale = found
        call = f"a layer that drops {p} and multiplies by {factor:.3f} was measured as {share:.3f} and {scale:.3f}"
        mistakes = {
            "the first number is the share kept, not the share dropped": (1 - p, factor),
            "take the mean over the samples kept, not over all": (p, (1 - p) * factor),
            "the two numbers are in the other order": (factor, p),
            "the factor does not follow from the share: a layer need not divide": (p, 1 / (1 - p)),
        }
        if _within((share, scale), (p, factor), 0.01):
            continue
        for reason, wrong in mistakes.items():
            if _within((share, scale), wrong, 0.01):
                return f"{call}: {reason}"
        return (
            f"{call}: both must be right to .01; a share of n samples is off by about .5 / sqrt(n)"
        )
    return None


def _within(found: tuple[float, float], wanted: tuple[float, float], off: float) -> bool:
    return all(abs(x - y) <= off for x, y in zip(found, wanted, strict=True))


@exercise("05.2")
def drop_path_std(answer) -> str | None:
    found = float(answered(answer(0.2)))
    root = math.sqrt(1.25)
    mistakes = {
        "that is the variance; the standard deviation is its square root": 0.25,
        "that is without the division by 1 - p: what is kept is 1 / (1 - p), not 1": 0.4,
        "that is the variance, and of a DropPath that does not divide by 1 - p": 0.16,
        "p and 1 - p are exchanged: more dropping must make more noise": 2.0,
        "that is the root of the mean square; take off the square of the mean, which is 1": root,
    }
    if reason := first_match(found, mistakes, near(1e-4)):
        return reason
    for p in (0.2, 0.5, 0.9, 0.0):
        right = math.sqrt(p / (1 - p))
        if not math.isclose(found := float(answer(p)), right, rel_tol=1e-4, abs_tol=1e-6):
            return f"drop_path_std({p}) is {found:.6f}; the formula gives {right:.6f}"
    return None


@exercise("05.3")
def fold(answer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs, bias in ((6, 6, True), (6, 4, True), (6, 4, False)):
        linear = nn.Linear(inputs, outputs, bias=bias)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        gamma = torch.rand(outputs, generator=generator) + 0.1
        before = {name: value.clone() for name, value in linear.state_dict().items()}
        folded = answered(answer(linear, gamma))
        if not isinstance(folded, nn.Linear):
            return f"fold must return an nn.Linear, not {type(folded).__name__}"
        if folded is linear or was_changed(linear.state_dict(), before):
            return "the given Linear was changed; put the result into a new one"
        if (folded.bias is None) == bias:
            word = "with" if bias else "without"
            return f"a Linear {word} a bias must give one {word}"
        h = torch.randn(5, inputs, generator=generator)
        if problem := _compare(folded, linear, gamma, h):
            return problem
    return None


def _compare(
    folded: nn.Linear, linear: nn.Linear, gamma: torch.Tensor, h: torch.Tensor
) -> str | None:
    """What is wrong with the folded weights, if anything."""
    with torch.no_grad():
        weight, right = folded.weight, linear.weight * gamma[:, None]
        if weight.shape != right.shape:
            return (
                f"the new weight has shape {tuple(weight.shape)}; it must be {tuple(right.shape)}"
            )
        if torch.allclose(weight, linear.weight):
            return "the weight is unchanged; gamma must go into it"
        if weight.shape[0] == weight.shape[1] and torch.allclose(weight, linear.weight * gamma):
            return "gamma multiplies the columns of W, its inputs; an output channel is a row"
        if not torch.allclose(weight, right, rtol=1e-4, atol=1e-6):
            return "the weight is wrong: row i must be multiplied by gamma[i]"
        if linear.bias is not None and torch.allclose(folded.bias, linear.bias):
            return "the bias is unchanged; gamma multiplies it too"
        if not torch.allclose(folded(h), linear(h) * gamma, rtol=1e-4, atol=1e-5):
            return "the weight is right, but the output is not linear(h) * gamma: look at the bias"
    return None
