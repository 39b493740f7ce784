"""Time the loss and a training step on the GPUs of one machine. Prints tables, and stores them as JSON.

python -m siglip_lib.launch 4 tools/speed_many_gpus.py --json many4.json     # all parts: a few minutes
python -m siglip_lib.launch gpu tools/speed_many_gpus.py loss bandwidth      # some of them: these take a minute

    loss       the ring beside its contenders and two controls: distance from float64; time and memory of forward and
               backward, measured in turns, with each round's ratio to the ring; with several GPUs what travels while
               something is computed
    tower      SO400M at 384 px, a training step with DDP and with FSDP2, a block a unit
    bandwidth  of an all-reduce, and of a ring of sends
    largest    pairs a GPU, doubled until memory or patience ends
    emoji      the emoji SigLIP: with N processes N times the batch in 1/N of the steps; its recall, and the seconds
    overlap    what travels while something is computed, in both training steps

NVLink's multicast is off (NCCL_NVLS_ENABLE=0) for all that is measured, unless the environment says otherwise: what
others on the machine do could disturb it, or be disturbed. ``--small`` tries it on a CPU.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from train_emoji64 import shares

from siglip_lib import create_siglip_vit, device_report, measure_together
from siglip_lib.data.emoji64 import load_emoji64, split
from siglip_lib.launch import meeting
from siglip_lib.siglip import gathered_loss, ring_loss
from siglip_lib.siglip.folder import EMOJI64_SIGLIP, EMOJI64_WEIGHTS
from siglip_lib.siglip.gathered_loss import chunked_sigmoid_loss, gathered_sigmoid_loss
from siglip_lib.siglip.losses import sigmoid_loss, softmax_loss
from siglip_lib.siglip.model import SigLIP, embed_pictures, embed_texts
from siglip_lib.siglip.ring_loss import ring_sigmoid_loss
from siglip_lib.siglip.ring_softmax import ring_softmax_loss
from siglip_lib.siglip.text import Tokenizer
from siglip_lib.train.distributed import DistributedTraining
from siglip_lib.train.recipe import TrainConfig
from siglip_lib.train.stored import whole_model
from siglip_lib.train.training import Training

PATIENCE_S = 20.0  # of one call in `largest`
GIB = 2**30
STEPS = 5  # of a profile, one after the other
PROFILES = 7  # of which the one is told that the profiler disturbed least

PARALLEL = ("DDP", "FSDP2")
LOSSES = {
    "ring": ring_sigmoid_loss,
    "gathered": gathered_sigmoid_loss,
    "gathered, in chunks": chunked_sigmoid_loss,
    "softmax over the ring": ring_softmax_loss,
}
WIDEST = max(map(len, LOSSES))  # of their names, which stand one below the other
_compiled = torch.compile(gathered_loss.loss_against_all, fullgraph=True, dynamic=False)


def waiting_ring_loss(*arguments: Tensor) -> Tensor:
    """The ring, but each message has arrived before a block is computed: what it gains by doing both at once."""
    begin = ring_loss._pass_on

    def pass_on(*parcels: object) -> list[dist.Work]:
        for work in begin(*parcels):
            work.wait()
        return []

    with patch.object(ring_loss, "_pass_on", pass_on):
        return ring_sigmoid_loss(*arguments)


def compiled_gathered_loss(*arguments: Tensor) -> Tensor:
    """The gathered form with its passes over the logits fused, as torch.compile does it."""
    with patch.object(gathered_loss, "loss_against_all", _compiled):
        return gathered_sigmoid_loss(*arguments)


CONTROLS = {"ring, waiting": waiting_ring_loss, "gathered, compiled": compiled_gathered_loss}


def main() -> None:
    multicast = os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {f.__name__: f for f in (loss, tower, bandwidth, largest, emoji, overlap)}
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all if none is named")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--small", action="store_true", help="tiny sizes, on a CPU")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(parts):
        parser.error(f"unknown: {', '.join(unknown)}")
    if given.small:
        device, backend = torch.device("cpu"), "gloo"
    else:
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=60), **meeting())
    say(
        f"{device_report(device)}\nprocesses: {dist.get_world_size()}, NCCL_NVLS_ENABLE={multicast}"
    )
    figures = {"device": device_report(device), "processes": dist.get_world_size()}
    figures["nccl_nvls_enable"] = multicast
    for name in given.parts or parts:
        say(f"\n{name}")
        figures[name] = parts[name](device, given.small)
        if given.json and dist.get_rank() == 0:
            given.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()


# --- the parts ---


def loss(device: torch.device, small: bool) -> dict:
    found = {}
    functions = LOSSES | CONTROLS
    for name, function in functions.items():
        found[name] = {"distance": distances(function, device)}
        say(
            f"{name:{WIDEST}} distance of loss and gradients from float64: {found[name]['distance']}"
        )
    each, width = sizes(small)
    batches = {"a GPU": each, "in all": 2 * each // dist.get_world_size()}
    for batch, pairs in batches.items():
        if batch == "in all" and pairs == each:
            for name in functions:
                found[name][batch] = found[name]["a GPU"]
            say(f"{2 * each} pairs in all: the same")
            continue
        arguments = draw(pairs, width, torch.bfloat16, device)
        calls = {name: partial(forward_backward, f, arguments) for name, f in functions.items()}
        for call in calls.values():  # kernels are compiled, and the libraries have their workspaces
            call()
        dist.barrier()
        timings = measure_together(calls, device, warmup=5)
        # of each round, whose calls all ranks make in the same order
        rounds = {name: worst_of_each(timing.times_ms) for name, timing in timings.items()}
        for name, timing in timings.items():
            found[name][batch] = {
                "pairs_per_gpu": pairs,
                "ms": worst(timing.median_ms),
                "fastest_ms": worst(timing.fastest_ms),
                "slowest_ms": worst(timing.slowest_ms),
                "peak_gib": worst((timing.peak_bytes or 0) / GIB),
                "ratios": ratios(rounds[name], rounds["ring"]),
            }
            say(
                f"{name:{WIDEST}} {pairs} pairs a GPU, width {width}, bfloat16: {line(found[name][batch])}"
            )
        if batch == "a GPU" and dist.get_world_size() > 1:
            for name, call in calls.items():
                found[name]["travel"] = travel(call, device)
                say_travel(name, found[name]["travel"])
        del calls, arguments
    return found


def tower(device: torch.device, small: bool) -> dict:
    found = {}
    for name in PARALLEL:
        step, batch = tower_step(name, device, small)
        # weights, gradients and moments count as well
        found[name] = timed(step, device, whole=True)
        found[name]["images_per_s"] = dist.get_world_size() * batch / found[name]["ms"] * 1e3
        say(
            f"{name:6} {batch} pictures a GPU: {found[name]['images_per_s']:.0f} images/s; {line(found[name])}"
        )
        del step
    return found


def tower_step(name: str, device: torch.device, small: bool) -> tuple[Callable[[], None], int]:
    """A training step on random pictures, and how many of them it takes."""
    side, batch = (28, 2) if small else (384, 32)
    torch.manual_seed(0)
    with device:
        model = Squared(create_siglip_vit(image_size=side, **({"depth": 2} if small else {})))
        pictures = torch.randn(batch, 3, side, side)
    if name == "DDP":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # weights travel in bfloat16, which autocast would make of them anyway; what flows between blocks stays as it is
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for block in model.tower.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            value = model(pictures)
        value.backward()
        optimizer.step()

    return step, batch


class Squared(nn.Module):
    """A tower and some number of what it returns: one module, so that its end is not the view that the tower gives."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pictures: Tensor) -> Tensor:
        return self.tower(pictures).float().square().mean()


