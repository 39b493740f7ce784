"""From pictures to the tensor that SigLIP's image tower takes.

PIL is imported when a picture is prepared, not before: importing the library stays quick.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from siglip_lib.checks import pair

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture: TypeAlias = str | os.PathLike[str] | Image | np.ndarray

# not "I" and "F", whose range nobody knows, nor the premultiplied "La" and "RGBa"
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", *DEEP)


def preprocess(
    pictures: Picture | list[Picture] | tuple[Picture, ...], image_size: int | tuple[int, int] = 384
) -> Tensor:
    """Return pictures as SigLIP takes them: RGB, resized without keeping the aspect ratio, in [-1, 1].

    A picture is turned as its EXIF data say and laid on white where it is transparent; 16-bit greyscale is scaled to
    8 bits. Of an animated file it is the first frame.

    Args:
        pictures: one or several (a list or tuple) of: a path, a PIL picture, a uint8 array (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4), the last RGBA.
        image_size: height and width of the result in pixels, or one number for both.

    Returns:
        float32 (B, 3, height, width) on the CPU; B is 1 for a single picture. Apart from EXIF and 16 bits, the very
        bits of transformers' ``SiglipImageProcessorPil`` (5.23). ``SiglipImageProcessor`` resizes with torchvision:
        most often 1 or 2 of 255 levels away, up to 7 (0.055) on photographs and 27 (0.21) on noise.

    Raises:
        TypeError: a picture of another type or dtype.
        ValueError: no picture, no pixels, another shape or mode; a file that is broken, no picture, or large enough for
            PIL to call it a decompression bomb. All but files is _checked before any work is done.
        OSError: a file that can't be opened; FileNotFoundError if it is missing.
    """
    from PIL import Image

    height, width = pair("image_size", image_size)
    if isinstance(pictures, (list, tuple)):
        if not pictures:
            raise ValueError(f"pictures={pictures!r} is empty; it must hold at least one picture")
        named = {f"pictures[{i}]": picture for i, picture in enumerate(pictures)}
    else:
        named = {"pictures": pictures}
    named = {name: _path_or_image(name, picture) for name, picture in named.items()}
    resized = [
        np.asarray(_upright_rgb(name, picture).resize((width, height), Image.Resampling.BICUBIC))
        for name, picture in named.items()
    ]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()
    return pixels.float().div_(255).sub_(0.5).div_(0.5)


def _path_or_image(name: str, picture: Picture) -> str | os.PathLike[str] | Image:
    """Return a path as it is and anything else as a PIL picture; refuse what can't become one."""
    from PIL import Image

    if isinstance(picture, (str, os.PathLike)):
        return picture
    if isinstance(picture, Image.Image):
        return _checked(name, picture)
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
        dtype = f" of {picture.dtype}" if hasattr(picture, "dtype") else ""
        kind = type(picture).__name__ + dtype
        first = "x = x.permute(1, 2, 0).numpy(), then " if isinstance(picture, Tensor) else ""
        hint = f"from floats in [0, 1]: {first}(x * 255).round().astype('uint8')"
        raise TypeError(f"{name}: {kind} must be a path, a PIL picture or a uint8 array; {hint}")
    shape = picture.shape
    if len(shape) not in (2, 3) or shape[2:] not in ((), (1,), (3,), (4,)) or 0 in shape:
        allowed = "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4) with at least one pixel"
        raise ValueError(f"{name}: an array of shape {shape} must be {allowed}")
    return Image.fromarray(picture.squeeze(2) if shape[2:] == (1,) else picture)


def _checked(name: str, image: Image) -> Image:
    """Return a PIL picture that has pixels and a mode that can be converted."""
    if 0 in image.size:
        raise ValueError(f"{name}: a picture of {image.width} x {image.height} has no pixels")
    if image.mode not in MODES:
        allowed = f"{', '.join(MODES)}; scale to 0..255 and use image.convert('L')"
        raise ValueError(f"{name}: a picture of mode {image.mode!r} must be of {allowed}")
    return image


def _upright_rgb(name: str, picture: str | os.PathLike[str] | Image) -> Image:
    """Return a new picture in mode RGB, the right way up, on white."""
    from PIL import Image, ImageOps

    # opened outside the try: a missing file is no broken one
    with nullcontext() if isinstance(picture, Image.Image) else open(picture, "rb") as file:
        try:
            image = ImageOps.exif_transpose(Image.open(file) if file else picture)
        except Exception as error:  # PIL has a dozen types for broken files
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{name}: {picture!r} can't be read as a picture ({why})") from error
    _checked(name, image)
    if image.mode in DEEP:
        # PIL would clip at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
