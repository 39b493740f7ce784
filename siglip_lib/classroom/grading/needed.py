"""Which parts of a notebook an answer needs: what it uses of the cells above, and not their experiments."""

import ast
import re
import symtable
from collections.abc import Sequence
from dataclasses import dataclass

_STAR = re.compile(r"^\s*from\s+\S+\s+import\s+\*", re.MULTILINE)
_CELL_MAGIC = re.compile(
    r"\A\s*%%(?:time|capture|prun)\b.*"
)  # the cell below them binds its names all the same
_TIME = re.compile(r"^( *)%time +", re.MULTILINE)
_DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef


@dataclass(frozen=True)
class Part:
    """A cell, or a statement of one: its code, and what it does with the notebook's names.

    Attributes:
        cell: the place of the cell.
        tree: the code.
        binds: the names that it gives a value.
        imports: those of them that it imports.
        changes: the names of whose values it sets an item or attribute, or calls a method for nothing but its effect.
        uses: the names that it reads.
        calls_use: those of them that its functions read, whenever they are called.
    """

    cell: int
    tree: ast.Module
    binds: frozenset[str]
    imports: frozenset[str]
    changes: frozenset[str]
    uses: frozenset[str]
    calls_use: frozenset[str]


def needed_parts(cells: Sequence[str], name: str) -> list[Part]:
    """Return what to run before ``name`` has its value: the last cell that binds it, and what that cell uses, in order.

    A name that a part uses is looked for above it, and below only if it is not there; one that a function uses has the
    last value before the check, too. What changes a value in place goes with it, unless that is a module. Where the
    answer is a function, the statements of its cell stand for themselves, so that trying it out below it is no part of
    it; those above it are. Text that is no Python binds nothing. Empty if no cell binds ``name``.
    """
    parts = [part for place, source in enumerate(cells) for part in _parts(place, source, name)]

    def making(wanted: str, below: int) -> list[int]:
        """Return which part binds a name, those above it in its cell, and those that change its value afterwards."""
        places = [place for place, part in enumerate(parts) if wanted in part.binds]
        if not places:
            return []
        last = max((place for place in places if place < below), default=places[0])
        cell = [place for place in range(last + 1) if parts[place].cell == parts[last].cell]
        if wanted in parts[last].imports:
            return cell
        return cell + [place for place in range(last + 1, below) if wanted in parts[place].changes]

    if not making(name, len(parts)):
        return []
    chosen = {place for place, part in enumerate(parts) if "*" in part.binds}
    wanted = [(name, len(parts))]
    while wanted:
        for place in making(*wanted.pop()):
            if place not in chosen:
                chosen.add(place)
                wanted += [(used, place) for used in parts[place].uses]
                wanted += [(used, len(parts)) for used in parts[place].calls_use]
    return [parts[place] for place in sorted(chosen)]


def parsed(source: str) -> ast.Module:
    """Return a cell's code; lines that only IPython understands become calls of ``get_ipython()``."""
    try:
        return ast.parse(source)
    except SyntaxError:
        from IPython.core.inputtransformer2 import TransformerManager  # few cells need it

        source = _TIME.sub(r"\1", _CELL_MAGIC.sub("", source))
        return ast.parse(TransformerManager().transform_cell(source))


def _parts(place: int, source: str, name: str) -> list[Part]:
    try:
        tree = parsed(source)
        future = [node for node in tree.body if getattr(node, "module", "") == "__future__"]
        defined = any(isinstance(node, _DEFINITIONS) and node.name == name for node in tree.body)
        trees = [ast.Module([*future, node], []) for node in tree.body] if defined else [tree]
        return [Part(place, tree, *_names(tree)) for tree in trees]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _names(tree: ast.Module) -> list[frozenset[str]]:
    """Return what ``Part`` says of the names in this code."""
    source = ast.unparse(tree)
    binds, uses = {"*"} if _STAR.search(source) else set(), set()
    imports, calls_use = set(), set()
    top = symtable.symtable(source, "cell", "exec")
    scopes = [top]
    for scope in scopes:
        scopes += scope.get_children()
        for symbol in scope.get_symbols():
            of_the_notebook = scope is top or symbol.is_global()
            if not of_the_notebook:
                continue
            if symbol.is_assigned() or symbol.is_imported():
                binds.add(symbol.get_name())
            if symbol.is_imported():
                imports.add(symbol.get_name())
            if symbol.is_referenced():
                uses.add(symbol.get_name())
                if scope is not top:
                    calls_use.add(symbol.get_name())
    changes, added_to = _changed(tree)
    return [*map(frozenset, (binds, imports, changes, uses | added_to & binds, calls_use))]


def _changed(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Return the names whose values this code changes in place, and those it binds by ``+=`` and the like."""
    changes, added_to = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            added_to.add(node.target.id)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            inner = node.value.func
        elif isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
            inner = node
        else:
            continue
        while isinstance(inner, ast.Attribute | ast.Subscript):
            inner = inner.value
            if isinstance(inner, ast.Name):
                changes.add(inner.id)
    return changes, added_to
