"""Importing the library is quick and brings no optional package; what it offers is there and described."""

import inspect
import json
import subprocess
import sys

import pytest

import siglip_lib

PROBE = """
import json, sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import siglip_lib
print(json.dumps([time.perf_counter() - start, sorted(set(sys.modules) - before)]))
"""


def probe() -> tuple[float, list[str]]:
    """Seconds that the import takes beyond torch's, and the modules that come with it."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def first_probe():
    return probe()


def test_import_brings_no_optional_package(first_probe):
    _, modules = first_probe
    assert "siglip_lib.attention" in modules
    unwanted = (
        "triton",
        "flash_attn",
        "xformers",
        "matplotlib",
        "timm",
        "torch._dynamo",
        "torchvision",
        "PIL",
        "sentencepiece",
        "tqdm",
    )
    assert [name for name in modules if name.startswith(unwanted)] == []


def test_import_is_quick(first_probe):
    # a neighbour's load may slow one
    assert first_probe[0] < 0.5 or any(probe()[0] < 0.5 for _ in range(2))


def test_names_are_sorted_and_all_there():
    constants = [name for name in siglip_lib.__all__ if name.isupper()]
    assert siglip_lib.__all__ == constants + sorted(set(siglip_lib.__all__) - set(constants))
    assert all(hasattr(siglip_lib, name) for name in siglip_lib.__all__)


@pytest.mark.parametrize("name", [name for name in siglip_lib.__all__ if not name.isupper()])
def test_has_a_docstring(name):
    doc = vars(getattr(siglip_lib, name)).get("__doc__") or getattr(siglip_lib, name).__doc__
    assert doc.strip()
    assert not doc.startswith(f"{name}(")  # what dataclass writes where nobody did
    assert inspect.getmodule(getattr(siglip_lib, name)).__doc__


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_import_of_an_oracle(name):
    found = getattr(siglip_lib, f"import_{name}")()
    assert found is sys.modules[name]
    assert found.__version__
