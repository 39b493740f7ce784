"""Short trainings of several SigLIPs on the same batches: what a choice changes, against what the seed does."""

import gc
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from siglip_lib.base.checks import count, finite, one_of
from siglip_lib.data.emoji64 import Emoji64, load_emoji64, split
from siglip_lib.evaluate.retrieval import ranks
from siglip_lib.siglip.folder import EMOJI64_SIGLIP, EMOJI64_WEIGHTS
from siglip_lib.siglip.losses import sigmoid_loss, softmax_loss
from siglip_lib.siglip.model import (
    SigLIP,
    SigLIPConfig,
    check_tokenizer,
    embed_pictures,
    embed_texts,
)
from siglip_lib.siglip.text import Tokenizer
from siglip_lib.train.batches import Batches
from siglip_lib.train.recipe import TrainConfig
from siglip_lib.train.training import Diverged, PairLoss, Training

if TYPE_CHECKING:
    from tqdm import tqdm

VALIDATION, TEST = "emojione", "twemoji"  # designers
LOSSES, BATCHES = ("sigmoid", "softmax"), ("unique", "blind", "ids")
# Towers for short trainings, of 16 patches to a picture. The first is else the one that ships, the second is for a CPU.
_SHORT = replace(EMOJI64_SIGLIP, patch_size=16)
_TINY = replace(
    _SHORT,
    width=64,
    layers=2,
    heads=2,
    mlp_hidden=256,
    text_width=64,
    text_layers=1,
    text_heads=2,
    text_mlp_hidden=256,
)


class ShortCourse(NamedTuple):
    """What a short training takes on a machine of one size.

    Attributes:
        towers: of the SigLIP.
        recipe: how it is trained; without augmentation, so that a few hundred steps show something.
        rates: learning rates to choose from.
        seeds: of the trainings.
    """

    towers: SigLIPConfig
    recipe: TrainConfig
    rates: list[float]
    seeds: list[int]


def _recipe(steps: int, batch: int, warmup: int) -> TrainConfig:
    return TrainConfig(steps=steps, batch=batch, warmup=warmup, strength=0.0)


# what a comparison of variants trains, on which rates and seeds, by the name of the size
SHORT_COURSES = {
    "cpu": ShortCourse(_TINY, _recipe(20, 16, 5), [1e-3], [0]),
    "lab": ShortCourse(_SHORT, _recipe(150, 512, 40), [1e-3], [0, 1]),
    "full": ShortCourse(_SHORT, _recipe(400, 512, 100), [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], [0, 1, 2]),
}


@dataclass(frozen=True)
class Variant:
    """What is compared with others.

    Args:
        build: returns a new SigLIP, with weights drawn by torch's global generator; its text tower takes the tokens of
            the shipped tokenizer.
        rates: learning rates to choose from; of one there is no choice.
        warmup: steps of the linear rise; the config's if None. 1 is none: the first step has the highest rate.
        weight_decay: of the matrices; the config's if None.
        bias: of the logits at the start; -log(batch) if None.
        loss: "sigmoid", or "softmax" for CLIP's.
        batches: "unique", each pair of another concept, where there are enough; "blind", any pictures, each of which
            belongs to its own text alone; "ids", the same pictures, and all pairs of one concept belong together.
    """

    build: Callable[[], SigLIP]
    rates: Sequence[float]
    warmup: int | None = None
    weight_decay: float | None = None
    bias: float | None = None
    loss: str = "sigmoid"
    batches: str = "unique"


@dataclass(frozen=True, eq=False)
class Runs:
    """The trainings of one variant, a row for each seed, on the CPU.

    Attributes:
        lr: the learning rate that was chosen.
        tried: of every rate there was to choose from, the mean of 1 / rank of the own name among all names, over the
            validation pictures; NaN where recall is; empty if there was one rate.
        losses: (seeds, steps) float32; NaN from the step on at which the loss was no finite number.
        gradients: (seeds, steps) float32, norm of the gradient of all weights before it is clipped; NaN where the
            losses are.
        recall: (seeds,) float32, share of the validation pictures whose own name is among the five nearest of all
            names; NaN where the training diverged, or a vector has no direction.
        marks: steps after which recall was measured.
        courses: (seeds, marks) float32, that recall after these steps: of as many pictures of the "training", spread
            over it, and of the "validation" pictures.
    """

    lr: float
    tried: Mapping[float, float]
    losses: Tensor
    gradients: Tensor
    recall: Tensor
    marks: Sequence[int] = ()
    courses: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def final_loss(self) -> Tensor:
        """(seeds,) mean loss of the last tenth of the steps."""
        return self.losses[:, -math.ceil(self.losses.shape[1] / 10) :].mean(1)


