"""Weights from disk or hub into a ``VisionTransformer`` and back, under three libraries' names."""

import json
import math
import os
import pickle
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from siglip_lib.checks import finite_tensors, pair
from siglip_lib.files import replacing
from siglip_lib.patches import resample_abs_pos_embed

if TYPE_CHECKING:
    from siglip_lib.vision_transformer import VisionTransformer

Get = Callable[[str], Path | None]  # from a file's name to its path
Files = dict[Path, set[str] | None]  # what to read, and which tensors of it; None for all
Found = TypeVar("Found")

_HUB = "hf-hub:"
# Every tower has one of these tensors; what stands before the name is the tower's prefix.
_MARKS = {
    "patch_embed.proj.weight": "timm",
    "embeddings.patch_embedding.weight": "transformers",
}
# What torch.compile (the first), DataParallel and DistributedDataParallel call what they wrap.
_WRAPPERS = ("_orig_mod", "module")
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
    files = _find(str(source))
    state, where = read_weights(files)
    names, prefix = _tower(state, where)
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    found = without_wrappers(found, where)
    ours = {name: [tensor] for name, tensor in weights.items()}
    if names == "transformers":
        ours = under_transformers_names(weights, IMAGE_TOWER)
    check_plain(found, where)
    grid = grid or _noted_grid(files)
    resampled = _fit_positions(found, ours, model, grid, where)
    misfit = f"{where} does not fit the model, which is unchanged"
    check_fit(found, ours, misfit, _hint(found, ours))
    check_finite(found, ours, where)
    if resampled:
        guess = "" if grid else "; a square was assumed, as no grid is noted: grid= says another"
        warnings.warn(_resampling(*resampled) + guess, stacklevel=2)
    fill(ours, found)
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
    if layout not in _LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; allowed are {', '.join(_LAYOUTS)}")
    if path.suffix != ".safetensors":
        raise ValueError(f"path={str(path)!r} must end in .safetensors")
    names, prefix = _LAYOUTS[layout]
    model = unwrapped(model)
    state = whole_state(model)
    finite_tensors("model has", state)
    noted = {}
    if "pos_embed" in state:
        rows, columns = model.patch_embed.grid_size
        noted["grid"] = f"{rows}x{columns}"
    if names == "transformers":
        _check_transformers_has(state, len(model.blocks))
        views = under_transformers_names(state, IMAGE_TOWER)
        state = {name: torch.cat(rows) for name, rows in views.items()}
    write_tensors({prefix + name: tensor for name, tensor in state.items()}, path, **noted)


# --- models ---


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of what torch.compile, DataParallel and DistributedDataParallel made of it."""
    parts = dict(model.named_children())
    for name in _WRAPPERS:
        if parts.keys() == {name}:  # what holds more is a model of its own
            return unwrapped(parts[name])
    return model


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name, the same ones whether parts of the model are compiled or not."""
    state = without_wrappers(model.state_dict(), "model")
    if any(hasattr(tensor, "full_tensor") for tensor in state.values()):  # a DTensor
        raise ValueError(
            "model is sharded over processes. Load weights before it is sharded; save what "
            "siglip_lib.distributed.whole_model(training) gathers, or torch's get_model_state_dict with "
            "full_state_dict=True"
        )
    return state


