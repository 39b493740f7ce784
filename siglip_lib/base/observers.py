"""Who looks at what runs now: transforms, modes, tracers and hooks. They must see torch's own operators and calls."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from siglip_lib.base.offers import compiles_for


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation transforms what runs now."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_mode() -> bool:
    """Whether a mode sees each operator: FakeTensorMode, an export, whoever counts."""
    return _get_current_dispatch_mode() is not None


def is_observed() -> bool:
    """Whether what runs now is transformed, seen by a mode, traced, or recorded in a CUDA graph."""
    return (
        is_transformed()
        or has_mode()
        or torch.jit.is_tracing()
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def takes_kernel(*tensors: Tensor) -> bool:
    """Whether a Triton kernel may be launched on the tensors: Triton compiles for their GPU, and nobody observes."""
    # a subclass, such as FakeTensor or DTensor, has not the memory that its shape tells of
    return (
        all(x.is_cuda and type(x) in (Tensor, nn.Parameter) for x in tensors)
        and not torch.compiler.is_compiling()
        and not is_transformed()
        and not has_mode()
        and compiles_for(tensors[0].device)
    )


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a call of ``module`` is the ``forward`` of one of ``kinds`` and no more, so that a kernel may do it."""
    return not (
        type(module) not in kinds
        or "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )
