"""Argument checks shared by the components: each names the argument, its value and what is allowed."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)
NUMBERS = (*INTEGERS, *FLOATS)


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


def one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    """Return ``value`` if it is one of the allowed."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(
            f"{name}={value!r} is unknown; allowed are {', '.join(map(repr, allowed))}"
        )
    return value


def finite_tensors(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if elements are NaN or infinite. It begins with ``where`` and names a few of the tensors."""
    bad = [name for name, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()]
    if bad:
        raise ValueError(f"{where} NaN or infinite elements in {join_names(bad, most=5)}")


def check_tensor(
    name: str,
    x: Tensor,
    *shapes: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    empty: bool = True,
    like: tuple[str, Tensor] | None = None,
    hint: str = "",
) -> tuple[int, ...]:
    """Return the shape of ``x`` in integers, as ``plain_shape`` does, if it is a tensor as described.

    Args:
        name: of the argument, for the message.
        x: the tensor.
        *shapes: the allowed ones; any if none is given. An integer is the size of its axis, a string names an axis
            of any size, as in ``("B", 3, "H", "W")``.
        dtypes: the allowed ones.
        empty: whether an axis of any size may have the size 0.
        like: the name of a tensor and that tensor, on whose device ``x`` must be; on any if None.
        hint: end of the messages on type, dtype and shape, such as where one gets such a tensor.

    Raises:
        TypeError: ``x`` is no tensor, or of another dtype.
        ValueError: it has another shape, or is on another device.
    """
    hint = hint and f"; {hint}"
    if not isinstance(x, Tensor):
        allowed = f" {_joined_by_or(shapes)}" if shapes else ""
        raise TypeError(f"{name} must be a tensor{allowed}, not {type(x).__name__}{hint}")
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        allowed = "integers" if dtypes == INTEGERS else names
        raise TypeError(f"{name} is {x.dtype}; it must be of {allowed}{hint}")
    found = plain_shape(x)
    if shapes and not any(_fits(found, shape, empty) for shape in shapes):
        if shapes[0][:1] == ("B",) and _fits((1, *found), shapes[0], empty):
            hint = f"; {name}[None] makes a batch of one{hint}"
        hint = hint if empty else f", each at least 1{hint}"
        raise ValueError(f"{name} has shape {found}; it must be {_joined_by_or(shapes)}{hint}")
    if like and x.device != like[1].device:
        raise ValueError(
            f"{name} is on {x.device}; it must be on {like[1].device}, as {like[0]} is"
        )
    return found


def _fits(found: tuple[int, ...], shape: tuple[int | str, ...], empty: bool) -> bool:
    """Whether ``found`` is the described shape."""
    if len(found) != len(shape):
        return False
    pairs = zip(found, shape, strict=True)
    return all((empty or n > 0) if isinstance(m, str) else n == m for n, m in pairs)


def _joined_by_or(shapes: tuple[tuple[int | str, ...], ...]) -> str:
    """The shapes as a message shows them, such as ``(B, 3) or (3,)``."""
    return " or ".join(str(shape).replace("'", "") for shape in shapes)


def join_names(names: Iterable[str], most: int = 20) -> str:
    """The names in order, those beyond ``most`` only counted."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
