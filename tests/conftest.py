"""Shared by the tests: importable oracles, quick and repeatable hypothesis, a device."""

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


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def gpu(device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("needs a CUDA GPU")
    return device


@pytest.fixture(scope="session")
def hopper(gpu) -> torch.device:
    if torch.cuda.get_device_capability(gpu) != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    return gpu


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
