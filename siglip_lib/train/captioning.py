"""A language model learns to write what a tower sees: one stage of a training after the other."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from siglip_lib.base.checks import finite, positive_int
from siglip_lib.base.offers import pick_dtype
from siglip_lib.train.recorded_step import RecordedStep

_READ = 50  # steps after which losses are read, which waits for the device


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
        weight_decay: of matrices; vectors, and tables of positions (1, N, E), have none.
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
