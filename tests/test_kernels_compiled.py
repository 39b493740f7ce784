"""What costs most is seen in no result: every kernel is compiled for every kind of GPU, on any machine."""

from dataclasses import replace

import pytest
import torch
from notebook_files import run

pytest.importorskip("triton")
import triton
import triton.language as tl

from siglip_lib.base.offers import TRITON_HEAD_DIMS
from siglip_lib.kernels.report import (
    Launch,
    _innermost_loops,
    _opcodes,
    compile_reports,
    library_launches,
)

# bytes of shared memory that a thread block may have, by compute capability
# source: CUDA C++ Programming Guide, table of technical specifications
SHARED = {
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (12, 0): 99 << 10,
}
# with triton 3.6, none with 3.7; the fastest of tools/tune_kernels.py's choices on an H200 all the same
SPILLS = {((9, 0), "forward 96"): 8}
# triton 3.9 brings a newer assembler: 8 bytes in keys 72, 16 in forward 96, both for 9.0
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

NOTEBOOK = """
@triton.jit
def twice(x):
    return x + x


@triton.jit
def double(x_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(x_ptr + place, twice(tl.load(x_ptr + place)))
"""


def compiled(*dims, capabilities=tuple(SHARED)):
    launches = {
        (capability, name): launch
        for capability in capabilities
        for name, launch in library_launches(capability, dims).items()
    }
    return compile_reports(launches)


def assert_fit(reports):
    for key, found in reports.items():
        assert found.shared <= SHARED[key[0]], key
        assert found.spilled <= (SPILLS.get(key, 0) if TRITON < (3, 9) else 16), key
        assert not found.serialised, key


def test_every_kernel_fits_every_gpu():
    # 8.9 has 8.6's launches and limit, and its reports to the register, which the slow test finds
    capabilities = [capability for capability in SHARED if capability != (8, 9)]
    assert SHARED[8, 9] == SHARED[8, 6]
    for name, launch in library_launches((8, 9)).items():
        assert replace(launch, capability=(8, 6)) == library_launches((8, 6))[name]
    reports = compiled(72, 128, capabilities=capabilities)
    assert len(reports) == len(capabilities) * (4 + 2 * 3)
    assert_fit(reports)


@pytest.mark.slow
def test_every_head_dim_fits_every_gpu():
    reports = compiled(*TRITON_HEAD_DIMS)
    assert_fit(reports)
    for (capability, name), report in reports.items():
        assert capability != (8, 9) or report == reports[(8, 6), name]


def test_a_gpu_that_triton_does_not_compile_for_is_refused():
    with pytest.raises(ValueError, match=r"compute capability 7\.5: .* 8\.0 and higher"):
        compile_reports(library_launches((7, 5), [64]))


def test_a_kernel_of_a_notebook():
    """Its own source is compiled, after that of the kernel it calls."""
    namespace = {"__name__": "__main__", "triton": triton, "tl": tl}
    run(NOTEBOOK, namespace)
    right, wrong = (
        Launch(namespace["double"], (8, 0), (torch.float32,), dict(SIZE=size))
        for size in (128, 100)
    )
    assert 0 < compile_reports({1: right})[1].registers < 32
    with pytest.raises(RuntimeError, match="power of 2"):
        compile_reports({1: wrong})


def test_equal_launches_have_equal_reports():
    launch = library_launches((8, 0), [])["pair losses"]
    reports = compile_reports({1: launch, 2: launch})
    assert reports[1] == reports[2]


def test_instructions_are_counted_where_asked_for():
    """On Hopper a product is an HGMMA, before it an HMMA; an exponential in base 2 is a MUFU.EX2."""
    launches = {
        capability: library_launches(capability, [72])["forward 72"]
        for capability in ((8, 0), (9, 0))
    }
    before, hopper = compile_reports(launches, opcodes=True).values()
    assert before.opcodes["HMMA"] >= 16
    assert "HGMMA" not in before.opcodes
    assert hopper.opcodes["HGMMA"] >= 8
    assert "HMMA" not in hopper.opcodes
    # 4 warps have 64 scores of 128 x 64 each, and another factor for each of their two rows
    assert 64 <= hopper.opcodes["MUFU.EX2"] <= 64 + 4
    assert set(compile_reports(launches).popitem()[1].opcodes) == set()


def test_a_line_of_the_listing_is_one_instruction():
    listing = """Function:one
--:-:1:-:8\tLDC R1, c[0x0][0x28];
04:-:-:Y:2\t@!P0 FMUL R0, R1, R2;
04:-:2:-:2\tMUFU.EX2 R0, R0;
04:-:2:-:2\t@UP0 UIADD3 UR4, UR4, 1;
--:-:-:-:4\tHGMMA.64x32x16.F32.BF16 R40, gdesc[UR8], RZ, !UPT;
--:-:-:-:4\tFMUL.FTZ R3, R1, R2;
"""
    wanted = {"LDC": 1, "FMUL": 2, "MUFU.EX2": 1, "UIADD3": 1, "HGMMA": 1}
    assert _opcodes(listing) == wanted


def test_innermost_loops_of_a_listing():
    """Not the loop around another, not what a branch without a condition returns from, not a branch forwards."""
    listing = """\tS2R R0, SR_TID.X;
LBB0:
\tLDL R1, [R1];
LBB1:
\tHGMMA.64x32x16.F32.BF16 R40, gdesc[UR8], RZ, !UPT;
\t@!P0 BRA LBB3;
LBB2:
\tMUFU.EX2 R0, R0;
\t@P1 BRA LBB1;
\tSTL [R1], R0;
\t@!UP0 BRA LBB0;
LBB3:
\tSYNCS R0;
\t@!P0 BRA LBB3;
\tBRA LBB2;
\t@P0 BRA LBB9;
"""
    found = [_opcodes(body) for body in _innermost_loops(listing)]
    assert found == [{"HGMMA": 1, "BRA": 2, "MUFU.EX2": 1}, {"SYNCS": 1, "BRA": 1}]
