"""The model of the Hopper kernel's schedule: right by every size, and each mistake in it is found."""

import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from siglip_lib.classroom import hopper_schedule
from siglip_lib.classroom.hopper_schedule import Costs, ThreadBlock, attention
from siglip_lib.classroom.schedule import (
    Arrive,
    Barrier,
    Buffer,
    Deadlock,
    Race,
    Span,
    Sums,
    Wait,
    busy_shares,
    run,
)


def draw(pairs, tokens, channels=8):
    return torch.randn(3, pairs, tokens, channels, dtype=torch.float64)


def assert_right(out, q, k, v):
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@given(
    tokens=st.integers(1, 70),
    pairs=st.integers(1, 3),
    consumers=st.integers(1, 4),
    stages=st.integers(2, 5),
    rows=st.sampled_from([4, 8, 16]),
    exact=st.booleans(),
    parts=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 9),
)
def test_every_size_is_right(tokens, pairs, consumers, stages, rows, exact, parts, seed):
    torch.manual_seed(seed)
    q, k, v = draw(pairs, tokens)
    out, spans = attention(
        q, k, v, consumers=consumers, stages=stages, rows=rows, exact=exact, parts=parts
    )
    assert_right(out, q, k, v)
    for unit in ("copy", "product", "exponential"):
        mine = sorted((span.start, span.end) for span in spans if span.unit == unit)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(mine)), unit


def test_a_role_does_one_thing_at_a_time_but_starts_copies_and_products():
    _, spans = attention(*draw(2, 40), rows=8, consumers=2)
    for name in ("consumer 0", "consumer 1"):
        mine = [s for s in spans if s.role == name and s.unit == "exponential"]
        assert all(a.end <= b.start for a, b in itertools.pairwise(mine))
    assert {s.unit for s in spans if s.role == "producer"} == {"copy"}
    assert {s.unit for s in spans if s.role == "consumer 0"} == {"copy", "product", "exponential"}


def test_work_is_counted():
    costs = Costs(scores=16, values=8, exponentials=4, copy=2, latency=0)
    _, spans = attention(*draw(1, 12), rows=4, consumers=1, costs=costs)
    done = {
        unit: sum(s.end - s.start for s in spans if s.unit == unit)
        for unit in ("product", "exponential", "copy")
    }
    blocks = 3 * 3
    assert done == {
        "product": blocks * (16 + 8),
        "exponential": blocks * 4,
        "copy": 2 * (3 + 2 * blocks + 3),
    }


def test_what_waits_for_what():
    """By hand, of one consumer with two blocks of keys, a stage for each: what is read has arrived, and is finished."""
    costs = Costs(scores=16, values=8, exponentials=4, copy=2, latency=10)
    _, spans = attention(*draw(1, 8), rows=4, consumers=1, stages=2, parts=1, costs=costs)
    found = [(s.start, s.end, s.unit) for s in spans if s.role == "consumer 0"][:6]
    assert found == [
        (16, 32, "product"),  # scores: the values of the stage end at 6, and arrive 10 later
        (32, 36, "exponential"),
        (36, 44, "product"),
        (44, 60, "product"),  # of the second block
        (60, 64, "exponential"),
        (64, 72, "product"),
    ]
    copies = [s.start for s in spans if s.role == "producer"]
    assert copies[:6] == [0, 2, 4, 6, 8, 10]  # queries, two stages, and the next queries
    assert (
        copies[6] == 60
    )  # into the first stage again, once the products that read it are finished


def test_busy_shares():
    spans = [Span("a", "copy", 0, 4), Span("b", "product", 4, 6), Span("b", "product", 6, 8)]
    assert busy_shares(spans) == {"copy": 0.5, "product": 0.5, "exponential": 0.0}


def test_more_consumers_hide_more():
    ends = []
    for consumers in (1, 2, 4):
        _, spans = attention(*draw(4, 64), rows=8, consumers=consumers)
        ends.append(max(span.end for span in spans))
    assert ends[0] > 1.5 * ends[1] > 1.5 * ends[2]


