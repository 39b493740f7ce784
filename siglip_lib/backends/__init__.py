"""Attention by whichever library can run here, and the reasons why others can't."""

from siglip_lib.backends.dispatch import (
    attend,
    attend_packed,
    attention_backends,
    choose_backend,
    is_large,
)
from siglip_lib.backends.table import LARGE, LONG
from siglip_lib.backends.trials import BackendStatus

__all__ = [
    "LARGE",
    "LONG",
    "BackendStatus",
    "attend",
    "attend_packed",
    "attention_backends",
    "choose_backend",
    "is_large",
]