def training_and_validation(emoji: Emoji64) -> tuple[Tensor, Tensor]:
    """Return places of pictures, two int64 tensors: those to train on, and those of a designer to choose by.

    Neither holds a drawing of Twemoji's, the designer of the test, or of a concept that the test holds out. EmojiOne's,
    the others, are taken out of the training, and show concepts that it has.
    """
    parts = split(emoji, (VALIDATION, TEST))
    here = emoji.vendor[parts.seen] == emoji.vendors.index(VALIDATION)
    return parts.train, parts.seen[here]


def short_runs(
    variants: Mapping[Hashable, Variant],
    config: TrainConfig,
    seeds: Sequence[int],
    device: torch.device | str,
    marks: Sequence[int] = (),
) -> dict[Hashable, Runs]:
    """Train every variant with every seed on emoji64, and show a bar of all steps.

    A seed decides the weights at the start, the batches and the augmentation, so all variants see the same batches;
    "blind" and "ids" have others than "unique", the same for both. Of several rates a variant takes the one with the
    highest mean of 1 / rank on the validation pictures, which is finer than recall, after a training of its own, with
    the seed after the largest of ``seeds``. torch's generators are left as they were.

    Unless a variant says otherwise, the bias of the logits starts at -log(batch), where a pair has a probability of
    about 1 / batch. SigLIP's -10 suits batches of exp(10) pairs.

    Args:
        variants: by name.
        config: how to train all of them; its ``lr`` and ``seed`` are not used, ``warmup`` and ``weight_decay`` where a
            variant has none.
        seeds: different numbers.
        device: where.
        marks: steps after which recall is measured too, ascending; of the trainings with ``seeds`` alone.

    Returns:
        The trainings by the variants' names.

    Raises:
        ValueError: there are no variants, rates or seeds, a seed comes twice, a number is out of its range, or a model
            does not fit the tokenizer. Nothing was trained.
        TypeError: what is no ``Variant``, a build that is no function, or returns no SigLIP. Nothing was trained.
    """
    device = torch.device(device)
    marks = [count("marks", mark, least=1) for mark in marks]
    if marks != sorted({*marks}) or marks[-1:] > [config.steps]:
        raise ValueError(f"marks={marks} must ascend, up to {config.steps} at most")
    plans = {name: _Plan(name, variant, config, seeds) for name, variant in variants.items()}
    if not plans:
        raise ValueError("variants is empty")
    tokenizer = _RememberingTokenizer(
        EMOJI64_WEIGHTS / "spiece.model", EMOJI64_SIGLIP.context_length
    )
    with _seeded(0, device):
        for name, plan in plans.items():
            _check_model(name, plan.variant.build(), tokenizer)
    emoji = load_emoji64()
    course = _Course(emoji, *training_and_validation(emoji), tokenizer, device)
    trainings = sum(len(plan.trials) + len(plan.seeds) for plan in plans.values())
    from tqdm.auto import tqdm

    with tqdm(total=trainings * config.steps, unit="step") as bar:
        return {name: _runs(plan, course, marks, bar) for name, plan in plans.items()}


def runs_table(runs: Mapping[Hashable, Runs]) -> str:
    """Return a line for each variant: its rate, then final loss and recall, the mean with the least and the most.

    Beside each figure stands how it compares with the first variant's: ``level`` if the means are no further apart than
    the seeds of the more variable one, else ``lower`` or ``higher``; ``?`` for one seed, which has no spread;
    ``diverged`` if a training did. Of figures that are normally distributed, two that are alike come out level 19 times
    in 20 with three seeds each, and 4 times in 5 with two. A rate at the end of those tried, beyond which a better one
    may lie, has a ``!``.

    Raises:
        ValueError: there are no runs.
    """
    if not runs:
        raise ValueError("runs is empty")
    first = next(iter(runs.values()))
    width = max(len(str(name)) for name in runs)
    lines = [f"{'':{width}}  {'rate':8} {'final loss':31} {'recall at 5, validation, in %':31}"]
    for name, found in runs.items():
        edge = found.tried and found.lr in (min(found.tried), max(found.tried))
        lines.append(
            f"{name!s:{width}}  {f'{found.lr:.0e}' + '!' * bool(edge):8} "
            f"{_figure(found.final_loss, first.final_loss, found is first, 3):31} "
            f"{_figure(100 * found.recall, 100 * first.recall, found is first, 1)}"
        )
    return "\n".join(line.rstrip() for line in lines)


