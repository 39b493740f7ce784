"""environment.yml, pyproject.toml and constraints.txt describe one and the same set of packages."""

import re
import tomllib

import pytest
import yaml
from notebook_files import ROOT
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

REQUIREMENTS = [
    Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines
]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)


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


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_constraints_pin_every_requirement(requirement):
    assert requirement.name in PINS, f"constraints.txt has no pin of {requirement.name}"
    assert requirement.specifier.contains(PINS[requirement.name])


def test_the_tested_set():
    assert PINS["torch"] == "2.13.0"
    assert PINS["nbval"] == "0.11.0"
