"""Tensors from a file, a folder or the hub."""

import json
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from siglip_lib.base.checks import join_names
from siglip_lib.storage.names import marked_towers, tower_of

Get = Callable[[str], Path | None]  # from a file's name to its path
Files = dict[Path, set[str] | None]  # what to read, and which tensors of it; None for all
_HUB = "hf-hub:"


def find_weights(source: str, beside: tuple[str, ...] = ()) -> Files:
    """The files of a checkpoint that hold the tower, and the tensors whose names begin with one of ``beside``."""
    path = Path(source)
    if _kind(path) == "file":
        return {path: None}
    with files_of(source) as get:
        if files := choose_weights(get, True, beside):
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


def _kind(path: Path) -> str | None:
    """``file``, ``folder``, or None where nothing is; what can't be read, or would never end, is an error."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("rb").close()
            return "file"
    except PermissionError as error:
        raise PermissionError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.is_symlink():
            return None
        raise FileNotFoundError(
            f"{str(path)!r} is a link to {os.readlink(path)!r}, where nothing is"
        ) from error
    if not stat.S_ISDIR(mode):
        raise ValueError(f"{str(path)!r} is neither a file nor a folder, but a pipe or a device")
    return "folder"


def _file(path: Path) -> Path | None:
    """The path if there is a file, None if there is nothing."""
    kind = _kind(path)
    if kind == "folder":
        raise IsADirectoryError(f"{str(path)!r} is a folder; it must be a file")
    return path if kind else None


@contextmanager
def files_of(source: str, also: str = "") -> Iterator[Get]:
    """Give a function from a file's name to its path in a folder or a repository of the hub, None if there is none.

    From a repository each file is fetched when it is asked for; without a connection there are those fetched before.

    Args:
        source: the folder's path or ``hf-hub:owner/name``.
        also: files to download beside the weights, for the message where there is no connection and the block raises
            FileNotFoundError.
    """
    if not source.startswith(_HUB):
        path = Path(source)
        kind = _kind(path)
        if kind == "file":
            raise NotADirectoryError(f"{source!r} is a file; give the folder that holds it")
        if kind is None:
            raise FileNotFoundError(
                f"no file or folder {source!r}; a repository of the hub is written {_HUB}owner/name"
            )
        yield lambda name: _file(path / name)
        return
    from huggingface_hub import constants, hf_hub_download, model_info, snapshot_download

    repository = source.removeprefix(_HUB)
    try:
        # fails at once where a download would try for 20 seconds, and waits for an answer no longer than the limit;
        # snapshot_download has none
        about = model_info(repository, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as offline:  # its class depends on the cause and the version
        try:
            # no pattern: the folder, however little of the repository was fetched
            folder = snapshot_download(repository, allow_patterns=[], local_files_only=True)
            yield lambda name: _file(Path(folder, name))
        except FileNotFoundError:
            raise OSError(
                f"cannot fetch {repository!r} from the hub ({type(offline).__name__}), and it was not fetched before. "
                f"Download its {also}model.safetensors, or its model.safetensors.index.json and the parts that this "
                "names, into a folder, and give that folder's path"
            ) from offline
        return
    names = {file.rfilename for file in about.siblings}
    # one by one: which parts there are is known when the index is there
    yield lambda name: Path(hf_hub_download(repository, name)) if name in names else None


def choose_weights(get: Get, tower_only: bool = False, beside: tuple[str, ...] = ()) -> Files:
    """The files to read, out of what ``get`` finds by name: one whole file, or the parts that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if path := get(name):
            return {path: None}
        if index := get(f"{name}.index.json"):
            return _parts(index, get, tower_only, beside)
    return {}


def _parts(index: Path, get: Get, tower_only: bool, beside: tuple[str, ...]) -> Files:
    """The files that the index of a sharded checkpoint names, all or those asked for, and their tensors."""
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if any(Path(file).name != file for file in where.values()):
            raise ValueError("it names files outside its folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index.name} is no index of a sharded checkpoint: {error!r}") from error
    starts = (tower_of(where, index.name)[1], *beside) if tower_only else ""
    parts = sorted({file for name, file in where.items() if name.startswith(starts)})
    paths = {file: get(file) for file in parts}
    if lost := [file for file, path in paths.items() if path is None]:
        raise FileNotFoundError(f"{index.name} names {join_names(lost)}, missing beside it")
    return {path: {n for n, f in where.items() if f == file} for file, path in paths.items()}


def read_weights(files: Files) -> tuple[dict[str, Tensor], str]:
    """The tensors of all files by name, and what to call these files in a message."""
    state = {}
    for path, names in files.items():
        found = _read_tensors(path)
        if names is None:
            names = found.keys()
        elif lost := names - found.keys():
            raise ValueError(f"{path.name} lacks {join_names(lost)}, which the index says is there")
        state |= {name: found[name] for name in names}
    paths = list(files)
    return state, paths[0].name if len(paths) == 1 else paths[0].parent.name


def _read_tensors(path: Path) -> dict[str, Tensor]:
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
        found = {keys: names for keys, names in found.items() if marked_towers(names)} or found
    if len(found) > 1:  # scripts store averaged weights beside these
        usual = {keys: found[keys] for keys in found if keys[-1] in ("state_dict", "model")}
        found = usual or found
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        which = join_names(".".join(keys) for keys in found)
        raise ValueError(
            f"{where} holds several dicts of tensors by name, {which}; store one of them"
        )
    keys = f"; its keys are {join_names(map(str, content))}" if isinstance(content, dict) else ""
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


def noted_grid(files: Files) -> tuple[int, int] | None:
    """The grid of the position embeddings that ``save_weights`` noted, if it wrote one of the files."""
    from safetensors import safe_open

    for path in (file for file in files if file.suffix == ".safetensors"):
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
