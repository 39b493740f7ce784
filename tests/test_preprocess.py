"""Preprocessing: transformers' processors are the oracles."""

import io
import os
import re
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from transformers import SiglipImageProcessor, SiglipImageProcessorPil
from transformers.image_transforms import convert_to_rgb

from siglip_lib.classroom.plots import PICTURES, picture
from siglip_lib.data.preprocessing import FORMATS, MODES, ORIENTATION, preprocess

LEVEL = 2 / 255  # one of the 255 steps between -1 and 1
SIZES = [(1, 1), (2, 7), (40, 30), (3, 5000), (500, 333)]  # height, width
BITS_8 = [mode for mode in MODES if not mode.startswith("I;16")]


# transformers lays transparent pictures on white from some 5.x on
ON_WHITE = convert_to_rgb(Image.new("RGBA", (1, 1))).getpixel((0, 0)) == (255, 255, 255)


def theirs(image, size=384, kind=SiglipImageProcessorPil) -> torch.Tensor:
    if not ON_WHITE and ("A" in image.getbands() or "transparency" in image.info):
        pytest.skip("this version of transformers drops the alpha channel")
    height, width = size if isinstance(size, tuple) else (size, size)
    processor = kind(size={"height": height, "width": width})
    return processor(image, return_tensors="pt")["pixel_values"]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def noisy(mode: str, height: int = 20, width: int = 30) -> Image.Image:
    if mode == "1":
        return Image.fromarray(noise(height, width)).convert("1")
    if mode == "P":
        return Image.fromarray(noise(height, width, 3)).quantize(50)
    channels = 2 if mode.startswith("I;16") else len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), noise(height, width, channels).tobytes())


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("size", [384, 224, (10, 70)], ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_is_transformers(shape, size):
    image = noisy("RGB", *shape)
    assert_same(preprocess(image, size), theirs(image, size))


@pytest.mark.parametrize("size", [384, (10, 70)], ids=str)
@pytest.mark.parametrize("mode", BITS_8)
def test_is_transformers_in_each_mode(mode, size):
    image = noisy(mode)
    before = image.copy()
    assert_same(preprocess(image, size), theirs(image, size))
    assert image == before


@pytest.mark.parametrize("name", PICTURES)
def test_is_transformers_on_photographs(name):
    image = picture(name, 300)
    ours = preprocess(image)
    assert_same(ours, theirs(image))
    assert ours.shape == (1, 3, 384, 384)
    far = (ours - theirs(image, kind=SiglipImageProcessor)).abs().max().item()
    assert 0 < far < 7.01 * LEVEL


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_is_near_transformers_with_torchvision(shape):
    image = noisy("RGB", *shape)
    far = (preprocess(image) - theirs(image, kind=SiglipImageProcessor)).abs()
    assert far.max() < 27.01 * LEVEL
    assert far.mean() < 0.5 * LEVEL


def test_every_level_is_transformers():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    ours = preprocess(levels, 16)  # not resized
    assert_same(ours, theirs(Image.fromarray(levels), 16))
    assert (ours.min(), ours.max()) == (-1, 1)
    assert len(ours.unique()) == 256


def test_the_default_dtype_changes_nothing():
    expected = preprocess(noise(4, 5))
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(preprocess(noise(4, 5)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4), (3, 3, 3), (1, 1)])
def test_arrays_are_pictures(shape):
    array = noise(*shape)
    before = array.copy()
    expected = theirs(Image.fromarray(array.squeeze(2) if shape[2:] == (1,) else array))
    assert_same(preprocess(array), expected)
    assert (array == before).all()
    array.flags.writeable = False
    assert_same(preprocess(array), expected)


def test_arrays_need_not_be_contiguous():
    array = noise(3, 8, 10).transpose(1, 2, 0)[::-1, ::2]
    assert_same(preprocess(array), preprocess(array.copy()))


@pytest.mark.parametrize("transparency", [7, bytes(range(0, 250, 5))], ids=["one", "each"])
def test_palette_with_transparency(transparency):
    image = noisy("P")
    opaque = preprocess(image)
    image = Image.open(io.BytesIO(encoded(image, transparency=transparency)))
    assert image.mode == "P"
    ours = preprocess(image)
    assert_same(ours, theirs(image))
    assert not torch.equal(ours, opaque)


