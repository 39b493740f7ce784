"""Checks of notebook 02, weight initialisation."""

import math

import torch
from torch.nn.functional import gelu

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import first_match, near

_close = near(1e-3)
# the gain at which the mean of gelu(gain * z) ** 2 is 1 for a standard normal z, by quadrature
GELU_GAIN = 1.46796


@exercise("02.1")
def relu_std(answer) -> str | None:
    for fan_in in (1152, 4304, 96):
        found = answered(answer(fan_in))
        right, plain = math.sqrt(2 / fan_in), math.sqrt(1 / fan_in)
        if _close(found, right):
            continue
        call = f"relu_std({fan_in}) is {found:.5f}"
        mistakes = {
            "that is the variance; the standard deviation is its square root": right**2,
            "that keeps the size without a ReLU; with it 27 layers leave 1/11,600 of it": plain,
            "the ReLU halves the mean square already; the Linear must double it": right / 2,
            "half of the mean square is lost, so the gain is sqrt(2), not 2": 2 * plain,
        }
        if reason := first_match(found, mistakes, _close):
            return f"{call}: {reason}"
        factor = found * math.sqrt(fan_in / 2)
        each = "each layer with its ReLU then multiplies the size by"
        return f"{call}: {each} {factor:.3f}, not by 1"
    return None


@exercise("02.2")
def gelu_std(answer) -> str | None:
    for fan_in in (1152, 96):
        found = answered(answer(fan_in))
        root = math.sqrt(fan_in)
        if near(1e-2)(found, GELU_GAIN / root):
            continue
        call = f"gelu_std({fan_in}) is {found:.5f}"
        mistakes = {
            "that is the gain; divide it by the root of fan_in": GELU_GAIN,
            "divide the gain by the root of fan_in, not by fan_in": GELU_GAIN / fan_in,
            "that is the ReLU's; measure what the GELU leaves": math.sqrt(2) / root,
            "that keeps the size without a GELU": 1 / root,
            "that is the variance; the standard deviation is its square root": (GELU_GAIN / root)
            ** 2,
        }
        if reason := first_match(found, mistakes, _close):
            return f"{call}: {reason}"
        z = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
        after = gelu(found * root * z, approximate="tanh").square().mean().sqrt().item()
        return f"{call}: a signal of size 1 then has size {after:.3f} after the GELU, not 1"
    return None


@exercise("02.3")
def init_std(answer) -> str | None:
    small = 0.02 / math.sqrt(54)
    first = answered(answer("blocks.0.attn.proj"))
    mistakes = {
        "is .02: attn.proj is the last Linear of its branch and must be smaller": 0.02,
        "counts one branch for each block; a block has two": 0.02 / math.sqrt(27),
        "divides by the number of branches, not by its square root": 0.02 / 54,
        "divides by 27; it must be the square root of the number of branches": 0.02 / 27,
    }
    if reason := first_match(first, mistakes, _close):
        return f"init_std('blocks.0.attn.proj') {reason}"
    expected = {
        "blocks.0.attn.proj": small,
        "blocks.26.mlp.fc2": small,
        "blocks.5.attn.qkv": 0.02,
        "blocks.5.mlp.fc1": 0.02,
        "patch_embed.proj": 0.02,
    }
    for name, right in expected.items():
        found = answer(name)
        if found is None:
            return f"init_std({name!r}) is None; every Linear needs a std"
        if not _close(found, right):
            is_last = "" if right == small else "not "
            return f"init_std({name!r}) is {found:.5f}, not {right:.5f}: it is {is_last}the last Linear of a branch"
    return None
