"""The backward pass for Hopper: on a GPU against float64, elsewhere its schedule, and what the compiler says of it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton.experimental.gluon")

from backward_schedule import Pass, backward
from hypothesis import example, given
from hypothesis import strategies as st
from test_kernels_flash_attention import assert_good, draw, results
from test_kernels_hopper import SHARED, assert_compiled_for, differing, recorders

from siglip_lib.base.offers import TRITON_HEAD_DIMS as HEAD_DIMS
from siglip_lib.classroom.schedule import Deadlock, Race, run
from siglip_lib.kernels import hopper_attention, hopper_backward
from siglip_lib.kernels.device import is_interpreted
from siglip_lib.kernels.report import compile_reports, hopper_backward_launches


def assert_fast(reports):
    """What makes the kernels slow and is seen in no result."""
    for name, report in reports.items():
        assert not report.serialised, name
        assert report.spilled == 0, name
        if "delta" in name:
            continue
        _, name, dim = name.split()
        roles = hopper_backward.ROLES[name][int(dim)]
        assert report.registers <= roles.registers_at_start, (name, dim)
        assert report.shared <= SHARED, (name, dim)
        # the loop over the ring: s and dp over the channels, then sums over the rows that were read
        loops = [loop for loop in report.loops if "HGMMA" in loop]
        assert loops, (name, dim)
        for loop in loops:
            assert not {"LDL", "STL"} & set(loop), (name, dim)
            assert loop["MUFU.EX2"] == roles.read // 2, (name, dim)
            channels, parts = 4 + math.ceil((int(dim) - 64) / 16), 2 if int(dim) > 64 else 1
            sums = (2 if name == "keys" else 1) * parts * roles.read // 16
            assert loop["HGMMA"] == 2 * channels + sums, (name, dim)


def test_the_compiler_leaves_the_products_asynchronous():
    reports = compile_reports(hopper_backward_launches([72]), opcodes=True)
    assert list(reports) == ["hopper keys 72", "hopper queries 72", "hopper delta 72"]
    assert_fast(reports)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [17, 256, 729])  # as in test_kernels_hopper.py
def test_every_form_compiles(tokens):
    reports = compile_reports(hopper_backward_launches(tokens=tokens), opcodes=tokens > 64)
    if tokens > 64:
        assert_fast(reports)
    assert len(reports) == 3 * len(HEAD_DIMS)
    assert not any(report.serialised for report in reports.values())


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("name", ["keys", "queries"])
def test_shared_memory_is_used(name, dim):
    roles = hopper_backward.ROLES[name][dim]
    row = 2 * (64 + max(16, dim - 64) if dim > 64 else 64)
    lines = 8 if name == "keys" else 0
    # two places for both blocks of each consumer, and the ring; one stage more would not fit
    own = 64 * row * 4 * roles.consumers
    used = [own + roles.read * n * (2 * row + lines) for n in (roles.stages, roles.stages + 1)]
    assert used[0] + 1024 <= SHARED < used[1] + 1024


# --- the schedule ---


@given(
    tokens=st.integers(1, 70),
    pairs=st.integers(1, 3),
    consumers=st.integers(1, 3),
    stages=st.integers(2, 4),
    rows=st.sampled_from([4, 16]),
    block=st.sampled_from([4, 8, 16]),
    turns=st.booleans(),
)
@example(tokens=1, pairs=3, consumers=2, stages=2, rows=4, block=4, turns=True)
def test_the_schedule_gives_the_gradients(tokens, pairs, consumers, stages, rows, block, turns):
    torch.manual_seed(tokens)
    q, k, v, d_out = torch.randn(4, pairs, tokens, 8, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(*inputs), inputs, d_out)
    options = dict(consumers=consumers, stages=stages, rows=rows, block=block, turns=turns)
    with torch.no_grad():
        found, _ = backward(q, k, v, d_out, **options)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def low(qkv):
    """Scores so far below 0 that exp2(-lse), the weight of a key of zeros past the end, is infinite."""
    with torch.no_grad():
        qkv[:, :, 0] += 40
        qkv[:, :, 1] -= 40
    return qkv


def test_keys_past_the_end_are_masked():
    qkv = low(torch.randn(2, 21, 3, 8, dtype=torch.float64))
    q, k, v = qkv.unbind(2)
    found, _ = backward(q, k, v, torch.randn_like(q), rows=16, block=16)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("keys", [False, True])
def test_one_stage_is_too_few(keys):
    x, rows = torch.ones(1, 40, 8), torch.zeros(1, 40)
    block = Pass((x, x), (x, x), rows, rows, keys=keys, stages=1, rows=16, block=16)
    with pytest.raises(Deadlock):
        run({"producer": block.producer(), "a": block.consumer(0), "b": block.consumer(1)})


def test_a_place_is_not_given_back_before_its_gradients_have_left_it(monkeypatch):
    monkeypatch.setattr(Pass, "release", _release_at_once)
    with pytest.raises(Race, match="own 0"):
        backward(*torch.randn(4, 3, 60, 8), rows=16, block=16)


def _release_at_once(self, turn, other):
    if turn > 0:
        yield from (step for step in _RELEASE(self, turn, other) if not hasattr(step, "kind"))


_RELEASE = Pass.release


# --- what runs without a Hopper ---


@pytest.mark.parametrize("dim", [64, 72])
@pytest.mark.parametrize("tokens", [1, 70, 128])
def test_delta(dim, tokens):
    if not is_interpreted(hopper_backward._delta_kernel):
        pytest.skip("on a GPU it is tested with the others")
    out, d_out = torch.randn(2, 2, tokens, 3, dim)
    delta = torch.full((2, 3, 128), math.nan)
    constants = hopper_backward.delta_constants(dim, 3)
    hopper_backward._delta_kernel[(2 * 3,)](out, d_out, delta, tokens, 128, **constants)
    expected = (out * d_out).sum(-1).transpose(1, 2)
    torch.testing.assert_close(delta[..., :tokens], expected)
    assert (delta[..., tokens:] == 0).all()


@pytest.mark.parametrize(
    ("tokens", "tail", "many"), [(1, 16, False), (64, 64, False), (729, 32, True)]
)
def test_the_last_block_is_as_narrow_as_it_can_be(tokens, tail, many):
    for name in ("keys", "queries"):
        constants = hopper_backward.constants_of(name, 72, 16, tokens)
        assert (constants["TAIL"], constants["MANY"]) == (tail, many)


@pytest.fixture
def _another_default():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_another_default")
@pytest.mark.parametrize("dim", [64, 72, 128])
def test_what_is_launched(dim, monkeypatch):
    """An address that the kernels can't take is not given to them."""
    names = "_delta_kernel", "_backward_kernel"
    sums, passes = recorders(monkeypatch, hopper_backward, *names)
    qkv = torch.empty(2, 70, 3, 4, dim)
    n = qkv.numel() // 3
    for start in (0, 1):
        d_out, out = (torch.randn(n + 1)[start:][:n].view(2, 70, 4, dim) for _ in range(2))
        lse = torch.randn(1025, dtype=torch.float32)[start:][:1024].view(2, 4, 128)
        made = hopper_backward._backward(d_out, qkv, out, lse, 0.1)
        given = sums.launched[-1]
        assert_compiled_for(sums)
        for name, tensor in (("d_out", d_out), ("out", out)):
            assert torch.equal(given[name], tensor)
            assert (given[name] is tensor) == (start == 0)
            assert given[name].data_ptr() % 16 == 0
        keys, queries = passes.launched[-2:]
        assert (keys["KEYS"], queries["KEYS"]) == (True, False)
        assert torch.equal(queries["lse"], lse)
        assert queries["delta"] is given["delta"]
        assert keys["lse"].base is queries["lse"]
        assert keys["delta"].base is given["delta"]
        for each in (keys, queries):
            assert each["own_main"].base is each["read_main"].base is qkv
            assert each["pull_main"].base is given["d_out"]
            assert each["out_main"].base is made
            assert (each["tokens"], each["padded"], each["plain_scale"]) == (70, 128, 0.1)
    assert_compiled_for(passes)
    assert (len(sums.compiled), len(passes.compiled)) == (1, 2)


