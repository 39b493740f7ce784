"""trunc_normal_: scipy's truncnorm is the oracle of the distribution."""

import math
import statistics
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from siglip_lib import measure, trunc_normal_

INF = math.inf
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CASES = [  # mean, std, a, b
    (0, 1, -2, 2),
    (0, 0.02, -2, 2),
    (0, 0.05, -0.05, 0.05),
    (1, 2, -1, 0.5),
    (0, 1, -INF, INF),
    (0, 1, 0.999, 1.001),
    (0, 1, -1.5, INF),
    (0, 1, 1, INF),
    (0, 1, 3, 1e4),
    (0, 1, 6, 8),
    (0, 1, -8, -6),
    (0, 1, 3, 3.001),
    (0, 1, -INF, -5),
    (5, 1, -2, 2),
    (0, 1, 12, INF),
    (0, 1, 20, 20.5),
    (0, 1, -20.5, -20),
    (3, 0.1, 5, 6),
    (-1000, 1, 0, 1),  # a tail so far out that float32 has no digits left for it beside the mean
]


def distance(x: torch.Tensor, mean: float, std: float, a: float, b: float) -> float:
    """Largest gap between the draws' distribution and scipy's, read where two rounding cells meet.

    A stored value stands for all numbers that round to it. Within its cell nothing is known, so that a
    plain Kolmogorov-Smirnov test would refuse every half-precision sampler.
    """
    values, counts = x.unique(return_counts=True)
    below = torch.nextafter(values, torch.full_like(values, -INF)).double()
    above = torch.nextafter(values, torch.full_like(values, INF)).double()
    lower = torch.where(below < a, a, (values.double() + below) / 2)
    upper = torch.where(above > b, b, (values.double() + above) / 2)
    some = slice(None, None, max(1, len(values) // 2000))  # scipy needs microseconds for each
    cdf = stats.truncnorm((a - mean) / std, (b - mean) / std, mean, std).cdf
    up_to = counts.cumsum(0).double() / x.numel()
    before = up_to - counts.double() / x.numel()
    return max(
        np.abs(cdf(edge[some].numpy()) - share[some].numpy()).max()
        for edge, share in ((lower, before), (upper, up_to))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mean", "std", "a", "b"), CASES)
def test_distribution(mean, std, a, b, dtype, device):
    x = torch.empty(2**18, dtype=dtype, device=device)
    trunc_normal_(x, mean, std, a, b)
    # one right sampler in 10,000 is further off
    assert distance(x.cpu(), mean, std, a, b) < 2.2 / math.sqrt(x.numel())


@pytest.mark.parametrize(("mean", "std", "a", "b"), CASES)
def test_quantiles(mean, std, a, b, monkeypatch):
    # even steps in place of the random ones: what comes out is known to many more digits
    steps = (torch.arange(100, dtype=torch.float64) + 0.5) / 100

    def uniform_(self, low=0.0, high=1.0, *, generator=None):
        return self.copy_(low + (high - low) * steps)

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)
    x = trunc_normal_(torch.empty(100, dtype=torch.float64), mean, std, a, b).sort().values
    shares = stats.truncnorm((a - mean) / std, (b - mean) / std, mean, std).cdf(x.numpy())
    assert np.abs(shares - steps.numpy()).max() < 1e-8


def test_no_outliers(device):
    x = torch.empty(2**22, device=device)
    # one fp32 uniform in 2**24 is the one whose inverse is infinite
    largest = max(trunc_normal_(x, std=0.02).abs().max().item() for _ in range(16))
    assert 5 * 0.02 < largest < 6 * 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("end", ["lowest", "highest"])
@pytest.mark.parametrize(("mean", "std", "a", "b"), CASES)
def test_the_ends_of_the_uniform_draw(mean, std, a, b, end, dtype, monkeypatch):
    def uniform_(self, low=0.0, high=1.0, *, generator=None):
        self.fill_(high)
        down = torch.nextafter(self, torch.full_like(self, low))
        return self.fill_(low) if end == "lowest" else self.copy_(down)

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)
    x = trunc_normal_(torch.empty(4, dtype=dtype), mean, std, a, b).double()
    assert x.isfinite().all()
    assert (x >= a).all()
    assert (x <= b).all()
    # in fp64 the uniform's last step stands at 8 sigma; a bound further out is never hit, nor any draw near it
    far = max(abs(a - mean), abs(b - mean)) > 30 * std
    nearest = max(0, (a - mean) / std, (mean - b) / std)
    assert not far or ((x - mean).abs() / std < nearest + 9).all()


@given(
    dtype=st.sampled_from(DTYPES),
    inside=st.floats(-100, 100, width=16),
    left=st.floats(0, 50),
    right=st.floats(1e-3, 50) | st.just(INF),
    mean=st.floats(-100, 100),
    std=st.floats(1e-3, 100),
    flip=st.booleans(),
)
@example(torch.bfloat16, 0.0, 0.05, 0.05, 0.0, 0.05, False)  # bf16(.05) is more than .05
def test_bounds_hold_in_the_tensors_own_dtype(dtype, inside, left, right, mean, std, flip):
    # the fp16 number may be none of bf16; then the nearest one is
    inside = torch.tensor(inside, dtype=dtype).item()
    a, b = inside - left, inside + right
    if flip:
        a, b = -b, -a
    x = trunc_normal_(torch.full((1000,), math.nan, dtype=dtype), mean, std, a, b).double()
    assert (x >= a).all()
    assert (x <= b).all()


@pytest.mark.parametrize(
    ("mean", "std", "a", "b"),
    [(0, 1e-300, 1, 2), (0, 1e-310, -2, -1), (1e10, 1, 0, 1), (-1e30, 1e-10, 1, INF)],
)
def test_bounds_too_many_sigmas_away_for_a_float(mean, std, a, b):
    tensor = torch.full((10,), 7.0)
    with pytest.raises(ValueError, match="more than 1e8 standard deviations"):
        trunc_normal_(tensor, mean, std, a, b)
    assert (tensor == 7).all()


def test_bounds_nearly_that_far():
    x = trunc_normal_(torch.empty(1000), mean=9e7, a=0.0, b=1.0)
    assert (x > 1 - 1e-6).all()  # the tail's width is 1 / 9e7


def test_float64_is_not_on_the_float32_grid():
    x = trunc_normal_(torch.empty(1000, dtype=torch.float64))
    assert (x.float().double() != x).sum() > 990


def test_generator(device):
    def draw(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return trunc_normal_(torch.empty(100, device=device), a=-1, b=6, generator=generator)

    before = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("a", "b"), [(-2, 2), (3, INF), (-INF, -3), (12, INF)])
def test_the_global_generator_or_the_given_one(a, b):
    expected = trunc_normal_(torch.empty(100), a=a, b=b, generator=torch.Generator().manual_seed(7))
    torch.manual_seed(7)
    assert torch.equal(trunc_normal_(torch.empty(100), a=a, b=b), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("a", "b"), [(-2, 2), (3, 5), (12, 13)])
def test_writes_into_strided_tensors_alone(a, b, dtype):
    whole = torch.full((6, 8), 99.0, dtype=dtype)
    part = whole[::2, 1::3].T
    assert trunc_normal_(part, a=a, b=b) is part
    assert ((part >= a) & (part <= b)).all()
    assert part.unique().numel() > 1
    assert (whole == 99).sum() == whole.numel() - part.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
@pytest.mark.parametrize(("a", "b"), [(-1, 2), (3, 5), (12, 13)])
def test_scalars_and_empty_tensors(shape, a, b, dtype):
    x = torch.full(shape, 99.0, dtype=dtype)
    assert trunc_normal_(x, a=a, b=b) is x
    assert x.shape == shape
    assert ((x >= a) & (x <= b)).all()


def test_meta_tensor():
    x = torch.empty(10, device="meta")
    assert trunc_normal_(x) is x
    with pytest.raises(ValueError, match="std"):
        trunc_normal_(x, std=0)


def test_a_leaf_that_requires_grad():
    x = torch.full((10,), 99.0, requires_grad=True)
    assert trunc_normal_(x) is x
    assert (x.abs() <= 2).all()
    assert x.requires_grad
    assert x.is_leaf


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"std": 0}, ValueError, "std=0.0 must be positive"),
        ({"std": -1.0}, ValueError, "std=-1.0 must be positive"),
        ({"std": INF}, ValueError, "std=inf must be finite"),
        ({"std": math.nan}, ValueError, "std=nan must be finite"),
        ({"std": "1"}, TypeError, "std='1' must be a number, not str"),
        ({"mean": math.nan}, ValueError, "mean=nan must be finite"),
        ({"mean": -INF}, ValueError, "mean=-inf must be finite"),
        ({"mean": True}, TypeError, "mean=True must be a number, not bool"),
        ({"a": None}, TypeError, "a=None must be a number, not NoneType"),
        ({"b": "2"}, TypeError, "b='2' must be a number, not str"),
        ({"a": 1, "b": 1}, ValueError, "a=1 must be less than b=1"),
        ({"a": 3}, ValueError, "a=3 must be less than b=2.0"),
        ({"a": math.nan}, ValueError, "a=nan must be less than b=2.0"),
        ({"b": math.nan}, ValueError, "a=-2.0 must be less than b=nan"),
        ({"a": 0.05001, "b": 0.05002}, ValueError, "no bfloat16 number lies between a=0.05001 and"),
        (
            {"mean": 1e39, "a": 1e39, "b": INF},
            ValueError,
            "no bfloat16 number lies between a=1e+39",
        ),
    ],
)
def test_wrong_arguments_leave_the_tensor_as_it_was(arguments, error, message):
    x = torch.full((3,), 99.0, dtype=torch.bfloat16)
    with pytest.raises(error) as caught:
        trunc_normal_(x, **arguments)
    assert message in str(caught.value)
    assert (x == 99).all()


def test_wrong_tensors():
    integers = torch.full((3,), 7)
    with pytest.raises(TypeError, match=r"tensor is torch.int64; it must be of float16"):
        trunc_normal_(integers)
    assert (integers == 7).all()
    with pytest.raises(TypeError, match="tensor must be a tensor, not list"):
        trunc_normal_([1.0])


def test_time_on_a_cpu():
    x = torch.empty(2**20)
    samplers = (trunc_normal_, torch.nn.init.trunc_normal_)

    def ratio():
        times = ([], [])
        for _ in range(7):  # taken in turns: a neighbour's load hits both
            for sampler, found in zip(samplers, times, strict=True):
                start = time.perf_counter()
                sampler(x, std=0.02)
                found.append(time.perf_counter() - start)
        return statistics.median(times[0]) / statistics.median(times[1])

    assert any(ratio() <= 2 for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_time_on_a_gpu(dtype, gpu):
    x = torch.empty(2**26, dtype=dtype, device=gpu)
    ours = measure(lambda: trunc_normal_(x, std=0.02), gpu).median_ms
    assert ours <= 1.3 * measure(lambda: torch.nn.init.trunc_normal_(x, std=0.02), gpu).median_ms
