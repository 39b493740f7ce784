"""Truncated-normal draws in one Triton kernel: from a counter to the rounded element without leaving the registers.

Four steps for each element, none of which reads memory:

1. Philox turns (seed, counter) into four times 32 random bits. It is a function without a state: element i gets those
   of number ``i % 4`` of counter ``i // 4``, whoever computes it, so the draws depend on seed and index alone.
2. The bits choose a point between Phi(alpha) and Phi(beta), where Phi is the normal distribution function and alpha
   and beta are the bounds in standard deviations.
3. The inverse of Phi turns it into a number of standard deviations.
4. That is scaled, kept inside the bounds and rounded.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses import FakeTensor

from siglip_lib.base.checks import check_tensor, count
from siglip_lib.base.interval import check_interval, inner_bounds
from siglip_lib.kernels.device import check_device

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SQRT2 = math.sqrt(2.0)
_COUNTERS = 1024  # of one thread block; four elements each
# of Philox4x32: the fewest that pass the tests of its authors; 10 are usual
_ROUNDS = tl.constexpr(7)
_STEP = tl.constexpr(2.0**-32)  # between two neighbouring uniform numbers


@torch.no_grad()
def trunc_normal_philox_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    *,
    seed: int,
) -> Tensor:
    """Fill ``tensor`` in place with draws from N(mean, std**2) restricted to [a, b], in one pass over memory.

    As ``siglip_lib.trunc_normal_``: ``a`` and ``b`` are absolute bounds, and every value x satisfies a <= x <= b in
    the tensor's own dtype. Two things differ. The numbers come from ``seed`` and an element's index in the
    tensor, so that the same seed gives the same draws however the work is split; no generator is used or advanced. And
    the interval has to reach to within one standard deviation of the mean.

    All arithmetic is in float32, from 32 random bits each, so that without bounds a draw is at most 6.4 standard
    deviations from the mean. In standard deviations its error is at most 10 units in the last place of the draw; if the
    bounds are not symmetric about the mean, digits cancel beside it, and draws below 1 have the absolute error of 1.
    Two machines draw the same bits, but each has its own roots and sums of products: between an H200 and Triton's
    interpreter a third of a million float32 draws differ by more than one unit in the last place, none by more than 10.
    And the interpreter cuts bfloat16 off where a GPU rounds to the nearest.

    Args:
        tensor: any shape; float16, bfloat16 or float32. One that is not contiguous is filled by way of a copy.
        mean: mean of the normal before truncation.
        std: its standard deviation, positive and finite.
        a: lower bound, may be ``-inf``; less than ``mean + std``.
        b: upper bound, may be ``inf``; greater than ``a`` and than ``mean - std``.
        seed: in [0, 2**63). Tensors that shall differ need seeds that differ.

    Returns:
        ``tensor`` itself.

    Raises:
        TypeError: the tensor is not of one of the three dtypes, or an argument is not a number.
        ValueError: an argument is out of range, no number of the tensor's dtype lies in [a, b], or the tensor is on the
            CPU and Triton's interpreter is off. ``trunc_normal_`` takes the dtypes, devices and bounds that are not
            taken here.

    Source: Philox4x32-7, Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011); PPND7, Wichura, Algorithm
    AS 241: The Percentage Points of the Normal Distribution, Applied Statistics 37 (1988).
    """
    check_tensor("tensor", tensor, dtypes=_DTYPES, hint="for float64 use siglip_lib.trunc_normal_")
    mean, std, a, b, alpha, beta = check_interval(mean, std, a, b)
    if alpha >= 1 or beta <= -1:
        raise ValueError(
            f"a={a!r} and b={b!r} lie to one side of mean={mean!r}, a std={std!r} or more away;"
            " use siglip_lib.trunc_normal_"
        )
    seed = count("seed", seed)
    if seed >= 2**63:
        raise ValueError(f"seed={seed!r} must be less than 2**63")
    low, high = inner_bounds(a, b, tensor.dtype)
    if tensor.is_meta or isinstance(tensor, FakeTensor) or tensor.numel() == 0:
        return tensor
    check_device("tensor", tensor, _kernel, "use siglip_lib.trunc_normal_")
    launch_trunc_normal_(tensor, mean, std, low, high, alpha, beta, seed)
    return tensor


def normal_masses(alpha: float, beta: float) -> tuple[float, float, float, float]:
    """Return how a normal distribution's mass lies about the interval from alpha to beta, in standard deviations.

    Returns:
        Phi(alpha), the mass below the interval; 1 - Phi(beta), that above it; Phi(beta) - Phi(alpha), that inside; and
        how far above 1/2 the middle of the inside lies. The small ones keep their digits: none is formed as 1 - x.
    """
    below, above = math.erfc(-alpha / _SQRT2) / 2, math.erfc(beta / _SQRT2) / 2
    left, right = math.erf(alpha / _SQRT2), math.erf(beta / _SQRT2)
    return below, above, (right - left) / 2, (left + right) / 4


def launch_trunc_normal_(
    tensor: Tensor,
    mean: float,
    std: float,
    low: float,
    high: float,
    alpha: float,
    beta: float,
    seed: int,
    start: int = 0,
    counters: int = _COUNTERS,
) -> None:
    """Launch the kernel on a tensor that has been checked and is not empty.

    ``low`` and ``high`` are the smallest and largest number of its dtype that are allowed, ``alpha`` and ``beta`` the
    bounds in standard deviations from the mean. ``start`` is the counter of the first four elements, and ``counters``
    says how many counters a thread block takes.
    """
    out = tensor.contiguous()
    blocks = triton.cdiv(out.numel(), 4 * counters)
    masses = normal_masses(alpha, beta)
    with torch.cuda.device_of(out):  # Triton launches on the current GPU, not on the tensor's
        _kernel[(blocks,)](
            out, out.numel(), seed, start, mean, std, low, high, *masses, COUNTERS=counters
        )
    if out is tensor:
        torch.autograd.graph.increment_version(tensor)  # autograd does not see a kernel write
    else:
        tensor.copy_(out)


# else some seeds would have the kernel compiled anew
@triton.jit(do_not_specialize=["seed", "start"])
def _kernel(
    out_ptr, size, seed, start, mean, std, low, high, below, above, inside, middle,
    COUNTERS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * COUNTERS  # there may be more than 2**31 elements
    counter = start + first + tl.arange(0, COUNTERS)
    bits_0, bits_1, bits_2, bits_3 = tl.randint4x(seed, counter, _ROUNDS)
    # side by side, so that a thread has four neighbours and stores them at once
    pairs = tl.join(tl.join(bits_0, bits_2), tl.join(bits_1, bits_3))
    bits = tl.reshape(pairs, (4 * COUNTERS,))

    x = mean + std * sigmas(bits, below, above, inside, middle)
    # low and high are numbers of the tensor's dtype, so no rounding steps over them
    x = tl.minimum(tl.maximum(x, low), high)
    offset = tl.arange(0, 4 * COUNTERS)
    out = x.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + first * 4 + offset, out, mask=offset < size - first * 4)


@triton.jit
def sigmas(bits, below, above, inside, middle):
    """Turn 32 random bits into draws, in standard deviations; the rest is what ``normal_masses`` returned."""
    # Three ways to read the same bits. As a signed integer they count from the middle: draws near 0 keep their digits.
    # With the first bit flipped they count up from the lower bound, with all others flipped down from the upper one:
    # draws near an end keep theirs. Each is half a step off its end, because the inverse of 0 is infinite.
    signed = bits.to(tl.int32, bitcast=True)
    step = inside * _STEP
    from_middle = signed.to(tl.float32) * step + (middle + 0.5 * step)
    from_lower = bits.to(tl.uint32, bitcast=True) ^ 0x80000000
    is_left = from_middle < 0
    nearer = tl.where(is_left, from_lower, from_lower ^ 0xFFFFFFFF)
    ends = tl.where(is_left, below + 0.5 * step, above + 0.5 * step)
    tail = nearer.to(tl.float32) * step + ends
    return _inverse(from_middle, tail)


@triton.jit
def _inverse(q, tail):
    """Return the inverse of Phi at 1/2 + q; ``tail`` is 1/2 - abs(q), with more digits where that is small.

    PPND7 has a third function for tails beyond exp(-25). 32 bits do not reach it: in an interval that
    comes to within 1 of 0 no tail is below Phi(-1) / 2**33 = exp(-24.7).
    """
    r = 0.180625 - q * q
    centre = ((59.10937472 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179
    centre_below = ((67.1875636 * r + 78.757757664) * r + 17.895169469) * r + 1.0
    t = tl.sqrt(_minus_log2(tail)) * 0.8325546111576977 - 1.6  # sqrt(-log(tail)) - 1.6
    side = ((0.17023821103 * t + 1.3067284816) * t + 2.7568153900) * t + 1.4234372777
    side_below = (0.12021132975 * t + 0.73700164250) * t + 1.0
    # chosen before the division, of which there is then one; what divides is above 0
    is_centre = tl.abs(q) <= 0.425
    above = tl.where(is_centre, q * centre, tl.where(q < 0, -side, side))
    # the square of 1 / sqrt(x), which is one instruction; a division is eight
    root = tl.rsqrt(tl.where(is_centre, centre_below, side_below))
    return above * root * root


@triton.jit
def _minus_log2(x):
    """Return -log2(x) of normal positive numbers; the built-in logarithm, right for any, takes twice as long.

    x = 2**e * (1 + f), with 1 + f between sqrt(1/2) and sqrt(2): log2(x) = e + f * p(f), where p is the polynomial of
    degree 8 with the smallest largest error, 7e-9, before its coefficients are rounded.
    """
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23  # 0x3F3504F3 is sqrt(1/2)
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    # with the signs of -p: a minus in front would be one more instruction
    p = ((-0.1254112 * f + 0.21030293) * f - 0.21737967) * f + 0.2385195
    p = (((p * f - 0.28765663) * f + 0.3607212) * f - 0.48092252) * f + 0.72134715
    return (p * f - 1.4426949) * f - e.to(tl.float32)
