"""Many processes train what one does; what is stored any number takes up; what dies or is told to stop ends soon."""

import fcntl
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath

import pytest
import torch
import torch.distributed as dist
from processes import run_group
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import DeviceMesh

import siglip_lib.train.training as train
from siglip_lib import SigLIP, Tokenizer, load_siglip
from siglip_lib.data.emoji64 import Emoji64, load_emoji64, split
from siglip_lib.siglip.folder import EMOJI64_SIGLIP, EMOJI64_WEIGHTS
from siglip_lib.train.__main__ import _SIGNALS, _Metrics, _Stop, main
from siglip_lib.train.batches import Batches
from siglip_lib.train.distributed import PARALLEL, DistributedTraining
from siglip_lib.train.recipe import TrainConfig
from siglip_lib.train.stored import load_checkpoint, newest_checkpoint, save_checkpoint, whole_model
from siglip_lib.train.training import Training
from siglip_lib.train.variants import _RememberingTokenizer

SIZES = replace(
    EMOJI64_SIGLIP, width=32, layers=2, heads=2, mlp_hidden=32, text_width=32, text_layers=1
)
SMALL = TrainConfig(steps=6, batch=16, warmup=2, lr=1e-3, seed=3, clip=0.5, keywords=False)
WORLDS = (1, 2, 4)


SHARED = replace(SMALL, seed=4)  # with eight concepts, so that a batch has several pairs of one


@cache
def tokenizer() -> Tokenizer:
    """One for all trainings of a process, which ask for the same thousands of captions."""
    return _RememberingTokenizer(EMOJI64_WEIGHTS / "spiece.model", EMOJI64_SIGLIP.context_length)


def parts(emoji: Emoji64, config: TrainConfig = SMALL) -> tuple:
    torch.manual_seed(0)
    places = split(emoji).train
    places = places[emoji.concept[places] < 8] if config is SHARED else places[::20]
    return SigLIP(SIZES), tokenizer(), emoji, places, config


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

    found["slow"], found["full"] = first_is_slow(training, folder), disk_is_full(training, folder)
    if rank < 2:
        found["interrupted"] = interrupt(new)

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


def fail(*args, **options):
    raise OSError("no space left")


def first_is_slow(training: Training, folder: Path) -> list[str]:
    """What lies in the folder the moment that ``save_checkpoint`` returns; the first process makes the others wait."""
    begin, rename = Path.mkdir, os.replace
    if training.rank == 0:
        Path.mkdir = lambda *args, **options: (time.sleep(0.5), begin(*args, **options))
        os.replace = lambda *args: (time.sleep(0.5), rename(*args))
    stored = save_checkpoint(training, folder / "slow")
    left = [path.name for path in stored.parent.iterdir()]
    Path.mkdir, os.replace = begin, rename
    return left


def disk_is_full(training: Training, folder: Path) -> list[str]:
    """What all processes are told, and what is left, where the first can't write its file or rename the folder."""
    said = []
    for name in ("write_text", "replace"):
        owner = Path if name == "write_text" else os
        kept = getattr(owner, name)
        if training.rank == 0:
            setattr(owner, name, fail)
        try:
            save_checkpoint(training, folder / "full")
        except OSError as error:
            said.append(str(error))
        setattr(owner, name, kept)
    dist.barrier()
    return said + [path.name for path in (folder / "full").iterdir()]


def interrupt(new: Callable) -> list:
    """Ctrl-C in one of two processes: where both then stand, and whether going on gives what nothing stopped."""
    Batches.block = 2
    whole, stopped = new(2, "ddp"), new(2, "ddp")
    whole.run(progress=False)
    clip = DistributedTraining._clip

    def press(training: DistributedTraining) -> None:
        if training.step == training.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        clip(training)

    DistributedTraining._clip = press
    found = []
    try:
        stopped.run(progress=False)
    except KeyboardInterrupt:
        found.append(stopped.step)
    DistributedTraining._clip = clip
    stopped.run(progress=False)
    Batches.block = 50
    same = map(torch.equal, stopped.model.state_dict().values(), whole.model.state_dict().values())
    return [*found, stopped.losses == whole.losses, all(same)]


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


def test_no_process_runs_ahead_of_a_slow_one(found):
    assert [here["slow"] for here in found] == [["step_000000004"]] * 4


def test_what_one_process_cannot_store_all_hear_of_and_nothing_is_left(found):
    for here in found:
        assert len(here["full"]) == 2
        for said in here["full"]:
            assert re.fullmatch(r".*step_000000004 was not stored: no space left", said)


