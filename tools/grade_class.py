"""Grade what students handed in: build/class/submitted/STUDENT/NOTEBOOK/NOTEBOOK.ipynb.

    make grade

Writes, in build/class, grades.csv of all students and notebooks, feedback/ with the reason for each point that is
missing, and flagged.csv of submissions that nbgrader could not read: they count 0. Submissions that are graded, and
have not changed since, are left alone: graded/ holds a digest of each, so a run that was stopped can be started again.
To have them graded anew, delete it.

Each submission has a process of its own, with a limit of time and one of memory, in which nbgrader reads it; each
answer has another (see ``siglip_lib.classroom.grading``, also for what it does not protect against).
"""

import argparse
import csv
import fcntl
import hashlib
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
from siglip_lib.classroom.grading.limits import end_with_parent

_MEMORY = 12 * 2**30  # bytes of addresses for nbgrader, and for each process that it starts
_REMOTE = re.compile(r'<script src="https?:[^>]*>\s*</script>')
_POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "style-src 'unsafe-inline'; img-src data:; font-src data:; form-action 'none'\">"
)
_STUDENT = re.compile(
    r"\w[\w .,@+'()-]*"
)  # what nbgrader takes for no pattern, and a spreadsheet for no formula
_ERROR = re.compile(r"^ *([\w.]*(?:Error|Exception)\b: .*)$", re.MULTILINE)  # of a traceback
_LEAST = 300  # seconds for nbgrader itself, on a busy machine


def grade_class(course: Path, limits: Limits) -> list[tuple[str, str, str]]:
    """Grade what is new, write feedback and CSV, and return the flagged: student, notebook, reason."""
    flagged = []
    # Jupyter and unzip leave hidden folders behind
    handed_in = sorted(path for path in course.glob("submitted/[!.]*/[!.]*") if path.is_dir())
    for folder in handed_in:
        student, notebook = folder.parts[-2:]
        digest, seal = _digest(folder), course / "graded" / student / notebook
        if digest and seal.exists() and seal.read_text(encoding="ascii") == digest:
            continue
        seal.unlink(missing_ok=True)
        if problem := _grade(course, folder, limits):
            flagged.append((student, notebook, problem))
        else:
            seal.parent.mkdir(parents=True, exist_ok=True)
            seal.write_text(digest, encoding="ascii")
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
        if not any((course / "feedback" / Path(*graded.parts[-2:])).glob("*.html"))
    ]


def _digest(folder: Path) -> str:
    """Tell what was handed in by its contents: a copy may keep the time of what it was copied from."""
    notebook = _notebook(folder)
    return hashlib.sha256(notebook.read_bytes()).hexdigest() if notebook.is_file() else ""


def _grade(course: Path, folder: Path, limits: Limits) -> str:
    """Grade one submission. Return what is wrong with it, if nbgrader can't read it, and give it no points then."""
    student, notebook = folder.parts[-2:]
    with _gradebook(course) as gradebook:
        gradebook.update_or_create_student(student)
    for made in "autograded", "feedback":  # of what was there
        shutil.rmtree(course / made / student / notebook, ignore_errors=True)
    if not (course / "release" / notebook).is_dir():
        problem = "no notebook of this class has the folder's name"
    elif folder.is_symlink() or any(path.is_symlink() for path in folder.rglob("*")):
        problem = "it is or holds a symbolic link, which could lead to others' answers"
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
    """Forbid a page to fetch anything, and to run what a student's text holds.

    Of nbconvert's own scripts that one goes which would fetch another for formulas; they stay as TeX.
    """
    text = page.read_text(encoding="utf-8")
    above, head, below = text.partition("<head>")
    if not below.startswith(_POLICY):
        kept = above + head + _POLICY + _REMOTE.sub("", below)
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
        preexec_fn=_limit,
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


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    end_with_parent()


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
    students = [path.name for path in course.glob("submitted/[!.]*")]
    if odd := [name for name in sorted(students) if not _STUDENT.fullmatch(name)]:
        parser.error(f"rename these folders in submitted/, without special characters: {odd}")
    if not landlock.version():
        print(
            "this kernel offers no Landlock: answers can read and write what you can",
            file=sys.stderr,
        )
    with (course / "grading.lock").open("w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"{course} is being graded already")
        flagged = grade_class(course, Limits(options.seconds, options.gib))
    print(f"grades: {course / 'grades.csv'}; feedback: {course / 'feedback'}")
    if flagged:
        print(f"{len(flagged)} without a grade, see {course / 'flagged.csv'}")


if __name__ == "__main__":
    main()
