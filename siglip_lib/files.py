"""Files that are whole or not there."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
