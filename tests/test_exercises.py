"""Every folded solution is accepted, and plausible wrong answers are refused with a reason."""

import importlib

import pytest
from notebook_files import PATHS, Exercise, exercises, read, run, setup_source

from siglip_lib.exercises import grade

CASES = [
    pytest.param(read(path), exercise, id=f"{path.stem}-{exercise.number}")
    for path in PATHS
    for exercise in exercises(read(path))
]


def answer(notebook, exercise: Exercise, code: str) -> str:
    namespace: dict = {}
    exec(setup_source(notebook), namespace)
    run(code, namespace)
    return grade(exercise.number, namespace[exercise.answer])


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_each_notebook_has_two_to_four_exercises(path):
    assert 2 <= len(exercises(read(path))) <= 4


@pytest.mark.parametrize(("notebook", "exercise"), CASES)
def test_solution_is_accepted(notebook, exercise):
    assert answer(notebook, exercise, exercise.solution) == "right"


@pytest.mark.parametrize(("notebook", "exercise"), CASES)
def test_wrong_answers_are_refused_with_a_reason(notebook, exercise):
    wrong = importlib.import_module(f"wrong_answers.nb{exercise.number[:2]}").WRONG[exercise.number]
    assert len(wrong) >= 2
    for code, reason in wrong.items():
        verdict = answer(notebook, exercise, code)
        assert verdict.startswith("wrong: ")
        assert reason in verdict


@pytest.mark.parametrize(("notebook", "exercise"), CASES)
def test_an_untouched_cell_says_so(notebook, exercise):
    untouched = next(
        c.source for c in notebook.cells if f'check_exercise("{exercise.number}"' in c.source
    )
    assert answer(notebook, exercise, untouched) == "not answered yet"
