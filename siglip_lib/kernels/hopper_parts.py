"""What the kernels for Hopper share: who takes which tile, buffers and barriers, copies by the TMA unit, layouts.

hopper_attention.py explains them.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import KernelInterface

# queries of a consumer, and keys of a block: the rows of a product of the tensor cores
_ROWS = gl.constexpr(64)
_MAIN = gl.constexpr(64)  # channels in the main part of a head; the others are the rest
_PRODUCER_REGISTERS = 24  # the fewest that a warpgroup may have


@dataclass(frozen=True)
class Roles:
    """How a thread block is made up.

    Args:
        consumers: warpgroups that compute.
        stages: blocks of keys and values that the ring holds; as many as fit 227 KiB of shared memory.
        registers: of a consumer's thread. When the kernel has started each role takes its own share of what all
            threads started with: 4 consumers can have 112 a thread, 3 can have 160, 2 can have 240. (Triton gives the
            first consumer what the others leave, which may be 8 more.)
    """

    consumers: int
    stages: int
    registers: int

    @property
    def registers_at_start(self) -> int:
        """Registers of every thread until the roles have theirs: 65,536 shared equally, in multiples of 8."""
        return 65_536 // (128 * (self.consumers + 1)) // 8 * 8


# --- tiles, the ring and its copies ---


@gluon.constexpr_function
def _product(columns):
    """Return where the sums of a product of 64 rows lie in the registers of 4 warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def _place(tile, tokens, HEADS: gl.constexpr, CONSUMERS: gl.constexpr):
    """Return a tile's sample, head and first query; neighbours have the same keys, so these come from the L2 cache."""
    tiles = gl.cdiv(tokens, _ROWS * CONSUMERS)
    pair = tile // tiles
    return pair // HEADS, pair % HEADS, (tile % tiles) * (_ROWS * CONSUMERS)


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """Return the next stage of the ring; a barrier's phase changes each time round."""
    wraps = stage + 1 == STAGES
    return gl.where(wraps, 0, stage + 1), phase ^ gl.where(wraps, 1, 0)


@gluon.jit
def _at(parts, i):
    """Return buffer i of both parts of a head."""
    return parts[0].index(i), parts[1].index(i)


@gluon.jit
def _copy(descriptors, sample, row, head, barrier, to, REST: gl.constexpr):
    """Have the TMA unit copy rows of a head; the barrier counts the bytes, those of zeros past the end too."""
    tma.async_copy_global_to_shared(descriptors[0], [sample, row, head, 0], barrier, to[0])
    if REST:
        tma.async_copy_global_to_shared(descriptors[1], [sample, row, head, _MAIN], barrier, to[1])


@gluon.jit
def _ring(descriptors, BUFFERS: gl.constexpr, REST: gl.constexpr):
    """Buffers for rows of a head, in both parts; without a rest its part is a second name of the main one."""
    ROWS: gl.constexpr = descriptors[0].block_shape[1]
    LAYOUT: gl.constexpr = descriptors[0].layout
    main = gl.allocate_shared_memory(descriptors[0].dtype, [BUFFERS, 1, ROWS, 1, _MAIN], LAYOUT)
    rest = main
    if REST:
        REST_LAYOUT: gl.constexpr = descriptors[1].layout
        WIDTH: gl.constexpr = descriptors[1].block_shape[3]
        rest = gl.allocate_shared_memory(
            descriptors[1].dtype, [BUFFERS, 1, ROWS, 1, WIDTH], REST_LAYOUT
        )
    return main, rest


@gluon.jit
def _barriers(N: gl.constexpr, COUNT: gl.constexpr):
    """N barriers, each of which changes its phase when COUNT have arrived."""
    LAYOUT: gl.constexpr = mbarrier.MBarrierLayout()
    barriers = gl.allocate_shared_memory(gl.int64, [N, 1], LAYOUT)
    for i in gl.static_range(N):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


# --- what the tensor cores see ---


@gluon.jit
def _matrix(buffer, ROWS: gl.constexpr):
    """A block (1, 64, 1, channels), as the TMA unit writes it, as the matrix of its first rows."""
    CHANNELS: gl.constexpr = buffer.shape[3]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(2 * CHANNELS, 16, 2)
    return buffer._reinterpret(buffer.dtype, [ROWS, CHANNELS], LAYOUT)


@gluon.jit
def _zeros(REST: gl.constexpr):
    OUT: gl.constexpr = _product(_MAIN)
    main, rest = gl.zeros([_ROWS, _MAIN], gl.float32, OUT), 0
    if REST:
        OUT_REST: gl.constexpr = _product(REST)
        rest = gl.zeros([_ROWS, REST], gl.float32, OUT_REST)
    return main, rest


# --- on the CPU: a launch ---


def descriptors(x: Tensor, rows: int = _ROWS.value) -> list[TensorDescriptor | None]:
    """What the TMA unit needs to copy rows of a head: of its first 64 channels, and of the others, None without.

    Args:
        x: (B, N, ..., head_dim), contiguous, at an address that is a multiple of 16.
        rows: how many at a time.
    """
    if x.data_ptr() % 16:
        raise ValueError("a tensor begins at an address that is no multiple of 16: clone() it")
    return [made and _at_address(made, x) for made in _described(x.shape, x.dtype, rows)]


def _at_address(descriptor: TensorDescriptor, x: Tensor) -> TensorDescriptor:
    """Return a copy for a tensor of the same shape; its own constructor takes several times as long."""
    found = object.__new__(TensorDescriptor)
    found.__dict__.update(descriptor.__dict__, base=x)
    return found


@functools.lru_cache(maxsize=32)
def _described(shape: torch.Size, dtype: torch.dtype, rows: int) -> list[TensorDescriptor | None]:
    # kept, since to make one takes Python longer than to launch a kernel
    batch, tokens, *heads, dim = shape
    x = torch.empty(batch, tokens, math.prod(heads), dim, dtype=dtype, device="meta")
    rest = [max(16, dim - 64)] if dim > 64 else []
    made = [
        TensorDescriptor(
            x,
            list(x.shape),
            list(x.stride()),
            [1, rows, 1, width],
            gl.NVMMASharedLayout(2 * width, 16, 4),
        )
        for width in (64, *rest)
    ]
    return made if rest else [*made, None]


def launcher(
    kernel: KernelInterface, programs: int, given: tuple, fixed: tuple, constants: dict
) -> Callable[..., None]:
    """Compile a kernel for the current GPU, and return what launches it: a function of its first arguments.

    ``kernel[grid](...)`` looks at every argument of every launch, to find out whether it has compiled for such. That
    takes Python several times as long as the launch.

    Args:
        kernel: by ``triton.jit`` or ``gluon.jit``.
        programs: how many thread blocks.
        given: what the first arguments are like: numbers, descriptors, and a dtype for a tensor, which must begin at
            an address that is a multiple of 16.
        fixed: the numbers after them.
        constants: of the kernel, and Triton's options.
    """
    compiled = kernel.warmup(*given, *fixed, grid=(programs,), **constants)
    launch = compiled[programs, 1, 1]
    last = *fixed, *(constants[name] for name in kernel.arg_names if name in constants)
    return lambda *first: launch(*first, *last)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
