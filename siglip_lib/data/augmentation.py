"""Pictures with alpha on a background, as they are or changed at random: what a training looks at.

All of it is tensor operations on the pictures' device, a function of the pictures and of random numbers drawn before.
So it can be compiled, run inside a CUDA graph, and repeated.
"""

import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_lib.base.checks import check_tensor, number

Colour: TypeAlias = tuple[float, float, float]
WHITE = (1.0, 1.0, 1.0)

# what each column of the random numbers decides
COLUMNS = (
    *("scale", "aspect", "rotation", "shear", "shift_x", "shift_y"),
    *("hue", "saturation", "grey", "contrast", "brightness", "blur"),
    *("erase", "erase_x", "erase_y", "erase_width", "erase_height"),
    *("background", "red", "green", "blue"),
)
# how many uniform numbers augment takes for a picture
DRAWS = len(COLUMNS)

# the ranges at strength 1
SCALE = (0.6, 1.1)  # of the picture's size
ASPECT = 0.15  # width by height, as a logarithm, either way
ROTATION = 15.0  # degrees either way
SHEAR = 0.15  # columns per row, either way
SHIFT = 0.1  # of half the side either way, besides the room that a smaller picture leaves
HUE = 20.0  # degrees either way
SATURATION = 0.4  # either way of 1, as contrast
CONTRAST = 0.25
BRIGHTNESS = 0.15  # of black to white, either way
ERASED = (0.1, 0.35)  # of the side
# how often, at strength 1
GREY_RATE, BLUR_RATE, ERASE_RATE, COLOUR_RATE = 0.1, 0.25, 0.25, 0.5


def compose(rgba: Tensor, background: Tensor | Colour = WHITE) -> Tensor:
    """Lay pictures on a background.

    Args:
        rgba: (B, 4, H, W) uint8; colour is not multiplied by alpha.
        background: red, green and blue in [-1, 1], one tuple for all or a floating-point tensor (B, 3), a colour for
            each picture. Of a tensor the range is not checked: that would wait for the device.

    Returns:
        (B, 3, H, W) float32 in [-1, 1], on the pictures' device.

    Raises:
        TypeError: rgba is not uint8, background no floating-point tensor and no tuple of numbers.
        ValueError: another shape or device, or a colour out of range.
    """
    check_tensor("rgba", rgba, ("B", 4, "H", "W"), dtypes=(torch.uint8,))
    if isinstance(background, Tensor):
        check_tensor("background", background, (len(rgba), 3), like=("rgba", rgba))
        colour = background.float()
    else:
        for value in background:
            number("background", value)
        if len(background) != 3 or not all(-1 <= value <= 1 for value in background):
            raise ValueError(f"background={background!r} must be three numbers in [-1, 1]")
        # filled on the device: a copy from the host would stop a CUDA graph
        filled = [rgba.new_full((len(rgba),), v, dtype=torch.float32) for v in background]
        colour = torch.stack(filled, 1)
    return _on_background(_premultiplied(rgba), (colour + 1) / 2)


def augment(rgba: Tensor, draws: Tensor, strength: float = 1.0) -> Tensor:
    """Change pictures at random and lay them on a background, white half of the time, else of any colour.

    Each picture is resized, turned, sheared and shifted a little, and its colours are changed; now and then it turns
    grey, is blurred, or loses a rectangle. It is never mirrored: that would make an arrow's caption wrong.

    Args:
        rgba: (B, 4, H, W) uint8; colour is not multiplied by alpha.
        draws: (B, DRAWS) floating-point numbers in [0, 1), on the pictures' device. A picture's row alone decides what
            happens to it. The range is not checked: that would wait for the device.
        strength: scales all ranges and rates, in [0, 2]; 0 is ``compose(rgba)``.

    Returns:
        (B, 3, H, W) float32 in [-1, 1], on the pictures' device; in float32 under autocast, too.

    Raises:
        TypeError: rgba is not uint8, draws not of floating point, strength no number.
        ValueError: another shape or device, or strength out of range.
    """
    check_tensor("rgba", rgba, ("B", 4, "H", "W"), dtypes=(torch.uint8,))
    check_tensor("draws", draws, (len(rgba), DRAWS), like=("rgba", rgba))
    strength = number("strength", strength)
    if not 0 <= strength <= 2:
        raise ValueError(f"strength={strength!r} must lie in [0, 2]")
    if strength == 0:
        return compose(rgba)  # to the bit, which resampling is not
    drawn = dict(zip(COLUMNS, draws.float().unbind(1), strict=True))
    with torch.autocast(rgba.device.type, enabled=False):  # else the grid would be of 16 bits
        pictures = _moved(_premultiplied(rgba), drawn, strength)
        pictures = _recoloured(pictures, drawn, strength)
        pictures = _erased(_blurred(pictures, drawn, strength), drawn, strength)
        return _on_background(pictures, _background(drawn, strength))


def _premultiplied(rgba: Tensor) -> Tensor:
    """Return (B, 4, H, W) in [0, 1] with colour times alpha.

    Only so may pixels be averaged: what is transparent has no colour, and would darken its neighbours.
    """
    values = rgba / 255
    return torch.cat([values[:, :3] * values[:, 3:], values[:, 3:]], 1)