def lowest_loss(runs: Mapping[Hashable, Runs]) -> str:
    """Name the variant with the lowest final loss, and those that are level with it, as ``runs_table`` says.

    One seed has no spread, so nobody is named.
    """
    if any(len(found.final_loss) < 2 for found in runs.values()):
        return "one seed does not tell"
    order = sorted(runs, key=lambda name: runs[name].final_loss.mean().nan_to_num(math.inf).item())
    best = runs[order[0]].final_loss
    level = (name for name in order[1:] if _verdict(runs[name].final_loss, best) == "level")
    return ", ".join(map(str, [order[0], *level]))


def _figure(found: Tensor, first: Tensor, is_first: bool, digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in (found.min(), found.max()))
    spread = f" ({low} to {high})" if len(found) > 1 else ""
    return f"{found.mean():.{digits}f}{spread} {'' if is_first else _verdict(found, first)}"


def _verdict(found: Tensor, first: Tensor) -> str:
    if not (found.isfinite().all() and first.isfinite().all()):
        return "diverged"
    if len(found) < 2:
        return "?"
    spread = max((some.max() - some.min()).item() for some in (found, first))
    gap = (found.mean() - first.mean()).item()
    return "level" if abs(gap) <= spread else "higher" if gap > 0 else "lower"


class _Plan:
    """The trainings of a variant, checked."""

    def __init__(
        self, name: Hashable, variant: Variant, config: TrainConfig, seeds: Sequence[int]
    ) -> None:
        if not isinstance(variant, Variant):
            raise TypeError(f"{name}: {variant!r} must be a Variant")
        if not callable(variant.build):
            raise TypeError(f"{name}: build={variant.build!r} must be a function")
        one_of(f"{name}: loss", variant.loss, LOSSES)
        one_of(f"{name}: batches", variant.batches, BATCHES)
        if (variant.loss, variant.batches) == ("softmax", "ids"):
            raise ValueError(f"{name}: CLIP's loss takes no ids, as each text has one picture")
        if variant.bias is not None:
            finite(f"{name}: bias", variant.bias)
        self.variant = variant
        seeds = [count("seeds", seed) for seed in seeds]
        if not seeds or len({*seeds}) < len(seeds):
            raise ValueError(f"seeds={seeds} must be different numbers, at least one")
        rates = list(variant.rates)
        if not rates:
            raise ValueError(f"{name}: rates is empty")
        own = dict(warmup=variant.warmup, weight_decay=variant.weight_decay)
        own = {key: value for key, value in own.items() if value is not None}
        # the numbers are checked where the configs are made
        search = [replace(config, **own, lr=lr, seed=max(seeds) + 1) for lr in rates]
        self.seeds = [replace(search[0], seed=seed) for seed in seeds]
        self.trials = search if len(rates) > 1 else []


@dataclass(frozen=True)
class _Course:
    """What all trainings have in common."""

    emoji: Emoji64
    places: Tensor
    validation: Tensor
    tokenizer: Tokenizer
    device: torch.device

    def recall(self, model: SigLIP) -> Tensor:
        """Return recall at 5 (2,) of as many pictures of the training as of validation, and of these."""
        spread = torch.linspace(0, len(self.places) - 1, len(self.validation)).long()
        found = _ranks(model, self, torch.cat([self.places[spread], self.validation]))  # (2 n,)
        return _recall(found.view(2, -1))


def _runs(plan: _Plan, course: _Course, marks: Sequence[int], bar: "tqdm") -> Runs:
    tried = {}
    for trial in plan.trials:
        found = _train(plan.variant, trial, course, [], bar)[2]
        tried[trial.lr] = (1 / found).mean().item()
    # a rate that diverged is the worst
    lr = max(tried, key=lambda rate: -1 if math.isnan(tried[rate]) else tried[rate], default=None)
    configs = [config if lr is None else replace(config, lr=lr) for config in plan.seeds]
    trained = (_train(plan.variant, config, course, marks, bar) for config in configs)
    losses, gradients, found, at_marks = (torch.stack(rows) for rows in zip(*trained, strict=True))
    courses = dict(zip(("training", "validation"), at_marks.unbind(2), strict=True))
    return Runs(configs[0].lr, tried, losses, gradients, _recall(found), marks, courses)


def _train(
    variant: Variant, config: TrainConfig, course: _Course, marks: Sequence[int], bar: "tqdm"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return losses and gradients (steps,), ranks (n,) of the validation pictures' names, recall (marks, 2).

    All are float32. Recall after the marks is that of training and of validation pictures.
    """
    shown, at_marks = 0, torch.full((len(marks), 2), torch.nan)
    with _seeded(config.seed, course.device):
        parts = (course.tokenizer, course.emoji, course.places, config, course.device)
        model = variant.build()
        bias = -math.log(config.batch) if variant.bias is None else variant.bias
        nn.init.constant_(model.logit_bias, bias)
        training = _Watched(variant, model, *parts)
        ends = sorted({*range(Batches.block, config.steps, Batches.block), *marks, config.steps})
        with suppress(Diverged):
            for end in ends:
                training.run(end, progress=False)
                bar.update(end - shown)
                shown = end
                if end in marks:
                    at_marks[marks.index(end)] = course.recall(training.model)
    bar.update(config.steps - shown)
    done = len(training.losses)
    losses, gradients = torch.full((2, config.steps), torch.nan)
    losses[:done] = torch.tensor(training.losses)
    gradients[:done] = training.norms[:done].cpu()
    found = torch.full((len(course.validation),), torch.nan)
    if done == config.steps:
        found = _ranks(training.model, course, course.validation)
    training.release()
    del training
    gc.collect()  # it refers to itself, and holds a GPU's memory
    return losses, gradients, found, at_marks


def _ranks(model: SigLIP, course: _Course, places: Tensor) -> Tensor:
    """Return the ranks (n,) of the names of the pictures at ``places``; NaN if a vector has no direction."""
    emoji, was_training = course.emoji, model.training
    model.eval()
    texts = embed_texts(model, course.tokenizer, emoji.names)  # (names, width)
    pictures = embed_pictures(model, emoji.pictures[places])  # (n, width)
    model.train(was_training)
    if any(not ((x.norm(dim=1) - 1).abs() < 1e-3).all() for x in (texts, pictures)):
        return torch.full((len(places),), torch.nan)
    names = torch.arange(len(texts))
    return ranks(pictures.cpu(), texts.cpu(), emoji.concept[places], names).float()


def _recall(found: Tensor) -> Tensor:
    """Return the share of ranks (..., n) that are at most 5, NaN where one is."""
    return torch.where(found.isnan(), torch.nan, (found <= 5).float()).mean(-1)


def _check_model(name: Hashable, model: object, tokenizer: Tokenizer) -> None:
    if not isinstance(model, SigLIP):
        raise TypeError(f"{name}: build() must return a SigLIP, not {type(model).__name__}")
    check_tokenizer(tokenizer, model.config)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators, and put them back in the end."""
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


class _Watched(Training):
    """A variant's training; it notes the norm of every step's gradient, before it is clipped, in ``norms`` (steps,)."""

    def __init__(self, variant: Variant, *parts) -> None:
        self._variant, self._unique = variant, variant.batches == "unique"
        super().__init__(*parts)
        # on the device, and counted there: a CUDA graph replays what it recorded
        self.norms = torch.zeros(self.config.steps, device=self.device)
        self._place = torch.zeros(1, dtype=torch.int64, device=self.device)

    def _new_pair_loss(self, model: SigLIP) -> nn.Module:
        return PairLoss(model, _loss_of(self._variant))

    def _clip(self) -> None:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.norms.index_copy_(0, self._place, norm[None])
        self._place.add_(1)


def _loss_of(variant: Variant) -> Callable[..., Tensor]:
    if variant.loss == "softmax":
        return _softmax
    return _blind if variant.batches == "blind" else sigmoid_loss


def _blind(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, *ids: Tensor | None
) -> Tensor:
    return sigmoid_loss(image, text, logit_scale, logit_bias)


def _softmax(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, *ids: Tensor | None
) -> Tensor:
    return softmax_loss(image, text, logit_scale)  # a bias would cancel


class _RememberingTokenizer(Tokenizer):
    """Cuts the same texts once: every training asks for the same thousands of captions."""

    def __call__(self, texts: list[str]) -> Tensor:
        self.found = getattr(self, "found", {})
        key = tuple(texts)
        if key not in self.found:
            self.found[key] = super().__call__(texts)
        return self.found[key].clone()
