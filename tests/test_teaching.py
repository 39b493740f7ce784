"""The teacher's guide: its figures are the notebooks', its timetables add up, and what it names is there."""

import ast
import importlib
import itertools
import re
from pathlib import Path

import nbformat
import pytest
from notebook_files import PATHS, ROOT, exercises, read
from teaching_times import GUIDE, cost, named, parts, renewed

from siglip_lib.classroom.sizes import LAB_GIB

TEXT = GUIDE.read_text(encoding="utf-8")
# a chapter's title, and the items of its two lists, each on one line
CHAPTERS = {
    title[:2]: (title, [" ".join(item.split()) for item in re.split(r"\n(?=- |\d\. )", body)])
    for title, body in re.findall(r"^### (\d\d · .*)((?:\n(?!#).*)*)", TEXT, re.MULTILINE)
}
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def rows(head: str) -> list[list[str]]:
    """The rows of the only table whose head begins so, as cells."""
    (found,) = tables(head)
    return found


def tables(head: str) -> list[list[list[str]]]:
    """The rows of each table whose head begins so."""
    pattern = rf"^{re.escape(head)}.*\n\|[-|]+\|\n((?:\|.*\n)+)"
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
        for body in re.findall(pattern, TEXT, re.MULTILINE)
    ]


# figures


def test_counted_figures_are_up_to_date():
    now = renewed(TEXT, PATHS)
    changed = [line for line in now.splitlines() if line not in TEXT.splitlines()]
    assert not changed, "python tools/teaching_times.py writes:\n" + "\n".join(changed)


def test_the_table_of_times_has_each_notebook_with_its_own_figures():
    found = {row[0]: row[1:] for row in rows("| notebook |")}
    assert len(found) == len(PATHS)
    for path in PATHS:
        notebook = read(path)
        title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
        row = found[f"[{title}](../../notebooks/{path.name})"]
        measured = [notebook.metadata["measured"][size] for size in ("cpu", "lab", "full")]
        assert row[:3] == [f"{m['seconds']} s, {m['gib']} GiB" for m in measured]
        texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
        asked = [text.rpartition("**Predict") for text in texts]
        predictions = sum(bool(asks) and "(a)" in choices for _, asks, choices in asked)
        beside = re.findall(r"^\*\*\d \((\d+) minutes", "\n".join(texts), re.MULTILINE)
        assert len(beside) == len(exercises(notebook))
        reading, predicting, solving, together, at_home = map(int, row[3:])
        assert (predicting, solving) == (2 * predictions, sum(map(int, beside)))
        assert together == reading + predicting + solving
        assert together - 60 <= at_home < together - 55


def test_a_term_adds_up():
    total = re.search(r"For all (\d+) notebooks that makes (\d+) minutes in class and (\d+)", TEXT)
    at_home = sum(int(row[-1]) for row in rows("| notebook |"))
    assert total.groups() == (str(len(PATHS)), str(90 * len(PATHS)), str(at_home))


def test_minutes_are_counted_by_section(tmp_path):
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    cells = [
        text("# 77 · A title"),
        text("## 1. First\n" + "word " * 118 + "\n### Not a section of its own"),
        code('predict("77.1", "a")\n' + "x = 1\n  \n" * 25),
        text("**Predict:** (a) or (b)?\n## 2. Second\nwhere it says **Predict**, stop"),
        text("## Exercises\n\n**1 (7 minutes).** Do (a)."),
        text("**2 (15 minutes, measured).** Do it.\n<details>many (a) words more</details>"),
    ]
    path = tmp_path / "77_made_up.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    found = parts(path)
    assert list(found) == ["head", "1", "2", "Exercises"]
    first, second, last = (found[name] for name in ("1", "2", "Exercises"))
    assert (first.words, first.lines, first.predictions) == (3 + 118 + 7 + 4, 25, 1)
    assert (second.words, second.predictions) == (3 + 5, 0)
    assert (last.words, last.predictions) == (7 + 6, 0)
    assert last.exercises == {"77.1": 7, "77.2": 15}
    assert cost(found, ["1"], ["77.2"]) == pytest.approx(132 / 120 + 25 / 25 + 2 + 15)
    with pytest.raises(KeyError):
        cost(found, ["3"], [])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("sections 1 to 4, 6 and 7, exercise 03.1", (["1", "2", "3", "4", "6", "7"], ["03.1"])),
        ("section 8, with the students' own pictures", (["8"], [])),
        ("exercises 00.1 and 00.2", ([], ["00.1", "00.2"])),
        ("sections 9 and 10", (["9", "10"], [])),
    ],
)
def test_what_a_line_names(text, found):
    assert named(text) == found


# timetables

TIMETABLES = tables("| at | minutes | what |")
ENDS = ["17:00", "3:00", "3:00", "3:00", "3:00"]  # a day, four labs of three hours


def minutes_of(clock: str) -> int:
    hours, minutes = clock.split(":")
    return 60 * int(hours) + int(minutes)


