"""Train a SigLIP on emoji64: ``python -m siglip_lib.train --help``, or by ``Training`` in a program.

What is random about a step follows from the seed and the step's number alone. So a training that was stopped goes on as
if it had not been, and two with the same seed on the same device give the same weights, bit by bit, compiled or not.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from siglip_lib.augment import DRAWS, augment
from siglip_lib.checks import count, finite, positive_int
from siglip_lib.emoji64 import Emoji64, captions, unique_batches
from siglip_lib.losses import sigmoid_loss
from siglip_lib.siglip import SigLIP, SigLIPConfig, check_tokenizer
from siglip_lib.text import Tokenizer

BLOCK = 50  # steps whose random numbers are drawn at once, and whose losses are looked at together
# The sizes of the weights that ship, 2.0 million parameters; 1,500 pieces of words, 16 to a caption.
EMOJI64_SIGLIP = SigLIPConfig(
    image_size=64,
    patch_size=8,
    width=128,
    layers=6,
    heads=4,
    mlp_hidden=512,
    text_width=128,
    text_layers=2,
    text_heads=4,
    text_mlp_hidden=512,
    vocab_size=1500,
    context_length=16,
)
EMOJI64_WEIGHTS = Path(__file__).parent / "weights" / "emoji64"
# their unit vectors (5094, 128) of all pictures, "pictures" in a safetensors file, float16
EMOJI64_VECTORS = EMOJI64_WEIGHTS.with_name("emoji64_vectors.safetensors")


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the numbers are those of the shipped weights.

    Args:
        steps: optimizer steps.
        batch: pairs in a step, each of another concept; of more than there are concepts each has another picture, and
            all pairs of one concept belong together.
        lr: highest rate of AdamW, reached after ``warmup`` steps, then lowered along a cosine to 0.
        logit_lr: the same for log-temperature and bias.
        weight_decay: of matrices; norms, biases, positions, the pooling query, temperature and bias have none.
        warmup: steps of a linear rise.
        clip: largest norm of the gradient.
        strength: of the augmentation, see ``augment``.
        keywords: whether captions may name keywords beside the name.
        seed: of batches, captions and augmentation.
    """

    steps: int = 10_000
    batch: int = 512
    lr: float = 2e-3
    logit_lr: float = 2e-3
    weight_decay: float = 0.5
    warmup: int = 500
    clip: float = 1.0
    strength: float = 1.0
    keywords: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "warmup"):
            positive_int(name, getattr(self, name))
        count("seed", self.seed)
        for name in ("lr", "logit_lr", "weight_decay", "clip", "strength"):
            if finite(name, getattr(self, name)) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


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

    Raises:
        ValueError: there are fewer pictures than a batch needs, or the tokenizer does not fit the model.
    """

    _rows = slice(None)  # of each batch; of many processes each has some
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
        self.step, self.losses = 0, []
        self._pictures = emoji.pictures[places].to(device)
        self._tokens, self._first, self._captions = _caption_table(
            tokenizer, emoji, config.keywords
        )
        self._tokens = self._tokens.to(device)
        self._pair_loss = self._wrapped(model)
        self.optimizer = _optimizer(model, config, self.device)
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
        self._forward = torch.compile(self._batch_loss) if compile else self._batch_loss

    def run(self, until: int | None = None, progress: bool = True) -> None:
        """Train up to step ``until``, or to the end; show a bar with loss and rate.

        Raises:
            Diverged: the loss is not finite. The model is spoilt; ``load`` takes up a stored training.
        """
        from tqdm.auto import tqdm

        until = self.config.steps if until is None else until
        if not self.step <= until <= self.config.steps:
            raise ValueError(f"until={until} must lie in {self.step} to {self.config.steps}")
        with tqdm(total=until, initial=self.step, unit="step", disable=not progress) as bar:
            while self.step < until:
                count = min(BLOCK - self.step % BLOCK, until - self.step)
                found = torch.zeros(count, device=self.device)
                for i in range(count):
                    self._fill(self.step + i)
                    found[i] = self._one_step()
                if self.step + count < until:  # the device is still at work
                    self._drawn((self.step + count) // BLOCK)
                found = self._of_whole_batches(found).tolist()  # waits for the device
                for i, loss in enumerate(found):
                    if not math.isfinite(loss):
                        raise Diverged(
                            f"the loss is {loss} at step {self.step + i}; lower lr={self.config.lr} or "
                            f"logit_lr={self.config.logit_lr}, or lengthen warmup={self.config.warmup}"
                        )
                self.losses += found
                self.step += count
                bar.update(count)
                bar.set_postfix(loss=f"{sum(found) / count:.3f}", lr=f"{self.rate(self.step):.1e}")

    def save(self, path: str | Path) -> None:
        """Store the training as it stands, whole or not at all."""
        path = Path(path)
        temporary = path.with_name(path.name + ".part")
        state = {
            "config": asdict(self.config),
            "sizes": asdict(self.model.config),
            "step": self.step,
            "losses": torch.tensor(self.losses),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        try:
            torch.save(state, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: str | Path) -> None:
        """Take up a training that ``save`` stored, of the same configuration and sizes.

        Raises:
            ValueError: it was stored with others; nothing was changed.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.check_settings(state["config"] | state["sizes"], Path(path).name)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.go_on_from(state["step"], state["losses"].tolist())

    def rate(self, step: int) -> float:
        """Return the share of the highest rate times ``lr`` at a step."""
        return self.config.lr * _schedule(step, self.config)

    def settings(self) -> dict[str, object]:
        """Return what has to be the same where a stored training is taken up."""
        return asdict(self.config) | asdict(self.model.config)

    def check_settings(self, stored: dict[str, object], where: str) -> None:
        """Refuse to take up a training with other settings."""
        here = self.settings()
        if differs := {name: value for name, value in stored.items() if value != here[name]}:
            raise ValueError(f"{where} was stored with other settings: {differs}")

    def go_on_from(self, step: int, losses: list[float]) -> None:
        """Take up the count of a stored training whose weights and moments are in place."""
        self.step, self.losses = step, losses
        self.release()

    def release(self) -> None:
        """Free the CUDA graph; NCCL waits for that where a process group ends. A further step records a new one."""
        self._graph, self._steps_here = None, 0

    def _wrapped(self, model: SigLIP) -> nn.Module:
        """From a batch to its loss; here what spreads the work over many processes may come in."""
        return PairLoss(model, sigmoid_loss)

    def _of_whole_batches(self, losses: Tensor) -> Tensor:
        return losses

    def _fill(self, step: int) -> None:
        """Put the inputs of a step where the graph reads them."""
        drawn = self._drawn(step // BLOCK)
        for name, place in self._inputs.items():
            place.copy_(drawn[name][step % BLOCK, self._rows], non_blocking=True)
        share = _schedule(step, self.config)
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
            self._graph.replay()
            return self._loss
        if self.device.type != "cuda" or self._steps_here < self._eager_steps:
            self._steps_here += 1
            return self._forward_backward_update()
        self._graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        # what other threads do, such as the one that watches over NCCL, must not spoil the recording
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._loss = self._forward_backward_update()
        self._graph.replay()  # recording ran nothing
        return self._loss

    def _forward_backward_update(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with _deterministic():
            loss = self._forward()
            loss.backward()
        self._clip()
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


def _schedule(step: int, config: TrainConfig) -> float:
    """Share of the highest rate: up a line, down a cosine."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return (1 + math.cos(math.pi * done)) / 2


def _optimizer(model: SigLIP, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    logit, matrices, others = [], [], []
    for name, parameter in model.named_parameters():
        if name.startswith("logit_"):
            logit.append(parameter)
        elif name.endswith(("pos_embed", "latent")) or parameter.ndim < 2:
            others.append(parameter)
        else:
            matrices.append(parameter)
    rates = (
        (matrices, config.lr, config.weight_decay),
        (others, config.lr, 0.0),
        (logit, config.logit_lr, 0.0),
    )
    # a rate on the device can change without recording the graph anew
    groups = [
        {"params": p, "lr": torch.tensor(lr, device=device), "highest": lr, "weight_decay": decay}
        for p, lr, decay in rates
    ]
    return torch.optim.AdamW(
        groups, betas=(0.9, 0.98), fused=True, capturable=device.type == "cuda"
    )


def _caption_table(
    tokenizer: Tokenizer, emoji: Emoji64, keywords: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of all captions, concept after concept; by concept the place of the first, and how many."""
    texts = [
        captions(name, words if keywords else [])
        for name, words in zip(emoji.names, emoji.keywords, strict=True)
    ]
    counts = torch.tensor([len(found) for found in texts])
    tokens = tokenizer([caption for found in texts for caption in found])
    return tokens, counts.cumsum(0) - counts, counts


if __name__ == "__main__":
    from siglip_lib.train_command import main

    main()
