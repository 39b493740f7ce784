"""The reference: a page for each wing of the library, of its public names, and a table of all that stand at the top."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType

import siglip_lib

WINGS = ("tower", "siglip", "evaluate", "train", "data", "backends", "vl", "classroom")
KERNELS = ("flash_attention", "pair_losses", "residual", "sampler")


def public_names() -> dict[str, str]:
    """Where each public name is described, by the name alone."""
    found = {}
    for wing in WINGS:
        for name in importlib.import_module(f"siglip_lib.{wing}").__all__:
            found[name] = f"siglip_lib.{wing}.{name}"
    found["flash_attention"] = "siglip_lib.kernels.flash_attention.flash_attention"
    return found


def pages() -> dict[str, str]:
    """The pages' text in MyST, by file name."""
    written = {f"{wing}.md": _wing(wing) for wing in WINGS} | {"kernels.md": _kernels()}
    return written | {"index.md": _index()}


def _index() -> str:
    names = public_names()
    entries = "".join(
        f"{{py:obj}}`{name} <{names[name]}>`\n: {_first_line(name)}\n\n"
        for name in siglip_lib.__all__
    )
    return (
        "# Reference\n\nThe names that `siglip_lib` itself offers, in the words of the code. Its wings have further "
        f"public names; a page for each is in the menu.\n\n{entries}"
    )


def _wing(wing: str) -> str:
    module = importlib.import_module(f"siglip_lib.{wing}")
    entries = [_entry(module, name) for name in module.__all__]
    return f"# siglip_lib.{wing}\n\n{inspect.getdoc(module)}\n\n" + "\n".join(entries)


def _kernels() -> str:
    """These modules have no list of public names: what they define and describe is shown."""
    text = (
        f"# siglip_lib.kernels\n\n{inspect.getdoc(importlib.import_module('siglip_lib.kernels'))}\n"
    )
    for kernel in KERNELS:
        module = importlib.import_module(f"siglip_lib.kernels.{kernel}")
        own = [
            name
            for name, value in vars(module).items()
            if inspect.isfunction(value)
            and value.__module__ == module.__name__
            and not name.startswith("_")
            and value.__doc__
        ]
        entries = "\n".join(_entry(module, name) for name in own)
        text += f"\n## {kernel}\n\n{inspect.getdoc(module)}\n\n{entries}"
    return text


def _entry(module: ModuleType, name: str) -> str:
    """What Sphinx fills with signature and docstring; data have none, so the comment above them is taken."""
    value, where = getattr(module, name), f"{module.__name__}.{name}"
    if inspect.isclass(value):
        lines = f".. autoclass:: {where}\n   :members:"
    elif inspect.isroutine(value):
        lines = f".. autofunction:: {where}"
    else:
        lines = f".. py:currentmodule:: {module.__name__}\n.. py:data:: {name}\n\n   {_comment(module, name)}"
    return f"```{{eval-rst}}\n{lines}\n```\n"


def _comment(module: ModuleType, name: str) -> str:
    """The comment above the line of a package that gives a constant its value, or its type without one."""
    for file in sorted(Path(module.__file__).parent.glob("*.py")):
        source = file.read_text(encoding="utf-8")
        if found := re.search(rf"((?:^#.*\n)*)^{name}\b.* = ", source, re.MULTILINE):
            comment = " ".join(line.removeprefix("# ") for line in found[1].splitlines())
            kind = type(getattr(module, name)).__name__
            return (
                f"{comment[:1].upper()}{comment[1:].removesuffix('.')}."
                if comment
                else f"A constant, {kind}."
            )
    raise ValueError(f"{module.__name__} gives {name} no value")


def _first_line(name: str) -> str:
    """What a public name is, in a sentence or two."""
    value = getattr(siglip_lib, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        text = inspect.getdoc(value).split("\n\n")[0]
    else:
        module = importlib.import_module(public_names()[name].rpartition(".")[0])
        text = _comment(module, name)
    return text.replace("\n", " ").replace("``", "`")
