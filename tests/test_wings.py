"""The wings import only those below them: what pyproject.toml asks of lint-imports, which `make lint` runs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from notebook_files import ROOT

pytest.importorskip("importlinter", reason="needs import-linter")
LINT = "from importlinter.cli import lint_imports_command as lint; lint()"


@pytest.fixture
def copy(tmp_path) -> Path:
    """The library's code and the contract, in a folder of their own."""
    only_code = shutil.ignore_patterns("__pycache__", "*.npz", "*.jpg", "weights")
    shutil.copytree(ROOT / "siglip_lib", tmp_path / "siglip_lib", ignore=only_code)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache", "--no-logo"],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
    )
    return done.returncode, done.stdout + done.stderr


def test_the_library_keeps_the_contract(copy):
    code, said = lint(copy)
    assert code == 0, said
    assert "2 kept, 0 broken" in said


@pytest.mark.parametrize(
    ("file", "imported", "contract", "link"),
    [
        ("tower/block", "train", "wings", "siglip_lib.tower.block -> siglip_lib.train"),
        # these stand side by side
        ("train/recipe", "classroom", "wings", "siglip_lib.train.recipe -> siglip_lib.classroom"),
        ("tower/layers", "tower.block", "no circles", ".layers -> .block"),
    ],
)
def test_a_forbidden_import_is_named(copy, file, imported, contract, link):
    with (copy / f"siglip_lib/{file}.py").open("a", encoding="utf-8") as module:
        module.write(f"\nimport siglip_lib.{imported}\n")
    code, said = lint(copy)
    assert code == 1
    assert f"{contract} BROKEN" in said
    assert link in said


def test_a_wing_that_no_layer_holds_is_named(copy):
    attic = copy / "siglip_lib" / "attic"
    attic.mkdir()
    (attic / "__init__.py").touch()
    code, said = lint(copy)
    assert code == 1
    assert "attic" in said
