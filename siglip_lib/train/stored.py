"""A training on disk, whole or not at all, for any number of processes to resume."""

import json
import math
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from siglip_lib.base.checks import count, finite_tensors, join_names
from siglip_lib.siglip.model import SigLIP
from siglip_lib.storage.fitting import check_fit
from siglip_lib.train.training import Training, errors_mean_damage


def save_checkpoint(training: Training, folder: str | Path) -> Path:
    """Store a training under ``folder``, whole or not at all, in the place of what is stored there.

    Every process of the training calls it; all see the same file system. In ``folder`` only folders whose names are
    ``step_`` and nine digits are checkpoints; what else lies there stays.

    Returns:
        The folder of the checkpoint, named by its step.

    Raises:
        FileExistsError: the same step is stored there already.
        OSError: some process could not write; what was stored before stays. It is raised in all of them.
        ValueError: a weight or a moment is not finite.
        RuntimeError: the model is damaged, see ``Training.run``.
    """
    folder = Path(folder)
    training.check_usable()
    final = folder / f"step_{training.step:09d}"
    temporary = final.with_name(final.name + ".part")
    first, tensors = training.rank == 0, training.tensors()
    try:
        with errors_of_all(training):
            finite_tensors(f"{final.name} was not stored: the training has", _local(tensors))
            if first and final.exists():
                raise FileExistsError(f"{final.name} is stored already")
            if first:
                shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
                temporary.mkdir(parents=True)
                description = {"settings": training.settings(), "step": training.step}
                text = json.dumps(description | {"losses": training.losses})
                (temporary / "training.json").write_text(text, encoding="utf-8")
        with _participants(training) as options:
            dcp.save(tensors, checkpoint_id=temporary, **options)
        with errors_of_all(training):
            if first:
                os.replace(temporary, final)
                for path in _checkpoints(folder, ".part") + _checkpoints(folder):
                    if path != final:
                        shutil.rmtree(path)
    except FileExistsError:
        raise
    except (OSError, CheckpointException) as error:
        raise OSError(f"{final} was not stored: {_cause(error)}") from error
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
    training.stored = final
    return final


def load_checkpoint(training: Training, folder: str | Path) -> None:
    """Resume what ``save_checkpoint`` stored under ``folder``, by however many processes, however they shared it.

    Nothing in the files is run, whoever wrote them.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it was stored with other settings, or is damaged; nothing was changed.
        OSError: it can't be read.
    """
    ours = training.tensors()
    with errors_of_all(training):
        stored = newest_checkpoint(folder)
        if stored is None:
            raise FileNotFoundError(f"folder={str(folder)!r} holds no checkpoint")
        with errors_mean_damage(stored):
            if odd := [path.name for path in stored.iterdir() if not path.is_file()]:
                raise ValueError(f"{join_names(odd)} is no file")  # to read a pipe might never end
            description = json.loads((stored / "training.json").read_text(encoding="utf-8"))
        training.check_description(description, stored.name)
        with errors_mean_damage(stored):
            contents = _contents(stored / ".metadata", ours)
    tensors = {name: torch.full_like(tensor, math.nan) for name, tensor in ours.items()}
    with errors_of_all(training), errors_mean_damage(stored):
        with _participants(training) as options:
            reader = FileSystemReader(stored)
            reader.read_metadata = lambda: contents  # torch's own unpickles whatever the file holds
            try:
                dcp.load(tensors, storage_reader=reader, **options)
            except CheckpointException as error:
                raise _cause(error) from None
        # what the files did not fill is still NaN
        finite_tensors("there are", _local(tensors))
    with errors_of_all(training):
        training.restore(tensors, description, stored)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint under a folder, None if there is none."""
    return max(_checkpoints(Path(folder)), default=None)


def whole_model(training: Training) -> SigLIP | None:
    """Return the model with all its weights, on the CPU, in the first process; None in the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(training.model, options=options)
    if training.rank:
        return None
    with torch.device("meta"):
        model = SigLIP(training.model.config)
    model.load_state_dict(state, assign=True)
    return model


