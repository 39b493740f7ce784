"""From pictures to the tensor that SigLIP's image tower takes.

PIL is imported when a picture is prepared, not before: importing the library stays quick.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np
import torch
from torch import Tensor

from siglip_lib.base.checks import pair

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose

Picture: TypeAlias = "str | os.PathLike[str] | Image | np.ndarray"

# what is read from files; PIL's other formats, some of which start programs, come as PIL pictures
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# not "I" and "F", whose range nobody knows, nor the premultiplied "La" and "RGBa"
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", *DEEP)
# of 16 bits to 8, rounded; PIL would clip at 255
LEVELS = (np.arange(2**16) / 257).round().astype(np.uint8)
ORIENTATION = 0x112  # the tag's number in EXIF


def preprocess(
    pictures: Picture | list[Picture] | tuple[Picture, ...], image_size: int | tuple[int, int] = 384
) -> Tensor:
    """Return pictures as SigLIP takes them: RGB, resized without keeping the aspect ratio, in [-1, 1].

    A picture is turned as its EXIF data say, if they can be read, and laid on white where it is transparent; 16-bit
    greyscale is scaled to 8 bits. Of an animated file it is the first frame.

    Args:
        pictures: one or several (a list or tuple) of: a path of a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or AVIF file, a
            PIL picture, a uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), the last RGBA. At most
            ``PIL.Image.MAX_IMAGE_PIXELS`` pixels, 89 million unless changed: each takes up to 12 bytes meanwhile.
        image_size: height and width of the result in pixels, or one number for both.

    Returns:
        float32 (B, 3, height, width) on the CPU; B is 1 for a single picture. Apart from EXIF, 16 bits and palettes
        with alpha, the very bits of transformers' ``SiglipImageProcessorPil`` (5.23). ``SiglipImageProcessor`` resizes
        with torchvision: most often 1 or 2 of 255 levels away, up to 7 (0.055) on photographs and 27 (0.21) on noise.

    Raises:
        TypeError: a picture of another type or dtype.
        ValueError: no picture, no pixels or too many, another shape or mode; a file that is broken or of another
            format, or a pipe or device. All but the files' content is checked before any work is done.
        OSError: a file that can't be opened; FileNotFoundError if it is missing.
    """
    from PIL import Image

    height, width = pair("image_size", image_size)
    named = {"pictures": pictures}
    if isinstance(pictures, (list, tuple)):
        if not pictures:
            raise ValueError(f"pictures={pictures!r} is empty; it must hold at least one picture")
        named = {f"pictures[{i}]": picture for i, picture in enumerate(pictures)}
    named = {name: as_image(name, picture) for name, picture in named.items()}
    resized = [  # one after the other, so that only one is in memory at its full size
        np.asarray(upright_rgb(name, picture).resize((width, height), Image.Resampling.BICUBIC))
        for name, picture in named.items()
    ]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()
    return pixels.float().div_(255).sub_(0.5).div_(0.5)


def as_image(name: str, picture: Picture) -> str | os.PathLike[str] | Image:
    """Return a path as it is and anything else as a PIL picture; raise an error if it can't become one."""
    from PIL import Image

    if isinstance(picture, (str, os.PathLike)):
        return picture
    if isinstance(picture, Image.Image):
        return _checked(name, picture)
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
        dtype = f" of {picture.dtype}" if hasattr(picture, "dtype") else ""
        kind = type(picture).__name__ + dtype
        hint = _hint(picture) if isinstance(picture, (np.ndarray, Tensor)) else ""
        raise TypeError(f"{name}: {kind} must be a path, a PIL picture or a uint8 array{hint}")
    shape = picture.shape
    if len(shape) not in (2, 3) or shape[2:] not in ((), (1,), (3,), (4,)) or 0 in shape:
        allowed = "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4) with at least one pixel"
        raise ValueError(f"{name}: an array of shape {shape} must be {allowed}")
    return Image.fromarray(picture.squeeze(2) if shape[2:] == (1,) else picture)


