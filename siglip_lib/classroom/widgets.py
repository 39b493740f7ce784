"""Widgets for a notebook: the pictures that a text finds, where a clicked patch looks, where a caption's words look.

ipywidgets, anywidget and PIL are imported when a widget is made, not before: importing the library stays quick.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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

    from siglip_lib.vl.language_model import LanguageModel
    from siglip_lib.vl.visual_prefix import VisualPrefix

THUMBNAIL = 192  # pixels along the longer side of a picture that was found
SIDE = 384  # pixels, roughly, of the picture to click on
MEAN = -1  # the heads' mean, in the place of a head's number
POOLING_HEAD = "pooling head"
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


_READING = (
    '<div style="line-height: 1.4">The picture becomes {} tokens. <b>{}?</b> {}</div>'
    '<div style="display: flex; flex-wrap: wrap; gap: 12px">'
    '<img src="data:image/png;base64,{}" alt="The picture, cut into its tiles." style="max-width: 100%; width: 320px">'
    '<figure style="margin: 0; max-width: 100%; width: 320px"><img src="data:image/png;base64,{}" '
    'alt="Where the place that tells the chosen word looks." style="width: 100%">'
    "<figcaption>where “{}” looks</figcaption></figure></div>"
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
    source: VisionTransformer | Tensor, pixels: Tensor, *, names: Sequence[str] | None = None
) -> VBox:
    """Return a picture to click on, with a map over it of what the clicked patch attends to.

    Above it the reader chooses picture, layer and head, as far as there is a choice. After an error, which is raised
    too, it says what went wrong in the map's place. Arrow keys move the patch as a click does. The pooling head's one
    query is no patch of the picture; there a click changes nothing. Colours run from the map's least weight, violet, to
    its largest, yellow. What prefix tokens get is not shown.

    Args:
        source: an image tower with a pooling head (``global_pool="map"``); it is run in evaluation mode and its own
            dtype, on one picture whenever another picture or layer is chosen, and left as it was. Or the weights
            themselves, (B, heads, N, N) or (B, N, N), floats: a row for each patch that looks, N a square number.
        pixels: pictures (B, 3, H, W) that the tower takes, or that the weights' patches cover: H and W are multiples of
            the square root of N; shown as values in [-1, 1].
        names: B names to choose pictures by; their numbers if None.

    Raises:
        TypeError, ValueError: as for ``pool_attention``; weights that are no floats, of another shape or not finite,
            or pictures that they don't cover; the number of names is not B.
    """
    from ipywidgets import Dropdown, HBox, Layout, VBox

    found = _given_maps if isinstance(source, Tensor) else _towers_maps
    maps = found(source, pixels)
    names = [f"picture {i}" for i in range(len(pixels))] if names is None else list(names)
    if len(names) != len(pixels):
        raise ValueError(f"names has {len(names)} entries; pixels holds {len(pixels)} pictures")
    rows, columns = maps.grid

    def show(_: object = None) -> None:
        try:
            draw()
        except Exception as error:  # else an earlier setting's map would stand below this one
            with picker.hold_sync():
                picker.image, picker.clickable = b"", False
                picker.caption = _what_went_wrong(error)
            raise

    def draw() -> None:
        pooling, query = maps.layers[layer.value] == POOLING_HEAD, picker.picked
        weights = maps.of(picture.value, layer.value)[:, 0 if pooling else query]  # (heads, N)
        weights = weights.mean(0) if head.value == MEAN else weights[head.value]
        low, high = weights.aminmax()
        shown = _picture(pixels[picture.value], maps.grid, maps.patch)
        who = f"The patch in row {query // columns + 1}, column {query % columns + 1}"
        if pooling:
            who = "The pooling head has one query, which no click changes. It"
        with picker.hold_sync():
            picker.image = _png(_overlay(shown, weights.unflatten(0, maps.grid)))
            picker.clickable = not pooling
            picker.caption = f"{who} attends to patches with weights from {low:.3f} (violet) to {high:.3f} (yellow)."

    def choice(description: str, options: list[tuple[str, int]], value: int) -> Dropdown:
        layout = Layout(width="190px", margin="2px 12px 2px 0")
        menu = Dropdown(options=options, value=value, description=description, layout=layout)
        menu.style.description_width = "52px"
        menu.observe(show, "value")
        return menu

    picker = _patch_picker()(rows=rows, columns=columns, picked=rows // 2 * columns + columns // 2)
    blocks = sum(name != POOLING_HEAD for name in maps.layers)
    heads = [("mean", MEAN), *((f"head {i}", i) for i in range(maps.heads))]
    picture = choice("Picture", [(name, i) for i, name in enumerate(names)], 0)
    layer = choice("Layer", [(name, i) for i, name in enumerate(maps.layers)], blocks - 1)
    head = choice("Head", heads, MEAN)
    picker.observe(show, "picked")
    show()
    offered = [(picture, len(names)), (layer, len(maps.layers)), (head, maps.heads)]
    menus = [menu for menu, number in offered if number > 1]
    return VBox([HBox(menus, layout=Layout(flex_flow="row wrap")), picker])


def caption_viewer(
    prefix: VisualPrefix,
    language: LanguageModel,
    tokenizer: Tokenizer,
    pictures: Tensor,
    prompts: Sequence[str],
    *,
    tiles: int = 1,
    names: Sequence[str] | None = None,
) -> VBox:
    """Return what a captioner reads and writes: a picture's tiles, its tokens, the answer, and where each word looks.

    The reader chooses picture, question, block and word. The map is the mean of the block's heads over the picture's
    tokens, drawn over the tiles if there are any, else over the thumbnail; its least weight is violet, its largest
    yellow. Separator and newlines are in the number of tokens, and not in the map. After an error, which is raised too,
    it says what went wrong in the map's place.

    Args:
        prefix: tower, adaptor and learned vectors; run as it is, so put it into evaluation mode before.
        language: the language model behind it.
        tokenizer: of questions and answers; the answer has at most its context length of tokens.
        pictures: (B, 3, H, W) in [-1, 1], on the prefix's device; H and W are ``tiles`` times the tower's size.
        prompts: the questions to choose from.
        tiles: tiles along a side; of one there is the thumbnail alone.
        names: B names to choose pictures by; their numbers if None.

    Raises:
        ValueError: pictures of another size, no prompts, or a number of names that is not B.
    """
    from ipywidgets import HTML, Dropdown, HBox, Layout, VBox

    height, width = prefix.vision.patch_embed.img_size
    tiles, prompts = positive_int("tiles", tiles), list(prompts)
    count = check_tensor(
        "pictures", pictures, ("B", 3, tiles * height, tiles * width), empty=False
    )[0]
    names = [f"picture {i}" for i in range(count)] if names is None else list(names)
    if not prompts or len(names) != count:
        raise ValueError(
            f"there are {len(prompts)} prompts, and {len(names)} names for {count} pictures"
        )
    grid = tuple(-(-side // 2) for side in prefix.vision.patch_embed.grid_size)

    @lru_cache(maxsize=4)
    @torch.no_grad()
    def answer(place: int, prompt: str) -> tuple[int, list[str], Tensor]:
        """Tokens of the picture, words written, and their weights (blocks, words, rows, columns)."""
        whole = pictures[place : place + 1]
        thumbnail, local = whole, None
        if tiles > 1:
            thumbnail = F.interpolate(whole, (height, width), mode="bilinear", antialias=True)
            local = whole.unflatten(3, (tiles, width)).unflatten(2, (tiles, height))
            local = local.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (1, tiles * tiles, 3, H, W)
        seen = prefix(thumbnail, local, (tiles, tiles))
        asked = tokenizer.prompts([prompt]).to(seen.device)
        before = torch.cat((seen, language.token_embed(asked)), dim=1)
        written = language.write(before, tokenizer.context_length)[:, : tokenizer.context_length]
        with attention_maps(language) as maps:
            language(torch.cat((before, language.token_embed(written[:, :-1])), dim=1))
        # the place before a word tells it; what is drawn are the last rows of tokens, without their newlines
        rows, columns = tiles * grid[0], tiles * grid[1]
        end = seen.shape[1]
        weights = torch.stack([x[0].mean(0)[before.shape[1] - 1 :, :end] for x in maps.values()])
        weights = weights[..., end - rows * (columns + 1) :].unflatten(-1, (rows, columns + 1))
        words = [tokenizer.decode(token[None, None].cpu())[0] or "</s>" for token in written[0]]
        return end, words, weights[..., :-1].cpu()

    def show(_: object = None) -> None:
        try:
            tokens, words, weights = answer(picture.value, prompt.value)
            options = [(f"{i + 1}: {text}", i) for i, text in enumerate(words)]
            if tuple(options) != tuple(word.options):
                word.options = options  # chooses the first, which shows again
            shown = _picture(pictures[picture.value], (tiles, tiles), (height, width))
            drawn = _overlay(shown, weights[block.value, word.value])
            text = html.escape(" ".join(words[: words.index("</s>")] if "</s>" in words else words))
            result.value = _READING.format(
                tokens, html.escape(prompt.value), text, *map(_encoded, (_ruled(shown, tiles), drawn)),
                html.escape(words[word.value]),
            )  # fmt: skip
        except Exception as error:  # else an earlier answer would stand below this question
            result.value = html.escape(_what_went_wrong(error))
            raise

    def choice(description: str, options: list[tuple[str, object]]) -> Dropdown:
        menu = Dropdown(options=options, description=description)
        menu.layout = Layout(width="230px", margin="2px 12px 2px 0")
        menu.style.description_width = "62px"
        return menu

    picture = choice("Picture", [(name, i) for i, name in enumerate(names)])
    prompt = choice("Question", [(text, text) for text in prompts])
    block = choice("Block", [(f"block {i}", i) for i in range(len(language.blocks))])
    word = choice("Word", [("1", 0)])
    block.value = len(language.blocks) - 1
    result = HTML(layout=Layout(width="100%", max_width="800px", margin="4px 0"))
    show()
    for menu in (picture, prompt, block, word):
        menu.observe(show, "value")
    return VBox([HBox([picture, prompt, block, word], layout=Layout(flex_flow="row wrap")), result])


class _Maps(NamedTuple):
    """What a viewer shows: where the weights (heads, queries, N) of a picture and a layer come from."""

    grid: tuple[int, int]  # N patches
    patch: tuple[int, int]  # pixels of one
    layers: list[str]
    heads: int
    of: Callable[[int, int], Tensor]


def _given_maps(weights: Tensor, pixels: Tensor) -> _Maps:
    """Weights as they are, of one layer."""
    shape = check_tensor("weights", weights, ("B", "heads", "N", "N"), ("B", "N", "N"), empty=False)
    count, _, height, width = check_tensor("pixels", pixels, ("B", 3, "H", "W"), empty=False)
    side = math.isqrt(shape[-1])
    if shape[-2] != shape[-1] or side * side != shape[-1]:
        wanted = "its last two must be equal, and a square number of patches"
        raise ValueError(f"weights has shape {shape}; {wanted}")
    if shape[0] != count:
        raise ValueError(f"weights has maps of {shape[0]} pictures; pixels holds {count}")
    if height % side or width % side:
        raise ValueError(
            f"pictures are {height} x {width} pixels; {side} x {side} patches don't cover them, as each is as large"
        )
    finite_tensors("attention_viewer refuses", {"weights": weights})
    weights = weights.detach().float().cpu()
    weights = weights if len(shape) == 4 else weights[:, None]  # (B, heads, N, N)
    patch = height // side, width // side
    return _Maps((side, side), patch, ["weights"], weights.shape[1], lambda i, _: weights[i])


def _towers_maps(tower: VisionTransformer, pixels: Tensor) -> _Maps:
    """Those of a tower's blocks and of its pooling head."""
    tower = check_tower(tower, pixels)
    check_tensor("pixels", pixels, ("B", 3, "H", "W"))
    depth = len(tower.blocks)

    @lru_cache(maxsize=1)  # maps of all layers and pictures could fill the memory
    def weights(picture: int, layer: int) -> Tensor:
        """What patches ask, or the pooling head's query, and patches answer."""
        some = pixels[picture : picture + 1]
        with torch.no_grad(), evaluation_mode(tower, some), attention_maps(tower, [layer]) as maps:
            tower.forward_head(tower.forward_features(some))
        prefix = 0 if layer == depth else tower.num_prefix_tokens
        return next(iter(maps.values()))[0, :, prefix:, prefix:].cpu()

    grid = tower.patch_embed.dynamic_feat_size(tuple(pixels.shape[2:]))
    layers = [*(f"block {i}" for i in range(depth)), POOLING_HEAD]
    return _Maps(grid, tower.patch_embed.patch_size, layers, tower.attn_pool.num_heads, weights)


def _what_went_wrong(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _encoded(image: Image) -> str:
    return base64.b64encode(_png(image)).decode()


def _ruled(picture: Image, tiles: int) -> Image:
    """Return the picture with a line between tiles."""
    from PIL import ImageDraw

    ruled = picture.copy()
    pen = ImageDraw.Draw(ruled)
    for i in range(1, tiles):
        x, y = i * picture.width // tiles, i * picture.height // tiles
        pen.line((x, 0, x, picture.height), fill=COLOURS[1], width=3)
        pen.line((0, y, picture.width, y), fill=COLOURS[1], width=3)
    return ruled


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
