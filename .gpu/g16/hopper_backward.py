"""Draft, never run: the backward pass for Hopper in one pass of five products, without atomics.

A thread block owns a pair of sample and head. So nobody else adds to its dq, which lies in float32 in a scratch that only
this thread block uses (programs, padded, head_dim), 29 MB in all at N = 729: it stays in the L2 cache. One thread adds to
an element at all times, in one order: the same bits on every run.

Outer loop: 128 keys, 64 a consumer, whose dk and dv lie in registers. Inner loop: 64 queries. Scores are transposed,
(keys, queries), so that p and ds are left operands from registers for dv and dk; ds goes through shared memory for dq, of
which the consumers take turns: consumer 0 the even blocks of queries, consumer 1 the odd ones.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

from siglip_lib.kernels.hopper_attention import (
    _MAIN, _ROWS, _at, _barriers, _copy, _matrix, _next, _product, _ring, _scores, _values, _zeros,
)


@gluon.jit
def _producer(packed, pulls, rows, buffers, barriers, padded, pairs, constants: gl.constexpr):
    HEADS: gl.constexpr = constants[0]
    REST: gl.constexpr = constants[1]
    STAGES: gl.constexpr = constants[2]
    q, do, k, v, lse_s, delta_s = buffers
    full, empty, kv_full, kv_empty = barriers
    CHANNELS: gl.constexpr = _MAIN + q[1].shape[4] if REST else _MAIN
    BYTES: gl.constexpr = _ROWS * CHANNELS * 2
    stage, phase, turn = 0, 1, 0
    for pair in range(gl.program_id(0), pairs, gl.num_programs(0)):
        sample, head = pair // HEADS, pair % HEADS
        for key in range(0, padded, 128):
            place = turn & 1
            mbarrier.wait(kv_empty.index(place), ((turn >> 1) & 1) ^ 1)
            mbarrier.expect(kv_full.index(place), 4 * BYTES)
            for half in gl.static_range(2):
                row = key + half * _ROWS
                _copy(packed, sample, row, HEADS + head, kv_full.index(place), _at(k, 2 * place + half), REST)
                _copy(packed, sample, row, 2 * HEADS + head, kv_full.index(place), _at(v, 2 * place + half), REST)
            turn += 1
            for query in range(0, padded, 64):
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(full.index(stage), 2 * BYTES + 2 * 64 * 4)
                bar = full.index(stage)
                _copy(packed, sample, query, head, bar, _at(q, stage), REST)
                _copy(pulls, sample, query, head, bar, _at(do, stage), REST)
                tma.async_copy_global_to_shared(rows[0], [pair, query], bar, lse_s.index(stage))
                tma.async_copy_global_to_shared(rows[1], [pair, query], bar, delta_s.index(stage))
                stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _row(buffer):
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, _product(64))
    return buffer._reinterpret(gl.float32, [64], PLAIN).load(COLUMNS)[None, :]


@gluon.jit
def _consumer(INDEX: gl.constexpr, buffers, barriers, exchange, d_qkv, scratch, scale, plain_scale, tokens, padded, pairs, constants: gl.constexpr):
    HEADS: gl.constexpr = constants[0]
    REST: gl.constexpr = constants[1]
    STAGES: gl.constexpr = constants[2]
    DIM: gl.constexpr = _MAIN + REST
    q, do, k, v, lse_s, delta_s = buffers
    full, empty, kv_full, kv_empty = barriers
    ds_s, ds_full, ds_empty = exchange
    dtype: gl.constexpr = q[0].dtype
    OUT: gl.constexpr = _product(_MAIN)
    stage, phase, turn, round_ = 0, 0, 0, 0
    scratch += gl.program_id(0) * padded * DIM
    for pair in range(gl.program_id(0), pairs, gl.num_programs(0)):
        sample, head = (pair // HEADS).to(gl.int64), pair % HEADS
        base = d_qkv + sample * tokens * (3 * HEADS * DIM) + head * DIM
        for key in range(0, padded, 128):
            place = turn & 1
            mbarrier.wait(kv_full.index(place), (turn >> 1) & 1)
            mine = 2 * place + INDEX
            dk, dv = _zeros(REST), _zeros(REST)
            for query in range(0, padded, 128):
                for odd in gl.static_range(2):
                    mbarrier.wait(full.index(stage), phase)
                    s = _scores(_at(k, mine), _at(q, stage), 64, REST)
                    dp = _scores(_at(v, mine), _at(do, stage), 64, REST)
                    # a part of a product is a group of its own: those of dp stay in flight
                    s = warpgroup_mma_wait(2 if REST else 1, [s])
                    # at most 0, but for rounding; of keys past the end, whose scores are 0, it could be anything
                    p = gl.exp2(gl.minimum(s * scale - _row(lse_s.index(stage)), 0.0))
                    dp = warpgroup_mma_wait(0, [dp])
                    dv = _values(p, _at(do, stage), 0, dv, REST)
                    ds = p * (dp - _row(delta_s.index(stage)))
                    dk = _values(ds, _at(q, stage), 0, dk, REST)
                    mbarrier.wait(ds_empty.index(odd), (round_ & 1) ^ 1)
                    ds_s.index(2 * odd + INDEX).store(ds.to(dtype))
                    fence_async_shared()
                    mbarrier.arrive(ds_full.index(odd), count=1)
                    if odd == INDEX:
                        mbarrier.wait(ds_full.index(odd), round_ & 1)
                        dq = _zeros(REST)
                        dq = _from_shared(ds_s.index(2 * odd), _at(k, 2 * place), dq, REST)
                        dq = _from_shared(ds_s.index(2 * odd + 1), _at(k, 2 * place + 1), dq, REST)
                        dk, dv, dq = _wait_all(dk, dv, dq, REST)
                        mbarrier.arrive(ds_empty.index(odd), count=1)
                        mbarrier.arrive(empty.index(stage), count=1)
                        first = query + 64 * odd
                        _add(scratch, base, dq[0], first, 0, key, plain_scale, tokens, padded, HEADS, DIM)
                        if REST:
                            _add(scratch, base, dq[1], first, _MAIN, key, plain_scale, tokens, padded, HEADS, DIM)
                    else:
                        dk, dv = _wait_both(dk, dv, REST)
                        mbarrier.arrive(empty.index(stage), count=1)
                    stage, phase = _next(stage, phase, STAGES)
                round_ += 1
            mbarrier.arrive(kv_empty.index(place), count=1)
            turn += 1
            first = key + INDEX * 64
            _store(base + HEADS * DIM, dk[0], first, 0, plain_scale, tokens, HEADS, DIM)
            _store(base + 2 * HEADS * DIM, dv[0], first, 0, 1.0, tokens, HEADS, DIM)
            if REST:
                _store(base + HEADS * DIM, dk[1], first, _MAIN, plain_scale, tokens, HEADS, DIM)
                _store(base + 2 * HEADS * DIM, dv[1], first, _MAIN, 1.0, tokens, HEADS, DIM)


@gluon.jit
def _from_shared(ds, k, dq, REST: gl.constexpr):
    """Start to add ds.T @ k to dq; ds (keys, queries)."""
    left = ds.permute((1, 0))
    main, rest = dq
    if REST:
        rest = warpgroup_mma(left, _matrix(k[1], _ROWS).slice(0, REST, 1), rest, is_async=True)
    main = warpgroup_mma(left, _matrix(k[0], _ROWS), main, is_async=True)
    return main, rest


@gluon.jit
def _wait_both(a, b, REST: gl.constexpr):
    a0, a1 = a
    b0, b1 = b
    if REST:
        a0, a1, b0, b1 = warpgroup_mma_wait(0, [a0, a1, b0, b1])
    else:
        a0, b0 = warpgroup_mma_wait(0, [a0, b0])
    return (a0, a1), (b0, b1)


@gluon.jit
def _wait_all(a, b, c, REST: gl.constexpr):
    a0, a1 = a
    b0, b1 = b
    c0, c1 = c
    if REST:
        a0, a1, b0, b1, c0, c1 = warpgroup_mma_wait(0, [a0, a1, b0, b1, c0, c1])
    else:
        a0, b0, c0 = warpgroup_mma_wait(0, [a0, b0, c0])
    return (a0, a1), (b0, b1), (c0, c1)


@gluon.jit
def _places(x, first, COLUMN: gl.constexpr):
    rows = first + gl.arange(0, 64, gl.SliceLayout(1, x.type.layout))
    columns = COLUMN + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    return rows[:, None], columns[None, :]


@gluon.jit
def _add(scratch, base, x, first, COLUMN: gl.constexpr, key, plain_scale, tokens, padded, HEADS: gl.constexpr, DIM: gl.constexpr):
    """dq of these queries: the first keys' is stored, the others' added, the last sum stored as the gradient."""
    rows, columns = _places(x, first, COLUMN)
    at = scratch + rows * DIM + columns
    if key > 0:
        x += gl.load(at)
    if key + 128 >= padded:
        gl.store(base + rows * (3 * HEADS * DIM) + columns, (x * plain_scale).to(base.dtype.element_ty), mask=rows < tokens)
    else:
        gl.store(at, x)


@gluon.jit
def _store(base, x, first, COLUMN: gl.constexpr, factor, tokens, HEADS: gl.constexpr, DIM: gl.constexpr):
    rows, columns = _places(x, first, COLUMN)
    gl.store(base + rows * (3 * HEADS * DIM) + columns, (x * factor).to(base.dtype.element_ty), mask=rows < tokens)


@gluon.jit(do_not_specialize=["tokens", "pairs"])
def _backward_kernel(
    main, rest, do_main, do_rest, lse, delta, d_qkv, scratch, scale, plain_scale, tokens, padded, pairs,
    HEADS: gl.constexpr, REST: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):
    packed, pulls = (main, rest), (do_main, do_rest)
    LINE: gl.constexpr = lse.layout
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], LINE)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 64], LINE)
    buffers = (_ring(packed, STAGES, REST), _ring(packed, STAGES, REST), _ring(packed, 4, REST), _ring(packed, 4, REST), lse_s, delta_s)
    barriers = (_barriers(STAGES, 1), _barriers(STAGES, 2), _barriers(2, 1), _barriers(2, 2))
    SQUARE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    ds_s = gl.allocate_shared_memory(main.dtype, [4, 64, 64], SQUARE)
    exchange = (ds_s, _barriers(2, 2), _barriers(2, 1))
    fence_async_shared()
    constants: gl.constexpr = (HEADS, REST, STAGES)
    R: gl.constexpr = REGISTERS
    P: gl.constexpr = PRODUCER_REGISTERS
    gl.warp_specialize([
        (_consumer, (0, buffers, barriers, exchange, d_qkv, scratch, scale, plain_scale, tokens, padded, pairs, constants)),
        (_consumer, (1, buffers, barriers, exchange, d_qkv, scratch, scale, plain_scale, tokens, padded, pairs, constants)),
        (_producer, (packed, pulls, (lse, delta), buffers, barriers, padded, pairs, constants)),
    ], [4, 1], [R, P])
