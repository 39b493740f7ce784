"""Curves of several trainings in one picture: the mean over the seeds, and a band from the least to the most."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from siglip_lib.base.checks import check_tensor, positive_int

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_curves(ax: Axes, curves: Tensor, label: str, window: int = 1, **style: object) -> None:
    """Draw the mean of the curves over steps, and a band that holds them all.

    Args:
        ax: where.
        curves: (seeds, steps), any float dtype. Where one is NaN the line ends.
        label: for the legend.
        window: steps of which the mean is drawn as one point; those left over at the end are left out.
        **style: of the line.

    Raises:
        ValueError: another shape, an empty one, or fewer steps than a window has.
        TypeError: no floats, or a window that is no int.
    """
    _, steps = check_tensor("curves", curves, ("seeds", "steps"), empty=False)
    if positive_int("window", window) > steps:
        raise ValueError(f"window={window} must be at most {steps}, the number of steps")
    points = steps // window
    means = curves[:, : points * window].float().cpu().unflatten(1, (points, window)).mean(2)
    at = window * (np.arange(points) + 0.5)
    (line,) = ax.plot(at, means.mean(0), label=label, **style)
    ax.fill_between(
        at, means.amin(0), means.amax(0), color=line.get_color(), alpha=0.2, linewidth=0
    )
