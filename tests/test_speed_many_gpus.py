"""What the tool says of a profile: how much of what travels is hidden, a call's part of several."""

import pytest
import speed_many_gpus
import torch
import torch.distributed as dist
from speed_many_gpus import merged, together


def test_what_is_hidden_is_the_travelling_beside_something_computed(monkeypatch):
    monkeypatch.setattr(speed_many_gpus, "STEPS", 2)
    # two calls of 10 ms: each computes from 1 to 8, in two kernels, and sends from 0 to 2 and from 7 to 10
    one = [(1, 5, False), (4, 8, False), (0, 2, True), (7, 10, True)]
    kernels = [(start + at + 3, end + at + 3, sends) for at in (0, 10) for start, end, sends in one]
    found = together(kernels)
    assert found["ms"] == 10
    assert found["travelling_ms"] == 5
    assert found["computing_ms"] == 7
    assert found["hidden"] == pytest.approx(2 / 5)
    # of the first call alone; what lies together is one bar, across the calls' border too
    assert found["computing"] == [[1, 8]]
    assert found["travelling"] == [[0, 2], [7, 12]]


def test_without_kernels_nothing_is_said():
    assert together([]) == {}


def test_a_share_that_rounding_makes_less_than_nothing_is_said_to_be_nothing(monkeypatch):
    lines = []
    monkeypatch.setattr(speed_many_gpus, "say", lines.append)
    times = {"ms_without_profiler": 9.0, "ms_with_profiler": 9.0, "travelling_ms": 0.5}
    speed_many_gpus.say_travel("gathered", times | {"hidden": -3e-15})
    speed_many_gpus.say_travel("ring", times | {"hidden": 0.87})
    assert [line.split(", ")[-1].split(" of ")[0] for line in lines] == ["0%", "87%"]


def test_intervals_that_touch_or_lie_near_become_one():
    assert merged([(3, 4), (0, 1), (1, 2)]) == [(0, 2), (3, 4)]
    assert merged([(0, 2), (1, 1.5), (2.5, 3)], gap=0.5) == [(0, 3)]


def test_the_largest_batches_stand_one_below_the_other(monkeypatch):
    lines = []
    for name, stand_in in (("say", lines.append), ("worst", float), ("draw", lambda *_: None)):
        monkeypatch.setattr(speed_many_gpus, name, stand_in)
    monkeypatch.setattr(speed_many_gpus, "forward_backward", lambda function, arguments: [])
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    found = speed_many_gpus.largest(torch.device("cpu"), small=True)
    assert [one["global_batch"] for one in found.values()] == [512] * 4
    assert len({line.index("256 pairs a GPU") for line in lines}) == 1, lines
