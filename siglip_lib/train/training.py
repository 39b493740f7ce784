"""Train a SigLIP on emoji64: ``python -m siglip_lib.train --help``, or by ``Training`` in a program.

What is random about a step follows from the seed and the step's number alone. So a training that was stopped goes on as
if it had not been, and two with the same seed on the same device give the same weights, bit by bit, compiled or not.
Ctrl-C, or a notebook's Stop button, stops ``Training.run`` after the step that it is at; a second one at once. The
command stores a checkpoint before it ends: on a CPU after the step, on a GPU after the block of 50 steps, that it is
at. There a second Ctrl-C changes nothing.
"""

import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor, nn

from siglip_lib.base.checks import finite_tensors, listed
from siglip_lib.data.augmentation import DRAWS, augment
from siglip_lib.data.emoji64 import Emoji64, unique_batches
from siglip_lib.siglip.losses import sigmoid_loss
from siglip_lib.siglip.model import SigLIP, check_tokenizer
from siglip_lib.siglip.text import Tokenizer
from siglip_lib.storage.writing import replacing
from siglip_lib.train.batches import BLOCK, caption_table
from siglip_lib.train.recipe import TrainConfig, new_optimizer, schedule

_HALF_A_STEP = "it was broken off within a step, which left the weights half changed"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine lacks memory, which says nothing about what was being read."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error)  # torch's plain RuntimeError on a CPU


class Diverged(Exception):
    """The loss is no longer a finite number."""


