"""Answers graded in processes of their own: what an answer does there ends there, and the reason names it."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from notebook_files import PATHS, all_code_cells, exercises, read

from siglip_lib.classroom.grading import Answer, Limits, apart, grade_apart, landlock
from siglip_lib.classroom.grading.needed import needed_parts
from siglip_lib.classroom.grading.patches import Watch

LIMITS = Limits(seconds=3, gib=2)
RIGHT = "def drop_path_std(p):\n    return (p / (1 - p)) ** 0.5"


def in_the_function(code: str) -> str:
    """An answer to 05.2 that is right and does something else first."""
    return f"def drop_path_std(p):\n    {code}\n    return (p / (1 - p)) ** 0.5"


HOSTILE = {
    "endless": (in_the_function("while True: pass"), "had not ended after 3 s"),
    "deaf": (
        "import signal\n"
        + in_the_function(
            "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n    while True:\n        try:\n"
            "            while True: pass\n        except BaseException: pass"
        ),
        "had not ended after 3 s",
    ),
    "waits": ("import time\n" + in_the_function("time.sleep(1e6)"), "had not ended after 3 s"),
    "10 GB of torch": (
        "import torch\n" + in_the_function("torch.empty(10 * 2**30 // 4)"),
        "asked for more memory than the 2 GiB",
    ),
    "10 GB of Python": (in_the_function("bytearray(10 * 2**30)"), "asked for more memory than the 2 GiB"),
    "sys.exit": ("import sys\n" + in_the_function("sys.exit(0)"), "ended Python with sys.exit"),
    "exit of the cell": ("import sys\nsys.exit(0)\ndrop_path_std = 1", "ended Python with sys.exit"),
    "os._exit": ("import os\n" + in_the_function("os._exit(0)"), "ended Python, with exit status 0"),
    "kills itself": (
        "import os\n" + in_the_function("os.kill(os.getpid(), 11)"),
        "ended Python, with signal SIGSEGV",
    ),
    "raises what nobody should": (
        in_the_function("raise KeyboardInterrupt"),
        "your code raised KeyboardInterrupt",
    ),
    "replaces a function of the check": (
        "import math\ndef drop_path_std(p):\n    math.isclose = lambda *a, **b: True\n    return 1.0",
        "replaced math.isclose; an answer leaves",
    ),
    "replaces torch": (
        "import torch\n" + in_the_function("torch.allclose = torch.Tensor.__eq__ = lambda *a: True"),
        "replaced torch.Tensor.__eq__, torch.allclose",
    ),
    "replaces print": (
        "import builtins\n" + in_the_function("builtins.print = None"),
        "replaced builtins.print",
    ),
    "replaces code": (
        "from siglip_lib.classroom import exercises\n"
        + in_the_function("exercises.grade.__code__ = (lambda number, answer: 'right').__code__"),
        "replaced siglip_lib.classroom.exercises.grade",
    ),
    "no such name": ("drop_path = 1", "no cell gives 'drop_path_std' a value"),
    "no Python": ("def drop_path_std(p)\n    return p", "its cell is no Python: expected ':' (line 1)"),
    "fails before": ("1 / 0\ndrop_path_std = 1", "a value; ZeroDivisionError: division by zero"),
    "equals everything": (
        "class Any(float):\n    def __eq__(self, other): return True\n"
        "def drop_path_std(p): return Any(7)",
        "the formula gives",
    ),
}  # fmt: skip
PEACEFUL = {
    "right": RIGHT,
    "a helper in another cell": "def drop_path_std(p):\n    return root(p / (1 - p))",
    "tried out below": RIGHT + "\nwhile True:\n    drop_path_std(.5)",
    "magic": f"%matplotlib inline\n!false\n{RIGHT}\ndisplay(drop_path_std(.5))",
    "its own print": f"def print(*a): raise OSError\n{RIGHT}",
}
HELPERS = [
    "from math import *",
    "def half(x):\n    return x ** HALF",
    "HALF = 0.5\nraise ValueError('later cells still run')",
    "def root(x):\n    return half(x)",
    "while True:\n    unrelated = 1",
]


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str]:
    """Of all of the above, one after the other in one notebook, each hostile one with a right one after it."""
    answers = {}
    for name, (code, _) in HOSTILE.items():
        answers |= {name: [code], f"after {name}": [RIGHT]}
    answers |= {name: [*HELPERS, code] for name, code in PEACEFUL.items()}
    answers["untouched"] = ["def drop_path_std(p):\n    # your code\n    ..."]
    asked = [Answer("05.2", "drop_path_std", cells) for cells in answers.values()]
    start = time.monotonic()
    given = grade_apart(asked, LIMITS)
    # two of them use their time up, and one waits; what the machine does beside is not known
    assert time.monotonic() - start < 300
    return dict(zip(answers, given, strict=True))


@pytest.mark.parametrize("name", HOSTILE)
def test_what_happened_is_named_and_what_follows_is_untouched(verdicts, name):
    assert verdicts[name].startswith("wrong: ")
    assert HOSTILE[name][1] in verdicts[name]
    assert verdicts[f"after {name}"] == "right"


@pytest.mark.parametrize("name", PEACEFUL)
def test_what_readers_do_costs_nothing(verdicts, name):
    assert verdicts[name] == "right"


def test_an_untouched_answer_says_so(verdicts):
    assert verdicts["untouched"] == "not answered yet"


def test_a_killed_grader_is_the_answers_fault_and_is_replaced(monkeypatch):
    """As without Landlock, where an answer can kill the process above it."""
    calls = itertools.count()
    say = apart._say

    def killed_once(answers, limits):
        return say(answers, limits) if next(calls) else []

    monkeypatch.setattr(apart, "_say", killed_once)
    answers = [Answer("05.2", "drop_path_std", [RIGHT])] * 2
    assert grade_apart(answers, LIMITS) == [
        "wrong: your code killed the process that grades it",
        "right",
    ]


def test_a_library_that_does_not_start_is_nobodys_wrong_answer(monkeypatch, tmp_path):
    (tmp_path / "siglip_lib").mkdir()
    (tmp_path / "siglip_lib/__init__.py").write_text("1 / 0", encoding="ascii")
    monkeypatch.setitem(apart._SET, "PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)^grading does not start:.*ZeroDivisionError"):
        grade_apart([Answer("05.2", "drop_path_std", [RIGHT])], LIMITS)


@pytest.mark.parametrize("limit", [{"seconds": 0}, {"gib": -1}])
def test_limits_are_positive(limit):
    with pytest.raises(ValueError, match="must be positive"):
        Limits(**limit)


@pytest.mark.skipif(not landlock.version(), reason="needs a kernel with Landlock")
def test_what_an_answer_reaches(tmp_path):
    """Neither files of others, nor the network, nor other processes, nor what is left of it afterwards."""
    secret, mine = tmp_path / "solutions.py", tmp_path / "grades"
    secret.write_text("x", encoding="ascii")
    neighbour = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
    os_, socket = "__import__('os')", "__import__('socket')"
    codes = {
        "reads": f"open({str(secret)!r}).read()",
        "writes": f"open({str(mine)!r}, 'w')",
        "speaks for the grader": f"open('/proc/' + str({os_}.getppid()) + '/fd/1', 'w')",
    }
    if landlock.version() >= 4:
        codes["connects"] = f"{socket}.create_connection(('127.0.0.1', 9))"
    if landlock.version() >= 6:
        codes["kills its grader"] = f"{os_}.kill({os_}.getppid(), 9)"
        codes["kills a neighbour"] = f"{os_}.kill({neighbour.pid}, 9)"
    codes["leaves files"] = "open('left', 'w').write('x')"
    answers = [Answer("05.2", "drop_path_std", [in_the_function(code)]) for code in codes.values()]
    given = dict(zip(codes, grade_apart(answers, LIMITS), strict=True))
    assert given.pop("leaves files") == "right"  # in a folder that is gone
    for name, verdict in given.items():
        assert verdict.startswith("wrong: your code raised PermissionError"), name
    assert not mine.exists()
    assert neighbour.poll() is None
    neighbour.kill()
    neighbour.wait()


def test_what_an_answer_starts_ends_with_it(tmp_path):
    flag = f"left-{os.getpid()}-running"
    code = (
        "import subprocess, sys\n"
        + in_the_function(
            f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)', {flag!r}], start_new_session=True)"
        )
    )  # fmt: skip
    assert grade_apart([Answer("05.2", "drop_path_std", [code])], LIMITS) == ["right"]
    running = [
        path.read_bytes()
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.exists()
    ]  # fmt: skip
    assert not [line for line in running if flag.encode() in line]


def test_parts_that_an_answer_needs():
    cells = [
        "import math\nHALF = 0.5",
        "x = 1",
        "def root(y):\n    x = 2\n    return y ** HALF",
        "HALF = 1 / 2",
        "def answer(p):\n    return root(p)\nanswer(x)\nshown = answer(2)",
        "answer",
    ]
    # root's HALF is looked for above it first
    assert [part.cell for part in needed_parts(cells, "answer")] == [0, 2, 4]
    assert [part.cell for part in needed_parts(cells, "shown")] == [0, 1, 2, 4]
    assert needed_parts(cells, "nowhere") == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_solution_needs_the_imports_and_itself(path):
    """So grading runs none of a notebook's trainings and timings."""
    notebook = read(path)
    cells = [cell.source for cell in all_code_cells(notebook)]
    for exercise in exercises(notebook):
        end = next(i for i, s in enumerate(cells) if f'check_exercise("{exercise.number}"' in s)
        parts = needed_parts([*cells[:end], exercise.solution], exercise.answer)
        assert {part.cell for part in parts} <= {1, end}


def test_a_replaced_method_is_found():
    watch = Watch()
    assert watch.replaced() == []
    torch.nn.Module.extra = lambda self: None
    try:
        assert watch.replaced() == ["torch.nn.modules.module.Module.extra"]
    finally:
        del torch.nn.Module.extra
