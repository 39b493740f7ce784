"""The widgets without a browser: what a value that is set changes, held against the search and the maps themselves."""

import base64
import html
import io
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparing import randomized
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn

from siglip_lib import VisionTransformer, attention_maps, attention_viewer, search_box
from siglip_lib.classroom.widgets import caption_viewer
from siglip_lib.siglip.model import SigLIP, SigLIPConfig, embed_texts
from siglip_lib.siglip.text import Tokenizer, train_tokenizer
from siglip_lib.vl import LanguageModel, VisualPrefix

TITLES = ["a red apple", "two dogs", "pizza & cheese", '<i>the "moon"</i>', "a cat", "a rocket"]
# of different widths and colours
PICTURES = [Image.new("RGB", (30 + 90 * i, 40), (40 * i, 200 - 30 * i, 7)) for i in range(6)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    train_tokenizer(TITLES, path, 26)
    return Tokenizer(path, 16)


@pytest.fixture
def model(device) -> SigLIP:
    sizes = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 1, "heads": 2}
    text = {"text_width": 48, "text_layers": 1, "text_heads": 2, "text_mlp_hidden": 96}
    config = SigLIPConfig(**sizes, **text, mlp_hidden=96, vocab_size=26, context_length=16)
    return randomized(SigLIP(config)).to(device)


@pytest.fixture
def vectors(model, tokenizer) -> Tensor:
    """Those of the titles, so that each title finds its own picture, with a cosine of 1."""
    return embed_texts(model, tokenizer, TITLES)


def shown(box) -> list[tuple[Image.Image, str, str, float]]:
    """Picture, alternative text, title and cosine of each result."""
    pattern = r'base64,(.*?)" alt="(.*?)".*?<figcaption><div.*?>(.*?)</div>(.*?)</figcaption>'
    return [
        (
            Image.open(io.BytesIO(base64.b64decode(data))),
            html.unescape(alt),
            html.unescape(title),
            float(cosine),
        )
        for data, alt, title, cosine in re.findall(pattern, box.children[1].value)
    ]


def test_results_follow_what_is_typed(model, tokenizer, vectors):
    box = search_box(model, tokenizer, vectors, PICTURES.__getitem__, TITLES, count=4)
    assert box.children[1].value == "Type what a picture shows."
    for place, title in enumerate(TITLES):
        box.children[0].value = title
        cosines, places = (vectors @ vectors[place]).cpu().topk(4)
        pictures, alts, titles, numbers = zip(*shown(box), strict=True)
        assert titles[0] == title
        assert list(titles) == list(alts) == [TITLES[i] for i in places]
        assert numbers == pytest.approx(cosines.tolist(), abs=0.006)
        assert [p.getpixel((0, 0)) for p in pictures] == [
            PICTURES[i].getpixel((0, 0)) for i in places
        ]
    box.children[0].value = " ?! "  # no word
    assert box.children[1].value == "Type what a picture shows."


def test_a_query_from_the_start_and_no_titles(model, tokenizer, vectors):
    box = search_box(model, tokenizer, vectors, PICTURES.__getitem__, count=1, query=TITLES[3])
    assert box.children[0].value == TITLES[3]
    [(_, alt, title, cosine)] = shown(box)
    assert (alt, title, cosine) == ("picture 3", "", 1)


def test_large_pictures_become_small_ones(model, tokenizer, vectors):
    box = search_box(model, tokenizer, vectors, PICTURES.__getitem__, TITLES, count=6, query="moon")
    sizes = {title: picture.size for picture, _, title, _ in shown(box)}
    assert sizes[TITLES[0]] == (30, 40)
    assert sizes[TITLES[5]] == (192, 16)
    assert PICTURES[5].size == (480, 40)  # the caller's own


