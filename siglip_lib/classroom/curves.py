"""Curves of several trainings in one picture: the mean over the seeds, and a band from the least to the most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from siglip_lib.base.checks import check_tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 40  # of a line, or one a step where there are fewer


def plot_curves(
    ax: Axes,
    curves: Mapping[str, Tensor],
    styles: Mapping[str, Mapping[str, object]] | None = None,
) -> None:
    """Draw each training's mean over the seeds, over the steps, and a band that holds all its seeds.

    A point is the mean of a fortieth of the steps; steps left over at the end are left out.

    Args:
        ax: where.
        curves: (seeds, steps) by name, any float dtype. Where one is NaN the line ends.
        styles: of the lines, by name.

    Raises:
        ValueError: another shape, or an empty one; nothing was drawn.
        TypeError: no floats; nothing was drawn.
    """
    for name, found in curves.items():
        check_tensor(f"curves[{name!r}]", found, ("seeds", "steps"), empty=False)
    for name, found in curves.items():
        window = max(1, found.shape[1] // POINTS)
        points = found.shape[1] // window
        means = found[:, : points * window].float().cpu().unflatten(1, (points, window)).mean(2)
        at = window * (np.arange(points) + 0.5)
        (line,) = ax.plot(at, means.mean(0), label=name, **(styles or {}).get(name, {}))
        ax.fill_between(
            at, means.amin(0), means.amax(0), color=line.get_color(), alpha=0.2, linewidth=0
        )
    ax.xaxis.get_major_locator().set_params(integer=True)  # half a step is none
