"""Flash attention for Hopper in Gluon, Triton's lower level: who copies, who computes and who waits is written out.

Triton waits for each product of the tensor cores before it goes on. Here the work is shared among warps, which wait for
each other at barriers in shared memory:

- the producer, one warp, has the TMA unit copy queries, keys and values into a ring of buffers;
- each consumer, a warpgroup of 4 warps, owns 64 queries. While it computes exponentials the tensor cores work for the
  other consumers, and for itself on the half of the weights that it has finished.

A thread block is persistent: it takes tile after tile of 64 queries a consumer, so that the next tile's copies run
while this one is computed, its first scores together with the last values of this one, and the output of this one is
stored while the next is computed. The last block of keys, which may be a short one, comes first: only it needs a mask,
and its products are only as wide as the power of two, from 16 on, that holds it.

Two forms of softmax. The exact one keeps each row's largest score so far, as the kernel in flash_attention.py does. The
other takes the largest of the first block for the whole row: bfloat16 weights have the range of float32, so nothing is
scaled again. A row whose sum grows past 2**64 has lost its reference. Its lse is stored as NaN, and a second kernel
computes its block of queries again in the exact way.

A head of 72 channels is cut in 64 + 16, of which the TMA unit fills 8 with zeros; products with the values are 64 + 8
wide. Source: Shah et al., FlashAttention-3 (2024), section 3.1.
"""

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from siglip_lib.base.checks import check_tensor, finite
from siglip_lib.base.offers import HOPPER, why_not_our_kernel
from siglip_lib.base.operators import operators_of, register_operator
from siglip_lib.kernels import (
    flash_attention,
    hopper_backward,  # noqa: F401  it brings the operator of the backward pass
)
from siglip_lib.kernels.hopper_parts import (
    _MAIN,
    _PRODUCER_REGISTERS,
    _ROWS,
    Roles,
    _at,
    _barriers,
    _copy,
    _matrix,
    _multiprocessors,
    _next,
    _place,
    _product,
    _ring,
    _zeros,
    descriptors,
    launcher,
)

_AT_ONCE = 32  # blocks whose lse are looked at together
_LARGEST_SUM = gl.constexpr(2.0**64)  # with values up to 2**63 no product overflows


# Scores, weights and output of 64 queries take 32 + 16 + head_dim / 2 registers of a thread
ROLES = {
    64: Roles(4, 10, 112),
    72: Roles(4, 7, 112),
    80: Roles(3, 8, 160),
    96: Roles(3, 6, 160),
    128: Roles(3, 4, 160),
}
# Where tiles of two consumers find a multiprocessor each: a small batch then uses more of them
SMALL = {
    64: Roles(2, 12, 240),
    72: Roles(2, 9, 240),
    80: Roles(2, 9, 240),
    96: Roles(2, 7, 240),
    128: Roles(2, 5, 240),
}


# --- the roles ---


@gluon.jit
def _producer(descriptors, buffers, barriers, tokens, tiles, constants: gl.constexpr):
    """Have queries, keys and values copied, each as soon as its buffer is empty."""
    HEADS: gl.constexpr = constants[0]
    REST: gl.constexpr = constants[1]
    CONSUMERS: gl.constexpr = constants[2]
    STAGES: gl.constexpr = constants[3]
    q, k, v = buffers
    q_full, q_empty, full, empty = barriers
    CHANNELS: gl.constexpr = _MAIN + q[1].shape[4] if REST else _MAIN
    BYTES: gl.constexpr = _ROWS * CHANNELS * 2
    blocks = gl.cdiv(tokens, _ROWS)
    turn = 0
    # a barrier that has not yet changed its phase lets a wait for phase 1 pass: at first all buffers are empty
    stage, phase = 0, 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        sample, head, row = _place(tile, tokens, HEADS, CONSUMERS)
        for i in gl.static_range(CONSUMERS):
            here = (turn & 1) * CONSUMERS + i
            mbarrier.wait(q_empty.index(here), ((turn >> 1) & 1) ^ 1)
            mbarrier.expect(q_full.index(here), BYTES)
            _copy(
                descriptors, sample, row + i * _ROWS, head, q_full.index(here), _at(q, here), REST
            )
        for block in range(blocks):
            key = (blocks - 1 - block) * _ROWS  # the last block first
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), 2 * BYTES)
            _copy(descriptors, sample, key, HEADS + head, full.index(stage), _at(k, stage), REST)
            _copy(
                descriptors, sample, key, 2 * HEADS + head, full.index(stage), _at(v, stage), REST
            )
            stage, phase = _next(stage, phase, STAGES)
        turn += 1  # noqa: SIM113  there is no enumerate


