"""What `make lab` serves: this machine alone, behind a token, at the port that was asked for."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from notebook_files import ROOT
from serving import free_port, listens

pytest.importorskip("jupyterlab", reason="needs jupyterlab")
LAB = [str(ROOT / ".ci/lab"), str(Path(sys.executable).parent)]
OPEN = """
c.ServerApp.token = ""
c.ServerApp.password = ""
c.ServerApp.ip = "0.0.0.0"
c.ServerApp.allow_remote_access = True
c.ServerApp.port_retries = 50
"""
OPEN_TOO = """
c.IdentityProvider.token = ""
c.PasswordIdentityProvider.hashed_password = ""
c.ServerApp.identity_provider_class = "jupyter_server.auth.identity.IdentityProvider"
"""


@contextmanager
def lab(port: int, folder: Path, settings: str, *served: Path):
    """The process that serves, with a user's settings, and its output."""
    (folder / "config").mkdir()
    (folder / "config/jupyter_server_config.py").write_text(settings, encoding="utf-8")
    names = {name: str(folder / name.split("_")[1].lower()) for name in
             ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")}  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    output = folder / "output"
    process = subprocess.Popen(
        [*LAB, str(port), *map(str, served)],
        cwd=ROOT,
        env=environment | names,
        stdout=output.open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        yield process, output
    finally:
        process.kill()
        process.wait()


def address(output: Path) -> tuple[int, str]:
    """Port and token of the address that is printed, once it answers."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        told = output.read_text(encoding="utf-8")
        found = re.search(r"http://127\.0\.0\.1:(\d+)/lab\?token=(\w{48})\s", told)
        if found and listens(int(found[1])):
            return int(found[1]), found[2]
        time.sleep(0.2)
    pytest.fail(f"no address was printed, or none that answers:\n{told}")


def status(url: str, host: str = "") -> int:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("settings", [OPEN, OPEN_TOO], ids=["old", "new"])
def test_settings_of_the_user_open_nothing(settings, tmp_path):
    port = free_port()
    with lab(port, tmp_path, settings) as (process, output):
        served, token = address(output)
        assert served == port
        contents = f"http://127.0.0.1:{port}/api/contents"
        assert status(contents) == 403
        assert status(f"{contents}?token=") == 403
        assert status(f"{contents}?token={token}") == 200
        assert status(f"{contents}?token={token}", host="evil.example") == 403
        style = f"http://127.0.0.1:{port}/custom/custom.css?token={token}"
        with urllib.request.urlopen(style, timeout=60) as answer:
            assert b".jp-OutputPlaceholder" in answer.read()
        command = subprocess.run(
            ["ps", "-o", "args=", "-p", str(process.pid)], capture_output=True, check=True
        )
        assert token.encode() not in command.stdout
        listening = Path("/proc/net/tcp").read_text(encoding="ascii")
        assert re.findall(rf" (\w+):{port:04X} 00000000:0000 0A", listening) == ["0100007F"]


def test_another_folder(tmp_path):
    """As in ``make lab FOLDER=...``, for the copies of a class."""
    served = tmp_path / "my release"
    served.mkdir()
    (served / "copy.ipynb").touch()
    with lab(free_port(), tmp_path, OPEN, served) as (_, output):
        port, token = address(output)
        contents = f"http://127.0.0.1:{port}/api/contents"
        assert status(f"{contents}/copy.ipynb?content=0&token={token}") == 200
        assert status(f"{contents}/03_attention.ipynb?content=0&token={token}") == 404


def test_a_folder_that_is_none(tmp_path):
    command = [*LAB, str(free_port()), str(tmp_path / "none")]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"lab: FOLDER={tmp_path / 'none'} is no folder\n"


@pytest.mark.parametrize("port", ["70000", "65536", "0", "-1", "", "88 88", "8888x", "0x10"])
def test_a_port_that_is_none(port):
    ended = subprocess.run(
        [*LAB, port], capture_output=True, encoding="utf-8", cwd=ROOT, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"lab: PORT={port} must be a number from 1 to 65535")
    assert ended.stdout == ""


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with lab(port, tmp_path, OPEN) as (process, output):
            assert process.wait(timeout=90) == 1
        told = output.read_text(encoding="utf-8")
    assert f"port {port} is not available" in told
    assert "token=" not in told
