"""Checkpoints: what timm and transformers write is read, and what is written they read, with the same outputs."""

import http.server
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from comparing import assert_close, randomized
from timm.models import vision_transformer
from torch import nn

from siglip_lib import (
    VisionTransformer,
    checkpoints,
    create_siglip_vit,
    load_weights,
    resample_abs_pos_embed,
    save_weights,
)
from siglip_lib.siglip_vit import SIGLIP_CONFIGS, SigLIPVisionConfig

LAYOUTS = ["timm", "deepseek_vl2", "transformers", "transformers_4"]
SIZES = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2)
SIGLIP = dict(class_token=False, global_pool="map", num_classes=0)
THEIR_VISION = dict(
    image_size=32,
    patch_size=8,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=48,
)
THEIR_TEXT = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=48,
    vocab_size=40,
    max_position_embeddings=8,
    bos_token_id=1,
    eos_token_id=2,
)
# SigLIP 2 at a fixed resolution says model_type "siglip"; its text tower may be of another width than the projection
SIGLIP_2_TEXT = THEIR_TEXT | dict(hidden_size=36, projection_size=24, vocab_size=80)


@pytest.fixture(autouse=True)
def connections(monkeypatch):
    """No test may look for a machine by name or connect to one; those that start a server do so from a subprocess."""
    seen = []

    def refuse(*args, **kwargs):
        seen.append(args)
        raise OSError("no network in these tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert seen == []


def tower(**options) -> VisionTransformer:
    """In float64, where even another epsilon shows."""
    return randomized(VisionTransformer(**(SIZES | SIGLIP | options)).double().eval())


def timm_tower(**options) -> nn.Module:
    options = dict(act_layer="gelu_tanh", **SIZES | SIGLIP | options)
    return randomized(vision_transformer.VisionTransformer(**options).double().eval())


def siglip_vision_model(**options) -> nn.Module:
    config = transformers.SiglipVisionConfig(**THEIR_VISION | options)
    return randomized(transformers.SiglipVisionModel(config).double().eval())


def siglip_model(text=THEIR_TEXT) -> nn.Module:
    config = transformers.AutoConfig.for_model(
        "siglip", text_config=text, vision_config=THEIR_VISION
    )
    model = transformers.AutoModel.from_config(config)
    assert type(model) is transformers.SiglipModel
    return randomized(model.double().eval())


def outputs(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens and pooled tokens, whosever the model is."""
    with torch.no_grad():
        if isinstance(model, VisionTransformer):
            seen = model.intermediates(x)
            return {"tokens": seen["norm"], "pooled": seen["pooled"]}
        if isinstance(model, vision_transformer.VisionTransformer):
            return {"tokens": model.forward_features(x), "pooled": model(x)}
        seen = getattr(model, "vision_model", model)(x)
        return {"tokens": seen.last_hidden_state, "pooled": seen.pooler_output}


def assert_same_outputs(ours, theirs):
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_close(outputs(ours, x), outputs(theirs, x))


def save(state: dict[str, torch.Tensor], path: Path) -> Path:
    safetensors.torch.save_file({name: t.contiguous() for name, t in state.items()}, path)
    return path


def prefixed(prefix: str, model: nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def save_sharded(shards: list[dict[str, torch.Tensor]], folder: Path) -> Path:
    where = {}
    for i, state in enumerate(shards, 1):
        path = save(state, folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors")
        where |= dict.fromkeys(state, path.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def deepseek_vl2(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Shards of a model of several parts; the image tower stands in the second and third."""
    vision = list(prefixed("vision.", model).items())
    language = {f"language.model.layers.{i}.norm.weight": torch.ones(3) for i in range(3)}
    projector = {"projector.layers.0.weight": torch.ones(4, 4), "image_newline": torch.ones(4)}
    return [language, projector | dict(vision[:9]), dict(vision[9:]), {"language.x": torch.ones(1)}]


def write_whole(model, folder):
    model.save_pretrained(folder)


def write_sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3


def write_timm(model, folder):
    save(model.state_dict(), folder / "model.safetensors")


def write_timm_pickled(model, folder):
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / "pytorch_model.bin")


def write_timm_pickled_as_of_old(model, folder):
    torch.save(
        model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )


def write_4x(model, folder):
    save(prefixed("vision_model.", model), folder / "model.safetensors")


def write_deepseek_vl2(model, folder):
    save_sharded(deepseek_vl2(model), folder)


# maker of their model, writer, and what load_weights must say of it: names, prefix, tensors
ORIGINS = [
    (timm_tower, write_timm, ("timm", "", 42)),
    (timm_tower, write_timm_pickled, ("timm", "", 42)),
    (timm_tower, write_timm_pickled_as_of_old, ("timm", "", 42)),
    (timm_tower, write_deepseek_vl2, ("timm", "vision.", 42)),
    (siglip_vision_model, write_whole, ("transformers", "", 48)),
    (siglip_vision_model, write_sharded, ("transformers", "", 48)),
    (siglip_vision_model, write_4x, ("transformers", "vision_model.", 48)),
    (siglip_model, write_whole, ("transformers", "vision_model.", 48)),
    (siglip_model, write_sharded, ("transformers", "vision_model.", 48)),
    (lambda: siglip_model(SIGLIP_2_TEXT), write_whole, ("transformers", "vision_model.", 48)),
]
ORIGIN_NAMES = [f"{make.__name__}-{write.__name__[6:]}" for make, write, _ in ORIGINS[:-1]]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def refused(model: nn.Module, source: str | Path, error=ValueError) -> str:
    """The message of the error; the model must be as it was."""
    before = bits(model)
    with pytest.raises(error) as caught:
        load_weights(model, source)
    assert_equal(model.state_dict(), before)
    return str(caught.value)


# --- there and back ---


@pytest.mark.parametrize(
    ("make", "write", "expected"), ORIGINS, ids=[*ORIGIN_NAMES, "siglip_2_fixed_resolution"]
)
def test_reads_what_others_write_and_gives_their_outputs(make, write, expected, tmp_path):
    theirs, ours = make(), tower()
    write(theirs, tmp_path)
    found = load_weights(ours, tmp_path)
    assert (found.names, found.prefix, found.tensors) == expected
    assert found.resampled is None
    assert_same_outputs(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_and_loaded_is_exactly_the_same(layout, tmp_path):
    first, second = tower(), tower()
    save_weights(first, tmp_path / "a.safetensors", layout)
    found = load_weights(second, tmp_path)  # the only file of the folder
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers 4.x asks for it
    assert_equal(second.state_dict(), first.state_dict())
    save_weights(second, tmp_path / "b.safetensors", layout)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert found.others == 0
    assert found.names == ("transformers" if "transformers" in layout else "timm")


@pytest.mark.parametrize("layout", ["timm", "deepseek_vl2"])
def test_timm_loads_strictly_what_is_saved(layout, tmp_path):
    ours, theirs = tower(), timm_tower()
    save_weights(ours, tmp_path / "model.safetensors", layout)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    reader = nn.ModuleDict({"vision": theirs}) if layout == "deepseek_vl2" else theirs
    reader.load_state_dict(state, strict=True)
    assert_same_outputs(ours, theirs)


@pytest.mark.parametrize("layout", ["transformers", "transformers_4"])
def test_transformers_loads_all_that_is_saved_and_lacks_nothing(layout, tmp_path):
    ours = tower()
    siglip_vision_model().config.save_pretrained(tmp_path)
    save_weights(ours, tmp_path / "model.safetensors", layout)
    theirs, report = transformers.SiglipVisionModel.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float64
    )
    assert not any(report.values())
    assert_same_outputs(ours, theirs.eval())


def test_transformers_4_layout_is_the_image_tower_of_siglip_model(tmp_path):
    ours, theirs = tower(), siglip_model()
    save_weights(ours, tmp_path / "model.safetensors", "transformers_4")
    report = theirs.load_state_dict(
        safetensors.torch.load_file(tmp_path / "model.safetensors"), strict=False
    )
    assert not report.unexpected_keys
    assert not [name for name in report.missing_keys if name.startswith("vision_model.")]
    assert_same_outputs(ours, theirs)


def test_a_tower_without_pooling_goes_to_transformers_and_back(tmp_path):
    first, second = tower(global_pool=""), tower(global_pool="")
    theirs = siglip_vision_model(vision_use_head=False)
    save_weights(first, tmp_path / "model.safetensors", "transformers")
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    theirs.load_state_dict(state, strict=True)
    load_weights(second, tmp_path)
    assert_equal(second.state_dict(), first.state_dict())


def test_342_tensors_of_timm_are_448_of_transformers_at_the_depth_of_so400m(tmp_path):
    ours = VisionTransformer(**SIZES | SIGLIP | {"depth": 27})
    kinds = {
        "timm": timm_tower(depth=27),
        "transformers": siglip_vision_model(num_hidden_layers=27),
    }
    for (layout, theirs), count in zip(kinds.items(), (342, 448), strict=True):
        save_weights(ours, tmp_path / "a.safetensors", layout)
        state = safetensors.torch.load_file(tmp_path / "a.safetensors")
        shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
        assert {name: tensor.shape for name, tensor in state.items()} == shapes
        assert len(state) == count


@pytest.mark.parametrize("write", [write_sharded, write_deepseek_vl2])
def test_opens_only_the_shards_that_hold_the_tower(write, tmp_path):
    theirs = siglip_model() if write is write_sharded else timm_tower()
    write(theirs, tmp_path)
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in where.items() if name.startswith("vision")}
    for file in set(where.values()) - needed:
        (tmp_path / file).unlink()
    assert len(set(where.values())) > len(needed) > 1
    ours = tower()
    load_weights(ours, tmp_path)
    assert_same_outputs(ours, theirs)