def test_interrupted_in_one_process_both_stop_at_one_step_and_can_go_on(found):
    assert [here["interrupted"] for here in found[:2]] == [[2, True, True]] * 2


def test_broken_off_it_does_not_go_on_and_says_what_to_take_up(emoji, tmp_path, monkeypatch):
    """Other processes may have done the step."""
    meeting = dist.FileStore(str(tmp_path / "meeting"), 1)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=meeting, rank=0, world_size=1)
    try:
        training = DistributedTraining(*parts(emoji), DeviceMesh("cpu", [0]), "cpu")
        training.run(1, progress=False)
        save_checkpoint(training, tmp_path / "stored")
        with monkeypatch.context() as patch:
            patch.setattr(train, "augment", fail)
            with pytest.raises(OSError, match="no space left"):
                training.run(progress=False)
        said = "may not stand at the same step; resume from '.*step_000000001'"
        for use in (training.run, lambda: save_checkpoint(training, tmp_path / "stored")):
            with pytest.raises(RuntimeError, match=said):
                use()
        load_checkpoint(training, tmp_path / "stored")
        training.run(2, progress=False)
    finally:
        dist.destroy_process_group()


def test_told_to_stop_all_do(found):
    assert [here["agreed"] for here in found] == [[0, signal.SIGTERM]] * 4


def test_what_cannot_be_shared_is_refused_by_all(found):
    for here in found:
        assert here["batch"] == "batch=18 must be a multiple of 4, the number of processes"
        assert here["parallel"].startswith("parallel='tp' is unknown; allowed are 'ddp', 'fsdp2'")


# --- checkpoints that somebody else wrote, or that are damaged ---


@pytest.fixture(scope="module")
def undamaged(emoji, tmp_path_factory):
    """A checkpoint of two steps, by one process."""
    training = Training(*parts(emoji), "cpu")
    training.run(2, progress=False)
    return save_checkpoint(training, tmp_path_factory.mktemp("one"))


