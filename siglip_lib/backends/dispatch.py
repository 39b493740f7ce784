"""Attention backends: which can run here, why the others can't, and one function that calls any of them."""

import torch
from torch import Tensor

from siglip_lib.backends.table import (
    _BACKENDS,
    BackendStatus,
    _Case,
    _imported,
    _runs,
    _status,
    _why_not,
)
from siglip_lib.base.checks import finite, plain_shape, positive_int, probability
from siglip_lib.base.observers import is_transformed
from siglip_lib.base.offers import TRITON_MAX_TOKENS


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


# --- the reasons: None if the backend may run, before it is tried ---


# --- the operators: what would run, as text ---


# On an H200 triton is ahead of cuDNN at 64 times 729 tokens and these head_dims, by 0 to 8 % forward and 9 to 13 % with
# backward; from 1024 tokens on it is up to 6 % behind forward, and small work waits for Python to launch it.
LARGE = 40e9  # FLOP forward, a quarter of what one layer of SO400M takes for 64 pictures
LONG = 1024  # tokens
_TRITON_FIRST = (64, 72, 80)
