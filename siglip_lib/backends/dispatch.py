"""Attention by any backend, and the choice of the one that runs."""

from collections.abc import Callable

import torch
from torch import Tensor

from siglip_lib.backends.table import (
    BACKENDS,
    LARGE,
    LONG,
    AttentionCase,
    preferred,
    reduced_case,
)
from siglip_lib.backends.trials import BackendStatus, remembered, runs, status, why_not
from siglip_lib.base.checks import finite, plain_shape, positive_int, probability
from siglip_lib.base.observers import is_transformed


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
    long: bool = False,
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
        tokens: number of keys; cuDNN refuses a single one, ``triton`` and ``hopper`` more than 16,384.
        packed: whether q, k and v lie in one tensor, as a qkv layer gives them; ``triton`` and ``hopper`` need that.
        large: whether the work is at least ``LARGE`` FLOP, as ``is_large`` tells, so that the GPU and not Python's
            launches set the pace.
        long: whether there are ``LONG`` tokens or more.
        scale: factor of the scores; ``triton`` and ``hopper`` need one above 0.

    Returns:
        A status for each of ``triton``, ``cudnn``, ``flash_attn``, ``sdpa``, ``xformers``, ``eager`` and ``hopper``.
    """
    options = dict(tokens=tokens, packed=packed, large=large, long=long, scale=scale)
    case = _checked_case(device, dtype, head_dim, dropout, deterministic, **options)
    return {name: status(name, case) for name in preferred(case)}


def _constant_when_compiled(choice: Callable[..., str]) -> Callable[..., str]:
    # What torch.compiler.assume_constant_result sets, without the import of the whole compiler that it costs: a
    # compiled model takes the choice as a constant and does not trace the trial runs.
    choice._dynamo_marked_constant = True
    return choice


@_constant_when_compiled
def choose_backend(backend: str, *case: object, **options: object) -> str:
    """Return the name of the backend that will run; a forced one that cannot is a ValueError that says why.

    The further arguments are those of ``attention_backends``.
    """
    check_backend_name(backend)
    return _choose(backend, *_checked_case(*case, **options))


def _checked_case(
    device, dtype, head_dim, dropout=0.0, deterministic=False,
    *, tokens=16, packed=True, large=True, long=False, scale=1.0,
) -> AttentionCase:  # fmt: skip
    head_dim, tokens = positive_int("head_dim", head_dim), positive_int("tokens", tokens)
    dropout, scale = probability("dropout", dropout), finite("scale", scale)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype={dtype!r} must be a torch.dtype")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return AttentionCase(
        *reduced_case(
            device, dtype, head_dim, dropout, deterministic, tokens, packed, large, long, scale
        )
    )


@_constant_when_compiled
def _choose(backend: str, *case) -> str:
    """Return the backend that runs a ``reduced_case``, whose fields come one by one: compiled code takes no tuple."""
    if name := remembered(backend, case):
        return name
    check_backend_name(backend)
    case = AttentionCase(*case)
    if backend == "auto":
        # none after the first usable one is tried, or its package imported
        for name in preferred(case):
            if why_not(name, case) is None:
                if remembered(name, case):
                    runs["auto", case] = name
                return name
        reason = why_not("eager", case)
        raise ValueError(
            f"no backend can run on {case.device} in {case.dtype}: eager says {reason}"
        )
    if reason := why_not(backend, case):
        usable = ["auto", *(name for name in preferred(case) if why_not(name, case) is None)]
        raise ValueError(
            f"backend={backend!r} cannot run here: {reason}. Usable: {', '.join(usable)}"
        )
    return backend


def check_backend_name(backend: str) -> str:
    """Return ``backend`` if it is the name of one, or ``auto``."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; allowed are auto, {', '.join(BACKENDS)}")
    return backend


def takes_packed(backend: str) -> bool:
    """Tell whether a backend takes q, k and v in one tensor and not apart; ``auto`` finds one for either."""
    return backend != "auto" and BACKENDS[backend].run_packed is not None


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
            ``xformers``, ``eager``, ``hopper``.
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
    if torch._C._get_tracing_state():
        of_q, of_k, of_v = plain_shape(q), plain_shape(k), plain_shape(v)
    else:
        of_q, of_k, of_v = q.shape, k.shape, v.shape
    if not (len(of_q) == len(of_k) == 4 and of_k == of_v) or (
        of_q != of_k and (of_q[0] != of_k[0] or of_q[2:] != of_k[2:])
    ):
        raise ValueError(
            f"q, k, v have shapes {tuple(of_q)}, {tuple(of_k)}, {tuple(of_v)};"
            " all must be (B, N, heads, head_dim)"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must be the same"
        )
    dim = int(of_q[3])  # a constant also in compiled code that knows sizes by symbols
    scale = dim**-0.5 if scale is None else finite("scale", scale)
    if dropout or type(dropout) is not float:  # 0.0 needs no check
        dropout = probability("dropout", dropout)
    packed, work = (_lie_packed(q, k, v), _work(of_q)) if q.is_cuda else (False, _SMALL)
    case = reduced_case(
        q.device, q.dtype, dim, dropout, deterministic, of_k[1], packed, *work, scale
    )
    name = _choose(backend, *case)
    if scale <= 0:
        q, scale = _above_zero(q, scale)
    return BACKENDS[name].run(q, k, v, dropout, scale, deterministic)


def attend_packed(
    qkv: Tensor,
    *,
    backend: str = "auto",
    dropout: float = 0.0,
    deterministic: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of q, k and v in one tensor, as ``attend`` of its three parts.

    Where ``triton`` or ``hopper`` runs, the gradient comes packed as well. The others give three, which are copied
    together.

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
    batch, tokens, _, heads, dim = shape
    dim = int(dim)
    scale = dim**-0.5 if scale is None else finite("scale", scale)
    if dropout or type(dropout) is not float:
        dropout = probability("dropout", dropout)
    work = _work((batch, tokens, heads, dim)) if qkv.is_cuda else _SMALL
    lies_packed = qkv.is_contiguous()
    case = reduced_case(
        qkv.device, qkv.dtype, dim, dropout, deterministic, tokens, lies_packed, *work, scale
    )
    name = _choose(backend, *case)
    if run_packed := BACKENDS[name].run_packed:
        return run_packed(qkv, scale)
    q, k, v = qkv.unbind(2)
    if scale <= 0:
        q, scale = _above_zero(q, scale)
    return BACKENDS[name].run(q, k, v, dropout, scale, deterministic)


def _above_zero(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """Return others of the same product, scale above 0: kernels look for the largest score before they scale it."""
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


def is_large(shape: tuple[int, ...]) -> bool:
    """Tell whether q of the shape (B, N, heads, head_dim) makes a ``large`` case, of ``LARGE`` FLOP or more."""
    batch, tokens, heads, dim = shape
    large = 4 * batch * heads * tokens * tokens * dim >= LARGE
    return True if large else False  # noqa: SIM210  a constant where compiled code knows sizes by symbols


_SMALL = (False, False)


def _work(shape: tuple[int, ...]) -> tuple[bool, bool]:
    """``large`` and ``long`` of q of the shape (B, N, heads, head_dim)."""
    return is_large(shape), True if shape[1] >= LONG else False  # noqa: SIM210  as above


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
