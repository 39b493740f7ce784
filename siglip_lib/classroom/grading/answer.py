"""One student's answer to one exercise, run and graded: what the child process does."""

import builtins
import linecache
import random
import re

import numpy as np
import torch

from siglip_lib.classroom.exercises import grade
from siglip_lib.classroom.grading.needed import needed_parts, parsed
from siglip_lib.classroom.grading.patches import Watch

_MEMORY = re.compile(r"\bMemoryError\b|can't allocate memory")  # Python's and numpy's, torch's


class _NoNotebook:
    """What a cell finds of IPython: whatever it calls does nothing."""

    def __getattr__(self, name: str) -> "_NoNotebook":
        return self

    def __call__(self, *args: object, **options: object) -> None:
        return None


def verdict(number: str, name: str, cells: list[str], watch: Watch, gib: float) -> str:
    """Return what ``grade`` says of the value that the notebook gives ``name``, or what kept it from that.

    Args:
        number: the exercise, as "01.2".
        name: what the answer is called.
        cells: the sources of the notebook's code cells, up to the exercise's check.
        watch: of the libraries as they were before any of this code ran.
        gib: the limit of memory, to be named.
    """
    try:
        said = _graded(number, name, cells)
    except SystemExit:
        return "wrong: your code ended Python with sys.exit"
    except BaseException as error:  # also those that no answer has a reason to raise
        return f"wrong: your code raised {type(error).__name__}"
    if replaced := watch.replaced():
        few = ", ".join(replaced[:3]) + (" and more" if len(replaced) > 3 else "")
        return f"wrong: your code replaced {few}; an answer leaves the libraries as they are"
    if said.startswith("wrong: ") and _MEMORY.search(said):
        return f"wrong: your code asked for more memory than the {gib:g} GiB that an answer gets"
    return said


def _graded(number: str, name: str, cells: list[str]) -> str:
    notebook = _NoNotebook()
    names = {
        **{"__name__": "__main__", "__builtins__": builtins},
        **{"get_ipython": lambda: notebook, "display": notebook},
    }
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    problem = _misspelt(cells, name)
    for part in needed_parts(cells, name):
        file = f"<cell {part.cell}>"
        source = cells[part.cell]
        # so that Triton can look a kernel's source up
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        try:
            exec(compile(part.tree, file, "exec"), names)
        except Exception as error:  # as in a notebook, what follows may still work
            problem = f"{type(error).__name__}: {error}"
    if name not in names:
        return f"wrong: no cell gives {name!r} a value" + (f"; {problem}" if problem else "")
    return grade(number, names[name])


def _misspelt(cells: list[str], name: str) -> str:
    """Return the error of the last cell that speaks of ``name`` and is no Python."""
    for source in reversed(cells):
        if re.search(rf"\b{name}\b", source):
            try:
                parsed(source)
            except SyntaxError as error:
                return f"its cell is no Python: {error.msg} (line {error.lineno})"
    return ""
