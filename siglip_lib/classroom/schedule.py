"""A model of a multiprocessor of Hopper, for any machine: who copies, who computes, who waits for whom, and when.

Each role of a kernel is a generator here, as in classroom/hopper_schedule.py. It yields what it does, and ``run`` lets
the role that is furthest behind in time do its next step. Copies, products and stores go on by themselves: a role
starts them, and learns from a barrier, or by ``Finish``, that they are done.

What goes wrong on a GPU once in ten thousand launches goes wrong here each time. When all wait, ``Deadlock`` tells who
waits for what. When a buffer is written or read and no chain of barriers says that what went before is done, it is a
``Race``, even if it would have been done in time.
"""

import math
from collections.abc import Generator, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Deadlock(RuntimeError):
    """All roles that have not ended wait."""


class Race(RuntimeError):
    """A role uses what may still be written or read."""


class Barrier:
    """An mbarrier: its phase ends when ``count`` have arrived, and all copies that it was told to expect."""

    def __init__(self, name: str, count: int):
        self.name, self.count = name, count
        self.missing, self.copies, self.phases = count, 0, 0
        self.time, self.known = 0.0, set()  # when the last phase ended, and what is done by then
        self._time, self._known = 0.0, set()  # the same of the phase that goes on

    def take(self, time: float, known: set, arrivals: int = 0, copies: int = 0) -> None:
        self.missing, self.copies = self.missing - arrivals, self.copies + copies
        self._time, self._known = max(self._time, time), self._known | known
        if self.missing == self.copies == 0:
            self.time, self.known = self._time, self.known | self._known
            self.missing, self.phases = self.count, self.phases + 1

    def ended(self, parity: int) -> bool:
        """Whether the phase of this parity is the last that ended; before the first, one of parity 1 has."""
        return self.phases % 2 != parity


class Buffer:
    """Shared memory: what lies there, and who has written and read it since."""

    def __init__(self, name: str):
        self.name, self.content = name, torch.tensor(math.nan)
        self.written, self.read = set(), set()


class Sums:
    """The registers that a product adds to. They have no value before it is finished."""

    def __init__(self, value: Tensor | float = 0.0):
        self._value, self.products = value, set()

    @property
    def value(self) -> Tensor:
        if self.products:
            raise Race("the result of a product is used, and nobody has waited for it")
        return self._value

    @value.setter
    def value(self, value: Tensor) -> None:
        _ = self.value
        self._value = value


# --- what a role can yield ---


@dataclass
class Wait:
    """Wait until the barrier's phase of a parity has ended."""

    barrier: Barrier
    parity: int


@dataclass
class Arrive:
    """Arrive at a barrier, and tell it how many copies to expect."""

    barrier: Barrier
    copies: int = 0


@dataclass
class Copy:
    """Start a copy into a buffer; it arrives at the barrier itself."""

    content: Tensor
    buffer: Buffer
    barrier: Barrier
    cycles: float


@dataclass
class Product:
    """Start ``left @ right[rows]``, added to sums; it reads the buffers until it is finished."""

    left: Tensor | Buffer
    right: Buffer
    rows: slice
    sums: Sums
    cycles: float
    transposed: bool = False


@dataclass
class Store:
    """Write into a buffer, and start to store it to global memory: as many rows as there are."""

    content: Tensor
    buffer: Buffer
    to: Tensor
    cycles: float


@dataclass
class Finish:
    """Wait for all products or stores that the role has started."""

    kind: type


@dataclass
class Exponentials:
    """Compute them: the role's warps do nothing else, and no other role's can at the same time."""

    cycles: float


@dataclass(frozen=True)
class Span:
    """What a unit did for a role, from when to when, in cycles."""

    role: str
    unit: str
    start: float
    end: float


@dataclass
class _State:
    steps: Generator
    step: object
    time: float = 0.0
    known: set = field(default_factory=set)  # copies, reads and stores that this role can rely on
    started: list = field(default_factory=list)  # (step, id, end)


_UNITS = {Copy: "copy", Product: "product", Store: "copy", Exponentials: "exponential"}


