"""Make a course for nbgrader from the notebooks: build/class with source/, release/ and the gradebook.

    make class

Each notebook is an assignment. An exercise's cell becomes a solution cell, its own text with the folded solution
between nbgrader's markers, and below it a locked test cell, worth as many points as the exercise has minutes. Students
get release/: the stub is the notebook's own, and neither folded solutions nor stored outputs are in it, so that no
output tells what a prediction asks before its cell has run. The paragraph below that explains the outcome stays: it
hides nothing, and the text goes on from there.

A first cell says so, since the texts speak of outputs that were stored, and how to answer and hand in.

Running it again renews the assignments; submissions and grades stay. All is made in a folder aside, with a copy of the
gradebook, and takes its place when nothing went wrong.
"""

import argparse
import fcntl
import itertools
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.apps import NbGraderAPI
from traitlets.config import PyFileConfigLoader

ROOT = Path(__file__).parent.parent
COURSE = ROOT / "build/class"

_CHECK = re.compile(r'^check_exercise\("(\d\d)\.(\d)", (\w+)\)$', re.MULTILINE)
_FOLDED = re.compile(r"<details><summary>Solution</summary>.*?</details>", re.DOTALL)
_CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
_MINUTES = re.compile(r"^\*\*(\d) \((\d+) minutes", re.MULTILINE)
_ERROR = re.compile(r"^ *(\w*Error: .*)$", re.MULTILINE)  # of a traceback
_LINK = re.compile(r"\]\((\d\d_\w+)\.ipynb\)")

_NOTE = """\
> **An assignment.** This copy of `notebooks/{name}.ipynb` holds no stored outputs. Where the text speaks of a stored
> output, picture or figure, look into that notebook: in the repository that the library comes from, or on its website.
> `make` and `git` in the text mean that repository; neither brings a copy of yours back.
>
> **Answer** an exercise in its cell. The locked cell below says whether it is right; an error there gives the reason
> why it is not, and stops nothing: *Run All* goes on. **Hand in** this file, saved under its name, finished or not.
"""
_ANSWER = """\
{stub}
### BEGIN SOLUTION
{solution}### END SOLUTION
{rest}"""
_TEST = """\
from siglip_lib.classroom.exercises import require_exercise

require_exercise("{number}", {name})"""
_CONFIG = """\
# Written by tools/make_class.py, anew each time.
import sys

sys.path.insert(0, {tools!r})
from class_submission import GradeCells, RestoreCells
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    ClearOutput,
    OverwriteCells,
    OverwriteKernelspec,
    SaveAutoGrades,
)

c = get_config()
c.CourseDirectory.course_id = "siglip"
c.ClearSolutions.code_stub = {{"python": ""}}  # the stub stands above the solution
c.Autograde.sanitize_preprocessors = [
    ClearOutput,
    RestoreCells,
    OverwriteKernelspec,
    OverwriteCells,
    CheckCellMetadata,
]
# GradeCells instead of nbgrader's Execute, so that nothing of a submission runs in nbgrader's own kernel
c.Autograde.autograde_preprocessors = [
    GradeCells,
    SaveAutoGrades,
    AssignLatePenalties,
    CheckCellMetadata,
]
"""


def class_source(notebook: NotebookNode) -> NotebookNode:
    """Return a notebook in the form that ``nbgrader generate_assignment`` reads.

    Raises:
        ValueError: an exercise lacks its minutes, its solution or its check.
    """
    notebook = nbformat.from_dict(notebook)  # a copy
    minutes: dict[str, int] = {}
    answers: dict[str, NotebookNode] = {}  # their cells, by the exercise's number
    cells, below_solution = [], False
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            minutes |= {number: int(count) for number, count in _MINUTES.findall(cell.source)}
            text = _FOLDED.sub("", cell.source).strip()
            cell.source = _LINK.sub(r"](../\1/\1.ipynb)", text)
            cells += [cell] if text else []
            below_solution = not text
            continue
        if below_solution and not cell.source.startswith("count_predictions"):
            continue  # it applies the solution
        cell.outputs, cell.execution_count = [], None
        cells.append(cell)
        if check := _CHECK.search(cell.source):
            number = f"{check[1]}.{check[2]}"
            if number in answers:
                raise ValueError(f"exercise {number}: two cells have this number")
            if check[2] not in minutes:
                expected = f'a line above its cell that begins with "**{check[2]} (5 minutes"'
                raise ValueError(f"exercise {number}: no minutes; expected {expected}")
            solution = _solution(notebook.cells[place + 1 :], number)
            stub, rest = cell.source[: check.start()], cell.source[check.end() :]
            cell.source = _ANSWER.format(stub=stub.rstrip(), solution=solution, rest=rest.lstrip())
            _mark(cell, f"answer-{check[1]}-{check[2]}", solution=True)
            cells.append(_test_cell(check, minutes[check[2]]))
            answers[number] = cell
    if lost := minutes.keys() - {number[-1] for number in answers}:
        form = f'check_exercise("NN.{min(lost)}", name), on a line of its own'
        raise ValueError(f"exercise {min(lost)}: it has minutes, and no cell has its {form}")
    notebook.cells = cells
    return notebook


def _solution(below: list[NotebookNode], number: str) -> str:
    """Return the folded solution from the text below an exercise's cell; hints may stand above it."""
    text = itertools.takewhile(lambda cell: cell.cell_type != "code", below)
    folded = _FOLDED.findall("\n".join(cell.source for cell in text))
    found = [code for solution in folded for code in _CODE.findall(solution)]
    if len(found) != 1:
        form = "<details><summary>Solution</summary> with one block of ```python below its cell"
        raise ValueError(f"exercise {number}: {len(found)} solutions; expected {form}")
    return found[0]


