"""Pictures in the notebooks: one style, alt text on each, and the few drawings that several notebooks share.

matplotlib is imported when a picture is drawn, not before: importing the library stays quick.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from siglip_lib.base.checks import NUMBERS, check_tensor, one_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from PIL.Image import Image

    from siglip_lib.classroom.schedule import Span

PICTURES = ("cat", "coffee", "astronaut")
# Okabe and Ito's palette: told apart by the colour-blind and on a weak projector.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Of attention, by who computes it; those that run one kernel, as notebook 04 finds, have one colour. The last one's is
# none of COLOURS, which are used up: a dark red that the colour-blind tell from all of them.
KERNEL_COLOURS = {
    "eager": COLOURS[6],
    "SDPA mem-eff": COLOURS[3],
    "xformers cutlass": COLOURS[3],
    "xformers": COLOURS[0],
    "SDPA flash": COLOURS[0],
    "flash-attn 2": COLOURS[0],
    "SDPA cuDNN": COLOURS[2],
    "triton": COLOURS[1],
    "flash-attn 3": COLOURS[4],
    "flash-attn 4": COLOURS[5],
    "hopper": "#800000",
}


def figure(
    rows: int = 1, columns: int = 1, width: float = 7.0, height: float = 3.2
) -> tuple[Figure, np.ndarray]:
    """Return a figure and its axes, an array (rows, columns), in the series' style; sizes in inches."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    plt.rcParams |= {
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.grid": True,
        "grid.alpha": 0.25,
        "lines.linewidth": 2,
        "legend.frameon": False,
        "figure.dpi": 100,
    }
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")


def show(fig: Figure, alt: str, photo: bool = False) -> None:
    """Display a figure whose description is ``alt``: what a reader who can't see it needs to know.

    The description is also the output's plain text, so a test of the notebook compares it. A figure with photographs
    (``photo=True``) becomes a JPEG, a tenth of the size; any other a PNG of 256 colours, a third of the size.
    """
    import matplotlib.pyplot as plt
    from IPython.display import display

    if not alt.strip():
        raise ValueError("alt is empty; say what the picture shows")
    buffer = io.BytesIO()
    kind = "jpeg" if photo else "png"
    fig.savefig(buffer, format=kind, pil_kwargs={"quality": 88} if photo else {})
    plt.close(fig)
    image, kind = buffer.getvalue() if photo else few_colours(buffer), f"image/{kind}"
    display({kind: image, "text/plain": alt}, raw=True, metadata={kind: {"alt": alt}})


def few_colours(png: io.BytesIO) -> bytes:
    """Return a PNG with at most 256 colours: the nearest of each, so that flat areas stay flat."""
    from PIL import Image

    small = io.BytesIO()
    with Image.open(png) as image:
        palette = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    palette.save(small, "png", optimize=True)
    return small.getvalue()


def picture(name: str, size: int = 384) -> Image:
    """Return one of the shipped photographs, RGB, ``size`` by ``size`` pixels: cat, coffee or astronaut."""
    from PIL import Image

    path = Path(__file__).parent / "pictures" / f"{one_of('name', name, PICTURES)}.jpg"
    with Image.open(path) as image:
        return image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def plot_histogram(
    ax: Axes, values: Tensor, edges: np.ndarray, label: str, **style: object
) -> np.ndarray:
    """Draw the density of ``values`` in the bins between ``edges`` as steps, and return it (len(edges) - 1,)."""
    counts = np.zeros(len(edges) - 1)
    # float64 copies of 10**9 values would fill a laptop
    for chunk in values.detach().flatten().split(2**24):
        counts += np.histogram(chunk.double().cpu().numpy(), edges)[0]
    density = counts / (values.numel() * np.diff(edges))
    ax.stairs(density, edges, label=label, **{"linewidth": 2} | style)
    return density


def show_attention(
    ax: Axes,
    image: Image,
    weights: Tensor,
    token: int | None = None,
    title: str = "",
    **style: object,
) -> AxesImage:
    """Draw attention weights over a picture; mark the patch that looks. Return what ``fig.colorbar`` takes.

    Args:
        ax: where to draw.
        image: the picture that the patches cover.
        weights: (rows, columns), or (N,) for a square grid on a square picture.
        token: the patch to mark, counted along the rows; none if None.
        title: above the picture.
        **style: for ``imshow``, such as ``vmin`` and ``vmax``, the same for maps that are compared. Without them the
            map's least weight is violet and its largest yellow.

    Raises:
        ValueError: weights of another shape, flat ones whose grid can't be known, or a token that is no patch.
    """
    width, height = image.size
    side = math.isqrt(weights.numel())
    shapes = ("N",), ("rows", "columns")
    flat = len(check_tensor("weights", weights, *shapes, dtypes=NUMBERS, empty=False)) == 1
    if flat and (side * side != weights.numel() or width != height):
        raise ValueError(
            f"weights has {weights.numel()} entries; it must be a square number of patches, and the picture of "
            f"{width} x {height} pixels a square, or the weights (rows, columns)"
        )
    rows, columns = (side, side) if flat else weights.shape
    grid = weights.detach().float().cpu().reshape(rows, columns)
    if token is not None and not 0 <= token < grid.numel():
        raise ValueError(f"token={token} must lie in 0 to {grid.numel() - 1}")
    extent = (0, width, height, 0)
    ax.imshow(image.convert("L"), cmap="gray", extent=extent)
    style = {"cmap": "viridis", "alpha": 0.65, "interpolation": "nearest"} | style
    drawn = ax.imshow(grid, extent=extent, **style)
    if token is not None:
        row, column = divmod(token, columns)
        centre = (column + 0.5) * width / columns, (row + 0.5) * height / rows
        ax.plot(*centre, "s", color=COLOURS[1], markersize=7)
    ax.set(title=title, xticks=[], yticks=[])
    ax.grid(False)
    return drawn


def plot_timeline(axes: Axes, spans: Sequence[Span], until: float = math.inf) -> None:
    """Draw what each role had done when: a row a role, a bar a span, a colour and a height a unit.

    Args:
        axes: where to draw.
        spans: as ``schedule.run`` returns them.
        until: cycles; what begins later is left out.

    Raises:
        ValueError: no span begins by then.
    """
    spans = [span for span in spans if span.start < until]
    if not spans:
        raise ValueError(f"no span begins before cycle {until:g}")
    roles = list(dict.fromkeys(span.role for span in spans))
    units = ("copy", "product", "exponential")
    for place, (unit, colour) in enumerate(zip(units, COLOURS, strict=False)):
        for i, role in enumerate(roles):
            mine = [(s.start, s.end - s.start) for s in spans if (s.role, s.unit) == (role, unit)]
            height = 0.8 / len(units)
            label = unit if i == 0 else None
            axes.broken_barh(mine, (i - 0.4 + place * height, height), color=colour, label=label)
    axes.set_yticks(range(len(roles)), roles)
    axes.invert_yaxis()
    axes.set_xlabel("cycles")
    axes.legend(ncols=len(units), loc="lower right", bbox_to_anchor=(1, 1))
