"""The readers' predictions: what they chose, whether it came true, and how many did. Nothing leaves the kernel.

A notebook asks, and a cell of its own records the answer: ``predict("04.3", "b")``. The cell that runs next is the one
that measures, and below its output stands what came true. It is remembered as that prediction's cell, so running it
again says it again; after an error it says nothing until it runs to its end.
"""

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import ExecutionResult

# What came true, in the order of each notebook's predictions; * where the measuring cells depend on
# the machine, and the stored figures decide. tests/test_predictions.py compares it with the texts.
_CAME_TRUE = {
    "00": "b b b* c",
    "01": "b b* c c c",
    "02": "a c b a b c a*",
    "03": "b c c b c",
    "04": "b c b* b* b",
    "05": "c b c c c b ce*",
    "06": "b a c a c* a c*",
    "07": "b c a a a c a*",
    "08": "c c a c b* a",
    "09": "b b b c c c b* a c b b b*",
    "10": "c b b c bce* b b* c b* c b c b b",
    "11": "c c a c a b b a b b c* c* c* b*",
    "12": "c c c* c* c* c a c* c* b c b b*",
    "13": "c a b b c* c* b* b* c* b b c*",
    "14": "b b b b b c c* b b a",
    "15": "b b* b b b c a b* b* abc* b* b* b",
}
_OFFERED = {"05.7": "abcdef", "10.5": "abcde"}  # all others offer a, b and c


@dataclass(frozen=True)
class Outcome:
    """What a prediction offers, and what came true."""

    offered: str  # letters, as in "abc"
    came_true: str  # one of them, or several where several can come true
    by_stored_figures: bool  # of the GPU that the notebooks' outputs come from: another machine may find something else


OUTCOMES = {
    (number := f"{notebook}.{place}"): Outcome(
        _OFFERED.get(number, "abc"), letters.rstrip("*"), letters.endswith("*")
    )
    for notebook, row in _CAME_TRUE.items()
    for place, letters in enumerate(row.split(), start=1)
}


@dataclass
class _Record:
    """The choices of this kernel's reader."""

    choices: dict[str, str] = field(default_factory=dict)
    measured: set[str] = field(default_factory=set)  # those that were told whether they came true
    waiting: str | None = None  # the prediction that the next cell measures
    cells: dict[str, str] = field(default_factory=dict)  # which prediction a cell measures
    own_cell: bool = False  # the cell that runs predicts or counts, and measures nothing


_record = _Record()


def predict(number: str, choice: object) -> None:
    """Record a prediction, and say below the cell that runs next whether it came true.

    An ellipsis is no answer: nothing is printed, and an earlier choice is taken back. Another choice replaces an
    earlier one. Outside IPython, where there are no cells, it is said at once.

    Args:
        number: notebook and place, "04.3".
        choice: a letter that the text offers, "b"; where several can come true, a string of all of them, "bd".

    Raises:
        ValueError: there is no such prediction, or it does not offer that choice.
    """
    _record.own_cell = True
    outcome = _outcome(number)
    if choice is ...:
        _forget(number)
        return
    _check_choice(number, choice, outcome)
    _forget(number)
    _record.choices[number] = "".join(sorted(choice))
    ipython = sys.modules.get("IPython")  # there wherever a cell runs
    shell = ipython and ipython.get_ipython()
    if shell is None:
        _tell(number)
    else:
        _record.waiting = number
        shell.events.register("post_run_cell", _after_cell)  # once, however often it is called


def count_predictions(notebook: str) -> None:
    """Print how many of the predictions of ``notebook`` ("04") came true, if any was answered and measured.

    Raises:
        ValueError: there is no notebook of that number.
    """
    _record.own_cell = True
    if notebook not in _CAME_TRUE:
        raise ValueError(f"notebook={notebook!r} is none; there are {', '.join(_CAME_TRUE)}")
    asked = [number for number in OUTCOMES if number.startswith(f"{notebook}.")]
    answered = [number for number in asked if number in _record.measured]
    if answered:
        right = sum(_record.choices[number] == OUTCOMES[number].came_true for number in answered)
        came_true = f"{right} of {len(answered)} came true, {len(asked) - len(answered)} left open"
        print(f"predictions of notebook {notebook}: {came_true}")


def _outcome(number: str) -> Outcome:
    if number not in OUTCOMES:
        ranges = (f"{key}.1 to {key}.{len(row.split())}" for key, row in _CAME_TRUE.items())
        raise ValueError(f"number={number!r} is no prediction; there are {', '.join(ranges)}")
    return OUTCOMES[number]


def _check_choice(number: str, choice: object, outcome: Outcome) -> None:
    """Refuse what is not offered, and several letters where one alone can come true."""
    several = len(outcome.came_true) > 1
    is_offered = isinstance(choice, str) and choice and set(choice) <= set(outcome.offered)
    if not is_offered or len(choice) > (len(set(choice)) if several else 1):
        how_many = "one or several" if several else "one"
        letters = ", ".join(f'"{letter}"' for letter in outcome.offered)
        raise ValueError(f"choice={choice!r}; prediction {number} takes {how_many} of {letters}")


def _forget(number: str) -> None:
    """Take an earlier choice back, with what was said of it."""
    _record.choices.pop(number, None)
    _record.measured.discard(number)
    if _record.waiting == number:
        _record.waiting = None


def _after_cell(result: "ExecutionResult") -> None:
    """IPython calls this after each cell: say what came true if the cell was a measuring one."""
    if _record.own_cell:
        _record.own_cell = False
        return
    info = result.info
    if not info.store_history:  # run by a tool, not by the reader
        return
    cell = getattr(info, "cell_id", None) or info.raw_cell  # some front ends send no id
    if _record.waiting:
        _record.cells[cell], _record.waiting = _record.waiting, None
    number = _record.cells.get(cell)
    if result.success and number in _record.choices:
        _tell(number)


def _tell(number: str) -> None:
    """Print whether a choice came true."""
    choice, outcome = _record.choices[number], OUTCOMES[number]
    if choice == outcome.came_true:
        where = " on the GPU of the stored figures" if outcome.by_stored_figures else ""
        verdict = f", and so it was measured{where}"
    else:
        where = "on the GPU of the stored figures " if outcome.by_stored_figures else ""
        verdict = f"; {where}it is {_listed(outcome.came_true)}"
    print(f"prediction {number}: you chose {_listed(choice)}{verdict}")
    _record.measured.add(number)


def _listed(letters: str) -> str:
    """Return "(b), (c) and (e)" for "bce"."""
    *first, last = (f"({letter})" for letter in letters)
    return f"{', '.join(first)} and {last}" if first else last
