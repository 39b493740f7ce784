"""Answers graded in another process: what the grader calls."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from siglip_lib.classroom.grading.limits import Limits

_KEPT = "PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR"
# small sizes on one core: a grade must not depend on the machine, or on who else computes
_SET = {
    "PYTHONPATH": str(Path(__file__).parents[3]),  # the same library there as here
    "SIGLIP_SIZE": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
    "HF_HUB_OFFLINE": "1",
}
_START = 120  # seconds that the imports may take on a busy machine
_CLEAN = 15  # seconds to end one answer's processes


@dataclass(frozen=True)
class Answer:
    """What a student's notebook holds of one exercise.

    Attributes:
        number: the exercise, as "01.2".
        name: what the answer is called.
        cells: the sources of the notebook's code cells, up to the exercise's check.
    """

    number: str
    name: str
    cells: Sequence[str]


def grade_apart(answers: Sequence[Answer], limits: Limits | None = None) -> list[str]:
    """Return for each answer what ``grade`` says of it: "right", "not answered yet" or "wrong: " with the reason.

    Each answer runs in a process of its own, within ``limits``; that it hung, asked for too much or ended its process
    is a reason, too. Linux only.

    Raises:
        RuntimeError: no answer could be graded, because the library does not start; not the student's fault.
    """
    limits = limits or Limits()
    found: list[str] = []
    while len(found) < len(answers):
        # one more process if an answer has killed the one before
        said = _say(answers[len(found) :], limits)
        found += said or ["wrong: your code killed the process that grades it"]
    return found


def _say(answers: Sequence[Answer], limits: Limits) -> list[str]:
    """Return the verdicts of one process, as far as it came."""
    job = {
        "limits": dataclasses.asdict(limits),
        "answers": [dataclasses.asdict(answer) for answer in answers],
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "siglip_lib.classroom.grading"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**{name: os.environ[name] for name in _KEPT if name in os.environ}, **_SET},
    )
    try:
        longest = _START + len(answers) * (limits.by_the_clock + _CLEAN)
        told, errors = process.communicate(json.dumps(job), timeout=longest)
    except subprocess.TimeoutExpired:
        process.kill()
        told, errors = process.communicate()
    finally:
        process.kill()
    started, *lines = told.splitlines() or [""]
    if started != "ready":
        raise RuntimeError(f"grading does not start:\n{errors}")
    return [json.loads(line) for line in lines]
