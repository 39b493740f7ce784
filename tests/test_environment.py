"""environment.yml, pyproject.toml and the constraints of CPU and GPU machines describe one set of packages."""

import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from notebook_files import PATHS, ROOT, code_cells, read
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
CONDA = {
    match[1]: match[2].replace("=", "==") if match[2].startswith("=") else match[2]
    for entry in ENVIRONMENT
    if isinstance(entry, str) and (match := re.fullmatch(r"([\w-]+) ?(.*)", entry))
}
# what conda-forge calls otherwise, and what its packages bring along
CONDA_NAMES = {
    "torch": "pytorch-gpu",
    "matplotlib": "matplotlib-base",
    "huggingface-hub": "huggingface_hub",
}
CONDA_BRINGS = {"nvidia-cuda-runtime-cu12", "triton"}

# extras that neither a lab nor its tests need; the Makefile's targets install them
LATER = ["class", "site"]

REQUIREMENTS = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *(EXTRAS[x] for x in EXTRAS if x not in LATER))
    for line in lines
]


def pins(kind: str) -> dict[str, str]:
    """The versions of constraints-cpu.txt or constraints-gpu.txt, by package."""
    lines = (ROOT / f"constraints-{kind}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


INSTALLED = [  # by .ci/setup, or by a target of the Makefile later, on each kind of machine
    (kind, Requirement(line))
    for kind, extras in (("cpu", ("lab", "test")), ("gpu", ("lab", "test", "gpu")))
    for lines in (PROJECT["dependencies"], *(EXTRAS[extra] for extra in (*extras, *LATER)))
    for line in lines
]


@pytest.mark.parametrize(
    "requirement", [r for r in REQUIREMENTS if r.name not in CONDA_BRINGS], ids=str
)
def test_environment_holds_every_requirement(requirement):
    name = CONDA_NAMES.get(requirement.name, requirement.name)
    assert name in CONDA, f"environment.yml lacks {name}"
    lowest = re.search(r"(?:>=|==)([\d.]+)", CONDA[name])
    if requirement.specifier:
        assert lowest, f"environment.yml sets no version of {name}"
        assert requirement.specifier.contains(lowest[1]), (
            f"{name} {lowest[1]} is outside {requirement}"
        )


def test_environment_holds_nothing_else():
    known = {CONDA_NAMES.get(r.name, r.name) for r in REQUIREMENTS}
    # flash-attn is no extra: pip would build it for most of an hour
    assert set(CONDA) - known == {"python", "cuda-version", "flash-attn", "pip"}


def test_environment_installs_the_package_itself_and_lets_pip_read_the_line():
    # a requirements file, which this becomes, takes no --no-deps
    assert ENVIRONMENT[-1] == {"pip": ["-e ."]}


def test_environment_python_is_one_the_package_allows():
    version = CONDA["python"].removeprefix("==")
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)


@pytest.mark.parametrize(("kind", "requirement"), INSTALLED, ids=str)
def test_constraints_pin_every_requirement(kind, requirement):
    assert requirement.name in pins(kind), f"constraints-{kind}.txt has no pin of {requirement}"
    assert requirement.specifier.contains(pins(kind)[requirement.name])


def test_both_kinds_of_machine_have_one_nbval():
    assert pins("cpu")["nbval"] == pins("gpu")["nbval"] == "0.11.0"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_gpu_machine_installs_what_the_stored_outputs_come_from(path):
    texts = [output.get("text", "") for cell in code_cells(read(path)) for output in cell.outputs]
    shown = next(text for text in texts if "versions: " in text)
    ran = dict(re.findall(r"(torch|triton|xformers) (\d[\d.]*)", shown))
    assert ran == {name: pins("gpu")[name] for name in ("torch", "triton", "xformers")}


@pytest.mark.parametrize(("answers", "kind"), [(True, "gpu"), (False, "cpu")])
def test_the_set_up_takes_and_names_the_constraints_of_the_machine(tmp_path, answers, kind):
    """The set-up, with an nvidia-smi of ours and a venv whose programs only say how they were called."""
    programs, venv = tmp_path / "programs", tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    programs.mkdir()
    says = {venv / "bin/pip": 'echo "pip $*"', venv / "bin/jupyter": ":", venv / "bin/python": ":"}
    for path, line in {**says, programs / "nvidia-smi": "true" if answers else "false"}.items():
        path.write_text(f"#!/bin/sh\n{line}\n", encoding="ascii")
        path.chmod(0o755)
    done = subprocess.run(
        [ROOT / ".ci/setup", venv],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    told, called = done.stdout.splitlines()
    assert f" by constraints-{kind}.txt " in told
    extras = "lab,test,gpu" if kind == "gpu" else "lab,test"
    assert called.endswith(f"-c constraints-{kind}.txt -e .[{extras}]")