def bandwidth(device: torch.device, small: bool) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1:
        return {}
    size = 2**20 if small else GIB
    one, other = (torch.zeros(size // 2, dtype=torch.bfloat16, device=device) for _ in range(2))

    def ring() -> None:
        sends = dist.P2POp(dist.isend, one, (rank + 1) % world)
        receives = dist.P2POp(dist.irecv, other, (rank - 1) % world)
        for work in dist.batch_isend_irecv([sends, receives]):
            work.wait()

    reduced = timed(lambda: dist.all_reduce(one), device)
    passed = timed(ring, device)
    # each byte is sent 2 (world - 1) / world times in the best case: NCCL's bus bandwidth
    found = {
        "all_reduce_bus_gb_per_s": size * 2 * (world - 1) / world / reduced["ms"] / 1e6,
        "ring_gb_per_s": size / passed["ms"] / 1e6,
    }
    say(
        f"{size / GIB:g} GiB: all-reduce {found['all_reduce_bus_gb_per_s']:.0f} GB/s of bus bandwidth, "
        f"a ring of sends {found['ring_gb_per_s']:.0f} GB/s each way"
    )
    return found


def largest(device: torch.device, small: bool) -> dict:
    first, width = sizes(small)
    last = 4 * first if small else 2**30
    found = {}
    for name, function in LOSSES.items():
        pairs, fits, ended = first, 0, "nothing"
        while pairs <= last and ended == "nothing":
            out_of_memory, start = False, time.perf_counter()
            try:
                forward_backward(function, draw(pairs, width, torch.bfloat16, device))
                synchronize(device)
            except torch.OutOfMemoryError:  # on all ranks alike, as all hold the same sizes
                out_of_memory = True
            seconds = worst(time.perf_counter() - start)
            if worst(out_of_memory):
                ended = "memory"
            else:
                fits = pairs
                ended = "patience" if 4 * seconds > PATIENCE_S else ended
            pairs *= 2
            if device.type == "cuda":
                torch.cuda.empty_cache()
        total = fits * dist.get_world_size()
        found[name] = {"pairs_per_gpu": fits, "global_batch": total, "ended_by": ended}
        say(f"{name:{WIDEST}} {fits} pairs a GPU, a batch of {total}; what ended it: {ended}")
    return found


def emoji(device: torch.device, small: bool) -> dict:
    world = dist.get_world_size()
    defaults = TrainConfig()
    # with a larger batch, rate and warm-up grow with its root; the decay stays
    options = {
        "batch": world * defaults.batch,
        "steps": defaults.steps // world,
        "warmup": round(defaults.warmup * world**0.5),
        "lr": defaults.lr * world**0.5,
        "logit_lr": defaults.logit_lr * world**0.5,
    }
    if small:
        options |= {"batch": 8, "steps": 4}
    config = TrainConfig(**options)
    torch.manual_seed(config.seed)
    model = SigLIP(EMOJI64_SIGLIP)
    tokenizer = Tokenizer(EMOJI64_WEIGHTS / "spiece.model", EMOJI64_SIGLIP.context_length)
    pictures = load_emoji64()
    parts = split(pictures)
    arguments = (model, tokenizer, pictures, parts.train, config)
    if world == 1:
        training = Training(*arguments, device)
    else:
        training = DistributedTraining(*arguments, init_device_mesh(device.type, (world,)), device)
    start = time.perf_counter()
    training.run(progress=False)
    synchronize(device)
    found = {"seconds": worst(time.perf_counter() - start), **options, "loss": training.losses[-1]}
    training.release()
    trained = whole_model(training)
    if trained is not None:
        trained = trained.to(device).eval()
        texts = embed_texts(trained, tokenizer, pictures.names).cpu()
        vectors = embed_pictures(trained, pictures.pictures).cpu()
        right = shares("emoji", vectors, texts, pictures, parts.seen, everything=True)
        found |= {name.removeprefix("emoji: "): share.value for name, share in right.items()}
        shares_right = ", ".join(f"{name.removeprefix('emoji: ')} {s}" for name, s in right.items())
        say(f"{config.steps} steps of {config.batch} in {found['seconds']:.1f} s: {shares_right}")
    return found


def overlap(device: torch.device, small: bool) -> dict:
    found = {}
    for name in PARALLEL:
        call, _ = tower_step(name, device, small)
        for _ in range(3):
            call()
        found[name] = travel(call, device)
        say_travel(name, found[name])
        del call
    return found


def travel(call: Callable[[], object], device: torch.device) -> dict:
    """What of several calls, one after the other, is sent while something is computed, on each rank; a call's time
    with and without the profiler, which says whether what it saw is representative.

    The profile is a light one, of the GPU's kernels alone, and nothing waits between the calls: so the GPU has a queue
    of work as it has without a profiler. Profiles and calls without one take turns, and one profile is told, see
    ``nearest``: the same one of all ranks, as a time is that of the slowest. On a CPU the calls are made and nothing is
    found.
    """  # fmt: skip
    if device.type != "cuda":
        for _ in range(2 * STEPS):
            call()
        return {}

    def calls() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        worst(0)  # the processes begin together, and no kernel says so
        start.record()
        for _ in range(STEPS):
            call()
        end.record()
        torch.cuda.synchronize()
        return worst(start.elapsed_time(end) / STEPS)

    def profiled() -> tuple[float, dict]:
        with profile(activities=[ProfilerActivity.CUDA]) as watched:
            ms = calls()
        kernels = [
            (e.time_range.start / 1e3, e.time_range.end / 1e3, "nccl" in e.name)
            for e in watched.events()
            if e.device_type == torch.autograd.DeviceType.CUDA
        ]
        return ms, together(kernels)

    profiled()  # the first one of a process also prepares the profiler
    turns = [(calls(), profiled()) for _ in range(PROFILES)]
    times, mine = nearest(*zip(*turns, strict=True))
    ranks = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, mine)
    return times | {"ranks": ranks}


def nearest(
    alone: Sequence[float], profiles: Sequence[tuple[float, dict]]
) -> tuple[dict[str, float], dict]:
    """Of profiles, each with its time, both times and the one whose time is nearest to the median without a profiler.

    Its ``hidden_range`` has the least and the largest share that any of them saw hidden.
    """
    median = statistics.median(alone)
    ms, found = min(profiles, key=lambda one: abs(one[0] - median))
    shares = [seen["hidden"] for _, seen in profiles]
    times = {"ms_without_profiler": median, "ms_with_profiler": ms}
    return times, found | {"hidden_range": [min(shares), max(shares)]}


def say_travel(name: str, found: dict) -> None:
    for rank, seen in enumerate(found.get("ranks", [])):
        times = f"{found['ms_without_profiler']:.2f} ms, with the profiler {found['ms_with_profiler']:.2f}"
        least, most = seen["hidden_range"]
        say(
            f"{name:{WIDEST}} {times}: rank {rank} sends and receives for {seen['travelling_ms']:.2f}, "
            f"{seen['hidden']:z.0%} of it ({least:z.0%} to {most:z.0%} in {PROFILES} profiles) "
            "while something is computed"
        )


def together(kernels: list[tuple[float, float, bool]]) -> dict:
    """From each kernel's start and end in ms, and whether it communicates: a call's part of both, and together.

    The kernels are those of ``STEPS`` calls; the lines for a picture are of the first.
    """
    if not kernels:
        return {}
    first = min(start for start, _, _ in kernels)
    each = {
        kind: sorted((a - first, b - first) for a, b, sends in kernels if sends == kind)
        for kind in (True, False)
    }
    apart = {kind: merged(some) for kind, some in each.items()}
    length = {kind: sum(b - a for a, b in some) for kind, some in apart.items()}
    both = merged(apart[True] + apart[False])
    end = max(b for _, b in both) / STEPS
    shared = sum(length.values()) - sum(b - a for a, b in both)
    # for a picture: of each kind the first call's kernels come first; gaps that it would not show are closed
    lines = {
        name: [[round(a, 3), round(b, 3)] for a, b in merged(some[: len(some) // STEPS], end / 500)]
        for name, some in (("travelling", each[True]), ("computing", each[False]))
    }
    return {
        "ms": end,
        "travelling_ms": length[True] / STEPS,
        "computing_ms": length[False] / STEPS,
        "hidden": shared / length[True] if length[True] else 0.0,
        **lines,
    }


def merged(intervals: list[tuple[float, float]], gap: float = 0.0) -> list[tuple[float, float]]:
    """Intervals that overlap, or lie no further than ``gap`` apart, as one."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1] + gap:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


# --- what they share ---


def sizes(small: bool) -> tuple[int, int]:
    """Pairs a GPU, and their width."""
    return (64, 16) if small else (16_384, 1152)


def draw(
    pairs: int, width: int, dtype: torch.dtype, device: torch.device, seed: int | None = None
) -> list[Tensor]:
    """This rank's unit vectors, another rank's being others, and the scalars that SigLIP starts with."""
    seed = dist.get_rank() if seed is None else seed
    generator = torch.Generator(device).manual_seed(seed)
    vectors = [
        F.normalize(torch.randn(pairs, width, generator=generator, device=device), dim=1)
        for _ in range(2)
    ]
    scalars = [torch.tensor(x, device=device) for x in (2.302585, -10.0)]
    return [x.detach().requires_grad_() for x in (*(v.to(dtype) for v in vectors), *scalars)]


def forward_backward(function: Callable[..., Tensor], arguments: list[Tensor]) -> list[Tensor]:
    arguments = arguments[:3] if function in (ring_softmax_loss, softmax_loss) else arguments
    value = function(*arguments)
    return [value.detach(), *torch.autograd.grad(value, arguments)]


def distances(function: Callable[..., Tensor], device: torch.device) -> list[float]:
    """Relative distances of the loss and of its gradients from one process's float64, the largest of all ranks.

    The loss and the scalars' gradients are averaged over the ranks; each rank compares the gradients by its own
    vectors. The scalars' are sums over all pairs in which most cancels: theirs are relative to the sums of magnitudes.
    """
    rank, world, pairs = dist.get_rank(), dist.get_world_size(), 96
    mine = draw(pairs, 64, torch.bfloat16, device)
    value, *gradients = (x.double() for x in forward_backward(function, mine))
    for x in (value, *gradients[2:]):
        dist.all_reduce(x)
        x /= world
    every = [draw(pairs, 64, torch.bfloat16, device, seed=r) for r in range(world)]
    vectors = [torch.cat([rank_[i] for rank_ in every]) for i in (0, 1)]
    whole = [x.detach().double().requires_grad_() for x in (*vectors, *mine[2:])]
    softmax = function is ring_softmax_loss
    oracle = softmax_loss if softmax else sigmoid_loss
    wanted, *wanted_gradients = forward_backward(oracle, whole)
    rows = slice(rank * pairs, (rank + 1) * pairs)
    wanted_gradients[:2] = [world * x[rows] for x in wanted_gradients[:2]]
    with torch.no_grad():
        image, text, scale, bias = whole
        dots = scale.exp() * image @ text.T
        right = torch.eye(len(dots), device=device)
        if softmax:
            slopes = ((dots.softmax(0) + dots.softmax(1)) / 2 - right).abs() / len(dots)
        else:
            slopes = ((1 - 2 * right) * (dots + bias)).sigmoid() / len(dots)
        magnitudes = [x.norm() for x in (wanted, *wanted_gradients[:2])]
        magnitudes += [(slopes * dots).abs().sum(), slopes.sum()][: len(gradients) - 2]
    three = zip((value, *gradients), (wanted, *wanted_gradients), magnitudes, strict=True)
    found = [((a - b).norm() / size).item() for a, b, size in three]
    assert all(x < 0.01 for x in found), found  # fails on NaN too
    return [float(f"{worst(x):.1e}") for x in found]


def timed(call: Callable[[], object], device: torch.device, whole: bool = False) -> dict:
    """Median, fastest and slowest of 20 calls, each the slowest rank's; and the most memory that a rank had in use.

    Memory is that of tensors, without what was there before the first call, unless the ``whole`` is wanted.
    """
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = 0 if whole else torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(5):
        call()
    times = []
    for _ in range(20):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            times.append((start, end))
        else:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
    synchronize(device)
    if device.type == "cuda":
        times = [start.elapsed_time(end) for start, end in times]
    peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
    return {
        "ms": worst(statistics.median(times)),
        "fastest_ms": worst(min(times)),
        "slowest_ms": worst(max(times)),
        "peak_gib": worst(peak / GIB),
    }


def worst(value: float) -> float:
    """The largest of all ranks' values."""
    return worst_of_each([value])[0]


def worst_of_each(values: Sequence[float]) -> list[float]:
    """Of each of several values the largest of all ranks."""
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def ratios(times: Sequence[float], ring: Sequence[float]) -> list[float]:
    """Of each round a form's time over the ring's."""
    return [round(a / b, 4) for a, b in zip(times, ring, strict=True)]


def line(found: dict) -> str:
    words = (
        f"{found['ms']:.2f} ms ({found['fastest_ms']:.2f} to {found['slowest_ms']:.2f}), "
        f"{found['peak_gib']:.2f} GiB"
    )
    if by_rounds := found.get("ratios"):
        middle, slower = statistics.median(by_rounds), sum(ratio > 1 for ratio in by_rounds)
        words += f"; of the ring's time {middle:.3f}, slower in {slower} of {len(by_rounds)} rounds"
    return words


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
