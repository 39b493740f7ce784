"""From a folder of photographs to their vectors, and to what ``search_box`` shows of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from siglip_lib.base.checks import finite_tensors, join_names, positive_int
from siglip_lib.data.preprocessing import preprocess, upright_rgb
from siglip_lib.siglip.model import SigLIP

if TYPE_CHECKING:
    from PIL.Image import Image

# of the formats that ``preprocess`` reads
SUFFIXES = tuple(".jpg .jpeg .png .webp .gif .bmp .tif .tiff .ppm .avif".split())  # noqa: SIM905


class PictureFolder(NamedTuple):
    """The pictures of a folder, in the order in which ``search_box`` takes them."""

    vectors: Tensor  # (n, width), unit vectors
    pictures: Callable[
        [int], Image
    ]  # from a place in ``vectors`` to the picture, RGB, at its full size
    titles: list[str]  # the n files' names


@torch.no_grad()
def embed_folder(
    model: SigLIP, folder: str | os.PathLike[str], batch_size: int = 32
) -> PictureFolder:
    """Return the vectors of a folder's pictures: ``search_box(model, tokenizer, *embed_folder(model, folder))``.

    The pictures are the files of a known suffix (JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF) in the folder itself, by
    name; hidden files and folders within are left out. Each is prepared by ``preprocess`` at the model's size.

    Args:
        model: whose image tower embeds them, on its device and in its dtype.
        folder: a path.
        batch_size: pictures at a time.

    Returns:
        vectors (n, width) in the model's dtype and on its device, a function that opens a picture, and n file names.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no picture; the message says what it does hold.
        NotADirectoryError: ``folder`` is a file.
        ValueError: a file can't be read as a picture, see ``preprocess``; the message names it. ``batch_size`` is less
            than 1, or the model gives NaN.
        TypeError: ``batch_size`` is no int.
        OSError: a file can't be opened.
    """
    batch_size = positive_int("batch_size", batch_size)
    paths = _pictures_in(Path(folder))
    weight = model.image.patch_embed.proj.weight
    found = []
    for first in range(0, len(paths), batch_size):
        pixels = preprocess(paths[first : first + batch_size], model.config.image_size)
        found.append(model.encode_image(pixels.to(weight)))
    vectors = torch.cat(found)
    finite_tensors("the model gives", {"the pictures' vectors": vectors})
    return PictureFolder(
        vectors, lambda place: upright_rgb(paths[place].name, paths[place]), [p.name for p in paths]
    )


def _pictures_in(folder: Path) -> list[Path]:
    """The files of a picture's suffix, by name."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    files = [path for path in files if not path.name.startswith(".")]
    found = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not found:
        others = Counter(path.suffix.lower() or path.name for path in files)
        others = join_names(f"{number} {suffix}" for suffix, number in others.items())
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no picture ({', '.join(SUFFIXES)}), but {others or 'no file at all'}"
        )
    return found
