"""Make a course for nbgrader from the notebooks: build/class with source/, release/ and the gradebook.

    make class

Each notebook is an assignment. An exercise's cell becomes a solution cell, its own text with the folded solution
between nbgrader's markers, and below it a locked test cell, worth as many points as the exercise has minutes. Students
get release/: the stub is the notebook's own, and neither folded solutions nor stored outputs are in it, so that no
output tells what a prediction asks before its cell has run. The paragraph below that explains the outcome stays: it
hides nothing, and the text goes on from there.

Running it again renews both folders; gradebook, submissions and grades stay.
"""

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbgrader.apps import NbGraderAPI
from traitlets.config import PyFileConfigLoader

ROOT = Path(__file__).parent.parent
COURSE = ROOT / "build/class"

_CHECK = re.compile(r'^check_exercise\("(\d\d)\.(\d)", (\w+)\)$', re.MULTILINE)
_FOLDED = re.compile(r"<details><summary>Solution</summary>.*?</details>", re.DOTALL)
_CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
_MINUTES = re.compile(r"^\*\*(\d) \((\d+) minutes", re.MULTILINE)
_LINK = re.compile(r"\]\((\d\d_\w+)\.ipynb\)")

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
    """Return a notebook in the form that ``nbgrader generate_assignment`` reads."""
    notebook = nbformat.from_dict(notebook)  # a copy
    minutes: dict[str, int] = {}
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
            (solution,) = _CODE.findall(_FOLDED.search(notebook.cells[place + 1].source)[0])
            stub, rest = cell.source[: check.start()], cell.source[check.end() :]
            cell.source = _ANSWER.format(stub=stub.rstrip(), solution=solution, rest=rest.lstrip())
            _mark(cell, f"answer-{check[1]}-{check[2]}", solution=True)
            cells.append(_test_cell(check, minutes[check[2]]))
    notebook.cells = cells
    return notebook


def _test_cell(check: re.Match, points: int) -> NotebookNode:
    grade_id = f"check-{check[1]}-{check[2]}"
    source = _TEST.format(number=f"{check[1]}.{check[2]}", name=check[3])
    cell = nbformat.v4.new_code_cell(source, id=grade_id)
    _mark(cell, grade_id, solution=False, points=points)
    return cell


def _mark(cell: NotebookNode, grade_id: str, solution: bool, **points: int) -> None:
    """Tell nbgrader what a cell is: one for an answer, or a locked one that gives points."""
    kind = {"solution": solution, "grade": not solution, "locked": not solution, "task": False}
    cell.metadata["nbgrader"] = NotebookNode(
        grade_id=grade_id, schema_version=3, cell_type="code", **kind, **points
    )


def make_class(course: Path, paths: list[Path]) -> None:
    """Write the course, and have nbgrader make what students get.

    Raises:
        RuntimeError: nbgrader could not, with what it says.
    """
    course.mkdir(parents=True, exist_ok=True)
    config = course / "nbgrader_config.py"
    config.write_text(_CONFIG.format(tools=str(Path(__file__).parent)), encoding="utf-8")
    shutil.rmtree(course / "source", ignore_errors=True)
    settings = PyFileConfigLoader(config.name, path=str(course)).load_config()
    settings.CourseDirectory.root = str(course)
    nbgrader = NbGraderAPI(config=settings)
    for path in paths:
        target = course / "source" / path.stem / path.name
        target.parent.mkdir(parents=True)
        nbformat.write(class_source(nbformat.read(path, 4)), target)
        done = nbgrader.generate_assignment(path.stem, force=True)
        if not done["success"]:
            raise RuntimeError(f"{path.name}: {done['log']}")


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
    make_class(options.course.resolve(), paths)
    print(f"{len(paths)} assignments: hand out {options.course / 'release'}", file=sys.stderr)


if __name__ == "__main__":
    main()
