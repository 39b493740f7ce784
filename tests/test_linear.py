"""Linear layers of the MLP on a GPU: fused where they may be, right to rounding, whole under torch.compile."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close, outputs_and_gradients
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from siglip_lib import Mlp
from siglip_lib.layers import GELU_TANH
from siglip_lib.linear import can_fuse_linear_gelu

OP = torch.ops.siglip_lib.linear_gelu.default


class Hooked(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_forward_hook(lambda *_: None)


@dataclass
class Input:
    """What decides about an input, so that the rule is tested where there is no GPU."""

    is_cuda: bool = True
    dtype: torch.dtype = torch.bfloat16
    requires_grad: bool = False


@pytest.mark.parametrize(
    ("fuses", "x", "linear", "act"),
    [
        (True, Input(), nn.Linear(8, 16), GELU_TANH),
        (True, Input(dtype=torch.float16), nn.Linear(8, 16), GELU_TANH),
        (False, Input(dtype=torch.float32), nn.Linear(8, 16), GELU_TANH),
        (False, Input(is_cuda=False), nn.Linear(8, 16), GELU_TANH),
        (False, Input(), nn.Linear(8, 16, bias=False), GELU_TANH),
        (False, Input(), Hooked(8, 16), GELU_TANH),
        (False, Input(), nn.Linear(8, 16), nn.GELU),
        (False, Input(), nn.Linear(8, 16), nn.ReLU),
    ],
)
def test_fuses_only_where_nothing_is_lost(fuses, x, linear, act):
    linear = linear.to(x.dtype)
    with torch.no_grad():
        assert can_fuse_linear_gelu(linear, act(), x) == fuses
    assert not can_fuse_linear_gelu(linear, act(), x)  # a gradient is recorded
    assert can_fuse_linear_gelu(linear.requires_grad_(False), act(), x) == fuses
    x.requires_grad = True
    assert not can_fuse_linear_gelu(linear, act(), x)


def test_does_not_fuse_weights_of_another_dtype_or_under_autocast(monkeypatch):
    linear, act, x = nn.Linear(8, 16).requires_grad_(False), GELU_TANH(), Input()
    assert not can_fuse_linear_gelu(linear, act, x)
    linear.bfloat16()
    assert can_fuse_linear_gelu(linear, act, x)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    assert not can_fuse_linear_gelu(linear, act, x)


def test_counts_its_flops():
    x, weight = torch.empty(5, 8, device="meta"), torch.empty(16, 8, device="meta")
    with FlopCounterMode(display=False) as counter:
        out = torch.ops.siglip_lib.linear_gelu(x, weight, torch.empty(16, device="meta"))
    assert out.shape == (5, 16)
    assert counter.get_total_flops() == 2 * 5 * 8 * 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 72), (3, 7, 72), (2, 729, 1152)])
def test_is_as_near_to_float64_as_two_kernels(shape, dtype, gpu):
    mlp = Mlp(shape[-1], 4304, act_layer=GELU_TANH).to(gpu, dtype).eval()
    x = torch.randn(shape, device=gpu, dtype=dtype)
    with torch.no_grad():
        fused, apart = (error(mlp, x, hook) for hook in (False, True))
    assert fused <= 1.1 * apart


def error(mlp: Mlp, x: torch.Tensor, hook: bool) -> float:
    """Relative error of what goes into fc2; a hook on fc1 keeps the two kernels apart."""
    seen = []
    handles = [mlp.fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))]
    if hook:
        handles.append(mlp.fc1.register_forward_hook(lambda *_: None))
    mlp(x)
    for handle in handles:
        handle.remove()
    exact = F.linear(x.double(), mlp.fc1.weight.double(), mlp.fc1.bias.double())
    exact = F.gelu(exact, approximate="tanh")
    return ((seen[0] - exact).norm() / exact.norm()).item()


def test_compiled_code_keeps_it_whole(gpu):
    mlp = Mlp(64, 256, act_layer=GELU_TANH).to(gpu, torch.bfloat16).eval()
    x = torch.randn(2, 5, 64, device=gpu, dtype=torch.bfloat16)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        expected = mlp(x)
        torch.testing.assert_close(torch.compile(mlp, fullgraph=True, backend=keep)(x), expected)
        torch.testing.assert_close(torch.compile(mlp, fullgraph=True)(x), expected)
    assert OP in {getattr(node.target, "default", node.target) for node in graphs[0].graph.nodes}


def test_training_takes_two_kernels_and_has_gradients(gpu):
    mlp = Mlp(64, 256, act_layer=GELU_TANH).to(gpu, torch.bfloat16)
    x = torch.randn(2, 5, 64, device=gpu, dtype=torch.bfloat16)
    mlp(x).sum().backward()
    assert all(parameter.grad.any() for parameter in mlp.parameters())


def test_training_code_compiled_for_a_gpu_gives_the_same(gpu):
    mlp = Mlp(64, 256, act_layer=GELU_TANH).to(gpu)
    x = torch.randn(2, 5, 64, device=gpu, requires_grad=True)
    found = outputs_and_gradients(torch.compile(mlp, fullgraph=True), x)
    expected = outputs_and_gradients(mlp, x)
    assert_close({k.removeprefix("_orig_mod."): v for k, v in found.items()}, expected)
