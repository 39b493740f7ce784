"""Whether code has replaced functions of the libraries that its check calls."""

import sys
from types import FunctionType, ModuleType

_LIBRARIES = "builtins", "math", "numpy", "torch", "siglip_lib"


class Watch:
    """Remembers the functions and classes of the libraries, as they are now."""

    def __init__(self) -> None:
        self._before = {place: _members(place) for place in _watched()}

    def replaced(self) -> list[str]:
        """Return the full names of those that are others by now, or gone; of a class, also what was added to it."""
        found = []
        for place, before in self._before.items():
            now = _members(place)
            names = before.keys() | now.keys() if isinstance(place, type) else before
            found += [f"{_name(place)}.{n}" for n in names if before.get(n) != now.get(n)]
        return sorted(found)


def _watched() -> list[ModuleType | type]:
    modules = [
        module
        for name, module in [*sys.modules.items()]
        if name.partition(".")[0] in _LIBRARIES and isinstance(module, ModuleType)
    ]
    return [*modules, *{c for m in modules for c in vars(m).values() if isinstance(c, type)}]


def _members(place: ModuleType | type) -> dict[str, tuple]:
    """Return what can be called there: each as its identity and, if it has any, its code."""
    return {
        name: (id(value), *_code(value))
        for name, value in [*vars(place).items()]
        if callable(value) or isinstance(value, property | classmethod | staticmethod)
    }


def _code(value: object) -> tuple[int, ...]:
    if not isinstance(value, FunctionType):
        return ()
    return id(value.__code__), id(value.__defaults__), id(value.__kwdefaults__)


def _name(place: ModuleType | type) -> str:
    return (
        place.__name__
        if isinstance(place, ModuleType)
        else f"{place.__module__}.{place.__qualname__}"
    )