class Training:
    """A training that can be run in parts, stored, and taken up again.

    Args:
        model: the SigLIP, changed in place; moved to ``device``.
        tokenizer: of its text tower.
        emoji: the pictures and names.
        places: (n,) which of the pictures to train on, such as ``split(emoji).train``.
        config: how to train.
        device: where. On a GPU matrix products are in bfloat16 (autocast), and a step is recorded as a CUDA graph,
            which leaves out the time that Python needs to launch its kernels.
        compile: whether to compile the step. On an H200 that took 29 s, and made 151 steps a second out of 105: it
            pays from 10,000 steps on.

    Attributes:
        step: steps done.
        losses: the loss of each.
        stored: where it was last stored or taken up from; None if it never was.

    Raises:
        ValueError: there are fewer pictures than a batch needs, or the tokenizer does not fit the model.
    """

    _rows = slice(None)  # of each batch; of many processes each has some
    _alone = True  # it may stop after any step: no other process would wait for the next one
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
        self._concept = emoji.concept[places]
        if config.batch > len(places):
            raise ValueError(
                f"batch={config.batch} must be at most {len(places)}, each picture once"
            )
        self._unique = config.batch <= len(self._concept.unique())
        check_tokenizer(tokenizer, model.config)
        self.model, self.config, self.device = model, config, torch.device(device)
        self.model.to(device).train()
        self.step, self.losses, self.stored = 0, [], None
        self._spoilt: str | None = None  # why it can't go on
        self._pictures = emoji.pictures[places].to(device)
        self._tokens, self._first, self._captions = caption_table(tokenizer, emoji, config.keywords)
        self._tokens = self._tokens.to(device)
        self._pair_loss = self._wrapped(model)
        self.optimizer = new_optimizer(model, config, self.device)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        rows = len(range(config.batch)[self._rows])
        shapes = {"which": (rows,), "text": (rows,), "concept": (rows,), "draws": (rows, DRAWS)}
        self._inputs = {
            name: torch.zeros(
                shape, dtype=torch.float32 if name == "draws" else torch.int64, device=device
            )
            for name, shape in shapes.items()
        }
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps_here = 0
        self._drawn = lru_cache(maxsize=2)(self._draw)
        self._loss = torch.zeros((), device=device)
        # losses of a block of steps, while it is at work
        self._found = torch.zeros(BLOCK, device=device)
        self._forward = torch.compile(self._batch_loss) if compile else self._batch_loss

    def run(self, until: int | None = None, progress: bool = True) -> None:
        """Train up to step ``until``, or to the end; show a bar with loss and rate.

        Raises:
            Diverged: the loss is not finite. The model is spoilt; ``load`` takes up a stored training.
            KeyboardInterrupt: the reader stopped it. After the first Ctrl-C it stands where a step ended, and a further
                ``run`` goes on from there.
            RuntimeError: the model is spoilt, by what broke off an optimizer step or by a loss that was not finite.
        """
        from tqdm.auto import tqdm

        until = self.config.steps if until is None else until
        if not self.step <= until <= self.config.steps:
            raise ValueError(f"until={until} must lie in {self.step} to {self.config.steps}")
        self.settle()
        with (
            _interrupt_held() as told,
            tqdm(total=until, initial=self.step, unit="step", disable=not progress) as bar,
        ):
            while self.step < until:
                done = self.step
                if self._block(min(until, done - done % BLOCK + BLOCK), told):
                    raise KeyboardInterrupt
                bar.update(self.step - done)
                loss = sum(self.losses[done:]) / (self.step - done)
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{self.rate(self.step):.1e}")

    def save(self, path: str | Path) -> None:
        """Store the training as it stands, whole or not at all.

        Raises:
            ValueError: a weight or a moment is not finite.
            RuntimeError: the model is spoilt, see ``run``.
        """
        path = Path(path)
        self.settle()
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
        """Take up a training that ``save`` stored, of the same configuration and sizes.

        Raises:
            ValueError: it was stored with others, or is damaged; nothing was changed.
        """
        path = Path(path)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        try:
            stored = torch.load(path, map_location=self.device, weights_only=True)
            about = {
                "settings": stored["config"] | stored["sizes"],
                "step": stored["step"],
                "losses": stored["losses"].tolist(),
            }
            moments = stored["optimizer"]["state"]
            tensors = self._named(stored["model"], {parameters[i]: moments[i] for i in moments})
        except OSError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # torch's own message would advise to run what the file asks for
            raise ValueError(f"{path.name} is no stored training, or is damaged") from None
        self.check_stored(about, path.name)
        _check_alike(tensors, self.tensors(), path.name)
        self.take_up(tensors, about, path)

    def rate(self, step: int) -> float:
        """Return the learning rate at a step: ``lr``, less in the warm-up and along the cosine."""
        return self.config.lr * schedule(step, self.config)

    def settings(self) -> dict[str, object]:
        """Return what has to be the same where a stored training is taken up."""
        return asdict(self.config) | asdict(self.model.config)

    def tensors(self) -> dict[str, Tensor]:
        """Return all weights and moments by name: those that the training works on, no copies."""
        return self._named(self.model.state_dict(), self.optimizer.state)

    def settle(self) -> None:
        """Have losses and weights agree with the count of steps, whatever broke off ``run``; refuse if they can't."""
        if self._spoilt:
            how = f"take up {str(self.stored)!r}" if self.stored else "none is stored, start anew"
            raise RuntimeError(f"the training can't go on: {self._spoilt}; {how}")
        self._note_losses()

    def check_stored(self, about: object, where: str) -> None:
        """Refuse what is no stored training, or one with other settings.

        Args:
            about: its ``settings``, ``step`` and ``losses``.
            where: its name, for messages.
        """
        if not isinstance(about, dict) or not isinstance(about.get("settings"), dict):
            raise ValueError(f"{where} is damaged: it does not tell its settings")
        stored, here = about["settings"], self.settings()
        if odd := sorted(map(str, stored.keys() ^ here.keys())):
            raise ValueError(f"{where} is of another version, or damaged: not in both are {odd}")
        if differs := {name: value for name, value in stored.items() if value != here[name]}:
            raise ValueError(f"{where} was stored with other settings: {differs}")
        step, losses = about.get("step"), about.get("losses")
        if type(step) is not int or not 0 <= step <= self.config.steps:
            raise ValueError(
                f"{where} is damaged: step={step!r} must lie in 0 to {self.config.steps}"
            )
        if not isinstance(losses, list) or len(losses) != step:
            raise ValueError(f"{where} is damaged: it must hold the losses of {step} steps")
        if not all(isinstance(loss, float) and math.isfinite(loss) for loss in losses):
            raise ValueError(f"{where} is damaged: a loss is not finite")

    def take_up(self, tensors: Mapping[str, Tensor], about: dict, stored: Path) -> None:
        """Put weights, moments, step and losses of a stored training, all of them checked, in the place of these."""
        for name, tensor in tensors.items():
            if name.endswith(".step") and not (tensor == about["step"]).all():
                raise ValueError(f"{stored.name} is damaged: {name} is not {about['step']}")
        self._spoilt = "it was stopped while another one was taken up"
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(tensors[name])
        self.step, self.losses, self.stored = about["step"], about["losses"], stored
        self.release()
        self._spoilt = None

    def release(self) -> None:
        """Free the CUDA graph; NCCL waits for that where a process group ends. A further step records a new one."""
        self._graph, self._steps_here = None, 0

    def _named(self, model: dict, moments: dict) -> dict[str, Tensor]:
        return {f"model.{name}": tensor for name, tensor in model.items()} | {
            f"optimizer.state.{self._names[parameter]}.{kind}": tensor
            for parameter, some in moments.items()
            for kind, tensor in some.items()
        }

    def _block(self, end: int, told: list[int]) -> bool:
        """Train up to step ``end``, or stop if told to, and return whether this process or another was told."""
        while self.step < end and not (told and self._alone):
            self._fill(self.step)
            self._found[self.step % BLOCK] = self._one_step()
            self.step += 1
            self._spoilt = None
        if end < self.config.steps:  # the device is still at work
            self._drawn(end // BLOCK)
        return self._note_losses(bool(told))

    def _note_losses(self, told: bool = False) -> bool:
        """Look at the losses of the steps since the last look, which waits for the device."""
        noted = len(self.losses)
        if noted == self.step:
            return told
        first = noted % BLOCK
        found = self._found[first : first + self.step - noted]
        found, told = self._of_whole_batches(found, told)
        found = found.tolist()
        good = next((i for i, loss in enumerate(found) if not math.isfinite(loss)), len(found))
        self.losses += found[:good]
        if good < len(found):
            self.step = len(self.losses)
            self._spoilt = "its loss was not finite"
            raise Diverged(
                f"the loss is {found[good]} at step {self.step}; lower lr={self.config.lr} or "
                f"logit_lr={self.config.logit_lr}, or lengthen warmup={self.config.warmup}, in a new training: "
                "a stored part of this training has the same settings and would diverge again"
            )
        return told

    def _wrapped(self, model: SigLIP) -> nn.Module:
        """From a batch to its loss; here what spreads the work over many processes may come in."""
        return PairLoss(model, sigmoid_loss)

    def _of_whole_batches(self, losses: Tensor, told: bool) -> tuple[Tensor, bool]:
        return losses, told

    def _fill(self, step: int) -> None:
        """Put the inputs of a step where the graph reads them."""
        drawn = self._drawn(step // BLOCK)
        for name, place in self._inputs.items():
            place.copy_(drawn[name][step % BLOCK, self._rows], non_blocking=True)
        share = schedule(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(group["highest"] * share)

    def _draw(self, block: int) -> dict[str, Tensor]:
        """The random numbers of one block of steps, on the device."""
        # torch's generator looks at 32 bits of a seed: two numbers can't be packed into it by hand
        seed = np.random.SeedSequence((self.config.seed, block)).generate_state(1).item()
        generator = torch.Generator().manual_seed(seed)
        shape = (BLOCK, self.config.batch)
        if self._unique:
            which = unique_batches(self._concept, self.config.batch, generator, BLOCK)
        else:
            order = torch.rand(BLOCK, len(self._concept), generator=generator)
            which = order.argsort(dim=1, stable=True)[:, : self.config.batch]
        concept = self._concept[which]
        chance = torch.rand(shape, generator=generator, dtype=torch.float64)
        text = self._first[concept] + (chance * self._captions[concept]).long()
        draws = torch.rand(*shape, DRAWS, generator=generator)
        found = {"which": which, "text": text, "concept": concept, "draws": draws}
        return {name: tensor.to(self.device) for name, tensor in found.items()}

    def _one_step(self) -> Tensor:
        if self._graph is not None:
            return self._replay()
        if self.device.type != "cuda" or self._steps_here < self._eager_steps:
            self._steps_here += 1
            return self._forward_backward_update()
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        # what other threads do, such as the one that watches over NCCL, must not spoil the recording
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._loss = self._forward_backward_update()
        self._graph = graph
        return self._replay()  # recording ran nothing

    def _replay(self) -> Tensor:
        self._spoilt = _HALF_A_STEP
        self._graph.replay()
        return self._loss

    def _forward_backward_update(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with _deterministic():
            loss = self._forward()
            loss.backward()
        self._clip()
        self._spoilt = _HALF_A_STEP  # until the step is counted
        self.optimizer.step()
        return loss.detach()

    def _clip(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)

    def _batch_loss(self) -> Tensor:
        inputs = self._inputs
        pixels = augment(
            self._pictures[inputs["which"]], inputs["draws"], self.config.strength
        )  # (B, 3, 64, 64)
        tokens = self._tokens[inputs["text"]]  # (B, N)
        return self._pair_loss(pixels, tokens, None if self._unique else inputs["concept"])


class PairLoss(nn.Module):
    """Both towers and the loss: pictures (B, 3, H, W) and tokens (B, N) to a number, in bfloat16 on a GPU.

    Pairs belong together where their ``ids`` (B,) are equal; without ids only each picture and its own text.

    One module, as what DDP wraps has to hold the whole forward pass.
    """

    def __init__(self, model: SigLIP, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, pixels: Tensor, tokens: Tensor, ids: Tensor | None = None) -> Tensor:
        # a cache of converted weights would not outlive the recording of a graph
        with torch.autocast(
            pixels.device.type,
            torch.bfloat16,
            enabled=pixels.device.type == "cuda",
            cache_enabled=False,
        ):
            image, text = self.model.encode_image(pixels), self.model.encode_text(tokens)
        return self.loss(image, text, self.model.logit_scale, self.model.logit_bias, ids, ids)


@contextmanager
def _interrupt_held() -> Iterator[list[int]]:
    """Let the first Ctrl-C only fill a list, for the loop to look at: one within a step would leave half of it done."""
    told: list[int] = []
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield told  # it comes to another thread, or somebody else takes it
        return

    def tell(number: int, frame: FrameType | None) -> None:
        if told:
            raise KeyboardInterrupt
        told.append(number)

    signal.signal(signal.SIGINT, tell)
    try:
        yield told
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if told:
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


def _check_alike(found: Mapping[str, object], wanted: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors of other names, shapes or kinds than the wanted ones, or with elements that are not finite."""
    if odd := sorted(found.keys() ^ wanted.keys()):
        raise ValueError(f"{where} is damaged: missing or unexpected are {listed(odd, 5)}")
    for name, tensor in wanted.items():
        other = found[name]
        if not isinstance(other, Tensor) or other.is_meta or other.layout != tensor.layout:
            raise ValueError(f"{where} is damaged: {name} is no plain tensor")
        if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{where} is damaged: {name} is {other.dtype} {tuple(other.shape)}, "
                f"not {tensor.dtype} {tuple(tensor.shape)}"
            )
    finite_tensors(f"{where} is damaged: there are", found)
