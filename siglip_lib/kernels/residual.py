"""The end of a residual branch in one Triton kernel: LayerScale, DropPath and the addition.

Written out, ``x + gamma * branch * keep / keep_prob`` is four passes over memory, and memory traffic is all it costs.
Here each element is read once, worked on in a register and written once.

How the work is split: x is a matrix of ``rows`` = B * N tokens by C channels. A thread block, Triton's program, has a
tile of it, some rows by some columns, in registers. Tiles side by side belong to neighbouring thread blocks, so that
what runs at the same time lies together in memory. The factor of a column and the keep bit of a row are loaded once for
a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from siglip_lib.base.checks import FLOATS, check_tensor, number
from siglip_lib.base.operators import operators_of, register_operator
from siglip_lib.kernels.device import check_device

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PLAIN = "use x + gamma * branch * keep / keep_prob"
_TILE = 2048  # elements: 16 for each of 4 warps' threads, two 16-byte loads of bfloat16
# thread blocks that the backward pass aims at: the same on any GPU, so that each adds up in the same order
_PROGRAMS = 1024


def fused_residual(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    keep_prob: float = 1.0,
) -> Tensor:
    """Return ``x + gamma * branch * keep / keep_prob`` in one pass over memory, and its gradients in another.

    All arithmetic is in float32 and is rounded once, at the end, to the dtype of x. The branch of a dropped sample is
    not read, so it may hold inf or nan; such a sample's x comes out bit by bit. The gradient of x is the incoming
    gradient itself. That of ``gamma`` adds up in a fixed order that depends on the shape alone: the same bits on
    every run. There are no second derivatives. Compiled code keeps each pass as one operator.

    Args:
        x: the residual stream (B, N, C); float16, bfloat16 or float32.
        branch: what the branch gave, (B, N, C), any of the three dtypes.
        gamma: LayerScale's factors (C,), any of the three dtypes; none if None.
        keep: one element for each sample (B,), bool or float, 0 for a dropped branch and 1 for a kept one; all are
            kept if None. It gets no gradient.
        keep_prob: what kept branches are divided by, in (0, 1]; 1 without ``keep``. DropPath's is ``1 - drop_prob``.

    Returns:
        A new contiguous tensor (B, N, C) of the dtype of x. Tensors that are not contiguous are copied first, which
        costs a further pass.

    Raises:
        TypeError: an argument is not a tensor or not of an allowed dtype; ``keep_prob`` is not a number.
        ValueError: a shape, a device or ``keep_prob`` is not as described, or the tensors are on the CPU and Triton's
            interpreter is off.

    Source: LayerScale, Touvron et al. (2021), section 2; stochastic depth, Huang et al. (2016), section 3.
    """
    _check(x, branch, gamma, keep, keep_prob)
    scale = 1 / float(keep_prob)
    learned = [t for t in (x, branch, gamma) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in learned):
        return _FusedResidual.apply(x, branch, gamma, keep, scale)
    return torch.ops.siglip_lib.fused_residual(x, branch, gamma, keep, scale)


class _FusedResidual(torch.autograd.Function):
    """The two passes. Branch is kept for the second only if gamma learns: only its gradient asks for it."""

    @staticmethod
    def forward(ctx, x, branch, gamma, keep, scale):
        learns = gamma is not None and ctx.needs_input_grad[2]
        ctx.save_for_backward(branch if learns else None, gamma, keep)
        ctx.scale, ctx.dtype = scale, branch.dtype
        return torch.ops.siglip_lib.fused_residual(x, branch, gamma, keep, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, incoming):
        branch, gamma, keep = ctx.saved_tensors
        _, for_branch, for_gamma, *_ = ctx.needs_input_grad
        if gamma is None and keep is None:  # a plain addition
            return incoming, incoming.to(ctx.dtype) if for_branch else None, None, None, None
        d_branch = d_gamma = None
        if for_branch or for_gamma:
            backward = torch.ops.siglip_lib.fused_residual_backward
            dtype = ctx.dtype if for_branch else None
            d_branch, d_gamma = backward(incoming, branch, gamma, keep, ctx.scale, dtype)
        return (
            incoming,
            d_branch if for_branch else None,
            d_gamma if for_gamma else None,
            None,
            None,
        )


@triton.jit
def _forward_kernel(
    x_ptr,  # (rows, channels)
    branch_ptr,  # (rows, channels)
    gamma_ptr,  # (channels,) or None
    keep_ptr,  # (rows // tokens,) or None
    out_ptr,  # (rows, channels)
    rows,
    tokens,
    scale,
    CHANNELS: tl.constexpr,  # known to the compiler, so that it sees which addresses are aligned
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    tiles: tl.constexpr = (CHANNELS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS  # across one row
    first = tl.program_id(0) // tiles * BLOCK_ROWS
    column = tl.program_id(0) % tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = first + tl.arange(0, BLOCK_ROWS)
    start = first.to(tl.int64) * CHANNELS  # of a large batch there are more than 2**31 elements
    offset = tl.arange(0, BLOCK_ROWS)[:, None] * CHANNELS + column[None, :]
    inside = (row < rows)[:, None] & (column < CHANNELS)[None, :]
    kept = _kept(keep_ptr, row, rows, tokens)[:, None] & inside

    factor = _factor(gamma_ptr, column, scale, CHANNELS)
    x = tl.load(x_ptr + start + offset, mask=inside)
    branch = tl.load(branch_ptr + start + offset, mask=kept, other=0.0).to(tl.float32)
    out = (x.to(tl.float32) + branch * factor[None, :]).to(x.dtype)
    # not x + 0, which makes 0 of -0
    tl.store(out_ptr + start + offset, tl.where(kept, out, x), mask=inside)


@triton.jit
def _backward_kernel(
    incoming_ptr,  # (rows, channels)
    branch_ptr,  # (rows, channels); None without sums
    gamma_ptr,  # (channels,) or None
    keep_ptr,  # (rows // tokens,) or None
    d_branch_ptr,  # (rows, channels) or None
    sums_ptr,  # (blocks, channels) float32, or None if gamma gets no gradient
    rows,
    tokens,
    scale,
    steps,
    CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    tiles: tl.constexpr = (CHANNELS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0) // tiles
    column = tl.program_id(0) % tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    factor = _factor(gamma_ptr, column, scale, CHANNELS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)  # of gamma, not yet added over rows

    # down the rows, a tile at a time; the sums stay in registers
    for step in range(steps):
        first = (program * steps + step) * BLOCK_ROWS
        row = first + tl.arange(0, BLOCK_ROWS)
        start = first.to(tl.int64) * CHANNELS
        offset = tl.arange(0, BLOCK_ROWS)[:, None] * CHANNELS + column[None, :]
        inside = (row < rows)[:, None] & (column < CHANNELS)[None, :]
        kept = _kept(keep_ptr, row, rows, tokens)[:, None] & inside

        # of a dropped sample nothing is read, and zeros are written
        incoming = tl.load(incoming_ptr + start + offset, mask=kept, other=0.0).to(tl.float32)
        if d_branch_ptr is not None:
            d_branch = (incoming * factor[None, :]).to(d_branch_ptr.dtype.element_ty)
            tl.store(d_branch_ptr + start + offset, d_branch, mask=inside)
        if sums_ptr is not None:
            branch = tl.load(branch_ptr + start + offset, mask=kept, other=0.0).to(tl.float32)
            total += incoming * branch

    if sums_ptr is not None:
        # a row of its own for each thread block: no atomics, whose order differs from run to run
        sums = tl.sum(total, axis=0) * scale
        tl.store(sums_ptr + program * CHANNELS + column, sums, mask=column < CHANNELS)


@triton.jit
def _kept(keep_ptr, row, rows, tokens):
    """Which rows are read: those inside the matrix and not of a dropped sample."""
    kept = row < rows
    if keep_ptr is not None:
        keep = tl.load(keep_ptr + row // tokens, mask=kept, other=0.0)
        kept = kept & (keep.to(tl.float32) != 0)
    return kept


@triton.jit
def _factor(gamma_ptr, column, scale, CHANNELS: tl.constexpr):
    """The factor of branch in each column: gamma / keep_prob."""
    factor = tl.zeros_like(column).to(tl.float32) + scale
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + column, mask=column < CHANNELS, other=0.0)
        factor *= gamma.to(tl.float32)
    return factor


def _forward(
    x: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None, scale: float
) -> Tensor:
    """Launch the forward kernel, a thread block for each tile."""
    x, branch, gamma, keep = (_contiguous(t) for t in (x, branch, gamma, keep))
    out = torch.empty_like(x)
    batch, tokens, channels = x.shape
    rows, columns = _tile(channels)
    constants = dict(CHANNELS=channels, BLOCK_ROWS=rows, BLOCK_COLUMNS=columns)
    programs = triton.cdiv(batch * tokens, rows) * triton.cdiv(channels, columns)
    given = (x, branch, gamma, keep, out, batch * tokens, tokens, scale)
    if out.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current GPU, not on the tensor's
            _forward_kernel[(programs,)](*given, **constants)
    return out


def _backward(
    incoming: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    scale: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients by branch, of ``dtype``, and by gamma; an empty tensor without ``dtype`` or ``branch``."""
    incoming, branch, gamma, keep = (_contiguous(t) for t in (incoming, branch, gamma, keep))
    for_branch, for_gamma = dtype is not None, branch is not None
    batch, tokens, channels = incoming.shape
    rows, columns = _tile(channels)
    constants = dict(CHANNELS=channels, BLOCK_ROWS=rows, BLOCK_COLUMNS=columns)
    blocks, tiles = triton.cdiv(batch * tokens, rows), triton.cdiv(channels, columns)
    # many rows a thread block make few sums to be added afterwards, but leave too few blocks for a GPU
    steps = max(1, blocks * tiles // _PROGRAMS) if for_gamma else 1
    programs = triton.cdiv(blocks, steps)
    d_branch = incoming.new_empty(incoming.shape if for_branch else 0, dtype=dtype)
    sums = incoming.new_empty((programs, channels if for_gamma else 0), dtype=torch.float32)
    results = (d_branch if for_branch else None, sums if for_gamma else None)
    given = (incoming, branch, gamma, keep, *results, batch * tokens, tokens, scale, steps)
    if incoming.numel():
        with torch.cuda.device_of(incoming):
            _backward_kernel[(programs * tiles,)](*given, **constants)
    return d_branch, sums.sum(0).to(gamma.dtype if for_gamma else sums.dtype)


def _tile(channels: int) -> tuple[int, int]:
    """Return rows and columns of a tile: the columns a power of two, of those that pad least the largest."""
    widths = [2**i for i in range(7, 11)]  # 128 to 1024; 1152 is 9 * 128
    if channels < widths[0]:
        widths = [triton.next_power_of_2(max(1, channels))]
    columns = min(widths, key=lambda width: (triton.cdiv(channels, width) * width, -width))
    return _TILE // columns, columns


def _contiguous(t: Tensor | None) -> Tensor | None:
    """Return ``t`` as the kernels' addresses want it."""
    return None if t is None else t.contiguous()


def _forward_fake(x, branch, gamma, keep, scale):
    return x.new_empty(x.shape)


def _backward_fake(incoming, branch, gamma, keep, scale, dtype):
    d_branch = incoming.new_empty(0 if dtype is None else incoming.shape, dtype=dtype)
    if branch is None:
        return d_branch, incoming.new_empty(0, dtype=torch.float32)
    return d_branch, gamma.new_empty(gamma.shape)


_OPERATORS = operators_of(__name__)
register_operator(_OPERATORS, "fused_residual", _forward, _forward_fake)
register_operator(_OPERATORS, "fused_residual_backward", _backward, _backward_fake)


def _check(
    x: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None, keep_prob: float
) -> None:
    options = dict(dtypes=_DTYPES, hint=f"else {_PLAIN}")
    shape = check_tensor("x", x, ("B", "N", "C"), **options)
    options["like"] = ("x", x)
    check_tensor("branch", branch, shape, **options)
    if gamma is not None:
        check_tensor("gamma", gamma, shape[2:], **options)
    if keep is not None:
        check_tensor("keep", keep, shape[:1], **options | {"dtypes": (torch.bool, *FLOATS)})
    number("keep_prob", keep_prob)
    if not 0 < keep_prob <= 1:
        raise ValueError(f"keep_prob={keep_prob!r} must lie in (0, 1]")
    if keep is None and keep_prob != 1:
        raise ValueError(f"keep_prob={keep_prob!r} must be 1 without keep")
    check_device("x", x, _forward_kernel, _PLAIN)
