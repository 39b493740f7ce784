"""The pointing game: does a map's highest place lie on the object that the text names?

A scene is a grid of pictures of different concepts on white, so every object's box is known and the others compete.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_lib.base.checks import NUMBERS, check_tensor, pair, positive_int
from siglip_lib.base.checks import count as natural
from siglip_lib.data.augmentation import compose
from siglip_lib.data.emoji64 import unique_batches
from siglip_lib.evaluate.retrieval import Share

# What 8 bits can show: a fainter pixel is white on white.
VISIBLE = 0.5 / 255


@dataclass(frozen=True)
class Scenes:
    """Pictures of several objects.

    Attributes:
        pixels: (count, 3, size, size) float32 in [-1, 1], on white.
        boxes: (count, objects, 4) float32: x0, y0, x1, y1 in pixels, x0 <= x < x1, the smallest around what is visible.
        concept: (count, objects) int64, which concept each box holds.
    """

    pixels: Tensor
    boxes: Tensor
    concept: Tensor


def make_scenes(
    pictures: Tensor,
    concept: Tensor,
    count: int,
    *,
    grid: int = 2,
    size: int = 64,
    shift: int = 0,
    generator: torch.Generator,
) -> Scenes:
    """Put pictures of different concepts into the cells of a grid, each concept and each picture of it equally likely.

    Args:
        pictures: (n, 4, height, width) uint8, RGBA, each with something visible.
        concept: (n,) int64, what each picture shows; at least ``grid * grid`` different ones.
        count: how many scenes.
        grid: cells along a side.
        size: pixels along a side of a scene; a multiple of ``grid``. Pictures are resized to their cell with
            antialiasing.
        shift: pixels by which the whole scene moves right and down, below a cell's; what leaves at one side comes in at
            the other. So objects lie where no cell was, among as many others as before.
        generator: where the draws come from, on the CPU; the same state gives the same scenes.

    Returns:
        Scenes of ``grid * grid`` objects, row by row, on the pictures' device. A shift cuts those of the last row and
        column in two: boxes and concepts are then of the ``(grid - 1) ** 2`` others.

    Raises:
        TypeError: pictures that are not uint8, concepts that are not int64.
        ValueError: a wrong shape, too few concepts, a size that the grid does not divide, an invisible picture, a shift
            that is too long or leaves no object whole.
    """
    grid, size = positive_int("grid", grid), positive_int("size", size)
    count = positive_int("count", count)
    objects = grid**2
    if size % grid:
        raise ValueError(f"size={size} must be a multiple of grid={grid}")
    cell, shift = size // grid, natural("shift", shift)
    whole = grid - (shift > 0)  # along a side, objects that no border cuts
    if shift >= cell or not whole:
        raise ValueError(
            f"shift={shift} must be below a cell's {cell} pixels, and 0 where grid=1; grid={grid}"
        )
    check_tensor("pictures", pictures, ("n", 4, "H", "W"), dtypes=(torch.uint8,))
    check_tensor("concept", concept, (len(pictures),), dtypes=(torch.int64,))
    different = len(concept.unique())
    if different < objects:
        raise ValueError(f"concept holds {different} different ones; grid={grid} needs {objects}")

    index = unique_batches(concept.cpu(), objects, generator, steps=count).to(pictures.device)
    rgba = pictures[index.flatten()]
    # On white before resizing: the colour of what is transparent means nothing and must not be mixed in.
    layers = torch.cat((compose(rgba), rgba[:, 3:] / 255), dim=1)
    layers = F.interpolate(layers, size=(cell, cell), mode="bilinear", antialias=True)
    boxes = _boxes(layers[:, 3] >= VISIBLE).view(count, grid, grid, 4)
    corner = torch.arange(grid, device=boxes.device) * cell
    boxes[..., 0::2] += corner[:, None]  # x by column
    boxes[..., 1::2] += corner[:, None, None]  # y by row

    pixels = layers[:, :3].unflatten(0, (count, grid, grid)).permute(0, 3, 1, 4, 2, 5)
    pixels = pixels.reshape(count, 3, size, size).clamp(-1, 1).roll((shift, shift), (2, 3))
    boxes = boxes[:, :whole, :whole].flatten(1, 2) + shift
    index = index.view(count, grid, grid)[:, :whole, :whole].flatten(1)
    return Scenes(pixels, boxes, concept.to(index.device)[index])


def mix_patches(
    pixels: Tensor, patch_size: int | tuple[int, int], *, generator: torch.Generator
) -> Tensor:
    """Return hybrids: each patch of a picture comes from another picture, from the same place.

    They keep what a place usually shows, such as the white between the cells of scenes, and no object. What a head does
    on them as on scenes, it does by place.

    Args:
        pixels: (B, C, height, width), at least 3 pictures. If there are more than patches in one, no two patches of a
            hybrid are of one picture; else each gives about as many as any other.
        patch_size: height and width of a patch, or one number for both; they divide the pictures'.
        generator: where the draw comes from, on the CPU; the same state gives the same hybrids.

    Returns:
        (B, C, height, width); every patch of every picture is in one of them.

    Raises:
        ValueError: a wrong shape, too few pictures, or a patch that does not divide them.
    """
    count, _, *size = check_tensor("pixels", pixels, ("B", "C", "H", "W"))
    patch = pair("patch_size", patch_size)
    if count < 3:
        raise ValueError(f"pixels holds {count} pictures; hybrids need at least 3")
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ValueError(f"patch_size={patch_size} must divide {size[0]} x {size[1]} pixels")
    patches = F.unfold(pixels, patch, stride=patch).transpose(1, 2)  # (B, N, C * patch pixels)
    place = torch.arange(patches.shape[1])
    away = 1 + torch.randperm(len(place), generator=generator) % (count - 1)  # never its own
    source = (torch.arange(count)[:, None] + away) % count  # (B, N)
    return F.fold(patches[source, place].transpose(1, 2), size, patch, stride=patch)


def pointing(maps: Tensor, boxes: Tensor, size: int | tuple[int, int]) -> Share:
    """Return how many maps are highest inside their box.

    The centre of the highest cell must lie in the box; there is no margin around it. Where several cells are equally
    high, to a hundred-thousandth of the map's range, all of them must: a map that is constant points nowhere, and is
    a miss, and rounding decides nothing.

    Args:
        maps: (B, rows, columns), cells of equal size that cover the picture.
        boxes: (B, 4) x0, y0, x1, y1 in pixels, x0 <= x < x1, inside the picture.
        size: height and width of the pictures in pixels, or one number for both.

    Raises:
        ValueError: a wrong shape, a map that is not finite, a box that is empty or leaves the picture.

    Source: Zhang et al., Top-down Neural Attention by Excitation Backprop (2018), section 4.1.
    """
    check_tensor("maps", maps, ("B", "rows", "columns"), dtypes=NUMBERS, empty=False)
    if broken := int((~maps.isfinite()).flatten(1).any(1).sum()):
        raise ValueError(f"maps: {broken} of {len(maps)} hold NaN or infinity")
    if len(boxes) != len(maps):
        raise ValueError(f"there are {len(boxes)} boxes for {len(maps)} maps")
    inside = inside_boxes(boxes, size, maps.shape[1:])
    top, bottom = maps.amax((1, 2), keepdim=True), maps.amin((1, 2), keepdim=True)
    highest = maps >= top - 1e-5 * (top - bottom)
    hit = (highest & ~inside).flatten(1).sum(1) == 0
    return Share(int(hit.sum()), len(hit))


def chance(boxes: Tensor, size: int | tuple[int, int], grid: int | tuple[int, int]) -> float:
    """Return the share of hits to expect of maps whose highest cell is any of the grid, all equally likely.

    Args:
        boxes: (B, 4), as for ``pointing``.
        size: height and width of the pictures in pixels, or one number for both.
        grid: rows and columns of the maps, or one number for both.
    """
    return inside_boxes(boxes, size, pair("grid", grid)).double().mean().item()


def inside_boxes(boxes: Tensor, size: int | tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return whether the centre of each of the grid's cells lies in the box: (B, 4) to (B, rows, columns)."""
    height, width = pair("size", size)
    check_tensor("boxes", boxes, ("B", 4), dtypes=NUMBERS, empty=False)
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)  # each (B, 1)
    # written so that NaN raises as well
    fits = (x0 >= 0) & (y0 >= 0) & (x0 < x1) & (y0 < y1) & (x1 <= width) & (y1 <= height)
    if not fits.all():
        bad = boxes[~fits[:, 0]][0].tolist()
        raise ValueError(
            f"boxes hold {bad}; it must be x0 < x1 and y0 < y1 inside {width} x {height} pixels"
        )
    rows, columns = grid
    y = (torch.arange(rows, device=boxes.device) + 0.5) * height / rows
    x = (torch.arange(columns, device=boxes.device) + 0.5) * width / columns
    return ((y0 <= y) & (y < y1))[:, :, None] & ((x0 <= x) & (x < x1))[:, None, :]


def _boxes(visible: Tensor) -> Tensor:
    """Return the boxes (n, 4) around what is true in (n, height, width)."""
    if not visible.flatten(1).any(1).all():
        raise ValueError("pictures hold one without a visible pixel, which has no box")
    columns, rows = visible.any(1).byte(), visible.any(2).byte()
    x0, x1, y0, y1 = (
        edge
        for line in (columns, rows)  # argmax finds the first of the largest
        for edge in (line.argmax(1), line.shape[1] - line.flip(1).argmax(1))
    )
    return torch.stack((x0, y0, x1, y1), dim=1).float()
