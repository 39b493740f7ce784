"""Widgets for a notebook: type a text and see the pictures it finds, click a patch and see where it looks.

ipywidgets, anywidget and PIL are imported when a widget is made, not before: importing the library stays quick.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_lib.base.checks import check_tensor, finite_tensors, positive_int
from siglip_lib.classroom.plots import COLOURS
from siglip_lib.evaluate.explain import check_tower, evaluation_mode
from siglip_lib.evaluate.maps import attention_maps
from siglip_lib.siglip.model import SigLIP, embed_texts
from siglip_lib.siglip.text import Tokenizer, canonicalize
from siglip_lib.tower.vision_transformer import VisionTransformer

if TYPE_CHECKING:
    from ipywidgets import VBox
    from PIL.Image import Image

THUMBNAIL = 192  # pixels along the longer side of a picture that was found
SIDE = 384  # pixels, roughly, of the picture to click on
MEAN = -1  # the heads' mean, in the place of a head's number
HINT = "Type what a picture shows."
# at most four in a row, fewer on a narrow page
_GRID = (
    '<div style="display: grid; gap: 12px 8px; '
    'grid-template-columns: repeat(auto-fill, minmax(max(104px, 21%), 1fr))">{}</div>'
)
_FIGURE = (
    '<figure style="margin: 0; text-align: center; line-height: 1.3">'
    '<img src="data:image/png;base64,{}" alt="{}" style="width: 80px; height: 80px; object-fit: contain; '
    'background: white; border-radius: 4px">'
    '<figcaption><div style="overflow-wrap: anywhere">{}</div>{:.2f}</figcaption></figure>'
)


def search_box(
    model: SigLIP,
    tokenizer: Tokenizer,
    vectors: Tensor,
    pictures: Callable[[int], Image],
    titles: Sequence[str] | None = None,
    *,
    count: int = 8,
    query: str = "",
) -> VBox:
    """Return a field for a text, above the pictures that fit it best, each with its title and cosine.

    The pictures change as the reader types; while the field holds no word there is a hint in their place, and after an
    error, which is raised too, what went wrong.

    Args:
        model: whose text tower reads the text.
        tokenizer: the model's.
        vectors: unit vectors (n, width) of the pictures, such as ``embed_pictures`` gives; ``*embed_folder(model,
            folder)`` stands for this argument and the next two.
        pictures: called with a place in ``vectors``, returns its picture, as ``Emoji64.picture`` does.
        titles: n strings to write below the pictures; nothing if None.
        count: pictures to show, at most n.
        query: what the field holds at first.

    Raises:
        TypeError: vectors are no floats, pictures can't be called, or count is no int.
        ValueError: vectors of another shape or length or with NaN, a number of titles that is not n, a count above n,
            or a model that gives a text NaN.
    """
    from ipywidgets import HTML, Layout, Text, VBox

    shape = "n", model.config.width
    n, _ = check_tensor("vectors", vectors, shape, empty=False, hint="as wide as the model's")
    finite_tensors("search_box refuses", {"vectors": vectors})
    if not ((vectors.float().norm(dim=1) - 1).abs() < 0.01).all():  # bfloat16 rounds to 0.004
        raise ValueError("vectors holds one whose length is not 1; divide each by its length")
    if not callable(pictures):
        wanted = "it must be a function from a place to a picture, such as pictures.__getitem__ of a list"
        raise TypeError(f"pictures is a {type(pictures).__name__}; {wanted}")
    titles = [""] * n if titles is None else list(titles)
    if len(titles) != n:
        raise ValueError(f"titles has {len(titles)} entries; vectors has {n}")
    if positive_int("count", count) > n:
        raise ValueError(f"count={count} must be at most {n}, the number of pictures")

    def show(place: int, cosine: float) -> str:
        picture = pictures(place).copy()
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        title, data = html.escape(titles[place]), base64.b64encode(_png(picture)).decode()
        return _FIGURE.format(data, title or f"picture {place}", title, cosine)

    def found(text: str) -> str:
        if not canonicalize(text):
            return HINT
        vector = embed_texts(model, tokenizer, [text])[0]  # (width,)
        finite_tensors("the model gives", {"the text's vector": vector})
        cosines, places = (vectors @ vector.to(vectors)).topk(count)
        return _GRID.format("".join(map(show, places.tolist(), cosines.tolist())))

    def search(_: object = None) -> None:
        try:
            results.value = found(field.value)
        except Exception as error:  # else what an earlier text found would stand below this one
            results.value = html.escape(_what_went_wrong(error))
            raise

    def layout(margin: str) -> Layout:
        return Layout(width="100%", max_width="560px", margin=margin)

    field = Text(query, description="Search", placeholder="a red apple", layout=layout("2px 0"))
    field.style.description_width = "initial"
    results = HTML(layout=layout("4px 0"))
    field.observe(search, "value")
    search()
    return VBox([field, results])


def attention_viewer(
    tower: VisionTransformer, pixels: Tensor, *, names: Sequence[str] | None = None
) -> VBox:
    """Return a picture to click on, with a map over it of what the clicked patch attends to.

    Above it the reader chooses picture, layer and head. After an error, which is raised too, it says what went wrong in
    the map's place. Arrow keys move the patch as a click does. The pooling head's one query is no patch of the picture;
    there a click changes nothing. Colours run from the map's least weight, violet, to its largest, yellow. What prefix
    tokens get is not shown.

    Args:
        tower: an image tower with a pooling head (``global_pool="map"``); it is run in evaluation mode and its own
            dtype, on one picture whenever another picture or layer is chosen, and left as it was.
        pixels: pictures (B, 3, H, W) that the tower takes; shown as values in [-1, 1].
        names: B names to choose pictures by; their numbers if None.

    Raises:
        TypeError, ValueError: as for ``pool_attention``; the number of names is not B.
    """
    from ipywidgets import Dropdown, HBox, Layout, VBox

    tower = check_tower(tower, pixels)
    check_tensor("pixels", pixels, ("B", 3, "H", "W"))
    names = [f"picture {i}" for i in range(len(pixels))] if names is None else list(names)
    if len(names) != len(pixels):
        raise ValueError(f"names has {len(names)} entries; pixels holds {len(pixels)} pictures")
    rows, columns = grid = tower.patch_embed.dynamic_feat_size(tuple(pixels.shape[2:]))
    depth, heads = len(tower.blocks), tower.attn_pool.num_heads

    @lru_cache(maxsize=1)  # maps of all layers and pictures could fill the memory
    def weights(picture: int, layer: int) -> Tensor:
        """The weights (heads, queries, N) of what patches ask, or the pooling head's query, and patches answer."""
        some = pixels[picture : picture + 1]
        with torch.no_grad(), evaluation_mode(tower, some), attention_maps(tower, [layer]) as maps:
            tower.forward_head(tower.forward_features(some))
        prefix = 0 if layer == depth else tower.num_prefix_tokens
        return next(iter(maps.values()))[0, :, prefix:, prefix:].cpu()

    def show(_: object = None) -> None:
        try:
            draw()
        except Exception as error:  # else an earlier setting's map would stand below this one
            with picker.hold_sync():
                picker.image, picker.clickable = b"", False
                picker.caption = _what_went_wrong(error)
            raise

    def draw() -> None:
        pooling, query = layer.value == depth, picker.picked
        found = weights(picture.value, layer.value)[:, 0 if pooling else query]  # (heads, N)
        found = found.mean(0) if head.value == MEAN else found[head.value]
        low, high = found.aminmax()
        shown = _picture(pixels[picture.value], grid, tower.patch_embed.patch_size)
        who = f"The patch in row {query // columns + 1}, column {query % columns + 1}"
        if pooling:
            who = "The pooling head has one query, which no click changes. It"
        with picker.hold_sync():
            picker.image = _png(_overlay(shown, found.unflatten(0, grid)))
            picker.clickable = not pooling
            picker.caption = f"{who} attends to patches with weights from {low:.3f} (violet) to {high:.3f} (yellow)."

    def choice(description: str, options: list[tuple[str, int]], value: int) -> Dropdown:
        layout = Layout(width="190px", margin="2px 12px 2px 0")
        menu = Dropdown(options=options, value=value, description=description, layout=layout)
        menu.style.description_width = "52px"
        menu.observe(show, "value")
        return menu

    picker = _patch_picker()(rows=rows, columns=columns, picked=rows // 2 * columns + columns // 2)
    picture = choice("Picture", [(name, i) for i, name in enumerate(names)], 0)
    blocks = [(f"block {i}", i) for i in range(depth)]
    layer = choice("Layer", [*blocks, ("pooling head", depth)], depth - 1)
    head = choice("Head", [("mean", MEAN), *((f"head {i}", i) for i in range(heads))], MEAN)
    picker.observe(show, "picked")
    show()
    return VBox([HBox([picture, layer, head], layout=Layout(flex_flow="row wrap")), picker])


def _what_went_wrong(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def _picture(pixels: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Image:
    """Return what the patches cover of a picture (3, H, W), enlarged by a whole number to about ``SIDE`` pixels."""
    from PIL import Image

    height, width = grid[0] * patch[0], grid[1] * patch[1]
    # fewer pixels where negative, or more as the tower itself adds them
    pixels = F.pad(pixels, (0, width - pixels.shape[2], 0, height - pixels.shape[1]))
    values = ((pixels.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte()
    image = Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
    factor = max(1, round(SIDE / max(width, height)))
    return image.resize((factor * width, factor * height), Image.Resampling.BICUBIC)


def _overlay(picture: Image, weights: Tensor) -> Image:
    """Return the picture in grey under weights (rows, columns), each patch in one colour."""
    from matplotlib import colormaps
    from PIL import Image

    spread = (weights.max() - weights.min()).clamp(min=torch.finfo(weights.dtype).tiny)
    shades = colormaps["viridis"](((weights - weights.min()) / spread).numpy(), bytes=True)
    colours = Image.fromarray(shades).convert("RGB")
    colours = colours.resize(picture.size, Image.Resampling.NEAREST)
    return Image.blend(picture.convert("L").convert("RGB"), colours, 0.6)


@cache
def _patch_picker() -> type:
    """Return the class of a picture in rows and columns of patches, one of which is picked by click or arrow keys."""
    from anywidget import AnyWidget
    from traitlets import Bool, Bytes, Int, Unicode

    class PatchPicker(AnyWidget):
        _esm = (Path(__file__).parent / "patch_picker.js").read_text(encoding="utf-8")
        _css = _PICKER_CSS
        image = Bytes().tag(sync=True)  # a PNG
        caption = Unicode().tag(sync=True)  # what the image shows
        rows = Int().tag(sync=True)
        columns = Int().tag(sync=True)
        picked = Int().tag(sync=True)  # counted along the rows
        clickable = Bool(True).tag(sync=True)

    return PatchPicker


_PICKER_CSS = f"""
.siglip-patches > div {{ position: relative; max-width: {SIDE}px; margin: 8px 5px; cursor: crosshair; }}
.siglip-patches > div:focus-visible {{ outline: 3px solid var(--jp-brand-color1, {COLOURS[0]}); outline-offset: 2px; }}
.siglip-patches img {{ display: block; width: 100%; }}
.siglip-patches span {{ position: absolute; box-sizing: border-box; pointer-events: none;
  border: 2px solid {COLOURS[1]}; box-shadow: 0 0 0 1px white, inset 0 0 0 1px white; }}
.siglip-patches p {{ max-width: {SIDE}px; margin: 0 5px; line-height: 1.4; }}
"""
