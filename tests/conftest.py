"""Shared by the tests: importable oracles, quick and repeatable hypothesis, a device."""

import os
import signal

import pytest
import torch
from hypothesis import settings

import siglip_lib.kernels  # noqa: F401  before anything imports Triton: the interpreter
from siglip_lib.classroom.oracles import declare_torchvision_operators

declare_torchvision_operators()  # else timm and transformers fail to import beside a CPU-only torch
torch.backends.cudnn.allow_tf32 = False  # else a GPU's convolutions keep 10 bits in float32
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("quick")
# a shell starts what runs in the background deaf to Ctrl-C, and that is handed down to every process
signal.signal(signal.SIGINT, signal.default_int_handler)

# the files that take longest, in seconds of a core: workers begin with these, so that none waits long at the end
LONGEST = {
    "test_train_distributed.py": 150,
    "test_train.py": 45,
    "test_backends.py": 35,
    "test_siglip.py": 35,
    "test_checkpoints.py": 33,
    "test_vision_transformer.py": 31,
    "test_nbval_guard.py": 30,
    "test_wheel.py": 20,
    "test_kernels_sampler.py": 20,
    "test_explain.py": 19,
    "test_kernels_residual.py": 18,
    "test_browser.py": 15,
    "test_import.py": 15,
    "test_kernels_flash_attention.py": 13,
    "test_lab.py": 10,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: -LONGEST.get(item.path.name, 0))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def gpu(device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    return device


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
