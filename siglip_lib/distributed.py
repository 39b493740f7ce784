"""Train a SigLIP with many processes, and store a training so that any number of processes can take it up."""

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from siglip_lib.emoji64 import Emoji64
from siglip_lib.ring import ring_sigmoid_loss
from siglip_lib.siglip import SigLIP
from siglip_lib.text import Tokenizer
from siglip_lib.train import PairLoss, TrainConfig, Training

PARALLEL = ("ddp", "fsdp2")


class DistributedTraining(Training):
    """``Training`` of which every process computes a part of each batch; all call the same methods.

    Every process draws the whole batch, from the seed and the step alone, and takes its rows of it. So the number of
    processes changes the result by no more than rounding. The loss is ``ring_sigmoid_loss``. On GPUs a step with
    ``ddp`` is recorded as a CUDA graph, with what it sends; ``fsdp2`` launches its kernels one by one. Call ``release``
    before the process group is destroyed.

    Args:
        model: the SigLIP, the same in all processes, changed in place.
        tokenizer: of its text tower.
        emoji: the pictures and names.
        places: (n,) which of the pictures to train on.
        config: how to train; ``batch`` counts the pairs of all processes together.
        mesh: the processes, of one dimension, on ``cpu`` or ``cuda``.
        device: this process's.
        parallel: ``ddp`` keeps all weights in each process. ``fsdp2`` shards them, with their gradients and moments,
            each block being a unit; only temperature and bias stay whole.

    Raises:
        ValueError: ``batch`` is not a multiple of the number of processes, ``parallel`` is unknown, or as in
            ``Training``.
    """

    def __init__(
        self,
        model: SigLIP,
        tokenizer: Tokenizer,
        emoji: Emoji64,
        places: Tensor,
        config: TrainConfig,
        mesh: DeviceMesh,
        device: torch.device | str,
        parallel: str = "ddp",
    ) -> None:
        if parallel not in PARALLEL:
            raise ValueError(f"parallel={parallel!r} is unknown; allowed are {PARALLEL}")
        world = mesh.size()
        if config.batch % world:
            raise ValueError(
                f"batch={config.batch} must be a multiple of {world}, the number of processes"
            )
        self.group, self.rank = mesh.get_group(), mesh.get_local_rank()
        if mesh.device_type == "cuda":
            # DDP remembers the stream that it was made on, and the default one can't be recorded
            self._stream = torch.cuda.Stream(device)
        self._eager_steps = 11 if parallel == "ddp" else math.inf  # DDP's documentation asks for 11
        self._mesh, self._parallel = mesh, parallel
        share = config.batch // world
        self._rows = slice(self.rank * share, (self.rank + 1) * share)
        with self._own_stream():
            super().__init__(model, tokenizer, emoji, places, config, device)

    def run(self, until: int | None = None, progress: bool = True) -> None:
        with self._own_stream():
            super().run(until, progress)

    @contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Work on the training's stream, after what was begun before and before what comes after."""
        if self._stream is None:
            yield
            return
        outside = torch.cuda.current_stream()
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)

    def _wrapped(self, model: SigLIP) -> nn.Module:
        pair_loss = PairLoss(model, partial(ring_sigmoid_loss, group=self.group))
        if self._parallel == "ddp":
            return DistributedDataParallel(
                pair_loss, process_group=self.group, gradient_as_bucket_view=True
            )
        for block in (*model.image.blocks, *model.text.blocks):
            fully_shard(block, mesh=self._mesh)
        scalars = {model.logit_scale, model.logit_bias}  # it takes none
        return fully_shard(pair_loss, mesh=self._mesh, ignored_params=scalars)

    def _clip(self) -> None:
        if self._parallel == "ddp":
            super()._clip()
            return
        sharded, whole = [], []
        for parameter in self.model.parameters():
            (sharded if isinstance(parameter, DTensor) else whole).append(parameter)
        for parameter in whole:  # what fully_shard was not given nobody has averaged yet
            dist.all_reduce(parameter.grad, group=self.group)
            parameter.grad /= self._mesh.size()
        norms = [nn.utils.get_total_norm([p.grad for p in some]) for some in (sharded, whole)]
        norms[0] = norms[0].full_tensor()
        norm = torch.stack(norms).norm()
        for some in (sharded, whole):
            nn.utils.clip_grads_with_norm_(some, self.config.clip, norm)

    def _of_whole_batches(self, losses: Tensor) -> Tensor:
        dist.all_reduce(losses, group=self.group)
        return losses / self._mesh.size()


def save_checkpoint(training: Training, folder: str | Path) -> Path:
    """Store a training under ``folder``, whole or not at all, in the place of what is stored there.

    Every process of the training calls it; all see the same file system.

    Returns:
        The folder of the checkpoint, named by its step.

    Raises:
        FileExistsError: the same step is stored there already.
        CheckpointException: some process could not write; what was stored before stays.
    """
    folder = Path(folder)
    final = folder / f"step_{training.step:09d}"
    temporary = final.with_name(final.name + ".part")
    if final.exists():
        raise FileExistsError(f"{final.name} is stored already")
    first = _is_first(training)
    if first:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
        temporary.mkdir(parents=True)
        about = {
            "settings": training.settings(),
            "step": training.step,
            "losses": training.losses,
        }
        (temporary / "training.json").write_text(json.dumps(about))
    try:
        # returns when every process has written, and raises in all of them if one could not
        with _processes(training) as who:
            dcp.save(_state(training), checkpoint_id=temporary, **who)
        if first:
            os.replace(temporary, final)
            for path in set(folder.glob("step_*")) - {final}:
                shutil.rmtree(path)
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def load_checkpoint(training: Training, folder: str | Path) -> None:
    """Take up what ``save_checkpoint`` stored under ``folder``, by however many processes, however they shared it.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it was stored with other settings; nothing was changed.
    """
    stored = newest_checkpoint(folder)
    if stored is None:
        raise FileNotFoundError(f"folder={str(folder)!r} holds no checkpoint")
    about = json.loads((stored / "training.json").read_text())
    training.check_settings(about["settings"], stored.name)
    state = _state(training)
    with _processes(training) as who:
        dcp.load(state, checkpoint_id=stored, **who)
    set_state_dict(
        training.model,
        training.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    training.go_on_from(about["step"], about["losses"])


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint under a folder, None if there is none."""
    found = [path for path in Path(folder).glob("step_*") if path.suffix != ".part"]
    return max(found, default=None)


def whole_model(training: Training) -> SigLIP | None:
    """Return the model with all its weights, on the CPU, in the first process; None in the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(training.model, options=options)
    if not _is_first(training):
        return None
    with torch.device("meta"):
        model = SigLIP(training.model.config)
    model.load_state_dict(state, assign=True)
    return model


def _state(training: Training) -> dict[str, object]:
    model, optimizer = get_state_dict(training.model, training.optimizer)
    return {"model": model, "optimizer": optimizer}


def _is_first(training: Training) -> bool:
    return not isinstance(training, DistributedTraining) or training.rank == 0


@contextmanager
def _processes(training: Training) -> Iterator[dict[str, object]]:
    """Tell torch.distributed.checkpoint who takes part."""
    if isinstance(training, DistributedTraining):
        yield {"process_group": training.group}
        return
    with warnings.catch_warnings():  # it warns of what it was asked for
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield {"no_dist": True}
