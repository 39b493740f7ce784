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
    assert "siglip_lib.tower.attention" in modules
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


RELOAD = """
import importlib, pkgutil
import torch
import siglip_lib
import siglip_lib.kernels

modules = [m.name for m in pkgutil.walk_packages(siglip_lib.__path__, "siglip_lib.")]
skipped = "siglip_lib.kernels." if importlib.util.find_spec("triton") is None else "none"
modules = [importlib.import_module(name) for name in modules if not name.startswith(skipped)]
for _ in range(2):
    for module in modules:
        importlib.reload(module)

from siglip_lib.siglip.losses import sigmoid_loss
given = [torch.randn(*shape, requires_grad=True) for shape in ((4, 8), (4, 8), (1,), (1,))]
compiled = torch.compile(sigmoid_loss, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(*given), sigmoid_loss(*given))
a, b, c = (torch.empty(shape, device="meta") for shape in ((2, 3), (4, 3), (4,)))
assert torch.ops.siglip_lib.linear_gelu(a, b, c).shape == (2, 4)
if skipped == "none" and not torch.cuda.is_available():
    from siglip_lib.kernels.flash_attention import flash_attention
    from siglip_lib.kernels.residual import fused_residual
    qkv = torch.randn(1, 5, 3, 1, 64, requires_grad=True)
    compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager")
    compiled(qkv).sum().backward()
    assert qkv.grad.isfinite().all()
    x = torch.randn(1, 2, 3)
    compiled = torch.compile(fused_residual, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x), 2 * x)
"""


def test_every_module_can_be_reloaded():
    done = subprocess.run([sys.executable, "-c", RELOAD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
