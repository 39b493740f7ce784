"""Grade what students handed in: build/class/submitted/STUDENT/NOTEBOOK/NOTEBOOK.ipynb.

    make grade

Writes, in build/class,
- grades.csv: a row for each student and each notebook that anyone handed in, with what became of it,
- feedback/: a page for each, with the reason for each point that is missing,
- flagged.csv: what could not be graded, and why. An earlier grade of that student and notebook stays.

What was graded or flagged is left alone until the submission, or an exercise's test or points, change: graded/ holds a
digest of both, so a run that was stopped can be started again. To have all graded anew, delete graded/. To have pages
written anew, as after points were changed by hand, delete feedback/. A grade stays when its submission is deleted;
``nbgrader db student remove STUDENT --force``, called in the course, takes a student out.

Each submission has a process of its own, with a limit of time and one of memory, in which nbgrader reads it; each
answer has another (see ``siglip_lib.classroom.grading``, also for what it does not protect against).
"""

import argparse
import csv
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import nbformat
import nbgrader
from make_class import COURSE, find_programs
from nbgrader.api import Gradebook, MissingEntry

from siglip_lib.classroom.grading import Limits, landlock
from siglip_lib.classroom.grading.limits import end_with_parent

_MEMORY = 12 * 2**30  # bytes of addresses for nbgrader, and for each process that it starts
# what nbgrader takes for no pattern, and a spreadsheet for no formula
_STUDENT = re.compile(r"\w[\w .,@+'()-]*")
_LEAST = 300  # seconds for nbgrader itself, on a busy machine
_ERROR = re.compile(r"^ *([\w.]*(?:Error|Exception)\b(?:: .*)?)$", re.MULTILINE)  # of a traceback
_NO_NOTEBOOK = {  # what such an error says of a file
    "UnicodeDecodeError": "the file is no notebook: it is not text",
    "JSON": "the file is no notebook, or was cut short: it is not JSON",
    "ValidationError": "the file is no notebook: its JSON is not in the form of Jupyter's notebooks",
    "MemoryError": "the file is too large for the memory that reading it may take",
}
_PAGE = (
    "--HTMLExporter.template_file=page.html.j2",
    f"--HTMLExporter.extra_template_basedirs={Path(__file__).parent}",
    "--HTMLExporter.extra_template_basedirs="
    f"{Path(nbgrader.__file__).parent / 'server_extensions/formgrader/templates'}",
)
_COLUMNS = "student_id", "assignment", "status", "score", "max_score", "late_penalty", "timestamp"


@dataclass(frozen=True)
class Record:
    """What became of a submission.

    Attributes:
        submission: the digest of what was handed in, or nothing if it should be tried again.
        exercises: the digest of the exercises that it was graded against.
        problem: why it could not be graded, or nothing.
        graded: whether the gradebook holds a grade, of this submission or, where that has a problem, an earlier one.
    """

    submission: str = ""
    exercises: str = ""
    problem: str = ""
    graded: bool = False


def grade_class(course: Path, limits: Limits) -> list[tuple[str, str, str]]:
    """Grade what is new, write feedback and CSV, and return the flagged: student, notebook, reason."""
    # Jupyter and unzip leave hidden folders behind
    students = sorted(path for path in course.glob("submitted/[!.]*") if path.is_dir())
    with _gradebook(course) as gradebook:
        for student in students:
            gradebook.update_or_create_student(student.name)
    handed_in = [
        path for student in students for path in sorted(student.glob("[!.]*")) if path.is_dir()
    ]
    new = [path for path in handed_in if not _is_done(course, path)]
    for place, folder in enumerate(new, start=1):
        _tell(course, folder, f"{place} of {len(new)}")
        record = _grade(course, folder, limits)
        file = _record_file(course, folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(dataclasses.asdict(record)), encoding="utf-8")
        print(record.problem or _points(course, folder), flush=True)
    for notebook in sorted({path.name for path in _without_feedback(course)}):
        print(f"feedback on {notebook} ...", flush=True)
        if problem := _nbgrader(course, 4 * _LEAST, "generate_feedback", notebook, *_PAGE):
            print(f"feedback on {notebook}: {problem}", file=sys.stderr)
    records = [(*path.parts[-2:], _record(course, path).problem) for path in handed_in]
    flagged = _misplaced(course) + [record for record in records if record[-1]]
    _write_csv(course / "flagged.csv", ("student_id", "notebook", "reason"), flagged)
    _write_csv(course / "grades.csv", _COLUMNS, _grades(course, handed_in, flagged))
    return flagged


