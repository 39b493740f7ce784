"""The attention backends: what each calls, why it may not run here, and what its operator is called."""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import logging
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from siglip_lib.base.observers import has_mode, is_observed
from siglip_lib.base.offers import why_not_our_kernel


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run, the operator that would, and the reason why it can't (empty if it can).

    The operator is not known, and empty, on the meta device and where nothing can be tried.
    """

    name: str
    usable: bool
    operator: str
    reason: str


class _Case(NamedTuple):
    """What decides whether a backend can run."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    dropout: float
    deterministic: bool
    tokens: int
    packed: bool
    large: bool
    scale: float
    transformed: bool


def _eager(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float, deterministic: bool
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, N, head_dim)
    weights = (q * scale @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, N, N)
    return (F.dropout(weights, dropout) @ v).transpose(1, 2)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float, deterministic: bool
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, N, head_dim)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale).transpose(1, 2)


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float, deterministic: bool
) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v, dropout, scale, deterministic)


def _triton(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float, deterministic: bool
) -> Tensor:
    module = _imported["siglip_lib.kernels.flash_attention"]
    return module.flash_attention_of_parts(q, k, v, scale)


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float, deterministic: bool
) -> Tensor:
    return _imported["flash_attn"].flash_attn_func(
        q, k, v, dropout_p=dropout, softmax_scale=scale, deterministic=deterministic
    )


def _xformers(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float, deterministic: bool
) -> Tensor:
    return _imported["xformers.ops"].memory_efficient_attention(q, k, v, p=dropout, scale=scale)


def _needs_cuda(case: _Case) -> str | None:
    if case.device.type != "cuda":
        return f"needs a CUDA device, not {case.device.type}"
    if not torch.cuda.is_available():
        return "needs a CUDA device, and torch sees none"
    return None


def _needs_floats(case: _Case) -> str | None:
    if case.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"needs a dtype of floating point, 16 to 64 bits, not {str(case.dtype).removeprefix('torch.')}"
    if case.device.type == "cuda" and not has_mode():  # FakeTensorMode has tensors of any device
        return _needs_cuda(case)
    return None


def _needs_half(case: _Case) -> str | None:
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, not {str(case.dtype).removeprefix('torch.')}"
    return None


