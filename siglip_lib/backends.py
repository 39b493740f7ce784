"""Attention backends: which can run here, why the others can't, and one function that calls any of them."""

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

from siglip_lib.checks import finite, plain_shape, positive_int, probability
from siglip_lib.observers import has_mode, is_observed, is_transformed


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


def attention_backends(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    dropout: float = 0.0,
    deterministic: bool = False,
    *,
    tokens: int = 16,
    packed: bool = True,
    large: bool = True,
    scale: float = 1.0,
) -> dict[str, BackendStatus]:
    """Tell which attention backends can run, in the order in which ``backend="auto"`` prefers them.

    On a GPU each backend that might run is tried, forward and backward, on 16 tokens; that it ran is remembered, that
    it failed is not. (``auto`` keeps what it chose for a case: a trial at every call would be slow.) Where a trial
    would disturb or be disturbed, what nothing speaks against counts as usable: inside a transform of ``torch.func``,
    a FakeTensorMode or another mode that sees each operator, the export or trace of a model, and the capture of a CUDA
    graph.

    Args:
        device: where q, k and v would be.
        dtype: their dtype.
        head_dim: channels of a head.
        dropout: dropout of attention weights, in [0, 1).
        deterministic: whether every run must give the same bits, backward pass included.
        tokens: number of keys; cuDNN refuses a single one, ``triton`` more than 16,384.
        packed: whether q, k and v lie in one tensor, as a qkv layer gives them; ``triton`` needs that.
        large: whether the work is at least ``LARGE`` FLOP, so that the GPU and not Python's launches set the pace, in
            fewer than ``LONG`` tokens.
        scale: factor of the scores; ``triton`` needs one above 0.

    Returns:
        A status for each of ``triton``, ``cudnn``, ``flash_attn``, ``sdpa``, ``xformers`` and ``eager``.
    """
    case = _case(device, dtype, head_dim, dropout, deterministic, tokens, packed, large, scale)
    return {name: _status(name, case) for name in _order(case)}


def _case(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    dropout: float,
    deterministic: bool,
    tokens: int,
    packed: bool,
    large: bool,
    scale: float,
) -> _Case:
    """Check what was given, and keep of it what decides: each of few cases is tried once."""
    head_dim, tokens = positive_int("head_dim", head_dim), positive_int("tokens", tokens)
    dropout = 0.1 if probability("dropout", dropout) else 0.0
    tokens = _deciding_tokens(tokens)
    scale = 1.0 if finite("scale", scale) > 0 else 0.0
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype={dtype!r} must be a torch.dtype")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    transformed = is_transformed()
    return _Case(
        device, dtype, head_dim, dropout, deterministic, tokens, packed, large, scale, transformed
    )


def _deciding_tokens(tokens: int) -> int:
    """One number for all counts of tokens between which no backend decides."""
    # an if makes a constant of it where compiled code knows a size by its symbol alone
    if tokens > TRITON_MAX_TOKENS:
        return TRITON_MAX_TOKENS + 1
    return 1 if tokens == 1 else 16


def _order(case: _Case) -> list[str]:
    """The names as ``auto`` prefers them. See ``_BACKENDS`` for the figures."""
    first = "triton" if case.large and case.head_dim in _TRITON_FIRST else "cudnn"
    if case.transformed:
        first = "eager"  # no fused kernel has forward-mode or second derivatives
    return sorted(_BACKENDS, key=lambda name: name != first)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str = "auto",
    dropout: float = 0.0,
    deterministic: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention, ``softmax(q @ k.T * scale) @ v`` for each sample and head.

    Args:
        q: queries (B, N, heads, head_dim); any strides with contiguous channels, such as views of a packed
            (B, N, 3, heads, head_dim) tensor, which all but ``eager`` read where they are, and which ``triton`` needs.
        k: keys, as q.
        v: values, as q.
        backend: ``auto`` for the first that can run, or one of ``triton``, ``cudnn``, ``flash_attn``, ``sdpa``,
            ``xformers``, ``eager``.
        dropout: probability in [0, 1) of dropping an attention weight; applied whenever it is not zero.
        deterministic: the same bits on every run, backward pass included; backends that can't promise it are out.
        scale: factor of the scores, any finite number; ``head_dim ** -0.5`` if None.

    Returns:
        (B, N, heads, head_dim), dtype of q.

    Raises:
        ValueError: a shape or the scale is wrong, or the backend asked for cannot run; the message says why.
        TypeError: q, k and v differ in dtype.

    Source: Vaswani et al., Attention Is All You Need (2017), section 3.2.1.
    """
    shapes = [plain_shape(x) for x in (q, k, v)]
    of_q, of_k, of_v = shapes
    if (
        len(of_q) != 4
        or len(of_k) != 4
        or of_k != of_v
        or of_q[::2] != of_k[::2]
        or of_q[3] != of_k[3]
    ):
        raise ValueError(
            f"q, k, v have shapes {of_q}, {of_k}, {of_v}; all must be (B, N, heads, head_dim)"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must be the same"
        )
    scale = finite("scale", of_q[3] ** -0.5 if scale is None else scale)
    name = _chosen(q, k, backend, dropout, deterministic, scale, _lie_packed(q, k, v))
    return _run(name, q, k, v, dropout, scale, deterministic)


def attend_packed(
    qkv: Tensor,
    *,
    backend: str = "auto",
    dropout: float = 0.0,
    deterministic: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of q, k and v in one tensor, as ``attend`` of its three parts.

    Where ``triton`` runs, the gradient comes packed as well. The other backends give three, which are copied together.

    Args:
        qkv: (B, N, 3, heads, head_dim), contiguous channels.
        backend: see ``attend``.
        dropout: see ``attend``.
        deterministic: see ``attend``.
        scale: see ``attend``.

    Returns:
        (B, N, heads, head_dim), dtype of qkv.

    Raises:
        ValueError: a shape or the scale is wrong, or the backend asked for cannot run; the message says why.
    """
    shape = plain_shape(qkv)
    if len(shape) != 5 or shape[2] != 3:
        raise ValueError(f"qkv has shape {shape}; it must be (B, N, 3, heads, head_dim)")
    q, k, v = qkv.unbind(2)
    scale = finite("scale", shape[-1] ** -0.5 if scale is None else scale)
    name = _chosen(q, k, backend, dropout, deterministic, scale, qkv.is_contiguous())
    if name == "triton":
        return _imported["siglip_lib.kernels.flash_attention"].flash_attention(qkv, scale)
    return _run(name, q, k, v, dropout, scale, deterministic)


