"""Scenes with known boxes, and the game on them: made of plain rectangles, so that every number can be told."""

import math
import re

import pytest
import torch
from scipy import stats

from siglip_lib.evaluate.pointing_game import chance, make_scenes, mix_patches, pointing
from siglip_lib.evaluate.retrieval import Share


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rectangles(concepts: int, each: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures with one opaque rectangle, whose green tells the concept and whose place tells the picture."""
    concept = torch.arange(concepts).repeat(each)
    pictures = torch.zeros(len(concept), 4, 64, 64, dtype=torch.uint8)
    for i, c in enumerate(concept.tolist()):
        x0, y0, x1, y1 = place(i)
        pictures[i, :, y0:y1, x0:x1] = torch.tensor([200, 10 * c, 0, 255])[:, None, None]
    return pictures, concept


def place(i: int) -> tuple[int, int, int, int]:
    return 2 * (i % 8), 6 + 2 * (i // 8), 40 + 2 * (i % 8), 64 - 4 * (i % 3)


def test_boxes_colours_and_background():
    pictures, concept = rectangles(9)
    scenes = make_scenes(pictures, concept, 50, grid=2, size=128, generator=generator())
    assert scenes.pixels.shape == (50, 3, 128, 128)
    assert scenes.boxes.shape == (50, 4, 4)
    assert scenes.concept.shape == (50, 4)
    for pixels, boxes, shown in zip(scenes.pixels, scenes.boxes, scenes.concept, strict=True):
        expected = torch.ones(3, 128, 128)
        for cell, (box, c) in enumerate(zip(boxes.tolist(), shown.tolist(), strict=True)):
            x0, y0, x1, y1 = place(c)
            dx, dy = 64 * (cell % 2), 64 * (cell // 2)
            assert box == [x0 + dx, y0 + dy, x1 + dx, y1 + dy]
            colour = torch.tensor([200, 10 * c, 0]) / 255 * 2 - 1
            expected[:, y0 + dy : y1 + dy, x0 + dx : x1 + dx] = colour[:, None, None]
        torch.testing.assert_close(pixels, expected)


def test_pictures_are_resized_into_their_cells():
    pictures, concept = rectangles(9)
    whole = make_scenes(pictures, concept, 20, grid=3, size=192, generator=generator())
    half = make_scenes(pictures, concept, 20, grid=3, size=96, generator=generator())
    assert torch.equal(half.concept, whole.concept)
    # edges stand at even pixels; the filter of antialiasing reaches one further
    grown = whole.boxes / 2 + torch.tensor([-1, -1, 1, 1])
    low = 32 * torch.tensor([[c, r, c, r] for r in range(3) for c in range(3)])
    expected = torch.maximum(torch.minimum(grown, low + 32), low)
    assert torch.equal(half.boxes, expected)
    inner = half.pixels[0, :, 16, 16]
    torch.testing.assert_close(inner, whole.pixels[0, :, 32, 32])


def test_what_is_transparent_lends_no_colour_to_edges():
    pictures = torch.zeros(1, 4, 64, 64, dtype=torch.uint8)
    pictures[0, 0] = 0  # black where transparent
    pictures[0, :, 11:40, 11:40] = torch.tensor([255, 0, 0, 255])[:, None, None]
    scenes = make_scenes(pictures, torch.zeros(1).long(), 1, grid=1, size=24, generator=generator())
    assert (scenes.pixels[0, 0] > 1 - 1e-5).all()  # red and white both have all red
    assert ((scenes.pixels[0, 1] > -0.9) & (scenes.pixels[0, 1] < 0.9)).any()


def test_half_transparent_is_mixed_with_white():
    pictures = torch.zeros(1, 4, 64, 64, dtype=torch.uint8)
    pictures[0, :, 8:16, 8:16] = torch.tensor([0, 0, 0, 51])[:, None, None]
    scenes = make_scenes(pictures, torch.zeros(1).long(), 1, grid=1, size=64, generator=generator())
    torch.testing.assert_close(scenes.pixels[0, :, 12, 12], torch.full((3,), 0.6))
    assert scenes.boxes.tolist() == [[[8, 8, 16, 16]]]


def test_concepts_differ_and_each_is_as_likely_as_another():
    pictures, concept = rectangles(6)
    many = torch.cat((pictures, pictures[:1].repeat(30, 1, 1, 1)))  # one concept has 31 pictures
    concept = torch.cat((concept, concept[:1].repeat(30)))
    many = many[:, :, ::4, ::4]
    shown = make_scenes(many, concept, 900, size=16, generator=generator()).concept
    assert all(len(set(row)) == 4 for row in shown.tolist())
    for cell in shown.T:
        assert stats.chisquare(cell.bincount(minlength=6)).pvalue > 1e-3


def test_each_picture_of_a_concept_is_as_likely_as_another():
    pictures, concept = rectangles(2, each=5)
    order = torch.randperm(10)
    scenes = make_scenes(
        pictures[order], concept[order] + 7, 600, grid=1, size=64, generator=generator()
    )
    found = [tuple(box) for box in scenes.boxes[:, 0].tolist()]
    places = [place(i) for i in range(10)]
    assert stats.chisquare([found.count(p) for p in places]).pvalue > 1e-3
    for box, c in zip(found, scenes.concept[:, 0].tolist(), strict=True):
        assert concept[places.index(box)] + 7 == c


def test_the_generator_alone_decides():
    pictures, concept = rectangles(8, each=3)
    first, second, other = (
        make_scenes(pictures, concept, 5, size=32, generator=generator(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.pixels, second.pixels)
    assert torch.equal(first.boxes, second.boxes)
    assert not torch.equal(first.concept, other.concept)


PICTURES, CONCEPT = rectangles(4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 0}, ValueError, "count=0 must be at least 1"),
        ({"grid": 0}, ValueError, "grid=0 must be at least 1"),
        ({"grid": 3, "size": 48}, ValueError, "concept holds 4 different ones; grid=3 needs 9"),
        ({"size": 63}, ValueError, "size=63 must be a multiple of grid=2"),
        (
            {"pictures": PICTURES.float()},
            TypeError,
            "pictures is torch.float32; it must be of uint8",
        ),
        ({"concept": CONCEPT.int()}, TypeError, "concept is torch.int32; it must be of int64"),
        (
            {"pictures": PICTURES[:, :3]},
            ValueError,
            "pictures has shape (4, 3, 64, 64); it must be (n, 4, H, W)",
        ),
        ({"concept": CONCEPT[:3]}, ValueError, "concept has shape (3,); it must be (4,)"),
        ({"pictures": PICTURES * 0}, ValueError, "pictures hold one without a visible pixel"),
    ],
)
def test_scenes_refuse(options, error, message):
    given = {"pictures": PICTURES, "concept": CONCEPT, "count": 2, "generator": generator()}
    with pytest.raises(error, match=re.escape(message)):
        make_scenes(**(given | options))


def one_hot(rows: int, columns: int) -> torch.Tensor:
    """Every map with a single highest cell, (rows * columns, rows, columns)."""
    return torch.eye(rows * columns).view(-1, rows, columns)


@pytest.mark.parametrize(
    ("box", "cells"),
    [
        ([0, 0, 10, 10], [0]),  # centres stand at 5, 15, 25 and 35
        ([5, 0, 15, 20], [0, 4]),  # x0 <= x < x1
        ([4.9, 5, 15.1, 15], [0, 1]),
        ([30, 20, 40, 30], [11]),
        ([6, 6, 14, 14], []),  # between the centres
        ([0, 0, 40, 30], list(range(12))),
    ],
)
def test_the_centre_of_the_highest_cell_must_lie_in_the_box(box, cells):
    for i, single in enumerate(one_hot(3, 4)):
        found = pointing(single[None], torch.tensor([box], dtype=torch.float32), (30, 40))
        assert found == Share(int(i in cells), 1)


def test_hits_are_counted_map_by_map():
    boxes = torch.tensor([[0, 0, 20, 20], [20, 0, 40, 20], [0, 20, 20, 40], [20, 20, 40, 40.0]])
    assert pointing(one_hot(2, 2), boxes, 40) == Share(4, 4)
    assert pointing(one_hot(2, 2).flip(0), boxes, 40) == Share(0, 4)
    assert pointing(one_hot(2, 2)[[0, 1, 3, 3]] - 5, boxes, 40) == Share(3, 4)


def test_a_constant_map_points_nowhere_wherever_the_box_is():
    boxes = torch.tensor([[0, 0, 20, 20], [20, 0, 40, 20], [0, 20, 20, 40], [20, 20, 40, 40.0]])
    assert pointing(torch.zeros(4, 5, 5), boxes, 40).hits == 0


def test_all_of_several_highest_cells_must_lie_in_the_box():
    tied = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    assert pointing(tied, torch.tensor([[0, 0, 20, 10.0]]), (10, 40)).hits == 1
    assert pointing(tied, torch.tensor([[0, 0, 10, 10.0]]), (10, 40)).hits == 0


@pytest.mark.parametrize("grid", [(3, 4), (7, 2), 8])
def test_chance_is_what_all_single_cells_reach(grid):
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    boxes = torch.tensor([[3, 2, 31, 17], [0, 0, 40, 30], [12, 4, 13, 29.0]])
    hits = sum(
        pointing(single.expand(3, -1, -1), boxes, (30, 40)).hits
        for single in one_hot(rows, columns)
    )
    assert chance(boxes, (30, 40), grid) == pytest.approx(hits / (3 * rows * columns))


GOOD = {"maps": torch.ones(2, 3, 4), "boxes": torch.tensor([[0, 0, 9, 9.0]] * 2), "size": (30, 40)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": torch.tensor([[[0.0, math.nan]], [[1.0, 0.0]]])}, "maps: 1 of 2 hold NaN"),
        ({"maps": torch.full((2, 3, 4), math.inf)}, "maps: 2 of 2 hold NaN or infinity"),
        ({"maps": torch.ones(2, 12)}, "maps has shape (2, 12); it must be (B, rows, columns)"),
        ({"maps": torch.ones(0, 3, 4)}, "maps has shape (0, 3, 4)"),
        ({"maps": torch.ones(3, 3, 4)}, "there are 2 boxes for 3 maps"),
        ({"boxes": torch.ones(2, 3)}, "boxes has shape (2, 3); it must be (B, 4)"),
        (
            {"boxes": torch.tensor([[0, 0, 9, 9], [5, 0, 5, 9.0]])},
            "boxes hold [5.0, 0.0, 5.0, 9.0]",
        ),
        ({"boxes": torch.tensor([[0, 0, 9, 31.0]] * 2)}, "inside 40 x 30 pixels"),
        ({"boxes": torch.tensor([[-1, 0, 9, 9.0]] * 2)}, "it must be x0 < x1 and y0 < y1 inside"),
        ({"boxes": torch.full((2, 4), math.nan)}, "boxes hold [nan, nan, nan, nan]"),
        ({"size": (0, 40)}, "size=0 must be at least 1"),
    ],
)
def test_pointing_refuses(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pointing(**(GOOD | options))


def test_chance_refuses():
    with pytest.raises(ValueError, match="grid=0 must be at least 1"):
        chance(GOOD["boxes"], 40, 0)
    with pytest.raises(ValueError, match="boxes has shape"):
        chance(torch.zeros(0, 4), 40, 8)


def test_rounding_decides_no_tie():
    maps = torch.zeros(2, 2, 2)
    maps[:, 0, 0], maps[0, 1, 1], maps[1, 1, 1] = 1.0, 1 - 1e-6, 0.99
    box = torch.tensor([[0.0, 0.0, 4.0, 4.0]]).expand(2, 4)
    assert [pointing(maps[i : i + 1] * 1e3 + 5e3, box[:1], 8).hits for i in (0, 1)] == [0, 1]


# --- controls: scenes off the cells, and patches of other scenes ---


def test_a_shift_moves_the_same_scene_and_keeps_what_is_whole():
    pictures, concept = rectangles(12)
    options = {"grid": 3, "size": 192}
    plain = make_scenes(pictures, concept, 20, **options, generator=generator())
    moved = make_scenes(pictures, concept, 20, **options, shift=24, generator=generator())
    assert torch.equal(moved.pixels[:, :, 24:, 24:], plain.pixels[:, :, :-24, :-24])
    assert torch.equal(moved.pixels[:, :, :24, 24:], plain.pixels[:, :, -24:, :-24])
    assert torch.equal(moved.pixels[:, :, 24:, :24], plain.pixels[:, :, :-24, -24:])
    whole = [0, 1, 3, 4]
    assert torch.equal(moved.boxes, plain.boxes[:, whole] + 24)
    assert torch.equal(moved.concept, plain.concept[:, whole])
    for pixels, boxes, shown in zip(moved.pixels, moved.boxes, moved.concept, strict=True):
        for (x0, y0, x1, y1), c in zip(boxes.int().tolist(), shown.tolist(), strict=True):
            green = pixels[1, y0:y1, x0:x1]
            torch.testing.assert_close(green, torch.full_like(green, 10 * c / 255 * 2 - 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": -1}, "shift=-1 must be at least 0"),
        ({"shift": 32}, "shift=32 must be below a cell's 32 pixels"),
        ({"shift": 1, "grid": 1}, "shift=1 must be below a cell's 64 pixels, and 0 where grid=1"),
    ],
)
def test_shifts_refuse(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_scenes(PICTURES, CONCEPT, 2, generator=generator(), **options)


def numbered(count: int) -> torch.Tensor:
    """Pictures of 3 x 4 patches, 8 by 4 pixels each, whose pixels are all different."""
    return torch.arange(count * 3 * 24 * 16, dtype=torch.float32).view(count, 3, 24, 16)


@pytest.mark.parametrize("count", [3, 7, 13, 40])
def test_every_patch_of_a_hybrid_is_of_another_picture_and_the_same_place(count):
    pixels = numbered(count)
    mixed = mix_patches(pixels, (8, 4), generator=generator())
    assert mixed.shape == pixels.shape
    sources = []
    for y in range(0, 24, 8):
        for x in range(0, 16, 4):
            there = (slice(None), slice(None), slice(y, y + 8), slice(x, x + 4))
            same = (mixed[there][:, None] == pixels[there]).flatten(2).all(2)  # (hybrid, picture)
            assert (same.sum(0) == 1).all()
            assert (same.sum(1) == 1).all()
            assert not same.diag().any()
            sources.append(same.int().argmax(1))
    for row in torch.stack(sources, 1):
        times = row.bincount(minlength=count)
        assert times.max() == -(-12 // (count - 1))  # as evenly as can be
    assert torch.equal(mix_patches(pixels, (8, 4), generator=generator()), mixed)
    if count > 3:
        assert not torch.equal(mix_patches(pixels, (8, 4), generator=generator(1)), mixed)


@pytest.mark.parametrize(
    ("pixels", "patch", "message"),
    [
        (numbered(2), 8, "pixels holds 2 pictures; hybrids need at least 3"),
        (numbered(3), 7, "patch_size=7 must divide 24 x 16 pixels"),
        (numbered(3), (8, 5), "patch_size=(8, 5) must divide 24 x 16 pixels"),
        (numbered(3)[0], 8, "pixels has shape (3, 24, 16); it must be (B, C, H, W)"),
    ],
)
def test_hybrids_refuse(pixels, patch, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        mix_patches(pixels, patch, generator=generator())
