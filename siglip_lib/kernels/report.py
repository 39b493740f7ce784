"""What the assembler says of a kernel, for any GPU that Triton compiles for. It needs no GPU.

Kernels are compiled in a process of their own: in one where Triton interprets, nothing can be compiled.
"""

import functools
import inspect
import io
import linecache
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Hashable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import KernelInterface, driver

from siglip_lib.base.offers import AMPERE, TRITON_HEAD_DIMS
from siglip_lib.kernels import flash_attention, pair_losses, residual, sampler


@dataclass(frozen=True)
class Launch:
    """A launch, ``kernel[grid](*arguments, **constants)``: what a kernel is compiled for.

    Args:
        kernel: by ``triton.jit`` or ``gluon.jit``, of a module or of a notebook. One of a notebook uses only kernels,
            imports and ``tl.constexpr``, and in its signature ``triton``, ``tl`` and ``gl``.
        capability: compute capability of the GPU, at least (8, 0).
        arguments: numbers, None, and a dtype for each tensor.
        constants: of the kernel, and Triton's options (``num_warps``).
    """

    kernel: KernelInterface
    capability: tuple[int, int]
    arguments: tuple
    constants: dict


@dataclass(frozen=True)
class CompileReport:
    """What a compiled kernel takes.

    Args:
        registers: of a thread.
        spilled: bytes that a thread writes to memory because it has no register for them.
        shared: bytes of shared memory of a thread block.
        serialised: whether Hopper's products (wgmma) run one by one; false for other GPUs, which have none.
        opcodes: how often each instruction stands in the assembler's listing, by its name up to the first dot, of the
            MUFU family with what it computes (FMUL, MUFU.EX2; products are HGMMA, on Hopper, or HMMA); empty unless
            asked for, or where Triton came without the tools that list them.
        loops: the same of each innermost loop; LDL and STL load and store what was spilled.
    """

    registers: int
    spilled: int
    shared: int
    serialised: bool
    opcodes: dict[str, int] = field(default_factory=dict)
    loops: list[dict[str, int]] = field(default_factory=list)


def compile_reports(
    launches: dict[Hashable, Launch], *, opcodes: bool = False
) -> dict[Hashable, CompileReport]:
    """Compile each launch, which takes about half a second, and return under its key what the assembler said.

    Args:
        launches: by keys of the caller's choice.
        opcodes: whether to count the instructions of the listing, which takes about as long again.

    Raises:
        ValueError: a compute capability below 8.0.
        RuntimeError: a kernel does not compile; with the compiler's message.
    """
    jobs = []
    for launch in launches.values():
        major, minor = launch.capability
        if launch.capability < AMPERE:
            raise ValueError(
                f"compute capability {major}.{minor}: Triton compiles for 8.0 and higher"
            )
        target = GPUTarget("cuda", 10 * major + minor, 32)
        name = launch.kernel.fn.__name__
        jobs.append((_source(launch.kernel), name, target, launch.arguments, launch.constants))
    return dict(zip(launches, _compiled(pickle.dumps((opcodes, jobs))), strict=True))


