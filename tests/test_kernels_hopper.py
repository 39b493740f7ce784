"""The Hopper kernel: on a GPU of compute capability 9.0 against float64, elsewhere by what the compiler says of it."""

import functools
import math

import pytest
import torch
from notebook_files import run
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton.experimental.gluon")

from test_kernels_flash_attention import assert_good, draw, results
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from siglip_lib import attend
from siglip_lib.backends import attend_packed
from siglip_lib.base.offers import TRITON_HEAD_DIMS as HEAD_DIMS
from siglip_lib.kernels import flash_attention, hopper_attention
from siglip_lib.kernels.device import is_interpreted
from siglip_lib.kernels.report import Launch, compile_reports, hopper_launches

NOTEBOOK = """
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as of_hopper
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared as fence
from siglip_lib.kernels.hopper_attention import _product

SIZE = gl.constexpr(64)
total = 3


@gluon.jit
def total_of(x):
    return gl.sum(x, 1)


@gluon.jit
def rows(x_ptr):
    LAYOUT: gl.constexpr = _product(SIZE)
    total = total_of(gl.zeros([SIZE, SIZE], gl.float32, LAYOUT))
    barrier = gl.allocate_shared_memory(gl.int64, [1], of_hopper.mbarrier.MBarrierLayout())
    of_hopper.mbarrier.init(barrier, count=1)
    fence()
    gl.store(x_ptr + gl.arange(0, SIZE, total.type.layout), total)
"""


class Recorder:
    """Stands for a kernel, and keeps what it is compiled for and launched with, by the names of the arguments."""

    def __init__(self, module, name, monkeypatch):
        self.arg_names, self.compiled, self.launched = getattr(module, name).arg_names, [], []
        monkeypatch.setattr(module, name, self)

    def warmup(self, *given, grid, **constants):
        self.compiled.append(dict(zip(self.arg_names, given, strict=False)) | constants)
        return self

    def __getitem__(self, grid):
        return lambda *given: self.launched.append(dict(zip(self.arg_names, given, strict=True)))


def kind(x):
    """What Triton compiles for."""
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, x.block_shape, x.layout
    return x.dtype if isinstance(x, torch.Tensor) else float if isinstance(x, float) else x


def assert_compiled_for(recorder):
    """The last launch has what its kernel was compiled for."""
    given, compiled = recorder.launched[-1], recorder.compiled[-1]
    assert {name: kind(x) for name, x in given.items()} == {
        name: kind(compiled[name]) for name in given
    }


def recorders(monkeypatch, module, *names):
    """Put recorders in the place of a module's kernels, on a GPU of 132 multiprocessors on which nothing was run."""
    monkeypatch.setattr(module, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(module, "_launchers", functools.cache(module._launchers.__wrapped__))
    return [Recorder(module, name, monkeypatch) for name in names]


# of 65,536 registers of a multiprocessor, and 227 KiB of shared memory that a thread block may have
REGISTERS, SHARED = 65_536, 227 << 10
# bytes outside the loop over keys, with triton 3.6.0 and 3.7.1 alike
SPILLED = {"hopper exact 72": 28, "hopper exact 96": 8, "hopper exact 128": 32}


def assert_fast(reports):
    """What makes the kernel slow and is seen in no result."""
    assert not any(report.serialised for report in reports.values())
    for name, report in reports.items():
        if "redo" in name:  # seldom does anything
            continue
        dim = int(name.split()[-1])
        made_up = hopper_attention.SMALL if "small" in name else hopper_attention.ROLES
        roles = made_up[dim]
        assert report.registers <= roles.registers_at_start, name
        assert report.shared <= SHARED, name
        assert report.spilled <= SPILLED.get(name, 0), name
        # the loop over keys: a consumer's 64 x 64 scores are 32 a thread, and rescaling takes two more
        loops = [loop for loop in report.loops if "HGMMA" in loop]
        assert loops, name
        for loop in loops:
            assert not {"LDL", "STL"} & set(loop), name
            assert loop["MUFU.EX2"] == (34 if "exact" in name else 32), name
            channels = 4 + math.ceil((dim - 64) / 16)  # of q @ k.T, 16 at a time
            parts = 2 if dim > 64 else 1
            assert loop["HGMMA"] == channels + parts * 4, name  # and 64 keys, 16 at a time


def test_the_compiler_leaves_the_products_asynchronous():
    reports = compile_reports(hopper_launches([72]), opcodes=True)
    assert list(reports) == [f"hopper{x} 72" for x in ("", " exact", " small", " redo")]
    assert_fast(reports)


def test_a_kernel_of_a_notebook():
    """Its source is compiled with what it uses: kernels, imports under their names, constants; and nothing else."""
    namespace = {"__name__": "__main__"}
    run(NOTEBOOK, namespace)
    launch = Launch(namespace["rows"], (9, 0), (torch.float32,), dict(num_warps=4))
    assert compile_reports({1: launch})[1].shared == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "tokens", [17, 256, 729]
)  # one block of keys; a full last one; a short one
def test_every_form_compiles(tokens):
    reports = compile_reports(hopper_launches(tokens=tokens), opcodes=tokens > 64)
    if tokens > 64:
        assert_fast(reports)
    assert len(reports) == 4 * len(HEAD_DIMS)
    assert not any(report.serialised for report in reports.values())


