"""``python -m siglip_lib.train``, alone or in every process that ``siglip_lib.launch`` starts.

A signal to stop stores a checkpoint before the run ends: on a CPU after the step, on a GPU after the block of 50 steps,
that it is at. A second one changes nothing.
"""

import argparse
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from siglip_lib.base.checks import positive_int
from siglip_lib.data.emoji64 import load_emoji64, split
from siglip_lib.launch import meeting
from siglip_lib.siglip.folder import EMOJI64_SIGLIP, EMOJI64_WEIGHTS, check_replaceable, save_siglip
from siglip_lib.siglip.model import SigLIP
from siglip_lib.siglip.text import Tokenizer
from siglip_lib.train.batches import Batches
from siglip_lib.train.distributed import PARALLEL, DistributedTraining
from siglip_lib.train.recipe import TrainConfig
from siglip_lib.train.stored import (
    errors_of_all,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    whole_model,
)
from siglip_lib.train.training import Training

_DESCRIPTION = """Train a SigLIP on emoji64. One process:
  python -m siglip_lib.train --out run
four, on a GPU each if there are any:
  python -m siglip_lib.launch 4 -m siglip_lib.train --out run"""
_EPILOG = """--out gets metrics.csv, checkpoints/ and, at the end, weights/, which load_siglip reads. Ctrl-C, SIGTERM
and SIGHUP store a checkpoint and end the run (exit code 128 + the signal's number); --resume goes on, also with another
number of processes."""
_CONFIG_OPTIONS = {
    "steps": "optimizer steps",
    "batch": "pairs in a step, over all processes",
    "lr": "highest learning rate",
    "logit_lr": "the same, of temperature and bias",
    "weight_decay": "of matrices",
    "warmup": "steps until the highest learning rate",
    "seed": "of weights, batches, captions and augmentation",
}
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@record  # torchrun then shows the error of the process that failed first
def main() -> None:
    """Train as the command line says."""
    parser, given = _command_line()
    stop = _Stop()
    tokenizer = Tokenizer(EMOJI64_WEIGHTS / "spiece.model", EMOJI64_SIGLIP.context_length)
    with _process_group(given.device):
        try:
            training = _new_training(given, tokenizer)
        except ValueError as error:  # --batch does not fit, in all processes alike
            parser.error(str(error))
        checkpoints = given.out / "checkpoints"
        metrics = None
        try:
            with errors_of_all(training):
                if training.rank == 0:
                    _check_folder(given.out, given.resume)
                    metrics = _Metrics(given.out / "metrics.csv")
        except (OSError, ValueError) as error:
            parser.error(str(error)) if training.rank == 0 else sys.exit(2)
        with closing(metrics) if metrics else nullcontext():
            if given.resume:
                load_checkpoint(training, checkpoints)
            stopped = _train(training, checkpoints, given.checkpoint_every, stop, metrics)
            training.release()
            model = None if stopped else whole_model(training)
            if model is not None:
                save_siglip(model, tokenizer, given.out / "weights")
                print(f"the weights are in {given.out / 'weights'}", file=sys.stderr)
    if stopped:
        sys.exit(128 + stopped)  # as the shell reports it


def _train(
    training: Training, checkpoints: Path, every: int, stop: "_Stop", metrics: "_Metrics | None"
) -> int:
    """Train to the end and return 0; or, by a signal to stop, store the training and return the signal's number."""
    steps = training.config.steps
    # a GPU gets a block of steps ahead; on a CPU a look after each costs nothing
    stride = Batches.block if training.device.type == "cuda" else 1
    if metrics:
        metrics.begin(training)
    stored = training.step
    with tqdm(total=steps, initial=stored, unit="step", disable=training.rank > 0) as bar:
        while training.step < steps:
            if number := stop.agreed():
                # even before the first step: what nothing is stored of can't be resumed
                if training.step > stored or not training.stored:
                    save_checkpoint(training, checkpoints)
                if training.rank == 0:
                    with suppress(OSError):  # after SIGHUP the terminal may be gone
                        bar.write(f"stopped after {training.step} steps", file=sys.stderr)
                return number
            done = training.step
            until = min(steps, *(done - done % n + n for n in (stride, every)))
            training.run(until, progress=False)
            if metrics:
                metrics.add(training, done)
            loss, lr = training.losses[-1], training.rate(until - 1)
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)
            bar.update(until - done)
            if until % every == 0:
                save_checkpoint(training, checkpoints)
                stored = until
    return 0


