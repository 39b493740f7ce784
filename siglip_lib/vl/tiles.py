"""A large picture as tiles of the tower's size, and a thumbnail of the whole."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from siglip_lib.base.checks import pair, positive_int
from siglip_lib.data.preprocessing import Picture, as_image, upright_rgb

Size = tuple[int, int]  # height and width in pixels
GREY = (127, 127, 127)  # what the mean colour .5 is in 8 bits, rounded down


@dataclass(frozen=True, eq=False)
class Tiles:
    """A picture, cut for the tower: float32 in [-1, 1]."""

    thumbnail: Tensor  # (3, size, size), the whole picture
    tiles: Tensor  # (rows * columns, 3, size, size), row by row
    grid: tuple[int, int]  # rows and columns of tiles


def candidate_resolutions(size: int = 384, most: int = 9) -> list[Size]:
    """Return heights and widths in pixels of all grids of at most ``most`` tiles, each ``size`` by ``size`` pixels.

    Source: Wu et al., DeepSeek-VL2 (2024), section 2 (dynamic tiling strategy).
    """
    size, most = positive_int("size", size), positive_int("most", most)
    sides = range(1, most + 1)
    return [(m * size, n * size) for m in sides for n in sides if m * n <= most]


def choose_resolution(size: Size, candidates: Sequence[Size]) -> Size:
    """Return the candidate that shows most of a picture, and of equals the one that wastes least.

    A picture is enlarged or shrunk until it fits into the candidate, its aspect kept. What it shows are the pixels that
    it then fills, but no more than it had; the candidate's others are wasted. Of those equal in both it is the first.

    Args:
        size: height and width of the picture in pixels.
        candidates: heights and widths in pixels.

    Raises:
        TypeError, ValueError: there are no candidates, or a number is no int of at least 1.

    Source: Wu et al., DeepSeek-VL2 (2024), section 2, and its code (select_best_resolution; it uses floats).
    """
    height, width = pair("size", size)
    candidates = [pair(f"candidates[{i}]", each) for i, each in enumerate(candidates)]
    if not candidates:
        raise ValueError("candidates is empty")

    def shown_and_waste(candidate: Size) -> tuple[int, int]:
        high, wide = candidate
        # in integers: a float's rounding could lose a column, and turn the choice
        filled = min(high, height * wide // width) * min(wide, width * high // height)
        shown = min(filled, height * width)
        return shown, shown - high * wide

    return max(candidates, key=shown_and_waste)  # of equals the first


def tile_picture(
    picture: Picture, candidates: Sequence[Size] | None = None, size: int = 384
) -> Tiles:
    """Cut a picture into tiles, with a thumbnail of the whole.

    It is resized with its aspect kept, centred in the chosen resolution, and framed in grey; so is the thumbnail.

    Args:
        picture: a path, a PIL picture or a uint8 array, as for ``preprocess``.
        candidates: heights and widths in pixels to choose from, multiples of ``size``; up to nine tiles if None.
        size: height and width of a tile in pixels.

    Raises:
        TypeError, ValueError: as ``preprocess``; or a candidate is no multiple of ``size``, or the picture is so thin
            that nothing would be left of it.

    Source: Wu et al., DeepSeek-VL2 (2024), section 2, and its code (DeepseekVLV2Processor).
    """
    from PIL import Image, ImageOps

    size = positive_int("size", size)
    candidates = candidate_resolutions(size) if candidates is None else candidates
    odd = [each for each in candidates if any(x % size for x in pair("candidates", each))]
    if odd:
        raise ValueError(f"candidates={odd} must be multiples of size={size}")
    image = upright_rgb("picture", as_image("picture", picture))
    if 2 * size * min(image.size) <= max(image.size):
        shape = f"{image.width} x {image.height}"
        raise ValueError(f"picture of {shape} is too thin for a thumbnail of {size} pixels")
    height, width = choose_resolution((image.height, image.width), candidates)
    views = []
    for framed in ((size, size), (width, height)):
        view = np.array(ImageOps.pad(image, framed, Image.Resampling.BICUBIC, color=GREY))
        views.append((torch.from_numpy(view).permute(2, 0, 1).float() / 255 - 0.5) / 0.5)
    thumbnail, whole = views
    grid = (height // size, width // size)
    tiles = whole.unflatten(1, (grid[0], size)).unflatten(3, (grid[1], size))
    return Tiles(thumbnail, tiles.permute(1, 3, 0, 2, 4).flatten(0, 1), grid)