def test_what_is_transparent_is_white():
    array = np.zeros((2, 2, 4), np.uint8)
    assert (preprocess(array) == 1).all()
    array[..., 3] = 255
    assert (preprocess(array) == -1).all()


def png(bits: int, colour: int, row: bytes, key: bytes) -> bytes:
    """A PNG of two pixels side by side, of which PIL writes few kinds; ``key`` says what is transparent."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = bytes([0, 0, 0, 2, 0, 0, 0, 1, bits, colour, 0, 0, 0])
    palette = chunk(b"PLTE", bytes([0, 0, 0, 85, 85, 85])) if colour == 3 else b""
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette
    return start + chunk(b"tRNS", key) + pixels + chunk(b"IEND", b"")


GREY, RGB, PALETTE = 0, 2, 3
# of each the left pixel is transparent, the right one opaque and of level 85, or 0 where there is but one bit
KEYED = {
    "1 bit": png(1, GREY, b"\x80", b"\0\1"),
    "2 bits": png(2, GREY, b"\x90", b"\0\2"),
    "4 bits": png(4, GREY, b"\x35", b"\0\3"),
    "8 bits": png(8, GREY, bytes([9, 85]), b"\0\x09"),
    "16 bits": png(16, GREY, bytes([1, 44, 85, 85]), bytes([1, 44])),
    "16 bits, black": png(16, GREY, bytes([0, 0, 85, 85]), bytes([0, 0])),
    "16 bits, near": png(16, GREY, bytes([85, 84, 85, 85]), bytes([85, 84])),
    "RGB": png(8, RGB, bytes([1, 2, 3, 85, 85, 85]), bytes([0, 1, 0, 2, 0, 3])),
    "RGB, 16 bits": png(16, RGB, bytes([1, 44] * 3 + [85] * 6), bytes([1, 44] * 3)),
    "palette, one": png(8, PALETTE, bytes([0, 1]), b"\0"),
    "palette, each": png(8, PALETTE, bytes([0, 1]), b"\0\xff"),
    "palette of 4 bits": png(4, PALETTE, b"\x01", b"\0\xff"),
}


@pytest.mark.parametrize("kind", KEYED)
def test_what_a_png_calls_transparent_is_white(kind, tmp_path):
    (tmp_path / "keyed.png").write_bytes(KEYED[kind])
    expected = torch.tensor([255.0, 0 if kind == "1 bit" else 85]).expand(1, 3, 1, 2)
    opened = Image.open(tmp_path / "keyed.png")
    key = opened.info["transparency"]
    for given in (tmp_path / "keyed.png", opened):
        levels = (preprocess(given, (1, 2)) + 1) * 127.5
        torch.testing.assert_close(levels, expected)
    assert opened.info["transparency"] == key


def test_a_palette_with_alpha():
    image = Image.new("P", (2, 1))
    image.putpalette(bytes([0, 0, 0, 0, 85, 85, 85, 255]), "RGBA")
    image.putpixel((1, 0), 1)
    alike = [image, image.convert("RGBA"), image.convert("RGBA").quantize(2)]
    assert [one.mode for one in alike] == ["P", "RGBA", "P"]
    for one in alike:
        levels = (preprocess(one, (1, 2)) + 1) * 127.5
        torch.testing.assert_close(levels, torch.tensor([255.0, 85]).expand(1, 3, 1, 2))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in BITS_8])
def test_16_bits_are_scaled(mode):
    values = np.array([[0, 128, 129, 257, 30_000, 32_896, 65_406, 65_407, 65_535]])
    stored = values.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    image = Image.frombytes(mode, (9, 1), stored)
    expected = [0, 0, 1, 1, 117, 128, 254, 255, 255]  # values / 257, rounded
    assert_same(preprocess(image, (1, 9)), theirs(Image.fromarray(np.uint8([expected])), (1, 9)))


def test_16_bit_file(tmp_path):
    ramp = np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert_same(preprocess(tmp_path / "deep.png", 16), preprocess(np.uint8(ramp // 257), 16))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, kind, tmp_path):
    upright = picture("cat", 48).crop((0, 0, 48, 32))
    # how a camera held so stores the picture: what turns it back is the inverse
    store = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = upright if store is None else upright.transpose(store)
    lossless = {"WEBP": {"lossless": True, "exact": True}, "JPEG": {"quality": 100}}.get(kind, {})
    path = tmp_path / "turned"
    path.write_bytes(encoded(stored, kind, exif=exif, **lossless))
    expected = preprocess(upright)
    tolerance = 0.2 if kind == "JPEG" else 0
    torch.testing.assert_close(preprocess(path), expected, rtol=0, atol=tolerance)
    with Image.open(path) as image:
        image.load()
        before, tag = image.tobytes(), image.getexif().get(ORIENTATION)
        torch.testing.assert_close(preprocess(image), expected, rtol=0, atol=tolerance)
        assert (image.tobytes(), image.getexif().get(ORIENTATION)) == (before, tag)


def test_exif_of_a_16_bit_picture(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    deep = Image.fromarray(noise(4, 6).astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png", exif=exif)
    expected = preprocess(noise(4, 6)[::-1].T, (6, 4))
    assert_same(preprocess(tmp_path / "deep.png", (6, 4)), expected)


def turned_jpeg(*changes: tuple[int, int]) -> bytes:
    """A picture to turn by a quarter, with bytes of its EXIF block changed: tuples of place and value."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x100], exif[0x10F], exif[0x8769] = 6, 48, "maker", {0x9003: "2020"}
    block = bytearray(exif.tobytes())
    for place, value in changes:
        block[place % len(block)] = value
    return encoded(picture("cat", 48).crop((0, 0, 48, 32)), "JPEG", exif=bytes(block))


