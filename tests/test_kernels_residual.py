"""The fused residual: the written-out expression in float64 is the oracle."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from siglip_lib import measure

pytest.importorskip("triton")
from siglip_lib.kernels import residual
from siglip_lib.kernels.residual import fused_residual

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = [(2, 5, 100), (3, 7, 1152), (1, 33, 130), (4, 1, 1), (1, 1, 8)]


def plain(x, branch, gamma=None, keep=None, keep_prob=1.0):
    """The expression, with DropPath's rule that a dropped branch counts as 0 whatever it holds."""
    if gamma is not None:
        branch = gamma * branch
    if keep is not None:
        branch = torch.where(keep[:, None, None] != 0, branch / keep_prob, 0.0)
    return x + branch


def draw(shape, dtype, device, gamma=True, keep=True):
    """x, branch, gamma and keep; the second sample is dropped, of one alone the first."""
    x, branch = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    scale = torch.randn(shape[2:], device=device).to(dtype).requires_grad_() if gamma else None
    bits = None
    if keep:
        bits = torch.ones(shape[0], device=device)
        bits[1 % shape[0]] = 0
    return x, branch, scale, bits


def in_float64(tensors):
    wide = (None if t is None else t.detach().double() for t in tensors)
    return [t if t is None else t.requires_grad_() for t in wide]


def learned(tensors):
    return [t for t in tensors[:3] if t is not None]


def assert_rounded_once(found, expected, dtype):
    """Equal up to one rounding to ``dtype``, and to float32's few on the way."""
    assert found.dtype == dtype
    exact = expected.to(dtype)
    # the interpreter cuts float32 to bfloat16 off, which is up to a whole step
    steps = 1 if dtype == torch.bfloat16 and not found.is_cuda else 0.5
    step = (torch.nextafter(exact.abs(), torch.full_like(exact, math.inf)) - exact.abs()).double()
    on_the_way = 1e-6 * expected.abs().max()
    assert ((found.double() - expected).abs() <= steps * step + on_the_way).all()


@pytest.mark.parametrize("with_keep", [True, False], ids=["keep", "all"])
@pytest.mark.parametrize("with_gamma", [True, False], ids=["gamma", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients(dtype, shape, with_gamma, with_keep, device):
    inputs = draw(shape, dtype, device, with_gamma, with_keep)
    keep_prob = 0.7 if with_keep else 1.0
    out = fused_residual(*inputs, keep_prob)
    incoming = torch.randn(shape, device=device).to(dtype)
    gradients = torch.autograd.grad(out, learned(inputs), incoming)

    wide = in_float64(inputs)
    expected = plain(*wide, keep_prob)
    assert_rounded_once(out.detach(), expected.detach(), dtype)
    exact = torch.autograd.grad(expected, learned(wide), incoming.double())
    assert len(gradients) == len(exact)
    for found, value in zip(gradients, exact, strict=True):
        assert found.shape == value.shape
        assert_rounded_once(found, value, dtype)


@pytest.mark.parametrize(
    ("channels", "programs"),
    [(100, 1), (100, 2), (1152, 18), (1152, 12)],  # one of 4 steps; two of 2; two; of 3 and of 1
)
def test_gamma_gradient_over_several_steps_and_programs(channels, programs, monkeypatch, device):
    # 117 rows are 4 blocks; 1152 channels are 9 tiles
    monkeypatch.setattr(residual, "_PROGRAMS", programs)
    inputs = draw((3, 39, channels), torch.float32, device)
    found = torch.autograd.grad(fused_residual(*inputs, 0.5).square().sum(), inputs[:3])
    wide = in_float64(inputs)
    exact = torch.autograd.grad(plain(*wide, 0.5).square().sum(), wide[:3])
    for value, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(
            value.double(), expected, rtol=0, atol=3e-6 * expected.abs().max().item()
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dropped_sample_passes_bit_by_bit(dtype, device):
    x, branch, gamma, _ = (
        None if t is None else t.detach() for t in draw((2, 5, 100), dtype, device)
    )
    x[0, 0, :4] = torch.tensor([-0.0, math.inf, math.nan, torch.finfo(dtype).tiny / 4])
    branch[0, 1], branch[0, 2] = math.inf, math.nan  # it is not even read
    keep = torch.tensor([0.0, 1.0], device=device)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    out = fused_residual(x, branch, gamma, keep, 0.5)
    assert torch.equal(out[0].view(integers), x[0].view(integers))
    assert (out[1] != x[1]).any()

    branch.requires_grad_()
    gamma.requires_grad_()
    incoming = torch.full_like(x, math.nan)
    incoming[1] = 1
    d_branch, d_gamma = torch.autograd.grad(
        fused_residual(x, branch, gamma, keep, 0.5), (branch, gamma), incoming
    )
    assert (d_branch[0] == 0).all()
    assert d_gamma.isfinite().all()


def test_all_dropped(device):
    x, branch, gamma, keep = draw((2, 3, 8), torch.float32, device)
    out = fused_residual(x, branch, gamma, torch.zeros_like(keep), 0.5)
    assert torch.equal(out, x)
    _, d_branch, d_gamma = torch.autograd.grad(out.sum(), (x, branch, gamma))
    assert (d_branch == 0).all()
    assert (d_gamma == 0).all()


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_dtypes_of_keep(dtype, device):
    x, branch, gamma, _ = draw((3, 4, 16), torch.float32, device)
    keep = torch.tensor([1, 0, 1], device=device)
    expected = fused_residual(x, branch, gamma, keep.float(), 0.8)
    assert torch.equal(fused_residual(x, branch, gamma, keep.to(dtype), 0.8), expected)


def test_mixed_dtypes(device):
    # a residual stream in float32 beside a branch that autocast computed in half precision
    x, branch, gamma, keep = draw((2, 3, 100), torch.float32, device)
    branch = branch.detach().half().requires_grad_()
    gamma = gamma.detach().bfloat16().requires_grad_()
    out = fused_residual(x, branch, gamma, keep, 0.7)
    gradients = torch.autograd.grad(out.sum(), (x, branch, gamma))
    assert out.dtype == torch.float32
    assert [g.dtype for g in gradients] == [torch.float32, torch.float16, torch.bfloat16]
    wide = in_float64((x, branch, gamma, keep))
    expected = plain(*wide, 0.7)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    for found, value in zip(gradients, torch.autograd.grad(expected.sum(), wide[:3]), strict=True):
        assert_rounded_once(found, value, found.dtype)


@pytest.mark.parametrize("bare", [True, False])
def test_the_gradient_of_x_is_the_incoming_one(bare, device):
    seen = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.view_as(t)

        @staticmethod
        def backward(ctx, incoming):
            seen.append(incoming.data_ptr())
            return incoming

    x, branch, gamma, keep = draw((2, 3, 100), torch.float32, device)
    rest = () if bare else (gamma, keep, 0.7)
    Watch.apply(fused_residual(Watch.apply(x), branch, *rest)).backward(torch.ones_like(x))
    assert len(seen) == 2
    assert seen[0] == seen[1]


@pytest.mark.parametrize("who", ["x", "branch", "gamma"])
@pytest.mark.parametrize("with_keep", [True, False], ids=["keep", "all"])
def test_one_learner_alone(who, with_keep, device):
    tensors = draw((2, 3, 100), torch.float32, device, keep=with_keep)
    keep_prob = 0.7 if with_keep else 1.0
    at = ["x", "branch", "gamma"].index(who)
    alone = [None if t is None else t.detach() for t in tensors]
    alone[at].requires_grad_()
    (found,) = torch.autograd.grad(fused_residual(*alone, keep_prob).square().sum(), alone[at])
    expected = torch.autograd.grad(fused_residual(*tensors, keep_prob).square().sum(), tensors[:3])
    assert torch.equal(found, expected[at])


@pytest.mark.parametrize("learns", [True, False])
def test_branch_is_kept_for_gamma_alone(learns, device):
    x, branch, gamma, keep = draw((2, 3, 100), torch.float32, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused_residual(x, branch, gamma if learns else gamma.detach(), keep, 0.7)
    assert any(t is branch or t.data_ptr() == branch.data_ptr() for t in saved) == learns


def test_without_gradients_nothing_is_recorded(device):
    x, *others = draw((2, 3, 100), torch.float32, device)
    with torch.no_grad():
        assert not fused_residual(x, *others, 0.7).requires_grad
    x, *others = (t.detach() for t in (x, *others))
    assert not fused_residual(x, *others, 0.7).requires_grad


def test_inputs_that_are_not_contiguous(device):
    x, branch, gamma, _ = (
        None if t is None else t.detach() for t in draw((4, 6, 100), torch.float32, device)
    )
    keep = torch.tensor([1, 5, 0, 5, 0, 5, 1, 5.0], device=device)[::2]
    strided = (x.transpose(0, 1).contiguous().transpose(0, 1), branch.mT.contiguous().mT)
    wide_gamma = torch.stack((gamma, gamma), 1)[:, 0]
    inputs = [t.requires_grad_() for t in (*strided, wide_gamma)]
    out = fused_residual(*inputs, keep, 0.7)
    assert out.is_contiguous()
    assert torch.equal(out, fused_residual(x, branch, gamma, keep.contiguous(), 0.7))
    # a gradient of stride 0, as sum() sends it
    strided_found = torch.autograd.grad(out.sum(), inputs)
    dense = [t.detach().contiguous().requires_grad_() for t in inputs]
    out = fused_residual(*dense, keep, 0.7)
    expected = torch.autograd.grad(out, dense, torch.ones_like(out))
    assert all(map(torch.equal, strided_found, expected))


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_nothing_to_do(shape, device):
    x, branch, gamma, _ = draw(shape, torch.float32, device, keep=False)
    keep = torch.ones(shape[0], device=device)
    out = fused_residual(x, branch, gamma, keep, 0.7)
    found = torch.autograd.grad(out.sum(), (x, branch, gamma))
    assert out.shape == shape
    assert [g.shape for g in found] == [shape, shape, shape[2:]]
    assert (found[2] == 0).all()


def test_inputs_stay_as_they_are(device):
    inputs = draw((2, 3, 100), torch.float32, device)
    before = [t.detach().clone() for t in inputs]
    fused_residual(*inputs, 0.7).sum().backward()
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_on_every_run(dtype, device):
    # in the interpreter several blocks of rows and several tiles, but few: each takes milliseconds
    shape = (64, 729, 1152) if device.type == "cuda" else (3, 11, 384)
    inputs = draw(shape, dtype, device)
    incoming = torch.randn(shape, device=device).to(dtype)

    def run():
        out = fused_residual(*inputs, 0.7)
        return out, *torch.autograd.grad(out, inputs[:3], incoming)

    assert all(map(torch.equal, run(), run()))


def test_second_derivatives_are_refused(device):
    x, branch, gamma, keep = draw((2, 3, 8), torch.float32, device)
    out = fused_residual(x, branch, gamma, keep, 0.7).square().sum()
    (first,) = torch.autograd.grad(out, gamma, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("with_keep", [True, False], ids=["keep", "all"])
@pytest.mark.parametrize("with_gamma", [True, False], ids=["gamma", "plain"])
def test_compiled_in_one_graph(with_gamma, with_keep, device):
    inputs = draw((2, 5, 100), torch.float32, device, with_gamma, with_keep)
    keep_prob = 0.7 if with_keep else 1.0

    def run(function):
        out = function(*inputs, keep_prob)
        return out, *torch.autograd.grad(out.square().sum(), learned(inputs))

    torch._dynamo.reset()
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # which needs no C++ compiler
    compiled = torch.compile(fused_residual, fullgraph=True, backend=backend)
    for found, expected in zip(run(compiled), run(fused_residual), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, None])
@pytest.mark.parametrize("for_gamma", [True, False])
def test_operators_are_described_rightly(for_gamma, dtype, device):
    tensors = draw((2, 3, 100), torch.float32, device)
    x, branch, gamma, keep = (t.detach() for t in tensors)
    checks = ("test_schema", "test_faketensor")
    operators = torch.ops.siglip_lib
    torch.library.opcheck(
        operators.fused_residual, (x, branch, gamma, keep, 0.7), test_utils=checks
    )
    torch.library.opcheck(
        operators.fused_residual_backward,
        (x, branch if for_gamma else None, gamma, keep, 0.7, dtype),
        test_utils=checks,
    )


A = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor .*not list"),
        ({"branch": None}, TypeError, "branch must be a tensor .*not NoneType"),
        ({"gamma": 0.1}, TypeError, "gamma must be a tensor .*not float"),
        (
            {"x": A.double()},
            TypeError,
            r"x is torch.float64; it must be of float16, .* else use x \+ gamma",
        ),
        ({"branch": A.long()}, TypeError, "branch is torch.int64"),
        (
            {"keep": torch.ones(2, dtype=torch.int64)},
            TypeError,
            "keep is torch.int64; it must be of bool, float16",
        ),
        ({"x": A[0], "branch": A[0]}, ValueError, r"x has shape \(3, 4\); it must be \(B, N, C\)"),
        ({"branch": A[:1]}, ValueError, r"branch has shape \(1, 3, 4\); it must be \(2, 3, 4\)"),
        ({"gamma": torch.ones(3)}, ValueError, r"gamma has shape \(3,\); it must be \(4,\)"),
        (
            {"keep": torch.ones(2, 1, 1)},
            ValueError,
            r"keep has shape \(2, 1, 1\); it must be \(2,\)",
        ),
        (
            {"gamma": torch.ones(4, device="meta")},
            ValueError,
            "gamma is on meta; it must be on cpu",
        ),
        (
            {"keep": torch.ones(2), "keep_prob": 0.0},
            ValueError,
            r"keep_prob=0.0 must lie in \(0, 1\]",
        ),
        (
            {"keep": torch.ones(2), "keep_prob": 1.5},
            ValueError,
            r"keep_prob=1.5 must lie in \(0, 1\]",
        ),
        ({"keep": torch.ones(2), "keep_prob": math.nan}, ValueError, "keep_prob=nan must lie"),
        ({"keep": torch.ones(2), "keep_prob": "1"}, TypeError, "keep_prob='1' must be a number"),
        ({"keep_prob": 0.5}, ValueError, "keep_prob=0.5 must be 1 without keep"),
        (
            {"x": A.to("meta"), "branch": A.to("meta")},
            ValueError,
            "x is on meta; the kernel needs a CUDA",
        ),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        fused_residual(**{"x": A, "branch": A, **arguments})


PROBE = """
import torch
from siglip_lib.kernels.residual import fused_residual
try:
    fused_residual(torch.ones(1, 1, 1), torch.ones(1, 1, 1))
except ValueError as error:
    print(error)
"""


def test_a_cpu_without_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, env=environment
    )
    assert "TRITON_INTERPRET=1 set before it is imported; else use x + gamma" in done.stdout


def test_tiles_waste_little():
    assert residual._tile(1152) == (16, 128)
    assert residual._tile(768) == (8, 256)
    assert residual._tile(1024) == (2, 1024)
    assert residual._tile(100) == (16, 128)
    assert residual._tile(1) == (2048, 1)


@pytest.mark.parametrize("shape", [(64, 729, 1152), (3, 731, 1000), (2000, 1100, 1000)], ids=str)
def test_large_shapes(shape, gpu):
    # the last has more than 2**31 elements
    x, branch = (torch.randn(shape, device=gpu, dtype=torch.bfloat16) for _ in range(2))
    gamma = torch.randn(shape[2:], device=gpu, dtype=torch.bfloat16)
    keep = torch.rand(shape[0], device=gpu) < 0.8
    out = fused_residual(x, branch, gamma, keep, 0.8)
    for i in (0, shape[0] // 2, shape[0] - 1):
        at = slice(i, i + 1)
        exact = plain(x[at].double(), branch[at].double(), gamma.double(), keep[at], 0.8)
        assert_rounded_once(out[at], exact, torch.bfloat16)


def test_time(gpu):
    x, branch, gamma, _ = draw((64, 729, 1152), torch.bfloat16, gpu)
    keep = (torch.rand(64, device=gpu) < 0.8).to(x.dtype)
    incoming = torch.randn_like(x)

    def train(function):
        return torch.autograd.grad(
            function(x, branch, gamma, keep, 0.8), (x, branch, gamma), incoming
        )

    with torch.no_grad():
        ours = measure(lambda: fused_residual(x, branch, gamma, keep, 0.8), gpu).median_ms
        assert ours <= 0.5 * measure(lambda: plain(x, branch, gamma, keep, 0.8), gpu).median_ms
    ours = measure(lambda: train(fused_residual), gpu).median_ms
    assert ours <= 0.7 * measure(lambda: train(plain), gpu).median_ms


def test_fake_tensors_get_the_shape(device):
    with FakeTensorMode():
        x, gamma = torch.empty(2, 3, 5, device=device), torch.empty(5, device=device)
        out = fused_residual(x.requires_grad_(), x, gamma.requires_grad_())
        out.sum().backward()
        assert out.shape == x.grad.shape == x.shape
        assert gamma.grad.shape == (5,)
