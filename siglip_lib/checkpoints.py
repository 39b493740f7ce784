"""Weights from disk or hub into a ``VisionTransformer`` and back, under three libraries' names."""

import json
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from siglip_lib.patches import resample_abs_pos_embed

if TYPE_CHECKING:
    from siglip_lib.vision_transformer import VisionTransformer

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
_RENAMES = (
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("pos_embed", "embeddings.position_embedding.weight"),
    ("blocks.", "encoder.layers."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.", ".self_attn."),
    (".self_attn.proj.", ".self_attn.out_proj."),
    ("norm.", "post_layernorm."),
    ("attn_pool.latent", "head.probe"),
    ("attn_pool.proj.", "head.attention.out_proj."),
    ("attn_pool.norm.", "head.layernorm."),
    ("attn_pool.mlp.", "head.mlp."),
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
        FileNotFoundError: there is no such file or folder, or no weights in it.
        ValueError: a file is truncated or malformed, or a tensor is missing, unexpected or of the wrong shape; the
            message lists them, and the model is as it was.
        OSError: the hub cannot be reached; the message says what to download.
    """
    target = model.state_dict()
    if any(tensor.is_meta for tensor in target.values()):
        raise ValueError(
            "model is on the meta device; give it memory with model.to_empty(device=...)"
        )
    state, paths = {}, _find(str(source))
    for path in paths:
        state |= _read(path)
    where = paths[0].name if len(paths) == 1 else paths[0].parent.name
    names, prefix = _tower(state, where)
    tower = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    found = _from_transformers(tower) if names == "transformers" else dict(tower)
    resampled = _fit_positions(found, model)
    _check(found, target, where)
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(found[name])
    if resampled:
        warnings.warn(_resampling(*resampled), stacklevel=2)
    return LoadedWeights(names, prefix, len(tower), len(state) - len(tower), resampled)


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
        state = _to_transformers(state, len(model.blocks))
    state = {prefix + name: tensor.contiguous() for name, tensor in state.items()}
    temporary = path.with_name(path.name + ".part")
    try:
        save_file(state, temporary, metadata={"format": "pt"})  # transformers asks for the format
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- files ---


def _find(source: str) -> list[Path]:
    """The files of a checkpoint that hold the tower."""
    if source.startswith(_HUB):
        return _find_on_hub(source.removeprefix(_HUB))
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        hint = (
            f"; for a repository of the hub write {_HUB}{source}" if source.count("/") == 1 else ""
        )
        raise FileNotFoundError(f"no file or folder {source!r}{hint}")
    files = _choose(lambda name: path / name if (path / name).is_file() else None)
    files = files or sorted(path.glob("*.safetensors"))
    if not files or (len(files) > 1 and files == sorted(path.glob("*.safetensors"))):
        raise FileNotFoundError(
            f"folder {source!r} holds no model.safetensors, no pytorch_model.bin and no index of either; "
            "name the file itself"
        )
    return files


def _choose(get: Callable[[str], Path | None]) -> list[Path]:
    """The files to read, out of what ``get`` finds by name: one whole file, or the parts that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if path := get(name):
            return [path]
        if index := get(f"{name}.index.json"):
            return [_part(part, index, get) for part in _parts(index)]
    return []


def _parts(index: Path) -> list[str]:
    """The names of the files that hold the tower, by the index of a sharded checkpoint."""
    try:
        where = json.loads(index.read_text())["weight_map"]
        _, prefix = _tower(where, index.name)
        parts = sorted({file for name, file in where.items() if name.startswith(prefix)})
        if any(Path(part).name != part for part in parts):
            raise ValueError("it names files outside its folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} is no index of a sharded checkpoint: {error}") from error
    return parts


def _part(name: str, index: Path, get: Callable[[str], Path | None]) -> Path:
    path = get(name)
    if path is None:
        raise FileNotFoundError(f"{index.name} names {name}, which is missing beside it")
    return path


def _find_on_hub(repository: str) -> list[Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    unreachable: list[Exception] = []

    def get(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError as error:  # no connection, and not fetched before
            unreachable.append(error)
        except EntryNotFoundError:
            pass
        return None

    try:
        files = _choose(get)
    except OSError as error:
        files, unreachable = [], [*unreachable, error]
    if files:
        return files
    if unreachable:
        raise OSError(
            f"cannot fetch {repository!r} from the hub ({type(unreachable[-1]).__name__}). Download its "
            "model.safetensors, or the index and the parts that it names, into a folder, and give that folder's path"
        ) from unreachable[-1]
    raise FileNotFoundError(f"repository {repository!r} holds no weights that are known here")


def _read(path: Path) -> dict[str, Tensor]:
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
    except (RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path.name} is truncated or no checkpoint: {error}") from error
    for key in ("state_dict", "model"):  # what training scripts wrap it in
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
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


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        if old.startswith("."):
            name = name.replace(old, new)
        elif name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def _from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename from transformers to timm; parts of a pair or triple that is not whole keep their names."""
    back = [(new, old) for old, new in reversed(_RENAMES)]
    found = {_renamed(name, back): tensor for name, tensor in state.items()}
    for name in list(found):
        if ".attn.q_proj." in name:
            parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
            if all(part in found for part in parts):
                found[name.replace("q_proj", "qkv")] = torch.cat([found.pop(p) for p in parts])
    for kind in ("weight", "bias"):
        joined = found.pop(f"head.attention.in_proj_{kind}", None)
        if joined is not None:
            third = joined.shape[0] // 3
            found[f"attn_pool.q.{kind}"] = joined[:third]
            found[f"attn_pool.kv.{kind}"] = joined[third:]
    if "pos_embed" in found:
        found["pos_embed"] = found["pos_embed"][None]  # (N, D) to (1, N, D)
    return found


def _to_transformers(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Rename from timm to transformers."""
    pooled = "attn_pool.latent" in state
    lacks = set(state) ^ set(_from_transformers_names(depth, pooled))
    if lacks:
        raise ValueError(
            "transformers' SiglipVisionModel has no class token, no LayerScale, no qk-norm, no classifier, and a bias "
            f"everywhere; it differs in {_listed(lacks)}"
        )
    found = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[_renamed(name.replace("qkv", f"{part}_proj"), _RENAMES)] = rows
        elif not name.startswith(("attn_pool.q.", "attn_pool.kv.")):
            found[_renamed(name, _RENAMES)] = tensor
    for kind in ("weight", "bias") if pooled else ():
        joined = torch.cat([state[f"attn_pool.q.{kind}"], state[f"attn_pool.kv.{kind}"]])
        found[f"head.attention.in_proj_{kind}"] = joined
    found["embeddings.position_embedding.weight"] = state["pos_embed"][0]  # (N, D)
    return found


def _from_transformers_names(depth: int, pooled: bool) -> list[str]:
    """List the tensors of transformers' tower under timm's names."""
    layers = ["patch_embed.proj", "norm"]
    for i in range(depth):
        parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        layers += [f"blocks.{i}.{part}" for part in parts]
    if pooled:
        layers += [
            f"attn_pool.{part}" for part in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")
        ]
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    return names + ["pos_embed"] + ["attn_pool.latent"] * pooled


# --- the check, before anything is copied ---


def _fit_positions(
    found: dict[str, Tensor], model: "VisionTransformer"
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Resample the position embeddings if only their grid differs; return the old and the new grid."""
    old, wanted = found.get("pos_embed"), model.pos_embed
    grid = model.patch_embed.grid_size
    prefix = wanted.shape[1] - grid[0] * grid[1]
    if old is None or old.ndim != 3 or old.shape == wanted.shape or old.shape[2] != wanted.shape[2]:
        return None
    side = math.isqrt(max(old.shape[1] - prefix, 0))
    if side * side + prefix != old.shape[1] or side == 0:
        return None  # no square: the check will name the shape
    found["pos_embed"] = resample_abs_pos_embed(old, grid, (side, side), prefix)
    return (side, side), grid


def _check(found: dict[str, Tensor], target: dict[str, Tensor], where: str) -> None:
    missing, unexpected = target.keys() - found.keys(), found.keys() - target.keys()
    wrong = {
        f"{name} {tuple(found[name].shape)}, not {tuple(target[name].shape)}"
        for name in target.keys() & found.keys()
        if found[name].shape != target[name].shape
    }
    integer = {
        f"{name} {tensor.dtype}" for name, tensor in found.items() if not tensor.is_floating_point()
    }
    problems = [
        f"{kind} ({len(names)}): {_listed(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of the wrong shape", wrong),
            ("not of a floating-point dtype", integer),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{where} does not fit the model, which is unchanged. " + "; ".join(problems)
        )


def _listed(names: Iterable[str], most: int = 20) -> str:
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _resampling(old: tuple[int, int], new: tuple[int, int]) -> str:
    return f"position embeddings resampled from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"