def _checkpoints(folder: Path, ending: str = "") -> list[Path]:
    """Folders that ``save_checkpoint`` made; with ``.part`` those that it had to leave unfinished."""
    name = re.compile(r"step_\d{9}" + re.escape(ending), re.ASCII)
    named = (path for path in folder.glob("step_*") if name.fullmatch(path.name))
    return [path for path in named if path.is_dir() and not path.is_symlink()]


class _Inert:
    """What stands for an object of a table of contents: it keeps what it is given, and does nothing."""

    state: object = ()

    def __init__(self, *given: object) -> None:
        self.given = given

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Makes no object that a file names, but a stand-in of a class of its own: what is set on it touches no other."""

    def find_class(self, module: str, name: str) -> type:
        return type(name, (_Inert,), {})


def _contents(path: Path, ours: dict[str, Tensor]) -> Metadata:
    """Read where which part of each of our tensors lies. What a file says else is left where it is."""
    with path.open("rb") as file:
        table = _Unpickler(file).load().state
    without_memory, entries, places = {}, {}, {}
    for name, stored in table["state_dict_metadata"].items():
        # the optimizer's constants were stored once; they follow from the settings
        if name.startswith("optimizer.param_groups."):
            continue
        entry = stored.state
        if "properties" not in entry:
            raise ValueError(f"{name} is no tensor")
        dtype, size = getattr(torch, entry["properties"].state[0].__name__), _size(entry["size"])
        parts = [part.state for part in entry["chunks"]]
        chunks = [ChunkStorageMetadata(_size(p["offsets"]), _size(p["sizes"])) for p in parts]
        entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)
        without_memory[name] = torch.empty(size, dtype=dtype, device="meta")
    wanted = {name: [tensor] for name, tensor in ours.items()}
    check_fit(without_memory, wanted, "its tensors do not fit", same_dtype=True)
    for index, place in table["storage_data"].items():
        file = place.state["relative_path"]
        # torch gives each process a file of such a name
        if type(file) is not str or not re.fullmatch(r"__\d+_\d+\.distcp", file, re.ASCII):
            raise ValueError(f"{file!r} lies elsewhere")
        start, length = (count(key, place.state[key]) for key in ("offset", "length"))
        name, offset, which = (index.state[key] for key in ("fqn", "offset", "index"))
        if name in ours:
            places[MetadataIndex(name, _size(offset), which)] = _StorageInfo(file, start, length)
    return Metadata(entries, storage_data=places)


def _size(stored: _Inert) -> torch.Size:
    (sides,) = stored.given
    return torch.Size([count("size", side) for side in sides])


def _cause(error: BaseException) -> BaseException:
    """What happened first, in the process with the lowest rank that it happened in."""
    if not isinstance(error, CheckpointException):
        return error
    cause, _ = min(error.failures.items())[1]
    if not isinstance(cause, Exception):  # Ctrl-C, which torch treats as a failure
        raise cause
    return cause


def _local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this process has of them."""
    return {n: x.to_local() if isinstance(x, DTensor) else x for n, x in tensors.items()}


@contextmanager
def errors_of_all(training: Training) -> Iterator[None]:
    """Wait for all processes; what went wrong in one is raised in all, so that none continues alone."""
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    errors = [error]
    if training.group is not None:
        errors *= dist.get_world_size(training.group)
        dist.all_gather_object(errors, error, group=training.group)
    for error in errors:
        if error is not None:
            raise error


@contextmanager
def _participants(training: Training) -> Iterator[dict[str, object]]:
    """Tell torch.distributed.checkpoint who takes part."""
    with warnings.catch_warnings():  # it warns of what it was asked for
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        alone = training.group is None
        yield {"no_dist": True} if alone else {"process_group": training.group}
