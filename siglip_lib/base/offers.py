"""What a GPU, Triton and this library's attention kernel offer here: dispatch, kernels and notebooks ask the same."""

import functools
import importlib.util

import torch

TRITON_HEAD_DIMS = (64, 72, 80, 96, 128)
TRITON_MAX_TOKENS = 16_384
HOPPER = (9, 0)  # its kernel uses what no other GPU has: wgmma and TMA
AMPERE = (8, 0)  # the first with bfloat16 in its tensor cores, and the first that Triton supports


def why_not_our_kernel(head_dim: int, tokens: int, scale: float) -> str | None:
    """Why the Triton kernel does not take these, None if it does. The kernel asks the same."""
    if head_dim not in TRITON_HEAD_DIMS:
        allowed = ", ".join(map(str, TRITON_HEAD_DIMS))
        return f"needs a head_dim of {allowed}, not {head_dim}"
    if tokens > TRITON_MAX_TOKENS:
        return f"needs at most {TRITON_MAX_TOKENS:,} tokens"
    if scale <= 0:
        return "needs a scale above 0"
    return None


def pick_dtype(device: torch.device | int) -> torch.dtype:
    """Return what a model computes in on a device: bfloat16, float16 on GPUs older than Ampere, float32 on a CPU."""
    if torch.device(device).type != "cuda":
        return torch.float32
    native = torch.cuda.get_device_capability(device) >= AMPERE
    return torch.bfloat16 if native else torch.float16


@functools.cache
def compiles_for(device: torch.device | int) -> bool:
    """Whether Triton, which the kernels are written in, is installed and compiles for a CUDA device."""
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= AMPERE
