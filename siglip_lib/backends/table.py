"""The attention backends: what each calls, why it may not run here, and what its operator is called."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from siglip_lib.base.observers import has_mode, is_transformed
from siglip_lib.base.offers import AMPERE, HOPPER, TRITON_MAX_TOKENS, why_not_our_kernel


class AttentionCase(NamedTuple):
    """What decides whether a backend can run: the arguments of ``attention_backends``, in its order."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    dropout: float
    deterministic: bool
    tokens: int
    packed: bool
    large: bool
    long: bool
    scale: float


def reduced_case(
    device, dtype, head_dim, dropout, deterministic, tokens, packed, large, long, scale
) -> tuple:
    """Return the fields of the one case that stands for all between which no backend decides: few are to be tried.

    They come in a plain tuple, which is made in a fraction of the time of its ``AttentionCase``, and is equal to it.
    """
    # an if makes a constant of what compiled code knows by its symbol alone
    if tokens > TRITON_MAX_TOKENS:
        tokens = TRITON_MAX_TOKENS + 1
    elif tokens != 1:
        tokens = 16
    dropout, scale = 0.1 if dropout else 0.0, 1.0 if scale > 0 else 0.0
    return device, dtype, head_dim, dropout, deterministic, tokens, packed, large, long, scale


# The packages of the backends that may run, by name, as trials.py imports them. They are looked up here and not
# imported where they run: a compiled model can trace a look-up, but no import.
imported: dict[str, ModuleType] = {}


# For each kernel that torch's SDPA chooses among: what allows it, what tells whether it is allowed, and whether it is
# cuDNN's.
_SDPA_FLAGS = [
    (
        getattr(torch._C, f"_set_sdp_use_{name}"),
        getattr(torch._C, f"_get_{name}_sdp_enabled"),
        name == "cudnn",
    )
    for name in ("cudnn", "flash", "mem_efficient", "math", "overrideable")
]


# --- the calls: q, k, v (B, N, heads, head_dim) -> (B, N, heads, head_dim) ---


def _triton(q, k, v, dropout, scale, deterministic):
    module = imported["siglip_lib.kernels.flash_attention"]
    return module.flash_attention_of_parts(q, k, v, scale)


def _hopper(q, k, v, dropout, scale, deterministic):
    module = imported["siglip_lib.kernels.hopper_attention"]
    return module.hopper_attention_of_parts(q, k, v, scale)


def _cudnn(q, k, v, dropout, scale, deterministic):
    if torch.compiler.is_compiling():  # it knows this form
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _sdpa(q, k, v, dropout, scale, deterministic)
    # what sdpa_kernel does, in a sixth of the time that it takes
    before = [allowed() for _, allowed, _ in _SDPA_FLAGS]
    try:
        for allow, _, wanted in _SDPA_FLAGS:
            allow(wanted)
        return _sdpa(q, k, v, dropout, scale, deterministic)
    finally:
        for (allow, _, _), was in zip(_SDPA_FLAGS, before, strict=True):
            allow(was)


def _flash_attn(q, k, v, dropout, scale, deterministic):
    return imported["flash_attn"].flash_attn_func(
        q, k, v, dropout_p=dropout, softmax_scale=scale, deterministic=deterministic
    )


def _sdpa(q, k, v, dropout, scale, deterministic):
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, N, head_dim)
    return F.scaled_dot_product_attention(q, k, v, None, dropout, scale=scale).transpose(1, 2)


def _xformers(q, k, v, dropout, scale, deterministic):
    return imported["xformers.ops"].memory_efficient_attention(q, k, v, p=dropout, scale=scale)


def _eager(q, k, v, dropout, scale, deterministic):
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, N, head_dim)
    weights = (q * scale @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, N, N)
    return (F.dropout(weights, dropout) @ v).transpose(1, 2)


# --- the reasons: None if the backend may run, before it is tried ---


