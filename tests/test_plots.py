"""Pictures: what is drawn, and that none goes without a description."""

import io
import re

import IPython.display
import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

from siglip_lib import COLOURS, figure, picture, plot_histogram, show, show_attention
from siglip_lib.classroom.plots import KERNEL_COLOURS, few_colours, plot_timeline
from siglip_lib.classroom.schedule import Span

mpl.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture
def displayed(monkeypatch):
    found = []
    monkeypatch.setattr(
        IPython.display, "display", lambda data, **options: found.append((data, options))
    )
    return found


def test_figure():
    fig, axes = figure(2, 3, width=5, height=4)
    assert axes.shape == (2, 3)
    assert fig.get_size_inches().tolist() == [5, 4]
    lines = [axes[0, 0].plot([0, i])[0].get_color() for i in range(3)]
    assert lines == list(COLOURS[:3])
    assert figure()[1].shape == (1, 1)


def test_attention_kernels_have_a_colour_each_whoever_runs_them():
    kernels = [
        {"eager"},
        {"SDPA mem-eff", "xformers cutlass"},
        {"xformers", "SDPA flash", "flash-attn 2"},
        {"SDPA cuDNN"},
        {"triton"},
        {"hopper"},
        {"flash-attn 3"},
        {"flash-attn 4"},
    ]
    assert KERNEL_COLOURS.keys() == set().union(*kernels)
    colours = [{KERNEL_COLOURS[name] for name in names} for names in kernels]
    assert all(len(found) == 1 for found in colours)
    assert len(set().union(*colours)) == len(kernels)
    assert set().union(*colours) > set(COLOURS)


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_show_refuses_a_picture_without_description(alt, displayed):
    fig, _ = figure()
    with pytest.raises(ValueError, match="alt is empty; say what the picture shows"):
        show(fig, alt)
    assert displayed == []


def test_show(displayed):
    fig, _ = figure()
    show(fig, "an empty plot")
    [(data, options)] = displayed
    assert data["image/png"].startswith(b"\x89PNG")
    assert data["text/plain"] == "an empty plot"
    assert options == {"raw": True, "metadata": {"image/png": {"alt": "an empty plot"}}}
    assert plt.get_fignums() == []  # else a notebook draws it a second time


def test_show_a_photograph(displayed):
    fig, axes = figure()
    axes[0, 0].imshow(picture("cat"))
    show(fig, "a cat", photo=True)
    [(data, options)] = displayed
    assert data["image/jpeg"].startswith(b"\xff\xd8")
    assert "image/png" not in data
    assert options["metadata"] == {"image/jpeg": {"alt": "a cat"}}


@pytest.mark.parametrize("name", ["cat", "coffee", "astronaut"])
def test_picture(name):
    image = picture(name, 96)
    assert image.mode == "RGB"
    assert image.size == (96, 96)
    assert np.asarray(image).std() > 20


def test_pictures_are_384_pixels_wide_unless_told_and_differ():
    assert picture("cat").size == (384, 384)
    assert picture("cat", 32).tobytes() != picture("coffee", 32).tobytes()


def test_unknown_picture():
    with pytest.raises(
        ValueError, match="name='dog' is unknown; allowed are 'cat', 'coffee', 'astronaut'"
    ):
        picture("dog")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_histogram_is_a_density(dtype):
    values = torch.rand(100, 10).to(dtype).requires_grad_()
    edges = np.array([-0.5, 0, 0.1, 0.5, 1.5])  # of different widths
    ax = figure()[1][0, 0]
    density = plot_histogram(ax, values, edges, "uniform", linewidth=1)
    assert (density * np.diff(edges)).sum() == pytest.approx(1)
    assert density[1:3] == pytest.approx([1, 1], abs=0.2)
    [steps] = ax.patches
    assert steps.get_data().values.tolist() == density.tolist()
    assert steps.get_label() == "uniform"
    assert steps.get_linewidth() == 1


def test_histogram_counts_values_outside_the_edges_as_missing():
    ax = figure()[1][0, 0]
    density = plot_histogram(ax, torch.tensor([0.5, 0.5, 0.5, 7.0]), np.array([0.0, 2.0]), "")
    assert density.tolist() == [0.75 / 2]


