"""No address but origin's stands in the tree; `make links` writes it, and a notebook's first cell installs from it."""

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import write_links
from IPython.core.inputtransformer2 import TransformerManager
from notebook_files import PATHS, ROOT, all_code_cells, known_to_git, read

# this project's own places: what installs, clones or opens it; sources that are cited stand in none of these forms
PLACE = re.compile(
    r"(?:git\+\w+://|git clone [\"']?(?:\w+://)?|colab\.research\.google\.com/|(?=github\.com.[\w-]+/siglip-notebooks))"
    r"([\w.@-]+[/:])([\w-]+/[\w.-]*[\w-])"
)
LAB = "some-one/lab"
# a notebook's first cell, in a Python that finds the standard library alone
ALONE = """
import json, sys
class Shell:
    def run_line_magic(self, name, line):
        print(json.dumps([name, line]))
get_ipython = Shell
exec(sys.argv[1])
"""


def foreign_places(text: str, own: str | None) -> list[str]:
    """The project's addresses in a text that are not this repository's on GitHub."""
    return [
        host + place
        for host, place in PLACE.findall(text)
        if host not in ("github.com/", "git@github.com:", "github/")
        or place.removesuffix(".git") != own
    ]


def own_place(root=ROOT) -> str | None:
    try:
        return write_links.origin(root)
    except ValueError:
        return None


@pytest.fixture
def checkout(tmp_path):
    """What `make links` changes, in a repository whose origin a test sets."""
    others = shutil.ignore_patterns(".ipynb_checkpoints")  # JupyterLab's
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=others)
    shutil.copy(ROOT / "README.md", tmp_path)
    git(tmp_path, "init", "--quiet")
    return tmp_path


def git(root, *arguments: str) -> None:
    subprocess.run(["git", "-C", root, *arguments], check=True)


def set_origin(root, address: str) -> None:
    git(root, "config", "remote.origin.url", address)


def files(root) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in [root / "README.md", *root.glob("notebooks/*")]
    }


def test_no_address_but_origins_stands_in_the_tree():
    own = own_place()
    for name in sorted(known_to_git()):
        text = (ROOT / name).read_text(encoding="utf-8", errors="ignore")
        assert not foreign_places(text, own), f"{name}: `make links` writes origin's address"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('%pip install "p[lab] @ GIT+https://HUB/other/name"', ["HUB/other/name"]),
        ("pip install GIT+ssh://git@HUB/other/name.git", ["git@HUB/other/name.git"]),
        ("GIT clone https://HUB/other/name && cd name", ["HUB/other/name"]),
        ("GIT clone git@HUB:other/name.git", ["git@HUB:other/name.git"]),
        ("pip install GIT+https://gitlab.com/own/name", ["gitlab.com/own/name"]),
        ("(https://COLAB/github/other/name/blob/main/x.ipynb)", ["github/other/name"]),
        ("see https://HUB/other/siglip-notebooks.", ["HUB/other/siglip-notebooks"]),
        ("see https://HUB/google-research/big_vision", []),
        ('GIT clone "the address you got this from" siglip-notebooks', []),
        ("GIT clone git@HUB:own/name.git; pip install GIT+https://HUB/own/name", []),
        ("(https://COLAB/github/own/name/blob/main/x.ipynb)", []),
    ],
)
def test_what_is_not_origins_is_found(text, found):
    def full(short: str) -> str:
        for name, written in {
            "HUB": "github.com",
            "COLAB": "colab.research.google.com",
            "GIT": "git",
        }.items():
            short = short.replace(name, written)
        return short

    assert foreign_places(full(text), "own/name") == [full(place) for place in found]
    if "own/name" in text:
        assert foreign_places(full(text), None)


@pytest.mark.parametrize(
    "address",
    [
        "https://github.com/some-one/their.lab",
        "https://github.com/some-one/their.lab.git",
        "https://user:secret@github.com/some-one/their.lab.git/",
        "git@github.com:some-one/their.lab.git",
        "ssh://git@github.com/some-one/their.lab.git",
    ],
)
def test_origin_is_read_in_each_of_githubs_forms(checkout, address):
    set_origin(checkout, address)
    assert write_links.origin(checkout) == "some-one/their.lab"