def _tell(course: Path, folder: Path, place: str) -> None:
    """Say what is graded now: it may take minutes."""
    before = _record(course, folder)
    again = before.graded and before.exercises != _exercises(course, folder)
    why = " (its exercises have changed since)" if again else ""
    print(f"{place}: {' '.join(folder.parts[-2:])}{why} ... ", end="", flush=True)


def _misplaced(course: Path) -> list[tuple[str, str, str]]:
    """Return what lies where no notebook is looked for."""
    files = [*course.glob("submitted/[!.]*.ipynb"), *course.glob("submitted/[!.]*/[!.]*.ipynb")]
    reason = "it lies in no folder of its own: submitted/STUDENT/NOTEBOOK/NOTEBOOK.ipynb is wanted"
    return [
        ("" if path.parent.name == "submitted" else path.parent.name, path.name, reason)
        for path in sorted(files)
        if path.is_file()
    ]


def _grades(course: Path, handed_in: list[Path], flagged: list[tuple[str, str, str]]) -> list:
    """Return the rows of grades.csv. Where there is no grade the score is empty, so that it is not taken for a 0."""
    problems = {(student, notebook): reason for student, notebook, reason in flagged}
    with _gradebook(course) as gradebook:
        pairs = {(student.id, path.name) for student in gradebook.students for path in handed_in}
        pairs |= {
            (submission.student.id, assignment.name)
            for assignment in gradebook.assignments
            for submission in assignment.submissions
        }
        rows = []
        for student, notebook in sorted(pairs | problems.keys()):
            status, figures = "not handed in", ("", "", "", "")
            with suppress(MissingEntry):
                figures = ("", gradebook.find_assignment(notebook).max_score, "", "")
                found = gradebook.find_submission(notebook, student)
                penalty = found.late_submission_penalty
                score = max(0.0, found.score - penalty)
                status, figures = "graded", (score, found.max_score, penalty, found.timestamp)
            if problem := problems.get((student, notebook)):
                kept = " (the grade is of what was handed in before)" if status == "graded" else ""
                status = f"flagged: {problem}{kept}"
            rows.append((student, notebook, status, *figures))
    return rows


def _write_csv(path: Path, columns: tuple[str, ...], rows: list) -> None:
    """Write a table, whole or not at all, in which a spreadsheet takes nothing for a formula."""
    new = path.with_suffix(".new")
    with new.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for row in rows:
            table.writerow(
                [re.sub(r"^[=+@-]", r"'\g<0>", one) if isinstance(one, str) else one for one in row]
            )
    new.replace(path)


def _without_feedback(course: Path) -> list[Path]:
    """Return the folders of what is graded and has no feedback yet."""
    return [
        graded
        for graded in course.glob("autograded/*/*")
        if not any((course / "feedback" / Path(*graded.parts[-2:])).glob("*.html"))
    ]


def _is_done(course: Path, folder: Path) -> bool:
    """Tell whether a submission was graded or flagged, and nothing changed since."""
    record = _record(course, folder)
    now = _digest(course, folder), _exercises(course, folder)
    if (record.submission, record.exercises) != now:
        return False
    if record.problem:
        return True
    with _gradebook(course) as gradebook, suppress(MissingEntry):  # a student may have been removed
        return bool(gradebook.find_submission(folder.name, folder.parent.name))
    return False


def _record_file(course: Path, folder: Path) -> Path:
    return course / "graded" / folder.parent.name / f"{folder.name}.json"


