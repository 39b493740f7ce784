"""Stills of the notebooks' widgets: what each shows at first, made by the widget itself with the weights that ship."""

from __future__ import annotations

import base64
import html
import math
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from ipywidgets import HBox, VBox
from safetensors.torch import load_file
from torch import Tensor

from siglip_lib import (
    attention_viewer,
    embed_folder,
    load_emoji64,
    load_siglip,
    make_scenes,
    picture,
    search_box,
)
from siglip_lib.classroom.widgets import caption_viewer
from siglip_lib.data import Emoji64, split
from siglip_lib.evaluate import Scenes
from siglip_lib.siglip import EMOJI64_VECTORS, EMOJI64_WEIGHTS, SigLIP, Tokenizer
from siglip_lib.train.captioning import load_captioner
from siglip_lib.train.questions import QUESTION, Questions, questions

PHOTOS = ("cat", "coffee", "astronaut")


@cache
def shipped() -> tuple[SigLIP, Tokenizer, Emoji64, Tensor]:
    """The SigLIP that ships, its tokenizer, the pictures and their vectors (5094, 128)."""
    model, tokenizer = load_siglip(EMOJI64_WEIGHTS)
    vectors = load_file(EMOJI64_VECTORS)["pictures"].float()
    return model.eval(), tokenizer, load_emoji64(), vectors


@cache
def scenes() -> Scenes:
    """Notebook 11's 400 scenes of four drawings that no training saw."""
    emoji = shipped()[2]
    seen = split(emoji).seen
    drawn = torch.Generator().manual_seed(0)
    return make_scenes(emoji.pictures[seen], emoji.concept[seen], 400, size=64, generator=drawn)


def scene_names(number: int) -> list[str]:
    names = shipped()[2].names
    return [" · ".join(names[i] for i in row) for row in scenes().concept[:number].tolist()]


def all_drawings() -> str:
    model, tokenizer, emoji, vectors = shipped()
    titles = [emoji.names[place] for place in emoji.concept]
    return _search(
        search_box(model, tokenizer, vectors, emoji.picture, titles, query="a red apple")
    )


def held_out_drawings() -> str:
    model, tokenizer, emoji, vectors = shipped()
    parts = split(emoji)
    places = torch.cat((parts.seen, parts.unseen))
    titles = [emoji.names[i] for i in emoji.concept[places]]

    def drawing(i: int):
        return emoji.picture(int(places[i]))

    return _search(
        search_box(model, tokenizer, vectors[places], drawing, titles, query="a red apple")
    )


def folder_of_pictures() -> str:
    """Notebook 08's album: nine drawings and three photographs, as files."""
    model, tokenizer, emoji, _ = shipped()
    drawn = (
        "red apple",
        "pizza",
        "rocket",
        "umbrella",
        "bicycle",
        "snowman",
        "house",
        "sunflower",
        "elephant",
    )
    twemoji = emoji.vendor == emoji.vendors.index("twemoji")
    with tempfile.TemporaryDirectory() as album:
        for name in drawn:
            place = (twemoji & (emoji.concept == emoji.names.index(name))).nonzero().item()
            emoji.picture(place).save(Path(album, f"{name}.png"))
        for name in PHOTOS:
            picture(name).save(Path(album, f"{name}.jpg"))
        found = embed_folder(model, album)
        return _search(search_box(model, tokenizer, *found, count=4, query="a bicycle"))


def photographs() -> str:
    """Notebook 03's photographs, whose normalised patches are queries and keys."""
    photos = [np.array(picture(name).crop((0, 0, 378, 378))) for name in PHOTOS]
    pixels = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2) / 127.5 - 1  # (3, 3, 378, 378)
    x = F.unfold((pixels + 1) / 2, 14, stride=14).mT  # (3, 729, 588)
    x = math.sqrt(588) * F.normalize(x - x.mean(dim=1, keepdim=True), dim=-1)
    weights = (x @ x.mT / math.sqrt(588)).softmax(dim=-1)  # (3, 729, 729)
    return _viewer(attention_viewer(weights.clamp(max=20 / 729), pixels, names=PHOTOS))


def four_drawings() -> str:
    return _viewer(attention_viewer(shipped()[0].image, scenes().pixels[:8], names=scene_names(8)))


def captioned_scene() -> str:
    """Notebook 15's captioner, its first scene of sixteen by tiles, its first question and the block that it sets."""
    captioner, emoji = load_captioner(shipped()[0].image), shipped()[2]
    tokenizer = Tokenizer(EMOJI64_WEIGHTS / "spiece.model", QUESTION)
    crowd = Questions(emoji, split(emoji).seen, tokenizer, grids=(4,), batch=32, tiles=4)
    ((pixels, _),) = crowd.scenes(0)
    box = caption_viewer(
        captioner.prefix, captioner.language, tokenizer, pixels, questions(4), tiles=4
    )
    menus, result = box.children
    menus.children[2].value = 1
    return _still(
        _chosen(menus) + result.value,
        "What a captioner reads and writes, as it stands at first. In a running notebook picture, question, block and "
        "word can be chosen.",
    )


# by the id of the cell that shows the widget
STILLS: dict[str, Callable[[], str]] = {
    "96a1f978": all_drawings,
    "click-a-patch": photographs,
    "1ad1e967": folder_of_pictures,
    "4b258179": held_out_drawings,
    "c11-016": four_drawings,
    "c15-075": captioned_scene,
}


def _search(box: VBox) -> str:
    field, results = box.children
    typed = html.escape(field.value)
    return _still(
        f'<p class="still-field"><span>{field.description} <span>{typed}</span></span></p>{results.value}',
        'A search, as it stands at first. In a running notebook its text can be changed; here, <a href="../try.html">'
        "search in your browser</a>.",
    )


def _viewer(box: VBox) -> str:
    menus, picker = box.children
    rows, columns = divmod(picker.picked, picker.columns)
    place = (
        f"left: {100 * columns / picker.columns}%; top: {100 * rows / picker.rows}%; "
        f"width: {100 / picker.columns}%; height: {100 / picker.rows}%"
    )
    data, caption = base64.b64encode(picker.image).decode(), html.escape(picker.caption)
    return _still(
        f'{_chosen(menus)}<div class="still-picture">'
        f'<img alt="{caption}" src="data:image/png;base64,{data}"><span style="{place}"></span></div><p>{caption}</p>',
        "A viewer of attention, as it stands at first. In a running notebook every patch can be clicked; here, "
        '<a href="../try.html#where-it-looks">click in your browser</a>.',
    )


def _chosen(menus: HBox) -> str:
    """What stands in a viewer's menus."""
    chosen = "".join(
        f"<span>{menu.description} <span>{html.escape(menu.label)}</span></span> "
        for menu in menus.children
    )
    return f'<p class="still-field">{chosen}</p>'


def _still(content: str, caption: str) -> str:
    return f'<div class="still">{content}<p class="still-note">{caption}</p></div>'
