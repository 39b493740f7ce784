"""One process trains a SigLIP on emoji64.

What is random about a step follows from the seed and the step's number alone. So a training that was stopped and
resumed ends as if it had not been stopped, and two with the same seed on the same device give the same weights, bit by
bit, compiled or not. Ctrl-C, or a notebook's Stop button, stops ``Training.run`` after the step that it is at; a second
one at once.
"""

import math
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from siglip_lib.base.checks import finite_tensors
from siglip_lib.base.offers import pick_dtype
from siglip_lib.data.augmentation import augment
from siglip_lib.data.emoji64 import Emoji64
from siglip_lib.siglip.losses import sigmoid_loss
from siglip_lib.siglip.model import SigLIP, check_tokenizer
from siglip_lib.siglip.text import Tokenizer
from siglip_lib.storage.fitting import check_fit, check_plain
from siglip_lib.storage.writing import replacing
from siglip_lib.train.batches import Batches
from siglip_lib.train.recipe import TrainConfig, new_optimizer, schedule
from siglip_lib.train.recorded_step import RecordedStep

_HALF_A_STEP = "it was broken off within a step, which left the weights half changed"
_NO_DAMAGE = (OSError, MemoryError, torch.OutOfMemoryError, dist.DistError)


class Diverged(Exception):
    """The loss is no longer a finite number."""


