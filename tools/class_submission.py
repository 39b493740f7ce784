"""How nbgrader grades a submission of `make class`: two preprocessors that nbgrader_config.py names."""

import copy
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbgrader.preprocessors import NbGraderPreprocessor
from traitlets import Float

from siglip_lib.classroom.grading import Answer, Limits, grade_apart

_TEST = re.compile(r'^require_exercise\("(\d\d\.\d)", (\w+)\)$', re.MULTILINE)


class RestoreCells(NbGraderPreprocessor):
    """Give the cells that nbgrader knows its own marks again, take foreign marks away, add test cells that are gone.

    nbgrader's own OverwriteCells then restores the text of what is locked.
    """

    def preprocess(self, notebook: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        names = resources["nbgrader"]
        released = Path("release", names["assignment"], f"{names['notebook']}.ipynb")
        known = {
            cell.metadata.nbgrader.grade_id: cell
            for cell in nbformat.read(released, 4).cells
            if "nbgrader" in cell.metadata
        }
        for cell in reversed(notebook.cells):  # of copies of a cell the last one counts
            mark = cell.metadata.pop("nbgrader", None)
            grade_id = str(mark.get("grade_id")) if isinstance(mark, dict) else None
            if original := known.pop(grade_id, None):
                cell.metadata.nbgrader = original.metadata.nbgrader
        gone = [cell for cell in known.values() if cell.metadata.nbgrader.grade]
        notebook.cells += copy.deepcopy(gone)
        return notebook, resources


class GradeCells(NbGraderPreprocessor):
    """Grade each answer in a limited process, and write the verdict where nbgrader looks: below the test cell."""

    seconds = Float(60, help="of a core, for one answer and its check").tag(config=True)
    gib = Float(4, help="GiB of memory for one answer").tag(config=True)

    def preprocess(self, notebook: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        places = {_grade_id(cell): place for place, cell in enumerate(code)}
        tests, answers = [], []
        for place, cell in enumerate(code):
            if _grade_id(cell).startswith("check-"):
                number, name = _TEST.search(cell.source).groups()
                end = max(place, places.get(_answer_id(cell), -1) + 1)
                cells = [
                    one.source for one in code[:end] if not _grade_id(one).startswith("check-")
                ]
                tests.append(cell)
                answers.append(Answer(number, name, cells))
        verdicts = grade_apart(answers, Limits(self.seconds, self.gib))
        for cell, answer, verdict in zip(tests, answers, verdicts, strict=True):
            if verdict != "right" and _answer_id(cell) not in places:
                verdict += "; the cell for this answer was deleted"
            cell.outputs = [_output(f"exercise {answer.number}: {verdict}", verdict == "right")]
        return notebook, resources


def _grade_id(cell: NotebookNode) -> str:
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


def _answer_id(test: NotebookNode) -> str:
    return _grade_id(test).replace("check-", "answer-")


def _output(said: str, right: bool) -> NotebookNode:
    if right:
        return nbformat.from_dict({"output_type": "stream", "name": "stdout", "text": f"{said}\n"})
    error = "WrongAnswer"
    return nbformat.v4.new_output("error", ename=error, evalue=said, traceback=[f"{error}: {said}"])