def without_wrappers(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors by the names that they have where nothing is compiled or wrapped."""
    plain = {_plain(name): tensor for name, tensor in state.items()}
    if len(plain) < len(state):
        raise ValueError(
            f"{where} holds the same tensors twice, wrapped (_orig_mod, module) and not"
        )
    return plain


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


# --- files ---


def _find(source: str) -> Files:
    """The files of a checkpoint that hold the tower."""
    path = Path(source)
    if _kind(path) == "file":
        return {path: None}

    def choose(get: Get) -> Files:
        if files := choose_weights(get, tower_only=True):
            return files
        if source.startswith(_HUB):
            raise FileNotFoundError(f"{source!r} holds no weights that are known here")
        names = [file.name for file in path.iterdir() if file.suffix == ".safetensors"]
        if len(names) != 1:
            raise FileNotFoundError(
                f"folder {source!r} holds no model.safetensors, no pytorch_model.bin and no index of either, but "
                f"{len(names)} other safetensors files; name the file itself"
            )
        return {get(names[0]): None}

    return find_in(source, choose)


def _kind(path: Path) -> str | None:
    """``file``, ``folder``, or None where nothing is; what can't be read, or would never end, is an error."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("rb").close()
    except PermissionError as error:
        raise PermissionError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            there = os.readlink(path)
            raise FileNotFoundError(
                f"{str(path)!r} is a link to {there!r}, where nothing is"
            ) from error
        return None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError(f"{str(path)!r} is neither a file nor a folder, but a pipe or a device")
    return "file" if stat.S_ISREG(mode) else "folder"


def _file(path: Path) -> Path | None:
    """The path if there is a file, None if there is nothing."""
    kind = _kind(path)
    if kind == "folder":
        raise IsADirectoryError(f"{str(path)!r} is a folder; it must be a file")
    return path if kind else None


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
    kind = _kind(path)
    if kind == "file":
        raise NotADirectoryError(f"{source!r} is a file; give the folder that holds it")
    if kind is None:
        raise FileNotFoundError(
            f"no file or folder {source!r}; a repository of the hub is written {_HUB}owner/name"
        )
    return choose(lambda name: _file(path / name))


def choose_weights(get: Get, tower_only: bool = False) -> Files:
    """The files to read, out of what ``get`` finds by name: one whole file, or the parts that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if path := get(name):
            return {path: None}
        if index := get(f"{name}.index.json"):
            parts = _parts(index, tower_only)
            paths = {part: get(part) for part in parts}
            if lost := [part for part, path in paths.items() if path is None]:
                raise FileNotFoundError(f"{index.name} names {listed(lost)}, missing beside it")
            return {paths[part]: names for part, names in parts.items()}
    return {}


def _parts(index: Path, tower_only: bool) -> dict[str, set[str]]:
    """The files that the index of a sharded checkpoint names, all or those that hold the tower, and their tensors."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if any(Path(file).name != file for file in where.values()):
            raise ValueError("it names files outside its folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index.name} is no index of a sharded checkpoint: {error!r}") from error
    prefix = _tower(where, index.name)[1] if tower_only else ""
    parts: dict[str, set[str]] = {}
    for name, file in sorted(where.items(), key=lambda entry: entry[1]):
        parts.setdefault(file, set()).add(name)
    return {f: names for f, names in parts.items() if any(n.startswith(prefix) for n in names)}


def _find_on_hub(repository: str, choose: Callable[[Get], Found], also: str) -> Found:
    """What ``choose`` finds in a repository, fetched; without a connection, in what was fetched before."""
    from huggingface_hub import constants, hf_hub_download, model_info, try_to_load_from_cache

    offline = None
    try:
        # fails at once where a download would try for 20 seconds; without a limit it waits for ever for an answer
        about = model_info(repository, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        there = {file.rfilename for file in about.siblings}
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


def read_weights(files: Files) -> tuple[dict[str, Tensor], str]:
    """The tensors of all files by name, and what to call these files in a message."""
    state = {}
    for path, names in files.items():
        found = read_tensors(path)
        if names is None:
            names = found.keys()
        elif lost := names - found.keys():
            raise ValueError(f"{path.name} lacks {listed(lost)}, which the index says is there")
        state |= {name: found[name] for name in names}
    paths = list(files)
    return state, paths[0].name if len(paths) == 1 else paths[0].parent.name


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by name."""
    if path.suffix != ".safetensors":
        return _tensors_in(_unpickled(path), path.name)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path.name} is truncated or no safetensors file: {error}") from error


def _unpickled(path: Path) -> object:
    """What a file of ``torch.save`` holds, tensors and plain values alone."""
    size = path.stat().st_size
    try:
        unpacked = 0
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                unpacked = sum(part.file_size for part in parts.infolist())
        if unpacked <= size:
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path.name} is no checkpoint, or holds more than tensors") from error
    except Exception as error:  # garbage can lead the unpickler into any
        raise ValueError(f"{path.name} is truncated or no checkpoint: {error!r}") from error
    raise ValueError(
        f"{path.name} is compressed: {size} bytes that unpack to {unpacked}; torch.save does not compress"
    )


def _tensors_in(content: object, where: str) -> dict[str, Tensor]:
    """The dict of tensors by name in what a script stored; of several, the one that holds an image tower."""
    found = _dicts_of_tensors(content)
    if len(found) > 1:
        found = {keys: names for keys, names in found.items() if _marked(names)} or found
    if len(found) > 1:  # scripts store averaged weights beside these
        usual = {keys: found[keys] for keys in found if keys[-1] in ("state_dict", "model")}
        found = usual or found
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        which = listed(".".join(keys) for keys in found)
        raise ValueError(
            f"{where} holds several dicts of tensors by name, {which}; store one of them"
        )
    keys = f"; its keys are {listed(map(str, content))}" if isinstance(content, dict) else ""
    raise ValueError(f"{where} holds no dict of tensors by name{keys}")


def _dicts_of_tensors(
    content: object, keys: tuple[str, ...] = (), depth: int = 2
) -> dict[tuple[str, ...], dict[str, Tensor]]:
    """``content`` itself if it is a dict of tensors, else those in it, ``depth`` levels down, by the keys to them."""
    if not isinstance(content, dict) or not content or not all(isinstance(k, str) for k in content):
        return {}
    if all(isinstance(value, Tensor) for value in content.values()):
        return {keys: content}
    found = {}
    for key, value in content.items() if depth else ():
        found |= _dicts_of_tensors(value, (*keys, key), depth - 1)
    return found


def write_tensors(state: dict[str, Tensor], path: Path, **noted: str) -> None:
    """Write a safetensors file, whole or not at all; its metadata say what is ``noted``."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in state.items()}
    try:
        with replacing(path) as temporary:
            # transformers 4.x asks for the format
            save_file(state, temporary, metadata={"format": "pt", **noted})
            _sort_noted(temporary)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"cannot write {str(path)!r}: {error}") from error


def _sort_noted(path: Path) -> None:
    """Bring the metadata in order: safetensors leaves it to chance, and equal weights shall give equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        file.write(text.encode().ljust(size))


def _noted_grid(files: Files) -> tuple[int, int] | None:
    """The grid of the position embeddings that ``save_weights`` noted, if it wrote one of the files."""
    from safetensors import safe_open

    for path in files:
        if path.suffix != ".safetensors":
            continue
        with safe_open(path, "pt") as file:
            noted = (file.metadata() or {}).get("grid")
        if noted is not None:
            sides = re.fullmatch(r"(\d+)x(\d+)", noted)
            if not sides:
                raise ValueError(
                    f"{path.name} notes grid={noted!r}; it must be rows and columns, such as 2x8"
                )
            return int(sides[1]), int(sides[2])
    return None


# --- names ---


def _tower(names: Iterable[str], where: str) -> tuple[str, str]:
    """Whose names these are, and the prefix of the image tower."""
    found = _marked(names)
    if len(found) != 1:
        raise ValueError(
            f"{where} holds {len(found)} image towers; it must be one, with a tensor {' or '.join(_MARKS)}"
        )
    return found[0]


def _marked(names: Iterable[str]) -> list[tuple[str, str]]:
    """Of every image tower whose it is, and its prefix."""
    return [
        (layout, name[: name.rindex(mark.split(".")[0])])
        for name in names
        for mark, layout in _MARKS.items()
        if _plain(name).endswith(mark)
    ]


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
    found: dict[str, Tensor],
    ours: dict[str, list[Tensor]],
    model: "VisionTransformer",
    grid: tuple[int, int] | None,
    where: str,
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Resample the position embeddings if their grid differs; return the old and the new grid.

    Equal counts are not equal grids: 2 x 8 patches are as many as 4 x 4.
    """
    name = "pos_embed" if "pos_embed" in ours else "embeddings.position_embedding.weight"
    if name not in found or name not in ours:
        return None
    old, (wanted,), new = found[name], ours[name], model.patch_embed.grid_size
    if old.ndim != wanted.ndim:
        return None  # the check will name the shape
    prefix = wanted.shape[-2] - new[0] * new[1]
    count = old.shape[-2] - prefix
    side = math.isqrt(max(count, 0))
    if grid is None and side**2 == count:
        grid = (side, side)
    if grid is None or grid[0] * grid[1] != count:
        if grid is None and old.shape != wanted.shape:
            return None  # the check will name the shape
        said = "no square, and notes no grid" if grid is None else f"not {grid[0]} x {grid[1]}"
        raise ValueError(
            f"{where} has position embeddings of {count} patches, {said}; give load_weights "
            f"grid=(rows, columns), such as grid={new}, the model's"
        )
    if (
        count == 0
        or old.shape != (*wanted.shape[:-2], old.shape[-2], wanted.shape[-1])
        or grid == new
    ):
        return None
    old = old.view(1, *old.shape[-2:])  # transformers' is (N, D)
    found[name] = resample_abs_pos_embed(old, new, grid, prefix).view_as(wanted)
    return grid, new


def _hint(found: dict[str, Tensor], ours: dict[str, list[Tensor]]) -> str:
    """How to load a tower whose head or grid is not the model's."""

    def head(state: dict[str, Tensor]) -> tuple[str, int]:
        pool = "avg" if "fc_norm.weight" in state else ""
        if any(name.startswith(("attn_pool.", "head.attention.")) for name in state):
            pool = "map"
        return pool, state["head.weight"].shape[:1].numel() if "head.weight" in state else 0

    views = {name: views[0] for name, views in ours.items()}
    said, (pool, classes) = "", head(found)
    if (pool, classes) != head(views):
        said += (
            f". The heads differ: build the model with global_pool={pool!r} and num_classes={classes}, as the "
            "checkpoint's is, load it, and call model.reset_classifier(num_classes, global_pool)"
        )
    names = {"pos_embed", "embeddings.position_embedding.weight"} & found.keys() & views.keys()
    if any(found[name].shape != views[name].shape for name in names):
        said += ". Positions of a grid that is no square are resampled if load_weights is given grid=(rows, columns)"
    return said


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


def listed(names: Iterable[str], most: int = 20) -> str:
    """The names in order, those beyond ``most`` only counted."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _resampling(old: tuple[int, int], new: tuple[int, int]) -> str:
    return f"position embeddings resampled from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"
