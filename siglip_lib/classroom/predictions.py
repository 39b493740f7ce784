"""The readers' predictions: what they chose, whether it came true, and how many did. Nothing leaves the kernel.

A notebook asks, and a cell of its own records the answer: ``predict("04.3", "b")``. The cell below it measures, and
below its output stands what came true. JupyterLab says which cell it runs; where a front end does not, the measuring
cell is the one that runs next. Running it again says it again; after an error it says nothing until it runs to its end.
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
    "05": "c b c c c b c*",
    "06": "b a c a c* a c*",
    "07": "b c a a a c a*",
    "08": "c c a c b* a",
    "09": "b b b c c c b* a c b b* c*",
    "10": "c b b c b* b* b b* c b* c b c b b",
    "11": "c* c a c* a* b* b* a b* b c* c* c* b*",
    "12": "c c c* c* c* c a c* c* b c b b*",
    "13": "c a b b c* c* b* b* c* b b c*",
    "14": "b b b b b c c b b* c* a",
    "15": "b c* a b b c a b* c* bc* a* c* a",
    "16": "c b* b* b* a* c b c a b a b c a c b* c c* b* c* b* c c b*",
}
# The ids of the cells that measure them.
_MEASURED_BY = {
    "00": "cell-06 cell-22 cell-31 cell-36",
    "01": "cell-13 cell-16 cell-25 cell-32 cell-42",
    "02": "cell-03 cell-15 cell-25 cell-40 cell-58 cell-73 01c1e0ef",
    "03": "cell-03 cell-15 cell-26 cell-42 cell-46",
    "04": "cell-06 cell-11 cell-54 cell-58 cell-65",
    "05": "cell-12 cell-19 cell-27 cell-35 cell-50 76e91402 b68e442c",
    "06": "cell-22 cell-32 cell-40 cell-53 cell-62 cell-64 31f76dbe",
    "07": "cell-12 cell-22 cell-27 cell-47 cell-73 cell-76 2a12ee95",
    "08": "cell-12 cell-28 cell-36 cell-50 cell-58 e2d32177",
    "09": (
        "64215fec e3e827a3 737caf0a 2d18ee24 0aef5f12 faf44489 3d4a2b59 531a81f7 "
        "ad3364c4 7b4e9fa2 bf82d3e6 d66378bb"
    ),
    "10": (
        "0456563e a3fc9c63 fe08a526 c053f4ff c09a1b2d c09a1b2f de0ca7ed 6a46cc0a 0290345c "
        "f309dbac 8f4ae891 f0553dbb e8476f80 75e9f484 30edcf03"
    ),
    "11": (
        "c11-012 c11-019 c11-023 e5f4a6b7 a7b6c8d9 c11-029 c11-031 c11-044 c11-048 "
        "c11-057 c11-060 b52e3f40 f9627384 82fb0c1e"
    ),
    "12": (
        "c12-006 c12-013 c12-019 5a0c1e77 5a0c1e7d c12-034 c12-046 c12-049 5a0c1e87 "
        "c12-057 c12-062 c12-064 c12-076"
    ),
    "13": (
        "cell-03 cell-09 cell-11 cell-18 cell-30 cell-34 cell-41 cell-44 9cd96323 "
        "cell-63 cell-69 cell-83"
    ),
    "14": "nb14-5 nb14-10 nb14-13 nb14-17 91d7c3b0 nb14-29 e19b6d44 0c93d4b8 f8e01b52 ad50c1fa nb14-47",
    "15": (
        "c15-008-2 c15-009b-3 c15-015 c15-022 c15-027 c15-033-3 c15-039 c15-051-2 c15-054 c15-064-3 "
        "c15-067-3 c15-072-3 c15-077-2"
    ),
    "16": (
        "c16-units-count c16-loads-time c16-copies-time c16-ring-time c16-producer-time c16b-002 "
        "c16b-009 c16b-013 c16b-015 c16b-017 c16b-027 c16b-041 c16b-043 c16b-047 c16-ahead-report "
        "c16-ahead-time c16b-049 c16-consumers-time c16-halves-time c16-persistent-time "
        "c16-reference-time c16b-031 c16b-061 c16-both"
    ),
}
_OFFERED = {"10.5": "abcde", "15.10": "abcd"}  # all others offer a, b and c
_SEVERAL = {"10.5", "15.10"}  # take several letters, however many of them come true


@dataclass(frozen=True)
class Outcome:
    """What a prediction offers, and what came true."""

    offered: str  # letters, as in "abc"
    came_true: str  # one of them, or several where several can come true
    by_stored_figures: bool  # of the GPU that the notebooks' outputs come from: another machine may find something else
    takes_several: bool  # whether several letters can come true
    measured_by: str  # the id of the cell below the one that asks


OUTCOMES = {
    (number := f"{notebook}.{place}"): Outcome(
        _OFFERED.get(number, "abc"),
        letters.rstrip("*"),
        letters.endswith("*"),
        number in _SEVERAL,
        cell_id,
    )
    for notebook, row in _CAME_TRUE.items()
    for place, (letters, cell_id) in enumerate(
        zip(row.split(), _MEASURED_BY[notebook].split(), strict=True), start=1
    )
}


@dataclass
class _Record:
    """The choices of this kernel's reader."""

    choices: dict[str, str] = field(default_factory=dict)
    measured: set[str] = field(default_factory=set)  # those that were told whether they came true
    waiting: str | None = None  # the prediction that the next cell measures, unless its id is known
    cells: dict[str, str] = field(default_factory=dict)  # which prediction a cell measures
    own_cell: bool = False  # the cell that runs predicts or counts, and measures nothing


_record = _Record()


def predict(number: str, choice: object) -> None:
    """Record a prediction, and say below the cell that measures whether it came true.

    An ellipsis is no answer: nothing is printed, and an earlier choice is taken back. Another choice replaces an
    earlier one. Where the front end does not say which cell it runs, the next one measures, and a prediction that
    still waits for it is reported as passed over. Outside IPython, where there are no cells, it is said at once.

    Args:
        number: notebook and place, "04.3".
        choice: a letter that the text offers, "b"; where several can come true, a string of all of them, "bd". Capitals
            count as well.

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
    _record.choices[number] = "".join(sorted(choice.lower()))
    ipython = sys.modules.get("IPython")  # there wherever a cell runs
    shell = ipython and ipython.get_ipython()
    if shell is None:
        _tell(number)
    else:
        if passed_over := _record.waiting:
            print(f"prediction {passed_over} was not measured: predict again just before its cell")
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
    """Refuse what is not offered, and more or fewer letters than the question takes."""
    letters = choice.lower() if isinstance(choice, str) else ""
    most = len(outcome.offered) if outcome.takes_several else 1
    chosen = set(letters) & set(outcome.offered)
    if not 1 <= len(chosen) == len(letters) <= most:
        how_many = "one or several" if outcome.takes_several else "one"
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
    info = result.info
    cell = getattr(info, "cell_id", None) or info.raw_cell  # some front ends send no id
    if _record.own_cell:
        _record.own_cell = False
        if _record.waiting and cell == f"predict-{_record.waiting.replace('.', '-')}":
            _record.cells[OUTCOMES[_record.waiting].measured_by] = _record.waiting
            _record.waiting = None
        return
    if not info.store_history:  # run by a tool, not by the reader
        return
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
