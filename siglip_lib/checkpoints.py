"""Weights from disk or hub into a ``VisionTransformer`` and back, under three libraries' names."""

import json
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from siglip_lib.patches import resample_abs_pos_embed

if TYPE_CHECKING:
    from siglip_lib.vision_transformer import VisionTransformer

Get = Callable[[str], Path | None]  # from a file's name to its path
Found = TypeVar("Found")

_HUB = "hf-hub:"
# Every tower has one of these tensors; what stands before the name is the tower's prefix.
_MARKS = {
    "patch_embed.proj.weight": "timm",
    "embeddings.patch_embedding.weight": "transformers",
}
# What save_weights offers: whose names, and the prefix.
_LAYOUTS = {
    "timm": ("timm", ""),
    "deepseek_vl2": ("timm", "vision."),
    "transformers": ("transformers", ""),  # SiglipVisionModel from 5.0 on
    "transformers_4": ("transformers", "vision_model."),  # before; and SiglipModel in both
}
# timm's names and transformers', in the order in which they are replaced; one that starts with a
# dot stands anywhere, others at the start.
_BOTH_TOWERS = (
    ("pos_embed", "embeddings.position_embedding.weight"),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.", ".self_attn."),
    (".self_attn.proj.", ".self_attn.out_proj."),
)
IMAGE_TOWER = (
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    *_BOTH_TOWERS,
    ("norm.", "post_layernorm."),
    ("attn_pool.latent", "head.probe"),
    ("attn_pool.q.", "head.attention.in_proj_"),
    ("attn_pool.kv.", "head.attention.in_proj_"),
    ("attn_pool.proj.", "head.attention.out_proj."),
    ("attn_pool.norm.", "head.layernorm."),
    ("attn_pool.mlp.", "head.mlp."),
)
TEXT_TOWER = (
    ("token_embed.", "embeddings.token_embedding."),
    *_BOTH_TOWERS,
    ("norm.", "final_layer_norm."),
)


@dataclass(frozen=True)
class LoadedWeights:
    """What ``load_weights`` found: whose names, where, and what it did besides copying."""

    names: str  # "timm" or "transformers"
    prefix: str  # of the tower in the checkpoint
    tensors: int  # of the tower in the checkpoint
    others: int  # tensors outside the prefix, of a text tower for example
    resampled: tuple[tuple[int, int], tuple[int, int]] | None  # grids of the position embeddings

    def __str__(self) -> str:
        text = f"{self.tensors} tensors under {self.names}'s names"
        text += f" after {self.prefix!r}" if self.prefix else ""
        text += f"; {self.others} of other parts left alone" if self.others else ""
        return text + (f"; {_resampling(*self.resampled)}" if self.resampled else "")


def load_weights(model: "VisionTransformer", source: str | Path) -> LoadedWeights:
    """Copy weights into ``model``, all or none.

    Names of timm, DeepSeek-VL2 and transformers (SiglipVisionModel and SiglipModel of 4.x and 5.x, SigLIP 2 at a fixed
    resolution) are told apart by themselves. Tensors of other parts, such as a text tower or a language model, are left
    alone. Values are converted to the parameters' dtype. Position embeddings of another grid are resampled, with a
    warning.

    Args:
        model: the tower, of the checkpoint's width and depth.
        source: a file (safetensors, or a pickle, of which only tensors are read), a folder as transformers or timm
            write it, sharded or not, or ``hf-hub:owner/name`` for a repository of the Hugging Face hub. Only the last
            one uses the network; of a sharded repository it fetches the index and the parts that hold the tower.

    Returns:
        What was found and done.

    Raises:
        FileNotFoundError: there is no such file or folder, no weights in it, or a part is missing.
        ValueError: a file is truncated or malformed, or a tensor is missing, unexpected or of the wrong shape; the
            message lists them, and the model is as it was.
        OSError: the hub cannot be reached; the message says what to download.
    """
    weights = model.state_dict()
    if any(tensor.is_meta for tensor in weights.values()):
        raise ValueError(
            "model is on the meta device; give it memory with model.to_empty(device=...)"
        )
    state, paths = {}, _find(str(source))
    for path in paths:
        state |= read_tensors(path)
    where = paths[0].name if len(paths) == 1 else paths[0].parent.name
    names, prefix = _tower(state, where)
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    ours = {name: [tensor] for name, tensor in weights.items()}
    if names == "transformers":
        ours = under_transformers_names(weights, IMAGE_TOWER)
    resampled = _fit_positions(found, ours, model)
    check_fit(found, ours, f"{where} does not fit the model, which is unchanged")
    if resampled:
        warnings.warn(_resampling(*resampled), stacklevel=2)
    fill(ours, found)
    return LoadedWeights(names, prefix, len(found), len(state) - len(found), resampled)