def test_says_what_it_found(tmp_path):
    save(deepseek_vl2(timm_tower())[1] | deepseek_vl2(timm_tower())[2], tmp_path / "a.safetensors")
    assert str(load_weights(tower(), tmp_path / "a.safetensors")) == (
        "42 tensors under timm's names after 'vision.'; 2 of other parts left alone"
    )


@pytest.mark.parametrize("layout", ["timm", "transformers"])
@pytest.mark.parametrize("there", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("here", [torch.bfloat16, torch.float32])
def test_values_take_the_dtype_of_the_model(there, here, layout, tmp_path):
    theirs, ours = tower().to(there), tower().to(here)
    save_weights(theirs, tmp_path / "a.safetensors", layout)
    load_weights(ours, tmp_path / "a.safetensors")
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {here}
    assert_equal(ours.state_dict(), {k: v.to(here) for k, v in theirs.state_dict().items()})


def test_create_siglip_vit_loads_a_whole_tower_and_keeps_some_blocks(tmp_path, monkeypatch):
    small = SigLIPVisionConfig(32, 8, width=24, layers=2, heads=3, mlp_ratio=2.0)
    monkeypatch.setitem(SIGLIP_CONFIGS, "small", small)
    first = tower().float()
    save_weights(first, tmp_path / "a.safetensors", "transformers_4")
    ours = create_siglip_vit("small", select_layer=1, ckpt_path=tmp_path / "a.safetensors")
    kept = {k: v for k, v in first.state_dict().items() if not k.startswith("blocks.1")}
    assert_equal(ours.state_dict(), kept)


# --- position embeddings of another grid ---


@pytest.mark.parametrize("layout", ["timm", "transformers_4"])
@pytest.mark.parametrize(("size", "grid"), [(48, (6, 6)), (16, (2, 2)), ((32, 64), (4, 8))])
def test_positions_are_resampled_to_the_grid_of_the_model_and_it_says_so(
    size, grid, layout, tmp_path
):
    theirs, ours = tower(), tower(img_size=size)
    save_weights(theirs, tmp_path / "a.safetensors", layout)
    said = f"position embeddings resampled from 4 x 4 to {grid[0]} x {grid[1]} patches"
    with pytest.warns(UserWarning, match=said):
        found = load_weights(ours, tmp_path)
    expected = theirs.state_dict()
    expected["pos_embed"] = resample_abs_pos_embed(theirs.pos_embed, grid, num_prefix_tokens=0)
    assert_equal(ours.state_dict(), expected)
    assert found.resampled == ((4, 4), grid)
    assert said in str(found)


def test_the_positions_of_class_and_register_tokens_are_kept(tmp_path):
    options = dict(class_token=True, reg_tokens=2, global_pool="token")
    theirs, ours = tower(**options), tower(**options, img_size=16)
    save_weights(theirs, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="from 4 x 4 to 2 x 2"):
        load_weights(ours, tmp_path)
    expected = resample_abs_pos_embed(theirs.pos_embed, (2, 2), num_prefix_tokens=3)
    assert torch.equal(ours.pos_embed, expected)
    assert torch.equal(ours.pos_embed[:, :3], theirs.pos_embed[:, :3])


def test_equal_grids_give_no_warning_and_a_warning_made_an_error_leaves_the_model(tmp_path):
    save_weights(tower(), tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(tower(), tmp_path)
        assert "resampled" in refused(tower(img_size=16), tmp_path, UserWarning)


def test_positions_of_a_grid_that_is_no_square_are_of_the_wrong_shape(tmp_path):
    save_weights(tower(img_size=(16, 32)), tmp_path / "a.safetensors", "transformers")
    said = refused(tower(), tmp_path)
    assert "embeddings.position_embedding.weight (8, 24), not (16, 24)" in said


# --- strict ---

# layout, tensors that replace others or None for those that go, and what the error lists
MISFITS = [
    ("timm", {"norm.bias": None}, "missing (1): norm.bias"),
    ("timm", {"norm.more": torch.ones(1)}, "unexpected (1): norm.more"),
    (
        "timm",
        {"blocks.1.attn.qkv.bias": torch.ones(71)},
        "of the wrong shape (1): blocks.1.attn.qkv.bias (71,), not (72,)",
    ),
    ("timm", {"pos_embed": torch.ones(2, 9, 24)}, "pos_embed (2, 9, 24), not (1, 16, 24)"),
    ("timm", {"pos_embed": torch.ones(16, 24)}, "pos_embed (16, 24), not (1, 16, 24)"),
    ("timm", {"pos_embed": torch.tensor(1.0)}, "pos_embed (), not (1, 16, 24)"),
    (
        "timm",
        {"norm.bias": torch.ones(24, dtype=torch.int8)},
        "not of a floating-point dtype (1): norm.bias torch.int8",
    ),
    (
        "timm",
        {"norm.bias": None, "norm.more": torch.ones(1), "norm.weight": torch.ones(1, 24)},
        "missing (1): norm.bias; unexpected (1): norm.more; of the wrong shape (1): norm.weight (1, 24), not (24,)",
    ),
    (
        "transformers",
        {"encoder.layers.0.self_attn.k_proj.bias": None},
        "missing (1): encoder.layers.0.self_attn.k_proj.bias",
    ),
    (
        "transformers",
        {"encoder.layers.0.self_attn.k_proj.weight": torch.ones(24, 23)},
        "of the wrong shape (1): encoder.layers.0.self_attn.k_proj.weight (24, 23), not (24, 24)",
    ),
    (
        "transformers",
        {"head.attention.in_proj_bias": torch.ones(70)},
        "head.attention.in_proj_bias (70,), not (72,)",
    ),
    ("transformers", {"head.attention.in_proj_bias": torch.tensor(1.0)}, "in_proj_bias (), not"),
    # another library's name for what is there already
    ("transformers", {"norm.bias": torch.ones(24)}, "unexpected (1): norm.bias"),
    (
        "transformers_4",
        {"vision_model.embeddings.position_ids": torch.arange(16)[None]},
        "unexpected (1): embeddings.position_ids",
    ),
    (
        "deepseek_vl2",
        {"vision.cls_token": torch.ones(1, 1, 24)},
        "unexpected (1): cls_token",
    ),
]


@pytest.mark.parametrize(("layout", "change", "listed"), MISFITS)
def test_what_does_not_fit_is_listed_and_the_model_is_unchanged(layout, change, listed, tmp_path):
    save_weights(tower(), tmp_path / "a.safetensors", layout)
    state = safetensors.torch.load_file(tmp_path / "a.safetensors") | change
    save({k: v for k, v in state.items() if v is not None}, tmp_path / "a.safetensors")
    said = refused(tower(), tmp_path)
    assert said.startswith("a.safetensors does not fit the model, which is unchanged. ")
    assert listed in said


def test_a_deeper_checkpoint_is_refused_with_a_list_that_ends(tmp_path):
    save_weights(tower(depth=4), tmp_path / "a.safetensors", "transformers")
    said = refused(tower(), tmp_path)
    assert "unexpected (32): encoder.layers.2.layer_norm1.bias, " in said
    assert said.endswith("and 12 more")


def test_patches_as_rows_of_pixels_are_refused(tmp_path):
    config = transformers.Siglip2VisionConfig(**THEIR_VISION | {"num_patches": 16})
    transformers.Siglip2VisionModel(config).save_pretrained(tmp_path)
    said = refused(tower(), tmp_path)
    assert "embeddings.patch_embedding.weight (24, 192), not (24, 3, 8, 8)" in said


@pytest.mark.parametrize(
    ("names", "count"),
    [(["vision.patch_embed.proj.weight", "embeddings.patch_embedding.weight"], 2), (["x"], 0)],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_holds_one_image_tower(names, count, sharded, tmp_path):
    state = {name: torch.ones(1) for name in names}
    if sharded:
        save_sharded([state], tmp_path)
    else:
        save(state, tmp_path / "model.safetensors")
    said = refused(tower(), tmp_path)
    assert said.startswith(f"model.safetensors{'.index.json' * sharded} holds {count} image towers")


def test_a_stage_of_a_pipeline_is_refused_with_what_is_too_much(tmp_path):
    save_weights(tower(), tmp_path / "a.safetensors")
    stage = tower().to_pipeline(2, 1)
    assert "unexpected (15): blocks.0." in refused(stage, tmp_path)


def test_a_model_without_memory_is_refused(tmp_path):
    save_weights(tower(), tmp_path / "a.safetensors")
    with torch.device("meta"):
        model = VisionTransformer(**SIZES | SIGLIP)
    with pytest.raises(ValueError, match="model is on the meta device; give it memory"):
        load_weights(model, tmp_path)


# --- files that are none ---


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "old.pth"])
@pytest.mark.parametrize("keep", [0, 1, 7, 100, 0.5, -1])
def test_a_truncated_file_is_an_error_that_names_it(name, keep, tmp_path):
    path = tmp_path / name
    if name == "model.safetensors":
        save_weights(tower(), path)
    else:
        new = name == "pytorch_model.bin"
        torch.save(tower().state_dict(), path, _use_new_zipfile_serialization=new)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])
    assert refused(tower(), path).startswith(f"{name} is ")


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
@pytest.mark.parametrize(
    "garbage",
    [
        b"<!DOCTYPE html><html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n",
        b"\x80\x02tX.",
        b"\xff" * 99,
    ],
    ids=["html", "pointer", "pickle", "bytes"],
)
def test_garbage_is_an_error_that_names_it(name, garbage, tmp_path):
    (tmp_path / name).write_bytes(garbage)
    said = refused(tower(), tmp_path / name)
    assert said.startswith((f"{name} is truncated or no ", f"{name} is no checkpoint"))


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    path, trace = tmp_path / "pytorch_model.bin", tmp_path / "was_here"
    for write in (torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, 2))):
        write({"norm.weight": Malicious(trace)}, path)
        assert "no checkpoint, or holds more than tensors" in refused(tower(), tmp_path)
        assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # it would have


