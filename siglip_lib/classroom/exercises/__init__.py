"""Checks of the notebooks' exercises. A check says what is wrong with an answer, not only that it is.

The checks of notebook 01 stand in ``nb01``, and so on. Each is a function of the reader's answer that returns None if
it is right, or a sentence that says what is wrong.
"""

import functools
import importlib
import numbers
import pkgutil
from collections.abc import Callable
from types import FunctionType

import numpy as np
import torch

from siglip_lib.classroom.exercises.state import unchanged

_CHECKS: dict[str, Callable[[object], str | None]] = {}


class Unanswered(Exception):
    """The exercise's cell is still as it was."""


class WrongAnswer(Exception):
    """An answer that gets no points; the text says why."""


def check_exercise(number: str, answer: object) -> None:
    """Print whether ``answer`` solves exercise ``number`` ("01.2"), and if not, what is wrong with it."""
    print(f"exercise {number}: {grade(number, answer)}")


def require_exercise(number: str, answer: object) -> None:
    """Print that ``answer`` solves exercise ``number``; the form of ``check_exercise`` for a class.

    Raises:
        WrongAnswer: it does not; with what is wrong.
    """
    if (verdict := grade(number, answer)) != "right":
        raise WrongAnswer(f"exercise {number}: {verdict}")
    print(f"exercise {number}: right")


def grade(number: str, answer: object) -> str:
    """Return "right", "not answered yet" or "wrong: " with the reason.

    The settings of torch that ``state.py`` lists, and the states of random generators, are afterwards as they were,
    whatever the answer did to them.

    Raises:
        ValueError: there is no exercise of that number.
    """
    check = _check(number)
    try:
        with unchanged():
            problem = check(answered(_of_plain_values(answer)))
    except Unanswered:
        return "not answered yet"
    except Exception as error:  # a reader's code may fail in any way; that is an answer too
        return f"wrong: your code raised {type(error).__name__}{_message(error)}{_advice(error)}"
    return "right" if problem is None else f"wrong: {problem}"


def load_checks() -> None:
    """Import every check, which else happens when the first answer is graded."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def _check(number: str) -> Callable[[object], str | None]:
    """Return the check of that number."""
    load_checks()
    if number not in _CHECKS:
        there = ", ".join(sorted(_CHECKS))
        raise ValueError(f"number={number!r} is no exercise; there are {there}")
    return _CHECKS[number]


def _message(error: Exception) -> str:
    """Return an error's message after a colon; the message of a reader's own class may itself raise an error."""
    try:
        return f": {error}"
    except Exception:
        return ""


def _advice(error: Exception) -> str:
    """Return what to do about tensors on two devices, which torch's message does not say; empty for other errors."""
    text = _message(error) if isinstance(error, RuntimeError) else ""
    if "same device" not in text and "expected device" not in text:
        return ""
    return "; the check brings tensors on the CPU: make new ones where the arguments lie, device=x.device"


def _of_plain_values(answer: object) -> object:
    """Return an answer as plain values, or a function that gives such."""
    is_kernel = hasattr(answer, "fn")  # it is launched, and not called
    if not callable(answer) or isinstance(answer, type) or is_kernel:
        return _plain(answer)
    return functools.wraps(answer)(lambda *args, **options: _plain(answer(*args, **options)))


def _plain(value: object) -> object:
    """Return a value made of Python's own numbers, strings and sequences; others could say that they equal anything.

    Tensors of a GPU come to the CPU, where the checks' own are.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return value
    for kind in (int, float):
        if isinstance(value, kind):
            return kind.__pos__(value)
    if isinstance(value, numbers.Number) and not isinstance(value, complex):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, torch.Tensor):  # of a class that may answer for torch's functions
        value = value.as_subclass(torch.Tensor)
        return value.cpu() if value.is_cuda else value
    for kind in (tuple, list):
        if isinstance(value, kind):
            return kind(map(_plain, kind.__iter__(value)))
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in dict.items(value)}
    if isinstance(type(value).__eq__, FunctionType):
        raise TypeError(f"{type(value).__name__} is no type for an answer: it has an == of its own")
    return value


def exercise(number: str) -> Callable:
    """Register a check under its number."""

    def register(check: Callable[[object], str | None]) -> Callable[[object], str | None]:
        _CHECKS[number] = check
        return check

    return register


def answered(value: object) -> object:
    """Return ``value``, unless it is what an untouched cell gives: None or an ellipsis."""
    if value is None or value is ...:
        raise Unanswered
    return value
