"""Where a kernel can run: on a CUDA GPU that Triton compiles for, or on a CPU in Triton's interpreter."""

import torch
from torch import Tensor

from siglip_lib.base.offers import compiles_for


def is_interpreted(kernel: object) -> bool:
    """Whether Triton made a function for its interpreter of ``kernel``, and not one for a GPU."""
    return type(kernel).__name__ == "InterpretedFunction"


def check_device(name: str, x: Tensor, kernel: object, instead: str) -> None:
    """Raise a ValueError unless ``kernel`` runs where ``x`` is; the message ends with what to do ``instead``."""
    # what torch compiles has been asked before, and it can't trace this
    if x.is_cuda and not torch.compiler.is_compiling() and not compiles_for(x.device):
        major, minor = torch.cuda.get_device_capability(x.device)
        raise ValueError(
            f"{name} is on a GPU of compute capability {major}.{minor}; Triton compiles for 8.0 and newer; {instead}"
        )
    if not x.is_cuda and not (x.device.type == "cpu" and is_interpreted(kernel)):
        raise ValueError(
            f"{name} is on {x.device}; the kernel needs a CUDA GPU, or on a CPU TRITON_INTERPRET=1 set"
            f" before it is imported; else {instead}"
        )
