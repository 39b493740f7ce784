"""Predictions in a shell as notebooks have it, and that the table of what came true is what the notebooks say."""

import re
from collections.abc import Iterator

import pytest
from IPython.core.interactiveshell import InteractiveShell
from notebook_files import PATHS, code_cells, read

from siglip_lib.classroom import count_predictions, predict, predictions
from siglip_lib.classroom.predictions import OUTCOMES

LETTERS = re.compile(r"\(([a-f])\)")
# "It is (b): ...", "On the H200 it is (b), (c) and (e), and not (d)", "(b), and that before"
ANSWER = re.compile(r"(?:[A-Z][\w ]* is )?((?:\([a-f]\)(?:, (?=\()| and (?=\())?)+)")


@pytest.fixture(autouse=True)
def _nothing_recorded(monkeypatch):
    monkeypatch.setattr(predictions, "_record", predictions._Record())


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    found = InteractiveShell.instance(history_length=0)
    found.push({"predict": predict, "count_predictions": count_predictions})
    yield found
    InteractiveShell.clear_instance()


@pytest.fixture
def said(shell, capsys):
    """Run cells one after the other, and return what each printed, without an error's traceback."""

    def run(*cells: str, cell_id: str | None = None) -> list[str]:
        printed = []
        for cell in cells:
            result = shell.run_cell(cell, store_history=True, cell_id=cell_id)
            text = capsys.readouterr().out
            printed.append(type(result.error_in_exec).__name__ if not result.success else text)
        return printed

    return run


RIGHT = "prediction 04.1: you chose (b), and so it was measured\n"
WRONG = "prediction 04.1: you chose (a); it is (b)\n"
COUNT = "predictions of notebook 04: {} came true, {} left open\n"
TOLD_B, TOLD_A = "1\n" + RIGHT, "1\n" + WRONG


@pytest.mark.parametrize(("letter", "told"), [("b", TOLD_B), ("a", TOLD_A)])
def test_the_next_cell_tells_and_no_other(said, letter, told):
    cells = [f'predict("04.1", "{letter}")', "print(1)", "print(2)", "print(3)"]
    assert said(*cells) == ["", told, "2\n", "3\n"]


@pytest.mark.parametrize(
    ("number", "choice", "told"),
    [
        ("04.3", "b", "you chose (b), and so it was measured on the GPU of the stored figures"),
        ("04.3", "c", "you chose (c); on the GPU of the stored figures it is (b)"),
        ("15.10", "cb", "you chose (b) and (c), and so it was measured on the GPU of the stored"),
        ("15.10", "b", "you chose (b); on the GPU of the stored figures it is (b) and (c)"),
        ("15.10", "bcd", "you chose (b), (c) and (d); on the GPU of the stored figures it is (b)"),
        ("10.5", "bc", "you chose (b) and (c); on the GPU of the stored figures it is (b)\n"),
    ],
)
def test_what_depends_on_the_machine_and_several_letters(said, number, choice, told):
    _, text = said(f'predict("{number}", "{choice}")', "print(1)")
    assert text.startswith(f"1\nprediction {number}: {told}")


def test_unanswered_says_and_changes_nothing(said, shell):
    before = {event: [*functions] for event, functions in shell.events.callbacks.items()}
    cells = ['predict("04.1", ...)', "print(1)", 'count_predictions("04")']
    assert said(*cells) == ["", "1\n", ""]
    assert shell.events.callbacks == before


def test_either_cell_may_run_again(said):
    asks = 'predict("04.1", "b")'
    assert said(asks, asks, "print(1)", "print(1)") == ["", "", TOLD_B, TOLD_B]
    assert said(asks, "print(1)", "print(1)") == ["", TOLD_B, TOLD_B]
    assert said('count_predictions("04")') == [COUNT.format("1 of 1", 4)]


def test_a_measuring_cell_that_raises_says_nothing_until_it_is_right(said):
    measures = "print(1 if defined else 0)"
    assert said('predict("04.1", "b")', measures) == ["", "NameError"]
    assert said('count_predictions("04")', "defined = True") == ["", ""]
    assert said(measures) == [TOLD_B]


def test_a_cell_that_was_repaired_is_known_by_its_id(said):
    assert said('predict("04.1", "b")') == [""]
    assert said("1 / 0", cell_id="measures") == ["ZeroDivisionError"]
    assert said("x = 0", cell_id="another") == [""]
    assert said("print(1)", cell_id="measures") == [TOLD_B]


