"""Where the library's operators are registered with torch, anew when a module of theirs is reloaded."""

from torch.library import Library

# kept when this module itself is reloaded: an operator goes with its library
_libraries: dict[str, Library] = globals().get("_libraries", {})


def operators_of(module: str) -> Library:
    """Return an empty library for the operators of ``module``; those that it registered before are gone."""
    if module in _libraries:
        _libraries.pop(module)._destroy()
    _libraries[module] = Library("siglip_lib", "FRAGMENT")
    return _libraries[module]
