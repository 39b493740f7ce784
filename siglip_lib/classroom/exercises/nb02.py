"""Checks of notebook 02, weight initialisation."""

import math

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import first_match, near

_close = near(1e-3)


@exercise("02.1")
def kaiming_std(answer) -> str | None:
    for fan_in, a in ((1152, math.sqrt(5)), (4304, math.sqrt(5)), (1152, 0.0), (96, 2.0)):
        found = answered(answer(fan_in, a))
        right = math.sqrt(2 / ((1 + a * a) * fan_in))
        bound = right * math.sqrt(3)
        if _close(found, right):
            continue
        call = f"kaiming_std({fan_in}, {a:.3f}) is {found:.5f}, not {right:.5f}"
        mistakes = {
            "that is the bound; a uniform draw's standard deviation is the bound / sqrt(3)": bound,
            "that is the variance; the standard deviation is its square root": right**2,
            "the bound was divided by 3; divide it by sqrt(3)": bound / 3,
            "a enters squared": math.sqrt(2 / ((1 + a) * fan_in)),
            "right for a = sqrt(5) only; a must enter": (3 * fan_in) ** -0.5,
        }
        if reason := first_match(found, mistakes, _close):
            return f"{call}: {reason}"
        return call
    return None


@exercise("02.2")
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