@gluon.jit
def _consumer(
    INDEX: gl.constexpr, outs, buffers, barriers, mask, lse, scale, tokens, padded, tiles, constants: gl.constexpr
):  # fmt: skip
    """Compute the output of 64 queries of each tile."""
    HEADS: gl.constexpr = constants[0]
    REST: gl.constexpr = constants[1]
    CONSUMERS: gl.constexpr = constants[2]
    STAGES: gl.constexpr = constants[3]
    TAIL: gl.constexpr = constants[4]
    MANY: gl.constexpr = constants[5]
    EXACT: gl.constexpr = constants[6]
    q, k, v = buffers
    q_full, q_empty, full, empty = barriers
    blocks = gl.cdiv(tokens, _ROWS)
    turn = 0
    # the first scores of the first tile; those of the others are started at the end of the tile before
    mbarrier.wait(q_full.index(INDEX), 0)
    mbarrier.wait(full.index(0), 0)
    tail = _scores(_at(q, INDEX), _at(k, 0), TAIL, REST)
    tail = warpgroup_mma_wait(0, [tail])
    stage = 0  # of the block whose scores are there
    ahead, phase = _next(0, 0, STAGES)  # of the block after it
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        here = (turn & 1) * CONSUMERS + INDEX
        # where the queries of the tile before were, and those of the next will be
        other = CONSUMERS - here + 2 * INDEX
        m, total, p = _first_weights(tail, mask, scale, TAIL)
        o = _values(p, _at(v, stage), 0, _zeros(REST), REST)
        if MANY:
            mbarrier.wait(full.index(ahead), phase)
            s, o = _wait(_scores(_at(q, here), _at(k, ahead), _ROWS, REST), o, REST)
            mbarrier.arrive(empty.index(stage), count=1)
            # the output of the tile before has by now left the place of its queries
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(other), count=1, pred=turn > 0)
            for _ in range(2, blocks):
                stage = ahead
                ahead, phase = _next(stage, phase, STAGES)
                m, total, o = _softmax_and_values(s, m, total, o, _at(v, stage), scale, REST, EXACT)
                mbarrier.wait(full.index(ahead), phase)
                s, o = _wait(_scores(_at(q, here), _at(k, ahead), _ROWS, REST), o, REST)
                mbarrier.arrive(empty.index(stage), count=1)
            stage = ahead
            ahead, phase = _next(stage, phase, STAGES)
            m, total, o = _softmax_and_values(s, m, total, o, _at(v, stage), scale, REST, EXACT)
        else:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(other), count=1, pred=turn > 0)
        # the first scores of the next tile; if there is none, of what lies there, and nobody reads them
        more = tile + gl.num_programs(0) < tiles
        mbarrier.wait(full.index(ahead), phase, pred=more)
        mbarrier.wait(q_full.index(other), ((turn + 1) >> 1) & 1, pred=more)
        tail, o = _wait(_scores(_at(q, other), _at(k, ahead), TAIL, REST), o, REST)
        mbarrier.arrive(empty.index(stage), count=1)
        stage = ahead
        ahead, phase = _next(stage, phase, STAGES)
        sample, head, row = _place(tile, tokens, HEADS, CONSUMERS)
        row += INDEX * _ROWS
        _store_lse(lse + (sample * HEADS + head) * padded, row, m, total, tokens, padded, EXACT)
        _store_output(outs, sample, row, head, o, total, _at(q, here), REST)
        turn += 1  # noqa: SIM113  there is no enumerate
    tma.store_wait(0)


# --- the steps of a consumer ---