def ask(said, number: str, choice: str) -> list[str]:
    """Predict in the notebook's own cell, in a front end that says which cell it runs."""
    return said(f'predict("{number}", "{choice}")', cell_id=f"predict-{number.replace('.', '-')}")


def test_where_cells_are_known_only_the_measuring_one_tells(said):
    measures = OUTCOMES["04.1"].measured_by
    assert ask(said, "04.1", "b") == [""]
    assert said("print(2)", cell_id="scratch") == said("print(2)") == ["2\n"]
    assert said('count_predictions("04")', cell_id="count") == [""]
    assert said("print(1)", cell_id=measures) == [TOLD_B]
    assert said("print(1)", cell_id="scratch") == ["1\n"]
    assert said("print(1)", cell_id=measures) == [TOLD_B]


def test_where_cells_are_known_several_predictions_wait(said):
    assert ask(said, "04.1", "a") + ask(said, "04.2", "c") == ["", ""]
    told = "1\nprediction 04.2: you chose (c), and so it was measured\n"
    assert said("print(1)", cell_id=OUTCOMES["04.2"].measured_by) == [told]
    assert said("print(1)", cell_id=OUTCOMES["04.1"].measured_by) == [TOLD_A]


def test_of_two_notebooks_in_one_kernel_the_later_one_has_the_cell(said):
    assert OUTCOMES["03.1"].measured_by == OUTCOMES["13.1"].measured_by == "cell-03"
    assert ask(said, "13.1", "c") + ask(said, "03.1", "b") == ["", ""]
    (told,) = said("print(1)", cell_id="cell-03")
    assert told == "1\nprediction 03.1: you chose (b), and so it was measured\n"


def test_a_later_choice_replaces_one(said):
    asks_a, asks_b, count = (
        'predict("04.1", "a")',
        'predict("04.1", "b")',
        'count_predictions("04")',
    )
    assert said(asks_a, asks_b, "print(1)") == ["", "", TOLD_B]
    assert said(asks_a, count) == ["", ""]  # not measured yet
    assert said("print(1)", count) == [TOLD_A, COUNT.format("0 of 1", 4)]


def test_an_answer_that_is_taken_back(said):
    assert said('predict("04.1", "a")', 'predict("04.1", ...)', "print(1)") == ["", "", "1\n"]
    assert said('predict("04.1", "a")', "print(1)", 'predict("04.1", ...)')[1:] == [TOLD_A, ""]
    assert said("print(1)", 'count_predictions("04")') == ["1\n", ""]


def test_the_cell_after_an_answer_that_is_taken_back_measures_nothing(said):
    said('predict("04.1", "a")', 'predict("04.1", ...)', "print(2)")
    assert said('predict("04.1", "b")', "print(1)", "print(2)") == ["", TOLD_B, "2\n"]


def test_a_prediction_that_was_passed_over_stays_open_and_is_named(said):
    """The next prediction's cell measures nothing."""
    cells = ['predict("04.1", "b")', 'predict("04.2", "c")', "print(1)", 'count_predictions("04")']
    assert said(*cells)[1:] == [
        "prediction 04.1 was not measured: predict again just before its cell\n",
        "1\nprediction 04.2: you chose (c), and so it was measured\n",
        COUNT.format("1 of 1", 4),
    ]


def test_an_error_is_recorded_nowhere(said):
    assert said('predict("04.1", "b")', 'predict("04.1", "d")', "print(1)") == [
        "",
        "ValueError",
        TOLD_B,
    ]
    assert said('predict("04.2", "x")', "print(1)") == ["ValueError", TOLD_B]


def test_what_a_tool_runs_is_no_cell(said, shell, capsys):
    assert said('predict("04.1", "b")') == [""]
    shell.run_cell("print(7)", store_history=False)
    assert capsys.readouterr().out == "7\n"
    assert said("print(1)") == [TOLD_B]


def test_the_count_is_of_one_notebook(said):
    cells = {"04.1": "b", "04.2": "a", "04.4": "b", "05.1": "c"}
    for number, choice in cells.items():
        said(f'predict("{number}", "{choice}")', f"{number}")
    assert said(
        'count_predictions("04")', 'count_predictions("05")', 'count_predictions("06")'
    ) == [
        COUNT.format("2 of 3", 2),
        "predictions of notebook 05: 1 of 1 came true, 6 left open\n",
        "",
    ]


