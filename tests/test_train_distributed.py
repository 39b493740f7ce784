"""Many processes train what one does; what is stored any number takes up; what dies or is told to stop ends soon."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_group
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import DeviceMesh

from siglip_lib import SigLIP, Tokenizer, load_siglip
from siglip_lib.distributed import (
    PARALLEL,
    DistributedTraining,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    whole_model,
)
from siglip_lib.emoji64 import Emoji64, load_emoji64, split
from siglip_lib.train import EMOJI64_SIGLIP, EMOJI64_WEIGHTS, TrainConfig, Training
from siglip_lib.train_command import _Stop, main

SIZES = replace(
    EMOJI64_SIGLIP, width=32, layers=2, heads=2, mlp_hidden=32, text_width=32, text_layers=1
)
SMALL = TrainConfig(steps=6, batch=16, warmup=2, lr=1e-3, seed=3, clip=0.5, keywords=False)
WORLDS = (1, 2, 4)


SHARED = replace(SMALL, seed=4)  # with eight concepts, so that a batch has several pairs of one


def parts(emoji: Emoji64, config: TrainConfig = SMALL) -> tuple:
    torch.manual_seed(0)
    tokenizer = Tokenizer(EMOJI64_WEIGHTS / "spiece.model", EMOJI64_SIGLIP.context_length)
    places = split(emoji).train
    places = places[emoji.concept[places] < 8] if config is SHARED else places[::20]
    return SigLIP(SIZES), tokenizer, emoji, places, config


def in_a_process(folder: Path, emoji: Emoji64) -> dict:
    rank, found = dist.get_rank(), {}
    meshes = {world: DeviceMesh("cpu", list(range(world))) for world in WORLDS}

    def new(world: int, parallel: str, config: TrainConfig = SMALL) -> DistributedTraining:
        return DistributedTraining(*parts(emoji, config), meshes[world], "cpu", parallel)

    def note(name: str, training: Training) -> None:
        model = whole_model(training)
        found[name] = [training.losses, model and model.state_dict()]

    for world in WORLDS:
        for parallel in PARALLEL if rank < world else ():
            training = new(world, parallel)
            training.run(progress=False)
            note(f"{world} {parallel}", training)
    sharded = [p for p in training.model.parameters() if hasattr(p, "to_local")]
    found["share"] = sum(p.to_local().numel() for p in sharded) / sum(p.numel() for p in sharded)
    found["whole"] = [n for n, p in training.model.named_parameters() if not hasattr(p, "to_local")]

    if rank < 2:
        training = new(2, "fsdp2")
        training.run(3, progress=False)
        save_checkpoint(training, folder / "stored")
    dist.barrier()
    for world, parallel in ((4, "ddp"), (4, "fsdp2"), (1, "ddp")):
        if rank < world:
            training = new(world, parallel)
            training.run(1, progress=False)  # what it has learned must not stay
            load_checkpoint(training, folder / "stored")
            training.run(progress=False)
            note(f"resumed by {world} {parallel}", training)
    dist.barrier()

    training = new(4, "ddp", SHARED)
    training.run(progress=False)
    note("shared", training)

    training = new(4, "ddp")
    training.run(4, progress=False)
    write = FileSystemWriter.write_data
    if rank == 3:
        FileSystemWriter.write_data = fail
    try:
        save_checkpoint(training, folder / "stored")
    except OSError as error:
        found["failed"] = str(error)
    FileSystemWriter.write_data = write
    dist.barrier()
    found["left"] = sorted(path.name for path in (folder / "stored").iterdir())
    dist.barrier()
    save_checkpoint(training, folder / "stored")
    dist.barrier()
    found["replaced"] = sorted(path.name for path in (folder / "stored").iterdir())

    stop = _Stop()
    before = stop.agreed()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    found["agreed"] = [before, stop.agreed()]

    for name, arguments in {
        "batch": (4, "ddp", replace(SMALL, batch=18)),
        "parallel": (4, "tp", SMALL),
    }.items():
        try:
            new(*arguments)
        except ValueError as error:
            found[name] = str(error)
    return found


def fail(*args):
    raise OSError("no space left")


@pytest.fixture(scope="module")
def emoji():
    return load_emoji64()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("group")


@pytest.fixture(scope="module")
def found(emoji, folder):
    return run_group(in_a_process, max(WORLDS), folder, emoji, limit=200)


@pytest.fixture(scope="module")
def alone(emoji):
    training = Training(*parts(emoji), "cpu")
    training.run(progress=False)
    return training


RUNS = [
    *(f"{world} {parallel}" for world in WORLDS for parallel in PARALLEL),
    *("resumed by 4 ddp", "resumed by 4 fsdp2", "resumed by 1 ddp"),
]


@pytest.mark.parametrize("run", RUNS)
def test_as_one_process_alone(found, alone, run):
    losses, weights = found[0][run]
    assert losses == pytest.approx(alone.losses, rel=1e-5)
    wanted = alone.model.state_dict()
    assert weights.keys() == wanted.keys()
    for name, value in wanted.items():
        # a key's bias has no gradient but rounding, which AdamW makes a step of
        if name.endswith("qkv.bias"):
            value, weights[name] = (x[: SIZES.width] for x in (value, weights[name]))
        if name.endswith("kv.bias"):
            continue
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-4, msg=name)
    for other in found[1:]:
        if run in other:
            assert other[run] == [losses, None]


def test_pairs_of_one_concept_belong_together_on_whichever_processes_they_are(found, emoji):
    training = Training(*parts(emoji, SHARED), "cpu")
    training.run(progress=False)
    assert found[0]["shared"][0] == pytest.approx(training.losses, rel=1e-5)
    assert len(training._inputs["concept"].unique()) <= 8


def test_fsdp2_shards_all_but_temperature_and_bias(found):
    for here in found:
        assert here["share"] == pytest.approx(1 / 4, abs=0.02)
        assert here["whole"] == ["logit_scale", "logit_bias"]


def test_a_checkpoint_that_one_process_cannot_write_leaves_the_old_one(found):
    for here in found:
        assert "no space left" in here["failed"]
        assert here["left"] == ["step_000000003"]
        assert here["replaced"] == ["step_000000004"]


def test_what_several_stored_one_takes_up_and_another_training_does_not(found, folder, emoji):
    training = Training(*parts(emoji), "cpu")
    load_checkpoint(training, folder / "stored")
    assert training.step == 4
    training.run(progress=False)
    assert training.losses == pytest.approx(found[0]["4 ddp"][0], rel=1e-5)

    other = Training(*parts(emoji, replace(SMALL, clip=1.0)), "cpu")
    before = [p.clone() for p in other.model.parameters()]
    with pytest.raises(ValueError, match=re.escape("with other settings: {'clip': 0.5}")):
        load_checkpoint(other, folder / "stored")
    assert all(map(torch.equal, before, other.model.parameters()))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_checkpoint(other, folder / "nothing")


def test_told_to_stop_all_do(found):
    assert [here["agreed"] for here in found] == [[False, True]] * 4


def test_what_cannot_be_shared_is_refused_by_all(found):
    for here in found:
        assert here["batch"] == "batch=18 must be a multiple of 4, the number of processes"
        assert here["parallel"].startswith("parallel='tp' is unknown; allowed are ('ddp', 'fsdp2')")


# --- the command ---

OPTIONS = ("--batch", "4", "--warmup", "2", "--device", "cpu")


@contextmanager
def torchrun(*options: str) -> Iterator[subprocess.Popen]:
    """Run the command in two processes; none outlives the block."""
    by = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    line = [*by, "-m", "siglip_lib.train", *OPTIONS, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
    running.workers = set()
    try:
        yield running
    finally:
        running.kill()
        running.wait()
        running.stderr.close()
        for worker in running.workers:
            if alive(worker):
                os.kill(worker, signal.SIGKILL)


def children(pid: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it is gone
            continue
        if int(fields[1]) == pid:
            found.add(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def wait_until(true: Callable[[], bool], running: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not true():
        running.workers |= children(running.pid)
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)


def end_of(running: subprocess.Popen) -> tuple[str, float]:
    """What it said, and the seconds it took to end."""
    start = time.monotonic()
    said = running.communicate(timeout=60)[1]
    assert not any(map(alive, running.workers))
    return said, time.monotonic() - start


def steps_of(out: Path) -> list[tuple[int, float]]:
    """Steps and losses in the file; a line that is being written is left out."""
    path = out / "metrics.csv"
    lines = path.read_text().split("\n")[1:-1] if path.exists() else []
    return [(int(step), float(loss)) for step, loss, _ in (line.split(",") for line in lines)]


def stored(out: Path) -> int:
    newest = newest_checkpoint(out / "checkpoints")
    return int(newest.name.removeprefix("step_")) if newest else 0


@pytest.fixture
def here(monkeypatch) -> Iterator[Callable]:
    """The command in this process."""

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["siglip_lib.train", *OPTIONS, *options])
        main()

    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)


def test_stopped_killed_and_resumed_it_is_one_training(tmp_path, emoji, here, monkeypatch, capfd):
    out, steps = tmp_path / "run", 100_000
    options = ("--out", str(out), "--steps", str(steps), "--checkpoint-every")

    with torchrun(*options, "1000") as running:
        wait_until(lambda: len(steps_of(out)) >= 3, running)
        running.send_signal(signal.SIGTERM)
        said, _ = end_of(running)
    assert running.returncode != 0
    assert f"stopped after {stored(out)} steps" in said
    assert [step for step, _ in steps_of(out)] == [*range(stored(out))]

    first = stored(out)
    with torchrun(*options, "2", "--resume", "--parallel", "fsdp2") as running:
        wait_until(lambda: stored(out) > first + 1, running)
        killed = max(running.workers)
        os.kill(killed, signal.SIGKILL)
        said, seconds = end_of(running)
    assert running.returncode != 0
    assert seconds < 60
    assert f"Signal 9 (SIGKILL) received by PID {killed}" in said

    second, run, began = stored(out), Training.run, []

    def run_and_be_told(training, until, progress):
        began.append(training.step)
        run(training, until, progress)
        if training.step == second + 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Training, "run", run_and_be_told)
    with pytest.raises(SystemExit) as ended:
        here(*options, "1000", "--resume")
    assert ended.value.code == 128 + signal.SIGTERM
    assert began == [second, second + 1, second + 2]
    assert stored(out) == second + 3
    assert f"stopped after {second + 3} steps" in capfd.readouterr().err
    monkeypatch.undo()

    config = TrainConfig(steps=steps, batch=4, warmup=2)
    torch.manual_seed(0)
    tokenizer = Tokenizer(EMOJI64_WEIGHTS / "spiece.model", EMOJI64_SIGLIP.context_length)
    model = SigLIP(EMOJI64_SIGLIP)
    never_stopped = Training(model, tokenizer, emoji, split(emoji).train, config, "cpu")
    never_stopped.run(stored(out), progress=False)
    assert [loss for _, loss in steps_of(out)] == pytest.approx(never_stopped.losses, rel=1e-3)


def test_at_the_end_there_are_weights(tmp_path, here, capfd):
    out = tmp_path / "run"
    here("--out", str(out), "--steps", "2", "--checkpoint-every", "1")
    said = capfd.readouterr().err
    assert f"the weights are in {out / 'weights'}" in said
    assert re.search(r"2/2 .*loss=\d+\.\d+, lr=\d\.\de-\d+", said)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "metrics.csv", "weights"]
    assert stored(out) == 2
    model, _ = load_siglip(out / "weights")
    assert model.config == EMOJI64_SIGLIP


def test_wrong_options_are_refused_before_anything_begins(tmp_path, here, capfd, monkeypatch):
    (tmp_path / "old" / "checkpoints" / "step_000000007").mkdir(parents=True)
    new, old = ("--out", str(tmp_path / "new")), ("--out", str(tmp_path / "old"))
    for options, said in (
        ((), "the following arguments are required: --out"),
        ((*new, "--steps", "0"), "steps=0 must be at least 1"),
        ((*new, "--lr", "-1"), "lr=-1.0 must not be negative"),
        ((*new, "--checkpoint-every", "0"), "--checkpoint-every=0 must be at least 1"),
        ((*new, "--parallel", "fsdp2"), "--parallel fsdp2 is for several processes"),
        ((*new, "--resume"), "--resume: there is no checkpoint in"),
        (old, "holds step_000000007: go on with --resume, or choose another --out"),
    ):
        with pytest.raises(SystemExit) as ended:
            here(*options)
        assert ended.value.code == 2
        assert said in capfd.readouterr().err
    assert not (tmp_path / "new").exists()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit):
        here(*new, "--device", "cuda")
    said = capfd.readouterr().err
    assert "process 2 of this machine needs a GPU of its own; there are 2" in said
