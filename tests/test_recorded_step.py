"""RecordedStep: when it runs a step, when it records it, and when it replays it; the graph is pretended."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from siglip_lib.train.recorded_step import RecordedStep

GPU = torch.device("cuda")


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What happens, in order; a graph in the place of CUDA's replays by adding 10 to its result."""
    events = []

    class Graph:
        def replay(self):
            events.append("replay")
            self.result.add_(10)

    @contextmanager
    def graph(own, stream, capture_error_mode):
        events.append(f"record on {stream}, {capture_error_mode}")
        own.result = torch.zeros(())
        events.append(own.result)  # for the step to return
        yield
        events.remove(own.result)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return events


def a_step(events):
    def step():
        kept = next((x for x in events if isinstance(x, torch.Tensor)), None)
        events.append("step")
        return torch.ones(()) if kept is None else kept

    return step


def an_optimizer(events):
    return SimpleNamespace(zero_grad=lambda set_to_none: events.append(f"freed {set_to_none}"))


def test_it_runs_then_records_once_then_replays(log):
    step, recorder = a_step(log), RecordedStep(an_optimizer(log), GPU, eager=2, stream="its own")
    found = []
    for _ in range(5):
        before = recorder.recorded
        found.append((before, recorder(step).item()))
    assert found == [(False, 1), (False, 1), (False, 10), (True, 20), (True, 30)]
    assert log == [
        "step", "step",
        "freed True", "record on its own, thread_local", "step", "replay",
        "replay", "replay",
    ]  # fmt: skip


def test_released_it_begins_anew(log):
    step, recorder = a_step(log), RecordedStep(an_optimizer(log), GPU, eager=1)
    for _ in range(3):
        recorder(step)
    log.clear()
    recorder.release()
    assert not recorder.recorded
    for _ in range(2):
        recorder(step)
    assert log == ["step", "freed True", "record on None, thread_local", "step", "replay"]


def test_what_fails_while_it_is_recorded_leaves_no_graph(log):
    recorder = RecordedStep(an_optimizer(log), GPU, eager=0)

    def failing():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        recorder(failing)
    assert not recorder.recorded
    assert "replay" not in log


@pytest.mark.parametrize(("device", "eager"), [("cpu", 0), ("cuda", math.inf)])
def test_a_cpu_and_whoever_asks_for_it_never_records(device, eager, log):
    step = a_step(log)
    recorder = RecordedStep(an_optimizer(log), torch.device(device), eager=eager)
    assert [recorder(step).item() for _ in range(20)] == [1] * 20
    assert log == ["step"] * 20
    assert not recorder.recorded
