"""Whether code has replaced functions that its check calls."""

import builtins
import math
import sys
from types import FunctionType, ModuleType

import numpy as np
import torch

# others of torch change by themselves, when more of it is imported
_MODULES = (
    *(builtins, math, np, torch, torch.linalg, torch.nn, torch.nn.functional, torch.nn.init),
    *(torch.special, torch.testing),
)
_CLASSES = torch.Tensor, torch.nn.Module, torch.Generator


class Watch:
    """Remembers what the checks call: functions and classes of torch and numpy, and all of this library."""

    def __init__(self) -> None:
        self._before = {place: _members(place) for place in _watched()}

    def replaced(self) -> list[str]:
        """Return the names of what is another by now, or gone; of classes, also of what was added."""
        found = []
        for place, before in self._before.items():
            now = _members(place)
            names = before.keys() | now.keys() if isinstance(place, type) else before.keys()
            found += [
                f"{_name(place)}.{name}" for name in names if now.get(name) != before.get(name)
            ]
        return sorted(found)


def _watched() -> list[ModuleType | type]:
    library = [module for name, module in [*sys.modules.items()] if _ours(name)]
    classes = {
        value
        for module in library
        for value in vars(module).values()
        if isinstance(value, type) and _ours(value.__module__)
    }
    return [*_MODULES, *library, *_CLASSES, *classes]


def _ours(module: str) -> bool:
    return module.partition(".")[0] == "siglip_lib"


def _members(place: ModuleType | type) -> dict[str, "_Same"]:
    """Return what can be called there."""
    return {name: _Same(value) for name, value in [*vars(place).items()] if callable(value)}


class _Same:
    """Equal to another if both hold the same object, and that still has the same code."""

    def __init__(self, value: object) -> None:
        self._parts = [value]
        if isinstance(value, FunctionType):
            self._parts += [value.__code__, value.__defaults__, value.__kwdefaults__]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and all(
            one is another for one, another in zip(self._parts, other._parts, strict=False)
        )

    __hash__ = None


def _name(place: ModuleType | type) -> str:
    return (
        place.__name__
        if isinstance(place, ModuleType)
        else f"{place.__module__}.{place.__qualname__}"
    )
