"""What checks of several notebooks ask of an answer: its type, which known mistake it is, what it did on the way."""

import ast
import inspect
import math
import textwrap
import time
import timeit
from collections.abc import Callable, Mapping
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def number(value: object) -> int | float | None:
    """Return an int or a float, or that of a tensor of one element; None for all else, a bool included."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return None if isinstance(value, bool) or not isinstance(value, (int, float)) else value


def two_numbers(value: object) -> tuple[int | float, int | float] | None:
    """Return a tuple, list, tensor or array of two numbers as a tuple of plain ones; None for all else."""
    if isinstance(value, (Tensor, np.ndarray)) and value.shape == (2,):
        value = value.tolist()
    if not is_pair(value):
        return None
    first, second = map(number, value)
    return None if first is None or second is None else (first, second)


def is_pair(value: object) -> bool:
    """Whether ``value`` is a tuple or list of two."""
    return isinstance(value, (tuple, list)) and len(value) == 2


def is_tensor(value: object, *shape: int) -> bool:
    """Whether ``value`` is a tensor of that shape."""
    return isinstance(value, Tensor) and value.shape == shape


def was_changed(now: object, before: object) -> bool:
    """Whether tensors, or the tensors in lists or dicts, differ from what they were ``before``."""
    now, before = tree_leaves(now), tree_leaves(before)
    return len(now) != len(before) or not all(map(torch.equal, now, before))


def near(rel_tol: float) -> Callable[[float, float], bool]:
    """Return a function that tells whether two numbers differ by at most that share of the larger one."""
    return partial(math.isclose, rel_tol=rel_tol)


def first_match(
    found: object,
    mistakes: Mapping[str, object],
    same: Callable[[object, object], bool] = torch.allclose,
) -> str | None:
    """Return the first reason whose wrong value ``found`` is, None if it is none of them.

    Args:
        found: the reader's value.
        mistakes: by reason the value that this mistake leads to, or a tuple of such values.
        same: called with ``found`` and a wrong value.
    """
    for reason, wrong in mistakes.items():
        if any(same(found, value) for value in (wrong if isinstance(wrong, tuple) else (wrong,))):
            return reason
    return None


def source_tree(function: Callable) -> ast.Module | None:
    """Return a function's source, parsed; None if it can't be seen."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def has_no_code(function: Callable) -> bool:
    """Whether nothing but an ellipsis or a docstring stands in a function; False if its source can't be seen."""
    tree = source_tree(function)
    return (
        tree is not None
        and isinstance(tree.body[0], ast.FunctionDef)
        and all(
            isinstance(node, ast.Pass)
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            for node in tree.body[0].body
        )
    )


class ShapesMade(TorchDispatchMode):
    """Collects the shapes of all tensors that operators return inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    @property
    def most_elements(self) -> int:
        """Number of elements of the largest tensor."""
        return max((shape.numel() for shape in self.shapes), default=0)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.shapes |= {x.shape for x in tree_leaves(out) if isinstance(x, Tensor)}
        return out


class Clock:
    """Functions that take a known time, and in Python's clocks exactly that, however busy the machine is."""

    def __init__(self) -> None:
        self.real = time.perf_counter  # a clock that was imported by name, or a GPU's
        self.was_read = False  # one of Python's clocks
        self.seconds: list[list[float]] = []  # of each function's calls, by the real clock
        self.ms = 0.0
        read = partial(self._read, float)
        read_ns = partial(self._read, lambda seconds: round(seconds * 1e9))
        clocks = "perf_counter", "monotonic", "time"
        self._patches = [
            mock.patch.object(timeit, "default_timer", read),
            *(mock.patch.object(time, name, read) for name in clocks),
            *(mock.patch.object(time, f"{name}_ns", read_ns) for name in clocks),
        ]
        for function in (timeit.timeit, timeit.repeat, timeit.Timer.__init__):
            # they took the clock as the value of an argument when they were defined
            values = tuple(read if v is timeit.default_timer else v for v in function.__defaults__)
            self._patches.append(mock.patch.object(function, "__defaults__", values))

    def __enter__(self) -> "Clock":
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _read(self, unit: Callable[[float], float]) -> float:
        self.was_read = True
        return unit(self.ms / 1e3)

    def function(self, ms_of: Callable[[int], float]) -> Callable[[], None]:
        """Return a function that takes ``ms_of(call)`` ms, its calls being counted from 0."""
        seconds: list[float] = []
        self.seconds.append(seconds)

        def wait() -> None:
            start, taken = self.real(), ms_of(len(seconds))
            self.ms += taken
            while self.real() < start + taken / 1e3:
                pass
            seconds.append(self.real() - start)

        return wait
