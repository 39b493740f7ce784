"""Grade what students handed in: build/class/submitted/STUDENT/NOTEBOOK/NOTEBOOK.ipynb.

    make grade

Writes, in build/class, grades.csv of all students and notebooks, feedback/ with the reason for each point that is
missing, and flagged.csv of submissions that nbgrader could not read: they count 0. Submissions that are graded, and
have not changed since, are left alone.

Each submission has a process of its own, with a limit of time and one of memory, in which nbgrader reads it; each
answer has another (see ``siglip_lib.classroom.grading``, also for what it does not protect against).
"""

import argparse
import csv
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from make_class import COURSE, find_programs
from nbgrader.api import Gradebook, MissingEntry

from siglip_lib.classroom.grading import Limits, landlock

_MEMORY = 12 * 2**30  # bytes of addresses for nbgrader, and for each process that it starts
_REMOTE = re.compile(r'<script src="https?:[^>]*>\s*</script>')
_ERROR = re.compile(r"^ *([\w.]*(?:Error|Exception)\b: .*)$", re.MULTILINE)  # of a traceback
_LEAST = 300  # seconds for nbgrader itself, on a busy machine


def grade_class(course: Path, limits: Limits) -> list[tuple[str, str, str]]:
    """Grade what is new, write feedback and CSV, and return the flagged: student, notebook, reason."""
    flagged = []
    handed_in = sorted(path for path in course.glob("submitted/*/*") if path.is_dir())
    for folder in handed_in:
        student, notebook = folder.parts[-2:]
        if _is_graded(course, folder):
            continue
        if problem := _grade(course, folder, limits):
            flagged.append((student, notebook, problem))
        print(f"{student} {notebook}: {problem or _points(course, student, notebook)}", flush=True)
    for notebook in sorted({path.name for path in _without_feedback(course)}):
        if problem := _nbgrader(course, 4 * _LEAST, "generate_feedback", notebook):
            print(f"feedback on {notebook}: {problem}", file=sys.stderr)
    for page in course.glob("feedback/*/*/*.html"):
        _load_nothing(page)
    if problem := _nbgrader(course, _LEAST, "export", "--to=grades.csv"):
        raise RuntimeError(f"grades.csv was not written: {problem}")
    with (course / "flagged.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("student_id", "notebook", "reason"), *flagged])
    return flagged


def _without_feedback(course: Path) -> list[Path]:
    """Return the folders of what is graded and has no feedback yet."""
    return [
        graded
        for graded in course.glob("autograded/*/*")
        if not (course / "feedback" / Path(*graded.parts[-2:])).exists()
    ]


def _is_graded(course: Path, folder: Path) -> bool:
    graded = _notebook(course / "autograded" / Path(*folder.parts[-2:]))
    handed_in = _notebook(folder)
    return (
        graded.exists()
        and handed_in.exists()
        and graded.stat().st_mtime > handed_in.stat().st_mtime
    )


def _grade(course: Path, folder: Path, limits: Limits) -> str:
    """Grade one submission. Return what is wrong with it, if nbgrader can't read it, and give it no points then."""
    student, notebook = folder.parts[-2:]
    with _gradebook(course) as gradebook:
        gradebook.update_or_create_student(student)
    shutil.rmtree(course / "feedback" / student / notebook, ignore_errors=True)  # on what was there
    if not (course / "release" / notebook).is_dir():
        problem = "no notebook of this class has the folder's name"
    elif not _notebook(folder).is_file():
        problem = f"the folder holds no {notebook}.ipynb"
    else:
        problem = _nbgrader(
            course,
            _LEAST + 8 * limits.by_the_clock,
            *("autograde", notebook, f"--student={student}", "--force"),
            *(f"--GradeCells.seconds={limits.seconds}", f"--GradeCells.gib={limits.gib}"),
        )
    if problem:
        with _gradebook(course) as gradebook, suppress(MissingEntry):
            gradebook.remove_submission(notebook, student)
    return problem


def _load_nothing(page: Path) -> None:
    """Take the script for formulas away, which a browser would fetch from another site; they stay as TeX."""
    text = page.read_text(encoding="utf-8")
    if (kept := _REMOTE.sub("", text)) != text:
        page.write_text(kept, encoding="utf-8")


def _nbgrader(course: Path, seconds: float, *arguments: str) -> str:
    """Run a command of nbgrader with limits. Return why it failed, if it did."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nbgrader", *arguments],
        cwd=course,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY)),
    )
    try:
        said = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        return f"nbgrader had not ended after {seconds:g} s"
    finally:
        _end(process)
    if not process.returncode:
        return ""
    lines = _ERROR.findall(said) or said.splitlines()[-1:]
    return lines[0][:300] if lines else f"nbgrader ended with {process.returncode}"


def _end(process: subprocess.Popen) -> None:
    """Kill a process and all of its group, if there is any left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _notebook(folder: Path) -> Path:
    return folder / f"{folder.name}.ipynb"


def _gradebook(course: Path) -> Gradebook:
    return Gradebook(f"sqlite:///{course / 'gradebook.db'}", "siglip")


def _points(course: Path, student: str, notebook: str) -> str:
    with _gradebook(course) as gradebook:
        found = gradebook.find_submission(notebook, student)
        return f"{found.score:g} of {found.max_score:g} points"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--course", type=Path, default=COURSE, help="folder that make_class.py wrote"
    )
    parser.add_argument(
        "--seconds", type=float, default=Limits.seconds, help="of a core, for one answer"
    )
    parser.add_argument("--gib", type=float, default=Limits.gib, help="of memory for one answer")
    options = parser.parse_args()
    course = options.course.resolve()
    find_programs()
    if not (course / "gradebook.db").exists():
        parser.error(f"{course} holds no class; `make class` makes one")
    if not landlock.version():
        print(
            "this kernel offers no Landlock: answers can read and write what you can",
            file=sys.stderr,
        )
    flagged = grade_class(course, Limits(options.seconds, options.gib))
    print(f"grades: {course / 'grades.csv'}; feedback: {course / 'feedback'}")
    if flagged:
        print(f"{len(flagged)} without a grade, see {course / 'flagged.csv'}")


if __name__ == "__main__":
    main()
