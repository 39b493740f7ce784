"""The interval of a truncated normal: which bounds are allowed, and which values of a dtype lie within."""

import functools
import math

import torch
from torch import Tensor

from siglip_lib.base.checks import finite, number


def check_interval(
    mean: float, std: float, a: float, b: float
) -> tuple[float, float, float, float, float, float]:
    """Return the four as floats, then both bounds in standard deviations from the mean; raise an error out of range."""
    mean, std = finite("mean", mean), finite("std", std)
    if not 0 < std < 1e30:
        raise ValueError(f"std={std!r} must be positive, and below 1e30")
    if not number("a", a) < number("b", b):
        raise ValueError(f"a={a!r} must be less than b={b!r}")
    a, b = float(a), float(b)
    return mean, std, a, b, (a - mean) / std, (b - mean) / std


@functools.cache
def inner_bounds(a: float, b: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return the smallest and the largest value of ``dtype`` in [a, b]: rounding to nearest may step over a bound."""
    info = torch.finfo(dtype)
    low = on_cpu(max(a, info.min)).to(dtype)
    high = on_cpu(min(b, info.max)).to(dtype)
    if low.item() < a:
        low = torch.nextafter(low, torch.full_like(low, math.inf))
    if high.item() > b:
        high = torch.nextafter(high, torch.full_like(high, -math.inf))
    if low.item() > high.item():
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"no {kind} number lies between a={a!r} and b={b!r}")
    return low.item(), high.item()


def on_cpu(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a tensor of shape () on the CPU, also where ``with torch.device(...)`` names another device."""
    return torch.tensor(value, dtype=dtype, device="cpu")