def test_one_stage_is_a_deadlock():
    with pytest.raises(Deadlock) as error:
        attention(*draw(1, 16), rows=8, consumers=2, stages=1)
    assert str(error.value) == (
        "producer waits for empty[0], whose phase 0 lacks 2 of 2 arrivals;"
        " consumer 0 waits for full[0], whose phase 1 lacks 1 of 1 arrivals;"
        " consumer 1 waits for full[0], whose phase 1 lacks 1 of 1 arrivals"
    )


# what the schedule is changed to, and what is found
MISTAKES = {
    "the producer waits for a phase that has not begun": (
        "stage, phase = 0, 1", "stage, phase = 0, 0", Deadlock, r"producer waits for empty\[0\]"),
    "a phase does not change round the ring": (
        "else (0, phase ^ 1)", "else (0, phase)", Race, r"producer: [kv]\[.\] is overwritten"),
    "a stage is used again before it is empty": (
        "yield Wait(self.empty[stage], phase)\n", "pass\n", Race, r"producer: [kv]\[.\] is overwritten"),
    "a stage is empty when one consumer is done": (
        'Barrier(f"empty[{i}]", consumers)', 'Barrier(f"empty[{i}]", 1)', Race, r"producer: [kv]\[.\] is overwritten"),
    "a stage is full when its keys are there": (
        "yield Arrive(self.full[stage], copies=2)", "yield Arrive(self.full[stage], copies=1)", Race, r"[kv]\[.\] is"),
    "a stage is given back while products read it": (
        "yield Finish(Product)\n                yield Arrive(self.empty[stage])",
        "yield Arrive(self.empty[stage])\n                yield Finish(Product)", Race,
        r"producer: [kv]\[.\] is overwritten"),
    "a stage is never given back": (
        "                yield Arrive(self.empty[stage])\n                if block", "                if block",
        Deadlock, r"producer waits for empty\[.\]"),
    "keys are read before they are there": (
        "                yield Wait(self.full[ahead], phase)\n                scores",
        "                scores", Race, r"consumer .: k\[.\] is read"),
    "scores are used before they are finished": (
        "scores = yield from self._scores(self.places[here][index], ahead, self.rows)\n"
        "                yield Finish(Product)",
        "scores = yield from self._scores(self.places[here][index], ahead, self.rows)", Race, "nobody has waited"),
    "queries are waited for in the wrong phase": (
        "(turn // 2 % 2) ^ 1)", "turn // 2 % 2)", Deadlock, r"producer waits for q_empty\[0, 0\]"),
    "the next queries are not waited for": (
        "yield Wait(self.q_full[other][index], (turn + 1) // 2 % 2)", "pass", Race, r"q\[1, .\] is read"),
    "queries overwrite an output that has not left": (
        'has left it."""\n        yield Finish(Store)', 'has left it."""', Race, r"producer: q\[., .\] is overwritten"),
    "the mask of the last block is off": (
        ".masked_fill(~masked, -math.inf)", "", None, ""),
    "the output is not rescaled": ("o.value * shrink", "o.value", None, ""),
    "the sum is not rescaled": ("total * shrink", "total", None, ""),
    "the output is rescaled the other way": ("torch.exp2(m - most)", "torch.exp2(most - m)", None, ""),
    "all consumers take the first queries": (
        "queries = self.copied(self.q[pair], first + i * self.rows)", "queries = self.copied(self.q[pair], first)",
        None, ""),
    "keys of one block meet values of another": (
        "self.values[stage], rows, o", "self.values[(stage + 1) % self.stages], rows, o", Race, r"v\[.\] is read"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_found(mistake):
    old, new, error, message = MISTAKES[mistake]
    source = inspect.getsource(hopper_schedule)
    assert source.count(old) == 1
    changed = {"__name__": "changed"}
    exec(compile(source.replace(old, new), "changed", "exec"), changed)
    q, k, v = draw(4, 43)
    if error:
        with pytest.raises(error, match=message):
            changed["attention"](q, k, v, rows=8, consumers=2, stages=3)
    else:
        out, _ = changed["attention"](q, k, v, rows=8, consumers=2, stages=3)
        with pytest.raises(AssertionError, match="not close"):
            assert_right(out, q, k, v)


@pytest.mark.parametrize("exact", [True, False])
def test_lse(exact):
    q, k, v = draw(2, 43)
    block = run_block(q, k, v, exact=exact)
    expected = (q @ k.mT * q.shape[-1] ** -0.5).logsumexp(2) * math.log2(math.e)
    torch.testing.assert_close(block.lse, expected, rtol=0, atol=1e-12)
    assert block.redo() == 0


def run_block(q, k, v, **options):
    block = ThreadBlock(q, k, v, rows=8, consumers=2, **options)
    roles = {str(i): block.consumer(i) for i in range(2)}
    run({"producer": block.producer()} | roles)
    return block


def test_a_tile_whose_reference_was_bad_is_computed_again():
    q, k, v = draw(1, 24)
    k[:, -8:] = 0  # the block that comes first
    k[:, 0] = 100 * q[:, 9]  # one query's score is far larger
    q[:, :8] = q[:, 16:] = 0
    block = run_block(q, k, v, exact=False)
    lost = block.lse.isnan()
    assert lost[0, 9]
    assert not lost[0, :8].any()
    assert not lost[0, 16:].any()
    block.out[0, 10] = math.nan  # of the same tile; another is left as it is
    block.out[0, 17] = 5
    assert block.redo() == 1
    assert (block.out[0, 17] == 5).all()
    block.out[0, 17] = block.out[0, 18]  # the same query
    assert_right(block.out, q, k, v)
    assert not block.lse.isnan().any()
    k[:, 0] *= 10
    few = [x.float() for x in (q, k, v)]
    assert run_block(*few, exact=False).out.isnan().any()  # no float32 holds such a weight
    out, _ = attention(*few, rows=8, exact=False)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*few))
    assert run_block(q, k, v).redo() == 0