def _on_background(pictures: Tensor, colour: Tensor) -> Tensor:
    """Lay premultiplied pictures on colours (B, 3) in [0, 1]; return them in [-1, 1]."""
    shown = pictures[:, :3] + (1 - pictures[:, 3:]) * colour[:, :, None, None]
    return (2 * shown - 1).clamp(-1, 1)  # where operations are fused, rounding may lead out


def _between(draw: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Map draws from [0, 1) to [low, high), either way of 0 if none is given."""
    return low + (high - low) * draw


def _wide(values: Tensor) -> Tensor:
    """Return a value for each picture, (B,), as (B, 1, 1, 1), to multiply (B, C, H, W) with."""
    return values[:, None, None, None]


def _moved(pictures: Tensor, drawn: dict[str, Tensor], strength: float) -> Tensor:
    """Scale, shear, turn and shift."""
    scale = 1 + strength * (_between(drawn["scale"], *SCALE) - 1)
    stretch = (strength * ASPECT / 2 * _between(drawn["aspect"])).exp()
    across, down = scale * stretch, scale / stretch
    shear = strength * SHEAR * _between(drawn["shear"])
    angle = strength * math.radians(ROTATION) * _between(drawn["rotation"])
    cos, sin = angle.cos(), angle.sin()
    # grid_sample asks of each place in the result where it comes from: the inverse of rotation @ shear @ scale
    xx, xy = (cos + shear * sin) / across, (sin - shear * cos) / across
    yx, yy = -sin / down, cos / down
    # both sides are 2 units long, so turning a picture that is no square needs their ratio
    ratio = pictures.shape[2] / pictures.shape[3]
    xy, yx = xy * ratio, yx / ratio
    room = strength * SHIFT + (1 - scale).clamp(min=0)
    right, below = room * _between(drawn["shift_x"]), room * _between(drawn["shift_y"])
    rows = [xx, xy, -(xx * right + xy * below), yx, yy, -(yx * right + yy * below)]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), pictures.shape, align_corners=False)
    return F.grid_sample(pictures, grid, align_corners=False)


def _recoloured(pictures: Tensor, drawn: dict[str, Tensor], strength: float) -> Tensor:
    """Turn the hue, change saturation, contrast and brightness.

    Premultiplied colours may be changed by all that is linear; where a constant is added, it is added times alpha.
    """
    colour, alpha = pictures[:, :3], pictures[:, 3:]
    # a rotation about the grey axis (Rodrigues); the difference of the rolled is the cross product with (1, 1, 1)
    angle = _wide(strength * math.radians(HUE) * _between(drawn["hue"]))
    turned = (colour.roll(1, 1) - colour.roll(-1, 1)) * angle.sin() / math.sqrt(3)
    mean = colour.mean(1, keepdim=True)
    colour = colour * angle.cos() + turned + mean * (1 - angle.cos())

    red, green, blue = colour.split(1, 1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    saturation = 1 + strength * SATURATION * _between(drawn["saturation"])
    saturation = saturation * (drawn["grey"] >= strength * GREY_RATE)
    colour = luma + (colour - luma) * _wide(saturation)

    contrast = _wide(1 + strength * CONTRAST * _between(drawn["contrast"]))
    brightness = _wide(strength * BRIGHTNESS * _between(drawn["brightness"]))
    colour = colour * contrast + alpha * (0.5 - 0.5 * contrast + brightness)
    return torch.cat([torch.minimum(colour.clamp(min=0), alpha), alpha], 1)


def _blurred(pictures: Tensor, drawn: dict[str, Tensor], strength: float) -> Tensor:
    """Mix some pictures with their blurred selves, in a share that is uniform in (0, 1]."""
    share = _wide((1 - drawn["blur"] / (strength * BLUR_RATE)).clamp(min=0))
    soft = F.avg_pool2d(pictures, 3, stride=1, padding=1)
    return pictures + (soft - pictures) * share


def _erased(pictures: Tensor, drawn: dict[str, Tensor], strength: float) -> Tensor:
    """Cut a rectangle out of some pictures; the background shows there."""
    inside = drawn["erase"][:, None, None] < strength * ERASE_RATE
    for axis, place, extent in ((1, "erase_y", "erase_height"), (2, "erase_x", "erase_width")):
        side = pictures.shape[axis + 1]
        pixels = (torch.arange(side, device=pictures.device) + 0.5) / side
        half = strength / 2 * _between(drawn[extent], *ERASED)
        hit = (pixels - drawn[place][:, None]).abs() < half[:, None]
        inside = inside & hit.unsqueeze(3 - axis)
    return pictures * ~inside[:, None]


def _background(drawn: dict[str, Tensor], strength: float) -> Tensor:
    """Return a colour (B, 3) in [0, 1] for each picture: white, or any."""
    colour = torch.stack([drawn["red"], drawn["green"], drawn["blue"]], 1)
    return torch.where(drawn["background"][:, None] < strength * COLOUR_RATE, colour, 1.0)
