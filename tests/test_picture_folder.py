"""embed_folder: from a folder of files to vectors and to the search box."""

import re

import pytest
import torch
from comparing import assert_close, randomized
from PIL import Image

from siglip_lib import embed_folder, preprocess, search_box
from siglip_lib.siglip.model import SigLIP, SigLIPConfig
from siglip_lib.siglip.picture_folder import SUFFIXES
from siglip_lib.siglip.text import Tokenizer, train_tokenizer

SIZES = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 1, "heads": 2, "mlp_hidden": 96}
TEXT = {"text_width": 48, "text_layers": 1, "text_heads": 2, "text_mlp_hidden": 96}


@pytest.fixture
def model(device) -> SigLIP:
    config = SigLIPConfig(**SIZES, **TEXT, vocab_size=26, context_length=16)
    return randomized(SigLIP(config)).to(device)


@pytest.fixture
def folder(tmp_path):
    """Five pictures of different shapes, one of them on its side, and much that is none."""
    folder = tmp_path / "photos"
    (folder / "more.jpg").mkdir(parents=True)
    for place, name in enumerate(("b.JPG", "a.png", "d.webp", "c.tiff")):
        image = Image.effect_noise((40 + 9 * place, 30), 90).convert("RGB")
        image.save(folder / name)
    turned = Image.Exif()
    turned[0x112] = 6
    Image.linear_gradient("L").resize((50, 20)).save(folder / "e.jpeg", exif=turned)
    for name in (".hidden.jpg", "._b.JPG", "notes.txt"):
        (folder / name).write_text("no picture", encoding="utf-8")
    return folder


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_vectors_are_those_of_the_prepared_pictures_by_name(batch_size, model, folder):
    names = ["a.png", "b.JPG", "c.tiff", "d.webp", "e.jpeg"]
    found = embed_folder(model, str(folder), batch_size)
    assert found.titles == names
    pixels = preprocess([folder / name for name in names], 32).to(model.logit_scale)
    with torch.no_grad():
        assert_close({"vectors": found.vectors}, {"vectors": model.encode_image(pixels)})
    assert not found.vectors.requires_grad
    assert found.vectors.device == model.logit_scale.device


def test_pictures_open_at_their_size_and_upright(model, folder):
    _, pictures, titles = embed_folder(model, folder)
    sizes = [pictures(place).size for place in range(len(titles))]
    assert sizes == [(49, 30), (40, 30), (67, 30), (58, 30), (20, 50)]
    assert {pictures(place).mode for place in range(len(titles))} == {"RGB"}


def test_one_call_leads_to_the_search_box(model, folder, tmp_path):
    train_tokenizer(["a red apple", "two dogs", "pizza", "the moon"], tmp_path / "a.model", 22)
    tokenizer = Tokenizer(tmp_path / "a.model", 16)
    box = search_box(model, tokenizer, *embed_folder(model, folder), count=5, query="two dogs")
    titles = re.findall(r"<figcaption><div.*?>(.*?)</div>", box.children[1].value)
    assert sorted(titles) == ["a.png", "b.JPG", "c.tiff", "d.webp", "e.jpeg"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_the_models_dtype(dtype, model, folder):
    assert embed_folder(model.to(dtype), folder).vectors.dtype == dtype


def test_a_file_that_is_no_picture_is_named(model, folder):
    (folder / "bad.jpg").write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"bad\.jpg'\) can't be read as a picture"):
        embed_folder(model, folder)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "but no file at all"),
        (("a.heic", "b.HEIC", "c.txt", ".d.jpg", "README"), "but 1 .txt, 1 README, 2 .heic"),
    ],
)
def test_a_folder_without_pictures_says_what_it_holds(names, said, model, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=re.escape(said)) as caught:
        embed_folder(model, tmp_path)
    assert f"folder={str(tmp_path)!r} holds no picture (.jpg, .jpeg, .png" in str(caught.value)


def test_what_is_no_folder(model, folder):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        embed_folder(model, folder / "nowhere")
    with pytest.raises(NotADirectoryError, match=r"a\.png"):
        embed_folder(model, folder / "a.png")


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (2.0, TypeError)])
def test_batch_size_is_a_positive_int(size, error, model, tmp_path):
    with pytest.raises(error, match=f"batch_size={size}"):
        embed_folder(model, tmp_path / "none", size)


def test_a_model_that_gives_nan_is_refused(model, folder):
    with torch.no_grad():
        model.image.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the model gives NaN"):
        embed_folder(model, folder)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_of_a_format_that_is_read(suffix, model, tmp_path):
    Image.registered_extensions()
    if Image.EXTENSION[suffix] not in Image.SAVE:
        pytest.skip(f"this PIL writes no {suffix}")
    Image.new("RGB", (16, 16), "red").save(tmp_path / f"a{suffix}")
    assert embed_folder(model, tmp_path).titles == [f"a{suffix}"]