class _Metrics:
    """A line for each step in a file, which begins with those of the training that was resumed.

    As long as it is open no other run can have the same folder; the system forgets that when the process ends.

    Raises:
        BlockingIOError: another run has it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # neither emptied nor anew: another run may be writing it
        self._file = path.open("r+" if path.exists() else "x+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise BlockingIOError(f"{path.parent} belongs to a run that has not ended") from None
        except OSError:  # this file system has no locks
            pass

    def begin(self, training: Training) -> None:
        """Write anew what the training has behind it."""
        self._file.seek(0)
        self._file.write("step,loss,lr\n")
        self.add(training, 0)
        self._file.truncate()

    def add(self, training: Training, done: int) -> None:
        """Write what came after ``done`` steps."""
        try:
            for step, loss in enumerate(training.losses[done:], start=done):
                self._file.write(f"{step},{loss:.6g},{training.rate(step):.6g}\n")
            self._file.flush()
        except OSError as error:  # the system does not tell which file
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def close(self) -> None:
        self._file.close()


class _Stop:
    """Signals to stop, which may reach some processes sooner than others, and some not at all."""

    def __init__(self) -> None:
        self._received = 0
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks for
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def agreed(self) -> int:
        """Return, in all processes alike, the number of a signal that one of them received, or 0."""
        received = torch.tensor(self._received)
        if dist.is_initialized():
            dist.all_reduce(received, dist.ReduceOp.MAX)
        return int(received)


@contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that were started together, if there are any."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # what the processes tell each other beside vectors and gradients goes from CPU to CPU, and no GPU waits for it
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # a process that died unseen must not keep the others for ever
    dist.init_process_group(backend, timeout=timedelta(seconds=50), **meeting())
    yield
    dist.destroy_process_group()  # not after an error: the others may be gone


def _check_folder(out: Path, resume: bool) -> None:
    there = newest_checkpoint(out / "checkpoints")
    if resume and not there:
        raise ValueError(f"--resume: there is no checkpoint in {out}")
    if there and not resume:
        raise ValueError(f"{out} holds {there.name}: go on with --resume, or choose another --out")
    if not resume and out.exists() and any(out.iterdir()):
        raise ValueError(
            f"{out} is not empty; choose another --out, or delete it if a run broke off there before "
            "its first checkpoint"
        )
    check_replaceable(out / "weights")  # not after the last step


def _new_training(given: argparse.Namespace, tokenizer: Tokenizer) -> Training:
    config = given.config
    torch.manual_seed(config.seed)
    emoji = load_emoji64()
    parts = (SigLIP(EMOJI64_SIGLIP), tokenizer, emoji, split(emoji).train, config)
    if not dist.is_initialized():
        return Training(*parts, given.device)
    mesh = init_device_mesh(given.device.type, (dist.get_world_size(),))
    return DistributedTraining(*parts, mesh, given.device, given.parallel or "ddp")


def _command_line() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return what is given, with ``config`` and ``device`` made of it, and the parser, for further errors."""
    parser = argparse.ArgumentParser(
        prog="python -m siglip_lib.train",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of all results")
    for name, what in _CONFIG_OPTIONS.items():
        default = getattr(TrainConfig, name)
        option = "--" + name.replace("_", "-")
        add(option, type=type(default), default=default, help=f"{what} ({default})")
    add("--parallel", choices=PARALLEL, help="each process has whole weights, or a shard (ddp)")
    devices = ("auto", "cpu", "cuda")
    add("--device", choices=devices, default="auto", help="a GPU if there is one")
    add("--checkpoint-every", type=int, default=1000, metavar="STEPS", help="(1000)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    given = parser.parse_args()
    try:
        given.config = TrainConfig(**{name: getattr(given, name) for name in _CONFIG_OPTIONS})
        positive_int("--checkpoint-every", given.checkpoint_every)
        given.device = _device(given.device)
    except ValueError as error:
        parser.error(str(error))
    if given.parallel and not dist.is_torchelastic_launched():
        how = "start them by python -m siglip_lib.launch"
        parser.error(f"--parallel {given.parallel} is for several processes: {how}")
    return parser, given


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


if __name__ == "__main__":
    main()
