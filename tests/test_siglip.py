"""SigLIP as a whole: transformers' SiglipModel, read and written; the folder; the start of training."""

import json
import math
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields, replace
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from comparing import assert_close
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from siglip_lib import SIGLIP_CONFIGS, VisionTransformer, create_siglip_vit
from siglip_lib.siglip import folder as siglip_folder
from siglip_lib.siglip.config_json import (
    HARMLESS,
    SIZES,
    config_json,
    known_settings,
    read_config,
)
from siglip_lib.siglip.folder import load_siglip, save_siglip
from siglip_lib.siglip.model import SigLIP, SigLIPConfig, embed_pictures
from siglip_lib.siglip.text import Tokenizer, train_tokenizer
from siglip_lib.tower.siglip_vit import SigLIPVisionConfig

CONFIG = SigLIPConfig(
    image_size=32,
    patch_size=8,
    width=44,
    layers=2,
    heads=4,
    mlp_hidden=109,  # 44 * (109 / 44) is less in floating point
    text_width=36,
    text_layers=3,
    text_heads=4,
    text_mlp_hidden=77,
    vocab_size=40,
    context_length=16,
)
SO400M = SigLIPConfig(384, 14, 1152, 27, 16, 4304, 1152, 27, 16, 4304, 32_000, 64)
FILES = {"config.json", "model.safetensors", "spiece.model"}
CAPTIONS = ["a picture of a cat", "two dogs", "the red rocket", "a cat and a dog", "pizza"]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    train_tokenizer(CAPTIONS, path, 24)
    return path


@pytest.fixture
def tokenizer(pieces):
    return Tokenizer(pieces, 16)


