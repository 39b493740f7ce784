"""Checks of the notebooks' exercises. A check says what is wrong with an answer, not only that it is.

The checks of notebook 01 stand in ``nb01``, and so on. Each is a function of the reader's answer that returns None if
it is right, or a sentence that says what is wrong.
"""

import importlib
from collections.abc import Callable

_CHECKS: dict[str, Callable[[object], str | None]] = {}


class Unanswered(Exception):
    """The exercise's cell is still as it was."""


def check_exercise(number: str, answer: object) -> None:
    """Print whether ``answer`` solves exercise ``number`` ("01.2"), and if not, what is wrong with it."""
    print(f"exercise {number}: {grade(number, answer)}")


def grade(number: str, answer: object) -> str:
    """Return "right", "not answered yet" or "wrong: " with the reason."""
    importlib.import_module(f"{__name__}.nb{number[:2]}")
    try:
        problem = _CHECKS[number](answered(answer))
    except Unanswered:
        return "not answered yet"
    except Exception as error:  # a reader's code may fail in any way; that is an answer too
        return f"wrong: your code raised {type(error).__name__}: {error}"
    return "right" if problem is None else f"wrong: {problem}"


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