def save_weights(model: "VisionTransformer", path: str | Path, layout: str = "timm") -> None:
    """Write the weights of ``model`` as a safetensors file; an existing one is replaced only by a whole new one.

    Args:
        model: the tower.
        path: the file, ending in ``.safetensors``.
        layout: whose names: ``timm``, ``deepseek_vl2``, ``transformers`` (SiglipVisionModel of 5.x) or
            ``transformers_4`` (that of 4.x, and the image tower of SiglipModel in both).

    Raises:
        ValueError: the layout is unknown, the path ends otherwise, or the model has a part that transformers' lacks.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if layout not in _LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; allowed are {', '.join(_LAYOUTS)}")
    if path.suffix != ".safetensors":
        raise ValueError(f"path={str(path)!r} must end in .safetensors")
    names, prefix = _LAYOUTS[layout]
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if names == "transformers":
        _check_transformers_has(state, len(model.blocks))
        views = under_transformers_names(state, IMAGE_TOWER)
        state = {name: torch.cat(rows) for name, rows in views.items()}
    state = {prefix + name: tensor.contiguous() for name, tensor in state.items()}
    temporary = path.with_name(path.name + ".part")
    try:
        save_file(state, temporary, metadata={"format": "pt"})  # transformers 4.x asks for it
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- files ---


def _find(source: str) -> list[Path]:
    """The files of a checkpoint that hold the tower."""
    path = Path(source)
    if path.is_file():
        return [path]

    def choose(get: Get) -> list[Path]:
        if files := choose_weights(get, tower_only=True):
            return files
        if not path.is_dir():
            raise FileNotFoundError(f"{source!r} holds no weights that are known here")
        files = list(path.glob("*.safetensors"))
        if len(files) != 1:
            raise FileNotFoundError(
                f"folder {source!r} holds no model.safetensors, no pytorch_model.bin and no index of either, but "
                f"{len(files)} other safetensors files; name the file itself"
            )
        return files

    return find_in(source, choose)


def find_in(source: str, choose: Callable[[Get], Found], also: str = "") -> Found:
    """What ``choose`` finds in a folder or a repository of the hub.

    Args:
        source: the folder's path or ``hf-hub:owner/name``.
        choose: is given a function from a file's name to its path, or to None if there is none; raises
            FileNotFoundError if something lacks.
        also: files to download beside the weights, for the message where there is no connection.
    """
    if source.startswith(_HUB):
        return _find_on_hub(source.removeprefix(_HUB), choose, also)
    path = Path(source)
    if path.is_file():
        raise NotADirectoryError(f"{source!r} is a file; give the folder that holds it")
    if not path.is_dir():
        raise FileNotFoundError(
            f"no file or folder {source!r}; a repository of the hub is written {_HUB}owner/name"
        )
    return choose(lambda name: path / name if (path / name).is_file() else None)


def choose_weights(get: Get, tower_only: bool = False) -> list[Path]:
    """The files to read, out of what ``get`` finds by name: one whole file, or the parts that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if path := get(name):
            return [path]
        if index := get(f"{name}.index.json"):
            parts = {part: get(part) for part in _parts(index, tower_only)}
            if lost := [part for part, path in parts.items() if path is None]:
                raise FileNotFoundError(f"{index.name} names {listed(lost)}, missing beside it")
            return list(parts.values())
    return []


def _parts(index: Path, tower_only: bool) -> list[str]:
    """The names of the files that the index of a sharded checkpoint names, of all or of those that hold the tower."""
    try:
        where = json.loads(index.read_text())["weight_map"]
        if any(Path(file).name != file for file in where.values()):
            raise ValueError("it names files outside its folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} is no index of a sharded checkpoint: {error!r}") from error
    prefix = _tower(where, index.name)[1] if tower_only else ""
    return sorted({file for name, file in where.items() if name.startswith(prefix)})


def _find_on_hub(repository: str, choose: Callable[[Get], Found], also: str) -> Found:
    """What ``choose`` finds in a repository, fetched; without a connection, in what was fetched before."""
    from huggingface_hub import hf_hub_download, model_info, try_to_load_from_cache

    offline = None
    try:
        # fails at once where a download would try for 20 seconds
        there = {file.rfilename for file in model_info(repository).siblings}
    except Exception as error:  # its class depends on the cause and the version
        offline = error

    def get(name: str) -> Path | None:
        if offline is None:
            return Path(hf_hub_download(repository, name)) if name in there else None
        cached = try_to_load_from_cache(repository, name)
        return Path(cached) if isinstance(cached, str) else None

    try:
        return choose(get)
    except FileNotFoundError:
        if offline is None:
            raise
    raise OSError(
        f"cannot fetch {repository!r} from the hub ({type(offline).__name__}), and it was not fetched before. Download "
        f"its {also}model.safetensors, or its model.safetensors.index.json and the parts that this names, "
        "into a folder, and give that folder's path"
    ) from offline


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by name."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path.name} is truncated or no safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path.name} is no checkpoint, or holds more than tensors") from error
    except Exception as error:  # garbage can lead the unpickler into any
        raise ValueError(f"{path.name} is truncated or no checkpoint: {error!r}") from error
    for key in ("state_dict", "model"):  # what training scripts wrap it in
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise ValueError(f"{path.name} holds no dict of tensors by name")
    return state