def library_launches(
    capability: tuple[int, int], dims: Sequence[int] = TRITON_HEAD_DIMS, tokens: int = 729
) -> dict[str, Launch]:
    """Return a launch of each kernel of this library at SO400M's size in bfloat16, of attention's for each head_dim."""
    half, full, batch, channels = torch.bfloat16, torch.float32, 64, 1152
    sizes = (batch * tokens, tokens, 0.1)
    rows, columns = residual._tile(channels)
    tile = dict(CHANNELS=channels, BLOCK_ROWS=rows, BLOCK_COLUMNS=columns)
    pairs = (full, full, half, full, full, full, full, 0, batch, batch, 1, 0.1)
    block = dict(MATRIX=False, GRADIENTS=True, ROWS=pair_losses._ROWS, COLUMNS=pair_losses._COLUMNS)
    draws = (half, channels * channels, 1, 0, *[0.1] * 8)
    found = {
        "residual forward": (residual._forward_kernel, (*[half] * 5, *sizes), tile),
        "residual backward": (residual._backward_kernel, (*[half] * 5, full, *sizes, 25), tile),
        "sampler": (sampler._kernel, draws, dict(COUNTERS=sampler._COUNTERS)),
        "pair losses": (pair_losses._kernel, pairs, block),
    }
    attention = {
        "forward": (half, half, full, 0.1),
        "queries": (half, half, half, full, full, half, 0.1, 0.1),
        "keys": (half, half, full, full, half, 0.1, 0.1),
    }
    for dim in dims:
        for name, given in attention.items():
            constants = flash_attention.constants_of(name, dim, 16, tokens, capability)
            given = (*given, tokens, flash_attention._padded(tokens))
            found[f"{name} {dim}"] = flash_attention.KERNELS[name], given, constants
    return {name: Launch(kernel, capability, *rest) for name, (kernel, *rest) in found.items()}


def hopper_launches(dims: Sequence[int] = TRITON_HEAD_DIMS, tokens: int = 729) -> dict[str, Launch]:
    """Return a launch of each kernel for Hopper alone, for each head_dim: as ``library_launches``."""
    # Gluon is experimental, and no other report needs it
    from siglip_lib.kernels import hopper_attention

    found = {}
    for dim in dims:
        packed = torch.empty(64, tokens, 3 * 16, dim, dtype=torch.bfloat16, device="meta")
        out = packed[:, :, :16].contiguous()
        described = *hopper_attention.descriptors(packed), *hopper_attention.descriptors(out)
        sizes = tokens, flash_attention._padded(tokens), 1
        for name, options in {
            "hopper": (False,),
            "hopper exact": (True,),
            "hopper small": (False, True),
        }.items():
            constants = hopper_attention.constants_of(dim, 16, tokens, *options)
            given = (*described, torch.float32, 0.1, *sizes)
            found[f"{name} {dim}"] = Launch(
                hopper_attention._hopper_kernel, (9, 0), given, constants
            )
        constants = hopper_attention.redo_constants(dim, 16, tokens)
        given = (torch.bfloat16, torch.bfloat16, torch.float32, 0.1, *sizes)
        found[f"hopper redo {dim}"] = Launch(
            hopper_attention._redo_kernel, (9, 0), given, constants
        )
    return found


def hopper_backward_launches(
    dims: Sequence[int] = TRITON_HEAD_DIMS, tokens: int = 729
) -> dict[str, Launch]:
    """Return a launch of each kernel of the backward pass for Hopper, as ``hopper_launches``."""
    from siglip_lib.kernels import hopper_backward

    found, padded = {}, flash_attention._padded(tokens)
    for dim in dims:
        shape = 64, tokens, 3, 16, dim
        qkv = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        d_out, lse = qkv[:, :, 0].contiguous(), torch.empty(64, 16, padded, device="meta")
        for name in hopper_backward.ROLES:
            given = hopper_backward.arguments_of(name, qkv, d_out, qkv, lse, lse)
            given = [x.dtype if isinstance(x, torch.Tensor) else x for x in given]
            constants = hopper_backward.constants_of(name, dim, 16, tokens)
            given = (*given, 0.1, 0.1, tokens, padded, 1)
            kernel = hopper_backward._backward_kernel
            found[f"hopper {name} {dim}"] = Launch(kernel, (9, 0), given, constants)
        given = (torch.bfloat16, torch.bfloat16, torch.float32, tokens, padded)
        constants = hopper_backward.delta_constants(dim, 16)
        kernel = hopper_backward._delta_kernel
        found[f"hopper delta {dim}"] = Launch(kernel, (9, 0), given, constants)
    return found