def test_vectors_of_another_dtype(model, tokenizer, vectors):
    box = search_box(
        model, tokenizer, vectors.bfloat16().cpu(), PICTURES.__getitem__, TITLES, query=TITLES[1], count=1
    )  # fmt: skip
    assert [title for _, _, title, _ in shown(box)] == [TITLES[1]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vectors": torch.ones(6, 24)}, ValueError, "has shape (6, 24); it must be (n, 48)"),
        ({"vectors": torch.ones(48)}, ValueError, "vectors has shape (48,); it must be (n, 48)"),
        ({"vectors": torch.ones(0, 48)}, ValueError, "vectors has shape (0, 48)"),
        ({"vectors": torch.ones(6, 48)}, ValueError, "vectors holds one whose length is not 1"),
        (
            {"vectors": torch.full((6, 48), torch.nan)},
            ValueError,
            "NaN or infinite elements in vec",
        ),
        ({"pictures": PICTURES}, TypeError, "pictures is a list; it must be a function from a"),
        ({"titles": TITLES[:5]}, ValueError, "titles has 5 entries; vectors has 6"),
        ({"count": 7}, ValueError, "count=7 must be at most 6, the number of pictures"),
        ({"count": 0}, ValueError, "count=0 must be at least 1"),
        ({"count": 2.0}, TypeError, "count=2.0 must be an int, not float"),
    ],
)
def test_search_box_refuses(model, tokenizer, vectors, change, error, message):
    good = {"vectors": vectors, "pictures": PICTURES.__getitem__, "titles": TITLES, "count": 6}
    with pytest.raises(error, match=re.escape(message)):
        search_box(model, tokenizer, **(good | change), query="a cat")


def test_an_error_takes_the_place_of_the_results(model, tokenizer, vectors):
    def pictures(place: int) -> Image.Image:
        if place == 1:
            raise OSError("<picture> 1 is gone")
        return PICTURES[place]

    box = search_box(model, tokenizer, vectors, pictures, TITLES, count=1, query=TITLES[0])
    field, results = box.children
    assert TITLES[0] in results.value
    with pytest.raises(OSError, match="gone"):
        field.value = TITLES[1]
    assert results.value == "OSError: &lt;picture&gt; 1 is gone"
    with pytest.raises(ValueError, match="half of a character"):
        field.value = "a \ud83d cat"
    assert results.value.startswith("ValueError: texts[0]=")
    field.value = TITLES[2]
    assert [title for _, _, title, _ in shown(box)] == [TITLES[2]]
    with torch.no_grad():
        model.text.head.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="the model gives NaN"):
        field.value = TITLES[3]
    assert results.value.startswith("ValueError: the model gives NaN")


# --- attention_viewer ---

PIXELS = torch.stack([torch.full((3, 24, 32), value) for value in (-1.0, 1.0)])  # 3 by 4 patches


def make(**options: object) -> VisionTransformer:
    options = {
        "img_size": (24, 32),
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "class_token": False,
        "global_pool": "map",
        "num_classes": 0,
    } | options
    return randomized(VisionTransformer(**options))


def parts(viewer) -> tuple:
    choices, picker = viewer.children
    return (*choices.children, picker)


