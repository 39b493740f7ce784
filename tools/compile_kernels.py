"""Compile the library's kernels for a GPU, on any machine, and print what the assembler says of each.

python tools/compile_kernels.py [HEAD_DIM ...] [--capability 9.0]

For each kernel, of attention for each head_dim: registers of a thread, bytes spilled to memory, shared memory of a
thread block, and whether Hopper's instructions for the tensor cores (wgmma) had to be run one by one. That costs most,
and nothing else shows it.
"""

import argparse

from siglip_lib import kernels  # noqa: F401  before Triton
from siglip_lib.base.offers import TRITON_HEAD_DIMS
from siglip_lib.kernels.report import (
    compile_reports,
    hopper_backward_launches,
    hopper_launches,
    library_launches,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dims", nargs="*", type=int, default=TRITON_HEAD_DIMS)
    parser.add_argument("--capability", default="9.0", help="compute capability of the GPU")
    parser.add_argument("--tokens", type=int, default=729)
    arguments = parser.parse_args()
    capability = tuple(map(int, arguments.capability.split(".")))
    launches = library_launches(capability, arguments.dims, arguments.tokens)
    if capability == (9, 0):
        launches |= hopper_launches(arguments.dims, arguments.tokens)
        launches |= hopper_backward_launches(arguments.dims, arguments.tokens)
    reports = compile_reports(launches)
    for name, report in reports.items():
        print(
            f"{name}: {report.registers} registers, {report.spilled} bytes spilled,"
            f" {report.shared} bytes shared, serialised: {'yes' if report.serialised else 'no'}"
        )


if __name__ == "__main__":
    main()