class Touch:
    """Where it is unpickled without care, a file appears."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


NAME = "optimizer.state.logit_bias.exp_avg"


def changed(stored: Path, change: Callable) -> None:
    path = stored / ".metadata"
    contents = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(contents) or contents))


def with_a_command(stored: Path, as_bytes: bool) -> None:
    """In the place of a tensor; as bytes torch would unpickle it with all it asks for."""
    file = stored / "__0_0.distcp"
    start = file.stat().st_size
    with file.open("ab") as end:
        torch.save(Touch(stored.parent / "ran"), end)

    def change(contents):
        (index,) = (index for index in contents.storage_data if index.fqn == NAME)
        place = contents.storage_data.pop(index)
        place.offset, place.length = start, file.stat().st_size - start
        if as_bytes:
            contents.state_dict_metadata[NAME] = BytesStorageMetadata()
            index = MetadataIndex(NAME)
        contents.storage_data[index] = place

    changed(stored, change)


def about(**new: object) -> Callable:
    def change(stored: Path) -> None:
        path = stored / "training.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | new))

    return change


def elsewhere(contents) -> None:
    next(iter(contents.storage_data.values())).relative_path = "../__0_0.distcp"


DAMAGES = {
    "a command in the contents": (
        lambda s: (s / ".metadata").write_bytes(pickle.dumps(Touch(s.parent / "ran"))),
        "is damaged: TypeError",
    ),
    "a command beside the contents": (
        lambda s: changed(s, lambda contents: [contents, Touch(s.parent / "ran")]),
        "is damaged: AttributeError",
    ),
    "bytes for a tensor": (lambda s: with_a_command(s, True), f"{NAME} is no tensor"),
    "a pickle for a tensor": (lambda s: with_a_command(s, False), "is damaged: UnpicklingError"),
    "a file elsewhere": (lambda s: changed(s, elsewhere), "'../__0_0.distcp' lies elsewhere"),
    "a file above": (
        lambda s: changed(
            s, lambda c: setattr(next(iter(c.storage_data.values())), "relative_path", "..")
        ),
        "'..' lies elsewhere",
    ),
    "a length below 0": (
        lambda s: changed(s, lambda c: setattr(next(iter(c.storage_data.values())), "length", -1)),
        "length=-1 must be at least 0",
    ),
    "tensors of zeros": (
        lambda s: (s / "__0_0.distcp").write_bytes(bytes((s / "__0_0.distcp").stat().st_size)),
        "is damaged: UnpicklingError: no tensor; start anew",
    ),
    "a pipe": (
        lambda s: ((s / "training.json").unlink(), os.mkfifo(s / "training.json")),
        "training.json is no file",
    ),
    "contents cut": (
        lambda s: (s / ".metadata").write_bytes((s / ".metadata").read_bytes()[:500]),
        "is damaged: ",
    ),
    "no contents": (lambda s: (s / ".metadata").unlink(), "is damaged: FileNotFoundError"),
    "other contents": (lambda s: changed(s, lambda contents: 3), "is damaged: AttributeError"),
    "tensors cut": (
        lambda s: os.truncate(s / "__0_0.distcp", (s / "__0_0.distcp").stat().st_size // 2),
        "is damaged: ",
    ),
    "no tensors": (lambda s: (s / "__0_0.distcp").unlink(), "is damaged: FileNotFoundError"),
    "a tensor less": (
        lambda s: changed(s, lambda c: c.state_dict_metadata.pop(NAME) and None),
        f"its tensors do not fit. missing (1): {NAME}",
    ),
    "a part of a tensor less": (
        lambda s: changed(s, lambda c: c.state_dict_metadata[NAME].chunks.clear()),
        f"NaN or infinite elements in {NAME}",
    ),
    "another shape": (
        lambda s: changed(
            s, lambda c: setattr(c.state_dict_metadata[NAME], "size", torch.Size([2]))
        ),
        f"of the wrong shape (1): {NAME} (2,), not ()",
    ),
    "no JSON": (lambda s: (s / "training.json").write_text("{"), "is damaged: JSONDecodeError"),
    "other JSON": (lambda s: (s / "training.json").write_text("[1]"), "does not tell its settings"),
    "nested JSON": (
        lambda s: (s / "training.json").write_text("[" * 10**5),
        "is damaged: Recursion",
    ),
    "no settings": (about(settings={}), "not in both are ['batch', "),
    "an unknown setting": (about(settings={"colour": 1}), "not in both are ["),
    "a huge step": (about(step=10**9), "step=1000000000 must lie in 0 to 6"),
    "a negative step": (about(step=-5), "step=-5"),
    "another step": (about(step=1, losses=[1.0]), ".step is not 1"),
    "no losses": (about(losses=[]), "the losses of 2 steps"),
    "losses that are no numbers": (about(losses=[1.0, math.nan]), "a loss is not finite"),
    "losses that are words": (about(losses=["a", "b"]), "a loss is not finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_nothing_of_it_is_run(
    emoji, undamaged, tmp_path, damage
):
    stored = tmp_path / "stored" / undamaged.name
    shutil.copytree(undamaged, stored)
    act, said = DAMAGES[damage]
    act(stored)
    training = Training(*parts(emoji), "cpu")
    before = {name: tensor.clone() for name, tensor in training.tensors().items()}
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        load_checkpoint(training, stored.parent)
    assert "step_000000002" in str(raised.value)
    assert not (stored.parent / "ran").exists()
    for name, tensor in training.tensors().items():
        assert torch.equal(tensor, before[name]), name
    assert training.step == 0


def test_what_a_table_of_contents_does_to_classes_reaches_none(emoji, undamaged, tmp_path):
    stored = tmp_path / "stored" / undamaged.name
    shutil.copytree(undamaged, stored)
    table = (stored / ".metadata").read_bytes()
    assert table.endswith(b".")
    for module, name in (
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("pathlib", "PurePosixPath"),
        ("builtins", "dict"),
    ):
        touch = b"N}\x8c\x07touchedK\x01s\x86b0"  # sets an attribute of what lies on the stack
        table = table[:-1] + f"c{module}\n{name}\n".encode() + touch + b"."
    (stored / ".metadata").write_bytes(table)
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(Training(*parts(emoji), "cpu"), stored.parent)
    for touched in (TensorStorageMetadata, _StorageInfo, PurePosixPath):
        assert not hasattr(touched, "touched")


ELSEWHERE = [
    PermissionError(13, "Permission denied", "training.json"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    dist.DistBackendError("NCCL error"),
    RuntimeError("[/pytorch/third_party/gloo/gloo/pair.cc:5] Connection closed by peer"),
]


@pytest.mark.parametrize("where", ["Path.read_text", "_contents", "FileSystemReader.read_data"])
def test_a_good_checkpoint_is_not_called_damaged_where_something_else_failed(
    emoji, undamaged, monkeypatch, where
):
    training = Training(*parts(emoji), "cpu")
    for error in ELSEWHERE:

        def fail(*args: object, error: Exception = error, **options: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(f"siglip_lib.train.stored.{where}", fail)
            with pytest.raises(type(error)) as raised:
                load_checkpoint(training, undamaged.parent)
        assert str(raised.value) == str(error)
    load_checkpoint(training, undamaged.parent)
    assert training.step == 2


def test_weights_that_are_not_finite_are_not_stored(emoji, tmp_path):
    training = Training(*parts(emoji), "cpu")
    with torch.no_grad():
        training.model.logit_bias.fill_(math.nan)
    with pytest.raises(ValueError, match=r"step_000000000 was not stored: .* model.logit_bias"):
        save_checkpoint(training, tmp_path / "stored")
    assert not (tmp_path / "stored").exists()


def test_only_what_is_named_as_a_checkpoint_is_one(emoji, tmp_path):
    training, kept = (
        Training(*parts(emoji), "cpu"),
        ("step_000000005_good", "step_backup", "step_5"),
    )
    for name in (*kept, "step_000000003.part", "step_0000000001"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_notes.txt").write_text("mine")
    (tmp_path / "step_999999999").symlink_to("step_5")
    assert newest_checkpoint(tmp_path) is None
    save_checkpoint(training, tmp_path)
    training.run(1, progress=False)
    stored = save_checkpoint(training, tmp_path)
    assert newest_checkpoint(tmp_path) == stored
    others = {*kept, "step_0000000001", "step_notes.txt", "step_999999999"}
    assert {path.name for path in tmp_path.iterdir()} == others | {"step_000000001"}
    with pytest.raises(FileExistsError, match="step_000000001 is stored already"):
        save_checkpoint(training, tmp_path)
    again = Training(*parts(emoji), "cpu")
    load_checkpoint(again, tmp_path)
    assert again.step == 1


# --- the command ---

OPTIONS = ("--batch", "4", "--warmup", "2", "--device", "cpu")


@contextmanager
def launched(*options: str) -> Iterator[subprocess.Popen]:
    """Run the command in two processes; none outlives the block."""
    by = [sys.executable, "-m", "siglip_lib.launch", "2"]
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


def listening(pids: set[int]) -> list[str]:
    """The addresses at which these processes wait for connections, in hexadecimal."""
    sockets = set()
    for pid in pids:
        for end in Path(f"/proc/{pid}/fd").iterdir():
            sockets |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(end)))
    lines = "".join(Path(f"/proc/net/{kind}").read_text() for kind in ("tcp", "tcp6")).splitlines()
    fields = [line.split() for line in lines]
    return [x[1].split(":")[0] for x in fields if x[3] == "0A" and x[9] in sockets]


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
def here(monkeypatch, emoji) -> Iterator[Callable]:
    """The command in this process, which has the pictures and the captions' tokens already."""
    monkeypatch.setattr("siglip_lib.train.__main__.load_emoji64", lambda: emoji)
    monkeypatch.setattr("siglip_lib.train.__main__.Tokenizer", lambda *_: tokenizer())

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["siglip_lib.train", *OPTIONS, *options])
        main()

    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_stopped_killed_and_resumed_it_is_one_training(tmp_path, emoji, here, monkeypatch, capfd):
    out, steps = tmp_path / "run", 100_000
    options = ("--out", str(out), "--steps", str(steps), "--checkpoint-every")

    with launched(*options, "1000") as running:
        wait_until(lambda: len(steps_of(out)) >= 3, running)
        addresses = listening(running.workers | {running.pid})
        assert set(addresses) == {"0100007F"}  # gloo's, at 127.0.0.1 alone
        running.send_signal(signal.SIGTERM)
        said, _ = end_of(running)
    assert running.returncode != 0
    assert f"stopped after {stored(out)} steps" in said
    assert [step for step, _ in steps_of(out)] == [*range(stored(out))]

    first = stored(out)
    with launched(*options, "2", "--resume", "--parallel", "fsdp2") as running:
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
    model = SigLIP(EMOJI64_SIGLIP)
    never_stopped = Training(model, tokenizer(), emoji, split(emoji).train, config, "cpu")
    never_stopped.run(stored(out), progress=False)
    assert [loss for _, loss in steps_of(out)] == pytest.approx(never_stopped.losses, rel=1e-3)


