"""train_stage: what it trains and what not, at which rates, and what it refuses."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from siglip_lib.train.captioning import train_stage
from siglip_lib.vl import LanguageModel, caption_loss


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(vocab_size=13, context_length=8, width=16, depth=1, num_heads=2)


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(2, 13, (32, 1), generator=generator)
    tokens = torch.cat((first, first, torch.ones_like(first)), 1)  # a word twice, then </s>
    return {"tokens": tokens}


def test_a_model_learns_to_repeat_a_word(model):
    prefix = torch.zeros(32, 2, 16)

    def loss(tokens):
        return caption_loss(model.caption_logits(prefix, tokens), tokens)

    losses = train_stage(loss, model.parameters(), batch, 200, 1e-2, progress=False)
    assert losses.shape == (200,)
    # the first word can't be known: log 11 of three tokens
    assert losses[-20:].mean().item() == pytest.approx(math.log(11) / 3, abs=0.05)


def test_what_is_not_trained_stays(model):
    prefix = nn.Parameter(torch.zeros(1, 2, 16))
    before = {name: x.clone() for name, x in model.state_dict().items()}

    def loss(tokens):
        return caption_loss(model.caption_logits(prefix.expand(32, -1, -1), tokens), tokens)

    train_stage(loss, [prefix], batch, 20, 1e-2, progress=False)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert prefix.abs().min() > 0


def test_rates_and_decay():
    matrix, positions = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(1, 3, 2))
    seen = []

    def loss(x):
        seen.append((matrix[0, 0].item(), positions[0, 0, 0].item()))
        return 0 * (matrix.sum() + positions.sum()) + x.sum()

    train_stage(
        loss, [matrix, positions], lambda _: {"x": torch.ones(2)}, 40, 0.5, weight_decay=0.1,
        progress=False,
    )  # fmt: skip
    shrunk = [after / before for (before, _), (after, _) in pairwise(seen)]
    rates = [(1 - factor) / 0.1 for factor in shrunk]
    rise = [min(1, (i + 1) / 2) for i in range(39)]
    expected = [0.5 * r * (1 + math.cos(math.pi * i / 40)) / 2 for i, r in enumerate(rise)]
    assert rates == pytest.approx(expected, abs=1e-4)
    assert {position for _, position in seen} == {1.0}


def test_the_gradient_is_clipped():
    x = nn.Parameter(torch.zeros(3))

    def loss(y):
        return (1000 * x * y).sum()

    train_stage(loss, [x], lambda _: {"y": torch.ones(3)}, 1, 1e-3, progress=False)
    assert x.grad.norm().item() == pytest.approx(1, abs=1e-4)


def test_a_loss_that_is_no_number_ends_it():
    x = nn.Parameter(torch.ones(1))

    def loss(y):
        return (x * y).sum()

    def inputs(step):
        return {"y": torch.full((1,), math.nan if step == 3 else 1.0)}

    with pytest.raises(FloatingPointError, match=r"nan at step 3; lower lr=0\.01"):
        train_stage(loss, [x], inputs, 5, 1e-2, progress=False)


@pytest.mark.parametrize(
    ("trained", "steps", "lr", "decay", "said"),
    [
        ([], 1, 1e-3, 0.1, "trained holds no parameters"),
        ([nn.Parameter(torch.ones(1))], 0, 1e-3, 0.1, "steps"),
        ([nn.Parameter(torch.ones(1))], 1, 0.0, 0.1, "lr"),
        ([nn.Parameter(torch.ones(1))], 1, 1e-3, -0.1, "weight_decay"),
    ],
)
def test_numbers_that_are_none(trained, steps, lr, decay, said):
    with pytest.raises(ValueError, match=said):
        train_stage(
            lambda: None, trained, lambda _: {}, steps, lr, weight_decay=decay, progress=False
        )
