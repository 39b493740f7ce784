"""The backward pass of attention for Hopper in Gluon: two kernels of the kind that hopper_attention.py explains.

Both do the same thing from two sides. A consumer, a warpgroup, owns 64 rows of two tensors, and reads blocks of rows of
two others, which the producer has copied into a ring (all symbols as in flash_attention.py):

    pass       owns        reads       scores            gradient of scores    adds up
    keys       k, v        q, d_out    s.T = k @ q.T     dp.T = v @ d_out.T    dk += ds.T @ q, dv += p.T @ d_out
    queries    q, d_out    k, v        s = q @ k.T       dp = d_out @ v.T      dq += ds @ k

So one kernel is written, and compiled twice. What a consumer adds up stays in its registers: nobody else adds to it,
and every run gives the same bits. p and ds are left operands of products and never leave the registers either. The
price is that s and dp are computed twice: seven products where one pass with atomic additions has five.

A consumer starts the products with p and ds of one block and those that give s and dp of the next, and waits for all of
them at once. While it then computes exponentials, the tensor cores work for the other consumers.

delta, the sum of out * d_out of each query, is made by a small kernel of its own, which does little but read both.
Past the end of the tokens the lse is infinite and delta 0, so that those queries' p and ds are 0; keys past the end
are masked in the pass that owns queries. In the other pass they are rows of their own, which are not stored.

Source: Shah et al., FlashAttention-3 (2024), section 3.1; Dao, FlashAttention-2 (2023), section 3.1.2.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from siglip_lib.base.operators import operators_of, register_operator
from siglip_lib.kernels import flash_attention
from siglip_lib.kernels.hopper_parts import (
    _MAIN,
    _PRODUCER_REGISTERS,
    _ROWS,
    Roles,
    _at,
    _at_address,
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

_DELTAS = 128  # rows of a thread block of the kernel for delta


@dataclass(frozen=True)
class BackwardRoles(Roles):
    """How a thread block of one of the passes is made up.

    Args:
        read: rows of a block of the ring.
        held: how many of the two blocks that a consumer owns lie in its registers as left operands. The tensor cores
            read the others from shared memory, as many bytes as of the ring's block of 64 rows; both together are all
            that it can give (128 bytes a cycle).
        turns: whether consumers use the tensor cores one after the other. Without, two that have once come to compute
            exponentials at the same time may go on so, and the tensor cores wait.
    """

    read: int = 64
    held: int = 0
    turns: bool = False


# Sums of 64 rows take head_dim / 2 registers of a thread each, s and dp 32 each, rows that are held 20 at 72 channels
ROLES = {
    "keys": {
        64: BackwardRoles(2, 9, 240, held=2),
        72: BackwardRoles(2, 7, 240, held=2, turns=True),
        80: BackwardRoles(2, 7, 240, held=1),
        96: BackwardRoles(2, 5, 240),
        128: BackwardRoles(2, 6, 240, read=32),
    },
    "queries": {
        64: BackwardRoles(3, 8, 160, held=1),
        72: BackwardRoles(3, 5, 160),
        80: BackwardRoles(3, 5, 160),
        96: BackwardRoles(2, 5, 240),
        128: BackwardRoles(2, 3, 240),
    },
}


# --- the roles ---


@gluon.jit
def _producer(own, read, lines, buffers, barriers, tokens, tiles, constants: gl.constexpr):
    """Have all rows copied, each block as soon as its buffer is empty."""
    KEYS: gl.constexpr = constants[0]
    HEADS: gl.constexpr = constants[1]
    REST: gl.constexpr = constants[2]
    CONSUMERS: gl.constexpr = constants[3]
    STAGES: gl.constexpr = constants[4]
    READ: gl.constexpr = constants[7]
    firsts, seconds, ring_firsts, ring_seconds, lse_ring, delta_ring = buffers
    own_full, own_empty, full, empty, _ = barriers
    CHANNELS: gl.constexpr = _MAIN + firsts[1].shape[4] if REST else _MAIN
    LINES: gl.constexpr = 2 * READ * 4 if KEYS else 0
    # where q, k and v begin in the packed tensor; d_out is a tensor of its own
    OWN_FIRST: gl.constexpr = HEADS if KEYS else 0
    OWN_SECOND: gl.constexpr = 2 * HEADS if KEYS else 0
    READ_FIRST: gl.constexpr = 0 if KEYS else HEADS
    READ_SECOND: gl.constexpr = 0 if KEYS else 2 * HEADS
    blocks = gl.cdiv(tokens, READ)
    turn = 0
    stage, phase = 0, 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        sample, head, row = _place(tile, tokens, HEADS, CONSUMERS)
        for i in gl.static_range(CONSUMERS):
            here = (turn & 1) * CONSUMERS + i
            mbarrier.wait(own_empty.index(here), ((turn >> 1) & 1) ^ 1)
            bar = own_full.index(here)
            mbarrier.expect(bar, 2 * _ROWS * CHANNELS * 2)
            first = row + i * _ROWS
            _copy(own[0], sample, first, OWN_FIRST + head, bar, _at(firsts, here), REST)
            _copy(own[1], sample, first, OWN_SECOND + head, bar, _at(seconds, here), REST)
        for block in range(blocks):
            first = (blocks - 1 - block) * READ  # the last block first
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, 2 * READ * CHANNELS * 2 + LINES)
            _copy(read[0], sample, first, READ_FIRST + head, bar, _at(ring_firsts, stage), REST)
            _copy(read[1], sample, first, READ_SECOND + head, bar, _at(ring_seconds, stage), REST)
            if KEYS:
                at = [sample * HEADS + head, first]
                tma.async_copy_global_to_shared(lines[0], at, bar, lse_ring.index(stage))
                tma.async_copy_global_to_shared(lines[1], at, bar, delta_ring.index(stage))
            stage, phase = _next(stage, phase, STAGES)
        turn += 1  # noqa: SIM113  there is no enumerate


@gluon.jit
def _consumer(
    INDEX: gl.constexpr, outs, lines, buffers, barriers, mask, factors, tokens, padded, tiles, constants: gl.constexpr
):  # fmt: skip
    """Compute the gradients of 64 rows of each tile."""
    KEYS: gl.constexpr = constants[0]
    HEADS: gl.constexpr = constants[1]
    REST: gl.constexpr = constants[2]
    CONSUMERS: gl.constexpr = constants[3]
    STAGES: gl.constexpr = constants[4]
    TAIL: gl.constexpr = constants[5]
    MANY: gl.constexpr = constants[6]
    READ: gl.constexpr = constants[7]
    HELD: gl.constexpr = constants[8]
    TURNS: gl.constexpr = constants[9]
    own_full, own_empty, full, empty, starts = barriers
    scale, plain_scale = factors
    blocks = gl.cdiv(tokens, READ)
    turn = 0
    # s and dp of the first block of the first tile; those of the others are started at the end of the tile before
    mbarrier.wait(own_full.index(INDEX), 0)
    mbarrier.wait(full.index(0), 0)
    own = _owned(buffers, INDEX, HELD, REST)
    tail = _score(own, buffers, 0, 0, TAIL, HELD, REST)
    tail_dp = _score(own, buffers, 1, 0, TAIL, HELD, REST)
    tail, tail_dp = warpgroup_mma_wait(0, [tail, tail_dp])
    values = _values(lines, gl.program_id(0), INDEX, tokens, padded, True, constants)
    stage = 0  # of the block whose s and dp are there
    ahead, phase = _next(0, 0, STAGES)  # of the block after it
    start = 1 if INDEX == 0 else 0  # the phase whose end lets this consumer start its products
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        here = (turn & 1) * CONSUMERS + INDEX
        # where the rows of the tile before were, and those of the next will be
        other = CONSUMERS - here + 2 * INDEX
        own = _owned(buffers, here, HELD, REST)
        if not KEYS:
            COLUMNS: gl.constexpr = gl.SliceLayout(0, _product(TAIL))
            tail += mask.load(COLUMNS)[None, :]
        sums = _zeros(REST), _zeros(REST)
        sums = _products(
            tail, tail_dp, sums, values, buffers, stage, scale, starts, INDEX, start, constants
        )
        if MANY:
            mbarrier.wait(full.index(ahead), phase)
            s = _score(own, buffers, 0, ahead, READ, HELD, REST)
            start = _let_start(starts, INDEX, start, TURNS)
            dp = _score(own, buffers, 1, ahead, READ, HELD, REST)
            s, dp, sums = _wait(s, dp, sums, KEYS, REST)
            mbarrier.arrive(empty.index(stage), count=1)
            # the gradients of the tile before have by now left the place of its rows
            tma.store_wait(0)
            mbarrier.arrive(own_empty.index(other), count=1, pred=turn > 0)
            for _ in range(2, blocks):
                stage = ahead
                ahead, phase = _next(stage, phase, STAGES)
                sums = _products(
                    s, dp, sums, values, buffers, stage, scale, starts, INDEX, start, constants
                )
                mbarrier.wait(full.index(ahead), phase)
                s = _score(own, buffers, 0, ahead, READ, HELD, REST)
                start = _let_start(starts, INDEX, start, TURNS)
                dp = _score(own, buffers, 1, ahead, READ, HELD, REST)
                s, dp, sums = _wait(s, dp, sums, KEYS, REST)
                mbarrier.arrive(empty.index(stage), count=1)
            stage = ahead
            ahead, phase = _next(stage, phase, STAGES)
            sums = _products(
                s, dp, sums, values, buffers, stage, scale, starts, INDEX, start, constants
            )
        else:
            tma.store_wait(0)
            mbarrier.arrive(own_empty.index(other), count=1, pred=turn > 0)
        # those of the next tile's first block; if there is none, of what lies there, and nobody reads them
        after = tile + gl.num_programs(0)
        more = after < tiles
        mbarrier.wait(full.index(ahead), phase, pred=more)
        mbarrier.wait(own_full.index(other), ((turn + 1) >> 1) & 1, pred=more)
        own = _owned(buffers, other, HELD, REST)
        values = _values(lines, after, INDEX, tokens, padded, more, constants)
        tail = _score(own, buffers, 0, ahead, TAIL, HELD, REST)
        start = _let_start(starts, INDEX, start, TURNS)
        tail_dp = _score(own, buffers, 1, ahead, TAIL, HELD, REST)
        tail, tail_dp, sums = _wait(tail, tail_dp, sums, KEYS, REST)
        mbarrier.arrive(empty.index(stage), count=1)
        stage = ahead
        ahead, phase = _next(stage, phase, STAGES)
        sample, head, row = _place(tile, tokens, HEADS, CONSUMERS)
        row += INDEX * _ROWS
        _store(outs, sample, row, head, sums, plain_scale, buffers, here, KEYS, HEADS, REST)
        turn += 1  # noqa: SIM113  there is no enumerate
    tma.store_wait(0)


# --- the steps of a consumer ---


@gluon.jit
def _owned(buffers, i, HELD: gl.constexpr, REST: gl.constexpr):
    """Both owned blocks as left operands, in both parts of a head: in registers, or where they lie."""
    return _left(_at(buffers[0], i), HELD > 0, REST), _left(_at(buffers[1], i), HELD > 1, REST)


@gluon.jit
def _left(block, HELD: gl.constexpr, REST: gl.constexpr):
    LEFT: gl.constexpr = gl.DotOperandLayout(0, _product(_ROWS), 2)
    if HELD:
        main = _matrix(block[0], _ROWS).load(LEFT)
        rest = main
        if REST:
            rest = _matrix(block[1], _ROWS).load(LEFT)
    else:
        main = _matrix(block[0], _ROWS)
        rest = main
        if REST:
            rest = _matrix(block[1], _ROWS)
    return main, rest


@gluon.jit
def _score(
    own, buffers, WHICH: gl.constexpr, stage, READ: gl.constexpr, HELD: gl.constexpr, REST: gl.constexpr
):  # fmt: skip
    """Start s (0) or dp (1) of the first READ rows of a block of the ring."""
    main, rest = own[WHICH]
    block = _at(buffers[2 + WHICH], stage)
    LAYOUT: gl.constexpr = _product(READ)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    s = gl.zeros([_ROWS, READ], gl.float32, LAYOUT)
    if HELD > WHICH:
        main = gl.convert_layout(main, LEFT, assert_trivial=True)
    if REST:
        if HELD > WHICH:
            rest = gl.convert_layout(rest, LEFT, assert_trivial=True)
        rows = _matrix(block[1], READ).permute((1, 0))
        s = warpgroup_mma(rest, rows, s, use_acc=False, is_async=True)
    rows = _matrix(block[0], READ).permute((1, 0))
    return warpgroup_mma(main, rows, s, use_acc=REST > 0, is_async=True)


@gluon.jit
def _weights(s, dp, values, buffers, stage, scale, KEYS: gl.constexpr):
    """Return p and ds as the products take them."""
    if KEYS:
        lse = _columns(buffers[4].index(stage), s)
        delta = _columns(buffers[5].index(stage), s)
    else:
        lse = gl.convert_layout(values[0], gl.SliceLayout(1, s.type.layout))[:, None]
        delta = gl.convert_layout(values[1], gl.SliceLayout(1, s.type.layout))[:, None]
    p = gl.exp2(s * scale - lse)
    ds = p * (dp - delta)
    dtype: gl.constexpr = buffers[2][0].dtype
    return p.to(dtype), ds.to(dtype)


@gluon.jit
def _columns(buffer, s):
    """What the TMA unit copied, a value for each column of s."""
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    return buffer._reinterpret(gl.float32, [s.shape[1]], PLAIN).load(COLUMNS)[None, :]


@gluon.jit
def _values(
    lines, tile, INDEX: gl.constexpr, tokens, padded, exists, constants: gl.constexpr
):  # fmt: skip
    """The lse and delta of the queries of a tile that a consumer owns; of keys none."""
    HEADS: gl.constexpr = constants[1]
    lse, delta = 0, 0
    if not constants[0]:
        sample, head, row = _place(tile, tokens, HEADS, constants[3])
        LAYOUT: gl.constexpr = gl.SliceLayout(1, _product(_ROWS))
        queries = row + INDEX * _ROWS + gl.arange(0, _ROWS, LAYOUT)
        inside = (queries < padded) & exists
        at = (sample * HEADS + head) * padded + queries
        lse = gl.load(lines[0] + at, mask=inside, other=float("inf"))
        delta = gl.load(lines[1] + at, mask=inside, other=0.0)
    return lse, delta


@gluon.jit
def _let_start(starts, INDEX: gl.constexpr, start, TURNS: gl.constexpr):
    """Let the next consumer start while the last product of this one runs; return the phase to wait for next."""
    if TURNS:
        mbarrier.arrive(starts.index((INDEX + 1) % starts.shape[0]), count=1)
    return start ^ 1


@gluon.jit
def _products(
    s, dp, sums, values, buffers, stage, scale, starts, INDEX: gl.constexpr, start, constants: gl.constexpr
):  # fmt: skip
    """Take a block's s and dp into the sums, for which the products are started when it is this consumer's turn."""
    KEYS: gl.constexpr = constants[0]
    REST: gl.constexpr = constants[2]
    p, ds = _weights(s, dp, values, buffers, stage, scale, KEYS)
    if constants[9]:
        mbarrier.wait(starts.index(INDEX), start)
    second = sums[1]
    if KEYS:
        second = _add(p, _at(buffers[3], stage), second, REST)
    return _add(ds, _at(buffers[2], stage), sums[0], REST), second


@gluon.jit
def _add(weights, block, sums, REST: gl.constexpr):
    ROWS: gl.constexpr = weights.shape[1]
    main, rest = sums
    if REST:
        NARROW: gl.constexpr = gl.DotOperandLayout(0, _product(REST), 2)
        left = gl.convert_layout(weights, NARROW, assert_trivial=True)
        rows = _matrix(block[1], ROWS).slice(0, REST, 1)
        rest = warpgroup_mma(left, rows, rest, is_async=True)
    WIDE: gl.constexpr = gl.DotOperandLayout(0, _product(_MAIN), 2)
    left = gl.convert_layout(weights, WIDE, assert_trivial=True)
    return warpgroup_mma(left, _matrix(block[0], ROWS), main, is_async=True), rest


@gluon.jit
def _wait(s, dp, sums, KEYS: gl.constexpr, REST: gl.constexpr):
    """Wait for all products."""
    a, a_rest = sums[0]
    b, b_rest = sums[1]
    if KEYS:
        if REST:
            s, dp, a, a_rest, b, b_rest = warpgroup_mma_wait(0, [s, dp, a, a_rest, b, b_rest])
        else:
            s, dp, a, b = warpgroup_mma_wait(0, [s, dp, a, b])
    elif REST:
        s, dp, a, a_rest = warpgroup_mma_wait(0, [s, dp, a, a_rest])
    else:
        s, dp, a = warpgroup_mma_wait(0, [s, dp, a])
    return s, dp, ((a, a_rest), (b, b_rest))


@gluon.jit
def _store(
    outs, sample, row, head, sums, plain_scale, buffers, here, KEYS: gl.constexpr, HEADS: gl.constexpr,
    REST: gl.constexpr,
):  # fmt: skip
    """Start to store the gradients from where the rows were: no product reads them any more."""
    first, second = _at(buffers[0], here), _at(buffers[1], here)
    FIRST: gl.constexpr = HEADS if KEYS else 0
    _put(sums[0], plain_scale, first, REST)
    if KEYS:
        _put(sums[1], 1.0, second, REST)
    fence_async_shared()
    _send(outs, sample, row, FIRST + head, first, REST)
    if KEYS:
        _send(outs, sample, row, 2 * HEADS + head, second, REST)


@gluon.jit
def _put(sums, factor, place, REST: gl.constexpr):
    _matrix(place[0], _ROWS).store((sums[0] * factor).to(place[0].dtype))
    if REST:
        _matrix(place[1], _ROWS).slice(0, REST, 1).store((sums[1] * factor).to(place[1].dtype))


@gluon.jit
def _send(outs, sample, row, head, place, REST: gl.constexpr):
    tma.async_copy_shared_to_global(outs[0], [sample, row, head, 0], place[0])
    if REST:
        tma.async_copy_shared_to_global(outs[1], [sample, row, head, _MAIN], place[1])


# --- the kernels ---


@gluon.jit(do_not_specialize=["tokens", "padded", "tiles"])
def _backward_kernel(
    own_main,  # of qkv (B, N, 3 * heads, head_dim): 64 rows of a head, channels 0 to 63
    own_rest,  # and those from 64 on, filled up with zeros to 16 at least
    read_main,  # the same, READ rows
    read_rest,
    pull_main,  # of d_out (B, N, heads, head_dim): READ rows in the pass of the keys, 64 in the other
    pull_rest,
    out_main,  # of the gradient of qkv: 64 rows
    out_rest,
    lse,  # (B, heads, padded): READ values in the pass of the keys, a pointer in the other; delta likewise
    delta,
    scale,  # of the scores, times log2(e)
    plain_scale,
    tokens,
    padded,
    tiles,
    KEYS: gl.constexpr,  # whether dk and dv are computed, or dq
    HEADS: gl.constexpr,
    REST: gl.constexpr,  # channels from 64 on
    TAIL: gl.constexpr,  # a power of two that holds the last block of rows that are read
    MANY: gl.constexpr,  # whether there is more than one
    READ: gl.constexpr,
    HELD: gl.constexpr,
    TURNS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    packed, reads, pulls = (own_main, own_rest), (read_main, read_rest), (pull_main, pull_rest)
    firsts = _ring(packed, 2 * CONSUMERS, REST)
    seconds = _ring(packed, 2 * CONSUMERS, REST)
    ring_firsts = _ring(reads, STAGES, REST)
    ring_seconds = _ring(reads, STAGES, REST)
    own_full, own_empty = _barriers(2 * CONSUMERS, 1), _barriers(2 * CONSUMERS, 1)
    full, empty = _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS)
    barriers = (own_full, own_empty, full, empty, _barriers(CONSUMERS, 1))
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lines = (lse, delta)
    if KEYS:
        own, read = (packed, packed), (reads, pulls)
        LINE: gl.constexpr = lse.layout
        lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, READ], LINE)
        delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, READ], LINE)
        mask = 0
    else:
        own, read = (packed, pulls), (reads, reads)
        lse_ring, delta_ring = 0, 0
        COLUMNS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        last = tokens - (gl.cdiv(tokens, READ) - 1) * READ
        inside = gl.arange(0, TAIL, COLUMNS) < last
        mask = gl.allocate_shared_memory(
            gl.float32, [TAIL], PLAIN, gl.where(inside, 0.0, float("-inf"))
        )
    buffers = (firsts, seconds, ring_firsts, ring_seconds, lse_ring, delta_ring)
    fence_async_shared()  # so that the TMA unit, too, finds the barriers initialised

    constants: gl.constexpr = (KEYS, HEADS, REST, CONSUMERS, STAGES, TAIL, MANY, READ, HELD, TURNS)
    outs, factors = (out_main, out_rest), (scale, plain_scale)
    R: gl.constexpr = REGISTERS
    P: gl.constexpr = PRODUCER_REGISTERS
    if CONSUMERS == 3:
        gl.warp_specialize([
            (_consumer, (0, outs, lines, buffers, barriers, mask, factors, tokens, padded, tiles, constants)),
            (_consumer, (1, outs, lines, buffers, barriers, mask, factors, tokens, padded, tiles, constants)),
            (_consumer, (2, outs, lines, buffers, barriers, mask, factors, tokens, padded, tiles, constants)),
            (_producer, (own, read, lines, buffers, barriers, tokens, tiles, constants)),
        ], [4, 4, 1], [R, R, P])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consumer, (0, outs, lines, buffers, barriers, mask, factors, tokens, padded, tiles, constants)),
            (_consumer, (1, outs, lines, buffers, barriers, mask, factors, tokens, padded, tiles, constants)),
            (_producer, (own, read, lines, buffers, barriers, tokens, tiles, constants)),
        ], [4, 1], [R, P])  # fmt: skip


@triton.jit
def _delta_kernel(
    out, d_out, delta, tokens, padded,
    HEADS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Store the sum of out * d_out of each query, and 0 past the end."""
    blocks = padded * HEADS // ROWS
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    # as they lie in memory, a query's heads one after the other
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    query, head = rows // HEADS, rows % HEADS
    channels = tl.arange(0, CHANNELS)
    at = sample * tokens * HEADS * DIM + rows[:, None] * DIM + channels[None, :]
    real = (query < tokens)[:, None] & (channels < DIM)[None, :]
    x = tl.load(out + at, mask=real, other=0.0).to(tl.float32)
    y = tl.load(d_out + at, mask=real, other=0.0).to(tl.float32)
    tl.store(delta + (sample * HEADS + head) * padded + query, tl.sum(x * y, 1))