@pytest.mark.parametrize(
    "content",
    [torch.ones(2), {"state_dict": 3}, {0: torch.ones(1)}, {"a": [torch.ones(1)]}],
    ids=["tensor", "number", "number as name", "list"],
)
def test_a_pickle_must_hold_tensors_by_name(content, tmp_path):
    torch.save(content, tmp_path / "a.bin")
    assert refused(tower(), tmp_path / "a.bin") == "a.bin holds no dict of tensors by name"


MARK = "patch_embed.proj.weight"


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "is no index of a sharded checkpoint: JSONDecodeError("),
        (b"\xff", "is no index of a sharded checkpoint: UnicodeDecodeError("),
        ("[]", "is no index of a sharded checkpoint: TypeError("),
        ("{}", "is no index of a sharded checkpoint: KeyError('weight_map')"),
        ('{"weight_map": ["a"]}', "is no index of a sharded checkpoint: AttributeError("),
        ({MARK: 1}, "is no index of a sharded checkpoint: TypeError("),
        ({MARK: "../a.safetensors"}, "names files outside its folder"),
        ({MARK: "/etc/passwd"}, "names files outside its folder"),
        ({"text.x": "sub/a.safetensors", MARK: "a.safetensors"}, "names files outside its folder"),
    ],
)
def test_a_malformed_index_is_an_error_that_says_how(index, said, tmp_path):
    if isinstance(index, dict):
        index = json.dumps({"weight_map": index})
    index = index.encode() if isinstance(index, str) else index
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    found = refused(tower(), tmp_path)
    assert found.startswith("model.safetensors.index.json ")
    assert said in found


def test_shards_that_are_missing_are_listed(tmp_path):
    write_deepseek_vl2(timm_tower(), tmp_path)
    lost = [f"model-0000{i}-of-00004.safetensors" for i in (2, 3)]
    for name in lost:
        (tmp_path / name).unlink()
    said = refused(tower(), tmp_path, FileNotFoundError)
    assert said == f"model.safetensors.index.json names {', '.join(lost)}, missing beside it"


@pytest.mark.parametrize("files", [[], ["a", "b"]])
def test_a_folder_without_a_file_of_a_known_name_must_hold_just_one(files, tmp_path):
    for name in files:
        save_weights(tower(), tmp_path / f"{name}.safetensors")
    said = refused(tower(), tmp_path, FileNotFoundError)
    assert f"but {len(files)} other safetensors files; name the file itself" in said


@pytest.mark.parametrize("source", ["google/siglip-so400m-patch14-384", Path("weights/model.bin")])
def test_a_path_that_leads_nowhere_is_not_looked_for_on_the_hub(source, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError

    for name in ("hf_hub_download", "model_info", "try_to_load_from_cache"):
        monkeypatch.setattr(huggingface_hub, name, never)
    said = refused(tower(), source, FileNotFoundError)
    assert f"no file or folder {str(source)!r}" in said
    assert "hf-hub:owner/name" in said


# --- saving ---


@pytest.mark.parametrize(
    ("path", "layout", "said"),
    [
        ("a.safetensors", "jax", "layout='jax' is unknown; allowed are timm, deepseek_vl2, transf"),
        ("a.bin", "timm", "a.bin' must end in .safetensors"),
    ],
)
def test_saving_under_an_unknown_layout_or_suffix_is_refused(path, layout, said, tmp_path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        save_weights(tower(), tmp_path / path, layout)
    assert said in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["transformers", "transformers_4"])
@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"class_token": True}, "cls_token"),
        ({"init_values": 0.1}, "blocks.0.ls1.gamma"),
        ({"qk_norm": True}, "blocks.0.attn.q_norm.weight"),
        ({"qkv_bias": False}, "blocks.0.attn.qkv.bias"),
        ({"num_classes": 3}, "head.weight"),
        ({"reg_tokens": 1}, "reg_token"),
        ({"pre_norm": True}, "norm_pre.weight, patch_embed.proj.bias"),
        ({"global_pool": "avg"}, "fc_norm.bias, fc_norm.weight, norm.bias, norm.weight"),
    ],
)
def test_a_part_that_transformers_lacks_cannot_be_saved_for_it(options, differs, layout, tmp_path):
    model = tower(**options)
    with pytest.raises(ValueError, match="SiglipVisionModel has no class token") as caught:
        save_weights(model, tmp_path / "a.safetensors", layout)
    assert differs in str(caught.value)
    save_weights(model, tmp_path / "a.safetensors")  # timm has them all
    second = tower(**options)
    load_weights(second, tmp_path)
    assert_equal(second.state_dict(), model.state_dict())


