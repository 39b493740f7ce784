"""The notebooks as data, and the files that git knows, for the tests that read them."""

import ast
import itertools
import linecache
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_FILES = itertools.count()


def known_to_git(folder: str = ".") -> set[str]:
    """The files of a folder that git knows, and that are there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", folder], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    if listed.returncode:
        pytest.skip(f"needs a git checkout: {listed.stderr.strip()}")
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def all_code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """All from the setup cell on: without the first, which looks for the library and can hold a line of IPython's."""
    return all_code_cells(notebook)[1:]


def run(code: str, namespace: dict) -> None:
    """Execute code whose source can be looked up afterwards, as in a notebook: Triton compiles kernels from it."""
    file = f"<notebook {next(_FILES)}>"
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    exec(compile(code, file, "exec"), namespace)


def setup_source(notebook: nbformat.NotebookNode) -> str:
    """The imports of the one setup cell, without what it prints."""
    tree = ast.parse(code_cells(notebook)[0].source)
    tree.body = [node for node in tree.body if not isinstance(node, ast.Expr)]
    return ast.unparse(tree)


def definitions(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """The source of each class, function and plain assignment at the top level, by its name."""
    found = {}
    for cell in code_cells(notebook):
        for node in ast.parse(cell.source).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                found[node.name] = ast.unparse(node)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = ast.unparse(node)
    return found


@dataclass(frozen=True)
class Exercise:
    number: str
    answer: str  # the name that the reader gives a value
    solution: str  # the code folded below it


def exercises(notebook: nbformat.NotebookNode) -> list[Exercise]:
    """The exercises: each a code cell that ends in a check, then a folded solution."""
    found = []
    for index, cell in enumerate(notebook.cells):
        match = re.search(r'check_exercise\("(\d\d\.\d)", (\w+)\)', cell.source)
        if cell.cell_type != "code" or not match:
            continue
        below = notebook.cells[index + 1].source
        code = re.search(r"<details>.*```python\n(.*?)```.*</details>", below, re.DOTALL)
        assert code, f"exercise {match[1]} has no folded solution below it"
        found.append(Exercise(match[1], match[2], code[1]))
    return found