def test_restarted_processes_meet_anew(tmp_path):
    script = tmp_path / "meet.py"
    script.write_text(
        "import os, sys\n"
        "import torch.distributed as dist\n"
        "from siglip_lib.launch import meeting\n"
        "dist.init_process_group('gloo', **meeting())\n"
        "dist.barrier()\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    os._exit(1)  # as if killed\n"
        "open(f'{sys.argv[1]}.{dist.get_rank()}', 'x').close()\n"
        "dist.destroy_process_group()\n"
    )
    line = [sys.executable, "-m", "siglip_lib.launch", "2", "--max-restarts=1", str(script)]
    ended = subprocess.run(
        [*line, str(tmp_path / "met")], timeout=90, stderr=subprocess.PIPE, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "met.0").exists()
    assert (tmp_path / "met.1").exists()


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


@pytest.fixture
def _hears_the_terminal_close():
    """nohup makes what it starts deaf to that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_hears_the_terminal_close")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_store_the_training(tmp_path, here, monkeypatch, number):
    run = Training.run

    def run_and_be_told(training, until, progress):
        run(training, until, progress)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(Training, "run", run_and_be_told)
    with pytest.raises(SystemExit) as ended:
        here("--out", str(tmp_path / "run"), "--steps", "5")
    assert ended.value.code == 128 + number
    assert stored(tmp_path / "run") == 1


def test_stopped_before_the_first_step_it_can_be_resumed(tmp_path, here, monkeypatch):
    out, begin = tmp_path / "run", _Metrics.begin

    def begin_and_be_told(metrics, training):
        begin(metrics, training)
        os.kill(os.getpid(), signal.SIGTERM)

    for resume in ((), ("--resume",)):  # and stopped once more
        with monkeypatch.context() as patch:
            patch.setattr(_Metrics, "begin", begin_and_be_told)
            with pytest.raises(SystemExit) as ended:
                here("--out", str(out), "--steps", "2", *resume)
        assert ended.value.code == 128 + signal.SIGTERM
        assert newest_checkpoint(out / "checkpoints").name == "step_000000000"
    here("--out", str(out), "--steps", "2", "--resume")
    assert [step for step, _ in steps_of(out)] == [0, 1]
    assert (out / "weights").is_dir()


def test_a_folder_that_holds_something_or_is_in_use_is_left_alone(tmp_path, here, capfd):
    out = tmp_path / "run"
    weights, metrics = out / "weights", out / "metrics.csv"
    out.write_text("mine")
    with pytest.raises(SystemExit) as ended:
        here("--out", str(out))
    assert ended.value.code == 2
    assert "Not a directory" in capfd.readouterr().err
    out.unlink()
    out.mkdir()
    metrics.write_text("mine")
    with pytest.raises(SystemExit):
        here("--out", str(out))
    said = capfd.readouterr().err
    assert (
        f"{out} is not empty; choose another --out, or delete it if a run broke off there" in said
    )

    (out / "checkpoints" / "step_000000001").mkdir(parents=True)
    weights.mkdir()
    (weights / "diary.txt").write_text("mine")
    with pytest.raises(SystemExit):
        here("--out", str(out), "--resume")
    assert "holds diary.txt" in capfd.readouterr().err
    shutil.rmtree(weights)
    with metrics.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit):
            here("--out", str(out), "--resume")
    assert f"{out} belongs to a run that has not ended" in capfd.readouterr().err
    assert metrics.read_text() == "mine"


def test_a_full_disk_is_told_by_name(emoji):
    training = Training(*parts(emoji), "cpu")
    metrics = _Metrics(Path("/dev/full"))
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        metrics.begin(training)
    with suppress(OSError):  # it tries once more
        metrics.close()


def test_wrong_options_are_refused_before_anything_begins(tmp_path, here, capfd, monkeypatch):
    (tmp_path / "old" / "checkpoints" / "step_000000007").mkdir(parents=True)
    new, old = ("--out", str(tmp_path / "new")), ("--out", str(tmp_path / "old"))
    for options, said in (
        ((), "the following arguments are required: --out"),
        ((*new, "--steps", "0"), "steps=0 must be at least 1"),
        ((*new, "--lr", "-1"), "lr=-1.0 must not be negative"),
        ((*new, "--seed", str(10**23)), "seed=100000000000000000000000 must be below"),
        ((*new, "--batch", "9999"), "batch=9999 must be at most"),
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
