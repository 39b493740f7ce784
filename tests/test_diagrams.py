"""Drawings of ideas: which there are, what their descriptions say, and that no words lie on others."""

import io
import itertools
import math
import re

import matplotlib as mpl
import numpy as np
import pytest
import torch
from notebook_files import PATHS
from PIL import Image

from siglip_lib import COLOURS, draw_idea, draw_tower
from siglip_lib.classroom.diagrams import PLACES

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import to_hex

IDEAS = ("heads", "packed qkv", "tiled softmax", "residual stream")
DRAWINGS = [(draw_tower, place) for place in PLACES] + [(draw_idea, idea) for idea in IDEAS]
drawings = pytest.mark.parametrize(("draw", "name"), DRAWINGS)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def words(fig) -> list:
    return [text for text in fig.axes[0].texts if text.get_text()]


def written(fig) -> str:
    return "\n".join(text.get_text() for text in words(fig))


@drawings
def test_no_words_lie_on_others_or_beyond_the_edge(draw, name):
    fig, _ = draw(name)
    renderer = fig.canvas.get_renderer()
    boxes = {text: text.get_window_extent(renderer) for text in words(fig)}
    assert len(boxes) > 10
    width, height = fig.canvas.get_width_height()
    for text, box in boxes.items():
        assert 0 <= box.x0 < box.x1 <= width, text
        assert 0 <= box.y0 < box.y1 <= height, text
    for (a, first), (b, second) in itertools.combinations(boxes.items(), 2):
        assert not first.overlaps(second), f"{a.get_text()!r} lies on {b.get_text()!r}"


def corners(fig) -> np.ndarray:
    """Every patch's least and largest x and y in pixels, (n, 2, 2)."""
    found = [patch.get_window_extent() for patch in fig.axes[0].patches]
    return np.array([box.get_points() for box in found])


@drawings
def test_nothing_is_cut_off(draw, name):
    fig, _ = draw(name)
    fig.canvas.draw()
    assert (corners(fig) >= -0.5).all()
    assert (corners(fig) <= np.array(fig.canvas.get_width_height()) + 0.5).all()


@drawings
def test_it_is_black_on_opaque_white_on_dark_pages_too(draw, name):
    with plt.style.context("dark_background"):
        fig, _ = draw(name)
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png")
        with Image.open(buffer) as image:
            pixels = np.asarray(image.convert("RGBA"))
    assert (pixels[..., 3] == 255).all()
    assert (pixels[0, 0] == 255).all()
    assert (pixels[..., :3] == 255).all(-1).mean() > 0.3
    assert (pixels[..., :3] < 60).all(-1).any()


@drawings
def test_the_same_twice(draw, name):
    (first, alt), (second, again) = draw(name), draw(name)
    assert alt == again
    found = []
    for fig in (first, second):
        fig.canvas.draw()
        found.append(np.asarray(fig.canvas.buffer_rgba()))
    assert np.array_equal(*found)


@pytest.mark.parametrize(("draw", "argument", "allowed"), [
    (draw_tower, "here", PLACES), (draw_idea, "name", IDEAS),
])  # fmt: skip
def test_unknown_names(draw, argument, allowed):
    message = f"{argument}='cat' is unknown; allowed are {', '.join(map(repr, allowed))}"
    with pytest.raises(ValueError, match=re.escape(message)):
        draw("cat")
    assert plt.get_fignums() == []


def marked(fig) -> list[str]:
    """The words in boxes with a thick frame."""
    fig.canvas.draw()
    lit = [p for p in fig.axes[0].patches if to_hex(p.get_edgecolor()) == COLOURS[1].lower()]
    return [
        text.get_text().replace("\n", " ")
        for patch in lit
        for text in words(fig)
        if patch.get_window_extent().contains(*text.get_window_extent().get_points().mean(0))
    ]


@pytest.mark.parametrize(
    ("here", "parts"),
    [
        ("machine", []),
        ("attention", ["attention"]),
        ("layer scale", ["LayerScale", "DropPath"] * 2),
        ("patches", ["patches 729 × 1152", "+ positions"]),
        ("weights", ["patches 729 × 1152", "+ positions", "pooling head", "attention", "MLP"]),
    ],
)
def test_the_tower_marks_a_notebooks_part(here, parts):
    fig, alt = draw_tower(here)
    assert marked(fig) == parts
    number = PLACES[here][0]
    assert f"You are here, notebook {number}: " in written(fig)
    names = dict.fromkeys(part.removeprefix("+ ").removesuffix(" 729 × 1152") for part in parts)
    end = f"Marked for notebook {number}: {', '.join(sorted(names, key=alt.rindex)) or 'nothing'}."
    assert alt.endswith(end)
    for part in ("patches", "positions", "27 blocks", "LayerScale", "DropPath", "MLP", "pooling"):
        assert part in alt


def test_the_tower_has_a_place_for_each_of_its_notebooks():
    assert [number for number, *_ in PLACES.values()] == [path.stem[:2] for path in PATHS[:9]]


def test_the_description_of_heads_names_the_shapes():
    fig, alt = draw_idea("heads")
    for shape in ("(B, N, D)", "(B, N, heads, head_dim)", "(B, heads, N, head_dim)"):
        assert shape in written(fig)
    assert "three heads" in alt


def test_packed_qkv_gives_the_strides_of_so400m():
    fig, alt = draw_idea("packed qkv")
    packed = torch.empty(1, 729, 3 * 1152, device="meta").unflatten(-1, (3, 16, 72))
    parts = packed.permute(2, 0, 3, 1, 4)
    part, _, head, token, channel = parts.stride()
    assert channel == 1
    for number in (part, head, token):
        assert str(number) in written(fig)
        assert str(number) in alt


def test_tiled_softmax_is_the_softmax_of_its_bars():
    fig, alt = draw_idea("tiled softmax")
    bars = [p for p in fig.axes[0].patches if to_hex(p.get_facecolor()) == COLOURS[5].lower()]
    heights = np.array([bar.get_height() for bar in bars])
    scores = heights / heights.min()  # the least is 1
    assert scores == pytest.approx(scores.round())
    total = np.exp(scores - scores.max()).sum()
    assert f"The last ℓ, {total:.2f}, is the sum over all nine keys" in written(fig)
    first = np.exp(scores[:3] - scores[:3].max()).sum()
    assert f"The sum ℓ goes {first:.2f}, " in alt
    assert f"{math.exp(scores[:3].max() - scores.max()):.2f}" in written(fig)


def test_the_stream_gets_a_stripe_from_each_branch():
    fig, alt = draw_idea("residual stream")
    stripes = fig.axes[0].collections
    assert len(stripes) == 5
    starts = [stripe.get_paths()[0].vertices[:, 0].min() for stripe in stripes]
    assert starts == sorted(starts)
    assert "x plus four branches" in alt
