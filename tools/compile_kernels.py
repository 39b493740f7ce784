"""Compile the attention kernels for a Hopper GPU, on any machine, and print what the assembler says of each.

python tools/compile_kernels.py [HEAD_DIM ...]

For each kernel and head_dim: registers of a thread, bytes spilled to memory, shared memory of a thread block, and
whether the tensor cores' instructions (wgmma) had to be run one by one. That costs most, and nothing else shows it.
"""

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # an interpreted kernel can't be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from siglip_lib.base.offers import TRITON_HEAD_DIMS as HEAD_DIMS
from siglip_lib.kernels import flash_attention as module
from siglip_lib.kernels.flash_attention import BLOCKS

KERNELS = {
    "forward": module._forward_kernel,
    "queries": module._queries_kernel,
    "keys": module._keys_kernel,
}
FLOAT32_POINTERS = ("lse", "delta")
NUMBERS = {"scale": "fp32", "plain_scale": "fp32", "tokens": "i32", "padded": "i32"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dims", nargs="*", type=int, default=HEAD_DIMS)
    parser.add_argument("--tokens", type=int, default=729)
    arguments = parser.parse_args()
    for dim in arguments.dims:
        for name in KERNELS:
            print(f"{name} {dim}: {report(name, dim, arguments.tokens)}", flush=True)


def report(name: str, dim: int, tokens: int) -> str:
    kernel, blocks, (main, rest) = KERNELS[name], BLOCKS[name][dim], module._cut(dim)
    constants = dict(HEADS=16, DIM=dim, MAIN=main, REST=rest, OWN=blocks.own, READ=blocks.read)
    constants["MASKED"] = tokens % blocks.read != 0
    signature = {argument: _type(argument) for argument in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument == "padded"
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
            "maxnreg": blocks.registers,
        },
    )
    said = _assemble(compiled.asm["ptx"])
    registers, spilled = (
        re.search(pattern, said)[1]
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill st")
    )
    serialised = "yes" if "serialized" in said else "no"
    return (
        f"{registers} registers, {spilled} bytes spilled, {compiled.metadata.shared} bytes shared, "
        f"serialised: {serialised}"
    )


def _type(argument: str) -> str:
    if argument.isupper():
        return "constexpr"
    return NUMBERS.get(argument, "*fp32" if argument in FLOAT32_POINTERS else "*bf16")


def _assemble(ptx: str) -> str:
    """What ptxas, which comes with Triton, says of a program."""
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx, encoding="utf-8")
        command = [assembler, "-v", "-arch=sm_90a", file, "-o", Path(folder, "kernel.cubin")]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    return done.stdout + done.stderr


if __name__ == "__main__":
    main()
