"""Whether the tensors of a checkpoint fit a model: all is checked before the first is copied."""

import torch
from torch import Tensor

from siglip_lib.base.checks import finite_tensors, listed


def check_plain(found: dict[str, Tensor], where: str) -> None:
    """Refuse tensors that do not store each of their elements: a few bytes could stand for any number of them."""

    def plain(tensor: Tensor) -> bool:
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_nested:
            return False
        return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()

    if odd := [name for name, tensor in found.items() if not plain(tensor)]:
        raise ValueError(
            f"{where} does not store each element of {listed(odd)}: sparse, expanded, or on the meta device; store "
            "dense tensors"
        )


def check_fit(
    found: dict[str, Tensor], ours: dict[str, list[Tensor]], misfit: str, hint: str = ""
) -> None:
    """Refuse what is missing, unexpected, or of another shape, listed between ``misfit`` and ``hint``."""
    shapes = {name: (sum(map(len, views)), *views[0].shape[1:]) for name, views in ours.items()}
    missing, unexpected = ours.keys() - found.keys(), found.keys() - ours.keys()
    wrong = {
        f"{name} {tuple(found[name].shape)}, not {shapes[name]}"
        for name in ours.keys() & found.keys()
        if found[name].shape != shapes[name]
    }
    integer = {
        f"{name} {tensor.dtype}" for name, tensor in found.items() if not tensor.is_floating_point()
    }
    problems = [
        f"{kind} ({len(names)}): {listed(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of the wrong shape", wrong),
            ("not of a floating-point dtype", integer),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{misfit}. " + "; ".join(problems) + hint)


def check_finite(found: dict[str, Tensor], ours: dict[str, list[Tensor]], where: str) -> None:
    """Refuse NaN and infinity, in a checkpoint that fits or by conversion to the model's dtype."""
    for name, views in ours.items():
        for dtype in {view.dtype for view in views}:
            # one by one, as a copy of all could be too much
            finite_tensors(f"{where} has, as {dtype},", {name: found[name].to(dtype)})


def fill(ours: dict[str, list[Tensor]], found: dict[str, Tensor]) -> None:
    """Copy tensors that fit into the views of the same names."""
    with torch.no_grad():
        for name, views in ours.items():
            rows = found[name].split([len(view) for view in views])
            for view, part in zip(views, rows, strict=True):
                view.copy_(part)