@pytest.mark.parametrize("fails", ["writing", "replacing"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(fails, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_weights(tower(), path)
    before = path.read_bytes()

    def write_half(state, path, metadata):
        Path(path).write_bytes(before[:99])
        raise OSError("disk full")

    def no_replace(old, new):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if fails == "writing":
            patch.setattr(safetensors.torch, "save_file", write_half)
        else:
            patch.setattr(checkpoints.os, "replace", no_replace)
        with pytest.raises(OSError, match="disk full"):
            save_weights(tower(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_model_can_be_saved_over_the_file_that_it_came_from(tmp_path):
    path = tmp_path / "a.safetensors"
    save_weights(tower(), path)
    model, second = tower(), tower()
    load_weights(model, path)
    randomized(model)
    save_weights(model, path, "transformers")
    load_weights(second, path)
    assert_equal(second.state_dict(), model.state_dict())


# --- the hub ---

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A machine without network; the folder in which huggingface_hub would keep nobody/tower."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--nobody--tower"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    return repository / "snapshots" / COMMIT


@pytest.mark.parametrize("write", [write_timm, write_timm_pickled, write_deepseek_vl2])
def test_a_repository_fetched_before_loads_offline(write, cache):
    theirs, ours = timm_tower(), tower()
    write(theirs, cache)
    load_weights(ours, "hf-hub:nobody/tower")
    assert_equal(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("fetched", ["nothing", "a part"])
def test_offline_the_error_says_what_to_download_and_where_to_put_it(fetched, cache):
    if fetched == "a part":
        write_deepseek_vl2(timm_tower(), cache)
        (cache / "model-00003-of-00004.safetensors").unlink()
    said = refused(tower(), "hf-hub:nobody/tower", OSError)
    assert "cannot fetch 'nobody/tower' from the hub (OfflineModeIsEnabled)" in said
    assert "Download its model.safetensors, or its model.safetensors.index.json and the par" in said
    assert said.endswith("into a folder, and give that folder's path")


def test_a_repository_without_weights_is_told(monkeypatch):
    empty = types.SimpleNamespace(siblings=[])
    monkeypatch.setattr(huggingface_hub, "model_info", lambda repository: empty)
    said = refused(tower(), "hf-hub:nobody/tower", FileNotFoundError)
    assert said == "'hf-hub:nobody/tower' holds no weights that are known here"


def test_a_name_that_no_repository_can_have_is_an_error(cache):
    assert "a/b/c" in refused(tower(), "hf-hub:a/b/c")


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that holds the files of ``self.server.folder`` under the name nobody/tower."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        folder, path = self.server.folder, self.path.removeprefix("/nobody/tower/resolve/main/")
        there = {file.name: file for file in folder.iterdir()}
        if self.path == "/api/models/nobody/tower":
            siblings = [{"rfilename": name} for name in there]
            body = json.dumps({"id": "nobody/tower", "sha": COMMIT, "siblings": siblings}).encode()
        else:
            body = there[path].read_bytes()
            self.server.fetched.add(path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body):x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


LOAD = """
import sys, time
from siglip_lib import VisionTransformer, load_weights, save_weights
import huggingface_hub  # its import is not what is timed
model, start = VisionTransformer(**eval(sys.argv[1])).double(), time.monotonic()
try:
    print(load_weights(model, "hf-hub:nobody/tower"))
    save_weights(model, sys.argv[2])
except OSError as error:
    print(error)
print(time.monotonic() - start)
"""


def load_in_another_process(endpoint: str, folder: Path) -> list[str]:
    """What is printed there, with the settings that huggingface_hub reads when it is imported."""
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", LOAD, repr(SIZES | SIGLIP), str(folder / "out.safetensors")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_of_a_repository_only_the_index_and_the_shards_of_the_tower_are_fetched(tmp_path):
    theirs, ours = timm_tower(), tower()
    (tmp_path / "hub").mkdir()
    write_deepseek_vl2(theirs, tmp_path / "hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.fetched = tmp_path / "hub", set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = load_in_another_process(f"http://127.0.0.1:{server.server_port}", tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    assert said[0].startswith("42 tensors under timm's names after 'vision.'")
    assert server.fetched == {
        "model.safetensors.index.json",
        "model-00002-of-00004.safetensors",
        "model-00003-of-00004.safetensors",
    }
    load_weights(ours, tmp_path / "out.safetensors")
    assert_equal(ours.state_dict(), theirs.state_dict())


def test_a_refused_connection_is_told_at_once(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens
        said = load_in_another_process(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path)
    assert "cannot fetch 'nobody/tower' from the hub (ConnectError)" in said[0]
    assert float(said[1]) < 5  # a download would try again for 20 seconds


# --- the real size ---

# model.safetensors of the real repository, to the byte: the random one has its names, shapes and dtype
REAL_BYTES = 3_511_950_624
SO400M = dict(
    hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304
)


@pytest.fixture
def scratch(tmp_path):
    """A folder that goes at once, as pytest would keep gigabytes of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_google_siglip_so400m_patch14_384_end_to_end(scratch):
    config = transformers.SiglipConfig(
        vision_config=SO400M | {"image_size": 384, "patch_size": 14},
        text_config=SO400M | {"vocab_size": 32_000},
    )
    with torch.device("meta"):
        theirs = transformers.SiglipModel(config)
    theirs = theirs.to_empty(device="cpu").eval()
    theirs.vision_model.embeddings.position_ids = torch.arange(729)[None]  # not among the weights
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.02)
    theirs.save_pretrained(scratch / "whole")
    theirs.save_pretrained(scratch / "sharded", max_shard_size="1GB")
    assert [p.stat().st_size for p in (scratch / "whole").glob("*.safetensors")] == [REAL_BYTES]
    assert len(list((scratch / "sharded").glob("*.safetensors"))) == 4
    x = torch.rand(1, 3, 384, 384) * 2 - 1
    expected = outputs(theirs, x)
    del theirs
    for folder in ("whole", "sharded"):
        ours = create_siglip_vit("siglip_so400m_patch14_384", ckpt_path=scratch / folder).eval()
        assert sum(p.numel() for p in ours.parameters()) == 428_225_600
        found = outputs(ours, x)
        for name, value in expected.items():
            error = (found[name] - value).abs().max() / value.abs().max()
            print(f"{folder}: {name} differ by {error:.1e} of scale")
            assert error < 1e-5
