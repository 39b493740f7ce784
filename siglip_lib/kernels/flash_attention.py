"""Flash attention in Triton, forward and backward, on q, k and v as they lie packed in one tensor.

A thread block (Triton's program) owns a block of queries and reads the keys and values block by block. It never holds a
row of scores: of each row it keeps the largest score so far, m, the sum of exp2(score - m), and the output that these
weights give. When a block brings a larger m, the sums so far are scaled by exp2(old m - new m): the online softmax.

A tile in Triton is a power of two wide, and SO400M's head has 72 channels. Padding 72 to 128 wastes 44 % of the
products of the tensor cores. Here a head is cut in two, 64 + 16 of which 8 are real: 80 instead of 128.

Scores are in base 2: exp2 is one instruction on a GPU; exp is five, as Triton makes it.

Source: Dao et al., FlashAttention (2022), section 3.1; Dao, FlashAttention-2 (2023), sections 3.1 and 3.2; Milakov and
Gimelshein, Online normalizer calculation for softmax (2018), section 3.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from siglip_lib.base.checks import check_tensor, finite
from siglip_lib.base.offers import why_not_our_kernel
from siglip_lib.base.operators import operators_of, register_operator
from siglip_lib.kernels.device import check_device

_LOG2_E = math.log2(math.e)
_ROWS = 128  # what lse and delta are padded to: no block is larger, so none reads past their end


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut, and what it may use.

    Args:
        own: rows that a thread block owns.
        read: rows that it reads at a time.
        warps: its warps, of 32 threads each.
        stages: of the pipeline: how many blocks are on their way while one is computed with.
        registers: limit for a thread, none if None. A multiprocessor has 65,536: at 168 there is room for three
            thread blocks of 4 warps, at 128 for two of 8.
    """

    own: int
    read: int
    warps: int
    stages: int
    registers: int | None = None


# Of the kernels forward, queries and keys by head_dim: for Hopper, as tools/tune_kernels.py found them on an H200 among
# those that are right
_TUNED = {
    64: (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 32, 4, 3)),
    72: (Blocks(128, 64, 4, 3), Blocks(128, 32, 8, 3), Blocks(64, 32, 4, 3, 168)),
    80: (Blocks(128, 64, 8, 3, 128), Blocks(128, 32, 8, 3), Blocks(64, 64, 4, 3)),
    96: (Blocks(128, 64, 8, 3, 128), Blocks(128, 32, 8, 3), Blocks(64, 64, 4, 3)),
    128: (Blocks(128, 32, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 32, 4, 3)),
}
# For any other GPU, by fit and not by speed, since nobody has timed them: compiled for 8.0, 8.6, 8.9, 10.0 and 12.0
# they spill nothing (at 96 with 8 warps, not with 4) and fit the shared memory, of which 8.6, 8.9 and 12.0 have 99 KiB
_FITTED = {
    dim: (Blocks(128, 32, 8, 3), Blocks(128, 32, 8, 2), Blocks(64, 32, 8 if dim == 96 else 4, 3))
    for dim in _TUNED
}
_HOPPER, _OTHER = (
    {
        name: {dim: row[i] for dim, row in table.items()}
        for i, name in enumerate(("forward", "queries", "keys"))
    }
    for table in (_TUNED, _FITTED)
)


def blocks_of(capability: tuple[int, int]) -> dict[str, dict[int, Blocks]]:
    """Return the blocks of each kernel, by name and head_dim, on a GPU of a compute capability."""
    return _HOPPER if capability == (9, 0) else _OTHER