def test_outside_ipython_it_is_said_at_once(capsys):
    predict("04.1", "b")
    predict("04.2", ...)
    count_predictions("04")
    assert capsys.readouterr().out == RIGHT + COUNT.format("1 of 1", 4)


@pytest.mark.parametrize("number", ["04.6", "4.1", "04", "17.1", "", 4.1, None])
@pytest.mark.parametrize("choice", ["b", ...])
def test_a_prediction_that_is_not_there(number, choice):
    there = re.escape(f"number={number!r} is no prediction; there are 00.1 to 00.4, 01.1 to 01.5, ")
    with pytest.raises(ValueError, match=there):
        predict(number, choice)


@pytest.mark.parametrize("choice", ["d", "", "D", "(b)", "ab", "bB", "bb", 1, None, ["b"]])
def test_a_choice_that_is_not_offered(choice, capsys):
    said = re.escape(f'choice={choice!r}; prediction 04.1 takes one of "a", "b", "c"')
    with pytest.raises(ValueError, match=said):
        predict("04.1", choice)
    count_predictions("04")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("choice", ["f", "", "cc", "c, e"])
def test_several_choices_that_are_not_offered(choice):
    with pytest.raises(ValueError, match=r'10\.5 takes one or several of "a", "b", "c", "d", "e"$'):
        predict("10.5", choice)


def test_capitals_count(said):
    assert said('predict("04.1", "B")', "print(1)") == ["", TOLD_B]


@pytest.mark.parametrize("notebook", ["17", "4", "04.1", None])
def test_a_count_of_a_notebook_that_is_not_there(notebook):
    with pytest.raises(ValueError, match=f"^notebook={notebook!r} is none; there are 00, 01, "):
        count_predictions(notebook)


def asked(path) -> dict[str, tuple[set[str], list, str]]:
    """Of each prediction by its number: the letters of its question, the cells down to the answer, and the answer."""
    found, question, cells = {}, None, []
    for cell in read(path).cells:
        if cell.cell_type == "code":
            cells.append(cell)
            continue
        if question is not None:
            number = f"{path.stem[:2]}.{len(found) + 1}"
            found[number] = set(LETTERS.findall(question)), cells, cell.source
        _, asks, text = cell.source.rpartition("**Predict")
        question, cells = text if asks else None, []
    return found


ASKED = [
    pytest.param(number, *of, id=number) for path in PATHS for number, of in asked(path).items()
]


def test_the_table_holds_what_the_notebooks_ask():
    assert list(OUTCOMES) == [case.id for case in ASKED]


@pytest.mark.parametrize(("number", "offered", "cells", "answer"), ASKED)
def test_the_table_says_what_the_notebook_says(number, offered, cells, answer):
    outcome = OUTCOMES[number]
    assert set(outcome.offered) - {" "} == offered
    found = ANSWER.match(answer)
    assert found, f"the text after {number} starts with no letter: {answer[:60]}"
    assert outcome.came_true == "".join(LETTERS.findall(found[1]))
    assert outcome.takes_several or len(outcome.came_true) == 1
    measuring = [cell for cell in cells if cell.metadata.get("jupyter", {}).get("outputs_hidden")]
    tagged = any("nbval-ignore-output" in cell.metadata.get("tags", []) for cell in measuring)
    assert outcome.by_stored_figures == tagged


@pytest.mark.parametrize(("number", "offered", "cells", "answer"), ASKED)
def test_the_cell_that_asks_stands_before_one_that_measures(number, offered, cells, answer):
    (place,) = (i for i, cell in enumerate(cells) if "predict(" in cell.source)
    notebook, _, ordinal = number.partition(".")
    assert cells[place].id == f"predict-{notebook}-{ordinal}"
    code, _, comment = cells[place].source.partition("  # ")
    assert code == f'predict("{number}", ...)'
    assert not cells[place].outputs
    letters = re.findall('"([a-f])"', comment)
    assert (letters[0], letters[-1]) == (min(offered), max(offered))
    assert cells[place + 1].metadata["jupyter"]["outputs_hidden"]
    assert cells[place + 1].id == OUTCOMES[number].measured_by


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_each_notebook_ends_with_the_count(path):
    last = code_cells(read(path))[-1]
    assert last.source.startswith(f'count_predictions("{path.stem[:2]}")')
    assert not last.outputs