class Training:
    """A training that can be run in parts, stored, and resumed.

    Args:
        model: the SigLIP, changed in place; moved to ``device``.
        tokenizer: of its text tower.
        emoji: the pictures and names.
        places: (n,) which of the pictures to train on, such as ``split(emoji).train``.
        config: how to train.
        device: where. On a GPU a step is recorded as a CUDA graph, which leaves out the time that Python needs to
            launch its kernels, and where it has bfloat16 (Ampere and newer) matrix products are in that (autocast).
        compile: whether to compile the step. On an H200 that took 29 s, and made 151 steps a second out of 105: it
            pays from 10,000 steps on.

    Attributes:
        step: steps done.
        losses: the loss of each.
        stored: where it was last stored or resumed from; None if it never was.

    Raises:
        ValueError: there are fewer pictures than a batch needs, or the tokenizer does not fit the model.
    """

    group: dist.ProcessGroup | None = None  # the processes that train together; None for one alone
    rank = 0  # of this process in it
    _rows = slice(None)  # of each batch; of several processes each has some
    _unique = True  # batches show no concept twice, see ``Batches``
    # before a CUDA graph is recorded: libraries set themselves up in the first ones
    _eager_steps: float = 3
    _stream: torch.cuda.Stream | None = None  # that the graph is recorded on; a new one if None

    def __init__(
        self,
        model: SigLIP,
        tokenizer: Tokenizer,
        emoji: Emoji64,
        places: Tensor,
        config: TrainConfig,
        device: torch.device | str,
        compile: bool = False,
    ) -> None:
        check_tokenizer(tokenizer, model.config)
        device = torch.device(device)
        self.model, self.config, self.device = model, config, device
        self._batches = Batches(emoji, places, tokenizer, config, device, self._unique)
        model.to(device).train()
        self._pair_loss = self._new_pair_loss(model)  # may shard the weights: before the optimizer
        self.optimizer = new_optimizer(model, config, device)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self.step, self.losses = 0, []
        self.stored: Path | None = None
        self._damage: str | None = None  # why it can't go on
        # what the graph reads: the rows of the current step
        first = self._batches.of_step(0)
        self._inputs = {name: rows[self._rows].clone() for name, rows in first.items()}
        self._recorder = RecordedStep(self.optimizer, device, self._eager_steps, self._stream)
        self._block_losses = torch.zeros(Batches.block, device=device)  # not yet in ``losses``
        self._forward = torch.compile(self._batch_loss) if compile else self._batch_loss

    def run(self, until: int | None = None, progress: bool = True) -> None:
        """Train up to step ``until``, or to the end; show a bar with loss and learning rate.

        Raises:
            Diverged: the loss is not finite. The model is damaged; ``load`` puts a stored training in its place.
            KeyboardInterrupt: the reader stopped it. After the first Ctrl-C it stands where a step ended, and a further
                ``run`` continues from there.
            RuntimeError: the model is damaged, by what broke off an optimizer step or by a loss that was not finite.
        """
        from tqdm.auto import tqdm

        until = self.config.steps if until is None else until
        if not self.step <= until <= self.config.steps:
            raise ValueError(f"until={until} must lie in {self.step} to {self.config.steps}")
        self.check_usable()
        with (
            _interrupts_held() as interrupts,
            tqdm(total=until, initial=self.step, unit="step", disable=not progress) as bar,
        ):
            while self.step < until:
                done = self.step
                end_of_block = done - done % Batches.block + Batches.block
                if self._run_block(min(until, end_of_block), interrupts):
                    raise KeyboardInterrupt
                bar.update(self.step - done)
                loss = sum(self.losses[done:]) / (self.step - done)
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{self.rate(self.step):.1e}")

    def rate(self, step: int) -> float:
        """Return the learning rate at a step: ``lr``, less in the warm-up and along the cosine."""
        return self.config.lr * schedule(step, self.config)

    def save(self, path: str | Path) -> None:
        """Store the training as it stands in one file, whole or not at all.

        Raises:
            ValueError: a weight or a moment is not finite.
            RuntimeError: the model is damaged, see ``run``.
        """
        path = Path(path)
        self.check_usable()
        finite_tensors(f"{path.name} was not written: the training has", self.tensors())
        state = {
            "config": asdict(self.config),
            "sizes": asdict(self.model.config),
            "step": self.step,
            "losses": torch.tensor(self.losses),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)
        self.stored = path

    def load(self, path: str | Path) -> None:
        """Resume a training that ``save`` stored, of the same configuration and sizes.

        Raises:
            ValueError: it was stored with others, or is damaged; nothing was changed.
        """
        path = Path(path)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        with errors_mean_damage(path):
            state = torch.load(path, map_location=self.device, weights_only=True)
            description = {"settings": state["config"] | state["sizes"], "step": state["step"]}
            description["losses"] = state["losses"].tolist()
            moments = {parameters[i]: some for i, some in state["optimizer"]["state"].items()}
            tensors = self._by_name(state["model"], moments)
        self.check_description(description, path.name)
        check_plain(tensors, path.name)
        ours = {name: [tensor] for name, tensor in self.tensors().items()}
        check_fit(tensors, ours, f"{path.name} is damaged", same_dtype=True)
        finite_tensors(f"{path.name} is damaged: there are", tensors)
        self.restore(tensors, description, path)

    def check_usable(self) -> None:
        """Raise RuntimeError if what broke off a step, or a loss that was not finite, damaged the model.

        Losses of steps that were done when something broke off ``run`` are recorded.
        """
        if self._damage:
            how = f"resume from '{self.stored}'" if self.stored else "none is stored, start anew"
            raise RuntimeError(f"the training can't go on: {self._damage}; {how}")
        self._record_losses()

    def tensors(self) -> dict[str, Tensor]:
        """Return all weights and moments by name: those that the training works on, no copies."""
        return self._by_name(self.model.state_dict(), self.optimizer.state)

    def settings(self) -> dict[str, object]:
        """Return what has to be the same where a stored training is resumed."""
        return asdict(self.config) | asdict(self.model.config)

    def check_description(self, description: object, where: str) -> None:
        """Raise ValueError for what describes no stored training, or one with other settings.

        Args:
            description: its ``settings``, ``step`` and ``losses``.
            where: its name, for messages.
        """
        if not isinstance(description, dict) or not isinstance(description.get("settings"), dict):
            raise ValueError(f"{where} is damaged: it does not tell its settings")
        stored, here, steps = description["settings"], self.settings(), self.config.steps
        if odd := sorted(map(str, stored.keys() ^ here.keys())):
            raise ValueError(f"{where} is of another version, or damaged: not in both are {odd}")
        if differs := {name: value for name, value in stored.items() if value != here[name]}:
            raise ValueError(f"{where} was stored with other settings: {differs}")
        step, losses = description.get("step"), description.get("losses")
        if type(step) is not int or not 0 <= step <= steps:
            raise ValueError(f"{where} is damaged: step={step!r} must lie in 0 to {steps}")
        if not isinstance(losses, list) or len(losses) != step:
            raise ValueError(f"{where} is damaged: it must hold the losses of {step} steps")
        if not all(isinstance(loss, float) and math.isfinite(loss) for loss in losses):
            raise ValueError(f"{where} is damaged: a loss is not finite")

    def restore(self, tensors: Mapping[str, Tensor], description: dict, stored: Path) -> None:
        """Put checked weights, moments, step and losses of a stored training in the place of these."""
        self.release()
        step = description["step"]
        for name, tensor in tensors.items():
            if name.endswith(".step") and not (tensor == step).all():
                raise ValueError(f"{stored.name} is damaged: {name} is not {step}")
        self._damage = "it was stopped while a stored one was put in its place"
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(tensors[name])
        self.step, self.losses, self.stored = step, description["losses"], stored
        self._damage = None

    def release(self) -> None:
        """Free the CUDA graph; NCCL waits for that where a process group ends. A further step records a new one."""
        self._recorder.release()

    def _by_name(self, model: Mapping, moments: Mapping) -> dict[str, Tensor]:
        return {f"model.{name}": tensor for name, tensor in model.items()} | {
            f"optimizer.state.{self._names[parameter]}.{kind}": tensor
            for parameter, some in moments.items()
            for kind, tensor in some.items()
        }

    def _run_block(self, end: int, interrupts: list[int]) -> bool:
        """Train up to step ``end``, or stop if interrupted; return whether this process or another was."""
        # one process alone may stop after any step: no other one waits for the next
        while self.step < end and not (interrupts and self.group is None):
            self._set_inputs(self.step)
            self._block_losses[self.step % Batches.block] = self._one_step()
            self.step += 1
            self._damage = None
        if end < self.config.steps:  # the device is still at work
            self._batches.of_block(end // Batches.block)
        return self._record_losses(bool(interrupts))

    def _record_losses(self, interrupted: bool = False) -> bool:
        """Read the losses of the steps since the last time, which waits for the device.

        Returns:
            Whether this process was ``interrupted``, or another one.
        """
        recorded = len(self.losses)
        if recorded == self.step:
            return interrupted
        first = recorded % Batches.block
        losses = self._block_losses[first : first + self.step - recorded]
        losses, interrupted = self._over_processes(losses, interrupted)
        losses = losses.tolist()
        good = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
        self.losses += losses[:good]
        if good < len(losses):
            self.step = len(self.losses)
            self._damage = "its loss was not finite"
            raise Diverged(
                f"the loss is {losses[good]} at step {self.step}; lower lr={self.config.lr} or "
                f"logit_lr={self.config.logit_lr}, or lengthen warmup={self.config.warmup}, in a new training: "
                "a stored part of this training has the same settings and would diverge again"
            )
        return interrupted

    def _new_pair_loss(self, model: SigLIP) -> nn.Module:
        """Return the module from a batch to its loss; what spreads the work over many processes wraps it."""
        return PairLoss(model, sigmoid_loss)

    def _over_processes(self, losses: Tensor, interrupted: bool) -> tuple[Tensor, bool]:
        """Return the losses of whole batches, and whether any process was interrupted."""
        return losses, interrupted

    def _set_inputs(self, step: int) -> None:
        """Put the batch and the learning rates of a step where the graph reads them."""
        for name, rows in self._batches.of_step(step).items():
            self._inputs[name].copy_(rows[self._rows], non_blocking=True)
        share = schedule(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(group["highest"] * share)

    def _one_step(self) -> Tensor:
        if (
            self._recorder.recorded
        ):  # what isn't replayed says so itself, before it changes a weight
            self._damage = _HALF_A_STEP
        return self._recorder(self._forward_backward_update)

    def _forward_backward_update(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with _deterministic():
            loss = self._forward()
            loss.backward()
        self._clip()
        self._damage = _HALF_A_STEP  # until the step is counted
        self.optimizer.step()
        return loss.detach()

    def _clip(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)

    def _batch_loss(self) -> Tensor:
        inputs, batches = self._inputs, self._batches
        pictures = batches.pictures[inputs["which"]]  # (B, 4, 64, 64)
        pixels = augment(pictures, inputs["draws"], self.config.strength)  # (B, 3, 64, 64)
        tokens = batches.tokens[inputs["text"]]  # (B, N)
        return self._pair_loss(pixels, tokens, None if batches.unique else inputs["concept"])


class PairLoss(nn.Module):
    """Both towers and the loss: pictures (B, 3, H, W) and tokens (B, N) to a number, in bfloat16 where a GPU has it.

    Pairs belong together where their ``ids`` (B,) are equal; without ids only each picture and its own text.

    One module, as what DDP wraps has to hold the whole forward pass.
    """

    def __init__(self, model: SigLIP, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, pixels: Tensor, tokens: Tensor, ids: Tensor | None = None) -> Tensor:
        kind = pixels.device.type
        # float16 would need the loss scaled; older GPUs stay in float32
        native = pick_dtype(pixels.device) == torch.bfloat16
        # a cache of converted weights would not outlive the recording of a graph
        with torch.autocast(kind, torch.bfloat16, enabled=native, cache_enabled=False):
            image, text = self.model.encode_image(pixels), self.model.encode_text(tokens)
        return self.loss(image, text, self.model.logit_scale, self.model.logit_bias, ids, ids)


@contextmanager
def _interrupts_held() -> Iterator[list[int]]:
    """Let the first Ctrl-C only fill a list, for the loop to look at: one within a step would leave half of it done."""
    interrupts: list[int] = []
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupts  # it comes to another thread, or somebody else takes it
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupts:
        raise KeyboardInterrupt


@contextmanager
def _deterministic() -> Iterator[None]:
    """Compiled code would otherwise add up the gradient of the embedding in the order in which threads come by."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.utils.deterministic.fill_uninitialized_memory = False  # finds mistakes, costs time
        with warnings.catch_warnings():
            # cuBLAS adds up alike as long as it runs on one stream
            warnings.filterwarnings("ignore", "Deterministic behavior was enabled")
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextmanager
def errors_mean_damage(stored: Path) -> Iterator[None]:
    """Say of a stored training that it is damaged, unless the disk, the memory or another process is at fault.

    A file that a checkpoint's folder lacks is damage; a checkpoint that is not there at all is not.
    """
    try:
        yield
    except Exception as error:
        lacking = isinstance(error, FileNotFoundError) and stored.exists()
        # torch on a CPU and gloo have no class of errors of their own; gloo names its source file
        text = str(error) if type(error) is RuntimeError else ""
        elsewhere = "can't allocate memory" in text or "third_party/gloo" in text
        if elsewhere or (isinstance(error, _NO_DAMAGE) and not lacking):
            raise
        # torch's own text advises to run what the file asks for
        said = "no tensor" if isinstance(error, pickle.UnpicklingError) else error
        raise ValueError(
            f"{stored} is no stored training, or is damaged: {type(error).__name__}: {said}; start anew elsewhere"
        ) from None
