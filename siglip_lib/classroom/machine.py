"""What the notebooks need to know of the machine: a report, time and memory of a call."""

import functools
import importlib.metadata
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

import torch

_CALM = 0.2  # the spread of a machine of one's own stays below
_Stamp = TypeVar("_Stamp")


def device_report(device: torch.device | str) -> str:
    """Return a string of two lines: one on the device, one on the versions that matter."""
    device = torch.device(device)
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    name, versions = f"CPU ({platform.machine()}), {cores}", [f"torch {torch.__version__}"]
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        name = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
        versions += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
    for package in ("flash-attn", "xformers", "triton"):
        versions.append(f"{package} {package_version(package) or 'absent'}")
    return f"device: {name}\nversions: {', '.join(versions)}"


def package_version(package: str) -> str | None:
    """Return the installed version of a package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Timing:
    """Times of one call in milliseconds, and the memory it needed beyond what was held before, in bytes."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    peak_bytes: int | None  # None on a CPU, where torch does not count
    times_ms: tuple[float, ...] = ()  # one after the other; by rounds in ``measure_together``

    @property
    def spread(self) -> float:
        """How far apart the slowest and the fastest call are, as a share of the median."""
        return (self.slowest_ms - self.fastest_ms) / self.median_ms

    def is_level(self, other: "Timing") -> bool:
        """Whether the two can't be told apart: the ranges of their calls, fastest to slowest, overlap."""
        return self.fastest_ms <= other.slowest_ms and other.fastest_ms <= self.slowest_ms


def measure(
    fn: Callable[[], object],
    device: torch.device | str,
    *,
    repeats: int = 20,
    warmup: int = 3,
    graph: bool = False,
) -> Timing:
    """Time ``fn()``: CUDA events on a GPU, the wall clock on a CPU.

    Args:
        fn: a function without arguments. What it returns is dropped.
        device: where its work runs.
        repeats: timed calls; the median, the fastest and the slowest are returned.
        warmup: calls before them, for compilation, caches and the allocator.
        graph: replay ``fn`` as a CUDA graph, which leaves out the time that Python needs to launch its kernels.

    Raises:
        ValueError: a graph is asked for on a CPU, or a count is out of range.
    """
    device = _checked(device, repeats, warmup, graph)
    if device.type != "cuda":
        return _measure_on_cpu(fn, repeats, warmup)
    with torch.cuda.device(device):
        peak = _peak_bytes(fn)
        run = _captured(fn, warmup) if graph else fn
        for _ in range(warmup):
            run()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
    return _timing([start.elapsed_time(end) for start, end in events], peak)


def measure_together(
    fns: Mapping[str, Callable[[], object]],
    device: torch.device | str,
    *,
    repeats: int = 20,
    warmup: int = 3,
    graph: bool = False,
) -> dict[str, Timing]:
    """Time several functions in turns, so that a machine that slows down or a neighbour is no one's disadvantage.

    Each function has one turn a round, and the order of the turns changes from round to round. A turn is two calls, of
    which the second is timed: it finds the caches and the GPU's queue as its own function leaves them, and not as the
    one before does.

    Args:
        fns: functions without arguments, by name. What they return is dropped.
        device: where their work runs.
        repeats: rounds.
        warmup: calls of each function before the first round.
        graph: replay each as a CUDA graph. The graphs share their memory.

    Returns:
        The timings by name, in the order of ``fns``.

    Raises:
        ValueError: a graph is asked for on a CPU, a count is out of range, or there is nothing to time.
    """
    device = _checked(device, repeats, warmup, graph)
    if not fns:
        raise ValueError("fns has no function to time")
    if device.type != "cuda":
        for fn in fns.values():
            for _ in range(warmup):
                fn()
        times = _in_turns(fns, repeats, _time_on_cpu)
        return {name: _timing(times[name], None) for name in fns}
    with torch.cuda.device(device):
        peaks = {name: _peak_bytes(fn) for name, fn in fns.items()}
        if graph:
            pool = torch.cuda.graph_pool_handle()
            fns = {name: _captured(fn, warmup, pool) for name, fn in fns.items()}
        for fn in fns.values():
            for _ in range(warmup):
                fn()
        events = _in_turns(fns, repeats, _events_around)
        torch.cuda.synchronize()
    times = {
        name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()
    }
    return {name: _timing(times[name], peaks[name]) for name in fns}


def spread_report(timings: Iterable[Timing]) -> str:
    """Return a line on how far the repeats of the timings lie apart, and whether something else used the machine."""
    spreads = sorted(timing.spread for timing in timings)
    middle = statistics.median(spreads)
    line = f"spread of the repeats: {middle:.0%} of the median, at most {spreads[-1]:.0%}"
    return f"{line}; DISTURBED: something else uses this machine" if middle > _CALM else line


def kernel_times(fn: Callable[[], object], device: torch.device | str) -> dict[str, float]:
    """Return where the time of one ``fn()`` goes: milliseconds by kernel on a GPU, by operator on a CPU, longest first.

    Call ``fn`` before, so that compilation and caches are not in it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it tells stderr of each start and stop
    on_gpu = torch.device(device).type == "cuda"
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        fn()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    time_of = attrgetter("self_device_time_total" if on_gpu else "self_cpu_time_total")
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    found = {event.key: time_of(event) / 1e3 for event in events}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _checked(device: torch.device | str, repeats: int, warmup: int, graph: bool) -> torch.device:
    device = torch.device(device)
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats={repeats} must be at least 1, warmup={warmup} at least 0")
    if graph and device.type != "cuda":
        raise ValueError("graph=True needs a CUDA device")
    return device


def _measure_on_cpu(fn: Callable[[], object], repeats: int, warmup: int) -> Timing:
    for _ in range(warmup):
        fn()
    return _timing([_time_on_cpu(fn) for _ in range(repeats)], None)


def _time_on_cpu(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return (time.perf_counter() - start) * 1e3


def _in_turns(
    fns: Mapping[str, Callable[[], object]], rounds: int, timed: Callable[[Callable], _Stamp]
) -> dict[str, list[_Stamp]]:
    """Call each function twice a round, the second time by ``timed``, whose results are returned by name."""
    order = list(fns)
    shuffle = random.Random(0).shuffle  # a generator of its own: nobody's seed matters
    found = {name: [] for name in fns}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            fns[name]()
            found[name].append(timed(fns[name]))
    return found


def _events_around(fn: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fn()
    end.record()
    return start, end


def _peak_bytes(fn: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def _timing(times: list[float], peak_bytes: int | None) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), peak_bytes, tuple(times))


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    # one for all: cuBLAS keeps a workspace for each stream, in memory that is then never given back
    return torch.cuda.Stream(device)


def _captured(
    fn: Callable[[], object], warmup: int, pool: tuple[int, int] | None = None
) -> Callable[[], None]:
    """Record ``fn`` as a CUDA graph, in the memory of the graphs of that pool, and return its replay."""
    torch.cuda.empty_cache()  # what one stream has cached another can't use
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # else torch stays on it after a recording that fails
        for _ in range(max(warmup, 1)):
            fn()
        # on the same stream: a workspace made for another one would hold the graph's memory when the graph is gone
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay
