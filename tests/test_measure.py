"""measure and the reports on device and versions."""

import importlib.metadata
import itertools
import random
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from siglip_lib import (
    device_report,
    kernel_times,
    measure,
    measure_together,
    package_version,
    spread_report,
)
from siglip_lib.classroom import Timing
from siglip_lib.classroom.machine import _side_stream


def test_times_are_in_order_and_in_milliseconds():
    naps = iter([0, 0.002, 0.2, 0.06])
    timing = measure(lambda: time.sleep(next(naps)), "cpu", repeats=3, warmup=1)
    assert timing.fastest_ms <= timing.median_ms <= timing.slowest_ms
    assert 2 <= timing.fastest_ms < 60 <= timing.median_ms < 200 <= timing.slowest_ms < 2000
    assert timing.peak_bytes is None


@pytest.mark.parametrize(("repeats", "warmup"), [(1, 0), (4, 2)])
def test_calls_as_often_as_asked(repeats, warmup):
    calls = []
    measure(lambda: calls.append(1), torch.device("cpu"), repeats=repeats, warmup=warmup)
    assert len(calls) == repeats + warmup


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats=0 must be at least 1, warmup=3 at least 0"),
        ({"warmup": -1}, "repeats=20 must be at least 1, warmup=-1 at least 0"),
        ({"graph": True}, "graph=True needs a CUDA device"),
    ],
)
def test_wrong_arguments_are_told_before_any_call(options, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below
        measure(lambda: pytest.fail("was called"), "cpu", **options)
    assert str(caught.value) == message


def test_turns_change_their_order_and_time_the_second_call():
    calls = []
    fns = {name: partial(calls.append, name) for name in "abc"}
    found = measure_together(fns, "cpu", repeats=12, warmup=2)
    assert list(found) == ["a", "b", "c"]
    assert calls[:6] == [*"aabbcc"]
    turns = calls[6:]
    assert turns[::2] == turns[1::2]
    rounds = [tuple(turns[i : i + 6 : 2]) for i in range(0, len(turns), 6)]
    assert len(rounds) == 12
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) >= 3
    assert {one[0] for one in rounds} == {"a", "b", "c"}


def test_each_turn_has_its_own_time_in_milliseconds():
    def alternating():
        time.sleep(next(naps))

    naps = itertools.cycle([0.1, 0.01])  # the second of each turn is the shorter
    found = measure_together(
        {"alternating": alternating, "nothing": lambda: None}, "cpu", repeats=5, warmup=0
    )
    assert 10 <= found["alternating"].median_ms < 100
    assert found["nothing"].median_ms < 10
    assert found["nothing"].peak_bytes is None


def test_times_are_kept_in_the_order_of_the_rounds(monkeypatch):
    clock = itertools.accumulate([0, 0.5, 0, 4, 0, 2, 0, 1])  # seconds between two looks at it
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    found = measure_together({"a": int}, "cpu", repeats=4, warmup=0)["a"]
    assert found.times_ms == (500, 4000, 2000, 1000)
    assert (found.median_ms, found.fastest_ms, found.slowest_ms) == (1500, 500, 4000)


def test_turns_leave_the_random_generators_alone():
    before = random.getstate()
    measure_together({"a": int, "b": int}, "cpu")
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats=0 must be at least 1"),
        ({"warmup": -1}, "warmup=-1 at least 0"),
        ({"graph": True}, "graph=True needs a CUDA device"),
        ({"fns": {}}, "fns has no function to time"),
    ],
)
def test_wrong_arguments_of_turns_are_told_before_any_call(options, message):
    fns = options.pop("fns", {"a": lambda: pytest.fail("was called")})
    with pytest.raises(ValueError, match=message):
        measure_together(fns, "cpu", **options)


@pytest.mark.parametrize("graph", [False, True])
def test_turns_on_a_gpu(graph, gpu):
    x, large = torch.randn(1024, 1024, device=gpu), torch.randn(4096, 4096, device=gpu)
    fns = {"large": lambda: large @ large, "small": lambda: x @ x}
    found = measure_together(fns, gpu, repeats=5, graph=graph)
    assert found["large"].fastest_ms > found["small"].median_ms > 0
    assert not found["large"].is_level(found["small"])
    assert found["large"].peak_bytes >= large.nbytes > found["small"].peak_bytes >= x.nbytes


def test_level_are_ranges_that_overlap():
    timing = Timing(2.0, 1.9, 2.1, None)
    for other, level in (
        (Timing(2.15, 2.05, 3.0, None), True),
        (Timing(2.5, 2.1, 2.9, None), True),
        (Timing(2.0, 1.0, 9.0, None), True),
        (Timing(2.5, 2.2, 2.9, None), False),
        (Timing(1.5, 1.4, 1.8, None), False),
    ):
        assert timing.is_level(other) is level
        assert other.is_level(timing) is level


