"""timm and transformers as oracles: the libraries that the notebooks and tests compare with their own."""

import importlib
import importlib.util
import sys
from types import ModuleType

import torch

_declared: torch.library.Library | None = None


def import_timm() -> ModuleType:
    """Import timm, also where torchvision was built for another torch than the one installed.

    timm imports torchvision, whose Python code describes its operators ``nms`` and ``qnms``. Where the library that
    defines them can't load, as that of a CUDA wheel beside a CPU-only torch, the import fails with "operator
    torchvision::nms does not exist". Declaring the two is enough, as nothing here calls them.
    """
    declare_torchvision_operators()
    import timm

    return timm


def import_transformers() -> ModuleType:
    """Import transformers, also where torchvision can't load its operators; see ``import_timm``."""
    declare_torchvision_operators()
    import transformers

    return transformers


def declare_torchvision_operators() -> None:
    """Make torchvision importable where its operators can't be loaded; elsewhere change nothing."""
    global _declared  # the declaration lasts as long as this object
    if _declared is not None or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
