"""How a SigLIP is trained: the numbers, the learning rate at each step, and the optimizer."""

import math
from dataclasses import dataclass

import torch

from siglip_lib.base.checks import count, finite, positive_int
from siglip_lib.siglip.model import SigLIP

MOST_STEPS = 10**9 - 1  # a checkpoint's name has nine digits


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the numbers are those of the shipped weights.

    Args:
        steps: optimizer steps.
        batch: pairs in a step, each of another concept; of more than there are concepts each has another picture, and
            all pairs of one concept belong together.
        lr: highest learning rate of AdamW, reached after ``warmup`` steps, then lowered along a cosine to 0.
        logit_lr: the same for log-temperature and bias.
        weight_decay: of matrices; norms, biases, positions, the pooling query, temperature and bias have none.
        warmup: steps of a linear rise.
        clip: largest norm of the gradient.
        strength: of the augmentation, in [0, 2], see ``augment``.
        keywords: whether captions may name keywords beside the name.
        seed: of batches, captions and augmentation, below 2**64.
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
        plain = {"seed": count("seed", self.seed)}
        for name in ("steps", "batch", "warmup"):
            plain[name] = positive_int(name, getattr(self, name))
        for name, end in (("steps", MOST_STEPS + 1), ("seed", 2**64)):  # torch takes no larger seed
            if plain[name] >= end:
                raise ValueError(f"{name}={plain[name]} must be below {end}")
        for name in ("lr", "logit_lr", "weight_decay", "clip", "strength"):
            plain[name] = finite(name, getattr(self, name))
            if plain[name] < 0:
                raise ValueError(f"{name}={plain[name]} must not be negative")
        if self.strength > 2:
            raise ValueError(f"strength={self.strength} must lie in [0, 2]")
        if not isinstance(self.keywords, bool):
            raise TypeError(f"keywords={self.keywords!r} must be True or False")
        for name, value in plain.items():  # NumPy's numbers can't be stored as JSON
            object.__setattr__(self, name, value)

    @property
    def no_pair_loss(self) -> float:
        """Sigmoid loss, for each picture, of a model that knows no pair, only that one text in ``batch`` belongs to it.

        Such a model gives each pair the probability 1 / batch. Only what lies below is knowledge of pairs.
        """
        others = self.batch - 1
        return math.log(self.batch) + (others * math.log1p(1 / others) if others else 0.0)


def schedule(step: int, config: TrainConfig) -> float:
    """Return the learning rate at a step as a share of the highest one: up a line, down a cosine."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return (1 + math.cos(math.pi * done)) / 2


def new_optimizer(model: SigLIP, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """Return AdamW with its state as before the first step; ``highest`` of a group is its highest learning rate."""
    logit, matrices, others = [], [], []
    for name, parameter in model.named_parameters():
        if name.startswith("logit_"):
            logit.append(parameter)
        elif name.endswith(("pos_embed", "latent")) or parameter.ndim < 2:
            others.append(parameter)
        else:
            matrices.append(parameter)
    groups = [
        # a learning rate on the device can change without recording the graph anew
        {"params": p, "lr": torch.tensor(lr, device=device), "highest": lr, "weight_decay": decay}
        for p, lr, decay in (
            (matrices, config.lr, config.weight_decay),
            (others, config.lr, 0.0),
            (logit, config.logit_lr, 0.0),
        )
    ]
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True, capturable=on_gpu)
    # AdamW would begin so at its first step; now a training that has not begun is stored and resumed as any other
    for parameter in (p for group in groups for p in group["params"] if p.requires_grad):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer
