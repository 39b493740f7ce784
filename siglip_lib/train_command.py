"""What ``python -m siglip_lib.train`` does, alone or in every process that torchrun starts."""

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from siglip_lib.checks import positive_int
from siglip_lib.distributed import (
    PARALLEL,
    DistributedTraining,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    whole_model,
)
from siglip_lib.emoji64 import load_emoji64, split
from siglip_lib.siglip import SigLIP, save_siglip
from siglip_lib.text import Tokenizer
from siglip_lib.train import BLOCK, EMOJI64_SIGLIP, EMOJI64_WEIGHTS, TrainConfig, Training

_DESCRIPTION = """Train a SigLIP on emoji64. One process:
  python -m siglip_lib.train --out run
four, on a GPU each if there are any:
  torchrun --standalone --nproc-per-node 4 -m siglip_lib.train --out run"""
_EPILOG = """--out gets metrics.csv, checkpoints/ and, at the end, weights/, which load_siglip reads. SIGTERM stores a
checkpoint and ends the run (exit code 143); --resume goes on, also with another number of processes."""
# how long a process waits for the others: one that died unseen must not keep them for ever
_TIMEOUT = timedelta(seconds=50)
_STOPPED = 128 + signal.SIGTERM  # as the shell reports it


@record  # torchrun then shows the error of the process that failed first
def main() -> None:
    """Train as the command line says."""
    given = _arguments()
    stop = _Stop()
    with _process_group(given.device):
        training = _training(given)
        checkpoints = given.out / "checkpoints"
        if given.resume:
            load_checkpoint(training, checkpoints)
        finished = _train(training, checkpoints, given.checkpoint_every, stop)
        training.release()
        model = whole_model(training) if finished else None
        if model is not None:
            save_siglip(model, _tokenizer(), given.out / "weights")
            print(f"the weights are in {given.out / 'weights'}", file=sys.stderr)
    if not finished:
        sys.exit(_STOPPED)


def _train(training: Training, checkpoints: Path, every: int, stop: "_Stop") -> bool:
    """Train to the end and return True, or, if told to stop, store the training and return False."""
    first = _rank() == 0
    steps = training.config.steps
    # a GPU gets a block of steps ahead; on a CPU a look after each costs nothing
    stride = BLOCK if training.device.type == "cuda" else 1
    metrics = _Metrics(training, checkpoints.with_name("metrics.csv")) if first else None
    stored = training.step
    with tqdm(total=steps, initial=stored, unit="step", disable=not first) as bar:
        while training.step < steps:
            if stop.agreed():
                if training.step > stored:
                    save_checkpoint(training, checkpoints)
                if first:
                    bar.write(f"stopped after {training.step} steps", file=sys.stderr)
                return False
            done = training.step
            until = min(steps, *(done - done % n + n for n in (stride, every)))
            training.run(until, progress=False)
            if metrics:
                metrics.add(done)
            loss, rate = training.losses[-1], training.rate(until - 1)
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.1e}", refresh=False)
            bar.update(until - done)
            if until % every == 0:
                save_checkpoint(training, checkpoints)
                stored = until
    return True


class _Metrics:
    """A line for each step in a file, which begins with those of the training that was taken up."""

    def __init__(self, training: Training, path: Path) -> None:
        self._training, self._path = training, path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("step,loss,lr\n")
        self.add(0)

    def add(self, done: int) -> None:
        """Write what came after ``done`` steps."""
        lines = (
            f"{step},{loss:.6g},{self._training.rate(step):.6g}\n"
            for step, loss in enumerate(self._training.losses[done:], start=done)
        )
        with self._path.open("a") as file:
            file.writelines(lines)


class _Stop:
    """SIGTERM, which may reach some processes sooner than others, and some not at all."""

    def __init__(self) -> None:
        self._told = False
        signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def agreed(self) -> bool:
        """Return, in all processes alike, whether one was told to stop."""
        told = torch.tensor(int(self._told))
        if dist.is_initialized():
            dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)


@contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, if it did."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # what the processes tell each other beside vectors and gradients goes from CPU to CPU, and no GPU waits for it
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    yield
    dist.destroy_process_group()  # not after an error: the others may be gone


def _training(given: argparse.Namespace) -> Training:
    config = given.config
    torch.manual_seed(config.seed)
    emoji = load_emoji64()
    parts = (SigLIP(EMOJI64_SIGLIP), _tokenizer(), emoji, split(emoji).train, config)
    if not dist.is_initialized():
        return Training(*parts, given.device)
    mesh = init_device_mesh(given.device.type, (dist.get_world_size(),))
    return DistributedTraining(*parts, mesh, given.device, given.parallel or "ddp")


def _tokenizer() -> Tokenizer:
    return Tokenizer(EMOJI64_WEIGHTS / "spiece.model", EMOJI64_SIGLIP.context_length)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m siglip_lib.train",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all results")
    for name, kind, what in (
        ("steps", int, "optimizer steps"),
        ("batch", int, "pairs in a step, over all processes"),
        ("lr", float, "highest rate"),
        ("logit-lr", float, "the same, of temperature and bias"),
        ("weight-decay", float, "of matrices"),
        ("warmup", int, "steps until the highest rate"),
        ("seed", int, "of weights, batches, captions and augmentation"),
    ):
        default = getattr(TrainConfig, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{what} ({default})")
    parser.add_argument(
        "--parallel", choices=PARALLEL, help="under torchrun: whole weights in each process (ddp), "
        "the default, or sharded ones (fsdp2)"
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="a GPU if there is one"
    )
    parser.add_argument(
        "--checkpoint-every", type=int, default=1000, metavar="STEPS", help="(1000)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    given = parser.parse_args()
    names = ("steps", "batch", "lr", "logit_lr", "weight_decay", "warmup", "seed")
    try:
        given.config = TrainConfig(**{name: getattr(given, name) for name in names})
        positive_int("--checkpoint-every", given.checkpoint_every)
        given.device = _device(given.device)
    except ValueError as error:
        parser.error(str(error))
    if given.parallel and not dist.is_torchelastic_launched():
        parser.error(
            f"--parallel {given.parallel} is for several processes: start them by torchrun"
        )
    there = newest_checkpoint(given.out / "checkpoints")
    if given.resume and not there:
        parser.error(f"--resume: there is no checkpoint in {given.out}")
    if there and not given.resume:
        parser.error(
            f"{given.out} holds {there.name}: go on with --resume, or choose another --out"
        )
    return given


def _device(name: str) -> torch.device:
    """Each process its own GPU, or all the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= gpus:
        raise ValueError(
            f"process {local} of this machine needs a GPU of its own; there are {gpus}"
        )
    return torch.device("cuda", local)