def test_parity_of_a_barrier():
    barrier = Barrier("b", 2)
    assert (barrier.ended(0), barrier.ended(1)) == (False, True)
    barrier.take(0.0, set(), arrivals=1)
    assert not barrier.ended(0)
    barrier.take(5.0, set(), arrivals=1)
    assert (barrier.ended(0), barrier.ended(1), barrier.time) == (True, False, 5.0)


def test_a_barrier_passes_on_what_is_done():
    """The time of the last to arrive, and what each of them knew."""
    barrier, times = Barrier("b", 2), []

    def arrives():
        yield Arrive(barrier)

    def waits():
        yield Wait(barrier, 0)
        times.append(barrier.time)

    assert run({"a": arrives(), "b": arrives(), "c": waits()}) == []
    assert times == [0.0]
    with pytest.raises(Deadlock, match=r"c waits for b, whose phase 1 lacks 2 of 2 arrivals"):
        run({"c": iter([Wait(barrier, 1)])})


def test_sums_and_buffers_begin_empty():
    assert Sums().value == 0.0
    assert Buffer("k").content.isnan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rows=12), "rows=12 must be a power of two"),
        (dict(rows=8, parts=3), "parts=3"),
        (dict(consumers=0), "consumers"),
        (dict(stages=0), "stages"),
    ],
)
def test_wrong_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        attention(*draw(1, 9), **options)


def test_wrong_shapes():
    q, k, v = draw(1, 9)
    with pytest.raises(ValueError, match=r"shapes \(1, 9, 8\), \(1, 8, 8\), \(1, 9, 8\)"):
        attention(q, k[:, 1:], v)