def image(picker) -> np.ndarray:
    """What lies under the reader's eyes, (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(picker.image))).astype(float)


def assert_shows(picker, grey: float, weights: Tensor) -> None:
    """Each of 3 by 4 patches has one colour: that of its weight, on grey."""
    weights = weights.cpu().double().view(3, 4)
    low, high = weights.min().item(), weights.max().item()
    colours = 255 * colormaps["viridis"](((weights - low) / (high - low)).numpy())[..., :3]
    expected = 0.4 * grey + 0.6 * colours
    assert image(picker).shape == (24 * 12, 32 * 12, 3)
    expected = expected.repeat(96, axis=0).repeat(96, axis=1)
    assert np.abs(image(picker) - expected).max() < 3.5  # neighbours among 256 colours, rounded
    assert f"from {low:.3f} (violet) to {high:.3f} (yellow)" in picker.caption


def test_a_compiled_tower_shows_the_same():
    tower = make().eval()
    expected = parts(attention_viewer(tower, PIXELS))[-1]
    compiled = torch.compile(tower, backend="eager")
    with torch.no_grad():
        compiled(PIXELS[:1])
    found = parts(attention_viewer(compiled, PIXELS))[-1]
    assert (found.image, found.caption) == (expected.image, expected.caption)


@pytest.mark.parametrize("options", [{}, {"class_token": True, "reg_tokens": 2}], ids=str)
def test_the_overlay_is_the_map_that_was_chosen(options, device):
    tower, pixels = make(**options, patch_drop_rate=0.5).to(device), PIXELS.to(device)
    prefix = tower.num_prefix_tokens
    with attention_maps(tower.eval()) as maps, torch.no_grad():
        tower(pixels)
    maps = [weights[..., -12:] for weights in maps.values()]  # (B, heads, queries, patches)
    tower.train()
    viewer = attention_viewer(tower, pixels, names=["black", "white"])
    picture, layer, head, picker = parts(viewer)
    assert [o for o, _ in picture.options] == ["black", "white"]
    assert [o for o, _ in layer.options] == ["block 0", "block 1", "pooling head"]
    assert [o for o, _ in head.options] == ["mean", "head 0", "head 1", "head 2"]
    assert (picker.rows, picker.columns, picker.picked) == (3, 4, 6)
    assert_shows(picker, 0, maps[1][0, :, prefix + 6].mean(0))

    picker.picked = 11
    assert picker.caption.startswith("The patch in row 3, column 4 attends to")
    assert_shows(picker, 0, maps[1][0, :, prefix + 11].mean(0))
    head.value = 2
    assert_shows(picker, 0, maps[1][0, 2, prefix + 11])
    layer.value = 0
    assert_shows(picker, 0, maps[0][0, 2, prefix + 11])
    picture.value = 1
    assert_shows(picker, 255, maps[0][1, 2, prefix + 11])
    assert picker.clickable

    layer.value = 2
    assert_shows(picker, 255, maps[2][1, 2, 0])
    assert not picker.clickable
    assert picker.caption.startswith("The pooling head has one query, which no click changes.")
    before = picker.image
    picker.picked = 0
    assert picker.image == before
    head.value = -1
    assert_shows(picker, 255, maps[2][1, :, 0].mean(0))
    assert tower.training


def test_a_click_does_not_run_the_tower():
    tower, runs = make(), []
    tower.patch_embed.register_forward_hook(lambda *_: runs.append(1))
    _, layer, head, picker = parts(attention_viewer(tower, PIXELS))
    for picked in range(12):
        picker.picked = picked
    head.value = 1
    assert len(runs) == 1
    layer.value = 0
    assert len(runs) == 2


def test_an_error_takes_the_place_of_the_map():
    tower, broken = make(), []

    def stop(*_: object) -> None:
        if broken:
            raise RuntimeError("out of memory")

    tower.blocks[0].register_forward_hook(stop)
    _, layer, head, picker = parts(attention_viewer(tower, PIXELS))
    before = picker.image
    broken.append(1)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer.value = 0
    found = picker.image, picker.caption, picker.clickable
    assert found == (b"", "RuntimeError: out of memory", False)
    broken.clear()
    layer.value = 1
    assert (picker.image, picker.clickable) == (before, True)
    head.value = 1
    assert picker.image != before


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((24, 32), {}),
        ((29, 35), {}),  # pixels beyond the last whole patch
        ((21, 27), {"dynamic_img_pad": True}),
        ((24, 32), {"img_size": 16, "dynamic_img_size": True}),
    ],
    ids=str,
)
def test_the_picture_under_the_map_is_what_the_patches_cover(size, options):
    tower = make(**({"img_size": size} | options))
    for parameter in tower.blocks[1].attn.qkv.parameters():
        nn.init.zeros_(parameter)  # the same weight for every patch: violet
    white = torch.zeros(3, 4, dtype=torch.bool)
    white[0, 1] = white[2, 3] = white[1, 0] = True
    pixels = torch.ones(1, 3, 32, 40)
    pixels[:, :, :24, :32] = (2.0 * white - 1).repeat_interleave(8, 0).repeat_interleave(8, 1)
    *_, picker = parts(attention_viewer(tower, pixels[:, :, : size[0], : size[1]]))
    found = image(picker)[..., 1]
    assert found.shape == (24 * 12, 32 * 12)
    assert ((found[12::96, 12::96] > 60) == white.numpy()).all()
    violet = 0.6 * 255 * colormaps["viridis"](0)[1]
    beyond = 127.5 if size[1] < 32 else 255  # zeros that fill a patch up are grey
    assert found[-1, -1] == pytest.approx(violet + 0.4 * beyond, abs=1.5)


def test_large_pictures_keep_their_size():
    tower = make(img_size=896, patch_size=112)
    *_, picker = parts(attention_viewer(tower, torch.randn(1, 3, 896, 896)))
    assert image(picker).shape == (896, 896, 3)


def test_the_text_that_a_notebook_stores_is_always_the_same(model, tokenizer, vectors):
    def stored(widget) -> str:
        return widget._repr_mimebundle_()["text/plain"]

    def both() -> Sequence[str]:
        box = search_box(model, tokenizer, vectors, PICTURES.__getitem__, query="a cat", count=2)
        return stored(box), stored(attention_viewer(make(), PIXELS))

    assert both() == both()


@pytest.mark.parametrize(
    ("options", "pixels", "names", "message"),
    [
        ({"global_pool": "avg"}, PIXELS, None, "these maps need a pooling head, 'map'"),
        ({}, PIXELS[0], None, "pixels has shape (3, 24, 32); it must be (B, C, H, W)"),
        ({"in_chans": 1}, PIXELS[:, :1], None, "shape (2, 1, 24, 32); it must be (B, 3, H, W)"),
        ({}, PIXELS[..., :24], None, "pictures are 24 x 24 pixels, the model is built for"),
        ({}, PIXELS, ["black"], "names has 1 entries; pixels holds 2 pictures"),
    ],
)
def test_attention_viewer_refuses(options, pixels, names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attention_viewer(make(**options), pixels, names=names)


def test_attention_viewer_refuses_what_is_no_tower():
    with pytest.raises(TypeError, match="tower is a Linear; it must be a VisionTransformer"):
        attention_viewer(nn.Linear(2, 2), PIXELS)


# --- attention_viewer, of weights alone ---

GIVEN = torch.stack([torch.zeros(3, 24, 16), torch.ones(3, 24, 16)])  # 2 by 2 patches of 12 by 8


def assert_shows_two_by_two(picker, weights: Tensor) -> None:
    """Four patches in the colours of their weights, on the grey of a picture of zeros."""
    low, high = weights.min().item(), weights.max().item()
    shades = ((weights.double().view(2, 2) - low) / (high - low)).numpy()
    expected = 0.4 * 127.5 + 0.6 * 255 * colormaps["viridis"](shades)[..., :3]
    found = image(picker)
    assert found.shape == (24 * 16, 16 * 16, 3)
    expected = expected.repeat(found.shape[0] // 2, axis=0).repeat(found.shape[1] // 2, axis=1)
    assert np.abs(found - expected).max() < 3.5
    assert f"from {low:.3f} (violet) to {high:.3f} (yellow)" in picker.caption


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_alone(dtype, device):
    weights = torch.rand(2, 4, 4).softmax(-1).to(device, dtype).requires_grad_()
    viewer = attention_viewer(weights, GIVEN, names=["grey", "white"])
    picture, picker = parts(viewer)
    assert [o for o, _ in picture.options] == ["grey", "white"]
    assert (picker.rows, picker.columns, picker.picked, picker.clickable) == (2, 2, 3, True)
    shown = weights.detach().float().cpu()
    for picked in (3, 0, 1, 2):
        picker.picked = picked
        place = f"row {picked // 2 + 1}, column {picked % 2 + 1}"
        assert picker.caption.startswith(f"The patch in {place} attends to patches with")
        assert_shows_two_by_two(picker, shown[0, picked])
    before = picker.image
    picture.value = 1
    assert picker.image != before
    assert f"to {shown[1, 2].max():.3f} (yellow)" in picker.caption


def test_weights_of_heads_and_one_picture():
    weights = torch.rand(1, 3, 4, 4)
    head, picker = parts(attention_viewer(weights, GIVEN[:1]))
    assert [o for o, _ in head.options] == ["mean", "head 0", "head 1", "head 2"]
    assert_shows_two_by_two(picker, weights[0, :, 3].mean(0))
    head.value = 1
    assert_shows_two_by_two(picker, weights[0, 1, 3])


def test_one_map_of_one_picture_has_no_menus():
    [picker] = parts(attention_viewer(torch.rand(1, 4, 4), GIVEN[:1]))
    assert picker.clickable


@pytest.mark.parametrize(
    ("weights", "pixels", "names", "error", "message"),
    [
        (torch.rand(4, 4), GIVEN, None, ValueError, "weights has shape (4, 4); it must be (B, heads, N, N) or"),
        (torch.rand(2, 4, 9), GIVEN, None, ValueError, "(2, 4, 9); its last two must be equal, and a square"),
        (torch.rand(2, 8, 8), GIVEN, None, ValueError, "(2, 8, 8); its last two must be equal, and a square"),
        (torch.rand(3, 4, 4), GIVEN, None, ValueError, "weights has maps of 3 pictures; pixels holds 2"),
        (torch.rand(2, 9, 9), GIVEN, None, ValueError, "pictures are 24 x 16 pixels; 3 x 3 patches don't"),
        (torch.rand(2, 4, 4), GIVEN[0], None, ValueError, "pixels has shape (3, 24, 16); it must be (B, 3, H,"),
        (torch.rand(2, 4, 4) / 0, GIVEN, None, ValueError, "attention_viewer refuses NaN or infinite elements"),
        (torch.ones(2, 4, 4).long(), GIVEN, None, TypeError, "weights is torch.int64; it must be of float16"),
        (torch.rand(2, 4, 4), GIVEN, ["a"], ValueError, "names has 1 entries; pixels holds 2 pictures"),
    ],
)  # fmt: skip
def test_attention_viewer_refuses_weights(weights, pixels, names, error, message):
    with pytest.raises(error, match=re.escape(message)):
        attention_viewer(weights, pixels, names=names)


# --- caption_viewer ---


@pytest.fixture
def parts_of_captioner(device) -> tuple[VisualPrefix, LanguageModel]:
    torch.manual_seed(0)
    tower = make(img_size=(24, 40))  # 3 x 5 patches, so 2 x 3 tokens a tile
    language = LanguageModel(vocab_size=26, width=12, depth=2, num_heads=3)
    prefix, language = randomized(VisualPrefix(tower, 12)), randomized(language)
    return prefix.to(device).eval(), language.to(device).eval()


def pictures_in(value: str) -> list[np.ndarray]:
    found = re.findall(r"base64,(.*?)\"", value)
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(float) for data in found
    ]


@pytest.mark.parametrize(("tiles", "tokens"), [(1, 2 * 4), (2, 2 * 4 + 1 + 4 * 7)])
def test_a_caption_and_where_its_words_look(parts_of_captioner, tokenizer, device, tiles, tokens):
    prefix, language = parts_of_captioner
    pixels = torch.rand(3, 3, 24 * tiles, 40 * tiles, device=device) * 2 - 1
    prompts = ["a cat", "two dogs"]
    box = caption_viewer(
        prefix, language, tokenizer, pixels, prompts, tiles=tiles, names=["a", "b", "<c>"]
    )
    menus, result = box.children
    picture, prompt, block, word = menus.children
    picture.value, prompt.value, block.value = 1, "two dogs", 0
    thumbnail, local = pixels[1:2], None
    if tiles > 1:
        thumbnail = F.interpolate(thumbnail, (24, 40), mode="bilinear", antialias=True)
        local = torch.stack(
            [
                pixels[1, :, 24 * i : 24 * i + 24, 40 * j : 40 * j + 40]
                for i in range(2)
                for j in range(2)
            ]
        )[None]
    with torch.no_grad():
        seen = prefix(thumbnail, local, (tiles, tiles))
        before = torch.cat(
            (seen, language.token_embed(tokenizer.prompts(["two dogs"]).to(device))), 1
        )
        written = language.write(before, 16)
        with attention_maps(language, [0]) as maps:
            language(torch.cat((before, language.token_embed(written[:, :-1])), 1))
    assert seen.shape[1] == tokens
    assert f"becomes {tokens} tokens. <b>two dogs?</b>" in result.value
    assert len(word.options) == written.shape[1]
    word.value = len(word.options) - 1
    (weights,) = maps.values()
    row = weights[0].mean(0)[-1, tokens - 2 * tiles * (3 * tiles + 1) : tokens]
    map_ = row.view(2 * tiles, 3 * tiles + 1)[:, :-1].cpu()
    _, drawn = pictures_in(result.value)
    shade = (map_ - map_.min()) / (map_.max() - map_.min())
    brightest, height, width = divmod(int(shade.argmax()), 3 * tiles), *drawn.shape[:2]
    cell = drawn[
        brightest[0] * height // (2 * tiles) + 2 : (brightest[0] + 1) * height // (2 * tiles) - 2,
        brightest[1] * width // (3 * tiles) + 2 : (brightest[1] + 1) * width // (3 * tiles) - 2,
    ]  # fmt: skip
    grey = cell.mean((0, 1)) - 0.6 * 255 * np.array(colormaps["viridis"](1.0)[:3])
    assert np.ptp(grey) < 2  # what is left is the picture's grey


def test_caption_viewer_refuses(parts_of_captioner, tokenizer, device):
    pixels = torch.zeros(2, 3, 24, 40, device=device)
    for change, said in (
        ({"tiles": 2}, "pictures has shape"),
        ({"prompts": []}, "there are 0 prompts"),
        ({"names": ["one"]}, "1 names for 2 pictures"),
    ):
        good = dict(pictures=pixels, prompts=["a cat"])
        with pytest.raises(ValueError, match=said):
            caption_viewer(*parts_of_captioner, tokenizer, **(good | change))


def test_an_error_takes_the_place_of_the_caption(parts_of_captioner, tokenizer, device):
    pixels = torch.zeros(2, 3, 24, 40, device=device)
    box = caption_viewer(*parts_of_captioner, tokenizer, pixels, ["a cat", "a moon"])
    parts_of_captioner[1].token_embed.weight.data = torch.zeros(26, 11, device=device)
    with pytest.raises(RuntimeError):
        box.children[0].children[1].value = "a moon"
    assert box.children[1].value.startswith("RuntimeError: ")
