"""Find the quickest blocks for each kernel of siglip_lib.kernels.flash_attention that are right, on a GPU.

python tools/tune_kernels.py [HEAD_DIM ...]

Each choice is held against float64 before it is timed, at every size: some that compile and run fast are wrong. Prints
a line for each, and last what belongs into the table of this GPU.
"""

import math
import multiprocessing
import os
import sys

import torch
from torch import Tensor
from tqdm import tqdm

from siglip_lib import measure
from siglip_lib.base.offers import TRITON_HEAD_DIMS as HEAD_DIMS
from siglip_lib.kernels import flash_attention as module
from siglip_lib.kernels.flash_attention import Blocks, blocks_of, flash_attention

SIZES = ((64, 729), (64, 256), (8, 729), (1, 729), (1, 256))  # batch, tokens; 16 heads
HEADS = 16
CHOICES = {
    "forward": (
        Blocks(64, 64, 4, 2),
        Blocks(128, 32, 8, 3),
        Blocks(128, 64, 4, 3),
        Blocks(128, 64, 8, 2),
        Blocks(128, 64, 8, 3),
        Blocks(128, 64, 8, 3, 128),
    ),
    "queries": (
        Blocks(64, 32, 4, 3),
        Blocks(64, 64, 4, 2),
        Blocks(128, 32, 8, 2),
        Blocks(128, 32, 8, 3),
        Blocks(128, 64, 8, 3),
    ),
    "keys": (
        Blocks(64, 32, 4, 2),
        Blocks(64, 32, 4, 3),
        Blocks(64, 32, 4, 3, 168),
        Blocks(64, 32, 8, 3),
        Blocks(64, 64, 4, 3),
        Blocks(128, 32, 8, 3),
    ),
}


def main() -> None:
    dims = [int(argument) for argument in sys.argv[1:]] or HEAD_DIMS
    tasks = [
        (kernel, dim, blocks)
        for dim in dims
        for kernel, choices in CHOICES.items()
        for blocks in choices
    ]
    # compiling takes most of the time and no GPU: many at once, then the clock alone
    # a process each, since a wrong address ends the GPU's work of all its process
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(14, os.cpu_count()), maxtasksperchild=1) as pool:
        errors = list(tqdm(pool.imap(check, tasks, 1), total=len(tasks), mininterval=10))
    print(torch.cuda.get_device_name(), "times in us; batch, tokens:", *SIZES)
    best = {}
    for task, wrong in zip(tasks, errors, strict=True):
        kernel, dim, blocks = task
        times = []
        if wrong < 1:
            choose(*task)
            times = [time_us(kernel, dim, *size) for size in SIZES]
            best[kernel, dim] = min(
                best.get((kernel, dim), (math.inf, None)), (times[0], blocks), key=lambda x: x[0]
            )
        print(f"{kernel} {dim} {blocks}: error {wrong:.2f} of the allowed,", *times, flush=True)
    for (kernel, dim), (_, blocks) in best.items():
        print(f'"{kernel}" {dim}: {blocks}')


def choose(kernel: str, dim: int, blocks: Blocks) -> None:
    blocks_of(torch.cuda.get_device_capability())[kernel][dim] = blocks


def check(task: tuple[str, int, Blocks]) -> float:
    """Error of a choice, see ``worst_error``; infinite where it does not run."""
    choose(*task)
    try:
        return worst_error(task[1])
    except Exception as error:  # out of shared memory or registers
        print(task, type(error).__name__, str(error)[:90])
        return math.inf


def worst_error(dim: int) -> float:
    """Largest error of output and gradients, over twice that of the plain form in bfloat16; infinite for NaN."""
    worst = 0.0
    for tokens in (729, 256, 65):
        qkv = draw(2, tokens, dim).requires_grad_()
        pull = torch.randn(2, tokens, HEADS, dim, device="cuda")
        exact, plain, found = (
            results(attention, qkv.detach().to(dtype).requires_grad_(), pull)
            for attention, dtype in (
                (eager, torch.float64),
                (eager, torch.bfloat16),
                (flash_attention, torch.bfloat16),
            )
        )
        for wanted, low, ours in zip(exact, plain, found, strict=True):
            ratio = ((ours - wanted).abs().max() / (2 * (low - wanted).abs().max())).item()
            worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


def results(attention, qkv: Tensor, pull: Tensor) -> list[Tensor]:
    out = attention(qkv)
    (gradient,) = torch.autograd.grad(out, qkv, pull.to(out.dtype))
    return [out.detach(), *gradient.unbind(2)]


def eager(qkv: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return ((q @ k.transpose(-2, -1) * qkv.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def time_us(kernel: str, dim: int, batch: int, tokens: int) -> float:
    """Median time of one kernel alone."""
    qkv = draw(batch, tokens, dim)
    scale = dim**-0.5
    out, lse = module._forward(qkv, scale)
    if kernel == "forward":
        return round(1e3 * measure(lambda: module._forward(qkv, scale), qkv.device).median_ms, 1)
    given = (out, lse, torch.zeros_like(lse), torch.empty_like(qkv), scale, scale)
    given = (qkv, out, *given) if kernel == "queries" else (qkv, *given)
    return round(
        1e3 * measure(lambda: module._launch(kernel, qkv, *given), qkv.device).median_ms, 1
    )


def draw(batch: int, tokens: int, dim: int) -> Tensor:
    return torch.randn(batch, tokens, 3, HEADS, dim, device="cuda", dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