@pytest.mark.parametrize("made_up", [hopper_attention.ROLES, hopper_attention.SMALL])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_registers_and_shared_memory_are_shared_out(dim, made_up):
    roles = made_up[dim]
    start, threads = roles.registers_at_start, 128 * (roles.consumers + 1)
    assert start * threads <= REGISTERS < (start + 8) * threads
    # the first consumer is run by the warps that start, which keep what the others leave
    others = (roles.consumers - 1) * roles.registers + hopper_attention._PRODUCER_REGISTERS
    first = start * (roles.consumers + 1) - others
    assert first >= roles.registers > start
    row = 2 * (64 + max(16, dim - 64) if dim > 64 else 64)
    # two places for the queries of each consumer, and a ring of keys and values: one stage more would not fit
    used = [64 * row * (2 * roles.consumers + 2 * n) for n in (roles.stages, roles.stages + 1)]
    assert used[0] + 1024 <= SHARED < used[1] + 1024


@pytest.mark.parametrize(
    ("tokens", "tail", "many"),
    [
        (1, 16, False),
        (16, 16, False),
        (17, 32, False),
        (64, 64, False),
        (65, 16, True),
        (729, 32, True),
    ],
)
def test_the_last_block_is_as_narrow_as_it_can_be(tokens, tail, many):
    constants = hopper_attention.constants_of(72, 16, tokens, exact=False)
    assert (constants["TAIL"], constants["MANY"]) == (tail, many)


@pytest.mark.parametrize(("dim", "rest"), [(64, None), (72, 16), (80, 16), (96, 32), (128, 64)])
def test_a_head_is_copied_in_two_parts(dim, rest):
    x = torch.empty(2, 70, 6, dim, dtype=torch.bfloat16, device="meta")
    main, other = hopper_attention.descriptors(x)
    assert main.block_shape == [1, 64, 1, 64]
    assert main.strides == [70 * 6 * dim, 6 * dim, dim, 1]
    assert (other is None) if rest is None else (other.block_shape == [1, 64, 1, rest])


@pytest.mark.parametrize("programs", [1, 3, 4])
@pytest.mark.parametrize("bad", [[0], [3, 64], range(70), []])
def test_blocks_without_an_lse_are_computed_again(bad, programs, monkeypatch):
    """Blocks of queries of which one has no lse, and no others; it needs no Hopper."""
    if not is_interpreted(hopper_attention._redo_kernel):
        pytest.skip("on a GPU it is tested with the other kernel")
    torch.manual_seed(0)
    qkv = torch.randn(2, 70, 3, 2, 72)
    right, lse = flash_attention._forward(qkv, 0.1)
    marked, out = lse.clone(), torch.zeros_like(right)
    marked[1, 1, list(bad)] = math.nan
    monkeypatch.setattr(hopper_attention, "_AT_ONCE", 2)
    constants = hopper_attention.redo_constants(72, 2, 70)
    sizes = (0.1 * math.log2(math.e), 70, lse.shape[2], 2 * 2)
    hopper_attention._redo_kernel[(programs,)](qkv, out, marked, *sizes, **constants)
    again = torch.zeros_like(right)
    if bad:
        again[1, :, 1] = right[1, :, 1]
    torch.testing.assert_close(out, again)
    torch.testing.assert_close(marked, lse)


