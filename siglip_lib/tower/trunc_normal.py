"""Truncated-normal sampling by the inverse CDF, right on every device and in every float dtype."""

import math

import torch
from torch import Generator, Tensor

from siglip_lib.base.checks import check_tensor
from siglip_lib.base.interval import check_interval, inner_bounds, on_cpu
from siglip_lib.base.observers import takes_kernel

_SQRT2 = math.sqrt(2.0)
_FAR = 10.0  # sigma; beyond, float32 can hold the tail's mass but not a small share of it


@torch.no_grad()
def trunc_normal_(
    tensor: Tensor,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """Fill ``tensor`` in place with draws from N(mean, std**2) restricted to [a, b].

    ``a`` and ``b`` are absolute bounds, not multiples of ``std``: with ``std=.02`` the default ones stand at 100
    standard deviations. Every value x satisfies a <= x <= b in the tensor's own dtype. One uniform number is used for
    each element and none is rejected, so the time is known and nothing waits for the GPU. Intervals that lie wholly
    beyond 10 standard deviations take ten to twenty times as long as others.

    Args:
        tensor: any shape and strides; float16, bfloat16, float32 or float64. The first two are computed in float32.
        mean: mean of the normal before truncation.
        std: its standard deviation, positive and finite.
        a: lower bound, may be ``-inf``.
        b: upper bound, may be ``inf``; greater than ``a``.
        generator: source of the uniform numbers, on the tensor's device.

    Returns:
        ``tensor`` itself.

    Raises:
        TypeError: the tensor is not of one of the four dtypes, or an argument is not a number.
        ValueError: ``std``, ``a`` or ``b`` is out of range, or no number of the tensor's dtype lies in [a, b].

    On a GPU with Triton a kernel of ``siglip_lib.kernels.sampler`` does it in one pass, unless the tensor is float64 or
    the interval lies a standard deviation or more to one side. The first draw, and the first from a tail, compiles a
    kernel there, which takes seconds, once on a machine.

    Source: inverse transform sampling (Devroye, Non-Uniform Random Variate Generation, 1986, section II.2); the tail
    through the scaled complementary error function.
    """
    check_tensor("tensor", tensor)
    mean, std, a, b, alpha, beta = check_interval(mean, std, a, b)
    if max(alpha, -beta) > 1e8:
        far = "lie more than 1e8 standard deviations from"
        raise ValueError(f"a={a!r} and b={b!r} {far} mean={mean!r}")
    low, high = inner_bounds(a, b, tensor.dtype)
    if tensor.is_meta or tensor.numel() == 0:
        return tensor

    if alpha < 1 and beta > -1 and _has_kernel(tensor):
        from siglip_lib.kernels.sampler import launch_trunc_normal_

        # from where the generator stands, which is known without waiting for the GPU; then move it on
        generator = generator or torch.cuda.default_generators[tensor.device.index]
        start, seed = generator.get_offset(), generator.initial_seed() % 2**63
        launch_trunc_normal_(tensor, mean, std, low, high, alpha, beta, seed, start)
        generator.set_offset(start + 4 * -(-tensor.numel() // 16))  # offsets are multiples of 4
        return tensor

    # Drawn in half precision, u would be too coarse for the tails: compute in float32, then cast, then clamp.
    wide = tensor.dtype in (torch.float32, torch.float64)
    work = tensor if wide else torch.empty_like(tensor, dtype=torch.float32)
    origin, end, sign = mean, a, 1
    if beta <= -1:  # a tail on the left is one on the right, mirrored
        alpha, beta, end, sign = -beta, -alpha, b, -1
    if alpha >= _FAR:
        origin, sigmas = end, _draw_far_tail_(work, alpha, (b - a) / std, generator)
    elif alpha >= 1:
        sigmas = _draw_tail_(work, alpha, beta, generator)
    else:
        sigmas = _draw_centre_(work, alpha, beta, generator)
    # origin + factor * work and the cast, in one pass
    torch.add(on_cpu(origin, work.dtype), work, alpha=sign * std * sigmas, out=tensor)
    return tensor.clamp_(low, high)


def _has_kernel(tensor: Tensor) -> bool:
    """Whether the Triton kernel takes the tensor: it does in one pass what the steps below do in four."""
    if tensor.dtype == torch.float64 or not takes_kernel(tensor):
        return False
    return not torch.cuda.is_current_stream_capturing()  # a graph would repeat one seed's draws


def _draw_centre_(work: Tensor, alpha: float, beta: float, generator: Generator | None) -> float:
    """Draw on an interval that reaches to within 1 of zero; return what to multiply ``work`` by."""
    # erf^-1 of exactly -1 is -inf, and the uniform grid holds -1: one float32 draw in 2**24 would land on the bound.
    # Stay half a step off both ends.
    edge = 1 - torch.finfo(work.dtype).eps / 2
    low = max(math.erf(alpha / _SQRT2), -edge)
    high = min(math.erf(beta / _SQRT2), edge)
    work.uniform_(low, high, generator=generator).erfinv_()
    return _SQRT2


def _draw_tail_(work: Tensor, alpha: float, beta: float, generator: Generator | None) -> float:
    """Draw on [alpha, beta], alpha >= 1; return what to multiply ``work`` by.

    The share above x, Q(x), is a small number, and small numbers have all their digits.
    """
    above_alpha, above_beta = (math.erfc(x / _SQRT2) / 2 for x in (alpha, beta))
    half_step = above_alpha * torch.finfo(work.dtype).eps / 4
    work.uniform_(max(above_beta, half_step), above_alpha, generator=generator)
    torch.special.ndtri(work, out=work)
    return -1.0


def _draw_far_tail_(work: Tensor, alpha: float, span: float, generator: Generator | None) -> float:
    """Draw the distance from alpha on [alpha, alpha + span] where Q underflows; return its factor.

    The distance, not the place: beside a far mean its digits would be lost.

    With x = alpha + d, this solves log(Q(x) / Q(alpha)) = log(w) for d by Newton's method. Q is written with erfcx,
    which takes exp(-x**2 / 2) out of it, so nothing underflows and nothing cancels.
    """
    d = work.uniform_(generator=generator)
    cut = 1.0  # the share of the tail's mass that lies below beta
    if math.isfinite(span):
        cut = -torch.expm1(_log_tail_ratio(on_cpu(span), alpha)).item()
    # uniform_ draws from [0, 1), so 1 - cut * u is never 0; log1p keeps the small steps near 1
    log_w = torch.log1p(d * -cut)
    d.copy_(-2 * log_w / (alpha + torch.sqrt(alpha * alpha - 2 * log_w)))
    for _ in range(3):
        mills = math.sqrt(math.pi / 2) * torch.special.erfcx((alpha + d) / _SQRT2)
        d.add_((_log_tail_ratio(d, alpha) - log_w) * mills)
    return 1.0


def _log_tail_ratio(d: Tensor, alpha: float) -> Tensor:
    """log(Q(alpha + d) / Q(alpha)) for the upper tail Q of the standard normal."""
    at_alpha = torch.special.erfcx(on_cpu(alpha / _SQRT2)).item()
    return torch.log(torch.special.erfcx((alpha + d) / _SQRT2) / at_alpha) - d * (alpha + d / 2)
