"""Every folded solution is accepted, and plausible wrong answers are refused with a reason."""

import importlib
import random
import re

import numpy as np
import pytest
import torch
from notebook_files import PATHS, Exercise, exercises, read, run, setup_source
from right_answers import RIGHT

from siglip_lib import attend
from siglip_lib.classroom.exercises import WrongAnswer, grade, require_exercise

CASES = [
    pytest.param(read(path), exercise, id=f"{path.stem}-{exercise.number}")
    for path in PATHS
    for exercise in exercises(read(path))
]


def state() -> list:
    """What all code of a process shares, of torch and of the random generators."""
    devices = ("cpu", "cuda")
    cudnn = torch.backends.cudnn
    return [
        *(torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
        *(torch.is_grad_enabled(), torch.is_anomaly_enabled()),
        *(torch.are_deterministic_algorithms_enabled(), torch.get_deterministic_debug_mode()),
        *(torch.is_autocast_enabled(device) for device in devices),
        *(torch.get_autocast_dtype(device) for device in devices),
        *(cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        torch._C._len_torch_function_stack(),  # a default device that was set, though the same
        *(random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
    ]


def answer(notebook, exercise: Exercise, code: str) -> str:
    """The verdict, which must leave the process as it was."""
    namespace: dict = {}
    exec(setup_source(notebook), namespace)
    run(code, namespace)
    before = state()
    verdict = grade(exercise.number, namespace[exercise.answer])
    assert state() == before
    return verdict


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_each_notebook_has_two_to_four_exercises(path):
    assert 2 <= len(exercises(read(path))) <= 4


@pytest.mark.parametrize(("notebook", "exercise"), CASES)
def test_solution_is_accepted(notebook, exercise):
    assert answer(notebook, exercise, exercise.solution) == "right"


@pytest.mark.parametrize(
    ("notebook", "exercise"), [case for case in CASES if case.values[1].number in RIGHT]
)
def test_other_right_answers_are_accepted(notebook, exercise):
    for code in RIGHT[exercise.number]:
        assert answer(notebook, exercise, code) == "right"


def test_right_answers_are_to_exercises_that_there_are():
    assert RIGHT.keys() <= {case.values[1].number for case in CASES}


@pytest.mark.parametrize(("notebook", "exercise"), CASES)
def test_wrong_answers_are_refused_with_a_reason(notebook, exercise):
    wrong = importlib.import_module(f"wrong_answers.nb{exercise.number[:2]}").WRONG[exercise.number]
    assert len(wrong) >= 2
    for code, reason in wrong.items():
        verdict = answer(notebook, exercise, code)
        assert verdict.startswith("wrong: ")
        assert reason in verdict


def test_a_fault_may_lie_where_its_exercise_says():
    (text,) = (
        cell.source for cell in read(PATHS[4]).cells if "Write `missed(q, k, v)`" in cell.source
    )
    _, _, looked = grade("04.3", lambda q, k, v: attend(q, k, v)).partition("wherever we looked")
    _, _, named = text.partition("in one of these:")
    assert re.findall(r"\d+", looked) == re.findall(r"\d+", named) != []


@pytest.mark.parametrize(("notebook", "exercise"), CASES)
def test_an_untouched_cell_says_so(notebook, exercise):
    untouched = next(
        c.source for c in notebook.cells if f'check_exercise("{exercise.number}"' in c.source
    )
    assert answer(notebook, exercise, untouched) == "not answered yet"


NUMBERS = [case.values[1].number for case in CASES]


def meddle(*_args: object) -> float:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    torch.set_grad_enabled(False)
    torch.autograd.set_detect_anomaly(True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    return 0.5


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_an_answer_that_changes_settings_leaves_none(number):
    before = state()
    assert grade(number, meddle).startswith("wrong: ")
    assert state() == before


def test_settings_of_the_reader_change_no_verdict():
    notebook, exercise = next(c.values for c in CASES if c.values[1].number == "11.1")
    with torch.no_grad():
        torch.set_default_dtype(torch.float64)
        try:
            assert answer(notebook, exercise, exercise.solution) == "right"
        finally:
            torch.set_default_dtype(torch.float32)


class Always(int):
    """Equal to whatever it is compared with."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False


class Chameleon:
    """The same without a number."""

    __hash__ = object.__hash__
    __eq__ = Always.__eq__
    __ne__ = Always.__ne__


class Agreeing(torch.Tensor):
    """The same as a tensor, for torch's own comparisons."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return True


TENSOR = torch.zeros(3).as_subclass(Agreeing)


@pytest.mark.parametrize("one", [Always(3), Chameleon(), TENSOR], ids=["int", "object", "tensor"])
@pytest.mark.parametrize("number", NUMBERS)
def test_what_equals_everything_is_not_right(number, one):
    for given in (one, (one,) * 2, [one] * 5, lambda *_: one, lambda *_: (one, one)):
        assert grade(number, given).startswith("wrong: ")


@pytest.mark.parametrize("kind", [np.int64, np.float64, float])
def test_numbers_of_other_types_are_numbers(kind):
    assert grade("00.2", kind(2 * 64 * 16 * 729 * 729)) == "right"


def test_a_class_check_raises_its_reason(capsys):
    require_exercise("00.2", 2 * 64 * 16 * 729 * 729)
    assert capsys.readouterr().out == "exercise 00.2: right\n"
    with pytest.raises(WrongAnswer, match=r"^exercise 00\.2: wrong: .+"):
        require_exercise("00.2", 1)
    with pytest.raises(WrongAnswer, match=r"^exercise 00\.2: not answered yet$"):
        require_exercise("00.2", ...)


def test_tensors_on_two_devices_are_told_where_to_lie():
    def mass(maps, boxes, size):
        return maps * torch.ones(maps.shape, device="meta")

    verdict = grade("11.1", mass)
    assert verdict.startswith("wrong: your code raised RuntimeError: ")
    assert verdict.endswith("make new ones where the arguments lie, device=x.device")

    def other(maps, boxes, size):
        raise RuntimeError("out of order")

    assert grade("11.1", other) == "wrong: your code raised RuntimeError: out of order"


@pytest.mark.parametrize("number", ["11.1", "14.3"])
def test_a_right_answer_may_come_from_a_gpu(number, gpu):
    notebook, exercise = next(c.values for c in CASES if c.values[1].number == number)
    moved = f"""
_plain = {exercise.answer}


def {exercise.answer}(*args):
    moved = [x.to("cuda") if isinstance(x, torch.Tensor) else x for x in args]
    return _plain(*moved)
"""
    assert answer(notebook, exercise, exercise.solution + moved) == "right"


def test_an_error_without_a_text():
    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    def raising(*_: object) -> None:
        raise Silent

    assert grade("01.1", raising) == "wrong: your code raised Silent"


@pytest.mark.parametrize("number", ["01.9", "1.1", "99.1", "", 1.1, None])
def test_an_exercise_that_is_not_there(number):
    with pytest.raises(
        ValueError, match=f"^number={number!r} is no exercise; there are 00.1, 00.2, "
    ):
        grade(number, 1)