def run(roles: dict[str, Generator], latency: float = 600.0) -> list[Span]:
    """Run the roles to their ends, and return what the units did.

    Args:
        roles: generators of steps, by name.
        latency: cycles from the end of a copy's transfer to its arrival.

    Raises:
        Deadlock: the roles wait for each other; the message names each and what it waits for.
        Race: a buffer, or the result of a product, is used too early; the message names the role.
    """
    free, spans = dict.fromkeys(_UNITS.values(), 0.0), []
    states = {name: _State(steps, next(steps, None)) for name, steps in roles.items()}
    while left := {name: state for name, state in states.items() if state.step is not None}:
        ready = [name for name, state in left.items() if _can_go(state)]
        if not ready:
            waits = (
                f"{name} waits for {_describe(state.step.barrier)}" for name, state in left.items()
            )
            raise Deadlock("; ".join(waits))
        name = min(ready, key=lambda name: states[name].time)
        state, step = states[name], states[name].step
        start = end = state.time
        if unit := _UNITS.get(type(step)):  # a unit takes one thing at a time
            start = max(state.time, free[unit])
            free[unit] = end = start + step.cycles
            spans.append(Span(name, unit, start, end))
        try:
            _take(state, step, len(spans), end, latency)
            state.step = next(state.steps, None)
        except Race as race:
            raise Race(f"{name}: {race}") from None
    return spans


def busy_shares(spans: list[Span]) -> dict[str, float]:
    """Return the share of the time, up to the last end, in which each unit was busy."""
    end, busy = max(span.end for span in spans), dict.fromkeys(_UNITS.values(), 0.0)
    for span in spans:
        busy[span.unit] += span.end - span.start
    return {unit: time / end for unit, time in busy.items()}


def _can_go(state: _State) -> bool:
    return not isinstance(state.step, Wait) or state.step.barrier.ended(state.step.parity)


def _describe(barrier: Barrier) -> str:
    missing = [f"{barrier.missing} of {barrier.count} arrivals"] * (barrier.missing > 0)
    missing += [f"{barrier.copies} copies"] * (barrier.copies > 0)
    return f"{barrier.name}, whose phase {barrier.phases} lacks {' and '.join(missing)}"


def _take(state: _State, step: object, key: Hashable, end: float, latency: float) -> None:
    """What a step does to barriers, buffers and sums; ``key`` stands for it in what a role knows to be done."""
    match step:
        case Wait(barrier):
            state.time = max(state.time, barrier.time)
            state.known |= barrier.known
        case Arrive(barrier, copies):
            barrier.take(state.time, state.known, arrivals=1, copies=copies)
        case Copy(content, buffer, barrier):
            _check(buffer.written | buffer.read, state, f"{buffer.name} is overwritten")
            buffer.content, buffer.written, buffer.read = content, {key}, set()
            barrier.take(end + latency, {key}, copies=-1)
        case Product(left, right, rows, sums):
            for buffer in (x for x in (left, right) if isinstance(x, Buffer)):
                _check(buffer.written, state, f"{buffer.name} is read")
                buffer.read.add(key)
            left = left.content if isinstance(left, Buffer) else left
            right = right.content[rows]
            sums._value = sums._value + left @ (right.T if step.transposed else right)
            sums.products.add(key)
            state.started.append((step, key, end))
        case Store(content, buffer, to):
            _check(buffer.written | buffer.read, state, f"{buffer.name} is overwritten")
            buffer.content, buffer.written, buffer.read = content, set(), {key}
            to.copy_(content[: len(to)])
            state.started.append((step, key, end + latency))
        case Finish(kind):
            for started, key, ended in [x for x in state.started if isinstance(x[0], kind)]:
                state.time = max(state.time, ended)
                state.known.add(key)
                if kind is Product:
                    started.sums.products.discard(key)
            state.started = [x for x in state.started if not isinstance(x[0], kind)]
        case Exponentials():
            state.time = end


def _check(accesses: set, state: _State, what: str) -> None:
    if accesses - state.known:
        raise Race(f"{what}, and no barrier says that it may be")