def test_gradients_take_it():
    with FlopCounterMode(display=False) as counted:
        qkv = torch.empty(2, 9, 3, 4, 72, dtype=torch.bfloat16, device="meta").requires_grad_()
        out, _ = torch.ops.siglip_lib.hopper_attention(qkv, 0.1)
        (gradient,) = torch.autograd.grad(out, qkv, torch.empty_like(out))
    assert gradient.shape == qkv.shape
    assert counted.get_total_flops() == (4 + 10) * 2 * 4 * 9 * 9 * 72
    # by the last part of an operator's name
    assert any("hopper_attention_b" in str(x) for x in counted.get_flop_counts()["Global"])


# --- on a GPU ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 17, 64, 65, 257, 729, 1024])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_real_shapes(hopper, dim, tokens, dtype):
    for batch in (1, 3):
        qkv = draw(batch, tokens, 4, dim, hopper, dtype)
        assert_good(qkv, hopper_attention.hopper_attention)
    qkv = draw(1, tokens, 4, dim, hopper, dtype, size=10.0)
    assert_good(qkv, hopper_attention.hopper_attention)


@pytest.mark.parametrize("tokens", [65, 729])
def test_scores_far_below_zero(hopper, tokens):
    qkv = low(draw(2, tokens, 4, 72, hopper, torch.bfloat16))
    assert_good(qkv, hopper_attention.hopper_attention)


def test_the_same_bits_ten_times(hopper):
    qkv = draw(8, 729, 16, 72, hopper, torch.bfloat16)
    pull = torch.randn(8, 729, 16, 72, device=hopper)
    first = results(hopper_attention.hopper_attention, qkv, pull)
    for _ in range(9):
        again = results(hopper_attention.hopper_attention, qkv, pull)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_the_same_bits_under_load(hopper):
    qkv = draw(4, 729, 16, 72, hopper, torch.bfloat16)
    pull = torch.randn(4, 729, 16, 72, device=hopper, dtype=qkv.dtype)

    def gradient():
        return torch.autograd.grad(hopper_attention.hopper_attention(qkv), qkv, pull)[0]

    assert differing(gradient, 2_000) == 0