def flash_attention(qkv: Tensor, scale: float | None = None) -> Tensor:
    """Return ``softmax(q @ k.T * scale) @ v`` for each sample and head, without a mask.

    Args:
        qkv: q, k and v (B, N, 3, heads, head_dim), contiguous, as a linear layer gives them; bfloat16 or float16 on a
            CUDA device, float32 or float16 on a CPU in Triton's interpreter. head_dim is one of 64, 72, 80, 96, 128,
            N is 1 to 16,384.
        scale: factor of the scores, above 0; ``head_dim ** -0.5`` if None.

    Returns:
        (B, N, heads, head_dim), contiguous, dtype of qkv. The gradient of qkv comes packed as qkv is, and both passes
        give the same bits on every run.

    Raises:
        TypeError: a dtype that is not offered.
        ValueError: a shape, strides, a device or a scale that is not offered; the message says what to use instead.
    """
    _check(qkv)
    scale = finite("scale", qkv.shape[-1] ** -0.5 if scale is None else scale)
    _, tokens, _, _, dim = qkv.shape
    if reason := why_not_our_kernel(dim, tokens, scale):
        given = f"head_dim={dim}, N={tokens}, scale={scale}"
        raise ValueError(f"{given}: the kernel {reason}; attend() takes another backend then")
    return torch.ops.siglip_lib.flash_attention(qkv, scale)[0]


class _OfParts(torch.autograd.Function):
    """Operators, of both passes, on the tensor that q, k and v lie in; their gradients lie in one, too."""

    @staticmethod
    def forward(ctx, q, k, v, scale, forward, backward):
        out, lse = forward(_whole(q), scale)
        ctx.save_for_backward(q, k, v, out, lse)  # k and v so that a change in place is noticed
        ctx.scale, ctx.operator = scale, backward
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, _, _, out, lse = ctx.saved_tensors
        d_qkv = ctx.operator(d_out, _whole(q), out, lse, ctx.scale)
        return *d_qkv.unbind(2), None, None, None


def _whole(q: Tensor) -> Tensor:
    """The packed tensor that begins with q."""
    batch, tokens, heads, dim = q.shape
    return q.as_strided((batch, tokens, 3, heads, dim), (*q.stride()[:2], heads * dim, dim, 1))