def test_a_picture_is_read_whatever_its_exif(tmp_path):
    path = tmp_path / "cat.jpg"
    with Image.open(io.BytesIO(turned_jpeg())) as image:
        pixels = np.asarray(image)
    upright, as_it_is = preprocess(np.rot90(pixels, -1), 8), preprocess(pixels, 8)
    places = np.random.default_rng(0).integers(0, [10_000, 256], (400, 2))
    seen = []
    for change in places.tolist():
        path.write_bytes(turned_jpeg(change))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, of corrupt EXIF data
            seen.append(preprocess(path, 8))
    turned = sum(torch.equal(one, upright) for one in seen)
    assert turned > 250
    assert sum(torch.equal(one, as_it_is) for one in seen) > 20


def test_exif_that_pil_cannot_write_back(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x100] = 6, 1
    block = exif.tobytes()
    as_ascii = block.replace(bytes([1, 0, 0, 4]), bytes([1, 0, 0, 2]))  # the width, as a text
    assert as_ascii != block
    stored = picture("cat", 48).crop((0, 0, 48, 32))
    (tmp_path / "cat.png").write_bytes(encoded(stored, exif=as_ascii))
    with Image.open(tmp_path / "cat.png") as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    upright = stored.transpose(Image.Transpose.ROTATE_270)
    assert_same(preprocess(tmp_path / "cat.png", 8), preprocess(upright, 8))
    (tmp_path / "cat.png").write_bytes(encoded(stored, exif=b"not EXIF"))
    assert_same(preprocess(tmp_path / "cat.png", 8), preprocess(stored, 8))


def test_batch_is_the_single_ones(tmp_path):
    path = tmp_path / "cat.png"
    picture("cat", 50).save(path)
    pictures = [path, str(path), noise(5, 9), noise(9, 5, 4), noisy("CMYK"), picture("coffee", 64)]
    expected = torch.cat([preprocess(one, (30, 40)) for one in pictures])
    assert expected.shape == (6, 3, 30, 40)
    assert_same(preprocess(pictures, (30, 40)), expected)
    assert_same(preprocess(tuple(pictures), [30, 40]), expected)
    assert_same(preprocess([path], 20), theirs(picture("cat", 50), 20))
    assert len(expected.flatten(1).unique(dim=0)) == 5  # the two paths lead to the same


def test_size_is_384_unless_told():
    assert_same(preprocess(noise(5, 9)), preprocess(noise(5, 9), (384, 384)))


def test_animation_gives_its_first_frame(tmp_path):
    first, second = noisy("P", 8, 8), noisy("P", 8, 8).transpose(Image.Transpose.ROTATE_90)
    first.save(tmp_path / "moves.gif", save_all=True, append_images=[second])
    assert_same(preprocess(tmp_path / "moves.gif", 8), theirs(first, 8))