# --- names ---


def _tower(names: Iterable[str], where: str) -> tuple[str, str]:
    """Whose names these are, and the prefix of the image tower."""
    found = [
        (layout, n.removesuffix(m)) for n in names for m, layout in _MARKS.items() if n.endswith(m)
    ]
    if len(found) != 1:
        raise ValueError(
            f"{where} holds {len(found)} image towers; it must be one, with a tensor {' or '.join(_MARKS)}"
        )
    return found[0]


def under_transformers_names(
    state: dict[str, Tensor], names: tuple[tuple[str, str], ...]
) -> dict[str, list[Tensor]]:
    """Views of timm's tensors by transformers' names; where one there is two here, both, in the order of their rows.

    What transformers lacks keeps its name or gets one that transformers lacks too. ``names`` are those of one tower,
    ``IMAGE_TOWER`` or ``TEXT_TOWER``.
    """
    found: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        views = {name: tensor[0] if name == "pos_embed" else tensor}  # theirs is (N, D)
        if ".attn.qkv." in name:
            parts = [name.replace("qkv", f"{part}_proj") for part in "qkv"]
            views = dict(zip(parts, tensor.chunk(3), strict=True))
        for renamed, view in views.items():
            for old, new in names:
                if old.startswith("."):
                    renamed = renamed.replace(old, new)
                elif renamed.startswith(old):
                    renamed = new + renamed.removeprefix(old)
            found.setdefault(renamed, []).append(view)
    return found


def _check_transformers_has(state: dict[str, Tensor], depth: int) -> None:
    """Refuse a tower, under timm's names, that is not what transformers builds."""
    pooled = "attn_pool.latent" in state
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    pool = ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2") if pooled else ()
    layers = ["patch_embed.proj", "norm", *(f"attn_pool.{layer}" for layer in pool)]
    layers += [f"blocks.{i}.{layer}" for i in range(depth) for layer in block]
    theirs = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {"pos_embed"}
    theirs |= {"attn_pool.latent"} if pooled else set()
    if differs := state.keys() ^ theirs:
        raise ValueError(
            "transformers' SiglipVisionModel has no class token, no LayerScale, no qk-norm, no classifier, and a bias "
            f"everywhere; it differs in {listed(differs)}"
        )


# --- the check, before anything is copied ---


def _fit_positions(
    found: dict[str, Tensor], ours: dict[str, list[Tensor]], model: "VisionTransformer"
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Resample the position embeddings if only their grid differs; return the old and the new grid."""
    name = "pos_embed" if "pos_embed" in ours else "embeddings.position_embedding.weight"
    if name not in found or name not in ours:
        return None
    old, (wanted,), grid = found[name], ours[name], model.patch_embed.grid_size
    prefix = wanted.shape[-2] - grid[0] * grid[1]
    side = math.isqrt(max(old.shape[-2] - prefix, 0)) if old.ndim == wanted.ndim else 0
    square = (*wanted.shape[:-2], side**2 + prefix, wanted.shape[-1])
    if side == 0 or old.shape == wanted.shape or old.shape != square:
        return None  # equal, or the check will name the shape
    old = old.view(1, *old.shape[-2:])  # transformers' is (N, D)
    found[name] = resample_abs_pos_embed(old, grid, (side, side), prefix).view_as(wanted)
    return (side, side), grid


def check_fit(found: dict[str, Tensor], ours: dict[str, list[Tensor]], misfit: str) -> None:
    """Refuse what is missing, unexpected, or of another shape, listed after the words ``misfit``."""
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
        raise ValueError(f"{misfit}. " + "; ".join(problems))


def fill(ours: dict[str, list[Tensor]], found: dict[str, Tensor]) -> None:
    """Copy tensors that fit into the views of the same names."""
    with torch.no_grad():
        for name, views in ours.items():
            rows = found[name].split([len(view) for view in views])
            for view, part in zip(views, rows, strict=True):
                view.copy_(part)


def listed(names: Iterable[str], most: int = 20) -> str:
    """The names in order, those beyond ``most`` only counted."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _resampling(old: tuple[int, int], new: tuple[int, int]) -> str:
    return f"position embeddings resampled from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"