def test_there_are_timetables_for_a_day_and_for_four_labs():
    assert len(TIMETABLES) == len(ENDS)
    assert "It ends at 17:00." in TEXT
    assert "Three hours each" in TEXT


@pytest.mark.parametrize(("table", "end"), [*zip(TIMETABLES, ENDS, strict=True)])
def test_a_timetable_has_no_gap_and_ends_in_time(table, end):
    starts = [*(minutes_of(at) for at, _, _ in table), minutes_of(end)]
    lengths = [int(minutes) for _, minutes, _ in table]
    assert [b - a for a, b in itertools.pairwise(starts)] == lengths


@pytest.mark.parametrize("table", TIMETABLES)
def test_a_timetable_gives_a_notebook_the_minutes_that_it_takes(table):
    by_number = {path.stem[:2]: path for path in PATHS}
    planned = 0
    for _, minutes, what in table:
        if notebook := re.match(r"\[(\d\d)\]\(\S*/(\S+)\) ", what):
            assert notebook[2] == by_number[notebook[1]].name
            taken = cost(parts(by_number[notebook[1]]), *named(what))
            assert 0 < taken <= int(minutes) <= taken + 10, f"{what} takes {taken:.0f}"
            planned += 1
    assert planned >= 2


# chapters


@each
def test_each_notebook_has_a_chapter_with_two_questions_and_what_to_leave_out(path):
    title, items = CHAPTERS[path.stem[:2]]
    assert f"# {title}" == read(path).cells[0].source.splitlines()[0]
    questions = [item for item in items if re.match(r"\d\. ", item)]
    assert [question[0] for question in questions] == ["1", "2"]
    for question in questions:
        asked, _, answer = question.partition(" *A good answer:* ")
        assert "?" in asked
        assert len(answer.split()) > 10
    (advice,) = (item for item in items if item.startswith("- **Short of time:** leave out "))
    assert re.search(r"\(saves \d+ minutes\)", advice)
    sections, some_exercises = named(advice.partition("(")[0])
    assert sections
    assert len(some_exercises) < len(exercises(read(path)))


def test_there_is_no_chapter_of_another_notebook():
    assert sorted(CHAPTERS) == [path.stem[:2] for path in PATHS]


def sentences(path: Path) -> list[str]:
    """The string constants of a module, each on one line."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    values = (node.value for node in nodes if isinstance(node, ast.Constant))
    return [" ".join(value.split()) for value in values if isinstance(value, str)]


@each
def test_what_students_get_wrong_is_what_the_checks_say(path):
    _, items = CHAPTERS[path.stem[:2]]
    module = f"nb{path.stem[:2]}"
    wrong = importlib.import_module(f"wrong_answers.{module}").WRONG
    said = sentences(ROOT / "siglip_lib" / "classroom" / "exercises" / f"{module}.py")
    mistakes = {item[2:6]: re.findall("“(.+?)”", item) for item in items if "“" in item}
    assert [*mistakes] == [exercise.number for exercise in exercises(read(path))]
    for number, reasons in mistakes.items():
        for reason in reasons:
            assert any(reason in sentence for sentence in said), reason
            # and a tested wrong answer gets it
            assert any(piece in reason for piece in wrong[number].values()), reason


# what it names


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        assert not file or (GUIDE.parent / file).is_file(), link
        assert not anchor or anchor in anchors, link


def test_files_and_variables_that_it_names_are_there():
    sizes = (ROOT / "siglip_lib/classroom/sizes.py").read_text(encoding="utf-8")
    assert all(variable in sizes for variable in re.findall(r"`(SIGLIP_\w+)", TEXT))
    files = re.findall(r"\b(?:tools|tests|siglip_lib|notebooks)/[\w./]*\w\b(?!\*)", TEXT)
    assert files
    for file in files:
        assert (ROOT / file).exists() or list(ROOT.glob(f"{file}*.ipynb")), file


def test_the_readme_leads_to_it():
    assert "(tools/site/teaching.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_what_it_says_of_sharing_holds():
    measured = {path.stem[:2]: read(path).metadata["measured"] for path in PATHS}
    assert max(m["cpu"]["seconds"] for m in measured.values()) <= 60
    most = max(m["lab"]["gib"] for m in measured.values())
    assert most <= LAB_GIB + 1  # CUDA's own share comes on top of the cap
    assert f"the most is 04's, {most} GiB" in " ".join(TEXT.split())
    assert round(measured["10"]["lab"]["seconds"] / 60) == 4  # six students take six times that
    assert f"`SIGLIP_GPU_GIB={LAB_GIB}`" in TEXT
    (head,) = re.findall(r"^\| GiB free on the card \|(.*)\|\n", TEXT, re.MULTILINE)
    ((_, *students),) = rows("| GiB free on the card |")
    assert students == [str(int(float(gib) // most)) for gib in head.split("|")]
