"""Drawings of ideas: the tower with the part that a notebook builds, and how numbers move inside it.

Each function returns a figure and its description, which ``show`` takes: ``show(*draw_tower("attention"))``. Nothing
here is measured: the drawings are the same on every machine.
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from siglip_lib.base.checks import one_of
from siglip_lib.classroom.plots import COLOURS, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, INK = "0.45", "black"
LIT = "#FDE5CC"  # behind what is meant, whose frame is also thicker: not told by colour alone
WIDTH = 9.0  # inches, of every drawing

# the top row of the tower: what stands in a box, its width, the notebooks that build it
_ROW = (
    ("picture", "picture\n3 × 384 × 384", 1.1, ""),
    ("patches", "patches\n729 × 1152", 1.0, "07"),
    ("positions", "+ positions", 1.0, "07"),
    ("blocks", "27 blocks", 1.25, "03 to 06"),
    ("last norm", "norm", 0.8, "08"),
    ("pooling head", "pooling\nhead", 1.0, "08"),
    ("vector", "vector\n1152", 0.9, ""),
)
_BRANCHES = (
    (("norm", "06"), ("attention", "03, 04"), ("LayerScale", "05"), ("DropPath", "05")),
    (("norm", "06"), ("MLP", "06"), ("LayerScale", "05"), ("DropPath", "05")),
)
_BLOCK = ("blocks", "norm", "attention", "LayerScale", "DropPath", "MLP")
_LINEARS = ("attention", "MLP", "pooling head")
# here: the notebook, what it is about, and the parts to light
PLACES = {
    "machine": ("00", "the machine on which all of this runs", ()),
    "sampler": ("01", "the sampler behind the first weights of the marked parts", ("positions", *_LINEARS)),
    "weights": ("02", "the size of the first weights of the marked parts", ("patches", "positions", *_LINEARS)),
    "attention": ("03", "attention", ("attention",)),
    "timing": ("04", "what attention costs", ("attention",)),
    "layer scale": ("05", "LayerScale and DropPath", ("LayerScale", "DropPath")),
    "block": ("06", "the block", _BLOCK),
    "patches": ("07", "patches and positions", ("patches", "positions")),
    "tower": ("08", "the whole tower", ("patches", "positions", *_BLOCK, "last norm", "pooling head")),
}  # fmt: skip


def draw_tower(here: str) -> tuple[Figure, str]:
    """Return a drawing of the image tower with one block opened, and its description.

    Args:
        here: what to mark: machine, sampler, weights, attention, timing, layer scale, block, patches or tower.

    Raises:
        ValueError: ``here`` is none of these.
    """
    number, about, lit = PLACES[one_of("here", here, PLACES)]
    fig, ax = _canvas(3.7)
    _text(ax, 0.1, 3.52, f"You are here, notebook {number}: {about}", size=10, ha="left")
    x, edges = 0.1, {}
    for name, words, width, built in _ROW:
        _box(ax, x, 2.45, width, 0.5, words, name in lit)
        _text(ax, x + width / 2, 3.1, built and f"built in {built}", colour=GREY)
        edges[name] = x, x + width
        x += width + 0.29
    for (_, left), (right, _) in zip(list(edges.values())[:-1], list(edges.values())[1:], strict=True):  # fmt: skip
        _arrow(ax, (left, 2.7), (right, 2.7))
    _box(ax, 0.1, 0.1, 8.8, 1.95, "", False, face="0.97")
    for corner, end in zip(edges["blocks"], (0.1, 8.9), strict=True):
        ax.plot([corner, end], [2.45, 2.05], ":", color=GREY, linewidth=1)
    _text(ax, 0.25, 1.86, "one of the 27 blocks", ha="left")
    _text(ax, 6.6, 1.7, "residual stream: B × 729 × 1152", colour=GREY)
    _arrow(ax, (0.2, 1.5), (8.85, 1.5), width=2.5)
    for start, branch in zip((0.58, 4.86), _BRANCHES, strict=True):
        _line(ax, [(start - 0.2, 1.5), (start - 0.2, 0.75)])
        left = start - 0.2
        for k, (name, built) in enumerate(branch):
            at = start + 0.95 * k
            _arrow(ax, (left, 0.75), (at, 0.75))
            _box(ax, at, 0.53, 0.83, 0.44, name, name in lit)
            _text(ax, at + 0.415, 0.35, built, colour=GREY)
            left = at + 0.83
        _line(ax, [(left, 0.75), (left + 0.13, 0.75)])
        _arrow(ax, (left + 0.13, 0.75), (left + 0.13, 1.4))
        _plus(ax, left + 0.13, 1.5)
    marked = ", ".join(lit) or "nothing"
    return fig, (
        "SigLIP's image tower from left to right: picture, patches, positions, 27 blocks, norm, pooling head, vector. "
        "Below it one block: norm, attention, LayerScale and DropPath, added to the residual stream; then norm, MLP, "
        f"LayerScale and DropPath, added again. Marked for notebook {number}: {marked}."
    )


def draw_idea(name: str) -> tuple[Figure, str]:
    """Return a drawing of how numbers move, and its description.

    Args:
        name: ``heads``, the split of (B, N, D) into heads; ``packed qkv``, where q, k and v of one Linear lie in
            memory; ``tiled softmax``, a softmax over keys that come in blocks; ``residual stream``, the sum of the
            input and the branches.

    Raises:
        ValueError: ``name`` is none of these.
    """
    return _IDEAS[one_of("name", name, _IDEAS)]()


def _heads() -> tuple[Figure, str]:
    rows, heads, dim, cell = 5, 3, 4, 0.17
    fig, ax = _canvas(3.3)
    top, token = 2.3, 2

    def cells(x: float, y: float, head: int) -> None:
        _grid(ax, x, y, rows, dim, cell, COLOURS[head], row=token)

    _text(ax, 1.55, 3.05, "x: (B, N, D)", size=10)
    _text(ax, 4.55, 3.05, "(B, N, heads, head_dim)", size=10)
    _text(ax, 7.6, 3.05, "(B, heads, N, head_dim)", size=10)
    for head in range(heads):
        cells(0.53 + head * dim * cell, top, head)
        cells(3.33 + head * (dim * cell + 0.2), top, head)
        y = 2.84 - head * 0.94
        cells(7.3, y, head)
        _text(ax, 3.33 + head * (dim * cell + 0.2) + dim * cell / 2, top + 0.15, f"head {head}")
        _text(ax, 8.15, y - rows * cell / 2, f"head {head}", ha="left")
    _text(ax, 0.4, top - rows * cell / 2, "N tokens", rotation=90)
    _text(ax, 1.55, top + 0.15, "D = heads · head_dim")
    _arrow(ax, (2.7, 1.9), (3.2, 1.9))
    _text(ax, 2.95, 1.1, "unflatten:\ncut the\nchannels")
    _arrow(ax, (6.1, 1.9), (7.1, 1.9))
    _text(ax, 6.45, 1.1, "transpose:\na matrix\nfor each head")
    _text(ax, 0.3, 0.35, "Framed: one token. Every head gets a slice of its channels,\nand all N tokens. "
          "SO400M: D = 1152 is 16 heads of 72.", ha="left")  # fmt: skip
    return fig, (
        "One matrix of tokens by channels, its channels in three colours, is cut between the colours into three heads, "
        "then the heads are put one below the other: each has all tokens and a third of the channels. "
        "Framed: one token, which has a row in every head."
    )


def _packed_qkv() -> tuple[Figure, str]:
    heads, dim, cell, left = 3, 4, 0.2, 0.95
    width, tops = heads * dim * cell, (2.35, 1.98, 1.61)
    fig, ax = _canvas(3.4)
    _text(ax, left, 3.2, "what one Linear writes, address by address: q, k and v of a token, then of the next token",
          size=10, ha="left")  # fmt: skip
    for group, letter in enumerate("qkv"):
        start = left + group * width
        _text(ax, start + width / 2, 2.82, letter, size=10)
        for head in range(heads):
            at = start + head * dim * cell
            _text(ax, at + dim * cell / 2, 2.55, f"head {head}")
            for token, y in enumerate(tops):
                mine = group == 0 and head == 1
                alpha = 0.85 if mine else (0.35, 0.2, 0.35)[head]
                _grid(ax, at, y, 1, dim, cell, COLOURS[group], alpha, row=0 if mine else None)
                if group == head == 0:
                    _text(ax, left - 0.1, y - cell / 2, f"token {token}", ha="right")
    for y, end, words in (
        (1.2, dim * cell, "head_dim = 72: to the next head"),
        (0.9, width, "D = 1152: from q to k"),
        (0.6, 3 * width, "3D = 3456: to the next token"),
    ):
        ax.annotate("", (left, y), (left + end, y), arrowprops={"arrowstyle": "<->", "color": INK})
        over = end > 2 * width
        _text(ax, left + 0.1 if over else left + end + 0.1, y - 0.14 if over else y, words, ha="left")  # fmt: skip
    _text(ax, left, 0.15, "Framed: q of head 1, a view with stride 3D from token to token and 1 from channel to "
          "channel; nothing is copied.", ha="left")  # fmt: skip
    return fig, (
        "Memory as one row for each token: q, k and v, each with its heads side by side. q of one head is a piece of "
        "each row. Distances: 72 numbers to the next head, 1152 from q to k, 3456 to the next token."
    )


def _tiled_softmax() -> tuple[Figure, str]:
    scores = (2, 3, 1), (5, 4, 2), (3, 1, 4)
    m = list(accumulate((max(block) for block in scores), max))
    shrink = [0.0] + [math.exp(before - after) for before, after in pairwise(m)]
    part = [sum(math.exp(s - top) for s in block) for block, top in zip(scores, m, strict=True)]
    total = [0.0]
    for factor, new in zip(shrink, part, strict=True):
        total.append(total[-1] * factor + new)
    total = total[1:]
    fig, ax = _canvas(3.9)
    _text(ax, 0.1, 3.7, "scores of N queries and N keys", size=10, ha="left")
    for row in range(3):
        for k, (state, face, hatch) in enumerate(
            (("seen,\nforgotten", "0.93", "///"), ("now", LIT, None), ("to come", "white", None))
        ):
            here = row == 1
            style = {"face": face, "hatch": hatch} if here else {"face": "white"}
            _box(ax, 0.4 + 0.85 * k, 2.6 - 0.8 * row, 0.8, 0.75, "", here and k == 1, **style)
            if here:
                _text(ax, 0.8 + 0.85 * k, 2.6 - 0.8 * row + 0.375, state, behind=face)
    _text(ax, 0.22, 2.18, "a block of queries", rotation=90)
    _text(ax, 1.67, 0.8, "keys, block by block")
    _text(ax, 1.67, 0.35, "only one tile exists at a time")

    base, x0, step = 2.15, 5.05, 1.3
    _text(ax, 3.3, 3.7, "one query meets three blocks of keys", size=10, ha="left")
    for k, block in enumerate(scores):
        for i, s in enumerate(block):
            ax.bar(x0 + k * step + 0.3 * (i + 0.5), 0.22 * s, 0.24, base, color=COLOURS[5])
        # the largest score so far
        ax.plot(
            [x0 + k * step - 0.1, x0 + k * step + 1.0], [base + 0.22 * m[k]] * 2, color=COLOURS[1]
        )
        _text(ax, x0 + k * step + 0.45, base - 0.15, f"keys {3 * k} to {3 * k + 2}")
    _line(ax, [(x0 - 0.15, base), (x0 + 2 * step + 1.05, base)])
    _text(ax, 3.3, base + 0.4, "bars: scores s\nline: m, the largest so far", ha="left")
    rows = (
        ("m, the largest so far", [f"{v}" for v in m]),
        ("shrink = exp(m before − m)", [f"{v:.2f}" for v in shrink]),
        ("new = sum of exp(s − m)", [f"{v:.2f}" for v in part]),
        ("ℓ = shrink · ℓ + new", [f"{v:.2f}" for v in total]),
    )
    for i, (words, values) in enumerate(rows):
        y = 1.65 - 0.27 * i
        _text(ax, 3.3, y, words, ha="left")
        for k, value in enumerate(values):
            _text(ax, x0 + k * step + 0.45, y, value)
    _text(ax, 3.3, 0.35, f"The last ℓ, {total[-1]:.2f}, is the sum over all nine keys at once. The output is kept in "
          "the same way:\nshrunk by the same factor, then the new values are added; at the end it is divided by ℓ.",
          ha="left")  # fmt: skip
    return fig, (
        "Left: scores as three by three tiles; of one row of tiles the first is forgotten, the second in use, the "
        "third to come. Right: nine scores of one query in three blocks; the largest so far, m, rises from "
        f"{m[0]} to {m[1]} and stays. The sum ℓ goes {total[0]:.2f}, {total[1]:.2f}, {total[2]:.2f}: before each block "
        "is added, the old sum is shrunk by exp(m before − m)."
    )


def _residual_stream() -> tuple[Figure, str]:
    branches = "attention", "MLP", "attention", "MLP"
    colours = [COLOURS[i] for i in (0, 1, 2, 4, 3)]
    thick, base, step, first = 0.16, 0.75, 1.75, 0.95
    fig, ax = _canvas(3.3)
    starts = [0.5] + [first + step * k + 1.3 for k in range(4)]
    for k, (start, colour) in enumerate(zip(starts, colours, strict=True)):
        y = base + k * thick
        ax.fill_between([start, 8.05], y, y + thick, color=colour, linewidth=0)
    for k, name in enumerate(branches):
        left, top = first + step * k, base + (k + 1) * thick
        _box(ax, left, 2.1, 1.3, 0.45, f"norm, {name}", False)
        _arrow(ax, (left + 0.2, top), (left + 0.2, 2.1))
        ax.annotate("", (left + 1.2, top + 0.1), (left + 1.2, 2.1),
                    arrowprops={"arrowstyle": "-|>", "color": colours[k + 1], "linewidth": 2})  # fmt: skip
        if k == 0:
            _text(ax, left + 0.3, 1.5, "reads\nall of it", ha="left")
            _text(ax, left + 1.3, 1.72, "adds", ha="left")
    _text(ax, 0.25, base + thick / 2, "x")
    _text(ax, 8.15, base + 2.5 * thick, "x + four\nbranches", ha="left")
    for k in range(2):
        ends = first + 2 * step * k - 0.2, first + 2 * step * (k + 1) - 0.25
        _line(ax, [(ends[0], 2.7), (ends[0], 2.78), (ends[1], 2.78), (ends[1], 2.7)])
        _text(ax, sum(ends) / 2, 2.9, f"block {k}")
    _text(ax, 0.1, 3.15, "the residual stream is a sum: its input stays in it, and each branch adds a part of its own",
          size=10, ha="left")  # fmt: skip
    _text(ax, 0.5, 0.4, "LayerScale sets how much a branch adds: with factors of 1e-5 almost nothing at the start. "
          "DropPath leaves a part out.", ha="left")  # fmt: skip
    return fig, (
        "A band that starts as the input x and gets one more stripe from each branch: attention and MLP of block 0, "
        "then of block 1. Each branch reads the whole band through a norm. At the right the band is x plus "
        "four branches."
    )


_IDEAS = {
    "heads": _heads,
    "packed qkv": _packed_qkv,
    "tiled softmax": _tiled_softmax,
    "residual stream": _residual_stream,
}


def _canvas(height: float) -> tuple[Figure, Axes]:
    """Return a white figure whose axes fill it and count in inches, without ticks and frame."""
    fig, axes = figure(width=WIDTH, height=height)
    ax = axes[0, 0]
    fig.set_layout_engine("none")
    fig.set_facecolor("white")  # opaque: a dark page would hide black lines
    ax.set_position([0, 0, 1, 1])
    ax.set(xlim=(0, WIDTH), ylim=(0, height))
    ax.set_axis_off()
    return fig, ax


def _text(
    ax: Axes,
    x: float,
    y: float,
    words: str,
    *,
    size: float = 8.5,
    colour: str = INK,
    ha: str = "center",
    rotation: float = 0,
    behind: str | None = None,
) -> None:
    """Write ``words`` at a place, on a patch of the colour ``behind`` if there is one."""
    box = behind and {"facecolor": behind, "edgecolor": "none", "pad": 1}
    style = {"fontsize": size, "color": colour, "ha": ha, "va": "center", "rotation": rotation}
    ax.text(x, y, words, bbox=box, **style)


def _box(
    ax: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    words: str,
    lit: bool,
    *,
    face: str = "white",
    hatch: str | None = None,
) -> None:
    """Draw a box with its lower left corner at (x, y) and words in its middle."""
    from matplotlib.patches import Rectangle

    edge, line = (COLOURS[1], 2.5) if lit else (GREY, 1)
    style = {"facecolor": LIT if lit else face, "edgecolor": edge, "linewidth": line}
    ax.add_patch(Rectangle((x, y), width, height, hatch=hatch, **style))
    _text(ax, x + width / 2, y + height / 2, words)


def _grid(
    ax: Axes,
    x: float,
    y: float,
    rows: int,
    columns: int,
    cell: float,
    colour: str,
    alpha: float = 0.35,
    row: int | None = None,
) -> None:
    """Draw cells below and right of (x, y), the row ``row`` framed."""
    from matplotlib.patches import Rectangle

    for i in range(rows):
        for j in range(columns):
            at = x + j * cell, y - (i + 1) * cell
            ax.add_patch(Rectangle(at, cell, cell, facecolor=colour, alpha=alpha, linewidth=0))
            ax.add_patch(Rectangle(at, cell, cell, fill=False, edgecolor="white", linewidth=1))
    if row is not None:
        at, width = (x, y - (row + 1) * cell), columns * cell
        ax.add_patch(Rectangle(at, width, cell, fill=False, edgecolor=INK, linewidth=1.8, zorder=3))


def _arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], width: float = 1.2
) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=style)


def _line(ax: Axes, points: list[tuple[float, float]]) -> None:
    ax.plot(*zip(*points, strict=True), color=INK, linewidth=1.2)


def _plus(ax: Axes, x: float, y: float) -> None:
    ax.plot(x, y, "o", markersize=14, color="white", markeredgecolor=INK, zorder=4)
    ax.plot(x, y, "+", markersize=9, color=INK, markeredgewidth=1.5, zorder=5)
