"""Checks of notebook 04, timing attention."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from siglip_lib.backends import attend
from siglip_lib.classroom.exercises import Unanswered, answered, exercise
from siglip_lib.classroom.exercises.helpers import first_match, has_no_code, near
from siglip_lib.classroom.machine import Timing


class _Machine:
    """A clock that only calls of its two functions move, and a record of who looked at it and who was called."""

    def __init__(self, seconds_of: Callable[[str, int, int], float]) -> None:
        self.seconds_of, self.now, self.record = seconds_of, 0.0, []

    def clock(self) -> float:
        self.record.append("clock")
        return self.now

    def first(self) -> None:
        self._run("first")

    def second(self) -> None:
        self._run("second")

    def _run(self, name: str) -> None:
        calls = [entry for entry in self.record if entry != "clock"]
        self.now += self.seconds_of(name, len(calls), calls.count(name))
        self.record.append(name)

    def ratio(self, answer: Callable, rounds: int) -> float:
        return answer(self.first, self.second, self.clock, rounds)

    def timed(self) -> list[str]:
        """The calls right between two looks at the clock."""
        triples = zip(self.record, self.record[1:], self.record[2:], strict=False)
        return [b for a, b, c in triples if a == c == "clock" != b]


def _twice(name: str, calls: int, own_calls: int) -> float:
    return {"first": 2.0, "second": 4.0}[name]


@exercise("04.1")
def in_turns(answer) -> str | None:
    rounds = 20
    machine = _Machine(_twice)
    found = answered(machine.ratio(answer, rounds))
    mistakes = {
        "that is the time of first over that of second": 0.5,
        "that is the difference in seconds; divide": 2.0 if found != 2.0 else math.nan,
    }
    if not math.isclose(found, 2.0):
        return first_match(found, mistakes, near(1e-6)) or (
            f"second takes twice as long as first, and the answer is {found:.3f}"
        )
    timed = machine.timed()
    if len(timed) != 2 * rounds or timed.count("first") != rounds:
        counts = " and ".join(str(timed.count(name)) for name in ("first", "second"))
        return f"{rounds} rounds are to time each function {rounds} times, not {counts} times"
    pairs = {tuple(timed[i : i + 2]) for i in range(0, len(timed), 2)}
    if pairs & {("first", "first"), ("second", "second")}:
        return "a machine that grows slower makes second look slow: time both in each round"
    if len(pairs) < 2:
        return "the same one is always first; let them change places from round to round"
    compiles = _Machine(
        lambda name, calls, own: 2.0 if own else {"first": 100.0, "second": 900.0}[name]
    )
    if not math.isclose(found := compiles.ratio(answer, 1), 1):
        return f"first calls compile; call each once before the clock (one round gives {found:.0f} instead of 1)"
    disturbed = _Machine(lambda name, calls, own: 500.0 if name == "first" and own == 7 else 2.0)
    if not math.isclose(found := disturbed.ratio(answer, rounds), 1):
        return f"one call of 20 was disturbed and makes the ratio {found:.2f} instead of 1: take the median"
    rushed = _Machine(lambda name, calls, own: 0.01 if name == "first" and own == 7 else 2.0)
    if not math.isclose(found := rushed.ratio(answer, rounds), 1):
        return f"one call of 20 was far too fast and makes the ratio {found:.2f} instead of 1: take the median"
    # by rounds the ratios are 4, 1/2 and 1/2
    uneven = _Machine(
        lambda name, calls, own: {"first": (4, 1, 2), "second": (2, 4, 1)}[name][own % 3]
    )
    if not math.isclose(found := uneven.ratio(answer, 3), 1):
        return (
            f"first took 1, 2 and 4 s, second 4, 1 and 2: both medians are 2, and the answer is {found:.2f} instead of"
            " 1: divide the medians of the times, and take none of ratios"
        )
    return None


def _timings(middles: dict[int, float], spread: float = 0.1) -> dict[int, Timing]:
    return {
        n: Timing(ms, ms * (1 - spread / 2), ms * (1 + spread / 2), None)
        for n, ms in middles.items()
    }


@exercise("04.2")
def overtakes(answer) -> str | None:
    second = _timings({256: 1.0, 512: 2.0, 729: 3.0, 1024: 4.0, 2048: 8.0})

    def of(**changed: float) -> dict[int, Timing]:
        middles = {256: 2.0, 512: 1.0, 729: 5.0, 1024: 2.0, 2048: 4.0}
        return _timings(middles | {int(n[1:]): ms for n, ms in changed.items()})

    found = answer(of(), dict(second))
    if found is None and has_no_code(answer):  # None alone is an answer too
        raise Unanswered
    mistakes = {
        "it is ahead there, but behind at a larger number: it must be ahead at all from there on": 512,
        "it is ahead at a smaller number too, and all from there on": 2048,
        "that is the last number at which it is behind": 729,
    }
    if found != 1024 and (reason := first_match(found, mistakes, lambda a, b: a == b)):
        return reason
    tests = [
        (of(), 1024, "the ahead ones are 512, 1024 and 2048"),
        (dict(reversed(of().items())), 1024, "the numbers need not come in order"),
        (of(n1024=3.9), 2048, "at 1024 the difference is within the spread"),
        (of(n729=1.0), 512, "it is behind at 256 alone"),
        (of(n256=0.5, n729=1.0), 256, "it is ahead at all"),
        (of(n2048=9.0), None, "it is behind at the largest number"),
    ]
    all_found = [answer(first, dict(second)) for first, _, _ in tests]
    if all_found == [None] * 5 + [2048]:
        return "first and second are exchanged: the answer is where first is faster"
    for (_, right, words), found in zip(tests, all_found, strict=True):
        if found != right:
            return f"the answer is {found}, not {right}: {words}"
    return None


@exercise("04.3")
def missed(answer) -> str | None:
    generator = torch.Generator().manual_seed(0)

    def draw(batch: int, tokens: int, head_dim: int, scale: float = 1.0) -> list[Tensor]:
        x = torch.randn(3, batch, tokens, 2, head_dim, generator=generator)
        return list(x * torch.tensor([scale, scale, 1.0]).view(3, 1, 1, 1, 1))

    inputs = draw(4, 256, 72)
    answered(answer(*inputs))
    ends = torch.tensor([0, -1])
    if not (off := _error(answer, inputs, ends)) <= 1e-5:
        return f"the check notices it: the error is {off:.1e} on the first or the last sample"
    # the notebook's text has the same list
    lengths, widths = (1, 2, 63, 64, 65, 100, 257, 511, 729), (32, 64, 80, 96, 128)
    scales = (6, 30)
    elsewhere = [
        *(inputs, draw(1, 256, 72)),
        *(draw(2, 256, 72, scale) for scale in scales),
        *(draw(2, tokens, 72) for tokens in lengths),
        *(draw(2, 256, head_dim) for head_dim in widths),
    ]
    least = 0.05 * (1 - 1e-3)  # 5 %, but for what float32 rounds
    if any(not _error(answer, some) < least for some in elsewhere):
        return None
    return (
        "it is right wherever we looked: the two other samples, one sample alone,"
        f" {', '.join(map(str, lengths))} tokens, head_dim {', '.join(map(str, widths))}, scores"
        f" {' and '.join(str(scale**2) for scale in scales)} times as large; break it in one of these"
    )


def _error(fn: Callable[..., Tensor], inputs: list[Tensor], samples: object = slice(None)) -> float:
    """The worst of output and gradients, each relative to its largest value, on some samples."""
    results = []
    factors = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    for run, dtype in ((fn, torch.float32), (attend, torch.float64)):
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in inputs)
        out = run(q, k, v)
        grads = torch.autograd.grad((out * factors).sum(), (q, k, v), allow_unused=True)
        grads = [
            torch.zeros_like(x) if g is None else g for g, x in zip(grads, (q, k, v), strict=True)
        ]
        results.append([x.detach()[samples].double() for x in (out, *grads)])
    pairs = zip(*results, strict=True)
    # for one key the gradients of q and k are 0
    errors = [((a - b).abs().max() / b.abs().max().clamp(min=1e-2)).item() for a, b in pairs]
    return max(errors, key=lambda off: math.inf if math.isnan(off) else off)