# --- launches, and the operator that autograd and compiled code see ---


@functools.lru_cache(maxsize=64)
def constants_of(name: str, dim: int, heads: int, tokens: int) -> dict[str, int | bool]:
    """Return what a pass is compiled with, beside its arguments; name is keys or queries."""
    roles = ROLES[name][dim]
    last = (tokens - 1) % roles.read + 1
    return dict(
        KEYS=name == "keys",
        HEADS=heads,
        REST=dim - 64,
        TAIL=max(16, triton.next_power_of_2(last)),
        MANY=tokens > roles.read,
        READ=roles.read,
        HELD=roles.held,
        # with one block a tile the first in turn would wait for a copy into the place of one that waits for its turn
        TURNS=roles.turns and tokens > roles.read,
        CONSUMERS=roles.consumers,
        STAGES=roles.stages,
        REGISTERS=roles.registers,
        PRODUCER_REGISTERS=_PRODUCER_REGISTERS,
        maxnreg=roles.registers_at_start,
        num_warps=4,
    )


def delta_constants(dim: int, heads: int) -> dict[str, int]:
    """Return what the kernel for delta is compiled with."""
    return dict(HEADS=heads, DIM=dim, CHANNELS=triton.next_power_of_2(dim), ROWS=_DELTAS)


def _line(x: Tensor, columns: int) -> TensorDescriptor:
    """What the TMA unit needs to copy so many values of a row of lse or delta (B, heads, padded)."""
    return _at_address(_described_line(x.shape, columns), x)