def their_config(config: SigLIPConfig) -> transformers.SiglipConfig:
    text = dict(
        hidden_size=config.text_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        intermediate_size=config.text_mlp_hidden,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.context_length,
        projection_size=config.width,
        bos_token_id=None,
        eos_token_id=1,
    )
    vision = dict(
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp_hidden,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    return transformers.SiglipConfig(text_config=text, vision_config=vision)


def their_model(dtype=torch.float32) -> transformers.SiglipModel:
    """Weights of the size that training gives, no norm or bias at its start, Google's temperature and bias."""
    model = transformers.SiglipModel(their_config(CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.logit_scale.fill_(4.77)
        model.logit_bias.fill_(-12.9)
    return model.to(dtype)


def our_model(**options) -> SigLIP:
    model = SigLIP(CONFIG, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def inputs(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(2, 40, (4, 16))
    tokens[0, 3:] = 1
    return torch.rand(3, 3, 32, 32, dtype=dtype) * 2 - 1, tokens


def outputs(model, pixels, tokens) -> dict[str, torch.Tensor]:
    if isinstance(model, SigLIP):
        image, text = model.encode_image(pixels), model.encode_text(tokens)
        return {"image": image, "text": text, "logits": model.logits(image, text)}
    seen = model(input_ids=tokens, pixel_values=pixels)
    return {"image": seen.image_embeds, "text": seen.text_embeds, "logits": seen.logits_per_image}


def outputs_and_gradients(model, pixels, tokens) -> dict[str, torch.Tensor]:
    """Gradients under transformers' names."""
    found = outputs(model, pixels, tokens)
    torch.nn.functional.softplus(
        found["logits"] * torch.linspace(-1, 1, 12).view(3, 4)
    ).mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if isinstance(model, SigLIP):
        gradients = {
            name: torch.cat(rows) for name, rows in siglip_folder._stored_views(gradients).items()
        }
    return found | gradients


def write_whole(model, folder, pieces):
    model.save_pretrained(folder)
    transformers.SiglipTokenizer(str(pieces)).save_pretrained(folder)


def write_sharded(model, folder, pieces, size="20KB"):
    model.save_pretrained(folder, max_shard_size=size)
    shutil.copy(pieces, folder / "spiece.model")
    assert len(list(folder.glob("*.safetensors"))) > 3


def write_pickled(model, folder, pieces):
    write_whole(model, folder, pieces)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


# --- theirs to ours ---


@pytest.mark.parametrize("write", [write_whole, write_sharded, write_pickled])
def test_what_transformers_writes_gives_its_outputs_and_gradients(write, pieces, tmp_path):
    theirs = their_model()
    write(theirs, tmp_path, pieces)
    ours, tokenizer = load_siglip(tmp_path)
    assert ours.config == CONFIG
    assert tokenizer.proto == pieces.read_bytes()
    assert tokenizer.context_length == 16
    assert all(parameter.requires_grad for parameter in ours.parameters())
    for dtype in (torch.float32, torch.float64):  # in the latter even another epsilon shows
        x = inputs(dtype)
        found = outputs_and_gradients(ours.to(dtype), *x)
        expected = outputs_and_gradients(theirs.to(dtype), *x)
        assert expected["logits"].std() > 1  # the pairs differ
        assert_close(found, expected)
        ours.zero_grad()
        theirs.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_in_half_precision_it_is_loaded_into_float32(dtype, pieces, tmp_path):
    theirs = their_model(dtype)
    write_whole(theirs, tmp_path, pieces)
    ours, _ = load_siglip(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    x = inputs()
    with torch.no_grad():
        assert_close(outputs(ours, *x), outputs(theirs.float(), *x))


def test_so400m_has_transformers_names_and_shapes():
    with torch.device("meta"):
        ours, theirs = SigLIP(SO400M), transformers.SiglipModel(their_config(SO400M))
        out = (
            ours.encode_image(torch.empty(2, 3, 384, 384)),
            ours.encode_text(torch.ones(2, 64, dtype=torch.int64)),
        )
    stored = siglip_folder._stored_views(ours.state_dict())
    shapes = {k: (sum(map(len, rows)), *rows[0].shape[1:]) for k, rows in stored.items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == 877_960_498
    assert [o.shape for o in out] == [(2, 1152)] * 2
    assert all(tensor.is_meta for tensor in ours.state_dict().values())


# --- config.json ---

BASE = SigLIPConfig(224, 16, 768, 12, 12, 3072, 768, 12, 12, 3072, 32_000, 64)
TOWER = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, num_hidden_layers=27)


@pytest.mark.parametrize(
    ("text", "vision", "expected"),
    [
        ({}, {}, BASE),
        (None, None, BASE),
        (
            {"vocab_size": 250_000},
            {"image_size": 256},
            replace(BASE, image_size=256, vocab_size=250_000),
        ),
        (TOWER, TOWER | {"image_size": 384, "patch_size": 14}, SO400M),
        (
            {"attention_dropout": 0.0, "top_k": 50},
            {"attention_dropout": 0, "pruned_heads": {}},
            BASE,
        ),
    ],
)
def test_sizes_that_a_config_leaves_out_are_transformers(text, vision, expected, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"model_type": "siglip", "text_config": text, "vision_config": vision})
    )
    assert read_config(path) == expected
    theirs = transformers.SiglipConfig.from_pretrained(tmp_path)
    for field, (section, name, _) in SIZES.items():
        assert getattr(getattr(theirs, section), name) == getattr(expected, field)


@pytest.mark.parametrize("config", [CONFIG, BASE, SO400M])
def test_what_is_written_is_read_by_both(config, tmp_path):
    (tmp_path / "config.json").write_text(config_json(config))
    assert read_config(tmp_path / "config.json") == config
    theirs, expected = transformers.AutoConfig.from_pretrained(tmp_path), their_config(config)
    assert theirs.dtype == torch.float32  # what from_pretrained loads into, whatever is stored
    for section in ("text_config", "vision_config"):
        found, wanted = getattr(theirs, section).to_dict(), getattr(expected, section).to_dict()
        wanted = {"vision_use_head": True} | wanted  # older versions know it only in their model
        assert {k: v for k, v in found.items() if v != wanted[k]} == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "siglip2"}, "model_type is 'siglip2', not 'siglip'"),
        ({"model_type": None}, "model_type is None, not 'siglip'"),
        (
            {"vision_config.vision_use_head": False},
            "vision_config.vision_use_head is False, not True",
        ),
        (
            {"vision_config.hidden_act": "gelu"},
            "vision_config.hidden_act is 'gelu', not 'gelu_pytorch_tanh'",
        ),
        ({"text_config.hidden_act": "relu"}, "text_config.hidden_act is 'relu'"),
        (
            {"vision_config.layer_norm_eps": 1e-5},
            "vision_config.layer_norm_eps is 1e-05, not 1e-06",
        ),
        ({"text_config.layer_norm_eps": 1e-5}, "text_config.layer_norm_eps is 1e-05, not 1e-06"),
        ({"vision_config.num_channels": 1}, "vision_config.num_channels is 1, not 3"),
        (
            {"text_config.projection_size": 36},
            "text_config.projection_size is 36, not the image tower's 44",
        ),
        ({"text_config.projection_size": None}, "text_config.projection_size is 36, not the image"),
        (
            {"text_config.hidden_act": "relu", "vision_config.num_channels": 4},
            "vision_config.num_channels is 4, not 3; text_config.hidden_act is 'relu'",
        ),
        ({"vision_config.image_size": [32, 32]}, "image_size=[32, 32] must be an int"),
        ({"vision_config.image_size": 32.0}, "image_size=32.0 must be an int"),
        ({"text_config.num_hidden_layers": 0}, "text_layers=0 must be at least 1"),
        (
            {"text_config.num_attention_heads": 5},
            "text_width=36 must be a multiple of text_heads=5",
        ),
        ({"vision_config.num_attention_heads": 5}, "width=44 must be a multiple of heads=5"),
        ({"vision_config": 3}, "is no configuration of a model: AttributeError"),
        (
            {"vision_config.attention_dropout": 0.1, "text_config.attention_dropout": 0.2},
            "vision_config.attention_dropout is 0.1, not 0.0; text_config.attention_dropout is 0.2, not 0.0",
        ),
        ({"text_config.causal": True}, "text_config.causal is True, which is unknown"),
        (
            {"quantization_config": {"bits": 4}},
            "quantization_config is {'bits': 4}, which is unknown",
        ),
        (
            {"vision_config.pruned_heads": {"1": [2]}},
            "vision_config.pruned_heads is {'1': [2]}, which",
        ),
        # bounds: a file of a kilobyte must not ask for hours or terabytes
        (
            {"vision_config.num_hidden_layers": 10**6},
            "config.json asks for 1000000 + 3 layers, and there are 104 tensors in all",
        ),
        ({"text_config.num_hidden_layers": 10**9}, "config.json asks for 2 + 1000000000 layers"),
        ({"vision_config.image_size": 10**12}, "config.json asks for tensors beyond any memory"),
        ({"text_config.vocab_size": 10**30}, "config.json asks for tensors beyond any memory"),
        ({"vision_config.intermediate_size": 10**400}, "asks for tensors beyond any memory"),
    ],
)
def test_a_config_that_asks_for_what_is_not_here(change, said, tokenizer, tmp_path):
    save_siglip(our_model(), tokenizer, tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    for name, value in change.items():
        section, _, key = name.rpartition(".")
        (config[section] if section else config)[key] = value
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        load_siglip(tmp_path / "a")
    assert str(caught.value).startswith("config.json")


# of transformers 4.30's own SiglipConfig-like sections, which hold every setting of every task
OLD = dict(
    _name_or_path="", add_cross_attention=False, architectures=None, bad_words_ids=None, chunk_size_feed_forward=0,
    diversity_penalty=0.0, do_sample=False, id2label={"0": "LABEL_0"}, is_decoder=False, label2id={"LABEL_0": 0},
    length_penalty=1.0, max_length=20, min_length=0, num_beam_groups=1, num_beams=1, num_return_sequences=1,
    output_attentions=False, prefix=None, pruned_heads={}, repetition_penalty=1.0, return_dict=True, temperature=1.0,
    tf_legacy_loss=False, tie_encoder_decoder=False, tie_word_embeddings=True, top_k=50, top_p=1.0, torch_dtype=None,
    torchscript=False, typical_p=1.0, use_bfloat16=False,
)  # fmt: skip


def test_every_setting_of_transformers_is_used_settled_or_harmless(tmp_path):
    config = their_config(CONFIG).to_dict()
    config |= {"initializer_factor": 2.0, "_name_or_path": "Zoë/siglip"} | OLD
    for section in ("text_config", "vision_config"):
        config[section] |= OLD
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    assert read_config(path) == CONFIG
    # each that is a number there, and neither a size nor harmless, must not be ignored
    sections = {
        "text_config": transformers.SiglipTextConfig,
        "vision_config": transformers.SiglipVisionConfig,
    }
    for section, theirs in sections.items():
        for name in set(theirs().to_dict()) - HARMLESS - set(known_settings("")):
            if not name.startswith("_") and theirs().to_dict()[name]:
                assert name in known_settings(section)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 99_999])
