"""Checks of notebook 05, LayerScale and DropPath."""

import math

import torch
from torch import nn

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import first_match, near, was_changed


@exercise("05.1")
def expected_blocks(answer) -> str | None:
    found = float(answered(answer(0.4, 27)))
    mistakes = {
        "that drops every block at the full rate; block l has its own, from 0 up": 27 * 0.6,
        "that is how many are dropped, not how many are kept": 27 * 0.2,
        "the last block must reach the full rate: divide l by depth - 1, not by depth": 27
        - 0.4 * 13,
        "count blocks from 0: the first is never dropped": 27 - 0.4 * 14,
        "count blocks from 0 to depth - 1": 27 - 0.4 * 378 / 26,
        "that is the average share; multiply by the number of blocks, or add them up": 0.8,
    }
    if reason := first_match(found, mistakes, near(1e-4)):
        return reason
    for rate, depth, right in ((0.4, 27, 21.6), (0.2, 12, 10.8), (0.9, 2, 1.1), (0.0, 5, 5.0)):
        if not math.isclose(float(answer(rate, depth)), right, rel_tol=1e-4):
            return f"expected_blocks({rate}, {depth}) is {float(answer(rate, depth)):.3f}; it must be {right}"
    return None


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
        if not math.isclose(float(answer(p)), right, rel_tol=1e-4, abs_tol=1e-6):
            return f"drop_path_std({p}) is {float(answer(p)):.4f}; a million draws give {right:.4f}"
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