def _source(kernel: KernelInterface) -> str:
    """Python that defines a kernel: an import; in a notebook its own source, after that of all that it uses."""
    found = {"tl": "import triton, triton.language as tl"}
    if type(kernel).__name__ == "GluonJITFunction":
        found |= {"gluon": "from triton.experimental import gluon"}
        found |= {"gl": "from triton.experimental.gluon import language as gl"}
    _define(kernel.fn.__name__, kernel, found)
    return "\n".join(found.values())


def _define(name: str, value: object, found: dict[str, str]) -> None:
    """Add what gives ``value`` its name, behind the same of all names that it uses."""
    if name in found:
        return
    fn = getattr(value, "fn", value)  # of a kernel, the function that was decorated
    if isinstance(value, triton.language.constexpr):
        found[name] = f"{name} = tl.constexpr({value.value!r})"
    elif isinstance(value, ModuleType):
        found[name] = f"import {value.__name__} as {name}"
    elif inspect.isfunction(fn) and fn.__module__ != "__main__":
        found[name] = f"from {fn.__module__} import {fn.__name__} as {name}"
    elif isinstance(value, KernelInterface):
        for other in fn.__code__.co_names:
            if other != name and other in fn.__globals__:
                _define(other, fn.__globals__[other], found)
        found[name] = inspect.getsource(fn)


@functools.cache
def _compiled(asked: bytes) -> list[CompileReport]:
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import _answer; _answer()"],
        input=asked,
        capture_output=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr.decode())
    return pickle.loads(done.stdout)


def _answer() -> None:
    """In the process that compiles: read jobs, write reports."""
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True  # what lies in Triton's cache comes without a log
    opcodes, jobs = pickle.load(sys.stdin.buffer)
    reports = [_report(*job, opcodes) for job in jobs]
    sys.stdout.buffer.write(pickle.dumps(reports))


def _report(
    source: str, name: str, target: GPUTarget, arguments: tuple, constants: dict, opcodes: bool
) -> CompileReport:
    file = f"<{name}, {len(linecache.cache)}>"  # where Triton looks the source up
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    namespace = {"__name__": name}
    exec(compile(source, file, "exec"), namespace)
    gpu = dict(get_current_target=lambda: target, get_current_device=lambda: target.arch)
    driver.set_active(SimpleNamespace(**gpu, get_current_stream=lambda device: 0))
    namespace[name].device_caches.clear()  # an equal launch before would leave nothing to compile
    log = io.StringIO()
    with redirect_stdout(log):
        compiled = namespace[name].warmup(*arguments, grid=(1,), **constants)
    log = log.getvalue()
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    spilled = int(re.search(r"(\d+) bytes spill stores", log)[1])
    found, loops = {}, []
    if opcodes:
        with suppress(RuntimeError, OSError, subprocess.SubprocessError):
            listing = compiled.asm["sass"]
            found, loops = _opcodes(listing), [_opcodes(body) for body in _innermost_loops(listing)]
    shared, serialised = compiled.metadata.shared, "serialized" in log
    return CompileReport(registers, spilled, shared, serialised, found, loops)


def _opcodes(listing: str) -> dict[str, int]:
    """Count instructions: in a line of the listing a tab, perhaps a predicate (@!P0), then the name."""
    names = re.findall(r"\t(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*(?:\.[A-Z0-9]+)?)", listing)
    return dict(Counter(x if x.startswith("MUFU") else x.partition(".")[0] for x in names))


def _innermost_loops(listing: str) -> list[str]:
    """Lines from a label to a branch back to it, where the branch is conditional: others return from aside."""
    lines = listing.splitlines()
    labels = {line.rstrip(":"): i for i, line in enumerate(lines) if line.endswith(":")}
    branches = ((i, re.search(r"\t@!?U?P\w+ BRA (\w+);", line)) for i, line in enumerate(lines))
    ends = [(labels.get(found[1], i), i) for i, found in branches if found]
    loops = [(start, end) for start, end in ends if start < end]
    return [
        "\n".join(lines[start : end + 1])
        for start, end in loops
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
    ]
