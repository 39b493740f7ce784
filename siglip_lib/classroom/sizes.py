"""How large a notebook's work is: small on a CPU, what a class's GPU holds, or what the stored outputs show."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from siglip_lib.base.offers import compiles_for, pick_dtype

LAB_GIB, FULL_GIB = 6, 60  # what a process may take on the GPU, all in all
# What torch leaves of it to CUDA, whose context, code of kernels and libraries lie outside torch's allocator: 0.8 GiB
# at most, as measured (notebook 04). It can't be asked for: mem_get_info tells what all processes of the GPU hold, and
# part of it comes after a notebook's first cell.
OUTSIDE_GIB = 1
_NAMES = ("cpu", "lab", "full")
_Choice = TypeVar("_Choice")


@dataclass(frozen=True)
class Size:
    """A size, the device it is for, and what may be taken there, as ``pick_size`` found it.

    Args:
        name: "cpu", "lab" or "full".
        device: where the notebook works.
        dtype: what its models compute in there: bfloat16, float16 on GPUs older than Ampere, float32 on a CPU.
        room: bytes that this process may take on the GPU, all in all; 0 on a CPU.
        why: what decided, in words.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    room: int
    why: str

    @property
    def on_gpu(self) -> bool:
        """Whether the size, "lab" or "full", is one of a GPU."""
        return self.name != "cpu"

    @property
    def free(self) -> int:
        """Bytes that torch may take on the GPU: the room without what CUDA takes beside it; 0 on a CPU."""
        return max(self.room - (OUTSIDE_GIB << 30), 0)

    def pick(self, cpu: _Choice, lab: _Choice, full: _Choice | None = None) -> _Choice:
        """Return the value that is meant for this size; without one for "full" it is that for "lab"."""
        return {"cpu": cpu, "lab": lab, "full": lab if full is None else full}[self.name]

    def largest(self, choices: Sequence[int], bytes_each: float) -> int:
        """Return the largest of ``choices`` that takes at most three quarters of what is free, else the smallest.

        Args:
            choices: numbers, such as batch sizes.
            bytes_each: what one of them takes at its peak.
        """
        return max((n for n in choices if n * bytes_each <= 0.75 * self.free), default=min(choices))

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"size: {self.name} in {dtype}; {self.why}"


def pick_size(*, kernels: bool = False) -> Size:
    """Decide how large the notebook's work is, by what this process may take on the current GPU.

    "full" from 60 GiB on, "lab" from 6 GiB on, else "cpu", which also works on the CPU. Two environment variables have
    a say: ``SIGLIP_SIZE`` forces a size, and ``SIGLIP_GPU_GIB`` caps what this process may take on the GPU, all in
    all: torch gets a GiB less, since CUDA takes the rest beside it.

    Args:
        kernels: whether the notebook compiles Triton kernels: a GPU that Triton doesn't compile for is then left alone.

    Raises:
        ValueError: a variable has no meaning, or the forced size needs more than there is.
    """
    forced = os.environ.get("SIGLIP_SIZE") or None
    if forced not in (None, *_NAMES):
        raise ValueError(f"SIGLIP_SIZE={forced} is none of {', '.join(_NAMES)}")
    cap = _cap()
    room, why = _found(kernels, cap)
    fits = "full" if room >= FULL_GIB << 30 else "lab" if room >= LAB_GIB << 30 else "cpu"
    if _NAMES.index(forced or "cpu") > _NAMES.index(fits):
        least = {"lab": LAB_GIB, "full": FULL_GIB}[forced]
        raise ValueError(f"SIGLIP_SIZE={forced} needs {least} GiB of the GPU; {why}")
    name = forced or fits
    if forced:
        why = f"SIGLIP_SIZE={forced}; {why}"
    if name == "cpu":
        device, room = torch.device("cpu"), 0
    else:
        device = torch.device("cuda", torch.cuda.current_device())
        if name == "lab" and not forced:
            why += f" ({LAB_GIB} are enough for this size, {FULL_GIB} for the next)"
    return Size(name, device, pick_dtype(device), room, why)


def _cap() -> int | None:
    """What SIGLIP_GPU_GIB says, in bytes."""
    text = os.environ.get("SIGLIP_GPU_GIB")
    if not text:
        return None
    try:
        cap = float(text)
    except ValueError:
        cap = 0.0
    if not 0 < cap < 2**20:
        raise ValueError(f"SIGLIP_GPU_GIB={text} must be a number of GiB above 0")
    return int(cap * 2**30)


def _found(kernels: bool, cap: int | None) -> tuple[int, str]:
    """What this process may take on the GPU, in bytes, and what was found, in words."""
    if not torch.cuda.is_available():
        return 0, "torch sees no CUDA GPU"
    device = torch.cuda.current_device()
    if kernels and not compiles_for(device):
        major, minor = torch.cuda.get_device_capability(device)
        reason = (
            f"Triton compiles for compute capability 8.0 and newer, this GPU has {major}.{minor}"
        )
        return 0, f"{reason}: its interpreter runs the kernels on the CPU"
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device)  # what this process holds is its own
    if cap is not None:
        of_torch = max(cap - (OUTSIDE_GIB << 30), 0)
        torch.cuda.set_per_process_memory_fraction(min(1.0, of_torch / total), device)
        if cap <= free:
            words = f"{cap / 2**30:.1f} GiB of the GPU, {of_torch / 2**30:.1f} of them for torch"
            return cap, f"SIGLIP_GPU_GIB caps this process at {words}"
    return free, f"{free / 2**30:.1f} GiB of the GPU are free"  # a cap above is no use: neighbours
