"""Which backend can run, found out by trying it, and what was found out."""

import ctypes
import importlib
import importlib.util
import logging
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from siglip_lib.backends.table import BACKENDS, AttentionCase, Backend, imported, sample
from siglip_lib.base.observers import is_observed, is_transformed


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run, the operator that would, and the reason why it can't (empty if it can).

    The operator is not known, and empty, on the meta device and where nothing can be tried.
    """

    name: str
    usable: bool
    operator: str
    reason: str


# By backend that was asked for, and case, the backend that runs. Nothing is remembered of what can't run: what a trial
# met may be gone the next time.
runs: dict[tuple[str, AttentionCase], str] = {}

_trial = threading.Lock()  # it swaps the warnings' filters, which all threads share


def remembered(backend: str, case: AttentionCase) -> str | None:
    """The backend that is known to run, None if none is: a transform of torch.func may not take what ran without."""
    return None if is_transformed() else runs.get((backend, case))


def status(name: str, case: AttentionCase) -> BackendStatus:
    """The status of a backend, which is tried first."""
    if reason := why_not(name, case):
        return BackendStatus(name, False, "", reason)
    known = case.device.type != "meta" and not is_observed()
    return BackendStatus(name, True, BACKENDS[name].operator(case) if known else "", "")


def why_not(name: str, case: AttentionCase) -> str | None:
    """Why the backend can't run, None if it can or if nothing is known against it; what ran is remembered."""
    if remembered(name, case):
        return None
    backend = BACKENDS[name]
    if reason := backend.why_not(case):
        return reason
    if case.device.type not in backend.sure:
        with _trial:
            if remembered(name, case):  # another thread was first
                return None
            if reason := _failure(backend, case):
                return reason
    if not is_observed():
        runs[name, case] = name
    return None


def _failure(backend: Backend, case: AttentionCase) -> str | None:
    """Import the backend's package and, if that is possible now, try it: what it died of, None if it ran."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # torch tells in warnings why it turns a kernel down
        try:
            if backend.package:
                imported[backend.package] = _import_quietly(backend.package)
            if not is_observed():
                _try(backend, case)
        except (torch.OutOfMemoryError, MemoryError):
            raise  # says nothing of the backend
        except Exception as error:  # whatever else a library raises for a case is its reason
            # not every library raises the two
            if any(text in str(error).lower() for text in ("out of memory", "alloc_failed")):
                raise
            return _shortest_reason(error, [str(w.message) for w in said])
    return None


def _shortest_reason(error: Exception, said: list[str]) -> str:
    """The line that says why, out of what a library printed about every kernel it looked at."""
    said = [line.partition(" (Triggered internally")[0] for line in said]
    cudnn = "cuDNN attention kernel not used because:"
    if cudnn in said[:-1]:
        return said[said.index(cudnn) + 1]
    lines = [line.strip() for line in str(error).strip().splitlines()]
    because = [i for i, line in enumerate(lines[:-1]) if line.endswith("is not supported because:")]
    if because:  # xformers: a paragraph for each operator; the last one is its own
        return f"{lines[because[-1]].strip('`').split('`')[0]}: {lines[because[-1] + 1]}"
    return lines[0] if lines else type(error).__name__


def _try(backend: Backend, case: AttentionCase) -> None:
    """Run the backend on 16 tokens, forward and backward."""
    devices = [case.device] if case.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(case.device.type, enabled=False),
        # hides the trial from a checkpoint around it, which would count its tensors as its own
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        q, k, v = sample(case).unbind(2)
        backend.run(q, k, v, case.dropout, 1.0, case.deterministic).sum().backward()


def _import_quietly(name: str) -> ModuleType:
    """Import flash-attn or xformers without the warnings about what a reader did not ask for."""
    if name.startswith("xformers"):
        _load_cuda12_runtime()
        logging.getLogger("xformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def _load_cuda12_runtime() -> None:
    """Load libcudart.so.12, which xformers' wheel links to, from its package: torch may bring CUDA 13's alone."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for library in Path(folder).glob("cuda_runtime/lib/libcudart.so.12"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
