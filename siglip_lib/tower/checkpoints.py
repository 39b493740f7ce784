"""Weights from disk or hub into a ``VisionTransformer`` and back, under three libraries' names."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from siglip_lib.base.checks import finite_tensors, one_of, pair
from siglip_lib.storage.fitting import Views, check_finite, check_fit, check_plain, fill
from siglip_lib.storage.names import (
    IMAGE_TOWER,
    check_transformers_has,
    tower_of,
    under_transformers_names,
    unwrapped,
    whole_state,
    without_wrappers,
)
from siglip_lib.storage.reading import find_weights, noted_grid, read_weights
from siglip_lib.storage.writing import write_tensors
from siglip_lib.tower.patches import resample_abs_pos_embed

if TYPE_CHECKING:
    from siglip_lib.tower.vision_transformer import VisionTransformer

_Grid = tuple[int, int]  # rows and columns of patches
_POSITIONS = {"pos_embed", "embeddings.position_embedding.weight"}  # whosever names they are

# What save_weights offers: whose names, and the prefix.
_LAYOUTS = {
    "timm": ("timm", ""),
    "deepseek_vl2": ("timm", "vision."),
    "transformers": ("transformers", ""),  # SiglipVisionModel from 5.0 on
    "transformers_4": ("transformers", "vision_model."),  # before; and SiglipModel in both
}


@dataclass(frozen=True)
class LoadedWeights:
    """What ``load_weights`` found: whose names, where, and what it did besides copying."""

    names: str  # "timm" or "transformers"
    prefix: str  # of the tower in the checkpoint
    tensors: int  # of the tower in the checkpoint
    others: int  # tensors outside the prefix, of a text tower for example
    resampled: tuple[_Grid, _Grid] | None  # grids of the position embeddings

    def __str__(self) -> str:
        said = f"{self.tensors} tensors under {self.names}'s names"
        said += f" after {self.prefix!r}" if self.prefix else ""
        said += f"; {self.others} of other parts left alone" if self.others else ""
        return said + (f"; {_resampling(*self.resampled)}" if self.resampled else "")


def load_weights(
    model: "VisionTransformer", source: str | Path, grid: tuple[int, int] | None = None
) -> LoadedWeights:
    """Copy weights into ``model``, all or none.

    Names of timm, DeepSeek-VL2 and transformers (SiglipVisionModel and SiglipModel of 4.x and 5.x, SigLIP 2 at a fixed
    resolution) are told apart by themselves, and so are those of a model that was stored compiled or wrapped. Tensors
    of other parts, such as a text tower or a language model, are left alone. Values are converted to the parameters'
    dtype. Position embeddings of another grid are resampled, with a warning. Of which grid they are says ``grid``, else
    the file, if ``save_weights`` wrote it; else it is taken for a square.

    Args:
        model: the tower, of the checkpoint's width and depth; compiled and wrapped it may be, but not sharded.
        source: a file (safetensors, or a pickle, of which only tensors are read), a folder as transformers or timm
            write it, sharded or not, or ``hf-hub:owner/name`` for a repository of the Hugging Face hub. Only the last
            one uses the network; of a sharded repository it fetches the index and the parts that hold the tower.
        grid: rows and columns of the checkpoint's position embeddings, where the file does not say and it is no square.

    Returns:
        What was found and done.

    Raises:
        FileNotFoundError: there is no such file or folder, no weights in it, or a part is missing.
        PermissionError: a file or folder cannot be read.
        ValueError: a file is truncated or malformed, a tensor is missing, unexpected, of the wrong shape or not finite
            in the model's dtype, or the grid of the positions is not known; the message says which, and the model is as
            it was.
        OSError: the hub cannot be reached; the message says what to download.
    """
    grid = None if grid is None else pair("grid", grid)
    model = unwrapped(model)
    weights = whole_state(model)
    if any(tensor.is_meta for tensor in weights.values()):
        raise ValueError(
            "model is on the meta device; give it memory with model.to_empty(device=...)"
        )
    files = find_weights(str(source))
    state, where = read_weights(files)
    names, prefix = tower_of(state, where)
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    found = without_wrappers(found, where)
    wanted = {name: [tensor] for name, tensor in weights.items()}
    if names == "transformers":
        wanted = under_transformers_names(weights, IMAGE_TOWER)
    check_plain(found, where)
    grid = grid or noted_grid(files)
    resampled = _fit_positions(found, wanted, model, grid, where)
    misfit = f"{where} does not fit the model, which is unchanged"
    check_fit(found, wanted, misfit, _hint(found, wanted))
    check_finite(found, wanted, where)
    if resampled:
        guess = "" if grid else "; a square was assumed, as no grid is noted: grid= says another"
        warnings.warn(_resampling(*resampled) + guess, stacklevel=2)
    fill(wanted, found)
    return LoadedWeights(names, prefix, len(found), len(state) - len(found), resampled)


def save_weights(model: "VisionTransformer", path: str | Path, layout: str = "timm") -> None:
    """Write the weights of ``model`` as a safetensors file; an existing one is replaced only by a whole new one.

    Its metadata note the grid of the position embeddings, as ``grid``, such as ``2x8``.

    Args:
        model: the tower; compiled and wrapped it may be, but not sharded.
        path: the file, ending in ``.safetensors``.
        layout: whose names: ``timm``, ``deepseek_vl2``, ``transformers`` (SiglipVisionModel of 5.x) or
            ``transformers_4`` (that of 4.x, and the image tower of SiglipModel in both).

    Raises:
        ValueError: the layout is unknown, the path ends otherwise, the model has a part that transformers' lacks, or
            a weight is not finite.
        OSError: the file cannot be written.
    """
    path = Path(path)
    one_of("layout", layout, _LAYOUTS)
    if path.suffix != ".safetensors":
        raise ValueError(f"path={str(path)!r} must end in .safetensors")
    names, prefix = _LAYOUTS[layout]
    model = unwrapped(model)
    state = whole_state(model)
    finite_tensors("model has", state)
    noted = {"grid": "{}x{}".format(*model.patch_embed.grid_size)} if "pos_embed" in state else {}
    if names == "transformers":
        check_transformers_has(state, len(model.blocks))
        views = under_transformers_names(state, IMAGE_TOWER)
        state = {name: torch.cat(rows) for name, rows in views.items()}
    write_tensors({prefix + name: tensor for name, tensor in state.items()}, path, **noted)


def _fit_positions(
    found: dict[str, Tensor],
    wanted: Views,
    model: "VisionTransformer",
    grid: _Grid | None,
    where: str,
) -> tuple[_Grid, _Grid] | None:
    """Resample the position embeddings if their grid differs; return the old and the new grid.

    Equal counts are not equal grids: 2 x 8 patches are as many as 4 x 4.
    """
    name = next(iter(_POSITIONS & found.keys() & wanted.keys()), None)
    if name is None:
        return None
    old, (ours,), new = found[name], wanted[name], model.patch_embed.grid_size
    if old.shape != (*ours.shape[:-2], *old.shape[-2:-1], ours.shape[-1]):
        return None  # check_fit will name the shape
    prefix = ours.shape[-2] - new[0] * new[1]
    count = old.shape[-2] - prefix
    side = math.isqrt(max(count, 0))
    if grid is None and side**2 == count:
        grid = (side, side)
    if grid is None and old.shape != ours.shape:
        return None
    if grid is None or grid[0] * grid[1] != count:
        said = "no square, and notes no grid" if grid is None else f"not {grid[0]} x {grid[1]}"
        raise ValueError(
            f"{where} has position embeddings of {count} patches, {said}; give load_weights "
            f"grid=(rows, columns), such as grid={new}, the model's"
        )
    if count == 0 or grid == new:
        return None
    old = old.view(1, *old.shape[-2:])  # transformers' is (N, D)
    found[name] = resample_abs_pos_embed(old, new, grid, prefix).view_as(ours)
    return grid, new


def _hint(found: dict[str, Tensor], wanted: Views) -> str:
    """How to load a tower whose head or grid is not the model's."""

    def head(shapes: dict[str, torch.Size]) -> tuple[str, int]:
        pool = "avg" if "fc_norm.weight" in shapes else ""
        if any(name.startswith(("attn_pool.", "head.attention.")) for name in shapes):
            pool = "map"
        return pool, shapes.get("head.weight", torch.Size([0]))[:1].numel()

    theirs = {name: tensor.shape for name, tensor in found.items()}
    ours = {name: views[0].shape for name, views in wanted.items()}
    said, (pool, classes) = "", head(theirs)
    if (pool, classes) != head(ours):
        said += (
            f". The heads differ: build the model with global_pool={pool!r} and num_classes={classes}, as the "
            "checkpoint's is, load it, and call model.reset_classifier(num_classes, global_pool)"
        )
    if any(theirs[name] != ours[name] for name in _POSITIONS & theirs.keys() & ours.keys()):
        said += ". Positions of a grid that is no square are resampled if load_weights is given grid=(rows, columns)"
    return said


def _resampling(old: _Grid, new: _Grid) -> str:
    return f"position embeddings resampled from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"