def _hint(picture: np.ndarray | Tensor) -> str:
    """Say how an array of another type becomes a picture."""
    dtype = str(picture.dtype)
    if dtype == "torch.uint8":
        return "; from (3, H, W): x.permute(1, 2, 0).numpy()"
    first = "x = x.permute(1, 2, 0).numpy(), then " if isinstance(picture, Tensor) else ""
    if "float" in dtype or "bool" in dtype:
        return f"; from floats in [0, 1]: {first}(x * 255).round().astype('uint8')"
    return f"; from integers in 0..255: {first}x.astype('uint8')"


def _checked(name: str, image: Image) -> Image:
    """Return a PIL picture of a size and mode that can be converted."""
    from PIL import Image

    found = f"{name}: a picture of {image.width} x {image.height}"
    if 0 in image.size:
        raise ValueError(f"{found} has no pixels")
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        advice = "make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if the memory is enough"
        raise ValueError(f"{found} has more than {most} pixels; {advice}")
    if image.mode not in MODES:
        allowed = f"{', '.join(MODES)}; scale to 0..255 and use image.convert('L')"
        raise ValueError(f"{name}: a picture of mode {image.mode!r} must be of {allowed}")
    return image


def upright_rgb(name: str, picture: str | os.PathLike[str] | Image) -> Image:
    """Return a new picture in mode RGB, the right way up, on white; ``name`` is what messages call it."""
    from PIL import Image

    # opened outside of what is caught: a missing file is no broken one
    with nullcontext() if isinstance(picture, Image.Image) else _file(name, picture) as file:
        with _broken_files_named(name, picture):
            image = Image.open(file, formats=FORMATS) if file else picture
        _checked(name, image)  # before its pixels are read
        with _broken_files_named(name, picture):
            key = _transparent(image)
            image.load()
        turn = _turn(image)
        image = image.copy() if turn is None else image.transpose(turn)
        if "transparency" in image.info:
            image.info["transparency"] = key
    _checked(name, image)
    if image.mode in DEEP:
        image = _grey(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _file(name: str, path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file, but no pipe, which could let us wait for ever, and no device."""
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFDIR):  # of a folder, open says what it is
        raise ValueError(f"{name}: {path!r} is no regular file")
    return open(path, "rb")


@contextmanager
def _broken_files_named(name: str, picture: str | os.PathLike[str] | Image) -> Iterator[None]:
    """Give one error for the dozen that PIL has for broken files."""
    from PIL import UnidentifiedImageError

    try:
        yield
    except Exception as error:
        why = str(error)
        if isinstance(error, UnidentifiedImageError):
            why = f"it is none of {', '.join(FORMATS)}; open others with PIL and pass the picture"
        why = f"{type(error).__name__}: {why}"
        raise ValueError(f"{name}: {picture!r} can't be read as a picture ({why})") from error


def _transparent(image: Image) -> int | bytes | tuple[int, int, int] | None:
    """Return what in a picture is transparent, as its pixels will be once they are read; None if nothing is."""
    key = image.info.get("transparency")
    if image.format == "PNG" and key is not None and image.tile:
        # PIL makes 8 bits of pixels, but leaves the one colour that is transparent as the file has it
        match image.tile[0][3]:
            case "L;2":
                return key * 85
            case "L;4":
                return key * 17
            case "RGB;16B":
                return tuple(value >> 8 for value in key)
    return key


def _turn(image: Image) -> Transpose | None:
    """Return what turns a picture upright as its EXIF data say; None if nothing does or they can't be read."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(ORIENTATION))
    except Exception:  # of a dozen types; the picture itself is whole
        return None


def _grey(image: Image) -> Image:
    """Return a picture of 16 bits in mode L, or LA if one of its levels is transparent."""
    from PIL import Image

    values, key = np.asarray(image), image.info.get("transparency")
    grey = Image.fromarray(LEVELS[values])
    if key is not None:
        grey.putalpha(Image.fromarray((values != key) * np.uint8(255)))
    return grey
