"""Argument checks shared by the components: each names the argument, its value and what is allowed."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
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
    """Return ``value`` if it is an integer, Python's or NumPy's, of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}={value!r} must be at least {least}")
    return int(value)


def pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """Return ``value`` as (height, width), each an integer of at least 1; one number stands for both."""
    both = value if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2:
        raise ValueError(f"{name}={value!r} must be one int or two: height and width")
    return positive_int(name, both[0]), positive_int(name, both[1])


def finite(name: str, value: float) -> float:
    """Return ``value`` if it is a finite number."""
    value = number(name, value)
    if not -math.inf < value < math.inf:  # compiled code can trace this
        raise ValueError(f"{name}={value!r} must be finite")
    return value


def number(name: str, value: float) -> float:
    """Return ``value`` if it is a number, Python's or NumPy's."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}={value!r} must be a number, not {type(value).__name__}")
    return float(value)


def plain_shape(x: Tensor) -> tuple[int, ...]:
    """Return the shape of ``x`` in integers, also under ``torch.jit.trace``, which makes tensors of sizes."""
    if not torch.jit.is_tracing():
        return tuple(x.shape)
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        return tuple(x.shape)
    finally:
        torch._C._set_tracing_state(state)


def finite_tensors(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if elements are NaN or infinite. It begins with ``where`` and names a few of the tensors."""
    bad = [name for name, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()]
    if bad:
        names = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise ValueError(f"{where} NaN or infinite elements in {names}")


def check_tensor(name: str, x: Tensor, shape: str, integers: bool = False) -> None:
    """Raise a TypeError unless ``x`` is a tensor of floats, or of integers. Its message ends with ``shape``."""
    kind = "integers" if integers else "floats"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: {type(x).__name__} found; it must be a tensor of {kind}, {shape}")
    if x.is_floating_point() == integers:
        raise TypeError(f"{name}: {x.dtype} found; it must be a tensor of {kind}, {shape}")


def check_pictures(name: str, x: Tensor, channels: int | None = None) -> None:
    """Raise an error unless ``x`` are pictures (B, channels, H, W), with any number of channels if None."""
    wanted = f"(B, {channels or 'C'}, H, W)"
    check_tensor(name, x, f"{wanted}, such as preprocess makes of pictures")
    shape = plain_shape(x)
    if len(shape) != 4 or (channels and shape[1] != channels):
        batch = f"; {name}[None] makes a batch of one" if len(shape) == 3 else ""
        raise ValueError(f"{name} have shape {shape}; it must be {wanted}{batch}")


def check_tokens(name: str, x: Tensor, width: int) -> None:
    """Raise an error unless ``x`` are tokens (B, N, width)."""
    check_tensor(name, x, f"(B, N, {width})")
    shape = plain_shape(x)
    if len(shape) != 3 or shape[2] != width:
        raise ValueError(f"{name} has shape {shape}; it must be (B, N, {width})")


def join_names(names: Iterable[str], most: int = 20) -> str:
    """The names in order, those beyond ``most`` only counted."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
