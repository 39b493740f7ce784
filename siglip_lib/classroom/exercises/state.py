"""The settings that all code of a process shares: an answer may change them, and none may outlive its check."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.backends import cudnn

_DEVICES = ("cpu", "cuda")
# each as a function that reads it and one that sets it
_SETTINGS: list[tuple[Callable[[], object], Callable[[object], object]]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    # the CPU is what none set means; to set it would have each call of torch pass through Python, and stop compiling
    (
        torch.get_default_device,
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    *(
        (lambda d=d: torch.is_autocast_enabled(d), lambda v, d=d: torch.set_autocast_enabled(d, v))
        for d in _DEVICES
    ),
    *(
        (lambda d=d: torch.get_autocast_dtype(d), lambda v, d=d: torch.set_autocast_dtype(d, v))
        for d in _DEVICES
    ),
    *(
        (lambda n=n: getattr(cudnn, n), lambda v, n=n: setattr(cudnn, n, v))
        for n in ("enabled", "benchmark", "deterministic")
    ),
]


@contextmanager
def unchanged() -> Iterator[None]:
    """Leave torch's settings and the states of all random generators as they were.

    Inside float32 is the default and gradients are on, whatever was set before: the checks expect that.
    """
    before = [read() for read, _ in _SETTINGS]
    generators = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
        yield
    finally:
        for (read, put), value in zip(_SETTINGS, before, strict=True):
            if read() != value:  # some can't be set twice
                put(value)
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        if on_gpu is not None:
            torch.cuda.set_rng_state_all(on_gpu)
