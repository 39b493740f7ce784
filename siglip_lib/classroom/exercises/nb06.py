"""Checks of notebook 06, the block."""

import operator

import torch
from torch import nn

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import (
    first_match,
    is_tensor,
    number,
    two_numbers,
    was_changed,
)
from siglip_lib.tower.block import Block


@exercise("06.1")
def kept(answer) -> str | None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        line, chain = nn.Linear(8, 16), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        modules = {
            "nn.Linear(8, 16)": line,
            "a Linear, a ReLU and a Linear": chain,
            "a block": Block(8, 2),
        }
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    for name, module in modules.items():
        with torch.enable_grad():
            right, mistakes = _kept(module, x)
            returned = answered(answer(module, x))
        if (found := number(returned)) is None:
            return f"kept returns {returned!r}; it must be a number of bytes"
        if found == right:
            continue
        if reason := first_match(found, mistakes, operator.eq):
            return f"{reason} ({name})"
        return f"for {name} it is {found:,} bytes; {right:,} are kept"
    return None


def _kept(module: nn.Module, x: torch.Tensor) -> tuple[int, dict[str, int]]:
    """Return the bytes that ``module(x)`` keeps, and by reason what a mistake counts."""
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(tensors.append, lambda index: index):
        module(x)
    learnt = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def once(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return list({tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}.values())

    def total(tensors: list[torch.Tensor]) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    others = [tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in learnt]
    of_input = [t for t in others if t.untyped_storage().data_ptr() != x.data_ptr()]
    right = total(once(others))
    return right, {
        "the parameters are counted too": total(once(tensors)),
        "elements are counted; a float32 has 4 bytes": right // 4,
        "a storage that two operations keep is counted twice": total(others),
        "a view is counted by its own elements; count the bytes of its storage": (
            sum(tensor.nbytes for tensor in others),
            sum(tensor.nbytes for tensor in once(others)),
        ),
        "the input is kept too": total(once(of_input)),
        "that is what the outputs take; count what the hook is called with": module(x).nbytes,
    }


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
        if was_changed(x, before):
            return "your function changed its input x; the caller still needs it"
        attended, widened = block.attn(block.norm1(x)), block.mlp(block.norm2(x))
        scaled, scaled_mlp = block.ls1(attended), block.ls2(widened)
        ordinary, other_norm = block(x), block.ls2(block.mlp(block.norm1(x)))
        mistakes = {
            "that is the ordinary block: its MLP starts from x plus the attention, not from x": ordinary,
            "x itself is missing: both branches are added to the stream": scaled + scaled_mlp,
            "x is in the sum twice; there is one stream": 2 * x + scaled + scaled_mlp,
            "the LayerScales ls1 and ls2 are missing": x + attended + widened,
            "the MLP's branch has its own norm, norm2": x + scaled + other_norm,
            "the MLP's branch is missing": x + scaled,
            "the attention's branch is missing": x + scaled_mlp,
        }
        right = x + scaled + scaled_mlp
    if not is_tensor(found, *x.shape):
        return f"the result must be a tensor of x's shape, {tuple(x.shape)}"
    if not torch.allclose(found, right):
        return (
            first_match(found, mistakes)
            or "the result is not x + ls1(attn(norm1(x))) + ls2(mlp(norm2(x)))"
        )
    return _drop_paths(answer, block.train(), x)


def _drop_paths(answer, block: Block, x: torch.Tensor) -> str | None:
    """What is wrong in training mode, the DropPaths keeping other samples."""
    keep1, keep2 = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])[:, :, None, None]
    x = x[:1].expand(4, -1, -1).clone()  # of four alike each DropPath keeps two
    block.drop_path1, block.drop_path2 = _Times(keep1), _Times(keep2)
    with torch.no_grad():
        found = answer(block, x)
        attended, widened = (
            block.ls1(block.attn(block.norm1(x))),
            block.ls2(block.mlp(block.norm2(x))),
        )
        mistakes = {
            "the DropPaths drop_path1 and drop_path2 are missing": x + attended + widened,
            "the DropPaths are exchanged: drop_path1 is the attention's": x
            + keep2 * attended
            + keep1 * widened,
            "the attention's DropPath, drop_path1, is missing": x + attended + keep2 * widened,
            "the MLP's DropPath, drop_path2, is missing": x + keep1 * attended + widened,
        }
        if torch.allclose(found, x + keep1 * attended + keep2 * widened):
            return None
    reason = first_match(found, mistakes) or "each branch is to be dropped by its own DropPath"
    return f"right in eval mode, but not while training: {reason}"


class _Times(nn.Module):
    """A DropPath that keeps what it is told to."""

    def __init__(self, keep: torch.Tensor) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.keep * x


@exercise("06.3")
def idle(answer) -> str | None:
    dim = 96
    returned = answered(answer(dim))
    if (pair := two_numbers(returned)) is None:
        return f"idle({dim}) is {returned!r}; it must be a pair, (first, after the last)"
    if pair == (0, dim):
        return "a bias on q shifts the score with key k by bias · k, another amount for every key"
    if pair == (2 * dim, 3 * dim):
        return "a bias on v is added to what the head returns, as the weights sum to 1"
    if pair == (dim, 2 * dim - 1):
        return f"the right third, but the second number is the index after the last: {2 * dim}"
    if pair != (dim, 2 * dim):
        return f"idle({dim}) is {pair}; the thirds are (0, 96), (96, 192) and (192, 288)"
    if two_numbers(returned := answer(1152)) != (1152, 2304):
        return f"right for a width of 96, but idle(1152) is {returned!r}"
    return None
