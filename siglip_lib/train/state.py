"""What is stored of a training, in one file or in a folder, and what is checked before it is put back."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from siglip_lib.base.checks import finite_tensors
from siglip_lib.siglip.model import SigLIP
from siglip_lib.storage.fitting import check_fit, check_plain
from siglip_lib.storage.writing import replacing
from siglip_lib.train.recipe import TrainConfig, new_optimizer


class TrainingState:
    """A model, its optimizer, and what was done so far: what ``siglip_lib.train.stored`` stores by many processes."""

    group: dist.ProcessGroup | None = None  # the processes that train together; None for one alone
    rank = 0  # of this process in it

    def __init__(self, model: SigLIP, config: TrainConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self.optimizer = new_optimizer(model, config, device)
        self.step, self.losses = 0, []
        self.stored: Path | None = None
        self._damage: str | None = None  # why it can't go on
        self._names = {parameter: name for name, parameter in model.named_parameters()}

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
        try:
            stored = torch.load(path, map_location=self.device, weights_only=True)
            description = {
                "settings": stored["config"] | stored["sizes"],
                "step": stored["step"],
                "losses": stored["losses"].tolist(),
            }
            moments = {parameters[i]: some for i, some in stored["optimizer"]["state"].items()}
            tensors = self._by_name(stored["model"], moments)
        except OSError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # torch's own message would advise to run what the file asks for
            raise ValueError(f"{path.name} is no stored training, or is damaged") from None
        self.check_description(description, path.name)
        check_plain(tensors, path.name)
        check_fit(tensors, self.views(), f"{path.name} is damaged", same_dtype=True)
        finite_tensors(f"{path.name} is damaged: there are", tensors)
        self.restore(tensors, description, path)

    def check_usable(self) -> None:
        """Raise RuntimeError if what broke off a step, or a loss that was not finite, damaged the model."""
        if self._damage:
            how = (
                f"resume from {str(self.stored)!r}" if self.stored else "none is stored, start anew"
            )
            raise RuntimeError(f"the training can't go on: {self._damage}; {how}")

    def settings(self) -> dict[str, object]:
        """Return what has to be the same where a stored training is resumed."""
        return asdict(self.config) | asdict(self.model.config)

    def tensors(self) -> dict[str, Tensor]:
        """Return all weights and moments by name: those that the training works on, no copies."""
        return self._by_name(self.model.state_dict(), self.optimizer.state)

    def views(self) -> dict[str, list[Tensor]]:
        """Return the same as ``check_fit`` wants them."""
        return {name: [tensor] for name, tensor in self.tensors().items()}

    def check_description(self, description: object, where: str) -> None:
        """Raise ValueError for what describes no stored training, or one with other settings.

        Args:
            description: its ``settings``, ``step`` and ``losses``.
            where: its name, for messages.
        """
        if not isinstance(description, dict) or not isinstance(description.get("settings"), dict):
            raise ValueError(f"{where} is damaged: it does not tell its settings")
        stored, here = description["settings"], self.settings()
        if odd := sorted(map(str, stored.keys() ^ here.keys())):
            raise ValueError(f"{where} is of another version, or damaged: not in both are {odd}")
        if differs := {name: value for name, value in stored.items() if value != here[name]}:
            raise ValueError(f"{where} was stored with other settings: {differs}")
        step, losses = description.get("step"), description.get("losses")
        if type(step) is not int or not 0 <= step <= self.config.steps:
            raise ValueError(
                f"{where} is damaged: step={step!r} must lie in 0 to {self.config.steps}"
            )
        if not isinstance(losses, list) or len(losses) != step:
            raise ValueError(f"{where} is damaged: it must hold the losses of {step} steps")
        if not all(isinstance(loss, float) and math.isfinite(loss) for loss in losses):
            raise ValueError(f"{where} is damaged: a loss is not finite")

    def restore(self, tensors: Mapping[str, Tensor], description: dict, stored: Path) -> None:
        """Put checked weights, moments, step and losses of a stored training in the place of these."""
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

    def _by_name(self, model: dict, moments: dict) -> dict[str, Tensor]:
        return {f"model.{name}": tensor for name, tensor in model.items()} | {
            f"optimizer.state.{self._names[parameter]}.{kind}": tensor
            for parameter, some in moments.items()
            for kind, tensor in some.items()
        }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine lacks memory, which says nothing about what was being read."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error)  # torch's plain RuntimeError on a CPU