@gluon.jit
def _scores(q, k, KEYS: gl.constexpr, REST: gl.constexpr):
    """Start q @ k.T with the first KEYS of these keys."""
    LAYOUT: gl.constexpr = _product(KEYS)
    s = gl.zeros([_ROWS, KEYS], gl.float32, LAYOUT)
    if REST:
        keys = _matrix(k[1], KEYS).permute((1, 0))
        s = warpgroup_mma(_matrix(q[1], _ROWS), keys, s, use_acc=False, is_async=True)
    keys = _matrix(k[0], KEYS).permute((1, 0))
    return warpgroup_mma(_matrix(q[0], _ROWS), keys, s, use_acc=REST > 0, is_async=True)


@gluon.jit
def _values(p, v, START: gl.constexpr, o, REST: gl.constexpr):
    """Start to add p @ v to o, with the values from START on."""
    KEYS: gl.constexpr = p.shape[1]
    p = p.to(v[0].dtype)
    main, rest = o
    if REST:
        NARROW: gl.constexpr = gl.DotOperandLayout(0, _product(REST), 2)
        values = _matrix(v[1], _ROWS).slice(START, KEYS, 0).slice(0, REST, 1)
        p_rest = gl.convert_layout(p, NARROW, assert_trivial=True)
        rest = warpgroup_mma(p_rest, values, rest, is_async=True)
    WIDE: gl.constexpr = gl.DotOperandLayout(0, _product(_MAIN), 2)
    values = _matrix(v[0], _ROWS).slice(START, KEYS, 0)
    main = warpgroup_mma(
        gl.convert_layout(p, WIDE, assert_trivial=True), values, main, is_async=True
    )
    return main, rest


@gluon.jit
def _wait(s, o, REST: gl.constexpr):
    """Wait for all products."""
    main, rest = o
    if REST:
        s, main, rest = warpgroup_mma_wait(0, [s, main, rest])
    else:
        s, main = warpgroup_mma_wait(0, [s, main])
    return s, (main, rest)


@gluon.jit
def _first_weights(s, mask, scale, TAIL: gl.constexpr):
    """Return m, total and weights of a tile's first block."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, _product(TAIL))
    # from shared memory: computed here, it would be moved out of the loop over tiles, and hold a register a column
    s = s + mask.load(COLUMNS)[None, :]
    m = _row_max(s) * scale
    p = _weights(s, m, scale)
    return m, _eighths(p, False), p


@gluon.jit
def _softmax_and_values(s, m, total, o, v, scale, REST: gl.constexpr, EXACT: gl.constexpr):
    """Take a block's scores into m, total and o, for which the products are started."""
    if EXACT:
        most = gl.maximum(m, _row_max(s) * scale)
        shrink = gl.exp2(m - most)
        m = most
        total = _scaled(total, shrink)
        main, rest = _scaled(o[0], shrink), o[1]
        if REST:
            rest = _scaled(rest, shrink)
        o = main, rest
    # in halves: the products of the first run while the exponentials of the second are computed
    HALF: gl.constexpr = _ROWS // 2
    left, right = _halves(s)
    p = _weights(left, m, scale)
    total += _eighths(p, False)
    o = _values(p, v, 0, o, REST)
    p = _weights(right, m, scale)
    total += _eighths(p, False)
    o = _values(p, v, HALF, o, REST)
    return m, total, o


@gluon.jit
def _halves(s):
    """Left and right half of the columns; each thread has some of both, so nothing moves."""
    HALF: gl.constexpr = s.shape[1] // 2
    LAYOUT: gl.constexpr = _product(HALF)
    left, right = gl.split(gl.permute(gl.reshape(s, [_ROWS, 2, HALF]), (0, 2, 1)))
    left = gl.convert_layout(left, LAYOUT, assert_trivial=True)
    return left, gl.convert_layout(right, LAYOUT, assert_trivial=True)


@gluon.jit
def _eighths(x, MAX: gl.constexpr):
    """Sum or maximum of every eighth column, (64, 8): each thread takes what it holds, and none passes anything on."""
    COLUMNS: gl.constexpr = x.shape[1]
    # as the columns of a product lie: of 8, a thread has two, in two rows
    LAYOUT: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [8, 0]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 8]
    )
    x = gl.reshape(x, [_ROWS, COLUMNS // 8, 8])
    x = gl.max(x, 1) if MAX else gl.sum(x, 1)
    return gl.convert_layout(x, LAYOUT, assert_trivial=True)


@gluon.jit
def _row_max(s):
    return gl.max(_eighths(s, True), 1)


@gluon.jit
def _weights(s, m, scale):
    return gl.exp2(s * scale - gl.convert_layout(m, gl.SliceLayout(1, s.type.layout))[:, None])


@gluon.jit
def _scaled(x, rows):
    return x * gl.convert_layout(rows, gl.SliceLayout(1, x.type.layout))[:, None]


@gluon.jit
def _store_lse(lse, row, m, total, tokens, padded, EXACT: gl.constexpr):
    """Store log2 of the sum of exp2(scores), for the backward pass; past the end infinity, so that weights are 0."""
    rows = gl.sum(total, 1)
    queries = row + gl.arange(0, _ROWS, rows.type.layout)
    found = m + gl.log2(rows)
    if not EXACT:
        found = gl.where(rows < _LARGEST_SUM, found, float("nan"))
    found = gl.where(queries < tokens, found, float("inf"))
    gl.store(lse + queries, found, mask=queries < padded)


@gluon.jit
def _store_output(outs, sample, row, head, o, total, place, REST: gl.constexpr):
    """Start to store the output from where the queries were: no product reads them any more."""
    share = 1.0 / gl.sum(total, 1)
    _matrix(place[0], _ROWS).store(_scaled(o[0], share).to(place[0].dtype))
    if REST:
        _matrix(place[1], _ROWS).slice(0, REST, 1).store(_scaled(o[1], share).to(place[1].dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(outs[0], [sample, row, head, 0], place[0])
    if REST:
        tma.async_copy_shared_to_global(outs[1], [sample, row, head, _MAIN], place[1])


# --- the kernels ---


@gluon.jit(do_not_specialize=["tokens", "padded", "tiles"])
def _hopper_kernel(
    main,  # of qkv (B, N, 3 * heads, head_dim): 64 rows of a head, channels 0 to 63
    rest,  # and those from 64 on, filled up with zeros to 16 at least
    out_main,
    out_rest,
    lse,
    scale,  # of the scores, times log2(e)
    tokens,
    padded,  # length of a row of lse
    tiles,
    HEADS: gl.constexpr,
    REST: gl.constexpr,  # channels from 64 on
    TAIL: gl.constexpr,  # a power of two that holds the last block of keys
    MANY: gl.constexpr,  # whether there is more than one block of keys
    EXACT: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    descriptors = (main, rest)
    q = _ring(descriptors, 2 * CONSUMERS, REST)
    buffers = (q, _ring(descriptors, STAGES, REST), _ring(descriptors, STAGES, REST))
    q_full, q_empty = _barriers(2 * CONSUMERS, 1), _barriers(2 * CONSUMERS, 1)
    barriers = (q_full, q_empty, _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS))
    COLUMNS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    last = tokens - (gl.cdiv(tokens, _ROWS) - 1) * _ROWS
    inside = gl.arange(0, TAIL, COLUMNS) < last
    mask = gl.allocate_shared_memory(
        gl.float32, [TAIL], PLAIN, gl.where(inside, 0.0, float("-inf"))
    )
    fence_async_shared()  # so that the TMA unit, too, finds the barriers initialised

    constants: gl.constexpr = (HEADS, REST, CONSUMERS, STAGES, TAIL, MANY, EXACT)
    outs = (out_main, out_rest)
    R: gl.constexpr = REGISTERS
    P: gl.constexpr = PRODUCER_REGISTERS
    # the first of a list is run by the warps that are here already; the last number of each list is the producer's
    if CONSUMERS == 4:
        gl.warp_specialize([
            (_consumer, (0, outs, buffers, barriers, mask, lse, scale, tokens, padded, tiles, constants)),
            (_consumer, (1, outs, buffers, barriers, mask, lse, scale, tokens, padded, tiles, constants)),
            (_consumer, (2, outs, buffers, barriers, mask, lse, scale, tokens, padded, tiles, constants)),
            (_consumer, (3, outs, buffers, barriers, mask, lse, scale, tokens, padded, tiles, constants)),
            (_producer, (descriptors, buffers, barriers, tokens, tiles, constants)),
        ], [4, 4, 4, 1], [R, R, R, P])  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize([
            (_consumer, (0, outs, buffers, barriers, mask, lse, scale, tokens, padded, tiles, constants)),
            (_consumer, (1, outs, buffers, barriers, mask, lse, scale, tokens, padded, tiles, constants)),
            (_producer, (descriptors, buffers, barriers, tokens, tiles, constants)),
        ], [4, 1], [R, P])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (0, outs, buffers, barriers, mask, lse, scale, tokens, padded, tiles, constants)),
            (_consumer, (1, outs, buffers, barriers, mask, lse, scale, tokens, padded, tiles, constants)),
            (_consumer, (2, outs, buffers, barriers, mask, lse, scale, tokens, padded, tiles, constants)),
            (_producer, (descriptors, buffers, barriers, tokens, tiles, constants)),
        ], [4, 4, 1], [R, R, P])  # fmt: skip


@triton.jit
def _redo_kernel(
    qkv, out, lse, scale, tokens, padded, blocks,
    HEADS: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    OWN: tl.constexpr, READ: tl.constexpr, MASKED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Compute those blocks of queries again, in the exact way, of which one has NaN as its lse.

    A thread block looks after every so many blocks, at AT_ONCE of them in one load: mostly there is nothing to do, and
    that should take no time. A row of lse is as long as its blocks.
    """
    step = tl.num_programs(0)
    rows = tl.arange(0, OWN)
    for start in range(tl.program_id(0), blocks, step * AT_ONCE):
        numbers = start + step * tl.arange(0, AT_ONCE)
        real = (numbers < blocks)[:, None]
        found = tl.load(lse + numbers[:, None] * OWN + rows[None, :], mask=real, other=0.0)
        if _any_nan(found):
            for number in range(start, min(blocks, start + step * AT_ONCE), step):
                if _any_nan(tl.load(lse + number * OWN + rows)):
                    flash_attention._forward_block(
                        number, qkv, out, lse, scale, tokens, padded,
                        HEADS, DIM, MAIN, REST, OWN, READ, MASKED,
                    )  # fmt: skip


@triton.jit
def _any_nan(x):
    return tl.max(tl.reshape((x != x).to(tl.int32), [x.numel]), 0) != 0


# --- launches, and the operator that autograd and compiled code see ---


@functools.lru_cache(maxsize=64)
def constants_of(
    dim: int, heads: int, tokens: int, exact: bool, small: bool = False
) -> dict[str, int | bool]:
    """Return what the kernel is compiled with, beside its arguments; small: for a small batch."""
    roles = (SMALL if small else ROLES)[dim]
    last = (tokens - 1) % _ROWS.value + 1
    return dict(
        HEADS=heads,
        REST=dim - 64,
        TAIL=max(16, triton.next_power_of_2(last)),
        MANY=tokens > _ROWS.value,
        EXACT=exact,
        CONSUMERS=roles.consumers,
        STAGES=roles.stages,
        REGISTERS=roles.registers,
        PRODUCER_REGISTERS=_PRODUCER_REGISTERS,
        maxnreg=roles.registers_at_start,
        num_warps=4,
    )


def redo_constants(dim: int, heads: int, tokens: int) -> dict[str, int | bool]:
    """Return what the second kernel is compiled with, beside its arguments."""
    constants = flash_attention.constants_of("forward", dim, heads, tokens, HOPPER)
    return constants | dict(AT_ONCE=_AT_ONCE)


def _forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    _check_gpu(qkv)
    # float16 has not the range for the other form
    return _launch(qkv, scale, exact=qkv.dtype == torch.float16)


def _check_gpu(qkv: Tensor) -> None:
    if not qkv.is_cuda or flash_attention._capability(qkv.get_device()) != HOPPER:
        raise ValueError(
            f"qkv is on {qkv.device}; the kernel needs a GPU of compute capability 9.0 (Hopper)"
        )


def _launch(qkv: Tensor, scale: float, exact: bool) -> tuple[Tensor, Tensor]:
    out, lse = _forward_fake(qkv, scale)
    scale *= math.log2(math.e)
    with torch.cuda.device_of(qkv):  # Triton launches on the current GPU, not on the tensor's
        forward, redo = _launchers(qkv.shape, qkv.dtype, qkv.get_device(), exact)
        forward(*descriptors(qkv), *descriptors(out), lse, scale)
        if redo:
            redo(qkv, out, lse, scale)
    return out, lse


@functools.lru_cache(maxsize=64)
def _launchers(
    shape: torch.Size, dtype: torch.dtype, device: int, exact: bool
) -> tuple[Callable[..., None], Callable[..., None] | None]:
    """Return what launches both kernels, the second if it is needed, for qkv of this shape on the current GPU."""
    batch, tokens, _, heads, dim = shape
    multiprocessors, sizes = _multiprocessors(device), (tokens, flash_attention._padded(tokens))
    small = triton.cdiv(tokens, 2 * _ROWS.value) * batch * heads <= multiprocessors
    constants = constants_of(dim, heads, tokens, exact, small)
    tiles = triton.cdiv(tokens, _ROWS.value * constants["CONSUMERS"]) * batch * heads
    qkv = torch.empty(shape, dtype=dtype, device="meta")
    given = *descriptors(qkv), *descriptors(qkv[:, :, 0]), torch.float32, 1.0
    programs = min(tiles, multiprocessors)
    forward = launcher(_hopper_kernel, programs, given, (*sizes, tiles), constants)
    if exact:
        return forward, None
    constants = redo_constants(dim, heads, tokens)
    blocks = triton.cdiv(tokens, constants["OWN"]) * batch * heads
    given, programs = (dtype, dtype, torch.float32, 1.0), min(blocks, 2 * multiprocessors)
    return forward, launcher(_redo_kernel, programs, given, (*sizes, blocks), constants)


def _gradient(ctx, d_out, d_lse):
    if d_out is None:
        return None, None
    backward = torch.ops.siglip_lib.hopper_attention_backward
    return backward(d_out, *ctx.saved_tensors, ctx.scale), None


_forward_fake = flash_attention._forward_fake
_OPERATORS = operators_of(__name__)
register_operator(_OPERATORS, "hopper_attention", _forward, _forward_fake, devices=("CUDA",))
torch.library.register_autograd(
    "siglip_lib::hopper_attention",
    _gradient,
    setup_context=flash_attention._keep,
    lib=_OPERATORS,
)


@register_flop_formula(torch.ops.siglip_lib.hopper_attention)
def _(qkv_shape, scale, out_shape=None, **_):
    batch, tokens, _, heads, dim = qkv_shape
    return 2 * 2 * batch * heads * tokens * tokens * dim


def hopper_attention(qkv: Tensor, scale: float | None = None) -> Tensor:
    """Return ``softmax(q @ k.T * scale) @ v`` for each sample and head, without a mask, on a GPU of Hopper.

    float16 takes the exact softmax; its weights would overflow in the other. The backward pass is in
    hopper_backward.py.

    Args:
        qkv: q, k and v (B, N, 3, heads, head_dim), contiguous, as a linear layer gives them; bfloat16 or float16.
            head_dim is one of 64, 72, 80, 96, 128, N is 1 to 16,384.
        scale: factor of the scores, above 0; ``head_dim ** -0.5`` if None.

    Returns:
        (B, N, heads, head_dim), contiguous, dtype of qkv; the same bits on every run.

    Raises:
        TypeError: a dtype that is not offered.
        ValueError: a shape, strides, a device or a scale that is not offered.
    """
    check_tensor(
        "qkv",
        qkv,
        ("B", "N", 3, "heads", "head_dim"),
        dtypes=(torch.bfloat16, torch.float16),
        empty=False,
    )
    if not qkv.is_contiguous():
        raise ValueError(f"qkv has strides {qkv.stride()}; it must be contiguous: qkv.contiguous()")
    if not torch.compiler.is_compiling():  # which can't see a cache; there the launch asks
        _check_gpu(qkv)
    scale = finite("scale", qkv.shape[-1] ** -0.5 if scale is None else scale)
    _, tokens, _, _, dim = qkv.shape
    if reason := why_not_our_kernel(dim, tokens, scale):
        raise ValueError(f"head_dim={dim}, N={tokens}, scale={scale}: the kernel {reason}")
    return torch.ops.siglip_lib.hopper_attention(qkv, scale)[0]


def hopper_attention_of_parts(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """As ``hopper_attention``, of the parts (B, N, heads, head_dim) of a packed tensor; the caller has checked."""
    operators = torch.ops.siglip_lib
    both = operators.hopper_attention, operators.hopper_attention_backward
    return flash_attention._OfParts.apply(q, k, v, scale, *both)
