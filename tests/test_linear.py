"""The fused linear layer and GELU: taken where it may be, right to rounding, whole under torch.compile."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from siglip_lib import Mlp
from siglip_lib.tower.layers import GELU_TANH
from siglip_lib.tower.linear_gelu import can_fuse_linear_gelu, fused_linear_gelu


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


def test_leaves_the_two_to_whoever_counts_operators():
    linear, x = nn.Linear(8, 16).bfloat16().requires_grad_(False), Input()
    assert can_fuse_linear_gelu(linear, GELU_TANH(), x)
    with FlopCounterMode(display=False):
        assert not can_fuse_linear_gelu(linear, GELU_TANH(), x)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook", "full_backward_hook"])
def test_leaves_the_two_to_whoever_looks_at_a_layer(kind, layer):
    layers, x = (nn.Linear(8, 16).bfloat16().requires_grad_(False), GELU_TANH()), Input()
    hook = getattr(layers[layer], f"register_{kind}")(lambda *_: None)
    assert not can_fuse_linear_gelu(*layers, x)
    hook.remove()
    assert can_fuse_linear_gelu(*layers, x)
    hook = getattr(nn.modules.module, f"register_module_{kind}")(lambda *_: None)
    assert not can_fuse_linear_gelu(*layers, x)
    hook.remove()
    layers[layer].forward = lambda x: x  # as some libraries wrap a layer
    assert not can_fuse_linear_gelu(*layers, x)


def test_leaves_the_two_to_torch_func():
    linear, x = nn.Linear(8, 16).bfloat16().requires_grad_(False), Input()

    def ask(y):
        assert not can_fuse_linear_gelu(linear, GELU_TANH(), x)
        return y

    torch.func.vmap(ask)(torch.zeros(2))


def test_runs_without_the_operator_unless_compiled():
    linear, x = nn.Linear(8, 16), torch.randn(2, 3, 8)  # the operator is of CUDA alone
    with torch.no_grad():
        found = fused_linear_gelu(linear, x)
        torch.testing.assert_close(found, F.gelu(linear(x)))  # tanh's on CUDA alone


def test_counted_flops_are_those_of_both_products(gpu):
    mlp = Mlp(64, 256, act_layer=GELU_TANH).to(gpu, torch.bfloat16)
    x = torch.randn(10, 64, device=gpu, dtype=torch.bfloat16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mlp(x)
    assert counter.get_total_flops() == 2 * 10 * (64 * 256 + 256 * 64)


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
        for backend in (keep, "inductor"):
            found = torch.compile(mlp, fullgraph=True, backend=backend)(x)
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)  # a bf16 step or two
    assert "linear_gelu" in str(graphs[0].graph)


def test_training_takes_two_kernels_and_has_gradients(gpu):
    mlp = Mlp(64, 256, act_layer=GELU_TANH).to(gpu, torch.bfloat16)
    x = torch.randn(2, 5, 64, device=gpu, dtype=torch.bfloat16)
    mlp(x).sum().backward()
    assert all(parameter.grad.any() for parameter in mlp.parameters())
