"""A SigLIP trained on emoji64, by one process or many: ``python -m siglip_lib.train --help``.

``siglip_lib.train.distributed`` and ``siglip_lib.train.stored`` are imported where they are needed: they bring much of
torch.distributed.
"""

from siglip_lib.train.recipe import TrainConfig
from siglip_lib.train.training import Diverged, Training
from siglip_lib.train.variants import (
    SHORT_SIGLIP,
    TINY_SIGLIP,
    Runs,
    Variant,
    runs_table,
    short_runs,
)

__all__ = [
    "SHORT_SIGLIP",
    "TINY_SIGLIP",
    "Diverged",
    "Runs",
    "TrainConfig",
    "Training",
    "Variant",
    "runs_table",
    "short_runs",
]
