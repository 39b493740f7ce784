"""What the page "Try it" loads: text tower, tokenizer, pictures with their vectors, and maps, each of its own file.

Every file is gzip-compressed here, as not every host of static files compresses what it sends. ``files.json`` tells
their sizes, so that the page can say beforehand how much it will load.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, colors
from PIL import Image
from sentencepiece import sentencepiece_model_pb2
from stills import scene_names, scenes, shipped
from torch import Tensor, nn

from siglip_lib import attention_maps
from siglip_lib.data import split
from siglip_lib.siglip import SigLIP

RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
SCENES = 3
COLUMNS = 30  # pictures in a row of the sheet
SIDE = 384  # pixels of a scene


class TextTower(nn.Module):
    """Token ids (1, 16) to a unit vector (1, 128)."""

    def __init__(self, model: SigLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.model.text(tokens), dim=-1)


def lay_out_demo(folder: Path, modules: Path) -> None:
    """Write all that the page loads into ``folder``; onnxruntime-web is taken from ``modules``."""
    folder.mkdir(parents=True)
    runtime = {name: (modules / "onnxruntime-web/dist" / name).read_bytes() for name in RUNTIME}
    script, binary = runtime.values()
    (folder / "ort.mjs").write_bytes(script.partition(b"\n//# sourceMappingURL")[0])
    search = {
        "runtime": binary,
        "model": text_tower(),
        "tokenizer": tokenizer(),
        "vectors": vectors(),
        "sheet": sheet(),
    }
    files = {"search": search, "maps": {"maps": maps(), **pictures_of_scenes()}}
    sizes = {
        group: {name: _write(folder / f"{name}.gz", data) for name, data in some.items()}
        for group, some in files.items()
    }
    sizes["search"]["script"] = (folder / "ort.mjs").stat().st_size
    (folder / "files.json").write_text(json.dumps({"sizes": sizes} | facts()), encoding="utf-8")


def facts() -> dict:
    """What the page needs to know of pictures and maps."""
    model, _, emoji, _ = shipped()
    held_out, unseen = held_out_pictures()
    tower = model.image
    return {
        "names": [emoji.names[i] for i in emoji.concept[held_out]],
        "unseen": unseen,
        "columns": COLUMNS,
        "width": model.config.width,
        "context": model.config.context_length,
        "scenes": scene_names(SCENES),
        "grid": list(tower.patch_embed.grid_size),
        "blocks": len(tower.blocks),
        "heads": model.config.heads,
        "colours": [colors.to_hex(shade) for shade in colormaps["viridis"].colors],
    }


def held_out_pictures() -> tuple[Tensor, int]:
    """Twemoji's pictures, none of which was trained on; the last ones show things that no training picture showed."""
    parts = split(shipped()[2])
    return torch.cat((parts.seen, parts.unseen)), len(parts.unseen)


def text_tower() -> bytes:
    """The text tower as ONNX, in float32."""
    model, read, *_ = shipped()
    # the exporter tells of its steps, and warns of its own code
    with (
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(action="ignore", category=FutureWarning),
        torch.no_grad(),
    ):
        program = torch.onnx.export(
            TextTower(model).eval(),
            (read(["a red apple"]),),
            input_names=["tokens"],
            output_names=["vector"],
            dynamo=True,
            verbose=False,
        )
    return program.model_proto.SerializeToString()


def tokenizer() -> bytes:
    """Pieces, scores and the table of characters of the SentencePiece model, as JSON."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(shipped()[1].proto)
    settings = model.normalizer_spec
    if not (settings.add_dummy_prefix and settings.remove_extra_whitespaces):
        raise ValueError(
            "the tokenizer in the page takes a space before the text and one between words for granted"
        )
    normal = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
    pieces = [[p.piece, p.score] if p.type == normal else None for p in model.pieces]
    table = np.frombuffer(settings.precompiled_charsmap, dtype=np.uint8).tolist()
    return json.dumps({"pieces": pieces, "characters": table}, separators=(",", ":")).encode()


def vectors() -> bytes:
    """Those of the pictures, (861, 128), each number of [-1, 1] as 16 bits."""
    found = shipped()[3][held_out_pictures()[0]]
    return (found * 32767).round().numpy().astype("<i2").tobytes()


def sheet() -> bytes:
    """All pictures searched, in rows on one, as PNG."""
    emoji = shipped()[2]
    drawn = [emoji.picture(place) for place in held_out_pictures()[0].tolist()]
    side = drawn[0].width
    whole = Image.new("RGB", (COLUMNS * side, -(-len(drawn) // COLUMNS) * side), "white")
    for place, picture in enumerate(drawn):
        row, column = divmod(place, COLUMNS)
        whole.paste(picture, (column * side, row * side))
    return _png(whole)


def maps() -> bytes:
    """Attention of scenes, blocks, heads and patches, (3, 6, 4, 64, 64), then of pooling heads (3, 4, 64), 16 bits."""
    tower, pixels = shipped()[0].image, scenes().pixels[:SCENES]
    with torch.no_grad(), attention_maps(tower) as found:
        tower.forward_head(tower.forward_features(pixels))
    *blocks, pooling = found.values()
    parts = torch.stack(blocks, dim=1), pooling.squeeze(2)
    return b"".join((part * 65535).round().numpy().astype("<u2").tobytes() for part in parts)


def pictures_of_scenes() -> dict[str, bytes]:
    values = ((scenes().pixels[:SCENES] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    enlarged = [Image.fromarray(x).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for x in values]
    return {f"scene{place}": _png(image) for place, image in enumerate(enlarged)}


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> int:
    """Compress, the same bytes every time, and return the size on disk."""
    path.write_bytes(gzip.compress(data, mtime=0))
    return os.path.getsize(path)
