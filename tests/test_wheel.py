"""What is installed elsewhere is the whole library: the wheel, in an environment of its own, away from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from notebook_files import ROOT, known_to_git

BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # what is built changes sys.argv
build_meta.build_sdist(out)
build_meta.build_wheel(out)
"""

# all that one process finds, as JSON: another import of torch would take seconds
PROBE = """
import importlib, json, pkgutil
from importlib.resources import files
import torch
import siglip_lib
from siglip_lib.classroom.plots import PICTURES
from siglip_lib.siglip import EMOJI64_VECTORS, EMOJI64_WEIGHTS

names = [found.name for found in pkgutil.walk_packages(siglip_lib.__path__, "siglip_lib.")]
if importlib.util.find_spec("triton") is None:
    names = [name for name in names if not name.startswith("siglip_lib.kernels.")]
modules = [importlib.import_module(name) for name in names]
model, tokenizer = siglip_lib.load_siglip(EMOJI64_WEIGHTS)
emoji = siglip_lib.load_emoji64()
vectors = siglip_lib.embed_pictures(model, emoji.pictures[:2])
measured = files("siglip_lib.classroom") / "measured"
print(json.dumps({
    "files": {module.__name__: module.__file__ for module in [siglip_lib, *modules]},
    "shape": list(vectors.shape),
    "stored": EMOJI64_VECTORS.is_file(),
    "emoji": len(emoji.pictures),
    "pictures": [siglip_lib.picture(name).size for name in PICTURES],
    "measured": {file.name: len(json.loads(file.read_text(encoding="utf-8"))) for file in measured.iterdir()},
    "typed": (files("siglip_lib") / "py.typed").is_file(),
}))
"""


def clean_environment() -> dict[str, str]:
    """This process' environment without what would lead Python elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of a wheel and an sdist. Their sources are copied: setuptools writes beside them."""
    sources, out = (tmp_path_factory.mktemp(name) for name in ("sources", "built"))
    for name in known_to_git():
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, sources / name)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", BUILD, out],
        cwd=sources,
        env=clean_environment(),
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The Python of an environment that holds the wheel alone, and finds all else where this one does."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin/python"
    (packages,) = folder.glob("lib/python*/site-packages")
    # folders that a .pth file names are searched last, and no .pth file in them is read: no editable install is found
    here = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "elsewhere.pth").write_text("\n".join(here), encoding="utf-8")
    install = [
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
    ]
    done = subprocess.run(
        [sys.executable, *install, "--disable-pip-version-check", "--no-compile", wheel],
        env=clean_environment(),
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return python


@pytest.fixture(scope="module")
def probe(python, tmp_path_factory) -> dict:
    done = run(python, tmp_path_factory.mktemp("elsewhere"), "-c", PROBE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [python, *arguments],
        cwd=folder,
        env=clean_environment(),
        capture_output=True,
        encoding="utf-8",
    )


def test_the_wheel_holds_what_git_knows_of_the_library_and_the_licences(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    (information,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert {name for name in names if not name.startswith(information)} == known_to_git(
        "siglip_lib"
    )
    licences = {name for name in names if name.startswith(f"{information}/licenses/")}
    assert len(project["license-files"]) == 3
    assert licences == {f"{information}/licenses/{name}" for name in project["license-files"]}


def test_the_sdist_holds_what_git_knows_of_the_library(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        names -= {m.name.split("/", 1)[1] for m in archive if m.isdir() and "/" in m.name}
    assert {name for name in names if name.startswith("siglip_lib/")} == known_to_git("siglip_lib")
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_every_module_is_the_installed_one(probe, python):
    environment = python.parent.parent
    assert [
        name for name, path in probe["files"].items() if not Path(path).is_relative_to(environment)
    ] == []
    sources = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in known_to_git("siglip_lib")
        if name.endswith(".py")
    }
    triton = {name for name in sources if name.startswith("siglip_lib.kernels.")}
    assert sources - triton <= set(probe["files"]) <= sources


def test_what_ships_is_found_and_works(probe):
    assert probe["shape"] == [2, 128]
    assert probe["stored"]
    assert probe["emoji"] == 5094
    assert probe["pictures"] == [[384, 384]] * 3
    figures = {f"many{world}.json" for world in (1, 2, 4)}
    assert set(probe["measured"]) == figures | {f"losses{world}.json" for world in (1, 2)}
    assert all(probe["measured"].values())
    assert probe["typed"]


@pytest.mark.parametrize(
    ("module", "arguments", "code", "said"),
    [
        ("siglip_lib.train", ("--help",), 0, "usage: python -m siglip_lib.train"),
        ("siglip_lib.launch", (), 1, "python -m siglip_lib.launch 4 -m siglip_lib.train --out run"),
    ],
    ids=["train", "launch"],
)
def test_commands_run(python, tmp_path, module, arguments, code, said):
    done = run(python, tmp_path, "-W", "error::RuntimeWarning", "-m", module, *arguments)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert "Warning" not in done.stderr
    assert list(tmp_path.iterdir()) == []