def _record(course: Path, folder: Path) -> Record:
    """Read what became of a submission: of one that is new, or of whose record a stopped run wrote half, nothing."""
    with suppress(OSError, ValueError):
        return Record(**json.loads(_record_file(course, folder).read_text(encoding="utf-8")))
    return Record()


def _digest(course: Path, folder: Path) -> str:
    """Tell what was handed in by its contents: a copy may keep the time of what it was copied from."""
    if misfit := _misfit(course, folder):
        return misfit
    files = _notebook(folder), folder / "timestamp.txt"  # the time that nbgrader reads
    content = [path.read_bytes() if path.is_file() else b"" for path in files]
    return hashlib.sha256(b"\0".join(content)).hexdigest()


def _exercises(course: Path, folder: Path) -> str:
    """Return the digest of what is tested in a notebook of the class, and for how many points."""
    released = course / "release" / folder.name / f"{folder.name}.ipynb"
    if not released.is_file():
        return "none"
    tests = [
        (cell.source, cell.metadata.nbgrader.points)
        for cell in nbformat.read(released, 4).cells
        if cell.metadata.get("nbgrader", {}).get("grade")
    ]
    return hashlib.sha256(json.dumps(tests).encode()).hexdigest()


def _grade(course: Path, folder: Path, limits: Limits) -> Record:
    """Grade one submission. If it can't be read, an earlier grade stays, with its feedback."""
    student, notebook = folder.parts[-2:]
    before = _record(course, folder)
    copy = course / "autograded" / student / notebook
    aside = _record_file(course, folder).with_suffix(".before")
    if aside.exists():  # a run was stopped
        shutil.rmtree(copy, ignore_errors=True)
    elif copy.exists() and before.graded:
        aside.parent.mkdir(parents=True, exist_ok=True)
        copy.rename(aside)
    misfit = _misfit(course, folder)
    problem = misfit or _nbgrader(
        course,
        _LEAST + 8 * limits.by_the_clock,
        *("autograde", notebook, f"--student={student}", "--force"),
        *(f"--GradeCells.seconds={limits.seconds}", f"--GradeCells.gib={limits.gib}"),
    )
    if not problem:
        shutil.rmtree(course / "feedback" / student / notebook, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        shutil.rmtree(copy, ignore_errors=True)
        if aside.exists():
            aside.rename(copy)
        with _gradebook(course) as gradebook, suppress(MissingEntry):
            if not before.graded:
                gradebook.remove_submission(notebook, student)
    of_the_file = misfit or problem in _NO_NOTEBOOK.values()  # and not of this machine
    return Record(
        submission=_digest(course, folder) if of_the_file or not problem else "",
        exercises=_exercises(course, folder),
        problem=problem,
        graded=before.graded or not problem,
    )


def _misfit(course: Path, folder: Path) -> str:
    """Return why nbgrader should not look at a submission at all, if so."""
    if not (course / "release" / folder.name).is_dir():
        return "no notebook of this class has the folder's name"
    if folder.is_symlink() or any(path.is_symlink() for path in folder.rglob("*")):
        return "it is or holds a symbolic link, which could lead to others' answers"
    if not _notebook(folder).is_file():
        return f"the folder holds no {folder.name}.ipynb"
    return ""


def _nbgrader(course: Path, seconds: float, *arguments: str) -> str:
    """Run a command of nbgrader with limits. Return why it failed, if it did."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nbgrader", *arguments],
        cwd=course,
        # without its settings nbgrader would go on, and run answers itself
        env=os.environ | {"TRAITLETS_APPLICATION_RAISE_CONFIG_FILE_ERROR": "1"},
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
    error = lines[0][:300] if lines else f"nbgrader ended with {process.returncode}"
    return next((said for name, said in _NO_NOTEBOOK.items() if name in error), error)


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


def _points(course: Path, folder: Path) -> str:
    with _gradebook(course) as gradebook:
        found = gradebook.find_submission(folder.name, folder.parent.name)
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
    if not all((course / name).exists() for name in ("gradebook.db", "nbgrader_config.py")):
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
        print(f"{len(flagged)} could not be graded, see {course / 'flagged.csv'}")


if __name__ == "__main__":
    main()
