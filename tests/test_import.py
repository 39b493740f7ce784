"""Importing the library is quick and brings no optional package; what it offers is there and described."""

import importlib
import importlib.util
import inspect
import json
import pkgutil
import subprocess
import sys
from operator import attrgetter

import pytest

import siglip_lib

KERNELS = "siglip_lib.kernels."  # those need Triton
MODULES = [
    found.name
    for found in pkgutil.walk_packages(siglip_lib.__path__, "siglip_lib.")
    if importlib.util.find_spec("triton") or not found.name.startswith(KERNELS)
]
WINGS = [
    f"siglip_lib.{found.name}" for found in pkgutil.iter_modules(siglip_lib.__path__) if found.ispkg
]
PACKAGES = ["siglip_lib", *(n for n in WINGS if hasattr(importlib.import_module(n), "__all__"))]

PROBE = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import siglip_lib
print(json.dumps([time.process_time() - start, sorted(set(sys.modules) - before)]))
"""


def probe() -> tuple[float, list[str]]:
    """Seconds of a processor that the import takes beyond torch's, and the modules that come with it."""
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
    # a shared cache may slow one
    assert first_probe[0] < 0.5 or any(probe()[0] < 0.5 for _ in range(2))


def test_import_runs_no_command(first_probe):
    # else python -m would run the module a second time, and warn of it
    assert not {"siglip_lib.train.__main__", "siglip_lib.launch"} & set(first_probe[1])


def test_every_module_is_found_by_its_name():
    """No function or class stands where a module of that name does."""
    assert {"siglip_lib.launch", "siglip_lib.tower.block"} < set(MODULES)
    for name in MODULES:
        module = importlib.import_module(name)
        assert module is sys.modules[name]
        parent, _, own = name.rpartition(".")
        assert getattr(sys.modules[parent], own) is module, name


@pytest.mark.parametrize("name", PACKAGES)
def test_names_are_sorted_and_all_there(name):
    package = importlib.import_module(name)
    constants = sorted(name for name in package.__all__ if name.isupper())
    assert package.__all__ == constants + sorted(set(package.__all__) - set(constants))
    public = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(package.__all__)


def test_a_wing_without_names_has_none_to_list():
    for name in set(WINGS) - set(PACKAGES):
        public = [v for k, v in vars(importlib.import_module(name)).items() if k[0] != "_"]
        assert all(map(inspect.ismodule, public)), name


def test_each_name_comes_from_one_wing():
    wings = [importlib.import_module(name) for name in PACKAGES[1:]]
    for name in siglip_lib.__all__:
        (wing,) = (wing for wing in wings if name in wing.__all__)
        assert getattr(wing, name) is getattr(siglip_lib, name)


@pytest.mark.parametrize(
    ("wing", "name"),
    [
        ("backends", "BackendStatus"),
        ("backends", "attend_packed"),
        ("classroom", "Timing"),
        ("classroom", "predict"),  # at the top it would seem to be the model's
        ("evaluate", "Scenes"),
        ("evaluate", "Share"),
        ("evaluate", "AttentionMaps"),
        ("tower", "LoadedWeights"),
        ("tower", "PatchDropout"),
        ("tower", "SigLIPVisionConfig"),
    ],
)
def test_what_few_need_is_in_its_wing_alone(wing, name):
    assert name in getattr(siglip_lib, wing).__all__
    assert not hasattr(siglip_lib, name)


def test_what_a_training_needs_is_at_the_top():
    wanted = {"TrainConfig", "Training", "embed_pictures", "embed_texts", "load_emoji64"}
    assert wanted < set(siglip_lib.__all__)


def test_the_kernel_is_imported_when_asked_for():
    pytest.importorskip("triton", reason="needs triton")
    from siglip_lib import flash_attention

    assert flash_attention is siglip_lib.kernels.flash_attention.flash_attention
    with pytest.raises(AttributeError, match="has no attribute 'flash'"):
        attrgetter("flash")(siglip_lib)


@pytest.mark.parametrize(
    ("package", "name"),
    [
        (package, name)
        for package in PACKAGES
        for name in importlib.import_module(package).__all__
        if not name.isupper()
    ],
)
def test_has_a_docstring(package, name):
    value = getattr(importlib.import_module(package), name)
    doc = vars(value).get("__doc__") or value.__doc__
    assert doc.strip()
    assert not doc.startswith(f"{name}(")  # what dataclass writes where nobody did
    assert inspect.getmodule(value).__doc__


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