def _chosen(
    q: Tensor,
    k: Tensor,
    backend: str,
    dropout: float,
    deterministic: bool,
    scale: float,
    packed: bool,
) -> str:
    # numbers that are constants also in compiled code that knows sizes and floats by symbols
    return choose_backend(
        backend,
        q.device,
        q.dtype,
        int(plain_shape(q)[3]),
        0.1 if probability("dropout", dropout) else 0.0,
        deterministic,
        tokens=_deciding_tokens(plain_shape(k)[1]),
        packed=packed,
        large=_is_large(q),
        scale=1.0 if scale > 0 else 0.0,
    )


def _run(
    name: str, q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float, deterministic: bool
) -> Tensor:
    if scale <= 0:  # the kernels look for the largest score before they scale it
        q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
    return _BACKENDS[name].run(q, k, v, dropout, scale, deterministic)


def _lie_packed(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k and v are the three parts of one contiguous (B, N, 3, heads, head_dim)."""
    if not q.is_cuda or torch.compiler.is_compiling() or not q.shape == k.shape == v.shape:
        return False
    if type(q) is not Tensor or is_transformed():  # has no address
        return False
    _, tokens, heads, dim = q.shape
    strides = (tokens * 3 * heads * dim, 3 * heads * dim, dim, 1)
    step = heads * dim * q.element_size()
    return (
        q.stride() == k.stride() == v.stride() == strides
        and k.data_ptr() - q.data_ptr() == step
        and v.data_ptr() - k.data_ptr() == step
    )


def _is_large(q: Tensor) -> bool:
    batch, tokens, heads, dim = plain_shape(q)
    if 4 * batch * heads * tokens * tokens * dim >= LARGE and tokens < LONG:
        return q.is_cuda
    return False


def choose_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    dropout: float = 0.0,
    deterministic: bool = False,
    *,
    tokens: int = 16,
    packed: bool = True,
    large: bool = True,
    scale: float = 1.0,
) -> str:
    """Return the name of the backend that will run; a forced one that cannot is a ValueError that says why.

    The arguments are those of ``attention_backends``.
    """
    check_backend_name(backend)
    case = _case(device, dtype, head_dim, dropout, deterministic, tokens, packed, large, scale)
    if name := _runs.get((backend, case)):
        return name
    if backend == "auto":
        # none after the first usable one is tried, or its package imported
        for name in _order(case):
            if _why_not(name, case) is None:
                if (name, case) in _runs:
                    _runs["auto", case] = name
                return name
        reason = _why_not("eager", case)
        raise ValueError(f"no backend can run on {device} in {dtype}: eager says {reason}")
    if reason := _why_not(backend, case):
        usable = ["auto", *(name for name in _order(case) if _why_not(name, case) is None)]
        raise ValueError(
            f"backend={backend!r} cannot run here: {reason}. Usable: {', '.join(usable)}"
        )
    return backend


# What torch.compiler.assume_constant_result sets, without the import of the whole compiler that it costs: a compiled
# model takes the choice as a constant and does not trace the trial runs.
choose_backend._dynamo_marked_constant = True


def check_backend_name(backend: str) -> str:
    """Return ``backend`` if it is the name of one, or ``auto``."""
    if backend != "auto" and backend not in _BACKENDS:
        raise ValueError(
            f"backend={backend!r} is unknown; allowed are auto, {', '.join(_BACKENDS)}"
        )
    return backend


# --- the calls: q, k, v (B, N, heads, head_dim) -> (B, N, heads, head_dim) ---


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


# --- the reasons: None if the backend may run, before it is tried ---


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


# --- the operators: what would run, as text ---


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


TRITON_HEAD_DIMS = (64, 72, 80, 96, 128)
TRITON_MAX_TOKENS = 16_384
# On an H200 triton is ahead of cuDNN at 64 times 729 tokens and these head_dims, by 0 to 8 % forward and 9 to 13 % with
# backward; from 1024 tokens on it is up to 6 % behind forward, and small work waits for Python to launch it.
LARGE = 40e9  # FLOP forward, a quarter of what one layer of SO400M takes for 64 pictures
LONG = 1024  # tokens
_TRITON_FIRST = (64, 72, 80)

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
