"""Checks of notebook 01, truncated-normal sampling."""

import math

import torch

from siglip_lib.exercises import answered, exercise


@exercise("01.1")
def beyond(answer) -> str | None:
    one = answered(answer(1.0))
    if math.isclose(one, 0.1586553, rel_tol=1e-3):
        return "that is one side only; draws below -z count too"
    if math.isclose(one, 0.6826895, rel_tol=1e-3):
        return "that is the share within z, not beyond it"
    if not math.isclose(one, 0.3173105, rel_tol=1e-5):
        return (
            f"beyond(1) is {one:.4f}, but 31.73 % of normal draws lie beyond one standard deviation"
        )
    if not math.isclose(answer(10.0), 1.523971e-23, rel_tol=1e-3):
        return f"beyond(10) is {answer(10.0)}, not 1.52e-23: a difference of two numbers near 1 loses it"
    return None


@exercise("01.2")
def truncated_std(answer) -> str | None:
    two = answered(answer(2.0))
    if math.isclose(two, 0.773741, rel_tol=1e-3):
        return "that is the variance; the standard deviation is its square root"
    if math.isclose(two, 1.0, rel_tol=1e-3):
        return "cutting both ends off makes the spread smaller than 1"
    for c, right in ((2.0, 0.879626), (1.0, 0.539560), (3.0, 0.986577)):
        if not math.isclose(answer(c), right, rel_tol=2e-3):
            return f"truncated_std({c:.0f}) is {answer(c):.4f}; a million draws give {right:.4f}"
    return None


@exercise("01.3")
def largest_inside(answer) -> str | None:
    answered(answer(0.05, torch.bfloat16))
    for bound in (0.05, 0.1, 2.0, -0.05, 1e-3, 1 / 3):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found, name = float(answer(bound, dtype)), str(dtype).removeprefix("torch.")
            if found != torch.tensor(found, dtype=torch.float64).to(dtype).item():
                return f"largest_inside({bound:.4g}, {name}) = {found!r} is no {name} number"
            if found > bound:
                return f"largest_inside({bound:.4g}, {name}) = {found!r} lies above it: a cast rounds to nearest"
            step_up = torch.nextafter(
                torch.tensor(found, dtype=dtype), torch.tensor(math.inf, dtype=dtype)
            ).item()
            if step_up <= bound:
                return f"largest_inside({bound:.4g}, {name}) = {found!r} is not the largest: {step_up!r} fits too"
    return None
