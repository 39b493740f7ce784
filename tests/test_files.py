import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from siglip_lib.storage.writing import replacing


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_says_who_may_read(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "weights") as temporary:
            save_file({"a": torch.zeros(2)}, temporary)  # on its own it makes files of mode 600
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "weights").stat().st_mode) == mode


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old", encoding="utf-8")

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("half of the n", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text(encoding="utf-8") == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first", encoding="utf-8")
        second.write_text("second", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "first"  # which took the name last
    assert [*tmp_path.iterdir()] == [path]


def test_a_folder_is_not_replaced(tmp_path):
    with pytest.raises(IsADirectoryError, match="folder"), replacing(tmp_path):
        pass
    with (
        pytest.raises(FileNotFoundError, match=r"no folder .*missing' to write file in"),
        replacing(tmp_path / "missing" / "file"),
    ):
        pass
    assert not [*Path(tmp_path).iterdir()]