def _needs_ampere(case: _Case) -> str | None:
    if torch.cuda.get_device_capability(case.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 (Ampere) or newer"
    return None


def _needs_plain_autograd(case: _Case) -> str | None:
    if case.transformed:
        return "its operator can't be transformed by torch.func"
    return None


def _why_not_sdpa(case: _Case) -> str | None:
    if reason := _needs_floats(case):
        return reason
    if case.deterministic and case.device.type != "cpu":
        return "its kernels add gradients in an order that varies; eager, triton and flash_attn are deterministic"
    return None


def _why_not_cudnn(case: _Case) -> str | None:
    if reason := _needs_cuda(case) or _needs_half(case) or _needs_ampere(case):
        return reason
    if case.deterministic:
        return "torch gives no way to ask cuDNN for a deterministic backward pass"
    if not torch.backends.cudnn.is_available():
        return "this torch was built without cuDNN"
    return None


def _why_not_triton(case: _Case) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if reason := _needs_cuda(case) or _needs_half(case) or _needs_ampere(case):
        return reason
    if reason := why_not_our_kernel(case.head_dim, case.tokens, case.scale):
        return reason
    if case.dropout:
        return "has no dropout"
    if not case.packed:
        return "needs q, k and v in one tensor, as a qkv layer gives them"
    return _needs_plain_autograd(case)


def _why_not_flash_attn(case: _Case) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    if reason := _needs_cuda(case) or _needs_half(case) or _needs_ampere(case):
        return reason
    if case.head_dim % 8 or case.head_dim > 256:
        return f"needs a head_dim that is a multiple of 8 up to 256, not {case.head_dim}"
    return _needs_plain_autograd(case)


def _why_not_xformers(case: _Case) -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "the package xformers is not installed"
    if reason := _needs_cuda(case):
        return reason
    if case.deterministic:
        return "it offers no deterministic backward pass"
    return _needs_plain_autograd(case)


def _sdpa_operator(case: _Case) -> str:
    q, k, v = (x.transpose(1, 2) for x in _sample(case).unbind(2))
    choice = torch._fused_sdp_choice(q, k, v, dropout_p=case.dropout)
    return "torch " + SDPBackend(choice).name.lower()


def _xformers_operator(case: _Case) -> str:
    fmha = _imported["xformers.ops"].fmha
    inputs = fmha.Inputs(*_sample(case).unbind(2), p=case.dropout)
    return fmha.dispatch._dispatch_fw(inputs, needs_gradient=True).NAME


def _sample(case: _Case) -> Tensor:
    """A small qkv (1, N, 3, 1, head_dim) to try a backend on."""
    shape = (1, min(case.tokens, 16), 3, 1, case.head_dim)
    return torch.ones(shape, dtype=case.dtype, device=case.device, requires_grad=True)


@dataclass(frozen=True)
class _Backend:
    run: Callable[[Tensor, Tensor, Tensor, float, float, bool], Tensor]
    why_not: Callable[[_Case], str | None]
    operator: Callable[[_Case], str]
    package: str = ""  # what to import before the first run
    sure: tuple[str, ...] = ("meta",)  # devices on which it runs if nothing speaks against it


# The order of "auto", measured by notebook 04 on an H200 (torch 2.11, bf16): speed over eager, geometric means of the
# large cases and of the 14 others, forward and with backward. triton 7.4 and 4.9; cuDNN 6.8 and 5.0; flash-attn 4.8 and
# 3.3; sdpa 4.6 and 3.2, as it chooses where cuDNN can't run; xformers 2.1 and 1.7 with the kernel that it has left
# without flash-attn.
_BACKENDS = {
    "triton": _Backend(
        _triton,
        _why_not_triton,
        lambda *_: f"this library's kernel, triton {importlib.metadata.version('triton')}",
        package="siglip_lib.kernels.flash_attention",
    ),
    "cudnn": _Backend(_cudnn, _why_not_cudnn, lambda *_: f"cuDNN {torch.backends.cudnn.version()}"),
    "flash_attn": _Backend(
        _flash_attn,
        _why_not_flash_attn,
        lambda *_: f"flash-attn {importlib.metadata.version('flash-attn')}",
        package="flash_attn",
    ),
    "sdpa": _Backend(_sdpa, _why_not_sdpa, _sdpa_operator, sure=("meta", "cpu")),
    "xformers": _Backend(_xformers, _why_not_xformers, _xformers_operator, package="xformers.ops"),
    "eager": _Backend(
        _eager, _needs_floats, lambda *_: "matmul, softmax, matmul", sure=("meta", "cpu", "cuda")
    ),
}


# The packages of the backends that may run. They are looked up here and not imported where they
# run: a compiled model can trace a look-up, but no import.
_imported: dict[str, ModuleType] = {}


# What has been found out: (backend that was asked for, case) to the one that runs. Nothing is remembered of what can't:
# what a trial met may be gone the next time.
_runs: dict[tuple[str, _Case], str] = {}


_trial = threading.Lock()  # it swaps the warnings' filters, which all threads share


def _status(name: str, case: _Case) -> BackendStatus:
    if reason := _why_not(name, case):
        return BackendStatus(name, False, "", reason)
    known = case.device.type != "meta" and not is_observed()
    return BackendStatus(name, True, _BACKENDS[name].operator(case) if known else "", "")


def _why_not(name: str, case: _Case) -> str | None:
    """Why the backend can't run, None if it can or if nothing is known against it; what ran is remembered."""
    if (name, case) in _runs:
        return None
    backend = _BACKENDS[name]
    if reason := backend.why_not(case):
        return reason
    if case.device.type not in backend.sure:
        with _trial:
            if (name, case) in _runs:  # another thread was first
                return None
            if reason := _failure(backend, case):
                return reason
    if not is_observed():
        _runs[name, case] = name
    return None


def _failure(backend: _Backend, case: _Case) -> str | None:
    """Import the backend's package and, if that is possible now, try it: what it died of, None if it ran."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # torch tells in warnings why it turns a kernel down
        try:
            if backend.package:
                _imported[backend.package] = _import_quietly(backend.package)
            if not is_observed():
                _try(backend, case)
        except Exception as error:  # whatever a library raises for a case is its reason
            if _is_for_want_of_memory(error):
                raise  # says nothing of the backend
            return _shortest_reason(error, [str(w.message) for w in said])
    return None


def _is_for_want_of_memory(error: Exception) -> bool:
    # not every library raises the first two
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        text in str(error).lower() for text in ("out of memory", "alloc_failed")
    )


def _shortest_reason(error: Exception, said: list[str]) -> str:
    """The line that says why, out of what a library printed about every kernel it looked at."""
    said = [line.partition(" (Triggered internally")[0] for line in said]
    cudnn = "cuDNN attention kernel not used because:"
    if cudnn in said[:-1]:
        return said[said.index(cudnn) + 1]
    lines = [line.strip() for line in str(error).strip().splitlines()]
    because = [i for i, line in enumerate(lines[:-1]) if line.endswith("is not supported because:")]
    if because:  # xformers: a paragraph for each operator; the last one is its own
        return f"{lines[because[-1]].strip('`').split('`')[0]}: {lines[because[-1] + 1]}"
    return lines[0] if lines else type(error).__name__


def _try(backend: _Backend, case: _Case) -> None:
    """Run the backend on 16 tokens, forward and backward."""
    devices = [case.device] if case.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(case.device.type, enabled=False),
        # hides the trial from a checkpoint around it, which would count its tensors as its own
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        q, k, v = _sample(case).unbind(2)
        backend.run(q, k, v, case.dropout, 1.0, case.deterministic).sum().backward()


def _import_quietly(name: str) -> ModuleType:
    """Import flash-attn or xformers without the warnings about what a reader did not ask for."""
    if name.startswith("xformers"):
        _load_cuda12_runtime()
        logging.getLogger("xformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def _load_cuda12_runtime() -> None:
    """Load libcudart.so.12, which xformers' wheel links to, from its package: torch may bring CUDA 13's alone."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for library in Path(folder).glob("cuda_runtime/lib/libcudart.so.12"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
