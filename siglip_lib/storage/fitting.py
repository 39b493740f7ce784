"""Whether the tensors of a checkpoint fit a model: all is checked before the first is copied."""

from collections.abc import Mapping

import torch
from torch import Tensor

from siglip_lib.base.checks import finite_tensors, join_names

# a model's tensors or parts of them, by the name of the stored tensor that holds the rows of all
Views = dict[str, list[Tensor]]


def check_plain(found: Mapping[str, object], where: str) -> None:
    """Raise ValueError for what does not store each of its elements: a few bytes could stand for any number of them."""

    def plain(tensor: object) -> bool:
        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.is_nested:
            return False
        if tensor.layout != torch.strided:
            return False
        return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()

    if odd := [name for name, tensor in found.items() if not plain(tensor)]:
        raise ValueError(
            f"{where} does not store each element of {join_names(odd)}: sparse, expanded, on the meta device, or no "
            "tensor; store dense tensors"
        )


def check_fit(
    found: dict[str, Tensor], wanted: Views, misfit: str, hint: str = "", same_dtype: bool = False
) -> None:
    """Raise ValueError for tensors of other names, shapes or dtypes than the wanted ones; no element is looked at.

    Args:
        found: the tensors of a checkpoint; on the meta device they may be.
        wanted: what the checkpoint should hold.
        misfit: how the message begins.
        hint: how it ends.
        same_dtype: whether each dtype must be the model's; else any floating-point one will do.
    """
    both = wanted.keys() & found.keys()
    problems = {"missing": wanted.keys() - both, "unexpected": found.keys() - both}
    shapes, dtypes = [], []
    for name in both:
        tensor, views = found[name], wanted[name]
        shape = views[0].shape if len(views) == 1 else (sum(map(len, views)), *views[0].shape[1:])
        if tensor.shape != shape:
            shapes.append(f"{name} {tuple(tensor.shape)}, not {tuple(shape)}")
        if tensor.dtype != views[0].dtype if same_dtype else not tensor.is_floating_point():
            dtypes.append(f"{name} {tensor.dtype}")
    problems["of the wrong shape"] = shapes
    problems["not of the model's dtype" if same_dtype else "not of a floating-point dtype"] = dtypes
    said = [f"{kind} ({len(x)}): {join_names(x)}" for kind, x in problems.items() if x]
    if said:
        raise ValueError(f"{misfit}. " + "; ".join(said) + hint)


def check_finite(found: dict[str, Tensor], wanted: Views, where: str) -> None:
    """Raise ValueError for NaN and infinity, in a checkpoint that fits or by conversion to the model's dtype."""
    for name, views in wanted.items():
        for dtype in {view.dtype for view in views}:
            # one by one, as a copy of all could be too much
            finite_tensors(f"{where} has, as {dtype},", {name: found[name].to(dtype)})


def fill(wanted: Views, found: dict[str, Tensor]) -> None:
    """Copy tensors that fit into the views of the same names."""
    with torch.no_grad():
        for name, views in wanted.items():
            rows = found[name].split([len(view) for view in views])
            for view, part in zip(views, rows, strict=True):
                view.copy_(part)
