"""Find the quickest blocks for each kernel of siglip_lib.kernels.flash_attention that are right, on a GPU.

python tests/tune_kernels.py [HEAD_DIM ...]

Each choice is held against float64 before it is timed, at every size: some that compile and run fast are wrong. Prints
a line for each, and last what belongs into BLOCKS.
"""

import itertools
import sys

import torch
from torch import Tensor

from siglip_lib import measure
from siglip_lib.kernels import flash_attention as module
from siglip_lib.kernels.flash_attention import BLOCKS, HEAD_DIMS, Blocks, flash_attention

SIZES = ((64, 729), (64, 256), (8, 729), (1, 729), (1, 256))  # batch, tokens; 16 heads
HEADS = 16
# the shapes that fit into the registers; what spills or makes the assembler serialise is left out
SHAPES = (
    (64, 32, 4),
    (64, 64, 4),
    (64, 64, 8),
    (64, 128, 4),
    (128, 32, 8),
    (128, 64, 8),
    (128, 128, 8),
)
CHOICES = [Blocks(*shape, stages) for shape, stages in itertools.product(SHAPES, (2, 3))]


def main() -> None:
    dims = [int(argument) for argument in sys.argv[1:]] or HEAD_DIMS
    print(torch.cuda.get_device_name(), "times in us; batch, tokens:", *SIZES)
    best = {}
    for dim, kernel in itertools.product(dims, BLOCKS):
        found = {}
        for choice in CHOICES:
            BLOCKS[kernel][dim] = choice
            try:
                wrong = worst_error(dim)
                times = [time_us(kernel, dim, *size) for size in SIZES] if wrong < 1 else []
            except Exception as error:  # out of shared memory or registers: no choice
                print(f"{kernel} {dim} {choice}: {type(error).__name__}", flush=True)
                continue
            print(f"{kernel} {dim} {choice}: error {wrong:.2f} of the allowed,", *times, flush=True)
            if times:
                found[choice] = times[0]
        BLOCKS[kernel][dim] = best[kernel, dim] = min(found, key=found.get)
    for (kernel, dim), choice in best.items():
        print(f'"{kernel}" {dim}: {choice}')


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