def _test_cell(check: re.Match, points: int) -> NotebookNode:
    grade_id = f"check-{check[1]}-{check[2]}"
    source = _TEST.format(number=f"{check[1]}.{check[2]}", name=check[3])
    cell = nbformat.v4.new_code_cell(source, id=grade_id)
    cell.metadata["tags"] = ["raises-exception"]  # Run All goes on below the error
    _mark(cell, grade_id, solution=False, points=points)
    return cell


def _mark(cell: NotebookNode, grade_id: str, solution: bool, **points: int) -> None:
    """Tell nbgrader what a cell is: one for an answer, or a locked one that gives points."""
    kind = {"solution": solution, "grade": not solution, "locked": not solution, "task": False}
    cell.metadata["nbgrader"] = NotebookNode(
        grade_id=grade_id, schema_version=3, cell_type="code", **kind, **points
    )


def make_class(course: Path, paths: list[Path]) -> list[str]:
    """Write the course, and have nbgrader make what students get.

    Returns:
        A sentence on each notebook that was graded with other points.

    Raises:
        ValueError: a notebook is not as it must be, or has other exercises than what is graded of it.
        RuntimeError: the course is being graded, or nbgrader refuses, with what it says.
            In all these cases nothing is changed.
    """
    sources = {path.stem: _read(path) for path in paths}
    course.mkdir(parents=True, exist_ok=True)
    with (course / "grading.lock").open("w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{course} is in use by `make grade`; try again after it") from None
        return _renew(course, sources)


def _renew(course: Path, sources: dict[str, NotebookNode]) -> list[str]:
    """Make the assignments with a copy of the gradebook, then put all in place."""
    gradebook, notes = course / "gradebook.db", []
    with tempfile.TemporaryDirectory(dir=course, prefix=".made-") as folder:
        made = Path(folder)
        if gradebook.exists():
            with Gradebook(f"sqlite:///{gradebook}", "siglip") as graded:
                notes = [_changed(graded, name, source) for name, source in sources.items()]
            shutil.copy2(gradebook, made)
        _generate(made, sources)
        for name in sources:
            _put(made / "source" / name, course / "source" / name)
            _put(made / "release" / name, course / "release" / name)
        for file in ("nbgrader_config.py", gradebook.name):
            (made / file).replace(course / file)
    return [note for note in notes if note]


def _read(path: Path) -> NotebookNode:
    """Return the source of an assignment, with the note for students on top."""
    try:
        source = class_source(nbformat.read(path, 4))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    note = nbformat.v4.new_markdown_cell(_NOTE.format(name=path.stem).rstrip(), id="assignment")
    source.cells.insert(0, note)
    return source


def _changed(gradebook: Gradebook, name: str, source: NotebookNode) -> str:
    """Say whose points changed in a notebook that is graded already; refuse other exercises."""
    try:
        notebook = gradebook.find_notebook(name, name)
    except MissingEntry:
        return ""
    if not (count := len(notebook.submissions)):
        return ""
    graded = "1 submission is" if count == 1 else f"{count} submissions are"
    before = {_number(cell.name): int(cell.max_score) for cell in notebook.grade_cells}
    marks = [cell.metadata.nbgrader for cell in source.cells if "nbgrader" in cell.metadata]
    now = {_number(mark.grade_id): mark.points for mark in marks if mark.grade}
    if differ := ", ".join(sorted(before.keys() ^ now.keys())):
        raise ValueError(
            f"{name}.ipynb: exercise {differ} was added or removed, and {graded} graded. Nothing was changed. Make "
            f"another course, --course FOLDER, or remove the grades of this assignment: in the course's folder, "
            f"nbgrader db assignment remove {name} --force"
        )
    changed = [f"{n} from {before[n]} to {now[n]}" for n in now if before[n] != now[n]]
    again = f"{graded} to be graded again, by `make grade`"
    return f"{name}: points changed, {', '.join(changed)}; {again}" if changed else ""


def _number(grade_id: str) -> str:
    """Return "03.1" for "check-03-1"."""
    return grade_id.removeprefix("check-").replace("-", ".")


def _generate(course: Path, sources: dict[str, NotebookNode]) -> None:
    """Have nbgrader make a release of each source, and enter it into the gradebook."""
    config = course / "nbgrader_config.py"
    config.write_text(_CONFIG.format(tools=str(Path(__file__).parent)), encoding="utf-8")
    settings = PyFileConfigLoader(config.name, path=str(course)).load_config()
    settings.CourseDirectory.root = str(course)
    nbgrader = NbGraderAPI(config=settings)
    for name, source in sources.items():
        target = course / "source" / name / f"{name}.ipynb"
        target.parent.mkdir(parents=True)
        nbformat.write(source, target)
        done = nbgrader.generate_assignment(name, force=True)
        if not done["success"]:
            said = _ERROR.findall(done["log"]) or done["log"].strip().splitlines()[-1:]
            raise RuntimeError(f"{name}.ipynb: nbgrader refuses it: {''.join(said[:1])}")


def _put(new: Path, place: Path) -> None:
    """Move a folder to its place; one that is there goes where the new one was made, and away with it."""
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        place.rename(new.with_name(f"{new.name}.old"))
    new.rename(place)


def find_programs() -> None:
    """Let nbgrader find alembic, which it calls by its name, where Python's own programs are."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--course", type=Path, default=COURSE, help="folder to write")
    parser.add_argument(
        "notebooks", type=Path, nargs="*", help="all of the series, if none is named"
    )
    options = parser.parse_args()
    find_programs()
    paths = options.notebooks or sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
    try:
        notes = make_class(options.course.resolve(), paths)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"make_class: {error}")
    print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr)
    print(f"{len(paths)} assignments: hand out {options.course / 'release'}", file=sys.stderr)


if __name__ == "__main__":
    main()