def test_an_address_that_is_used_again(monkeypatch):
    """With another shape or dtype it gets other descriptors and another kernel; what has been there is found again."""
    forward, redo = recorders(monkeypatch, hopper_attention, "_hopper_kernel", "_redo_kernel")
    memory = torch.empty(8 * 130 * 3 * 9 * 72, dtype=torch.bfloat16)
    shapes = [(2, 130, 3, 4, 72), (4, 65, 3, 4, 72), (8, 130, 3, 9, 72), (2, 65, 3, 9, 64)]
    cases = [(shapes[0], torch.bfloat16), (shapes[0], torch.float16)]
    cases += [(shape, torch.bfloat16) for shape in shapes[1:]]
    for shape, dtype in cases * 2:
        batch, tokens, _, heads, dim = shape
        qkv = memory[: math.prod(shape)].view(dtype).view(shape)
        out, lse = hopper_attention._launch(qkv, 0.1, exact=False)
        given = forward.launched[-1]
        for name, tensor, n in (("main", qkv, 3 * heads), ("out_main", out, heads)):
            assert given[name].base is tensor
            assert given[name].shape == [batch, tokens, n, dim]
            assert given[name].strides == [tokens * n * dim, n * dim, dim, 1]
        assert (given["lse"], given["tokens"], given["padded"]) == (lse, tokens, lse.shape[2])
        assert (given["HEADS"], given["REST"]) == (heads, dim - 64)
        if len(forward.launched) <= len(cases):  # in the second round nothing is compiled
            assert_compiled_for(forward)
            assert_compiled_for(redo)
        given = redo.launched[-1]
        assert (given["qkv"], given["out"], given["lse"]) == (qkv, out, lse)
        assert given["blocks"] == -(-tokens // given["OWN"]) * batch * heads
    assert len(forward.launched) == len(redo.launched) == 2 * len(cases)
    assert len(forward.compiled) == len(redo.compiled) == len(cases)


def test_the_exact_form_needs_no_second_kernel(monkeypatch):
    forward, redo = recorders(monkeypatch, hopper_attention, "_hopper_kernel", "_redo_kernel")
    qkv = torch.empty(1, 70, 3, 2, 72, dtype=torch.bfloat16)
    for exact in (True, False):
        hopper_attention._launch(qkv, 0.1, exact)
        assert forward.launched[-1]["EXACT"] == exact
        assert len(redo.launched) == (not exact)


def test_compiled_code_sees_an_operator():
    with FlopCounterMode(display=False) as counted:
        qkv = torch.empty(2, 130, 3, 4, 72, dtype=torch.bfloat16, device="meta", requires_grad=True)
        out, lse = torch.ops.siglip_lib.hopper_attention(qkv, 0.1)
        assert (out.shape, out.dtype) == ((2, 130, 4, 72), torch.bfloat16)
        assert (lse.shape, lse.dtype) == ((2, 4, 256), torch.float32)
        (gradient,) = torch.autograd.grad(out, qkv, torch.empty_like(out))
        assert gradient.shape == qkv.shape
    assert counted.get_total_flops() == (4 + 10) * 2 * 4 * 130 * 130 * 72


def test_parts_of_a_packed_tensor():
    """They take this kernel's operator on all of it, and their gradients lie in one tensor, too."""
    with FlopCounterMode(display=False) as counted:
        qkv = torch.empty(1, 4, 3, 2, 72, dtype=torch.bfloat16, device="meta", requires_grad=True)
        out = hopper_attention.hopper_attention_of_parts(*qkv.unbind(2), 0.1)
        assert (out.shape, out.dtype) == ((1, 4, 2, 72), torch.bfloat16)
        (gradient,) = torch.autograd.grad(out, qkv, torch.empty_like(out))
        assert gradient.shape == qkv.shape
    called = counted.get_flop_counts()["Global"]
    operators = torch.ops.siglip_lib
    assert set(called) == {operators.hopper_attention, operators.hopper_attention_backward}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x, "needs a GPU of compute capability 9.0"),
        (lambda x: x[:, :, :2], "head_dim"),
        (lambda x: x[:, ::2], "contiguous"),
        (lambda x: x.float(), "float32"),
    ],
)
def test_what_is_refused(change, message):
    qkv = torch.empty(1, 4, 3, 2, 72, dtype=torch.bfloat16)
    with pytest.raises((TypeError, ValueError), match=message):
        hopper_attention.hopper_attention(change(qkv))


