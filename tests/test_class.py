"""A class from the first command to the last, with the real nbgrader: handed out, handed in, graded, told why."""

import csv
import html
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from notebook_files import PATHS, ROOT, exercises, read

pytest.importorskip("nbgrader", reason="needs nbgrader: make test-class installs it")
from nbgrader.nbgraderformat import MetadataValidator
from wrong_answers import nb03, nb05

SECONDS = 6  # for one answer; a right one of these needs one
POINTS = {"03_attention": [5, 15, 20], "05_layer_scale": [10, 10, 10]}
WRONG = {  # the first wrong answer to each, and what the check says of it
    number: next(iter(answers.items())) for number, answers in (nb03.WRONG | nb05.WRONG).items()
}
CHEAT = """
import siglip_lib.classroom.exercises as exercises

exercises.grade = check_exercise = require_exercise = lambda *answer: "right"


def print(*text):
    raise AssertionError


def drop_path_std(p):
    math.isclose = lambda *numbers, **tolerance: True
    return 1.0
"""
HOSTILE = {
    "03.1": ("def score_std(dim, heads, std):\n    while True:\n        pass", f"had not ended after {SECONDS} s"),
    "03.2": (
        "def keys_seen(std):\n    return torch.empty(10 * 2**30 // 4)",
        "more memory than the 4 GiB",
    ),
    "03.3": (None, "no cell gives 'attend_in_chunks' a value; the cell for this answer was deleted"),
    "05.1": ("import sys\n\n\ndef measure_drop(layer):\n    sys.exit(0)", "ended Python with sys.exit"),
    "05.2": (CHEAT, "replaced math.isclose"),
    "05.3": ("import os\n\n\ndef fold(linear, gamma):\n    os._exit(0)", "ended Python, with exit status 0"),
}  # fmt: skip
SOLUTIONS = {
    exercise.number: (exercise.solution, "right") for path in PATHS for exercise in exercises(read(path))
}  # fmt: skip
# the hostile one is not the last
STUDENTS = {"bob": WRONG, "mallory": HOSTILE, "zoe": SOLUTIONS}


