"""Files that are whole or not there."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write a file at; it takes the name ``path`` when all went well.

    After an error ``path`` is as it was and nothing is left beside it. Two processes may write to one path at a time;
    the last one's file stays. Who may read the file is what the user's umask says, whatever the writer chose.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        FileNotFoundError: the folder that shall hold the file is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; give a file's path")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(path.parent)!r} to write {path.name} in")
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