def test_other_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(flash_attention, "_capability", lambda device: (8, 6))
    with FakeTensorMode(), pytest.raises(ValueError, match="of compute capability 9"):
        hopper_attention.hopper_attention(
            torch.empty(1, 4, 3, 2, 72, dtype=torch.bfloat16, device="cuda")
        )


def test_an_address_that_can_not_be_copied_from():
    x = torch.empty(4 * 6 * 72 + 1, dtype=torch.bfloat16)
    assert hopper_attention.descriptors(x[:-1].view(1, 4, 6, 72))
    with pytest.raises(ValueError, match="multiple of 16"):
        hopper_attention.descriptors(x[1:].view(1, 4, 6, 72))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 255, 256, 257, 729, 1024, 4096])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_real_shapes(hopper, dim, tokens, dtype):
    for batch in (1, 3):
        assert_good(draw(batch, tokens, 4, dim, hopper, dtype), attention)
    # scores of up to hundreds: a row's first block is no reference for the others
    assert_good(draw(1, tokens, 4, dim, hopper, dtype, size=10.0), attention)


def attention(qkv, **options):
    return hopper_attention.hopper_attention(qkv, **options)


def test_a_gpu_s_address_that_is_used_again(hopper):
    memory = torch.empty(2 * 730 * 3 * 4 * 72, dtype=torch.bfloat16, device=hopper)
    cases = [((2, 730), torch.bfloat16), ((2, 730), torch.float16), ((4, 365), torch.bfloat16)]
    for sizes, dtype in cases * 2:
        qkv = memory.view(dtype).view(*sizes, 3, 4, 72)
        assert_good(qkv.copy_(torch.randn(qkv.shape)).requires_grad_(), attention)


def test_every_gpu_has_its_own_kernels(hopper):
    for i in range(torch.cuda.device_count()):
        assert_good(draw(1, 65, 4, 72, torch.device("cuda", i), torch.bfloat16), attention)


def test_as_a_backend(hopper):
    qkv = draw(2, 65, 4, 72, hopper, torch.bfloat16)
    wanted = attention(qkv)
    assert torch.equal(attend(*qkv.unbind(2), backend="hopper"), wanted)
    assert torch.equal(attend_packed(qkv, backend="hopper"), wanted)


@pytest.mark.parametrize("size", [1.0, 10.0])
def test_the_same_bits_ten_times(hopper, size):
    qkv = draw(8, 729, 16, 72, hopper, torch.bfloat16, size=size)
    pull = torch.randn(8, 729, 16, 72, device=hopper)
    first = results(attention, qkv, pull)
    for _ in range(9):
        again = results(attention, qkv, pull)
        assert all(torch.equal(again[name], first[name]) for name in first)


def differing(result, times):
    """Compute it beside products on another stream, and count the results that differ by a bit from the first."""
    first = result()
    found = torch.zeros((), dtype=torch.int64, device=first.device)
    x = torch.ones(2048, 2048, dtype=first.dtype, device=first.device)
    y, beside = torch.empty_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(times):
        if beside.query():  # it has nothing left to do
            with torch.cuda.stream(beside):
                for _ in range(32):
                    torch.mm(x, x, out=y)
        found += (result().view(torch.int16) != first.view(torch.int16)).any()
    torch.cuda.synchronize()
    return found.item()


def test_the_same_bits_under_load(hopper):
    """Beside another kernel copies come late, and a missed barrier shows."""
    qkv = draw(4, 729, 16, 72, hopper, torch.bfloat16).detach()
    assert differing(lambda: attention(qkv), 10_000) == 0


@pytest.mark.parametrize("tokens", [17, 729, 1024])
def test_lse_is_that_of_the_other_kernel(hopper, tokens):
    for size in (1.0, 10.0):
        qkv = draw(2, tokens, 4, 72, hopper, torch.bfloat16, size=size).detach()
        found, wanted = (
            module._forward(qkv, 72**-0.5)[1] for module in (hopper_attention, flash_attention)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-3)
        assert (found[..., tokens:] == math.inf).all()
