"""What the tool says of a profile: how much of what travels is hidden, a call's part of several."""

from types import SimpleNamespace

import pytest
import speed_many_gpus
import torch
import torch.distributed as dist
from speed_many_gpus import merged, nearest, ratios, together

from siglip_lib.siglip import gathered_loss, loss_pairs, ring_loss


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
    # of the first call alone, though the second sends at once; what lies together is one bar
    assert found["computing"] == [[1, 8]]
    assert found["travelling"] == [[0, 2], [7, 10]]


def test_without_kernels_nothing_is_said():
    assert together([]) == {}


def test_a_share_that_rounding_makes_less_than_nothing_is_said_to_be_nothing(monkeypatch):
    lines = []
    monkeypatch.setattr(speed_many_gpus, "say", lines.append)
    seen = {"travelling_ms": 0.5, "hidden_range": [-2e-15, 0.91]}
    ranks = [seen | {"hidden": -3e-15}, seen | {"hidden": 0.87}]
    times = {"ms_without_profiler": 9.0, "ms_with_profiler": 9.0}
    speed_many_gpus.say_travel("gathered", times | {"ranks": ranks})
    speed_many_gpus.say_travel("ring", {})  # on a CPU
    assert [line.split(", ")[-1].split(" of ")[0] for line in lines] == ["0%", "87%"]
    assert ["rank 0" in line for line in lines] == [True, False]
    assert all("(0% to 91% in 7 profiles)" in line for line in lines), lines


def test_the_profile_is_told_whose_time_is_nearest_to_the_one_without_a_profiler():
    alone = [9.0, 30.0, 9.2]  # one call in three was held up
    # neither the fastest, nor the one that hides most, nor the one nearest to the mean, 16.1
    profiles = [(8.8, {"hidden": 0.2}), (9.3, {"hidden": 0.5}), (16.0, {"hidden": 0.9})]
    times, found = nearest(alone, profiles)
    assert times == {"ms_without_profiler": 9.2, "ms_with_profiler": 9.3}
    assert found == {"hidden_range": [0.2, 0.9], "hidden": 0.5}


def test_intervals_that_touch_or_lie_near_become_one():
    assert merged([(3, 4), (0, 1), (1, 2)]) == [(0, 2), (3, 4)]
    assert merged([(0, 2), (1, 1.5), (2.5, 3)], gap=0.5) == [(0, 3)]


def test_ratios_are_of_the_same_round():
    assert ratios([3.0, 1.5, 9.0], [2.0, 1.0, 6.0]) == [1.5, 1.5, 1.5]
    # here the medians, 3 and 2, would say 1.5
    assert ratios([3.0, 1.0, 9.0], [1.0, 2.0, 3.0]) == [3.0, 0.5, 3.0]


def test_a_line_tells_in_how_many_rounds_a_form_was_slower():
    found = {"ms": 9.0, "fastest_ms": 8.0, "slowest_ms": 11.0, "peak_gib": 0.5}
    told = speed_many_gpus.line(found | {"ratios": [0.98, 1.03, 1.0, 1.01, 1.02]})
    assert told.endswith("of the ring's time 1.010, slower in 3 of 5 rounds")
    assert speed_many_gpus.line(found) == "9.00 ms (8.00 to 11.00), 0.50 GiB"


@pytest.fixture
def one_rank(monkeypatch):
    """Rank 0 of a world of one, without a process group."""
    monkeypatch.setattr(ring_loss, "check_all_ranks", lambda *_: None)
    for name, value in (("get_rank", 0), ("get_world_size", 1)):
        monkeypatch.setattr(dist, name, lambda *_, value=value: value)


@pytest.mark.parametrize(
    ("function", "order"),
    [
        (speed_many_gpus.ring_sigmoid_loss, "ca ca a"),
        (speed_many_gpus.waiting_ring_loss, "ac ac a"),
    ],
)
def test_the_waiting_ring_computes_when_the_message_has_arrived(
    one_rank, monkeypatch, function, order
):
    happened = []

    def add(*_):
        happened.append("c")  # computed
        return torch.zeros(()), torch.zeros(())

    arrives = SimpleNamespace(wait=lambda: happened.append("a"))
    monkeypatch.setattr(ring_loss, "_pass_on", lambda *_: [arrives])
    monkeypatch.setattr(ring_loss, "TEXTS", 3)
    monkeypatch.setattr(loss_pairs, "sigmoid_loss_block", add)
    function(torch.ones(6, 2), torch.ones(6, 2), torch.tensor(1.0), torch.tensor(0.0))
    assert "".join(happened) == order.replace(" ", "")
    assert ring_loss._pass_on() == [arrives]  # whoever comes next has the ring as it is


def test_the_compiled_form_gathers_and_leaves_the_rest_to_the_compiler(one_rank, monkeypatch):
    monkeypatch.setattr(gathered_loss, "_gathered", lambda x, group: x)
    before = gathered_loss.loss_against_all
    monkeypatch.setattr(speed_many_gpus, "_compiled", lambda *of: ("compiled", *of))
    image, text, scalar = torch.zeros(4, 2), torch.ones(4, 2), torch.tensor(1.0)
    name, *given = speed_many_gpus.compiled_gathered_loss(image, text, scalar, scalar)
    assert name == "compiled"
    assert given[0] is image
    assert torch.equal(given[1], text)
    assert given[-1] == 0
    assert gathered_loss.loss_against_all is before


def test_the_largest_batches_stand_one_below_the_other(monkeypatch):
    lines = []
    for name, stand_in in (("say", lines.append), ("worst", float), ("draw", lambda *_: None)):
        monkeypatch.setattr(speed_many_gpus, name, stand_in)
    monkeypatch.setattr(speed_many_gpus, "forward_backward", lambda function, arguments: [])
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    found = speed_many_gpus.largest(torch.device("cpu"), small=True)
    assert [one["global_batch"] for one in found.values()] == [512] * 4
    assert len({line.index("256 pairs a GPU") for line in lines}) == 1, lines