def test_files_are_closed(tmp_path, monkeypatch):
    path, broken = tmp_path / "cat.png", tmp_path / "broken.png"
    picture("cat", 50).save(path)
    broken.write_bytes(path.read_bytes()[:200])
    files = []
    monkeypatch.setattr(
        "builtins.open", lambda *a, real=open, **k: files.append(real(*a, **k)) or files[-1]
    )
    preprocess(path)
    with pytest.raises(ValueError, match="broken"):
        preprocess(broken)
    assert [Path(file.name) for file in files] == [path, broken]
    assert all(file.closed for file in files)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        preprocess([noise(2, 2), tmp_path / "nowhere.png"])
    with pytest.raises(IsADirectoryError):
        preprocess(tmp_path)


def broken_files() -> dict[str, bytes]:
    image = picture("cat", 64)
    png, jpeg = encoded(image), encoded(image, "JPEG")
    return {
        "empty.png": b"",
        "text.jpg": b"not a picture at all\n" * 9,
        "half.png": png[: len(png) // 2],
        "half.jpg": jpeg[: len(jpeg) // 2],
        "head.jpg": jpeg[:20],
        "half.gif": (gif := encoded(image, "GIF"))[: len(gif) // 2],
        "half.tif": (tif := encoded(image, "TIFF"))[: len(tif) // 2],
        "half.webp": (webp := encoded(image, "WEBP"))[: len(webp) // 2],
        "flipped.png": png[:60] + bytes(255 - byte for byte in png[60:200]) + png[200:],
        "digits.ppm": b"P6 2 x2 255 " + bytes(12),  # here a bare ValueError
    }


@pytest.mark.parametrize("name", broken_files())
def test_broken_file(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(broken_files()[name])
    for given, prefix in ((str(path), "pictures"), ([noise(2, 2), path], "pictures[1]")):
        named = re.escape(repr(given if isinstance(given, str) else path))
        message = rf"^{re.escape(prefix)}: {named} can't be read as a picture \(\w+: .+\)$"
        with pytest.raises(ValueError, match=message):
            preprocess(given)


def test_broken_picture_that_pil_has_opened():
    image = Image.open(io.BytesIO(broken_files()["half.png"]))
    assert isinstance(image, ImageFile.ImageFile)  # its pixels are not read yet
    with pytest.raises(ValueError, match=r"^pictures: <.*PngImageFile.*> can't be read .*OSError"):
        preprocess(image)


def test_decompression_bomb(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (30, 30)).save(path)
    assert preprocess(path).shape == (1, 3, 384, 384)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(
        ValueError, match=r"^pictures: .*bomb\.png.* can't .*DecompressionBombError.*900 pixels"
    ):
        preprocess(path)


def test_more_pixels_than_pil_finds_safe(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("1", (30, 30)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    assert preprocess(path).shape == (1, 3, 384, 384)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 899)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("pixels were read"))
    message = r"^pictures: a picture of 30 x 30 has more than 899 pixels; make it smaller"
    with (
        pytest.warns(Image.DecompressionBombWarning),
        Image.open(path) as image,
        pytest.raises(ValueError, match=message),
    ):
        preprocess(image)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match=message):
        preprocess(path)


def test_other_formats_are_not_opened(tmp_path, monkeypatch):
    # Ghostscript would run what an EPS holds
    path = tmp_path / "cat.jpg"
    path.write_bytes(encoded(picture("cat", 16), "EPS"))
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(ValueError, match=r"none of JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, AVIF;"):
        preprocess(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind, tmp_path):
    stored = picture("cat", 48)
    (tmp_path / "cat").write_bytes(encoded(stored, kind))
    torch.testing.assert_close(
        preprocess(tmp_path / "cat", 8), preprocess(stored, 8), rtol=0, atol=0.1
    )


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "cat.png")
    for path in (tmp_path / "cat.png", os.devnull):
        message = f"^pictures: {re.escape(repr(path))} is no regular file$"
        with pytest.raises(ValueError, match=message):
            preprocess(path)


HINT = "from floats in [0, 1]: (x * 255).round().astype('uint8')"
ALLOWED = "must be a path, a PIL picture or a uint8 array"
SHAPES = "must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) with at least one pixel"
REFUSED = [
    (np.zeros((2, 2)), TypeError, f"ndarray of float64 {ALLOWED}; {HINT}"),
    (np.zeros((2, 2, 3), np.float32), TypeError, f"ndarray of float32 {ALLOWED}; {HINT}"),
    (
        np.zeros((2, 2), np.uint16),
        TypeError,
        f"ndarray of uint16 {ALLOWED}; from integers in 0..255: x.astype('uint8')",
    ),
    (np.zeros((2, 2), bool), TypeError, f"ndarray of bool {ALLOWED}; {HINT}"),
    (
        torch.zeros(3, 2, 2),
        TypeError,
        f"Tensor of torch.float32 {ALLOWED}; from floats in [0, 1]: x = x.permute(1, 2, 0).numpy(), "
        "then (x * 255).round().astype('uint8')",
    ),
    (
        torch.zeros(3, 2, 2, dtype=torch.uint8),
        TypeError,
        f"Tensor of torch.uint8 {ALLOWED}; from (3, H, W): x.permute(1, 2, 0).numpy()",
    ),
    (None, TypeError, f"NoneType {ALLOWED}"),
    (b"cat.png", TypeError, f"bytes {ALLOWED}"),
    ({1: 2}, TypeError, f"dict {ALLOWED}"),
    (iter([]), TypeError, f"list_iterator {ALLOWED}"),
    (noise(4), ValueError, f"an array of shape (4,) {SHAPES}"),
    (noise(3, 4, 5), ValueError, f"an array of shape (3, 4, 5) {SHAPES}"),
    (noise(4, 5, 2), ValueError, f"an array of shape (4, 5, 2) {SHAPES}"),
    (noise(2, 4, 5, 3), ValueError, f"an array of shape (2, 4, 5, 3) {SHAPES}"),
    (noise(0, 5), ValueError, f"an array of shape (0, 5) {SHAPES}"),
    (noise(5, 0, 3), ValueError, f"an array of shape (5, 0, 3) {SHAPES}"),
    (noise(5, 4, 0), ValueError, f"an array of shape (5, 4, 0) {SHAPES}"),
    (Image.new("RGB", (0, 5)), ValueError, "a picture of 0 x 5 has no pixels"),
    *(
        (Image.new(mode, (2, 2)), ValueError, f"a picture of mode '{mode}' must be of 1, L, LA, P,")
        for mode in ("F", "I", "La", "RGBa")
    ),
]


@pytest.mark.parametrize(("given", "kind", "message"), REFUSED, ids=[m[:30] for *_, m in REFUSED])
def test_refused(given, kind, message, monkeypatch):
    with pytest.raises(kind, match="^" + re.escape(f"pictures: {message}")):
        preprocess(given)
    # before any work: neither the file nor the picture before it is looked at
    module = sys.modules["siglip_lib.data.preprocessing"]
    monkeypatch.setattr(module, "upright_rgb", lambda *_: pytest.fail("work was done"))
    with pytest.raises(kind, match="^" + re.escape(f"pictures[3]: {message}")):
        preprocess([noise(2, 2), "nowhere.png", noisy("L"), given, None])


@pytest.mark.parametrize("mode", ["F", "I"])
def test_refused_mode_in_a_file(mode, tmp_path):
    Image.new(mode, (2, 2)).save(tmp_path / "deep.tif")
    message = rf"^pictures\[0\]: a picture of mode '{mode}' .* and use image\.convert\('L'\)$"
    with pytest.raises(ValueError, match=message):
        preprocess([tmp_path / "deep.tif"])


@pytest.mark.parametrize("several", [[], ()], ids=str)
def test_no_pictures(several):
    message = f"pictures={several} is empty; it must hold at least one picture"
    with pytest.raises(ValueError, match=re.escape(message)):
        preprocess(several)


def test_nested_lists_are_refused():
    with pytest.raises(TypeError, match=r"pictures\[0\]: list must be a path"):
        preprocess([[noise(2, 2)]])


@pytest.mark.parametrize(
    ("size", "kind", "message"),
    [
        (0, ValueError, "image_size=0 must be at least 1"),
        ((5, -1), ValueError, "image_size=-1 must be at least 1"),
        ((5,), ValueError, "image_size=(5,) must be one int or two: height and width"),
        ((5, 5, 3), ValueError, "image_size=(5, 5, 3) must be one int or two: height and width"),
        (384.0, TypeError, "image_size=384.0 must be an int, not float"),
        (True, TypeError, "image_size=True must be an int, not bool"),
        ("384", TypeError, "image_size='384' must be an int, not str"),
        (None, TypeError, "image_size=None must be an int, not NoneType"),
    ],
    ids=str,
)
def test_refused_sizes(size, kind, message):
    with pytest.raises(kind, match="^" + re.escape(message)):
        preprocess(os.devnull, size)  # no picture: the size is looked at first
