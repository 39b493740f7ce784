"""Argument checks shared by the components: each names the argument, its value and what is allowed."""

import math
from collections.abc import Mapping

from torch import Tensor


def probability(name: str, value: float) -> float:
    """Return ``value`` if it lies in [0, 1), the range in which a dropout can rescale what it keeps."""
    number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}={value!r} must lie in [0, 1)")
    return float(value)


def positive_int(name: str, value: int) -> int:
    """Return ``value`` if it is an integer of at least 1."""
    return count(name, value, least=1)


def count(name: str, value: int, least: int = 0) -> int:
    """Return ``value`` if it is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}={value!r} must be at least {least}")
    return value


def pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """Return ``value`` as (height, width), each an integer of at least 1; one number stands for both."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name}={value!r} must be one int or two: height and width")
        return positive_int(name, value[0]), positive_int(name, value[1])
    return positive_int(name, value), value


def finite(name: str, value: float) -> float:
    """Return ``value`` if it is a finite number."""
    number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be finite")
    return float(value)


def number(name: str, value: float) -> None:
    """Refuse what is not an int or a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")


def finite_tensors(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors with elements that are NaN or infinite, naming a few; ``where`` begins the message."""
    bad = [name for name, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()]
    if bad:
        names = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise ValueError(f"{where} NaN or infinite elements in {names}")
