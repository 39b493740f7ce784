"""Which parts of a notebook an answer needs: what it uses of the cells above, and not their experiments."""

import ast
import re
import symtable
from collections.abc import Sequence
from dataclasses import dataclass

_STAR = re.compile(r"^\s*from\s+\S+\s+import\s+\*", re.MULTILINE)
_DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef


@dataclass(frozen=True)
class Part:
    """A cell, or a statement of one: its code, and the notebook's names that it binds and uses."""

    cell: int
    tree: ast.Module
    binds: frozenset[str]
    uses: frozenset[str]


def needed_parts(cells: Sequence[str], name: str) -> list[Part]:
    """Return what to run before ``name`` has its value: the last cell that binds it, and what that cell uses, in order.

    A name that a part uses is looked for above it, and below only if it is not there. Where the answer is a function,
    the statements of its cell stand for themselves, so that trying it out below it is no part of it. Text that is no
    Python binds nothing. Empty if no cell binds ``name``.
    """
    parts = [part for place, source in enumerate(cells) for part in _parts(place, source, name)]

    def binding(wanted: str, below: int) -> list[int]:
        places = [place for place, part in enumerate(parts) if wanted in part.binds]
        return [place for place in places if place < below][-1:] or places[:1]

    if not binding(name, len(parts)):
        return []
    chosen = {place for place, part in enumerate(parts) if "*" in part.binds}
    wanted = [(name, len(parts))]
    while wanted:
        for place in binding(*wanted.pop()):
            if place not in chosen:
                chosen.add(place)
                wanted += [(used, place) for used in parts[place].uses]
    return [parts[place] for place in sorted(chosen)]


def parsed(source: str) -> ast.Module:
    """Return a cell's code; lines that only IPython understands become calls of ``get_ipython()``."""
    try:
        return ast.parse(source)
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager  # few cells need it

        return ast.parse(TransformerManager().transform_cell(source))


def _parts(place: int, source: str, name: str) -> list[Part]:
    try:
        tree = parsed(source)
        defined = any(isinstance(node, _DEFINITIONS) and node.name == name for node in tree.body)
        trees = [ast.Module([node], []) for node in tree.body] if defined else [tree]
        return [Part(place, tree, *_names(ast.unparse(tree))) for tree in trees]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _names(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names that this code binds in the notebook, and those that it reads there."""
    binds, uses = {"*"} if _STAR.search(source) else set(), set()
    top = symtable.symtable(source, "cell", "exec")
    scopes = [top]
    for scope in scopes:
        scopes += scope.get_children()
        for symbol in scope.get_symbols():
            of_the_notebook = scope is top or symbol.is_global()
            if of_the_notebook and (symbol.is_assigned() or symbol.is_imported()):
                binds.add(symbol.get_name())
            if of_the_notebook and symbol.is_referenced():
                uses.add(symbol.get_name())
    return frozenset(binds), frozenset(uses)
