"""A SigLIP's folder on disk, which transformers reads too, and the one that ships."""

import os
import tempfile
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from siglip_lib.base.checks import finite_tensors, join_names
from siglip_lib.siglip.config_json import config_json, read_config
from siglip_lib.siglip.model import SigLIP, SigLIPConfig, check_tokenizer
from siglip_lib.siglip.text import Tokenizer
from siglip_lib.storage.fitting import check_finite, check_fit, check_plain, fill
from siglip_lib.storage.names import (
    IMAGE_TOWER,
    TEXT_TOWER,
    under_transformers_names,
    unwrapped,
    whole_state,
    without_wrappers,
)
from siglip_lib.storage.reading import choose_weights, files_of, read_weights
from siglip_lib.storage.writing import write_tensors

_CONFIG, _WEIGHTS, _PIECES = "config.json", "model.safetensors", "spiece.model"
_OTHER_TOKENIZER = (
    "; SigLIP 2 has another tokenizer, which is not here: load its image tower alone, create_siglip_vit(name, "
    "ckpt_path=...) with the name of a tower of its sizes"
)
_File = TypeVar("_File")
# Our towers, theirs, and the names within.
_TOWERS = (("image.", "vision_model.", IMAGE_TOWER), ("text.", "text_model.", TEXT_TOWER))

# The sizes of the weights that ship, 2.0 million parameters; 1,500 pieces of words, 16 to a caption.
EMOJI64_SIGLIP = SigLIPConfig(
    image_size=64,
    patch_size=8,
    width=128,
    layers=6,
    heads=4,
    mlp_hidden=512,
    text_width=128,
    text_layers=2,
    text_heads=4,
    text_mlp_hidden=512,
    vocab_size=1500,
    context_length=16,
)
# the folder of the SigLIP that ships, as load_siglip reads it
EMOJI64_WEIGHTS = Path(__file__).parent / "weights" / "emoji64"
# its unit vectors of all pictures of emoji64, "pictures" (5094, 128) in a safetensors file, float16
EMOJI64_VECTORS = EMOJI64_WEIGHTS.with_name("emoji64_vectors.safetensors")
# what notebook 15 puts behind their image tower: adaptor, learned vectors and language model, float16
EMOJI64_CAPTIONER = EMOJI64_WEIGHTS.with_name("emoji64_captioner.safetensors")


