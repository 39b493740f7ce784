"""A language model learns to write what a tower sees: the model, and one stage of its training after the other."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_lib.base.checks import finite, positive_int
from siglip_lib.base.offers import pick_dtype
from siglip_lib.evaluate.retrieval import Share
from siglip_lib.siglip.folder import EMOJI64_CAPTIONER
from siglip_lib.siglip.text import EOS
from siglip_lib.storage.fitting import check_finite, check_fit, fill
from siglip_lib.storage.reading import find_weights, read_weights
from siglip_lib.tower.vision_transformer import VisionTransformer
from siglip_lib.train.recorded_step import RecordedStep
from siglip_lib.vl.language_model import LanguageModel, caption_loss
from siglip_lib.vl.visual_prefix import VisualPrefix

# of the language model that ships, behind emoji64's tower: what it reads are up to 4 x 4 tiles, 293 tokens
EMOJI64_LANGUAGE = dict(vocab_size=1500, width=128, depth=4, num_heads=4)
_READ = 50  # steps after which losses are read, which waits for the device


class Captioner(nn.Module):
    """A tower, what brings its tokens to a language model, and the language model: pictures and questions to answers.

    The tower is frozen and in evaluation mode: it belongs to whoever gave it.

    Args:
        tower: see ``VisualPrefix``.
        vocab_size, width, depth, num_heads: of the language model.

    Shapes: prompts (B, P) and answers (B, T), token ids that ``</s>`` fills up; thumbnail, tiles and grid as for
    ``VisualPrefix``, of S pictures; about (B,), which of them each question is about. Without it each picture has one
    question, and S is B.
    """

    def __init__(
        self, tower: VisionTransformer, vocab_size: int, width: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        self.prefix = VisualPrefix(tower.eval().requires_grad_(False), width)
        self.language = LanguageModel(vocab_size, width, depth, num_heads)

    def forward(
        self,
        prompts: Tensor,
        answers: Tensor,
        thumbnail: Tensor,
        tiles: Tensor | None = None,
        grid: tuple[int, int] = (1, 1),
        about: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the answers; nothing before them counts. The language model reads each picture once."""
        _, past = self.language.read(self.see(thumbnail, tiles, grid))
        if about is not None:
            past = [(_repeated(k, about), _repeated(v, about)) for k, v in past]
        asked = self.language.token_embed(prompts)
        return caption_loss(self.language.caption_logits(asked, answers, past), answers)

    def see(
        self, thumbnail: Tensor, tiles: Tensor | None = None, grid: tuple[int, int] = (1, 1)
    ) -> Tensor:
        """Return what the language model reads of each picture (S, N, E)."""
        return self.prefix(thumbnail, tiles, grid)

    def read(
        self,
        prompts: Tensor,
        thumbnail: Tensor,
        tiles: Tensor | None = None,
        grid: tuple[int, int] = (1, 1),
        about: Tensor | None = None,
    ) -> Tensor:
        """Return what stands before an answer (B, N + P, E): the N tokens of the picture, then the prompt's."""
        seen = self.see(thumbnail, tiles, grid)
        if about is not None:
            seen = seen.index_select(0, about)
        return torch.cat((seen, self.language.token_embed(prompts)), dim=1)

    def trained_state(self) -> dict[str, Tensor]:
        """Return all weights but the tower's, by name: what is stored of a captioner."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("prefix.vision.")}


def _repeated(x: Tensor, about: Tensor) -> Tensor:
    """Return x[about] of k or v, whose gradient is summed in order; that of an index would be by atomic additions."""
    return F.embedding(about, x.flatten(1)).unflatten(1, x.shape[1:])


def load_captioner(tower: VisionTransformer, path: str | Path = EMOJI64_CAPTIONER) -> Captioner:
    """Return a captioner of the sizes that ship, behind ``tower``, with the weights that a file holds.

    Args:
        tower: that of ``load_siglip(EMOJI64_WEIGHTS)``, on any device; the captioner is on the same one.
        path: a safetensors file of ``Captioner.trained_state``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a tensor is missing, unexpected, of another shape or not finite.
    """
    captioner = Captioner(tower, **EMOJI64_LANGUAGE).to(tower.pos_embed.device)
    state, where = read_weights(find_weights(str(path)))
    wanted = {name: [tensor] for name, tensor in captioner.trained_state().items()}
    check_fit(state, wanted, f"{where} holds no weights of this captioner")
    check_finite(state, wanted, where)
    fill(wanted, state)
    return captioner.eval()


@torch.no_grad()
def share_right(
    captioner: Captioner, batches: Iterable[Mapping[str, Tensor]], grid: tuple[int, int] = (1, 1)
) -> Share:
    """Return how many answers a captioner writes to the letter: every token, up to ``</s>``.

    Args:
        captioner: as it is; put it into evaluation mode before.
        batches: of what ``Captioner`` takes, ``answers`` being the right ones.
        grid: rows and columns of tiles.
    """
    hits, total = 0, 0
    for batch in batches:
        answers = batch["answers"]  # (B, T)
        before = captioner.read(**{k: x for k, x in batch.items() if k != "answers"}, grid=grid)
        written = captioner.language.write(before, answers.shape[1])
        written = F.pad(written, (0, answers.shape[1] - written.shape[1]), value=EOS)
        hits, total = hits + int((written == answers).all(1).sum()), total + len(answers)
    return Share(hits, total)


def train_stage(
    loss: Callable[..., Tensor],
    trained: Iterable[nn.Parameter],
    batch: Callable[[int], Mapping[str, Tensor]],
    steps: int,
    lr: float,
    *,
    weight_decay: float = 0.1,
    progress: bool = True,
) -> Tensor:
    """Train some of a model's parameters with AdamW, and no others; return the loss of each step, (steps,) on the CPU.

    The learning rate rises over a twentieth of the steps and falls along a cosine. On a GPU a step is recorded as a
    CUDA graph, and products are in bfloat16 where it has that. The gradient is clipped to the norm 1.

    Args:
        loss: from what ``batch`` returns, by name, to a number.
        trained: the parameters. What else the loss depends on gets no gradient.
        batch: from a step's number to its tensors, of the same shapes in each step, on the parameters' device.
        steps: how many.
        lr: highest learning rate.
        weight_decay: of matrices alone.
        progress: whether to show a bar.

    Raises:
        ValueError: there is nothing to train, or a number is out of range; nothing was changed.
        FloatingPointError: a loss is not finite.

    Source: Wu et al., DeepSeek-VL2 (2024), section 4 (stages that train parts of the model).
    """
    trained = [*trained]
    steps, lr = positive_int("steps", steps), finite("lr", lr)
    if not trained:
        raise ValueError("trained holds no parameters")
    if lr <= 0 or finite("weight_decay", weight_decay) < 0:
        raise ValueError(f"lr={lr} must be above 0, weight_decay={weight_decay} not below")
    step = _Step(loss, trained, lr, weight_decay)
    losses = torch.zeros(steps, device=step.device)
    from tqdm.auto import tqdm

    with tqdm(total=steps, unit="step", disable=not progress) as bar:
        for number in range(steps):
            rise = min(1.0, (number + 1) / max(1, steps // 20))
            losses[number] = step(
                batch(number), rise * (1 + math.cos(math.pi * number / steps)) / 2
            )
            if (number + 1) % _READ == 0 or number + 1 == steps:
                done = losses[: number + 1]
                if not done.isfinite().all():
                    first = int((~done.isfinite()).nonzero()[0])
                    raise FloatingPointError(
                        f"the loss is {done[first]} at step {first}; lower lr={lr}"
                    )
                bar.update(number + 1 - bar.n)
                bar.set_postfix(loss=f"{done[-_READ:].mean():.3f}")
    return losses.cpu()


class _Step:
    """One step of the optimizer, on a GPU replayed from a graph."""

    def __init__(
        self, loss: Callable[..., Tensor], trained: list[nn.Parameter], lr: float, decay: float
    ) -> None:
        self._loss, self._trained = loss, trained
        self.device = trained[0].device
        self._lr = lr
        groups = [
            {"params": some, "lr": torch.tensor(lr, device=self.device), "weight_decay": each}
            for some, each in (
                ([p for p in trained if p.ndim == 2], decay),
                ([p for p in trained if p.ndim != 2], 0.0),
            )
            if some
        ]
        self._optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.98), fused=True, capturable=self.device.type == "cuda"
        )
        self._inputs: dict[str, Tensor] = {}
        self._recorder = RecordedStep(self._optimizer, self.device)

    def __call__(self, batch: Mapping[str, Tensor], share: float) -> Tensor:
        """Do the step with a share of the learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"].fill_(self._lr * share)
        if not self._inputs:
            self._inputs = {name: tensor.clone() for name, tensor in batch.items()}
        for name, tensor in batch.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        return self._recorder(self._update)

    def _update(self) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        native = pick_dtype(self.device) == torch.bfloat16
        # a cache of converted weights would not outlive the recording of a graph
        with torch.autocast(self.device.type, torch.bfloat16, enabled=native, cache_enabled=False):
            loss = self._loss(**self._inputs)
        loss.backward(inputs=self._trained)  # of these alone
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        return loss.detach()
