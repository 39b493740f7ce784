import ast
import collections
import re

import mutate
import nbformat
import pytest
from mutate import Found, Mistake, apply, differ_by_last_digits, in_order, measure, read_list, table
from notebook_files import PATHS, ROOT, known_to_git

MISTAKES = read_list()
LIBRARY = ROOT / "siglip_lib"


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_each_mistake_of_the_list_is_one_in_the_present_code(mistake):
    source = (LIBRARY / mistake.file).read_text(encoding="utf-8")
    assert source.count(mistake.old) == 1
    wrong = source.replace(mistake.old, mistake.new)
    assert ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(source))
    compile(wrong, mistake.file, "exec")
    assert mistake.lines(source)
    assert mistake.harm


def test_the_list_has_more_than_a_hundred_mistakes_spread_over_the_library():
    assert len(MISTAKES) > 100
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES)
    numbers = {path.stem[:2] for path in PATHS}
    assert all(mistake.likely and {*mistake.likely} <= numbers for mistake in MISTAKES)
    of = collections.Counter(mistake.file.partition("/")[0] for mistake in MISTAKES)
    wings = {path.parent.name for path in LIBRARY.glob("*/__init__.py")}
    assert of.keys() == wings
    lines = collections.Counter()
    for name in known_to_git("siglip_lib"):
        # no cell runs what an answer is graded by
        if name.endswith(".py") and not re.search("/(exercises|grading)/", name):
            lines[name.split("/")[1]] += len((ROOT / name).read_text(encoding="utf-8").splitlines())
    whole = sum(lines[wing] for wing in wings)
    for wing in wings:  # no wing has less than a quarter of its share, none twice it
        share = len(MISTAKES) * lines[wing] / whole
        assert share / 4 <= of[wing] <= 2 * share + 2, wing


@pytest.mark.parametrize(
    ("stored", "found", "alone"),
    [
        ("loss 0.69319", "loss 0.69322", True),
        ("loss 0.69319", "loss 0.70319", False),
        ("loss 1.2e-05", "loss 1.3e-05", True),
        ("loss 1.2e-05", "loss 1.2e-06", False),
        ("True 1.23", "False 1.23", False),
        ("3 of 16", "2 of 16", False),  # counts of one digit
        ("1/p = 985", "1/p = 984", True),
        ("share 0.10", "share -0.10", False),
        ("by chance 0.375", "by chance 0.5", False),
        ("1,996,160 numbers", "1,996,288 numbers", False),
        ("(3, 16)", "(3, 16, 1)", False),
    ],
)
def test_a_last_digit_is_told_from_more(stored, found, alone):
    assert differ_by_last_digits(stored, found) is alone


def test_a_head_is_seen_by_who_runs_the_function():
    source = "A = 1\n\n@f\ndef g(\n    x=2,\n):\n    '''Doc.'''\n    return x\n\n\nh = (\n    1 +\n    2\n)\n"

    def lines(old):
        return Mistake("", "", old, "", "").lines(source)

    assert lines("A = 1") == {1}
    assert lines("@f") == lines("x=2") == {7, 8}
    assert lines("return x") == {8}
    assert lines("1 +") == {11, 12, 13, 14}


CODE = """\
def half(x):
    return x / 2


def unused(x):
    return x + 1


def never(x):
    return -x
"""


@pytest.fixture
def tree(tmp_path):
    """A library of three functions, and a notebook that checks two of them."""
    for folder in ("siglip_lib", "notebooks", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "siglip_lib" / "__init__.py").touch()
    (tmp_path / "siglip_lib" / "small.py").write_text(CODE, encoding="utf-8")
    sanitizing = "tests/nbval_sanitize.cfg"
    (tmp_path / sanitizing).write_bytes((ROOT / sanitizing).read_bytes())
    notebook = nbformat.v4.new_notebook()
    for source, text in (
        (f"from {LIBRARY.name}.small import half, unused\n_ = unused(1)", ""),
        ("print(f'{half(3.14):.3f}')", "1.570\n"),
    ):
        outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
        notebook.cells.append(nbformat.v4.new_code_cell(source, outputs=outputs, execution_count=1))
    nbformat.write(notebook, tmp_path / "notebooks" / "01_small.ipynb")
    return tmp_path


def small(name, old, new):
    return Mistake(name, "small.py", old, new, harm=f"the harm of {name}")


def test_a_small_library_is_measured_once(tree, tmp_path, monkeypatch):
    mistakes = [
        small("wrong", "x / 2", "x / 3"),
        small("faint", "x / 2", "x / 2.003"),
        small("survivor", "x + 1", "x - 1"),
        small("not run", "-x", "x"),
    ]
    out = tmp_path / "found.json"
    measure(mistakes, tree, Found(tree, out))
    found = Found(tree, out)
    assert in_order(mistakes[0], tree, found, "running") == ["01_small"]
    text, good = table(mistakes, tree, found)
    assert not good
    rows = [row.split() for row in text.splitlines()]
    assert rows[0][2:] == ["caught", "01", "Cell", "1"]
    assert rows[1][2:] == ["by", "a", "last", "digit", "01", "Cell", "1"]
    assert "survived" in rows[2]
    assert "the harm of survivor; ran: 01" in text
    assert "the harm of not run; ran: none" in text
    assert text.endswith("4 mistakes: caught 1, by a last digit 1, survived 2")
    assert (tree / "siglip_lib" / "small.py").read_text(encoding="utf-8") == CODE

    def not_again(*_, **__):
        raise AssertionError("ran again")

    monkeypatch.setattr(mutate, "run_notebook", not_again)
    measure(mistakes, tree, found)
    with pytest.raises(AssertionError, match="ran again"):
        measure([small("wrong", "x / 2", "x / 4")], tree, found)
    path = tree / "notebooks" / "01_small.ipynb"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="ran again"):
        measure(mistakes, tree, Found(tree, out))


def test_an_old_text_that_is_not_there_once_is_an_error(tree):
    with pytest.raises(ValueError, match=r"twice: the old text is 3 times in small\.py"):
        apply(small("twice", "return", "yield"), tree)
    assert (tree / "siglip_lib" / "small.py").read_text(encoding="utf-8") == CODE


@pytest.mark.parametrize("which", ["running", "likely"])
def test_a_notebook_that_fails_anyway_catches_nothing(tree, which):
    path = tree / "notebooks" / "01_small.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace("1.570", "1.571"), encoding="utf-8")
    mistake = Mistake("wrong", "small.py", "x / 2", "x / 3", "harm", likely=("01",))
    with pytest.raises(RuntimeError, match="01_small fails without a mistake, in Cell 1"):
        measure([mistake], tree, Found(tree, None), which=which)