def save_siglip(
    model: SigLIP, tokenizer: Tokenizer, folder: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Write a folder that ``load_siglip`` and transformers' ``SiglipModel`` and ``SiglipTokenizer`` read.

    It holds ``config.json``, ``model.safetensors`` and ``spiece.model``, and appears whole or not at all. A folder
    that was written before is replaced.

    Args:
        model: both towers; compiled and wrapped they may be, but not sharded.
        tokenizer: the one that the text tower was trained with.
        folder: where to; nothing, an empty folder, or one that this function wrote.
        dtype: of the stored weights: float32, float16 or bfloat16; None for the model's own. Log-temperature and
            bias are never below float32.

    Raises:
        FileExistsError: ``folder`` is a file, or holds something else.
        ValueError: the dtype is another, the tokenizer does not fit the model, a part of the model was exchanged, the
            model is sharded, or a weight is not finite in ``dtype``; nothing was written.
        OSError: a file cannot be written; what was there before is as it was.
    """
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype={dtype} is not allowed; float32, float16, bfloat16 and None are")
    model = unwrapped(model)
    check_tokenizer(tokenizer, model.config)
    folder = Path(folder).resolve()
    check_replaceable(_aside(folder))
    _put_back(folder)
    check_replaceable(folder)
    state = {name: torch.cat(views) for name, views in _stored_views(whole_state(model)).items()}
    with torch.device("meta"):
        whole = SigLIP(model.config)
        check_fit(state, _stored_views(whole.state_dict()), "model is not as its config")
    grid, wanted = model.image.patch_embed.grid_size, whole.image.patch_embed.grid_size
    if grid != wanted:
        raise ValueError(
            f"model is not as its config. The image tower's grid is {grid}, not {wanted}"
        )
    for name, tensor in state.items():
        state[name] = tensor.to(dtype or tensor.dtype)
        if name.startswith("logit_"):  # one number each, and every logit hangs on it
            state[name] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    finite_tensors(f"weights in {dtype or 'the model'} have", state)
    _write(folder, model.config, state, tokenizer)


def _write(
    folder: Path, config: SigLIPConfig, state: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Write a new folder beside ``folder``, then let it take that one's place.

    Two folders can't change places at once. Between the two steps the old one has the name ``_aside``, and
    ``load_siglip`` and the next ``save_siglip`` look for it there if the process was killed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        new, aside = Path(temporary, "new"), _aside(folder)
        new.mkdir()
        try:
            (new / _CONFIG).write_text(config_json(config), encoding="utf-8")
            (new / _PIECES).write_bytes(tokenizer.proto)
            write_tensors(state, new / _WEIGHTS)
        except OSError as error:  # a full disk, which Python reports without a name
            raise OSError(f"cannot write {str(folder)!r}: {error}") from error
        if aside.exists():  # of a save that was killed after the new one took the name
            os.rename(aside, Path(temporary, "older"))
        try:
            if folder.exists():
                os.rename(folder, aside)
            os.rename(new, folder)
        finally:
            _put_back(folder)
        if aside.exists():
            os.rename(aside, Path(temporary, "old"))


def load_siglip(source: str | Path) -> tuple[SigLIP, Tokenizer]:
    """Build the SigLIP that a folder holds, in float32, with its tokenizer.

    Args:
        source: a folder written by ``save_siglip`` or by transformers (``SiglipModel``, sharded or not, with
            ``SiglipTokenizer``), or ``hf-hub:owner/name`` for a repository of the Hugging Face hub, such as Google's.
            Only the latter uses the network.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        NotADirectoryError: ``source`` is a file.
        PermissionError: a file or the folder cannot be read.
        ValueError: a file is malformed, ``config.json`` asks for what this code does not have, or a tensor is missing,
            unexpected, of the wrong shape or not finite; the message lists them.
        OSError: the hub cannot be reached; the message says what to download.
    """
    if not str(source).startswith("hf-hub:"):
        aside = _aside(Path(source).resolve())
        source = aside if aside.is_dir() and not Path(source).exists() else source
    with files_of(str(source), f"{_CONFIG}, {_PIECES} and ") as get:
        # the weights last: from the hub they are gigabytes, and small files say whether they are of use here
        config = read_config(_there(get(_CONFIG), _CONFIG, source))
        pieces = _there(get(_PIECES), _PIECES, source, _OTHER_TOKENIZER)
        weights = _there(choose_weights(get), _WEIGHTS, source)
    tokenizer = Tokenizer(pieces, config.context_length)
    check_tokenizer(tokenizer, config)
    found, where = read_weights(weights)
    found = without_wrappers(found, where)
    check_plain(found, where)
    model = _without_memory(config, len(found))
    views = _stored_views(model.state_dict())
    check_fit(found, views, f"{where} does not fit {_CONFIG} beside it")
    check_finite(found, views, where)
    model.to_empty(device=torch.get_default_device())
    fill(_stored_views(model.state_dict()), found)
    return model, tokenizer


def _there(file: _File, name: str, source: str | Path, hint: str = "") -> _File:
    if not file:
        raise FileNotFoundError(f"{str(source)!r} holds no {name}{hint}")
    return file


def _without_memory(config: SigLIPConfig, tensors: int) -> SigLIP:
    """A model on the meta device: weights that will be overwritten need not be drawn."""
    # a layer has several tensors; what a wrong file asks for could take hours to build
    if config.layers + config.text_layers > tensors:
        raise ValueError(
            f"{_CONFIG} asks for {config.layers} + {config.text_layers} layers, and there are {tensors} tensors in all"
        )
    try:
        with torch.device("meta"):
            return SigLIP(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # numbers beyond 64 bits
        raise ValueError(f"{_CONFIG} asks for tensors beyond any memory") from error


def _stored_views(state: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Views of the weights by the names of transformers' SiglipModel."""
    found = {k: [v.view(1)] for k, v in state.items() if k in ("logit_scale", "logit_bias")}
    for ours, theirs, names in _TOWERS:
        tower = {k.removeprefix(ours): v for k, v in state.items() if k.startswith(ours)}
        views = under_transformers_names(tower, names)
        found |= {theirs + name: view for name, view in views.items()}
    return found


def _aside(folder: Path) -> Path:
    """Where the old folder is for the moment in which the new one takes its place."""
    return folder.parent / f".{folder.name}.old"


def _put_back(folder: Path) -> None:
    """Give the old folder its name again, if a save was stopped before the new one took it."""
    if _aside(folder).exists() and not folder.exists():
        os.rename(_aside(folder), folder)


def check_replaceable(folder: Path) -> None:
    """Raise ``FileExistsError`` for a folder that holds anything but a SigLIP."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"folder={str(folder)!r} is a file")
    names = {path.name for path in folder.iterdir()}
    if names and names != {_CONFIG, _WEIGHTS, _PIECES}:
        raise FileExistsError(
            f"folder={str(folder)!r} holds {join_names(names)}; one that is not empty is replaced only if it is a "
            f"SigLIP, {_CONFIG}, {_WEIGHTS} and {_PIECES}, and nothing else"
        )
    if names:
        try:
            read_config(folder / _CONFIG)
        except (ValueError, OSError) as error:
            raise FileExistsError(f"folder={str(folder)!r} holds no SigLIP: {error}") from error