def _needs_package(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return f"the package {name.replace('_', '-')} is not installed"
    return None


def _needs_cuda(case: AttentionCase) -> str | None:
    if case.device.type != "cuda":
        return f"needs a CUDA device, not {case.device.type}"
    if not torch.cuda.is_available():
        return "needs a CUDA device, and torch sees none"
    return None


def _needs_floats(case: AttentionCase) -> str | None:
    if case.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"needs a dtype of floating point, 16 to 64 bits, not {str(case.dtype).removeprefix('torch.')}"
    if case.device.type == "cuda" and not has_mode():  # FakeTensorMode has tensors of any device
        return _needs_cuda(case)
    return None


def _needs_half_on_ampere(case: AttentionCase) -> str | None:
    if reason := _needs_cuda(case):
        return reason
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, not {str(case.dtype).removeprefix('torch.')}"
    if torch.cuda.get_device_capability(case.device) < AMPERE:
        return "needs a GPU of compute capability 8.0 (Ampere) or newer"
    return None


def _needs_plain_autograd() -> str | None:
    return "its operator can't be transformed by torch.func" if is_transformed() else None


def _why_not_triton(case: AttentionCase) -> str | None:
    if reason := _needs_package("triton") or _needs_half_on_ampere(case):
        return reason
    if reason := why_not_our_kernel(case.head_dim, case.tokens, case.scale):
        return reason
    if case.dropout:
        return "has no dropout"
    if not case.packed:
        return "needs q, k and v in one tensor, as a qkv layer gives them"
    return _needs_plain_autograd()


def _why_not_hopper(case: AttentionCase) -> str | None:
    if reason := _why_not_triton(case):
        return reason
    if torch.cuda.get_device_capability(case.device) != HOPPER:
        return "needs a GPU of compute capability 9.0 (Hopper)"
    return None


def _why_not_cudnn(case: AttentionCase) -> str | None:
    if reason := _needs_half_on_ampere(case):
        return reason
    if case.deterministic:
        return "torch gives no way to ask cuDNN for a deterministic backward pass"
    if not torch.backends.cudnn.is_available():
        return "this torch was built without cuDNN"
    return None


def _why_not_flash_attn(case: AttentionCase) -> str | None:
    if reason := _needs_package("flash_attn") or _needs_half_on_ampere(case):
        return reason
    if case.head_dim % 8 or case.head_dim > 256:
        return f"needs a head_dim that is a multiple of 8 up to 256, not {case.head_dim}"
    return _needs_plain_autograd()


def _why_not_sdpa(case: AttentionCase) -> str | None:
    if reason := _needs_floats(case):
        return reason
    if case.deterministic and case.device.type != "cpu":
        return "its kernels add gradients in an order that varies; eager, triton and flash_attn are deterministic"
    return None


def _why_not_xformers(case: AttentionCase) -> str | None:
    if reason := _needs_package("xformers") or _needs_cuda(case):
        return reason
    if case.deterministic:
        return "it offers no deterministic backward pass"
    return _needs_plain_autograd()


# --- the operators: what would run, in words ---


def sample(case: AttentionCase) -> Tensor:
    """A small qkv (1, N, 3, 1, head_dim) to try a backend on."""
    shape = (1, min(case.tokens, 16), 3, 1, case.head_dim)
    return torch.ones(shape, dtype=case.dtype, device=case.device, requires_grad=True)


def _sdpa_operator(case: AttentionCase) -> str:
    q, k, v = (x.transpose(1, 2) for x in sample(case).unbind(2))
    choice = torch._fused_sdp_choice(q, k, v, dropout_p=case.dropout)
    return "torch " + SDPBackend(choice).name.lower()


def _xformers_operator(case: AttentionCase) -> str:
    fmha = imported["xformers.ops"].fmha
    inputs = fmha.Inputs(*sample(case).unbind(2), p=case.dropout)
    return fmha.dispatch._dispatch_fw(inputs, needs_gradient=True).NAME


@dataclass(frozen=True)
class Backend:
    """How a backend is called, asked and named; the arguments of ``run`` are those of the calls above."""

    run: Callable[[Tensor, Tensor, Tensor, float, float, bool], Tensor]
    why_not: Callable[[AttentionCase], str | None]
    operator: Callable[[AttentionCase], str]
    package: str = ""  # what to import before the first run
    sure: tuple[str, ...] = ("meta",)  # devices on which it runs if nothing speaks against it
    run_packed: Callable[[Tensor, float], Tensor] | None = None  # of qkv (B, N, 3, heads, head_dim)


# The order of "auto", measured by notebook 04 on an H200 (torch 2.11, bf16): speed over eager, geometric means of 23
# cases, forward and with backward, replayed from CUDA graphs. triton 5.20; cuDNN 5.10; flash-attn 3.46; sdpa 3.29, as
# it chooses where cuDNN can't run; xformers 1.68 with the kernel that it has left without flash-attn. Which of the
# first two leads depends on the case. (hopper makes 6.62; ``preferred`` says when it comes before all of these.)
BACKENDS = {
    "triton": Backend(
        _triton,
        _why_not_triton,
        lambda _: f"this library's kernel, triton {importlib.metadata.version('triton')}",
        package="siglip_lib.kernels.flash_attention",
        run_packed=lambda qkv, scale: imported[
            "siglip_lib.kernels.flash_attention"
        ].flash_attention(qkv, scale),
    ),
    "cudnn": Backend(_cudnn, _why_not_cudnn, lambda _: f"cuDNN {torch.backends.cudnn.version()}"),
    "flash_attn": Backend(
        _flash_attn,
        _why_not_flash_attn,
        lambda _: f"flash-attn {importlib.metadata.version('flash-attn')}",
        package="flash_attn",
    ),
    "sdpa": Backend(_sdpa, _why_not_sdpa, _sdpa_operator, sure=("meta", "cpu")),
    "xformers": Backend(_xformers, _why_not_xformers, _xformers_operator, package="xformers.ops"),
    "eager": Backend(
        _eager, _needs_floats, lambda _: "matmul, softmax, matmul", sure=("meta", "cpu", "cuda")
    ),
    # last, so that small work goes to others: launched by Python it made 2.11 times eager's speed (cuDNN 3.13,
    # triton 2.67, in notebook 04's means). Where it can run and attention is large, ``preferred`` puts it first
    "hopper": Backend(
        _hopper,
        _why_not_hopper,
        lambda _: (
            f"this library's kernel for Hopper, triton {importlib.metadata.version('triton')}"
        ),
        package="siglip_lib.kernels.hopper_attention",
        run_packed=lambda qkv, scale: imported[
            "siglip_lib.kernels.hopper_attention"
        ].hopper_attention(qkv, scale),
    ),
}

# FLOP forward from which on attention is large: half of what one layer of SO400M takes for 8 pictures.
# There hopper is ahead of triton and cuDNN in all of notebook 04's replayed cases whose speeds it prints, 1.21 to 1.70
# times the better of the two forward and 1.07 to 1.46 with backward: 8 and 64 times 729 tokens at head_dim 64 to 128,
# and 8 times 728 to 4096 at 72.
# triton against cuDNN, at head_dim 64, 72 and 80: 8 and 64 times 729 tokens, 1 to 9 % ahead forward and 7 to 13 % with
# backward. At 72 alone: 8 times 1024 to 4096, 3 to 5 % behind forward, within 1 % with backward; 64 times 256, by
# notebook 13, 9 % behind forward and 4 % ahead with backward. (At 96, which this rule leaves to cuDNN, 8 and 64 times
# 729: 4 to 6 % ahead.)
# Smaller work waits for Python to launch it, which replayed calls leave out: with one picture of 729 tokens at 72 the
# medians are 96 us for cuDNN, 140 for triton and 230 for hopper. That holds for a part of the large work, too: with 8
# pictures they are 148, 186 and 323, in ranges that overlap, where replayed calls take 79, 77 and 52. (hopper's two
# launched figures are older than the cheaper launch that it has now.) And what a graph would gain below the limit is
# lost: replayed, 8 times 512 (9.7 GFLOP), cuDNN takes 29 % longer than hopper forward and 31 % with backward.
LARGE = 10e9
# tokens from which on attention is long: there cuDNN is asked before triton. hopper knows no such limit: it is 1.47 to
# 1.57 times as fast as cuDNN from 1024 to 4096 tokens forward, 1.41 to 1.44 with backward
LONG = 1024
# head_dims at which triton is asked before cuDNN where attention is large and not long
_TRITON_FIRST = (64, 72, 80)


def preferred(case: AttentionCase) -> list[str]:
    """The names of the backends in the order in which ``auto`` takes them."""
    if is_transformed():
        first = ["eager"]  # no fused kernel has forward-mode or second derivatives
    else:
        ours = case.large and not case.long and case.head_dim in _TRITON_FIRST
        first = ["triton" if ours else "cudnn"]
        if case.large and _why_not_hopper(case) is None:
            first.insert(0, "hopper")
    return [*first, *(name for name in BACKENDS if name not in first)]