@pytest.mark.parametrize("graph", [False, True])
def test_on_a_gpu(graph, gpu):
    x = torch.randn(1024, 1024, device=gpu)
    timing = measure(lambda: x @ x, gpu, repeats=5, graph=graph)
    assert 0 < timing.fastest_ms <= timing.median_ms <= timing.slowest_ms
    assert x.nbytes <= timing.peak_bytes < 2**28


@pytest.fixture
def pretended(monkeypatch):
    """A GPU that is not there; returns by name what it has: the current stream, the streams made, the recordings."""
    has = SimpleNamespace(stream="main", made=[], recordings=[])

    def stream_of(device):
        has.made.append(f"side {len(has.made)}")
        return SimpleNamespace(name=has.made[-1], wait_stream=lambda other: None)

    @contextmanager
    def stream(new):
        before, has.stream = has.stream, new.name
        try:
            yield
        finally:
            has.stream = before

    @contextmanager
    def graph(recorded, pool, stream):
        has.recordings.append((stream.name, pool))
        before, has.stream = has.stream, stream.name
        yield
        has.stream = before  # as with torch's own not after a failure

    def event(enable_timing):
        return SimpleNamespace(record=lambda: None, elapsed_time=lambda other: 1.0)

    main = SimpleNamespace(name="main", wait_stream=lambda other: None)
    fakes = dict(
        device=lambda device: nullcontext(), current_device=lambda: 0, current_stream=lambda: main,
        Stream=stream_of, stream=stream, graph=graph, graph_pool_handle=lambda: "pool", Event=event,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None), empty_cache=lambda: None,
        synchronize=lambda: None, reset_peak_memory_stats=lambda: None,
        memory_allocated=lambda: 0, max_memory_allocated=lambda: 0,
    )  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    _side_stream.cache_clear()
    yield has
    _side_stream.cache_clear()


def test_graphs_are_recorded_on_one_stream_on_which_they_ran_before(pretended):
    calls = []
    fns = {name: lambda: calls.append(pretended.stream) for name in "ab"}
    measure_together(fns, "cuda", warmup=2, graph=True)
    measure(fns["a"], "cuda", warmup=2, graph=True)
    assert len(pretended.made) == 1  # each has workspaces of cuBLAS, which are never given back
    assert pretended.recordings == [("side 0", "pool"), ("side 0", "pool"), ("side 0", None)]
    side = ["side 0"] * 3  # two calls, and one that is recorded
    assert calls == ["main", "main", *side, *side, "main", *side]
    assert pretended.stream == "main"


def test_what_can_not_be_recorded_leaves_the_stream(pretended):
    left = iter([None, None])  # as many calls as come before the recording

    with pytest.raises(StopIteration):
        measure(lambda: next(left), "cuda", warmup=1, graph=True)
    assert len(pretended.recordings) == 1
    assert pretended.stream == "main"


def test_on_a_gpu_graphs_hold_no_memory_when_they_are_gone(gpu):
    def both(q, k):
        out = (q @ k.mT).softmax(-1) @ k
        return torch.autograd.grad(out.sum(), (q, k))  # by a thread that has workspaces of its own

    def held(*sizes):
        inputs = [torch.randn(2, 2, n, 64, device=gpu, requires_grad=True) for n in sizes]
        measure_together({x: partial(both, *x) for x in inputs}, gpu, repeats=2, graph=True)
        del inputs
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    first = held(256, 128)
    assert max(held(2048, 512), held(512, 4096), held(1024, 2048)) <= first


def test_kernel_times_name_what_takes_the_time(device, capfd):
    x, y = torch.randn(1024, 1024, device=device), torch.randn(8, device=device)
    calls = []

    def call():
        calls.append(x @ x + y.sum())

    found = kernel_times(call, device)
    assert len(calls) == 1
    assert list(found.values()) == sorted(found.values(), reverse=True)
    longest = next(iter(found))
    assert any(word in longest for word in ("mm", "gemm", "nvjet", "cutlass"))
    # a product of 1024 takes 2 GFLOP: not under 1 us anywhere, nor a second
    assert 1e-3 < found[longest] < 1e3
    assert capfd.readouterr().err == ""


def test_the_spread_of_repeats_tells_of_a_neighbour():
    calm, disturbed = Timing(2.0, 1.9, 2.1, None), Timing(2.0, 1.5, 2.5, None)
    assert calm.spread == pytest.approx(0.1)
    assert spread_report([calm, calm, disturbed]) == (
        "spread of the repeats: 10% of the median, at most 50%"
    )
    assert "DISTURBED: something else uses this machine" in spread_report([calm, disturbed])


def test_package_version():
    assert package_version("torch") == importlib.metadata.version("torch")
    assert package_version("no-such-package") is None


def test_device_report_names_device_and_versions(device):
    first, second = device_report(device).splitlines()
    assert first.startswith("device: CPU" if device.type == "cpu" else "device: NVIDIA")
    assert f"torch {torch.__version__}" in second
    for package in ("flash-attn", "xformers", "triton"):
        assert f"{package} {package_version(package) or 'absent'}" in second
