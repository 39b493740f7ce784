"""Attention kernels that the notebooks time this library's against, and that are none of its backends.

Each is a package that a reader installs by name; the notebooks run without them and say which one is missing.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_lib.classroom.machine import package_version

# by opponent and device, dtype and head_dim, against what nothing speaks; what is missing may be installed later
_fine: set[tuple] = set()


@dataclass(frozen=True)
class Opponent:
    """An attention without mask or dropout, of q, k and v (B, N, heads, head_dim) each, which returns the same shape.

    Its first call for a head_dim may compile for many seconds, and so may the first backward pass: both belong before
    the clock.

    Args:
        package: its name at pip, and the version that was timed.
        version: that version.
        module: where its ``flash_attn_func`` stands.
        has_backward: whether gradients flow through it.
        dtypes: what q, k and v may be.
        capability: least compute capability of the GPU.
        newest: highest compute capability, none if None.
        grain: its gradients are right at multiples of this head_dim. Where gradients are recorded, heads of other
            sizes are filled up with zeros to the next one. None if they are right at every head_dim it takes.

    Source: Shah et al., FlashAttention-3 (2024); flash-attn 4 is its successor in CuTe DSL.
    """

    package: str
    version: str
    module: str
    has_backward: bool
    dtypes: tuple[torch.dtype, ...]
    capability: tuple[int, int]
    newest: tuple[int, int] | None = None
    grain: int | None = None

    @property
    def operator(self) -> str:
        """The package and the version that is installed; empty if it is not."""
        found = package_version(self.package)
        return f"{self.package} {found}" if found else ""

    def why_not(self, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it can't run on a device in a dtype at a head_dim; None if nothing is known against it."""
        device = torch.device(device)
        # by its distribution and not by its module: flash-attn 2 brings a module of flash-attn 4's name
        if not self.operator:
            return f"not installed: pip install {self.package}=={self.version}"
        if device.type != "cuda":
            return f"needs a CUDA device, not {device.type}"
        if dtype not in self.dtypes:
            names = " or ".join(str(one).removeprefix("torch.") for one in self.dtypes)
            return f"needs {names}, not {str(dtype).removeprefix('torch.')}"
        found = torch.cuda.get_device_capability(device)
        if found < self.capability or (self.newest and found > self.newest):
            least = ".".join(map(str, self.capability))
            words = "" if self.newest else " or newer"
            return f"needs compute capability {least}{words}, not {found[0]}.{found[1]}"
        if head_dim % 8 or not 0 < head_dim <= 256:
            return f"needs a head_dim that is a multiple of 8 up to 256, not {head_dim}"
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax(q @ k.T / sqrt(head_dim)) @ v, (B, N, heads, head_dim).

        Raises:
            ValueError: it can't run; the message says why.
        """
        case = self.package, q.device, q.dtype, q.shape[-1]
        if case not in _fine:
            if reason := self.why_not(*case[1:]):
                raise ValueError(reason)
            _fine.add(case)
        attention, dim = _function(self.module), q.shape[-1]
        extra = -dim % self.grain if self.grain and _recorded(q, k, v) else 0
        if not extra:
            return _output(attention(q, k, v))
        padded = (F.pad(x, (0, extra)) for x in (q, k, v))  # zeros change no score
        return _output(attention(*padded, softmax_scale=dim**-0.5))[..., :dim]


_HALF = (torch.bfloat16, torch.float16)
OPPONENTS = {
    "flash-attn 3": Opponent(
        "fa3-fwd", "0.0.3", "fa3_fwd_interface", False, (torch.bfloat16,), (9, 0), (9, 0)
    ),
    "flash-attn 4": Opponent(
        "flash-attn-4", "4.0.0b36", "flash_attn.cute", True, _HALF, (9, 0),
        grain=32,  # dq's buffer is as wide, its kernel a multiple of 16: they differ at 72 and 80
    ),
}  # fmt: skip


def _recorded(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _output(found: Tensor | tuple) -> Tensor:
    return found if isinstance(found, Tensor) else found[0]  # the rest, if any, is the logsumexp


@functools.cache
def _function(module: str) -> Callable[..., Tensor | tuple]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what a reader did not ask for
        return importlib.import_module(module).flash_attn_func
