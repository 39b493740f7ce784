"""A linear layer and its GELU in one kernel, for inference on a GPU.

cuBLAS can apply the tanh GELU to what its matrix product holds in registers. In SO400M's MLP at batch 64 that leaves
out one pass over 400 MB, written and read again, in each block. Compiled code needs it as an operator of its own:
torch.compile would take the fused call apart into a product and a GELU.
"""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

torch.library.define("siglip_lib::linear_gelu", "(Tensor x, Tensor weight, Tensor bias) -> Tensor")


def can_fuse_linear_gelu(linear: nn.Module, act: nn.Module, x: Tensor) -> bool:
    """Whether ``act(linear(x))`` may run as one kernel: in half precision on a GPU, with no gradient recorded."""
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    if type(linear) is not nn.Linear or linear.bias is None or linear.weight.dtype != x.dtype:
        return False
    if type(act) is not nn.GELU or act.approximate != "tanh" or torch.is_autocast_enabled("cuda"):
        return False
    hooks = (m for m in (linear, act) if m._forward_hooks or m._forward_pre_hooks)
    if any(True for _ in hooks):  # somebody wants to see what is between the two
        return False
    needed = x.requires_grad or linear.weight.requires_grad or linear.bias.requires_grad
    return not (torch.is_grad_enabled() and needed)


def fused_linear_gelu(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return the tanh GELU of ``linear(x)``: x (..., D) to (..., H), float16 or bfloat16, on a GPU."""
    out = torch.ops.siglip_lib.linear_gelu(x.flatten(0, -2), linear.weight, linear.bias)
    return out.unflatten(0, x.shape[:-1])


@torch.library.impl("siglip_lib::linear_gelu", "CUDA")
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # on CUDA this GELU is the tanh one; the rounding of what goes into it to half precision is left out
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


@torch.library.register_fake("siglip_lib::linear_gelu")
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@register_flop_formula(torch.ops.siglip_lib.linear_gelu)
def _(x_shape: torch.Size, weight_shape: torch.Size, *_: object, **__: object) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0]
