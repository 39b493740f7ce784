"""A class from the first command to the last, with the real nbgrader: handed out, handed in, graded, told why."""

import csv
import fcntl
import hashlib
import html
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from notebook_files import PATHS, ROOT, exercises, read

pytest.importorskip("nbgrader", reason="needs nbgrader: make test-class installs it")
from make_class import class_source, find_programs, make_class
from nbgrader.api import Gradebook
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
    assert "5 of 6: zoe 03_attention ... 40 of 40 points" in said
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
    assert f"copy of `notebooks/{path.name}` holds no stored outputs" in release.cells[0].source
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
    """Notebook 10 shows what the bias of its first exercise and the ensemble of its third find."""
    text = "\n".join(cell.source for cell in released(course, "10_train_siglip").cells)
    assert "nine templates" not in text
    lost = {cell.id for path in PATHS for cell in gone(course, path) if cell.cell_type == "code"}
    assert lost == {"c58fe4ce", "2e7f7502"}


def gone(course: Path, path: Path) -> list[nbformat.NotebookNode]:
    there = {cell.id for cell in released(course, path.stem).cells}
    return [cell for cell in read(path).cells if cell.id not in there]


def test_a_test_cell_is_locked_and_raises_the_reason(course):
    test = marked(released(course, "03_attention"), "grade")["03.1"]
    assert test.metadata.nbgrader.locked
    assert test.metadata.tags == ["raises-exception"]
    assert not test.metadata.editable
    with pytest.raises(Exception, match=r"^exercise 03\.1: wrong: .*random draws give"):
        exec(test.source, {"score_std": lambda *sizes: 1.0})
    with pytest.raises(Exception, match=r"^exercise 03\.1: not answered yet$"):
        exec(test.source, {"score_std": lambda *sizes: None})


def test_nbgraders_validation_tells_a_student_the_reason(course, tmp_path):
    notebook = released(course, "03_attention")
    notebook.cells = [
        nbformat.v4.new_code_cell("score_std = None"),
        marked(notebook, "grade")["03.1"],
    ]
    nbformat.write(notebook, tmp_path / "answered.ipynb")
    command = [sys.executable, "-m", "nbgrader", "validate", "answered.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert "exercise 03.1: not answered yet" in done.stdout


def edited(notebook: nbformat.NotebookNode, old: str, new: str) -> nbformat.NotebookNode:
    """A notebook after a teacher's change of its text or its code."""
    (cell,) = (cell for cell in notebook.cells if old in cell.source)
    cell.source = cell.source.replace(old, new)
    return notebook


ATTENTION = next(path for path in PATHS if path.stem == "03_attention")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("**1 (5 minutes", "**1 (5 min", "exercise 03.1: no minutes; expected a line above"),
        ("check_exercise(\"03.2\", keys", "grade(\"03.2\", keys", "exercise 2: it has minutes, and no"),
        ("check_exercise(\"03.2\"", "check_exercise(\"03.1\"", "exercise 03.1: two cells have this"),
        ("```python\n" + exercises(read(ATTENTION))[2].solution, "", "exercise 03.3: 0 solutions"),
    ],
)  # fmt: skip
def test_a_change_that_makes_no_exercise_is_named_before_anything_is_written(
    tmp_path, old, new, said
):
    path = tmp_path / ATTENTION.name
    nbformat.write(edited(read(ATTENTION), old, new), path)
    with pytest.raises(ValueError, match=re.escape(f"{path.name}: {said}")):
        make_class(tmp_path / "class", [path])
    assert not (tmp_path / "class").exists()


def test_a_deleted_solution_and_a_hint_above_one(tmp_path):
    notebook = read(ATTENTION)
    place = next(i for i, cell in enumerate(notebook.cells) if cell.source.startswith("<details>"))
    solution = notebook.cells[place]
    notebook.cells.insert(place, nbformat.v4.new_markdown_cell("A hint: draw it."))
    source = class_source(notebook)
    code = exercises(read(ATTENTION))[0].solution
    assert code in marked(source, "solution")["03.1"].source
    assert "A hint: draw it." in [cell.source for cell in source.cells]
    notebook.cells.remove(solution)
    with pytest.raises(ValueError, match=r"^exercise 03\.1: 0 solutions; expected <details>"):
        class_source(notebook)


@pytest.fixture
def begun(tmp_path, monkeypatch) -> Path:
    """A course of one notebook that a student handed in and that was graded."""
    monkeypatch.setenv("PATH", os.environ["PATH"])
    find_programs()
    make_class(tmp_path / "class", [ATTENTION])
    with Gradebook(f"sqlite:///{tmp_path / 'class/gradebook.db'}", "siglip") as gradebook:
        gradebook.add_student("anna")
        gradebook.add_submission(ATTENTION.stem, "anna")
    return tmp_path / "class"


def digests(course: Path) -> dict[str, str]:
    files = (path for path in course.rglob("*") if path.is_file())
    return {
        str(path.relative_to(course)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def without_the_third_exercise(path: Path) -> None:
    notebook = read(ATTENTION)
    (place,) = (i for i, c in enumerate(notebook.cells) if 'check_exercise("03.3"' in c.source)
    edited(notebook, "**3 (20 minutes", "**3 (later")
    del notebook.cells[place : place + 2]
    nbformat.write(notebook, path)


def test_other_exercises_than_what_is_graded_are_refused_and_nothing_changes(begun, tmp_path):
    path, before = tmp_path / ATTENTION.name, digests(begun)
    without_the_third_exercise(path)
    said = (
        r"^03_attention\.ipynb: exercise 03\.3 was added or removed, and 1 submission is graded\."
    )
    with pytest.raises(ValueError, match=said) as raised:
        make_class(begun, [path])
    assert digests(begun) == before
    command = re.search("nbgrader (db assignment remove .*)$", str(raised.value))[1]
    subprocess.run(
        [sys.executable, "-m", "nbgrader", *command.split()],
        cwd=begun,
        check=True,
        capture_output=True,
    )
    assert make_class(begun, [path]) == []
    assert [*marked(released(begun, path.stem), "grade")] == ["03.1", "03.2"]


def test_other_points_than_what_is_graded_are_told(begun, tmp_path):
    path = tmp_path / ATTENTION.name
    nbformat.write(edited(read(ATTENTION), "**1 (5 minutes", "**1 (8 minutes"), path)
    (note,) = make_class(begun, [path])
    assert "03_attention: points changed, 03.1 from 5 to 8" in note
    assert make_class(begun, [path]) == []
    with Gradebook(f"sqlite:///{begun / 'gradebook.db'}", "siglip") as gradebook:
        assert [one.student.id for one in gradebook.assignment_submissions(path.stem)] == ["anna"]


def test_what_nbgrader_refuses_changes_nothing(begun, tmp_path):
    path, before = tmp_path / ATTENTION.name, digests(begun)
    text = edited(read(ATTENTION), exercises(read(ATTENTION))[0].solution, "### BEGIN SOLUTION\n")
    nbformat.write(text, path)
    with pytest.raises(
        RuntimeError, match=r"^03_attention\.ipynb: nbgrader refuses it: RuntimeError: .*nested"
    ):
        make_class(begun, [path])
    assert digests(begun) == before


def test_a_class_is_not_made_while_it_is_graded(begun):
    before = digests(begun)
    with (begun / "grading.lock").open("w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="is in use by `make grade`"):
            make_class(begun, [ATTENTION])
    assert digests(begun) == before


def test_an_error_is_one_line(tmp_path):
    path = tmp_path / ATTENTION.name
    nbformat.write(edited(read(ATTENTION), "**1 (5 minutes", "**1 (5 min"), path)
    command = [
        sys.executable,
        str(ROOT / "tools/make_class.py"),
        "--course",
        str(tmp_path / "class"),
    ]
    done = subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("make_class: 03_attention.ipynb: exercise 03.1: no minutes")


def table(course: Path) -> dict[tuple[str, str], dict[str, str]]:
    return {(row["student_id"], row["assignment"]): row for row in rows(course / "grades.csv")}


def test_every_student_and_notebook_is_in_the_table(graded):
    found = table(graded)
    assert found.keys() == {(student, name) for student in STUDENTS for name in POINTS}
    assert {row["status"] for row in found.values()} == {"graded"}
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


def test_feedback_begins_with_each_exercise_its_points_and_the_reason(graded):
    page = graded / "feedback/mallory/03_attention/03_attention.html"
    text = page.read_text(encoding="utf-8")
    above = html.unescape(text[text.index("<h1>") : text.index("</table>")])
    assert "mallory: <b>0 of 40 points</b>" in above
    lines = re.findall(r'<a href="#[\w-]+">(.*?)</a></td>\n<td>(.*?)</td>\n<td>(.*?)</td>', above)
    assert [line[:2] for line in lines] == [
        ("03.1", "0 of 5"),
        ("03.2", "0 of 15"),
        ("03.3", "0 of 20"),
    ]
    for number, _, reason in lines:
        assert reason.startswith("wrong: ")
        assert HOSTILE[number][1] in reason


def test_feedback_loads_nothing_from_elsewhere(graded):
    for page in graded.glob("feedback/*/*/*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?https?:[^>]*", text
        )
        # whatever a student's own text asks for
        first = re.search(r"<head>\s*<meta\b([^>]*)>", text)[1]
        assert 'http-equiv="Content-Security-Policy"' in first
        assert "content=\"default-src 'none';" in first
        assert "<script" not in text


def test_what_cannot_be_graded_is_flagged_once_and_an_earlier_grade_stays(course, graded):
    target = graded / "submitted/zoe/05_layer_scale/05_layer_scale.ipynb"
    before = target.read_bytes()
    pages = [graded / made / "zoe/05_layer_scale" for made in ("autograded", "feedback")]
    kept = [sorted(path.read_bytes() for path in folder.iterdir()) for folder in pages]
    target.write_bytes(before[: len(before) // 2])
    junk = {"ann": b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "jo": b"\xff" * 99}
    for student, content in junk.items():
        file = graded / "submitted" / student / "05_layer_scale/05_layer_scale.ipynb"
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
    (graded / "submitted/max").mkdir()
    (graded / "submitted/max/loose.ipynb").write_bytes(before)
    (graded / "submitted/yan/03_attention").mkdir(parents=True)
    (graded / "submitted/yan/.ipynb_checkpoints").mkdir()
    linked = graded / "submitted/eve/03_attention"
    linked.mkdir(parents=True)
    (linked / "03_attention.ipynb").symlink_to(graded / "source/03_attention/03_attention.ipynb")
    said = run_tool("grade_class.py", "--course", graded, "--seconds", SECONDS)
    assert "6 could not be graded" in said
    reasons = {
        ("ann", "05_layer_scale"): "the file is no notebook: its JSON is not in the form",
        ("eve", "03_attention"): "it is or holds a symbolic link",
        ("jo", "05_layer_scale"): "the file is no notebook: it is not text",
        ("max", "loose.ipynb"): "it lies in no folder of its own",
        ("yan", "03_attention"): "the folder holds no 03_attention.ipynb",
        ("zoe", "05_layer_scale"): "the file is no notebook, or was cut short: it is not JSON",
    }
    flagged = {(row["student_id"], row["notebook"]): row for row in rows(graded / "flagged.csv")}
    assert flagged.keys() == reasons.keys()
    found = table(graded)
    for pair, reason in reasons.items():
        assert flagged[pair]["reason"].startswith(reason)
        assert found[pair]["status"].startswith(f"flagged: {reason}")
        if pair[0] != "zoe":
            assert found[pair]["score"] == ""
    assert float(found["zoe", "05_layer_scale"]["score"]) == 30
    assert "was handed in before" in found["zoe", "05_layer_scale"]["status"]
    assert kept == [sorted(path.read_bytes() for path in folder.iterdir()) for folder in pages]
    silent = found["max", "05_layer_scale"]
    assert (silent["status"], silent["score"], silent["max_score"]) == ("not handed in", "", "30.0")
    again = run_tool("grade_class.py", "--course", graded, "--seconds", SECONDS)
    assert " of 1: " not in again
    assert "zoe" not in again
    assert "6 could not be graded" in again


def test_a_change_of_points_has_submissions_graded_again(course, graded):
    """As when a teacher changed a notebook, and made the class again."""
    release = graded / "release/03_attention/03_attention.ipynb"
    before, changed = release.read_bytes(), read(release)
    marked(changed, "grade")["03.1"].metadata.nbgrader.points = 6
    nbformat.write(changed, release)
    others = set((graded / "submitted").glob("*/03_attention"))
    for folder in others - {graded / "submitted/bob/03_attention"}:
        folder.rename(graded / f"aside-{folder.parent.name}")
    said = run_tool("grade_class.py", "--course", graded, "--seconds", SECONDS)
    release.write_bytes(before)
    assert "1 of 1: bob 03_attention (its exercises have changed since) ... 0 of " in said
    assert table(graded)["zoe", "03_attention"]["status"] == "graded"  # though no longer there


def test_a_run_that_was_killed_can_be_started_again(course, graded):
    """nbgrader writes its copy of a notebook before it grades that."""
    hand_in(course, "kim", "05_layer_scale", SOLUTIONS)
    tool = ROOT / "tools/grade_class.py"
    run = subprocess.Popen([sys.executable, tool, "--course", graded], stdout=subprocess.DEVNULL)
    copy = graded / "autograded/kim/05_layer_scale/05_layer_scale.ipynb"
    end = time.monotonic() + 120
    while not copy.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert copy.exists()
    assert run.poll() is None
    run.kill()
    run.wait()
    end = time.monotonic() + 10
    while (alive := nbgraders(graded)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive
    said = run_tool("grade_class.py", "--course", graded, "--seconds", SECONDS)
    assert "kim 05_layer_scale ... 30 of 30 points" in said


def nbgraders(course: Path) -> list[Path]:
    """What of nbgrader still runs there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"nbgrader" in (process / "cmdline").read_bytes():
                found += [process] if (process / "cwd").readlink() == course else []
        except OSError:  # it has ended
            continue
    return found


def test_what_is_handed_in_again_is_graded_again_though_its_time_is_older(course, graded):
    target = graded / "submitted/bob/05_layer_scale/05_layer_scale.ipynb"
    target.unlink()
    target.parent.rmdir()
    hand_in(course, "bob", "05_layer_scale", SOLUTIONS)
    os.utime(target, (0, 0))
    said = run_tool("grade_class.py", "--course", graded, "--seconds", SECONDS)
    assert "bob 05_layer_scale ... 30 of 30 points" in said
    assert "zoe 03_attention" not in said


@pytest.mark.parametrize("name", ["a*", "=1+1", "-x", "a\nb"])
def test_a_folder_that_nbgrader_or_a_spreadsheet_would_misread_is_refused(graded, name):
    folder = graded / "submitted" / name
    folder.mkdir()
    command = [sys.executable, ROOT / "tools/grade_class.py", "--course", graded]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    folder.rmdir()
    assert done.returncode == 2
    assert (
        f"rename these folders in submitted/, without special characters: [{name!r}]" in done.stderr
    )


def test_what_failed_for_no_fault_of_the_file_is_tried_again(course, graded):
    hand_in(course, "ida", "05_layer_scale", SOLUTIONS)
    config = graded / "nbgrader_config.py"
    before = config.read_text(encoding="utf-8")
    config.write_text(f"raise OSError('disk is full')\n{before}", encoding="utf-8")
    said = run_tool("grade_class.py", "--course", graded, "--seconds", SECONDS)
    config.write_text(before, encoding="utf-8")
    assert "ida 05_layer_scale ... OSError: disk is full" in said
    assert table(graded)["ida", "05_layer_scale"]["score"] == ""
    said = run_tool("grade_class.py", "--course", graded, "--seconds", SECONDS)
    assert "ida 05_layer_scale ... 30 of 30 points" in said


def test_two_runs_at_once_are_refused(graded):
    command = [sys.executable, ROOT / "tools/grade_class.py", "--course", graded]
    with (graded / "grading.lock").open("w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert "is being graded already" in done.stderr