@pytest.mark.parametrize(
    "address",
    [
        None,
        "/srv/git/lab.git",
        "https://user:secret@gitlab.com/some-one/lab",
        "https://github.com.example.org/some-one/lab",
        "https://github.com/some-one",
        "https://github.com/some-one/lab/tree/main",
        'https://github.com/some-one/lab"; import os #',
    ],
)
def test_another_origin_is_refused_and_nothing_written(checkout, address):
    if address:
        set_origin(checkout, address)
    before = files(checkout)
    told = r"remote (set-url|add) origin https://github.com/OWNER/NAME"
    with pytest.raises(ValueError, match=told) as refused:
        write_links.write_links(checkout)
    assert "secret" not in str(refused.value)
    assert files(checkout) == before


def test_a_notebook_without_its_first_cell_is_refused_and_nothing_written(checkout):
    set_origin(checkout, f"https://github.com/{LAB}")
    last = checkout / "notebooks" / PATHS[-1].name
    notebook = read(last)
    del notebook.cells[1]
    nbformat.write(notebook, last)
    before = files(checkout)
    with pytest.raises(ValueError, match=f"second cell of {last.name}"):
        write_links.write_links(checkout)
    assert files(checkout) == before


def test_links_lead_to_origin_and_change_nothing_else(checkout):
    set_origin(checkout, f"https://github.com/{LAB}")
    before = {path.name: read(path) for path in (checkout / "notebooks").glob("*.ipynb")}
    write_links.write_links(checkout)
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    for name, notebook in before.items():
        linked = read(checkout / "notebooks" / name)
        colab = f"https://colab.research.google.com/github/{LAB}/blob/main/notebooks/{name})"
        assert colab in linked.cells[0].source
        assert linked.cells[0].source.startswith(
            notebook.cells[0].source.split("\n")[0] + "\n\n[!["
        )
        row = next(line for line in readme.splitlines() if f"(notebooks/{name})" in line)
        assert row.endswith(f" | [open]({colab} |")
        assert linked.cells[2:] == notebook.cells[2:]
    table = [
        line for line in readme.splitlines() if re.match(r"\| (notebook |\[\d\d )|\|---", line)
    ]
    table = table[: 2 + len(PATHS)]
    assert {line.count("|") for line in table} == {8}
    for name, data in files(checkout).items():
        assert not foreign_places(data.decode(), LAB), name
        assert (LAB.encode() in data) == (name != "open-in-colab.svg")


def test_written_again_they_stay_and_another_origin_takes_their_place(checkout):
    written = {}
    for owner in ("one", "one", "two", "one"):
        set_origin(checkout, f"https://github.com/{owner}/lab")
        write_links.write_links(checkout)
        assert written.setdefault(owner, files(checkout)) == files(checkout)
    assert written["one"] != written["two"]


def test_links_stand_in_every_notebook_and_the_readme_or_nowhere():
    texts = [path.read_text(encoding="utf-8") for path in PATHS]
    linked = [("](https://colab.research" in text, "%pip install" in text) for text in texts]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").count("](https://colab.research")
    assert (set(linked), readme) in [({(False, False)}, 0), ({(True, True)}, len(PATHS))]


def run_alone(notebook) -> subprocess.CompletedProcess:
    code = TransformerManager().transform_cell(all_code_cells(notebook)[0].source)
    command = [sys.executable, "-I", "-S", "-c", ALONE, code]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


def test_all_notebooks_begin_with_one_and_the_same_cell():
    assert len({all_code_cells(read(path))[0].source for path in PATHS}) == 1


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_without_the_library_the_first_cell_says_in_a_line_what_to_do(path):
    if "%pip" in all_code_cells(read(path))[0].source:
        pytest.skip("with links, it installs")
    done = run_alone(read(path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: siglip_lib is missing: run `make lab` where this notebook came from"
    )
    assert done.stdout == ""


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_with_links_the_first_cell_installs_the_library_where_it_is_missing(path):
    notebook = read(path)
    write_links.linked_notebook(notebook, LAB, path.name)
    done = run_alone(notebook)
    assert done.returncode == 0, done.stderr
    wanted = f'install --quiet "siglip-notebooks[lab] @ git+https://github.com/{LAB}"'
    assert json.loads(done.stdout) == ["pip", wanted]
    # and does nothing where it is there: there is no get_ipython here
    exec(TransformerManager().transform_cell(all_code_cells(notebook)[0].source), {})