def test_histogram_counts_what_lies_beyond_the_first_chunk():
    values = torch.zeros(2**24 + 2**23)
    values[2**24 :] = 1.5
    density = plot_histogram(figure()[1][0, 0], values, np.array([0.0, 1.0, 2.0]), "")
    assert density == pytest.approx([2 / 3, 1 / 3])


def test_attention_over_a_picture():
    ax = figure()[1][0, 0]
    weights = torch.arange(9.0, requires_grad=True)
    show_attention(ax, picture("cat", 90), weights, token=5, title="cat")
    assert ax.images[1].get_array().tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert [image.get_extent() for image in ax.images] == [[0, 90, 90, 0]] * 2
    [mark] = ax.lines
    assert mark.get_xydata().tolist() == [[75, 45]]  # the middle of row 1, column 2
    assert ax.get_title(loc="left") == "cat"


def test_maps_that_are_compared_share_a_scale():
    fig, axes = figure(1, 2)
    maps = torch.arange(1.0, 5.0), torch.full((4,), 7.0)
    scale = {"vmin": 1, "vmax": 100, "norm": "log"}
    drawn = [
        show_attention(ax, picture("cat", 8), m, **scale)
        for ax, m in zip(axes[0], maps, strict=True)
    ]
    assert [image.get_clim() for image in drawn] == [(1, 100)] * 2
    assert float(drawn[0].norm(10.0)) == pytest.approx(0.5)
    assert fig.colorbar(drawn[0], ax=axes).ax.get_ylim() == pytest.approx((1, 100))


def test_attention_without_a_token_marks_none():
    ax = figure()[1][0, 0]
    show_attention(ax, picture("cat", 8), torch.ones(4))
    assert len(ax.lines) == 0


def test_attention_on_a_grid_that_is_no_square():
    ax = figure()[1][0, 0]
    weights = torch.arange(36.0).view(4, 9)
    show_attention(ax, picture("cat", 90).resize((90, 40)), weights, token=11)
    assert ax.images[1].get_array().tolist() == weights.tolist()
    assert ax.lines[0].get_xydata().tolist() == [[25, 15]]  # the middle of row 1, column 2


@pytest.mark.parametrize(
    ("weights", "size", "token", "message"),
    [
        (torch.ones(8), (8, 8), None, "weights has 8 entries; it must be a square number"),
        (torch.ones(36), (90, 40), None, "the picture of 90 x 40 pixels a square, or the weights"),
        (
            torch.ones(1, 6, 6),
            (8, 8),
            None,
            "weights has shape (1, 6, 6); it must be (N,) or (rows, colu",
        ),
        (torch.ones(0), (8, 8), None, "weights has shape (0,); it must be (N,) or (rows, columns)"),
        (torch.ones(4), (8, 8), 4, "token=4 must lie in 0 to 3"),
        (torch.ones(2, 2), (8, 8), -1, "token=-1 must lie in 0 to 3"),
    ],
)
def test_attention_whose_grid_is_not_known(weights, size, token, message):
    ax = figure()[1][0, 0]
    with pytest.raises(ValueError, match=re.escape(message)):
        show_attention(ax, picture("cat", 8).resize(size), weights, token)
    assert not ax.images


def test_few_colours_keep_a_picture():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, 20:] = (200, 30, 10)
    pixels[::2, ::3, 2] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    with Image.open(io.BytesIO(few_colours(buffer))) as small:
        assert small.mode == "P"
        assert (np.asarray(small.convert("RGB")) == pixels).all()


def test_plot_timeline():
    spans = [Span("a", "copy", 0, 4), Span("b", "product", 4, 6), Span("b", "product", 9, 12)]
    axes = figure()[1][0, 0]
    plot_timeline(axes, spans, until=9)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"]
    boxes = [path.get_extents() for bars in axes.collections for path in bars.get_paths()]
    assert [(box.x0, box.x1) for box in boxes] == [(0, 4), (4, 6)]
    assert [round(box.y0) for box in boxes] == [0, 1]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["copy", "product", "exponential"]
    with pytest.raises(ValueError, match="no span begins before cycle 0"):
        plot_timeline(axes, spans, until=0)
