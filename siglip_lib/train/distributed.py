"""Many processes train a SigLIP on emoji64."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from siglip_lib.base.checks import one_of
from siglip_lib.data.emoji64 import Emoji64
from siglip_lib.siglip.model import SigLIP
from siglip_lib.siglip.ring_loss import ring_sigmoid_loss
from siglip_lib.siglip.text import Tokenizer
from siglip_lib.train.recipe import TrainConfig
from siglip_lib.train.training import PairLoss, Training

PARALLEL = ("ddp", "fsdp2")
_STEPS_APART = "it was broken off, and its processes may not stand at the same step"


class DistributedTraining(Training):
    """``Training`` of which every process computes a part of each batch; all call the same methods.

    Every process draws the whole batch, from the seed and the step alone, and takes its rows of it. So the number of
    processes changes the result by no more than rounding. The loss is ``ring_sigmoid_loss``. On GPUs a step with
    ``ddp`` is recorded as a CUDA graph, with what it sends; ``fsdp2`` launches its kernels one by one. Call ``release``
    before the process group is destroyed.

    Args:
        model, tokenizer, emoji, places: as in ``Training``, the same in all processes.
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
        one_of("parallel", parallel, PARALLEL)
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
        """As in ``Training``; after a Ctrl-C in one process all stop, where a block of 50 steps ends."""
        with self._own_stream():
            super().run(until, progress)

    def check_usable(self) -> None:
        if len(self.losses) < self.step:
            self._damage = _STEPS_APART
        super().check_usable()

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

    def _new_pair_loss(self, model: SigLIP) -> nn.Module:
        pair_loss = PairLoss(model, partial(ring_sigmoid_loss, group=self.group))
        if self._parallel == "ddp":
            return DistributedDataParallel(
                pair_loss, process_group=self.group, gradient_as_bucket_view=True
            )
        for block in (*model.image.blocks, *model.text.blocks):
            fully_shard(block, mesh=self._mesh)
        scalars = {model.logit_scale, model.logit_bias}  # it takes none
        return fully_shard(pair_loss, mesh=self._mesh, ignored_params=scalars)

    def _one_step(self) -> Tensor:
        self._damage = _STEPS_APART  # until the step is counted
        return super()._one_step()

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

    def _over_processes(self, losses: Tensor, interrupted: bool) -> tuple[Tensor, bool]:
        both = torch.cat([losses, losses.new_tensor([float(interrupted)])])
        dist.all_reduce(both, group=self.group)
        return both[:-1] / self._mesh.size(), bool(both[-1] > 0)