def run_tool(name: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """The whole series, made for a class."""
    folder = tmp_path_factory.mktemp("class")
    run_tool("make_class.py", "--course", folder)
    return folder


def released(course: Path, name: str) -> nbformat.NotebookNode:
    return read(course / "release" / name / f"{name}.ipynb")


def marked(notebook: nbformat.NotebookNode, kind: str) -> dict[str, nbformat.NotebookNode]:
    """The cells for answers, or the tests, by the number of their exercise."""
    return {
        re.sub(r".*-(\d\d)-(\d)", r"\1.\2", cell.metadata.nbgrader.grade_id): cell
        for cell in notebook.cells
        if cell.metadata.get("nbgrader", {}).get(kind)
    }


def hand_in(course: Path, student: str, name: str, answers: dict) -> None:
    notebook = released(course, name)
    for number, cell in marked(notebook, "solution").items():
        code, _ = answers[number]
        if code is None:
            test = marked(notebook, "grade")[number]
            notebook.cells = [c for c in notebook.cells if c not in (cell, test)]
        else:
            cell.source = code
    if answers is HOSTILE:  # the locked cells are as a student may leave them
        for test in marked(notebook, "grade").values():
            test.source = "print('right')"
            test.metadata.nbgrader.points = 1000
    target = course / "submitted" / student / name
    target.mkdir(parents=True)
    nbformat.write(notebook, target / f"{name}.ipynb")


@pytest.fixture(scope="module")
def graded(course) -> Path:
    """The course after three students handed in two notebooks, and all were graded."""
    for student, answers in STUDENTS.items():
        for name in POINTS:
            hand_in(course, student, name, answers)
    said = run_tool("grade_class.py", "--course", course, "--seconds", SECONDS)
    assert "zoe 03_attention: 40 of 40 points" in said
    return course


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def feedback(course: Path, student: str, name: str) -> str:
    page = course / "feedback" / student / name / f"{name}.html"
    return html.unescape(re.sub("<[^>]+>", "", page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_source_is_what_nbgrader_reads(course, path):
    source = read(course / "source" / path.stem / path.name)
    nbformat.validate(source)
    MetadataValidator().validate_nb(source)
    numbers = [exercise.number for exercise in exercises(read(path))]
    assert [*marked(source, "solution")] == [*marked(source, "grade")] == numbers
    for exercise in exercises(read(path)):
        text = marked(source, "solution")[exercise.number].source
        assert f"### BEGIN SOLUTION\n{exercise.solution}### END SOLUTION" in text


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_points_are_the_minutes_of_the_text(course, path):
    tests = marked(released(course, path.stem), "grade")
    given = {number: cell.metadata.nbgrader.points for number, cell in tests.items()}
    text = "\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    minutes = {f"{path.stem[:2]}.{n}": int(m) for n, m in re.findall(r"\*\*(\d) \((\d+) min", text)}
    assert given == minutes
    if path.stem in POINTS:
        assert [*given.values()] == POINTS[path.stem]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_students_get_is_the_notebook_without_solutions_and_outputs(course, path):
    release, original = released(course, path.stem), read(path)
    nbformat.validate(release)
    assert not [cell.id for cell in release.cells if cell.get("outputs")]
    text = "\n".join(cell.source for cell in release.cells)
    assert "<details>" not in text
    assert "SOLUTION" not in text
    whole = "\n".join(c.source for c in original.cells if not c.source.startswith("<details>"))
    for exercise in exercises(original):
        assert exercise.solution not in text
        for line in exercise.solution.splitlines():
            if len(line) > 20 and line not in whole:
                assert line not in text
    by_id = {cell.id: cell for cell in release.cells}
    for cell in original.cells:
        if cell.id in by_id and cell.cell_type == "code":
            # a stub is the notebook's own, without its check
            own, now = cell.source, by_id[cell.id]
            if "nbgrader" in now.metadata:
                own = re.sub(r"^check_exercise.*\n?", "", own, flags=re.MULTILINE)
            assert now.source.split() == own.split()
        elif cell.id not in by_id and cell.cell_type == "markdown":
            assert re.fullmatch(r"<details>.*</details>", cell.source, re.DOTALL)
    for target in re.findall(r"\]\(([\w./]+\.ipynb)\)", text):
        assert (course / "release" / path.stem / target).exists(), target


def test_code_that_applies_a_solution_goes_with_it(course):
    """Notebook 10 shows what the ensemble of its third exercise finds."""
    text = "\n".join(cell.source for cell in released(course, "10_train_siglip").cells)
    assert "nine templates" not in text
    lost = {cell.id for path in PATHS for cell in gone(course, path) if cell.cell_type == "code"}
    assert lost == {"2e7f7502"}


def gone(course: Path, path: Path) -> list[nbformat.NotebookNode]:
    there = {cell.id for cell in released(course, path.stem).cells}
    return [cell for cell in read(path).cells if cell.id not in there]


def test_a_test_cell_is_locked_and_raises_the_reason(course):
    test = marked(released(course, "03_attention"), "grade")["03.1"]
    assert test.metadata.nbgrader.locked
    assert not test.metadata.editable
    with pytest.raises(Exception, match=r"^exercise 03\.1: wrong: .*random draws give"):
        exec(test.source, {"score_std": lambda *sizes: 1.0})
    with pytest.raises(Exception, match=r"^exercise 03\.1: not answered yet$"):
        exec(test.source, {"score_std": lambda *sizes: None})


def test_every_student_and_notebook_is_in_the_table(graded):
    found = {(row["student_id"], row["assignment"]): row for row in rows(graded / "grades.csv")}
    assert found.keys() == {(student, path.stem) for student in STUDENTS for path in PATHS}
    for name, points in POINTS.items():
        scores = {student: float(found[student, name]["score"]) for student in STUDENTS}
        assert scores == {"bob": 0, "mallory": 0, "zoe": sum(points)}
        assert float(found["zoe", name]["max_score"]) == sum(points)
    assert rows(graded / "flagged.csv") == []


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("student", STUDENTS)
def test_feedback_says_why(graded, student, name):
    page = feedback(graded, student, name)
    for number, (_, reason) in STUDENTS[student].items():
        if number[:2] == name[:2]:
            (verdict,) = set(re.findall(rf"exercise {re.escape(number)}: (.*)", page))
            assert reason in verdict


def test_feedback_loads_nothing_from_elsewhere(graded):
    for page in graded.glob("feedback/*/*/*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?https?:[^>]*", text
        )


def test_what_nbgrader_cannot_read_is_flagged_and_counts_nothing(course, graded):
    target = graded / "submitted/zoe/05_layer_scale/05_layer_scale.ipynb"
    before = target.read_text(encoding="utf-8")
    target.write_text(before[: len(before) // 2], encoding="utf-8")
    (graded / "submitted/yan/03_attention").mkdir(parents=True)
    said = run_tool("grade_class.py", "--course", graded, "--seconds", SECONDS)
    assert "2 without a grade" in said
    flags = {
        (row["student_id"], row["notebook"]): row["reason"] for row in rows(graded / "flagged.csv")
    }
    assert flags.keys() == {("yan", "03_attention"), ("zoe", "05_layer_scale")}
    assert "holds no 03_attention.ipynb" in flags["yan", "03_attention"]
    assert "JSON" in flags["zoe", "05_layer_scale"]
    found = {
        (r["student_id"], r["assignment"]): float(r["score"]) for r in rows(graded / "grades.csv")
    }
    assert found["zoe", "05_layer_scale"] == found["yan", "03_attention"] == 0
    assert found["zoe", "03_attention"] == 40