@functools.lru_cache(maxsize=32)
def _described_line(shape: torch.Size, columns: int) -> TensorDescriptor:
    rows, padded = shape[0] * shape[1], shape[2]
    x = torch.empty(rows, padded, dtype=torch.float32, device="meta")
    layout = gl.NVMMASharedLayout(0, 32, 2)
    return TensorDescriptor(x, [rows, padded], [padded, 1], [1, columns], layout)


def arguments_of(
    name: str, qkv: Tensor, d_out: Tensor, d_qkv: Tensor, lse: Tensor, delta: Tensor
) -> list:
    """Return the tensors as a pass takes them."""
    read, keys = ROLES[name][qkv.shape[-1]].read, name == "keys"
    given = [qkv, _ROWS.value], [qkv, read], [d_out, read if keys else _ROWS.value], [d_qkv]
    lines = [_line(x, read) if keys else x for x in (lse, delta)]
    return [*(one for pair in given for one in descriptors(*pair)), *lines]


def _backward(d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    d_out = d_out.contiguous()  # sum().backward() and others give one element, expanded
    # a part of another tensor may begin where the TMA unit can't
    d_out, out, lse = (x.clone() if x.data_ptr() % 16 else x for x in (d_out, out, lse))
    delta, d_qkv = torch.empty_like(lse), torch.empty_like(qkv)
    with torch.cuda.device_of(qkv):  # Triton launches on the current GPU, not on the tensor's
        sums, passes = _launchers(qkv.shape, qkv.dtype, qkv.get_device())
        sums(out, d_out, delta)
        for name, launch in passes.items():
            given = arguments_of(name, qkv, d_out, d_qkv, lse, delta)
            launch(*given, scale * math.log2(math.e), scale)
    return d_qkv


@functools.lru_cache(maxsize=64)
def _launchers(
    shape: torch.Size, dtype: torch.dtype, device: int
) -> tuple[Callable[..., None], dict[str, Callable[..., None]]]:
    """Return what launches the kernel for delta, and the passes, for qkv of this shape on the current GPU."""
    batch, tokens, _, heads, dim = shape
    padded, passes = flash_attention._padded(tokens), {}
    programs = batch * padded * heads // _DELTAS
    given, constants = (dtype, dtype, torch.float32), delta_constants(dim, heads)
    sums = launcher(_delta_kernel, programs, given, (tokens, padded), constants)
    qkv = torch.empty(shape, dtype=dtype, device="meta")
    lse = torch.empty(batch, heads, padded, dtype=torch.float32, device="meta")
    for name in ROLES:
        constants = constants_of(name, dim, heads, tokens)
        tiles = triton.cdiv(tokens, _ROWS.value * constants["CONSUMERS"]) * batch * heads
        given = arguments_of(name, qkv, qkv[:, :, 0], qkv, lse, lse)
        given = [x.dtype if isinstance(x, Tensor) else x for x in given]
        programs = min(tiles, _multiprocessors(device))
        given, sizes = (*given, 1.0, 1.0), (tokens, padded, tiles)
        passes[name] = launcher(_backward_kernel, programs, given, sizes, constants)
    return sums, passes


_OPERATORS = operators_of(__name__)
register_operator(
    _OPERATORS,
    "hopper_attention_backward",
    _backward,
    flash_attention._backward_fake,
    devices=("CUDA",),
)


@register_flop_formula(torch.ops.siglip_lib.hopper_attention_backward)
def _(d_out_shape, *_, out_shape=None, **__):
    batch, tokens, heads, dim = d_out_shape
    return 5 * 2 * batch * heads * tokens * tokens * dim