def test_a_config_that_is_none(content, tokenizer, tmp_path):
    save_siglip(our_model(), tokenizer, tmp_path / "a")
    (tmp_path / "a/config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^config\.json is no configuration of a model: "):
        load_siglip(tmp_path / "a")


@pytest.mark.parametrize("name", asdict(CONFIG))
def test_sizes_are_positive_ints(name):
    for value, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"{name}={value}"):
            replace(CONFIG, **{name: value})


# --- ours to theirs, and back ---


def test_transformers_loads_all_that_is_saved_and_lacks_nothing(tokenizer, tmp_path):
    ours = our_model()
    save_siglip(ours, tokenizer, tmp_path / "a")
    theirs, report = transformers.AutoModel.from_pretrained(
        tmp_path / "a", output_loading_info=True
    )
    assert type(theirs) is transformers.SiglipModel
    assert not any(report.values())
    x = inputs()
    with torch.no_grad():
        assert_close(outputs(ours, *x), outputs(theirs, *x))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    found = theirs(
        CAPTIONS, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    assert torch.equal(tokenizer(CAPTIONS), found["input_ids"])


def test_what_is_saved_and_loaded_is_exactly_the_same(tokenizer, tmp_path, device):
    model = our_model().to(device)
    save_siglip(model, tokenizer, tmp_path / "new/er/a")
    save_siglip(model, tokenizer, str(tmp_path / "b"))
    assert set(os.listdir(tmp_path / "new/er/a")) == FILES
    with safetensors.safe_open(tmp_path / "b/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers 4.x asks for it
    assert set(os.listdir(tmp_path)) == {"new", "b"}
    for name in FILES:
        assert (tmp_path / "new/er/a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded, tokenizer_loaded = load_siglip(str(tmp_path / "b"))
    assert_equal(loaded.state_dict(), {k: v.cpu() for k, v in bits(model).items()})
    assert torch.equal(tokenizer_loaded(CAPTIONS), tokenizer(CAPTIONS))


def test_float64_stays_exact(tokenizer, tmp_path):
    model = our_model().double()
    save_siglip(model, tokenizer, tmp_path / "a")
    stored = safetensors.torch.load_file(tmp_path / "a/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_stored_in_another_dtype_but_temperature_and_bias(dtype, tokenizer, tmp_path):
    model = our_model()
    save_siglip(model, tokenizer, tmp_path / "a", dtype)
    stored = safetensors.torch.load_file(tmp_path / "a/model.safetensors")
    single = ("logit_scale", "logit_bias")
    assert {stored[name].dtype for name in single} == {torch.float32}
    assert {tensor.dtype for name, tensor in stored.items() if name not in single} == {dtype}
    expected = {k: v if k in single else v.to(dtype).float() for k, v in model.state_dict().items()}
    loaded, _ = load_siglip(tmp_path / "a")
    assert_equal(loaded.state_dict(), expected)
    theirs, report = transformers.SiglipModel.from_pretrained(
        tmp_path / "a", output_loading_info=True
    )
    assert not any(report.values())
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float32}
    x = inputs()
    with torch.no_grad():
        assert_close(outputs(loaded, *x), outputs(theirs, *x))


# --- strict ---


@pytest.mark.parametrize(
    ("change", "listed"),
    [
        ({"logit_bias": None}, "missing (1): logit_bias"),
        ({"logit_scale": torch.tensor(1.0)}, "of the wrong shape (1): logit_scale (), not (1,)"),
        ({"text_model.head.bias": None}, "missing (1): text_model.head.bias"),
        (
            {"text_model.embeddings.position_ids": torch.ones(1, 16)},
            "unexpected (1): text_model.embeddings.position_ids",
        ),
        (
            {"text_model.embeddings.token_embedding.weight": torch.ones(41, 36)},
            "text_model.embeddings.token_embedding.weight (41, 36), not (40, 36)",
        ),
        # nothing is resampled: the config says how many there are
        (
            {"vision_model.embeddings.position_embedding.weight": torch.ones(9, 44)},
            "vision_model.embeddings.position_embedding.weight (9, 44), not (16, 44)",
        ),
        (
            {
                "vision_model.head.probe": None,
                "text_model.encoder.layers.2.self_attn.k_proj.bias": None,
                "text_model.more": torch.ones(1),
                "text_model.final_layer_norm.bias": torch.ones(35),
                "vision_model.post_layernorm.bias": torch.ones(44, dtype=torch.int8),
            },
            "missing (2): text_model.encoder.layers.2.self_attn.k_proj.bias, vision_model.head.probe; "
            "unexpected (1): text_model.more; "
            "of the wrong shape (1): text_model.final_layer_norm.bias (35,), not (36,); "
            "not of a floating-point dtype (1): vision_model.post_layernorm.bias torch.int8",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(change, listed, tokenizer, tmp_path):
    save_siglip(our_model(), tokenizer, tmp_path / "a")
    path = tmp_path / "a/model.safetensors"
    state = safetensors.torch.load_file(path) | change
    safetensors.torch.save_file({k: v for k, v in state.items() if v is not None}, path)
    with pytest.raises(ValueError, match=re.escape(listed)) as caught:
        load_siglip(tmp_path / "a")
    said = str(caught.value)
    assert said.startswith("model.safetensors does not fit config.json beside it. ")


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e300])
@pytest.mark.parametrize("name", ["logit_scale", "text_model.head.bias"])
def test_values_that_are_not_finite_are_refused(name, value, tokenizer, tmp_path):
    save_siglip(our_model(), tokenizer, tmp_path / "a")
    path = tmp_path / "a/model.safetensors"
    state = safetensors.torch.load_file(path)
    state[name] = torch.full(state[name].shape, value, dtype=torch.float64)
    safetensors.torch.save_file(state, path)
    said = f"model.safetensors has, as torch.float32, NaN or infinite elements in {name}"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        load_siglip(tmp_path / "a")


def test_tensors_that_a_few_bytes_stand_for_are_refused(tokenizer, tmp_path):
    save_siglip(our_model(), tokenizer, tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["text_config"]["vocab_size"] = 10**9  # 36 numbers each
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    state = safetensors.torch.load_file(tmp_path / "a/model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    state[name] = torch.ones(1, 1).expand(10**9, 36)
    (tmp_path / "a/model.safetensors").unlink()
    torch.save(state, tmp_path / "a/pytorch_model.bin")
    with pytest.raises(ValueError, match=f"does not store each element of {re.escape(name)}: "):
        load_siglip(tmp_path / "a")


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_that_may_not_be_read_is_not_called_missing(name, tokenizer):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        save_siglip(our_model(), tokenizer, Path(folder, "a"))
        path, user = Path(folder, "a", name), os.geteuid()
        path.chmod(0)
        try:
            if user == 0:  # for whom modes don't count
                os.seteuid(65534)
            with pytest.raises(PermissionError, match=f"{name}' cannot be read: Permission denied"):
                load_siglip(Path(folder, "a"))
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_folder_or_a_pipe_in_the_place_of_a_file(name, tokenizer, tmp_path):
    save_siglip(our_model(), tokenizer, tmp_path / "a")
    path = tmp_path / "a" / name
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=f"{name}' is a folder; it must be a file"):
        load_siglip(tmp_path / "a")
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{name}' is neither a file nor a folder, but a pipe"):
        load_siglip(tmp_path / "a")


@pytest.mark.parametrize("lost", sorted(FILES))
def test_a_file_that_is_missing_is_named(lost, tokenizer, tmp_path):
    save_siglip(our_model(), tokenizer, tmp_path / "a")
    (tmp_path / "a" / lost).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"a' holds no {lost}")):
        load_siglip(tmp_path / "a")


# --- SigLIP 2 ---


def test_of_siglip_2_at_a_fixed_size_the_image_tower_alone_is_loaded(monkeypatch, tmp_path):
    # as its repositories: SiglipModel under model_type "siglip", and Gemma's tokenizer in a file of another name
    theirs = their_model().eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "siglip"
    with pytest.raises(
        FileNotFoundError, match=r"holds no spiece\.model; SigLIP 2 .* create_siglip_vit\("
    ):
        load_siglip(tmp_path)
    sizes = {field.name: getattr(CONFIG, field.name) for field in fields(SigLIPVisionConfig)}
    monkeypatch.setitem(SIGLIP_CONFIGS, "tiny", SigLIPVisionConfig(**sizes))
    ours = create_siglip_vit("tiny", ckpt_path=tmp_path).eval()
    pixels, _ = inputs()
    with torch.no_grad():
        wanted = theirs.vision_model(pixels).pooler_output
        assert_close({"pooled": ours(pixels)}, {"pooled": wanted})


def naflex(folder: Path) -> None:
    """Write what transformers writes of SigLIP 2's NaFlex, in small."""
    tower = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.Siglip2Config(
        text_config=tower | {"vocab_size": 40, "max_position_embeddings": 16},
        vision_config=tower | {"patch_size": 8, "num_patches": 16},
    )
    transformers.Siglip2Model(config).save_pretrained(folder)


def test_naflex_is_refused_by_its_model_type_before_its_weights_are_read(tmp_path):
    naflex(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"model_type is 'siglip2', not 'siglip' \(SigLIP 2's NaFlex"
    ):
        load_siglip(tmp_path)


def test_naflex_towers_patches_do_not_fit(monkeypatch, tmp_path):
    naflex(tmp_path)
    monkeypatch.setitem(SIGLIP_CONFIGS, "tiny", SigLIPVisionConfig(32, 8, 24, 2, 2, 48))
    message = r"patch_embedding\.weight \(24, 192\), not \(24, 3, 8, 8\)"
    with pytest.raises(ValueError, match=message):
        create_siglip_vit("tiny", ckpt_path=tmp_path)


def test_a_shard_that_is_missing_is_named(pieces, tmp_path):
    write_sharded(their_model(), tmp_path, pieces)
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {lost.name}, missing beside it"):
        load_siglip(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    for source in (tmp_path / "none", "google/siglip-base-patch16-224"):
        with pytest.raises(FileNotFoundError, match=r"no file or folder '.*hf-hub:owner/name$"):
            load_siglip(source)


def test_a_file_of_the_folder(tokenizer, tmp_path):
    save_siglip(our_model(), tokenizer, tmp_path / "a")
    with pytest.raises(NotADirectoryError, match="' is a file; give the folder that holds it"):
        load_siglip(tmp_path / "a/model.safetensors")


@pytest.mark.parametrize("name", sorted(FILES - {"config.json"}))
def test_a_truncated_file_is_an_error_that_names_it(name, tokenizer, tmp_path):
    save_siglip(our_model(), tokenizer, tmp_path / "a")
    path = tmp_path / "a" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=re.escape(name)):
        load_siglip(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"context_length": 8}, "the tokenizer gives 16 tokens, the model takes 8"),
        ({"vocab_size": 23}, "the tokenizer has 24 pieces, the model embeddings for 23"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model(change, said, tokenizer, pieces, tmp_path):
    model = SigLIP(replace(CONFIG, **change))
    with pytest.raises(ValueError, match=said):
        save_siglip(model, tokenizer, tmp_path / "a")
    assert not os.listdir(tmp_path)
    if "vocab_size" in change:
        write_whole(transformers.SiglipModel(their_config(model.config)), tmp_path, pieces)
        with pytest.raises(ValueError, match=said):
            load_siglip(tmp_path)


# --- the hub ---

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A machine without network; the folder in which huggingface_hub would keep nobody/siglip."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--nobody--siglip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("write", [write_whole, write_sharded])
def test_a_repository_fetched_before_loads_offline(write, pieces, cache):
    theirs = their_model()
    write(theirs, cache, pieces)
    ours, _ = load_siglip("hf-hub:nobody/siglip")
    x = inputs()
    with torch.no_grad():
        assert_close(outputs(ours, *x), outputs(theirs, *x))


@pytest.mark.parametrize("lost", [*sorted(FILES), None])
def test_offline_the_error_says_what_to_download(lost, pieces, cache):
    if lost:
        write_whole(their_model(), cache, pieces)
        (cache / lost).unlink()
    with pytest.raises(OSError, match="cannot fetch 'nobody/siglip' from the hub") as caught:
        load_siglip("hf-hub:nobody/siglip")
    assert "Download its config.json, spiece.model and model.safetensors, or its" in str(
        caught.value
    )


# --- the folder ---


def test_a_folder_written_before_is_replaced_whole(tokenizer, tmp_path):
    first, second = our_model(), our_model()
    save_siglip(first, tokenizer, tmp_path / "a", torch.float16)
    save_siglip(second, tokenizer, tmp_path / "a")
    assert_equal(load_siglip(tmp_path / "a")[0].state_dict(), second.state_dict())
    assert os.listdir(tmp_path) == ["a"]
    (tmp_path / "link").symlink_to("a")
    save_siglip(first, tokenizer, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_equal(load_siglip(tmp_path / "a")[0].state_dict(), first.state_dict())


def test_an_empty_folder_is_filled(tokenizer, tmp_path):
    (tmp_path / "a").mkdir()
    save_siglip(our_model(), tokenizer, tmp_path / "a")
    assert set(os.listdir(tmp_path / "a")) == FILES


def a_file_more(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def a_file_less(folder: Path) -> None:
    (folder / "config.json").unlink()


def another_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5"}')  # T5's files have the same names


@pytest.mark.parametrize("change", [a_file_more, a_file_less, another_model])
def test_a_folder_with_anything_else_is_left_alone(change, tokenizer, tmp_path):
    save_siglip(our_model(), tokenizer, tmp_path / "a")
    change(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(FileExistsError, match=re.escape(str(tmp_path / "a"))):
        save_siglip(our_model(), tokenizer, tmp_path / "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_is_no_folder(tokenizer, tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError, match="a' is a file"):
        save_siglip(our_model(), tokenizer, tmp_path / "a")


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("fails", ["writing", "moving the old", "moving the new"])
def test_a_failed_save_leaves_what_was_there_and_nothing_else(
    fails, there, tokenizer, tmp_path, monkeypatch
):
    first = our_model()
    if there:
        save_siglip(first, tokenizer, tmp_path / "a")

    def write_half(state, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    def no_rename(old, new, rename=os.rename):
        if (Path(old).name == "new") == (fails == "moving the new"):
            raise KeyboardInterrupt
        rename(old, new)

    def rename_back(old, new, rename=os.rename):
        if Path(old).name == "new":
            raise KeyboardInterrupt
        rename(old, new)

    with monkeypatch.context() as patch:
        if fails == "writing":
            patch.setattr(safetensors.torch, "save_file", write_half)
        elif fails == "moving the new":
            patch.setattr(siglip_folder.os, "rename", rename_back)
        elif there:
            patch.setattr(siglip_folder.os, "rename", no_rename)
        else:
            return
        with pytest.raises(KeyboardInterrupt):
            save_siglip(our_model(), tokenizer, tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"] * there
    if there:
        assert_equal(load_siglip(tmp_path / "a")[0].state_dict(), first.state_dict())


KILLED = """
import os, shutil, signal, sys, warnings
from pathlib import Path
import torch
from siglip_lib.siglip import SigLIP, load_siglip, save_siglip
import safetensors.torch

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}
folder, written = Path(sys.argv[1], "a"), Path(sys.argv[2])
warnings.simplefilter("ignore")  # of fork
torch.set_num_threads(1)
second, tokenizer = load_siglip(written)
second.logit_bias.data.fill_(2)


def save(kill_at):
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in EVENTS and str(arguments[0]).startswith(str(folder.parent)):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save_siglip(second, tokenizer, folder)


def in_a_child(*arguments):
    child = os.fork()
    if child == 0:
        try:
            save(*arguments)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0


finished = False
for kill_at in range(1, 500):
    shutil.rmtree(folder.parent)
    shutil.copytree(written, folder)
    finished = in_a_child(kill_at)
    found = load_siglip(folder)[0].logit_bias.item()
    print(kill_at, finished, folder.exists(), int(found))
    again = in_a_child(0) and load_siglip(folder)[0].logit_bias.item() == 2
    names = [name for name in os.listdir(folder.parent) if not name.startswith(".a-")]
    assert again and names == ["a"], names
    if finished:
        break
"""


def test_a_save_that_is_killed_at_any_step_leaves_one_whole_version(tokenizer, tmp_path):
    model = SigLIP(replace(CONFIG, layers=1, text_layers=1))
    model.logit_bias.data.fill_(1)
    save_siglip(model, tokenizer, tmp_path / "written")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "here"), str(tmp_path / "written")]
    (tmp_path / "here").mkdir()
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    steps = [line.split()[1:] for line in done.stdout.splitlines()]
    finished, there, found = zip(*steps, strict=True)
    assert finished == ("False",) * (len(steps) - 1) + ("True",)
    changes = found.index("2")
    assert found == ("1",) * changes + ("2",) * (len(steps) - changes)
    # the moment in which neither has the name is among them
    assert there.count("False") == 1
    assert there.index("False") == changes - 1


def test_a_folder_of_another_beside_it_is_left_alone(tokenizer, tmp_path):
    (tmp_path / ".a.old").mkdir()
    (tmp_path / ".a.old/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"\.a\.old' holds notes\.txt"):
        save_siglip(our_model(), tokenizer, tmp_path / "a")
    assert os.listdir(tmp_path) == [".a.old"]
    assert os.listdir(tmp_path / ".a.old") == ["notes.txt"]


@pytest.mark.parametrize("name", ["spiece.model", "model.safetensors"])
def test_a_full_disk_is_told_and_leaves_what_was_there(name, tokenizer, tmp_path):
    first = our_model().double()  # its weights are the largest file
    save_siglip(first, tokenizer, tmp_path / "a")
    size = (tmp_path / "a" / name).stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))
        with pytest.raises(OSError, match=r"^cannot write '.*/a': .*[Ff]ile too large"):
            save_siglip(first, tokenizer, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["a"]
    assert_equal(load_siglip(tmp_path / "a")[0].state_dict(), first.float().state_dict())


def test_who_may_read_the_folder_is_what_the_umask_says(tokenizer, tmp_path):
    for umask, of_folder, of_files in ((0o022, 0o755, 0o644), (0o077, 0o700, 0o600)):
        before = os.umask(umask)
        try:
            save_siglip(our_model(), tokenizer, tmp_path / "a")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == of_folder
        assert {stat.S_IMODE((tmp_path / "a" / n).stat().st_mode) for n in FILES} == {of_files}


@pytest.mark.parametrize(
    ("value", "dtype", "said"),
    [
        (math.nan, None, "in the model have NaN or infinite elements in text_model.head.bias"),
        (math.inf, torch.float32, "in torch.float32 have NaN or .* in text_model.head.bias"),
        (1e5, torch.float16, "in torch.float16 have NaN or .* in text_model.head.bias"),
    ],
)
def test_weights_that_are_not_finite_are_refused(value, dtype, said, tokenizer, tmp_path):
    model = our_model()
    with torch.no_grad():
        model.text.head.bias[3] = value
    with pytest.raises(ValueError, match=said):
        save_siglip(model, tokenizer, tmp_path / "a", dtype)
    assert not os.listdir(tmp_path)


def other_tower(model: SigLIP) -> SigLIP:
    model.text = torch.nn.Linear(3, 4)
    return model


def other_size(model: SigLIP) -> SigLIP:
    model.config = replace(CONFIG, layers=1)
    return model


def other_grid(model: SigLIP) -> SigLIP:
    sizes = dict(
        patch_size=8, embed_dim=44, depth=2, num_heads=4, mlp_ratio=109.5 / 44, num_classes=0
    )
    model.image = VisionTransformer((16, 64), global_pool="map", class_token=False, **sizes)
    return model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_tower, "missing (54): text_model."),
        (other_size, "unexpected (16): vision_model.encoder.layers.1."),
        (other_grid, "The image tower's grid is (2, 8), not (4, 4)"),
    ],
)
def test_a_model_that_is_not_as_its_config_is_refused(change, said, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        save_siglip(change(our_model()), tokenizer, tmp_path / "a")
    assert str(caught.value).startswith("model is not as its config. ")
    assert not os.listdir(tmp_path)


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_tower(model):
    model.image = compiled(model.image)
    return model


WRAPPED = {
    "compiled": compiled,
    "parallel": torch.nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "both": lambda model: compiled(torch.nn.DataParallel(model)),
    "part": compiled_tower,
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_wrapped_model_is_saved_as_the_model_in_it(how, tokenizer, tmp_path):
    model = our_model()
    save_siglip(model, tokenizer, tmp_path / "a")
    save_siglip(WRAPPED[how](model), tokenizer, tmp_path / "b")
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("how", ["compiled", "parallel", "both"])
def test_what_others_stored_wrapped_is_loaded(how, pieces, tmp_path):
    theirs = their_model()
    write_whole(theirs, tmp_path, pieces)
    expected = bits(load_siglip(tmp_path)[0])
    (tmp_path / "model.safetensors").unlink()
    torch.save({"net": WRAPPED[how](theirs).state_dict()}, tmp_path / "pytorch_model.bin")
    assert_equal(load_siglip(tmp_path)[0].state_dict(), expected)


def test_a_sharded_model_is_refused_with_what_to_do(tokenizer, tmp_path):
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = our_model()
        for block in (*model.image.blocks, *model.text.blocks):
            fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(ValueError, match=r"model is sharded .*whole_model\(training\)"):
            save_siglip(model, tokenizer, tmp_path / "a")
    finally:
        torch.distributed.destroy_process_group()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "float16"])
def test_a_dtype_that_is_not_allowed(dtype, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=f"dtype={dtype} is not allowed; float32, float16"):
        save_siglip(our_model(), tokenizer, tmp_path / "a", dtype)


# --- the model ---


def test_the_start_is_the_papers():
    model = SigLIP(CONFIG)
    assert model.logit_scale.shape == model.logit_bias.shape == ()
    assert model.logit_scale.exp().item() == pytest.approx(10)
    assert model.logit_bias.item() == -10
    # what timm made of big_vision's rule for linear layers; the true one has a name of its own
    assert model.image.weight_init == model.text.weight_init == "jax"
    true = SigLIP(CONFIG, weight_init="big_vision")
    assert true.image.weight_init == true.text.weight_init == "big_vision"
    expected = (2 / (36 + 36)) ** 0.5
    assert model.text.blocks[0].attn.proj.weight.std().item() == pytest.approx(expected, rel=0.1)
    # both towers tell their inputs apart from the start
    x = inputs()
    with torch.no_grad():
        found = outputs(model, *x)
    assert found["image"].std(0).mean() > 1e-3
    assert found["text"].std(0).mean() > 1e-3
    torch.manual_seed(1)
    first = bits(SigLIP(CONFIG))
    torch.manual_seed(1)
    assert_equal(bits(SigLIP(CONFIG)), first)


def test_vectors_have_length_1_and_logits_are_the_papers(device):
    model = our_model().to(device)
    pixels, tokens = (x.to(device) for x in inputs())
    image, text = model.encode_image(pixels), model.encode_text(tokens)
    assert image.shape == (3, 44)
    assert text.shape == (4, 44)
    torch.testing.assert_close(torch.cat((image, text)).norm(dim=-1), torch.ones(7, device=device))
    scale, bias = model.logit_scale.exp().item(), model.logit_bias.item()
    expected = [[scale * (i * t).sum().item() + bias for t in text] for i in image]
    torch.testing.assert_close(model.logits(image, text), torch.tensor(expected, device=device))


def test_embedding_needs_no_gradient_and_does_not_depend_on_the_batch(device):
    model = our_model().to(device).eval()
    rgba = torch.randint(256, (7, 4, 32, 32), dtype=torch.uint8)
    whole = embed_pictures(model, rgba)
    assert not whole.requires_grad
    torch.testing.assert_close(embed_pictures(model, rgba, batch_size=3), whole)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(7, device=device))


def test_drop_path_is_the_image_towers():
    model = SigLIP(CONFIG, drop_path_rate=0.2)
    assert [block.drop_path2.drop_prob for block in model.image.blocks] == [0, 0.2]
    assert {block.drop_path2.drop_prob for block in model.text.blocks} == {0}
    with pytest.raises(ValueError, match="drop_path_rate=1"):
        SigLIP(CONFIG, drop_path_rate=1)


def test_pictures_of_other_sizes():
    model = our_model().eval()
    small, wide = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 40, 64)
    assert model.encode_image(wide).shape == (2, 44)
    # at its own size nothing is resampled
    fixed = our_model()
    fixed.load_state_dict(model.state_dict())
    fixed.image.dynamic_img_size = False
    assert torch.equal(model.encode_image(small), fixed.encode_image(small))
    with pytest.raises(ValueError, match="both must be multiples of the patch"):
        model.encode_image(torch.rand(2, 3, 33, 32))


def test_compiles_in_one_graph(device):
    model = SigLIP(replace(CONFIG, layers=1, text_layers=1)).to(device)
    pixels, tokens = (x.to(device) for x in inputs())
    torch._dynamo.reset()

    def loss(pixels, tokens):
        image, text = model.encode_image(pixels), model.encode_text(tokens)
        return model.logits(image, text).square().mean()

    def gradients(function):
        model.zero_grad()
        function(pixels, tokens).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")  # needs no C compiler
    assert_close(gradients(compiled), gradients(loss))


def test_nothing_but_parameters_is_in_memory():
    # load_siglip gives memory to a model on the meta device; a buffer would hold garbage
    assert not list(SigLIP(CONFIG).buffers())
    with torch.device("meta"):
        model = SigLIP(CONFIG)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


# --- the real size ---


@pytest.fixture
def scratch(tmp_path):
    """A folder that goes at once, as pytest would keep gigabytes of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_google_siglip_so400m_patch14_384_end_to_end(pieces, scratch):
    with torch.device("meta"):
        theirs = transformers.SiglipModel(their_config(SO400M))
    theirs = theirs.to_empty(device="cpu").eval()
    for tower in (theirs.text_model, theirs.vision_model):  # not among the weights
        positions = tower.embeddings.position_ids
        positions.copy_(torch.arange(positions.shape[1]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.02)
        theirs.logit_scale.fill_(4.77)
        theirs.logit_bias.fill_(-12.9)
    write_sharded(theirs, scratch, pieces, "1GB")
    x = torch.rand(1, 3, 384, 384) * 2 - 1, torch.randint(32_000, (2, 64))
    with torch.no_grad():
        expected = outputs(theirs, *x)
        del theirs
        ours, _ = load_siglip(scratch)
        found = outputs(ours.eval(), *x)
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max()
        print(f"{name} differ by {error:.1e} of scale")
        assert error < 1e-5


@pytest.mark.parametrize("rule", ["jax", "big_vision"])
def test_weights_can_be_drawn_anew_and_from_the_meta_device(rule):
    torch.manual_seed(1)
    built = SigLIP(CONFIG, weight_init=rule)
    with torch.device("meta"):
        model = SigLIP(CONFIG, weight_init=rule)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(1)
    model.init_weights()
    for name, tensor in built.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
