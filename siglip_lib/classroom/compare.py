"""What the notebooks say of results that differ from machine to machine: a bound, and an error where it is broken."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from siglip_lib.base.checks import finite

Result = Tensor | Mapping[str, Tensor] | Sequence[Tensor]


def agree(found: Result, wanted: Result, within: float = 1e-5) -> str:
    """Return as text how near two results are: the bound that they keep, not the rounding error of one machine.

    Args:
        found: a tensor, or several in a mapping or a sequence.
        wanted: the same kind, with the same names or length, shapes and dtypes.
        within: the largest difference allowed in each tensor, as a share of the largest absolute element of the wanted
            one; 0 asks for the same bits.

    Raises:
        AssertionError: they differ by more, or in names, number, shape or dtype; it says which and by how much.
        ValueError: ``within`` is negative, or there is no element to compare.
    """
    if finite("within", within) < 0:
        raise ValueError(f"within={within} must not be negative")
    found, wanted = _named(found), _named(wanted)
    if found.keys() != wanted.keys():
        raise AssertionError(f"found {list(found)}, wanted {list(wanted)}")
    if not any(tensor.numel() for tensor in wanted.values()):
        raise ValueError("there is no element to compare")
    for name, tensor in wanted.items():
        _check(name, found[name].detach(), tensor.detach(), within)
    return f"equal to within {within:.0e} of the largest element" if within else "the same bits"


def between(value: float, low: float, high: float) -> str:
    """Return two bounds as text, once a number keeps them.

    Raises:
        AssertionError: it does not, or is NaN; it says what it is.
    """
    if not low <= value <= high:
        raise AssertionError(f"{value:g} is not between {low:g} and {high:g}")
    return f"between {low:g} and {high:g}"


def _named(result: Result) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"the tensor": result}
    if isinstance(result, Mapping):
        return dict(result)
    return {f"tensor {place}": tensor for place, tensor in enumerate(result)}


def _check(name: str, found: Tensor, wanted: Tensor, within: float) -> None:
    kinds = [(tuple(tensor.shape), tensor.dtype) for tensor in (found, wanted)]
    if kinds[0] != kinds[1]:
        raise AssertionError(f"{name}: found {kinds[0]}, wanted {kinds[1]}")
    if torch.equal(found, wanted):
        return
    found, wanted = found.double(), wanted.double()
    off = ((found - wanted).abs().max() / wanted.abs().max()).item()
    if not off <= within:  # nan is no agreement
        raise AssertionError(f"{name}: the largest difference is {off:.1e} of the largest element")
