"""One seed of tools/train_captioner.py, on a GPU: seconds and losses of each stage, shares, and the weights.

python .gpu/cap.py SEED FOLDER [--decay D] [--strength S] [--hold VENDOR] [--plain] [--few]

--decay: weight decay of stages 3 and 4 in the place of 0.1. --strength: of their augmentation. --hold: a designer of
the training who is held out besides Twemoji, and named alone in its place: by this, and not by Twemoji, decay and
strength may be chosen. --plain: stages 1 to 3 alone. --few: 60, 60, 100 and 100 steps, to see the ms a step.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tools")]
import train_captioner as tool

from siglip_lib.data.emoji64 import load_emoji64, split
from siglip_lib.storage.writing import write_tensors

parser = argparse.ArgumentParser()
parser.add_argument("seed", type=int)
parser.add_argument("folder", type=Path)
parser.add_argument("--decay", type=float, default=0.1)
parser.add_argument("--strength", type=float, default=1.0)
parser.add_argument("--hold")
parser.add_argument("--plain", action="store_true")
parser.add_argument("--few", action="store_true")
parser.add_argument("--batch", type=int, default=256)
parser.add_argument("--tiled", type=int, default=256)
parser.add_argument("--lr", type=float)
parser.add_argument("--steps", type=lambda s: tuple(map(int, s.split(","))))
a = parser.parse_args()
a.folder.mkdir(parents=True, exist_ok=True)
emoji, stage = load_emoji64(), 0
tool.BATCH, tool.TILED_BATCH = a.batch, a.tiled
if a.steps:
    tool.STEPS = a.steps
if a.few:
    tool.STEPS = (60, 60, 100, 100)
if a.plain:
    tool.STEPS = (*tool.STEPS[:3], 0)
if a.hold:
    tool.split = lambda emoji: split(emoji, ("twemoji", a.hold))
train_stage, questions = tool.train_stage, tool.Questions


def timed(loss, parameters, batches, steps, lr):
    global stage
    stage += 1
    torch.cuda.synchronize()
    start, marks = time.perf_counter(), []

    def drawn(step):
        marks.append(time.perf_counter())
        return batches(step)

    if a.lr and lr == 2e-3:
        lr = a.lr
    decay = a.decay if stage > 2 else 0.1
    losses = train_stage(loss, parameters, drawn, steps, lr, weight_decay=decay, progress=False)
    took = time.perf_counter() - start
    late = (marks[-1] - marks[len(marks) // 4]) / (len(marks) - 1 - len(marks) // 4)
    eighths = [round(part.mean().item(), 3) for part in losses.chunk(8)]
    print(f"  stage {stage}: {steps} steps {took:.1f} s, {1e3 * late:.1f} ms a step; loss", *eighths, flush=True)
    return losses


def drawn_with(*args, strength=0.0, **named):
    return questions(*args, strength=a.strength if strength else 0.0, **named)


tool.train_stage, tool.Questions = timed, drawn_with
torch.cuda.reset_peak_memory_stats()
start = time.perf_counter()
captioner = tool.trained(emoji, a.seed, False)
torch.cuda.synchronize()
took, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30
name = f"seed{a.seed}_{a.hold or 'all'}_{a.batch}_{a.tiled}_{a.lr}_{tool.STEPS[2]}_{a.decay}_{a.strength}"
state = {k: v.half() for k, v in captioner.trained_state().items()}
write_tensors(state, a.folder / f"{name}.safetensors")
start = time.perf_counter()
found = {}
if a.hold:  # every drawing of the designer whose concept the training had
    parts, tokenizer = tool.split(emoji), tool.new_tokenizer()
    theirs = (emoji.vendor == emoji.vendors.index(a.hold)).nonzero()[:, 0]
    theirs = theirs[torch.isin(emoji.concept[theirs], emoji.concept[parts.train])]
    asked = tool.every_drawing(emoji, theirs, tokenizer, "cuda")
    found[a.hold] = tool.share_right(captioner, asked)
    for label, grid, tiles in (("one of four", 2, 1), ("one of 16, tiles", 4, 4)):
        draw = questions(emoji, theirs, tokenizer, grids=(grid,), batch=48, tiles=tiles, device="cuda")
        found[label] = tool.share_right(captioner, map(draw, range(50)), (tiles, tiles))
else:
    found = tool.shares(emoji, captioner, False)
shares = {k: str(v) for k, v in found.items()}
print(f"{name} {tool.STEPS} train {took:.0f} s, exam {time.perf_counter() - start:.0f} s, peak {peak:.1f} GiB", shares)
