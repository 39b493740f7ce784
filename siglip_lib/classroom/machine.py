"""What the notebooks need to know of the machine: a report, time and memory of a call."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter

import torch

_CALM = 0.2  # the spread of a machine of one's own stays below


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

    @property
    def spread(self) -> float:
        """How far apart the slowest and the fastest call are, as a share of the median."""
        return (self.slowest_ms - self.fastest_ms) / self.median_ms


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
    device = torch.device(device)
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats={repeats} must be at least 1, warmup={warmup} at least 0")
    if device.type != "cuda":
        if graph:
            raise ValueError("graph=True needs a CUDA device")
        return _measure_on_cpu(fn, repeats, warmup)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fn()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - held
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


def _measure_on_cpu(fn: Callable[[], object], repeats: int, warmup: int) -> Timing:
    for _ in range(warmup):
        fn()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e3)
    return _timing(times, None)


def _timing(times: list[float], peak_bytes: int | None) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), peak_bytes)


def _captured(fn: Callable[[], object], warmup: int) -> Callable[[], None]:
    """Record ``fn`` as a CUDA graph and return its replay."""
    torch.cuda.empty_cache()  # what one stream has cached another can't use
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(max(warmup, 1)):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay
