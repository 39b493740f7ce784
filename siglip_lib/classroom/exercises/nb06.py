"""Checks of notebook 06, the block."""

import torch

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.tower.block import Block

_D, _PATCH, _POSITIONS, _BLOCK = 1152, 3 * 14 * 14, 729, 15_239_504
_TOWER = _PATCH * _D + _D + _POSITIONS * _D + 27 * _BLOCK + 2 * _D


@exercise("06.1")
def tower(answer) -> str | None:
    mistakes = {
        _TOWER
        - _D: "one bias or one half of the norm is missing: a LayerNorm has a weight and a bias, "
        "the patch embedding has a bias too",
        _TOWER - 2 * _D: "the final LayerNorm is missing: a weight and a bias for each channel",
        _TOWER - _POSITIONS * _D: "the vectors of the 729 positions are missing",
        _TOWER - _PATCH * _D - _D: "the patch embedding is missing",
        _TOWER - 2 * 14 * 14 * _D: "a patch has three colours: 3 * 14 * 14 values for each channel",
        _TOWER - 26 * _BLOCK: "there are 27 blocks, not one",
        _TOWER + 15_238_352: "that is the tower with its pooling head",
    }
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        return f"tower is {answer!r}; it must be a number"
    if answer in mistakes:
        return mistakes[answer]
    if answer != _TOWER:
        return f"{answer:,} is {abs(answer - _TOWER):,} too {'many' if answer > _TOWER else 'few'}"
    return None


@exercise("06.2")
def parallel(answer) -> str | None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        block = Block(24, 3, init_values=1.0).double().eval()
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, 0.5, 0.3)
        x = torch.randn(2, 5, 24, dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        found = answered(answer(block, x))
        if not torch.equal(x, before):
            return "your function changed its input x; the caller still needs it"
        attended, widened = block.attn(block.norm1(x)), block.mlp(block.norm2(x))
        scaled, scaled_mlp = block.ls1(attended), block.ls2(widened)
        other_norm = block.ls2(block.mlp(block.norm1(x)))
        mistakes = {
            "that is the ordinary block: its MLP starts from x plus the attention, not from x": block(
                x
            ),
            "x itself is missing: both branches are added to the stream": scaled + scaled_mlp,
            "x is in the sum twice; there is one stream": 2 * x + scaled + scaled_mlp,
            "the LayerScales ls1 and ls2 are missing": x + attended + widened,
            "the MLP's branch has its own norm, norm2": x + scaled + other_norm,
            "the MLP's branch is missing": x + scaled,
            "the attention's branch is missing": x + scaled_mlp,
        }
        right = x + scaled + scaled_mlp
    if not isinstance(found, torch.Tensor) or found.shape != x.shape:
        return f"the result must be a tensor of x's shape, {tuple(x.shape)}"
    if torch.allclose(found, right):
        return None
    for text, wrong in mistakes.items():
        if torch.allclose(found, wrong):
            return text
    return "the result is not x + ls1(attn(norm1(x))) + ls2(mlp(norm2(x)))"


@exercise("06.3")
def idle(answer) -> str | None:
    dim = 96
    found = answered(answer(dim))
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        return f"idle({dim}) is {found!r}; it must be a pair, (first, after the last)"
    pair = tuple(found)
    if pair == (0, dim):
        return "a bias on q shifts the score with key k by bias · k, another amount for every key"
    if pair == (2 * dim, 3 * dim):
        return "a bias on v is added to what the head returns, as the weights sum to 1"
    if pair == (dim, 2 * dim - 1):
        return f"the right third, but the second number is the index after the last: {2 * dim}"
    if pair != (dim, 2 * dim):
        return f"idle({dim}) is {pair}; the thirds are (0, 96), (96, 192) and (192, 288)"
    if tuple(answer(1152)) != (1152, 2304):
        return f"right for a width of 96, but idle(1152) is {tuple(answer(1152))}"
    return None
