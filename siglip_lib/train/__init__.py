"""A SigLIP trained on emoji64, by one process or many: ``python -m siglip_lib.train --help``.

``siglip_lib.train.distributed`` and ``siglip_lib.train.stored`` are imported where they are needed: they bring much of
torch.distributed.
"""

from siglip_lib.train.recipe import TrainConfig
from siglip_lib.train.training import Diverged, Training
from siglip_lib.train.variants import (
    SHORT_COURSES,
    Runs,
    ShortCourse,
    Variant,
    lowest_loss,
    runs_table,
    short_runs,
)

__all__ = [
    "SHORT_COURSES",
    "Diverged",
    "Runs",
    "ShortCourse",
    "TrainConfig",
    "Training",
    "Variant",
    "lowest_loss",
    "runs_table",
    "short_runs",
]
