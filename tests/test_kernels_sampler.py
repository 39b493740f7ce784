"""The sampler in one kernel: scipy's truncnorm and its inverse normal distribution are the oracles."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import special, stats
from test_trunc_normal import distance
from torch._subclasses import FakeTensorMode

from siglip_lib import measure

pytest.importorskip("triton")
import triton
import triton.language as tl

from siglip_lib.kernels import sampler
from siglip_lib.kernels.sampler import trunc_normal_philox_

INF = math.inf
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CASES = [  # mean, std, a, b; each reaches to within std of the mean
    (0, 1, -2, 2),
    (0, 0.02, -2, 2),
    (0, 0.05, -0.05, 0.05),
    (1, 2, -1, 0.5),
    (0, 1, -INF, INF),
    (0, 1, 0.98, 1.02),
    (0, 1, -1.5, INF),
    (0, 1, -INF, -0.9),
    (3, 0.5, 2.6, 6),
    (-1000, 1, -1000.5, -999),
]


def draw(size, dtype, device, *bounds, seed=1):
    return trunc_normal_philox_(torch.empty(size, dtype=dtype, device=device), *bounds, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mean", "std", "a", "b"), CASES)
def test_distribution(mean, std, a, b, dtype, device):
    x = draw(2**18 if device.type == "cuda" else 2**15, dtype, device, mean, std, a, b)
    if dtype == torch.bfloat16 and device.type == "cpu":
        # the interpreter cuts off: up to one step below the same draw rounded as a GPU does it
        wide = draw(x.numel(), torch.float32, device, mean, std, a, b)
        nearest = wide.clamp(*sampler.inner_bounds(a, b, dtype)).to(dtype)
        step = torch.nextafter(nearest.abs(), torch.full_like(x, INF)) - nearest.abs()
        assert ((x.float() - nearest.float()).abs() <= step.float()).all()
        x = nearest
    # one right sampler in 10,000 is further off
    assert distance(x.cpu(), mean, std, a, b) < 2.2 / math.sqrt(x.numel())


@pytest.mark.parametrize(("mean", "std", "a", "b"), [CASES[1], CASES[3]])
def test_mean_and_deviation(mean, std, a, b, device):
    x = draw(2**18, torch.float32, device, mean, std, a, b).double()
    exact = stats.truncnorm((a - mean) / std, (b - mean) / std, mean, std)
    moments = [float(m) for m in exact.stats(moments="mvk")]
    sigma = math.sqrt(moments[1])
    assert abs(x.mean().item() - moments[0]) < 4 * sigma / math.sqrt(x.numel())
    # of a variance the variance is (kurtosis - 1) * sigma**4 / n, and kurtosis here is the excess
    spread = sigma**2 * math.sqrt((moments[2] + 2) / x.numel())
    assert abs(x.var().item() - moments[1]) < 4 * spread


def test_neighbours_are_independent(device):
    x = draw(2**16, torch.float32, device, 0, 1, -INF, INF).double()
    for lag in (1, 2, 3, 4, 2048):
        product = (x[:-lag] * x[lag:]).mean().item()
        assert abs(product) < 4 / math.sqrt(x.numel() - lag)
    assert len(x.unique()) > 0.99 * len(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("mean", "std", "a", "b"),
    [*CASES, (0, 0.05, -0.051, 0.0503), (0.1, 100, 0.1001, 0.1999), (0, 1e6, -70000, 70000)],
)
def test_bounds_hold_in_the_tensors_own_dtype(mean, std, a, b, dtype, device):
    x = draw(2**13, dtype, device, mean, std, a, b).double()
    assert x.isfinite().all()
    assert (x >= a).all()
    assert (x <= b).all()


@triton.jit
def _of_given_bits(bits_ptr, out_ptr, below, above, inside, middle, size: tl.constexpr):
    i = tl.program_id(0) * size + tl.arange(0, size)
    x = sampler.sigmas(tl.load(bits_ptr + i), below, above, inside, middle)
    tl.store(out_ptr + i, x)


def some_numbers(size: int) -> np.ndarray:
    """Integers in [0, 2**32), many of them near the ends and the middle."""
    rng = np.random.default_rng(0)
    near_0 = (2 ** (31 * rng.random(size // 8))).astype(np.int64)
    near_0[:32] = 2 ** np.arange(32) - 1  # 0 among them
    groups = (near_0, 2**32 - 1 - near_0, 2**31 + near_0 - 1, 2**31 - near_0)
    return np.concatenate([*groups, rng.integers(0, 2**32, size - 4 * len(near_0))]) % 2**32


REACHES = [  # alpha and beta, in standard deviations
    (-INF, INF),
    (-2, 2),
    (-100, 100),
    (-0.5, 0.5),
    (-1, INF),
    (-0.5, 3),
    (0.999, INF),
    (-INF, -0.999),
    (-8, -0.99),
    (0.98, 1.02),
    (0, 0.001),
    (-9, 0.001),
]


@pytest.mark.parametrize(("alpha", "beta"), REACHES)
def test_inverse_on_given_bits(alpha, beta, device):
    numbers = some_numbers(2**16)
    # bits are read with a sign, 0 in the middle
    bits = torch.from_numpy((numbers - 2**31).astype(np.int32)).to(device)
    out = torch.empty(len(bits), device=device)
    _of_given_bits[(16,)](bits, out, *sampler.normal_masses(alpha, beta), size=len(bits) // 16)

    # u and 1 - u exactly, in float64's 53 bits; then Phi from the nearer end or the middle
    u, v = ((n + 0.5) / 2**32 for n in (numbers, 2**32 - 1 - numbers))
    below, above = special.ndtr(alpha), special.ndtr(-beta)
    inside = (special.erf(beta / math.sqrt(2)) - special.erf(alpha / math.sqrt(2))) / 2
    lower, upper = below + inside * u, above + inside * v
    symmetric = alpha == -beta
    centred = inside * (numbers - 2**31 + 0.5) / 2**32 if symmetric else (lower - upper) / 2
    exact = np.where(
        np.abs(centred) < 0.25,
        math.sqrt(2) * special.erfinv(2 * centred),
        np.where(lower < upper, special.ndtri(lower), -special.ndtri(upper)),
    )
    scale = np.abs(exact) if symmetric else np.maximum(np.abs(exact), 1)
    units = np.spacing(scale.astype(np.float32)).astype(np.float64)
    assert (np.abs(out.cpu().numpy() - exact) / units).max() <= 10
    assert np.abs(exact).max() < 6.7


def test_extreme_draws(device):
    bits = torch.tensor([-(2**31), 2**31 - 1, 0, -1], dtype=torch.int32, device=device)
    out = torch.empty(4, device=device)
    _of_given_bits[(1,)](bits, out, *sampler.normal_masses(-INF, INF), size=4)
    exact = [special.ndtri(2.0**-33), -special.ndtri(2.0**-33)]
    exact += [2.0**-33 * math.sqrt(2 * math.pi), -(2.0**-33) * math.sqrt(2 * math.pi)]
    torch.testing.assert_close(out.double().cpu(), torch.tensor(exact).double(), rtol=5e-7, atol=0)


def test_philox_of_known_numbers(device):
    # Random123's known answers (kat_vectors): philox4x32-7 of counter 0 and key 0
    answer = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    bits = torch.tensor(
        [n - 2**32 * (n >= 2**31) for n in answer], dtype=torch.int32, device=device
    )
    out = torch.empty(4, device=device)
    _of_given_bits[(1,)](bits, out, *sampler.normal_masses(-2, 2), size=4)
    found = draw(4, torch.float32, device, seed=0)
    torch.testing.assert_close(found, out, rtol=1e-6, atol=0)  # the second is scaled as well


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_draws_do_not_depend_on_how_they_are_split(dtype, device):
    expected = draw(5003, dtype, device)
    for counters in (64, 1024, 2048):
        x = torch.empty_like(expected)
        low, high = sampler.inner_bounds(-2.0, 2.0, dtype)
        sampler.launch_trunc_normal_(x, 0.0, 1.0, low, high, -2, 2, 1, counters=counters)
        assert torch.equal(x, expected)
    # nor on the size, nor on the shape
    assert torch.equal(draw(777, dtype, device), expected[:777])
    assert torch.equal(draw((3, 259), dtype, device).flatten(), expected[:777])


def test_seeds(device):
    x = draw(1000, torch.float32, device, seed=5)
    assert torch.equal(draw(1000, torch.float32, device, seed=5), x)
    for other in (0, 1, 6, 16, 5 + 2**32, 2**63 - 1):
        assert (draw(1000, torch.float32, device, seed=other) == x).sum() < 3


def test_no_generator_is_moved_on(device):
    before = torch.get_rng_state()
    draw(100, torch.float32, device)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_writes_into_strided_tensors_alone(dtype, device):
    whole = torch.full((6, 8), 99.0, dtype=dtype, device=device)
    part = whole[::2, 1::3].T
    assert trunc_normal_philox_(part, seed=1) is part
    assert torch.equal(part, draw(tuple(part.shape), dtype, device))
    assert (whole == 99).sum() == whole.numel() - part.numel()


@pytest.mark.parametrize("size", [1, 3, 2047, 2049])
def test_writes_no_further(size, device):
    whole = torch.full((size + 100,), 99.0, device=device)
    trunc_normal_philox_(whole[50 : 50 + size], seed=1)
    assert (whole[:50] == 99).all()
    assert (whole[50 + size :] == 99).all()
    assert (whole[50 : 50 + size].abs() <= 2).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_scalars_and_empty_tensors(shape, device):
    x = torch.full(shape, 99.0, device=device)
    assert trunc_normal_philox_(x, seed=1) is x
    assert (x.abs() <= 2).all()


def test_meta_tensor():
    x = torch.empty(10, device="meta")
    assert trunc_normal_philox_(x, seed=1) is x


def test_a_leaf_that_requires_grad(device):
    x = torch.full((10,), 99.0, device=device, requires_grad=True)
    trunc_normal_philox_(x, seed=1)
    assert (x.abs() <= 2).all()
    assert x.requires_grad
    assert x.is_leaf


@pytest.mark.parametrize("columns", [1, 2])
def test_autograd_notices_the_change(columns, device):
    x = torch.ones(10, columns, device=device)[:, 0]  # not contiguous if there are two
    out = (x * torch.ones(10, device=device, requires_grad=True)).sum()
    trunc_normal_philox_(x, seed=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_in_inference_mode(device):
    with torch.inference_mode():
        assert (draw(10, torch.float32, device).abs() <= 2).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"std": 0}, ValueError, "std=0.0 must be positive"),
        ({"std": "1"}, TypeError, "std='1' must be a number, not str"),
        ({"mean": math.nan}, ValueError, "mean=nan must be finite"),
        ({"a": None}, TypeError, "a=None must be a number, not NoneType"),
        ({"a": 1, "b": 1}, ValueError, "a=1 must be less than b=1"),
        ({"b": math.nan}, ValueError, "a=-2.0 must be less than b=nan"),
        ({"a": 0.05001, "b": 0.05002}, ValueError, "no bfloat16 number lies between a=0.05001 and"),
        (
            {"a": 1.0},
            ValueError,
            "lie to one side of mean=0.0, a std=1.0 or more away; use siglip_lib",
        ),
        (
            {"b": -1.0},
            ValueError,
            "lie to one side of mean=0.0, a std=1.0 or more away; use siglip_lib",
        ),
        ({"seed": -1}, ValueError, "seed=-1 must be at least 0"),
        ({"seed": 2**63}, ValueError, "seed=9223372036854775808 must be less than"),
        ({"seed": 1.0}, TypeError, "seed=1.0 must be an int, not float"),
    ],
)
def test_wrong_arguments_leave_the_tensor_as_it_was(arguments, error, message, device):
    x = torch.full((3,), 99.0, dtype=torch.bfloat16, device=device)
    with pytest.raises(error) as caught:
        trunc_normal_philox_(x, **{"seed": 1, **arguments})
    assert message in str(caught.value)
    assert (x == 99).all()


def test_wrong_tensors():
    with pytest.raises(
        TypeError, match=r"tensor is torch.float64; .* use siglip_lib.trunc_normal_"
    ):
        trunc_normal_philox_(torch.empty(3, dtype=torch.float64), seed=1)
    with pytest.raises(TypeError, match="tensor must be a tensor, not list; for float64 use"):
        trunc_normal_philox_([1.0], seed=1)


PROBE = """
import torch
from siglip_lib.kernels.sampler import trunc_normal_philox_
try:
    trunc_normal_philox_(torch.ones(1), seed=1)
except ValueError as error:
    print(error)
"""


def test_a_cpu_without_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, env=environment
    )
    assert (
        "TRITON_INTERPRET=1 set before it is imported; else use siglip_lib.trunc_normal_"
        in done.stdout
    )


def test_more_than_2_to_31_elements(gpu):
    x = torch.zeros(2**31 + 5000, dtype=torch.float16, device=gpu)
    trunc_normal_philox_(x, seed=1)
    assert (x[-5000:] != 0).sum() > 4990
    assert not torch.equal(x[:5000], x[-5000:])
    assert torch.equal(x[:5000], draw(5000, torch.float16, gpu))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_time(dtype, gpu):
    x = torch.empty(2**26, dtype=dtype, device=gpu)
    ours = measure(lambda: trunc_normal_philox_(x, std=0.02, seed=1), gpu).median_ms
    assert ours <= 0.5 * measure(lambda: torch.nn.init.trunc_normal_(x, std=0.02), gpu).median_ms


def test_a_fake_tensor_is_left_alone():
    with FakeTensorMode():
        x = torch.empty(4, 5)
        assert trunc_normal_philox_(x, seed=1) is x