def flash_attention_of_parts(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """As ``flash_attention``, of the three parts (B, N, heads, head_dim) of a packed tensor; the caller has checked."""
    operators = torch.ops.siglip_lib
    both = operators.flash_attention, operators.flash_attention_backward
    return _OfParts.apply(q, k, v, scale, *both)


# --- forward ---


@triton.jit
def _place(number, tokens, HEADS: tl.constexpr, OWN: tl.constexpr):
    """Return which block of rows has a number, and of which pair of sample and head it is."""
    # neighbours have the same keys and values, so these come out of the L2 cache
    blocks = tl.cdiv(tokens, OWN)
    pair = number // blocks
    return number % blocks, pair, (pair // HEADS).to(tl.int64), pair % HEADS


@triton.jit
def _forward_kernel(
    qkv,
    out,
    lse,
    scale,  # of the scores, times log2(e)
    tokens,
    padded,  # tokens, rounded up to whole blocks: the length of a row of lse
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,  # the largest power of two in DIM
    REST: tl.constexpr,  # a power of two that holds what is left, or 0
    OWN: tl.constexpr,  # queries of this thread block
    READ: tl.constexpr,  # keys at a time
    MASKED: tl.constexpr,  # whether the last block of keys is not a full one
):
    _forward_block(
        tl.program_id(0), qkv, out, lse, scale, tokens, padded,
        HEADS, DIM, MAIN, REST, OWN, READ, MASKED,
    )  # fmt: skip


@triton.jit
def _forward_block(
    number, qkv, out, lse, scale, tokens, padded,
    HEADS: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    OWN: tl.constexpr, READ: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Compute the output and lse of a block of queries."""
    # strides are constants: a run-time stride of 72 would cost the 16-byte loads
    row: tl.constexpr = 3 * HEADS * DIM
    block, pair, sample, head = _place(number, tokens, HEADS, OWN)
    q_base = qkv + sample * tokens * row + head * DIM
    k_base = q_base + HEADS * DIM
    v_base = k_base + HEADS * DIM

    queries = block * OWN + tl.arange(0, OWN)
    # rows past the end read the last one and are not stored
    inside = tl.minimum(queries, tokens - 1)
    main = tl.arange(0, MAIN)
    # (OWN, MAIN), into shared memory, where the tensor cores read it in each round
    q_main = tl.load(q_base + inside[:, None] * row + main[None, :])
    m = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN, 8], tl.float32)
    o_main = tl.zeros([OWN, MAIN], tl.float32)
    q_rest, o_rest = 0, 0
    if REST:
        rest = MAIN + tl.arange(0, REST)
        q_rest = tl.load(
            q_base + inside[:, None] * row + rest[None, :], mask=rest[None, :] < DIM, other=0.0
        )
        o_rest = tl.zeros([OWN, REST], tl.float32)

    for start in range(0, tokens, READ):
        m, total, o_main, o_rest = _one_block(
            q_main, q_rest, k_base, v_base, start, m, total, o_main, o_rest,
            scale, tokens, row, DIM, MAIN, REST, OWN, READ, MASKED,
        )  # fmt: skip

    total = tl.sum(total, 1)
    kept = queries < tokens
    out_base = out + (sample * tokens * HEADS + head) * DIM + inside[:, None] * (HEADS * DIM)
    share = (1.0 / total)[:, None]
    o_main = o_main * share
    tl.store(out_base + main[None, :], o_main.to(out.dtype.element_ty), mask=kept[:, None])
    if REST:
        o_rest = o_rest * share
        here = kept[:, None] & (rest[None, :] < DIM)
        tl.store(out_base + rest[None, :], o_rest.to(out.dtype.element_ty), mask=here)
    # log2 of the sum of exp2(scores): all that the backward pass needs of a row. Of rows past the end infinity, which
    # makes their weights 0 there
    row_lse = tl.where(kept, m + tl.log2(total), float("inf"))
    tl.store(lse + pair * padded + queries, row_lse)


@triton.jit
def _one_block(
    q_main, q_rest, k_base, v_base, start, m, total, o_main, o_rest,
    scale, tokens,
    row: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    OWN: tl.constexpr, READ: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take READ keys and values into the running maximum, sum and output."""
    keys = start + tl.arange(0, READ)
    inside = tl.minimum(keys, tokens - 1) if MASKED else keys
    main = tl.arange(0, MAIN)
    k_main = tl.load(k_base + inside[None, :] * row + main[:, None])  # (MAIN, READ)
    v_main = tl.load(v_base + inside[:, None] * row + main[None, :])  # (READ, MAIN)
    if REST:
        rest = MAIN + tl.arange(0, REST)
        real = rest < DIM
        k_rest = tl.load(
            k_base + inside[None, :] * row + rest[:, None], mask=real[:, None], other=0.0
        )
        v_rest = tl.load(
            v_base + inside[:, None] * row + rest[None, :], mask=real[None, :], other=0.0
        )
        scores = tl.dot(q_rest, k_rest, input_precision="ieee")
        scores = tl.dot(q_main, k_main, scores, input_precision="ieee")  # (OWN, READ)
    else:
        scores = tl.dot(q_main, k_main, input_precision="ieee")
    # the last block alone: elsewhere no thread spends a comparison on it
    if MASKED:  # noqa: SIM102  known at compile time; what follows is not
        if start + READ > tokens:
            scores = tl.where(keys[None, :] < tokens, scores, float("-inf"))

    most = tl.maximum(tl.max(scores, 1) * scale, m)
    p = tl.exp2(scores * scale - most[:, None])
    shrink = tl.exp2(m - most)
    # eight sums a row, as its columns lie in threads: so each adds what it holds, and none is passed on until the end
    total = total * shrink[:, None] + tl.sum(tl.reshape(p, [OWN, READ // 8, 8]), 1)
    p = p.to(v_main.dtype)
    o_main = o_main * shrink[:, None] + tl.dot(p, v_main, input_precision="ieee")
    if REST:
        o_rest = o_rest * shrink[:, None] + tl.dot(p, v_rest, input_precision="ieee")
    return most, total, o_main, o_rest


# --- backward: a pass for dq, then one for dk and dv; no two thread blocks add to one element, so sums never vary ---
#
# With s = scale * q @ k.T, the scores, and lse = log(sum of exp(s)) of each row, which the forward pass has stored:
#
#     p = exp(s - lse)                            the weights, (queries, keys)
#     dp = d_out @ v.T                            their gradient
#     delta = sum(p * dp) = sum(out * d_out)      of each row; the second form needs no loop over keys
#     ds = p * (dp - delta)                       the gradient of s
#     dv = p.T @ d_out, dq = scale * ds @ k, dk = scale * ds.T @ q
#
# In the code s and lse are in base 2: `scale` holds a factor log2(e), and `plain_scale` does not.


@triton.jit
def _load_two(a_rows, b_rows, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    """Load the main and rest parts of two tensors' rows: (n, MAIN), and (n, REST) or 0, from pointers (n, 1)."""
    main = tl.arange(0, MAIN)
    a_main, b_main = tl.load(a_rows + main[None, :]), tl.load(b_rows + main[None, :])
    a_rest, b_rest = 0, 0
    if REST:
        rest = MAIN + tl.arange(0, REST)
        real = rest[None, :] < DIM
        a_rest = tl.load(a_rows + rest[None, :], mask=real, other=0.0)
        b_rest = tl.load(b_rows + rest[None, :], mask=real, other=0.0)
    return a_main, a_rest, b_main, b_rest


@triton.jit
def _product(a_main, a_rest, b_main, b_rest, REST: tl.constexpr):
    """Return ``a @ b.T`` over the channels of both parts."""
    if REST:  # first, as in the forward pass
        narrow = tl.dot(a_rest, tl.trans(b_rest), input_precision="ieee")
        product = tl.dot(a_main, tl.trans(b_main), narrow, input_precision="ieee")
    else:
        product = tl.dot(a_main, tl.trans(b_main), input_precision="ieee")
    return product


@triton.jit
def _queries_kernel(
    qkv, out, d_out, lse, delta, d_qkv, scale, plain_scale, tokens, padded,
    HEADS: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    OWN: tl.constexpr, READ: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Compute dq of OWN queries: over all keys, dq = ds @ k. And delta, which the other pass needs too."""
    row: tl.constexpr = 3 * HEADS * DIM
    block, pair, sample, head = _place(tl.program_id(0), tokens, HEADS, OWN)
    q_base = qkv + sample * tokens * row + head * DIM
    k_base = q_base + HEADS * DIM

    queries = block * OWN + tl.arange(0, OWN)
    inside = tl.minimum(queries, tokens - 1)
    main = tl.arange(0, MAIN)
    q_rows = q_base + inside[:, None] * row
    o_rows = (sample * tokens * HEADS + head) * DIM + inside[:, None] * (HEADS * DIM)
    q_main, do_main = tl.load(q_rows + main[None, :]), tl.load(d_out + o_rows + main[None, :])
    row_lse = tl.load(lse + pair * padded + queries)
    o_main = tl.load(out + o_rows + main[None, :])
    row_delta = tl.sum(o_main.to(tl.float32) * do_main.to(tl.float32), 1)
    dq_main = tl.zeros([OWN, MAIN], tl.float32)
    q_rest, do_rest, dq_rest = 0, 0, 0
    if REST:
        rest = MAIN + tl.arange(0, REST)
        real = rest[None, :] < DIM
        q_rest = tl.load(q_rows + rest[None, :], mask=real, other=0.0)
        do_rest = tl.load(d_out + o_rows + rest[None, :], mask=real, other=0.0)
        o_rest = tl.load(out + o_rows + rest[None, :], mask=real, other=0.0)
        row_delta += tl.sum(o_rest.to(tl.float32) * do_rest.to(tl.float32), 1)
        dq_rest = tl.zeros([OWN, REST], tl.float32)
    tl.store(delta + pair * padded + queries, row_delta)

    for start in range(0, tokens, READ):
        dq_main, dq_rest = _some_keys(
            q_main, q_rest, do_main, do_rest, dq_main, dq_rest, row_lse, row_delta,
            k_base, start, scale, tokens, HEADS, DIM, MAIN, REST, READ, MASKED,
        )  # fmt: skip

    kept = (queries < tokens)[:, None]
    dtype = d_qkv.dtype.element_ty
    dq_rows = d_qkv + sample * tokens * row + head * DIM + inside[:, None] * row
    tl.store(dq_rows + main[None, :], (dq_main * plain_scale).to(dtype), mask=kept)
    if REST:
        tl.store(dq_rows + rest[None, :], (dq_rest * plain_scale).to(dtype), mask=kept & real)


@triton.jit
def _some_keys(
    q_main, q_rest, do_main, do_rest, dq_main, dq_rest, row_lse, row_delta,
    k_base, start, scale, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    READ: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what READ keys give to dq."""
    row: tl.constexpr = 3 * HEADS * DIM
    keys = start + tl.arange(0, READ)
    inside = tl.minimum(keys, tokens - 1) if MASKED else keys
    k_rows = k_base + inside[:, None] * row
    v_rows = k_rows + HEADS * DIM
    k_main, k_rest, v_main, v_rest = _load_two(k_rows, v_rows, DIM, MAIN, REST)  # (READ, MAIN)
    scores = _product(q_main, q_rest, k_main, k_rest, REST)  # (OWN, READ)
    dp = _product(do_main, do_rest, v_main, v_rest, REST)
    p = tl.exp2(scores * scale - row_lse[:, None])
    ds = p * (dp - row_delta[:, None])
    if MASKED:  # noqa: SIM102
        if start + READ > tokens:
            ds = tl.where(keys[None, :] < tokens, ds, 0.0)
    ds = ds.to(k_main.dtype)
    dq_main = tl.dot(ds, k_main, dq_main, input_precision="ieee")
    if REST:
        dq_rest = tl.dot(ds, k_rest, dq_rest, input_precision="ieee")
    return dq_main, dq_rest


@triton.jit
def _keys_kernel(
    qkv, d_out, lse, delta, d_qkv, scale, plain_scale, tokens, padded,
    HEADS: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    OWN: tl.constexpr, READ: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of OWN keys: over all queries, dv = p.T @ d_out and dk = ds.T @ q."""
    row: tl.constexpr = 3 * HEADS * DIM
    block, pair, sample, head = _place(tl.program_id(0), tokens, HEADS, OWN)
    q_base = qkv + sample * tokens * row + head * DIM
    do_base = d_out + (sample * tokens * HEADS + head) * DIM
    lse_base, delta_base = lse + pair * padded, delta + pair * padded

    keys = block * OWN + tl.arange(0, OWN)
    inside = tl.minimum(keys, tokens - 1)
    main = tl.arange(0, MAIN)
    k_base = q_base + HEADS * DIM + inside[:, None] * row
    v_base = k_base + HEADS * DIM
    k_main, k_rest, v_main, v_rest = _load_two(k_base, v_base, DIM, MAIN, REST)  # (OWN, MAIN)
    dk_main, dv_main = tl.zeros([OWN, MAIN], tl.float32), tl.zeros([OWN, MAIN], tl.float32)
    dk_rest, dv_rest = 0, 0
    if REST:
        rest = MAIN + tl.arange(0, REST)
        real = rest[None, :] < DIM
        dk_rest, dv_rest = tl.zeros([OWN, REST], tl.float32), tl.zeros([OWN, REST], tl.float32)

    for start in range(0, tokens, READ):
        dk_main, dk_rest, dv_main, dv_rest = _some_queries(
            k_main, k_rest, v_main, v_rest, dk_main, dk_rest, dv_main, dv_rest,
            q_base, do_base, lse_base, delta_base, start, scale, tokens,
            HEADS, DIM, MAIN, REST, READ, MASKED,
        )  # fmt: skip

    kept = (keys < tokens)[:, None]
    dtype = d_qkv.dtype.element_ty
    dk_base = d_qkv + sample * tokens * row + (HEADS + head) * DIM + inside[:, None] * row
    dv_base = dk_base + HEADS * DIM
    tl.store(dk_base + main[None, :], (dk_main * plain_scale).to(dtype), mask=kept)
    tl.store(dv_base + main[None, :], dv_main.to(dtype), mask=kept)
    if REST:
        tl.store(dk_base + rest[None, :], (dk_rest * plain_scale).to(dtype), mask=kept & real)
        tl.store(dv_base + rest[None, :], dv_rest.to(dtype), mask=kept & real)


@triton.jit
def _some_queries(
    k_main, k_rest, v_main, v_rest, dk_main, dk_rest, dv_main, dv_rest,
    q_base, do_base, lse_base, delta_base, start, scale, tokens,
    HEADS: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    READ: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what READ queries give to dk and dv. Scores are transposed here: (keys, queries)."""
    row: tl.constexpr = 3 * HEADS * DIM
    queries = start + tl.arange(0, READ)
    inside = tl.minimum(queries, tokens - 1) if MASKED else queries
    q_rows, do_rows = q_base + inside[:, None] * row, do_base + inside[:, None] * (HEADS * DIM)
    # one by one: _load_two would put lse and delta behind the rest, and change the machine code that was timed
    main = tl.arange(0, MAIN)
    q_main, do_main = tl.load(q_rows + main[None, :]), tl.load(do_rows + main[None, :])
    # of queries past the end lse is infinite, so that their weights are 0
    row_lse, row_delta = tl.load(lse_base + queries), tl.load(delta_base + queries)
    q_rest, do_rest = 0, 0
    if REST:
        rest = MAIN + tl.arange(0, REST)
        real = rest[None, :] < DIM
        q_rest = tl.load(q_rows + rest[None, :], mask=real, other=0.0)
        do_rest = tl.load(do_rows + rest[None, :], mask=real, other=0.0)
    scores = _product(k_main, k_rest, q_main, q_rest, REST)  # (OWN, READ)
    dp = _product(v_main, v_rest, do_main, do_rest, REST)
    p = tl.exp2(scores * scale - row_lse[None, :])
    ds = (p * (dp - row_delta[None, :])).to(q_main.dtype)
    p = p.to(q_main.dtype)
    dv_main = tl.dot(p, do_main, dv_main, input_precision="ieee")
    dk_main = tl.dot(ds, q_main, dk_main, input_precision="ieee")
    if REST:
        dv_rest = tl.dot(p, do_rest, dv_rest, input_precision="ieee")
        dk_rest = tl.dot(ds, q_rest, dk_rest, input_precision="ieee")
    return dk_main, dk_rest, dv_main, dv_rest


# --- launches, and the operators that autograd and compiled code see ---


def _cut(dim: int) -> tuple[int, int]:
    """Channels as a power of two, and what holds the rest: 64 + 16 for 72."""
    main = 1 << (dim.bit_length() - 1)
    return main, max(16, triton.next_power_of_2(dim - main)) if dim > main else 0


def _padded(tokens: int) -> int:
    return -(-tokens // _ROWS) * _ROWS


KERNELS = {"forward": _forward_kernel, "queries": _queries_kernel, "keys": _keys_kernel}


def constants_of(
    name: str, dim: int, heads: int, tokens: int, capability: tuple[int, int]
) -> dict[str, int | bool | None]:
    """Return what a kernel is compiled with, beside its arguments, on a GPU of a compute capability."""
    blocks, (main, rest) = blocks_of(capability)[name][dim], _cut(dim)
    masked = tokens % blocks.read != 0
    options = dict(num_warps=blocks.warps, num_stages=blocks.stages, maxnreg=blocks.registers)
    sizes = dict(HEADS=heads, DIM=dim, MAIN=main, REST=rest, OWN=blocks.own, READ=blocks.read)
    return sizes | dict(MASKED=masked) | options


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    """Compute capability of a GPU; Hopper's in the interpreter, where tensors are on no GPU, -1."""
    return torch.cuda.get_device_capability(device) if device >= 0 else (9, 0)


def _launch(name: str, qkv: Tensor, *arguments) -> None:
    batch, tokens, _, heads, dim = qkv.shape
    constants = constants_of(name, dim, heads, tokens, _capability(qkv.get_device()))
    programs = triton.cdiv(tokens, constants["OWN"]) * batch * heads
    with torch.cuda.device_of(qkv):  # Triton launches on the current GPU, not on the tensor's
        KERNELS[name][(programs,)](*arguments, tokens, _padded(tokens), **constants)


def _forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, _, heads, dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads, dim)
    lse = qkv.new_empty(batch, heads, _padded(tokens), dtype=torch.float32)
    _launch("forward", qkv, qkv, out, lse, scale * _LOG2_E)
    return out, lse


def _backward(d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    d_out = d_out.contiguous()  # sum().backward() and others give one element, expanded
    delta, d_qkv = torch.empty_like(lse), torch.empty_like(qkv)
    given = (d_out, lse, delta, d_qkv, scale * _LOG2_E, scale)
    _launch("queries", qkv, qkv, out, *given)
    _launch("keys", qkv, qkv, *given)
    return d_qkv


def _forward_fake(qkv, scale):
    batch, tokens, _, heads, dim = qkv.shape
    lse = qkv.new_empty(batch, heads, _padded(tokens), dtype=torch.float32)
    return qkv.new_empty(batch, tokens, heads, dim), lse


def _backward_fake(d_out, qkv, out, lse, scale):
    return torch.empty_like(qkv)


_OPERATORS = operators_of(__name__)
register_operator(_OPERATORS, "flash_attention", _forward, _forward_fake)
register_operator(_OPERATORS, "flash_attention_backward", _backward, _backward_fake)


def _keep(ctx, inputs, output) -> None:
    qkv, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.set_materialize_grads(False)


def _gradient(ctx, d_out, d_lse):
    if d_out is None:
        return None, None
    return torch.ops.siglip_lib.flash_attention_backward(d_out, *ctx.saved_tensors, ctx.scale), None


torch.library.register_autograd(
    "siglip_lib::flash_attention", _gradient, setup_context=_keep, lib=_OPERATORS
)


# useful operations: two products forward, and five backward, one of which is done a second time to save memory
@register_flop_formula(torch.ops.siglip_lib.flash_attention)
def _(qkv_shape, scale, out_shape=None, **_):
    batch, tokens, _, heads, dim = qkv_shape
    return 2 * 2 * batch * heads * tokens * tokens * dim


@register_flop_formula(torch.ops.siglip_lib.flash_attention_backward)
def _(d_out_shape, *_, out_shape=None, **__):
    batch, tokens, heads, dim = d_out_shape
    return 5 * 2 * batch * heads * tokens * tokens * dim


def _check(qkv: Tensor) -> None:
    # the interpreter computes bfloat16 wrongly
    dtypes = (torch.bfloat16 if qkv.is_cuda else torch.float32, torch.float16)
    check_tensor("qkv", qkv, ("B", "N", 3, "heads", "head_dim"), dtypes=dtypes, empty=False)
    if not qkv.is_contiguous():
        raise ValueError(f"qkv has strides {qkv.stride()}; it must be contiguous: qkv.contiguous()")
    check_device("qkv", qkv, _forward_kernel, "attend(backend='sdpa'), which runs everywhere")
