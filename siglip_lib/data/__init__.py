"""Pictures: the 5,094 that ship, random changes of them, and a reader's own as the tower takes them."""

from siglip_lib.data.augmentation import DRAWS, augment, compose
from siglip_lib.data.emoji64 import (
    TEMPLATES,
    Emoji64,
    Split,
    captions,
    load_emoji64,
    split,
    unique_batches,
)
from siglip_lib.data.preprocessing import preprocess

__all__ = [
    "DRAWS",
    "TEMPLATES",
    "Emoji64",
    "Split",
    "augment",
    "captions",
    "compose",
    "load_emoji64",
    "preprocess",
    "split",
    "unique_batches",
]
