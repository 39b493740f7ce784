"""What Triton and this library's attention kernel offer here: dispatch and kernel ask the same."""

import functools
import importlib.util

TRITON_HEAD_DIMS = (64, 72, 80, 96, 128)
TRITON_MAX_TOKENS = 16_384


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


@functools.cache
def has_triton() -> bool:
    """Whether Triton, which the kernels are written in, is installed."""
    return importlib.util.find_spec("triton") is not None
