"""Checkpoints: what timm and transformers write is read, and what is written they read, with the same outputs."""

import http.server
import json
import math
import os
import pickle
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import types
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from comparing import assert_close, randomized
from timm.models import vision_transformer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from siglip_lib import (
    VisionTransformer,
    create_siglip_vit,
    load_weights,
    resample_abs_pos_embed,
    save_weights,
)
from siglip_lib.tower import checkpoints
from siglip_lib.tower.siglip_vit import SIGLIP_CONFIGS, SigLIPVisionConfig

MARK = "patch_embed.proj.weight"
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


@contextmanager
def at_most(size: int):
    """No file can grow beyond ``size`` bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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
        # transformers 4.x asks for the format
        assert file.metadata() == {"format": "pt", "grid": "4x4"}
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
    small = SigLIPVisionConfig(32, 8, width=24, layers=2, heads=3, mlp_hidden=48)
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


GRIDS = [((32, 32), (4, 4)), ((16, 64), (2, 8)), ((64, 16), (8, 2))]  # 16 patches each
OTHER_GRIDS = [(a, b) for a in GRIDS for b in GRIDS if a != b]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("old", "new"), OTHER_GRIDS)
def test_equal_counts_are_not_equal_grids(old, new, layout, tmp_path):
    theirs, ours = tower(img_size=old[0]), tower(img_size=new[0])
    save_weights(theirs, tmp_path / "a.safetensors", layout)
    with pytest.warns(UserWarning, match="from {} x {} to {} x {} ".format(*old[1], *new[1])):
        found = load_weights(ours, tmp_path)
    expected = resample_abs_pos_embed(theirs.pos_embed, new[1], old[1], num_prefix_tokens=0)
    assert not torch.equal(expected, theirs.pos_embed)
    assert torch.equal(ours.pos_embed, expected)
    assert found.resampled == (old[1], new[1])
    same = tower(img_size=old[0])
    assert load_weights(same, tmp_path).resampled is None
    assert torch.equal(same.pos_embed, theirs.pos_embed)


@pytest.mark.parametrize("write", [write_timm, write_timm_pickled, write_whole])
def test_where_no_grid_is_noted_a_square_is_taken_for_one(write, tmp_path):
    theirs = siglip_vision_model() if write is write_whole else timm_tower()
    write(theirs, tmp_path)
    ours = tower(img_size=(16, 64))
    with pytest.warns(UserWarning, match="from 4 x 4 to 2 x 8"):
        load_weights(ours, tmp_path)
    square = tower()
    load_weights(square, tmp_path)
    expected = resample_abs_pos_embed(square.pos_embed, (2, 8), (4, 4), num_prefix_tokens=0)
    assert torch.equal(ours.pos_embed, expected)


def test_the_grid_of_siglip_base_is_told_from_7_x_28(tmp_path):
    sizes = dict(patch_size=16, depth=1)
    save_weights(tower(img_size=224, **sizes), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="from 14 x 14 to 7 x 28"):
        load_weights(tower(img_size=(112, 448), **sizes), tmp_path)


def test_a_grid_that_is_neither_noted_nor_square_must_be_given(tmp_path):
    theirs = tower(img_size=(16, 32))
    torch.save(theirs.state_dict(), tmp_path / "a.bin")
    wide, tall, square = tower(img_size=(16, 32)), tower(img_size=(32, 16)), tower()
    for model, like in ((wide, (2, 4)), (tall, (4, 2))):
        assert refused(model, tmp_path / "a.bin") == (
            "a.bin has position embeddings of 8 patches, no square, and notes no grid; give load_weights "
            f"grid=(rows, columns), such as grid={like}, the model's"
        )
    said = refused(square, tmp_path / "a.bin")
    assert "pos_embed (1, 8, 24), not (1, 16, 24). Positions of a grid that is no square" in said
    assert said.endswith("are resampled if load_weights is given grid=(rows, columns)")
    assert load_weights(wide, tmp_path / "a.bin", grid=(2, 4)).resampled is None
    assert torch.equal(wide.pos_embed, theirs.pos_embed)
    for model, new in ((tall, (4, 2)), (square, (4, 4))):
        with pytest.warns(UserWarning, match="from 2 x 4"):
            load_weights(model, tmp_path / "a.bin", grid=(2, 4))
        expected = resample_abs_pos_embed(theirs.pos_embed, new, (2, 4), num_prefix_tokens=0)
        assert torch.equal(model.pos_embed, expected)


@pytest.mark.parametrize(
    ("noted", "grid", "said"),
    [
        ("4 x 4", None, "a.safetensors notes grid='4 x 4'; it must be rows and columns, such as"),
        ("", None, "a.safetensors notes grid=''; it must be"),
        ("3x5", None, "position embeddings of 16 patches, not 3 x 5; give load_weights grid="),
        ("4x4", (3, 5), "position embeddings of 16 patches, not 3 x 5; give load_weights grid="),
        ("4x4", (0, 16), "grid=0 must be at least 1"),
    ],
)
def test_a_grid_that_cannot_be(noted, grid, said, tmp_path):
    model = tower()
    metadata = {"grid": noted}
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors", metadata)
    before = bits(model)
    with pytest.raises(ValueError, match=said):
        load_weights(model, tmp_path, grid)
    assert_equal(model.state_dict(), before)


# --- wrapped models ---


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_block(model):
    model.blocks[1] = compiled(model.blocks[1])
    return model


def block_compiled_in_place(model):
    model.blocks[1].compile(backend="eager")
    return model


WRAPPED = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled parallel": lambda model: compiled(nn.DataParallel(model)),
    "parallel compiled": lambda model: nn.DataParallel(compiled(model)),
}
PARTS_WRAPPED = {
    "block": compiled_block,
    "block in place": block_compiled_in_place,
    "both": lambda model: compiled(compiled_block(model)),
}


@pytest.mark.parametrize("layout", ["timm", "transformers_4"])
@pytest.mark.parametrize("how", WRAPPED | PARTS_WRAPPED)
def test_a_wrapped_model_is_saved_and_loaded_as_the_model_in_it(how, layout, tmp_path):
    model, wrap = tower(), (WRAPPED | PARTS_WRAPPED)[how]
    save_weights(model, tmp_path / "a.safetensors", layout)
    expected = bits(model)
    save_weights(wrap(model), tmp_path / "b.safetensors", layout)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    wrapped = wrap(tower())
    load_weights(wrapped, tmp_path / "a.safetensors")
    assert all(map(torch.equal, wrapped.parameters(), expected.values()))


@pytest.mark.parametrize("make", [timm_tower, siglip_vision_model])
@pytest.mark.parametrize("how", WRAPPED)
def test_what_others_stored_wrapped_is_loaded(how, make, tmp_path):
    theirs, ours = make(), tower()
    torch.save({"model": WRAPPED[how](theirs).state_dict()}, tmp_path / "a.bin")
    load_weights(ours, tmp_path / "a.bin")
    assert_same_outputs(ours, theirs)


@pytest.mark.parametrize("sharded", [False, True])
def test_what_was_stored_with_a_part_compiled_is_loaded(sharded, tmp_path):
    ours, theirs = tower(), compiled_block(tower())
    state = theirs.state_dict()
    assert sum("_orig_mod" in name for name in state) == 12
    (save_sharded([state], tmp_path) if sharded else save(state, tmp_path / "a.safetensors"))
    load_weights(ours, tmp_path)
    assert all(map(torch.equal, ours.state_dict().values(), state.values()))


def test_tensors_stored_wrapped_and_not_are_refused(tmp_path):
    state = tower().state_dict()
    save(state | {"norm._orig_mod.bias": torch.ones(24)}, tmp_path / "a.safetensors")
    assert "a.safetensors holds the same tensors twice, wrapped" in refused(tower(), tmp_path)


@pytest.fixture
def two_processes():
    """A process group of which the other process is made up."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def test_a_sharded_model_is_refused_with_what_to_do(two_processes, tmp_path):
    save_weights(tower(), tmp_path / "a.safetensors")
    model = fully_shard(tower(), mesh=init_device_mesh("cpu", (2,)))
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    for use in (load_weights, save_weights):
        with pytest.raises(ValueError, match=r"model is sharded .*whole_model\(training\)"):
            use(model, tmp_path / "a.safetensors")
    assert all(map(torch.equal, before, [p.to_local() for p in model.parameters()]))


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (math.nan, torch.float32),
        (-math.inf, torch.float32),
        (1e6, torch.float16),
        (1e300, torch.float32),
    ],
)
def test_values_that_are_not_finite_in_the_models_dtype_are_refused(value, dtype, layout, tmp_path):
    theirs, ours = tower(), tower().to(dtype)
    save_weights(theirs, tmp_path / "a.safetensors", layout)
    state = safetensors.torch.load_file(tmp_path / "a.safetensors")
    last = list(state)[-1]
    state[last].view(-1)[-1] = value
    torch.save(state, tmp_path / "a.bin")
    said = refused(ours, tmp_path / "a.bin")
    name = last.removeprefix(checkpoints._LAYOUTS[layout][1])
    assert said == f"a.bin has, as {dtype}, NaN or infinite elements in {name}"


ODD = {
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.expand(1, 24).to_sparse_csr(),
    "expanded": lambda x: x[:1].clone().expand(24),
    "nested": lambda x: torch.nested.nested_tensor([x, x[1:]]),
    "int": lambda x: x.int(),
    "complex": lambda x: x.cfloat(),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
}


@pytest.mark.filterwarnings("ignore")  # torch warns of some of these kinds
@pytest.mark.parametrize("name", ["norm.bias", "attn_pool.mlp.fc2.bias"])
@pytest.mark.parametrize("odd", ODD)
def test_tensors_that_are_not_numbers_in_memory_are_refused_before_any_is_copied(
    odd, name, tmp_path
):
    state = tower().state_dict()
    torch.save(state | {name: ODD[odd](state[name])}, tmp_path / "a.bin")
    told = refused(tower(), tmp_path / "a.bin")
    # torch 2.15 itself refuses to unpickle a nested one, without its name
    assert name in told or (odd == "nested" and "holds more than tensors" in told)


def test_positions_that_would_fill_the_memory_are_refused(tmp_path):
    state = tower().state_dict()
    positions = torch.ones(1, 1, 24, dtype=torch.float64).expand(1, 10**12, 24)
    torch.save(state | {"pos_embed": positions}, tmp_path / "a.bin")
    said = refused(tower(), tmp_path / "a.bin")
    assert said.startswith("a.bin does not store each element of pos_embed: sparse, expanded")


HEADS = {
    "map": dict(global_pool="map"),
    "": dict(global_pool=""),
    "avg": dict(global_pool="avg"),
    "map with classes": dict(global_pool="map", num_classes=5),
    "map with other classes": dict(global_pool="map", num_classes=6),
    "avg with classes": dict(global_pool="avg", num_classes=5),
}


@pytest.mark.parametrize("there", HEADS)
@pytest.mark.parametrize("here", HEADS)
def test_the_error_says_how_to_load_a_tower_with_another_head(here, there, tmp_path):
    theirs = tower(**HEADS[there])
    save_weights(theirs, tmp_path / "a.safetensors")
    if here == there:
        load_weights(tower(**HEADS[here]), tmp_path)
        return
    said = refused(tower(**HEADS[here]), tmp_path)
    asked = re.search(r"heads differ: build .* global_pool='(.*)' and num_classes=(\d),", said)
    assert said.endswith("load it, and call model.reset_classifier(num_classes, global_pool)")
    ours = tower(global_pool=asked[1], num_classes=int(asked[2]))
    load_weights(ours, tmp_path)
    assert_equal(ours.state_dict(), theirs.state_dict())
    if "map" in there or "map" not in here:
        wanted = HEADS[here]
        ours.reset_classifier(wanted.get("num_classes", 0), wanted["global_pool"])
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        assert ours(x).shape == tower(**wanted)(x).shape


def test_no_pooling_under_transformers_names_is_told(tmp_path):
    siglip_vision_model(vision_use_head=False).save_pretrained(tmp_path)
    assert "build the model with global_pool='' and num_classes=0" in refused(tower(), tmp_path)


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
    ("content", "keys"),
    [
        (torch.ones(2), ""),
        ({"state_dict": 3}, "; its keys are state_dict"),
        ({0: torch.ones(1)}, "; its keys are 0"),
        ({"a": [torch.ones(1)], "epoch": 3}, "; its keys are a, epoch"),
        ({"a": {"b": {"c": {MARK: torch.ones(1)}}}}, "; its keys are a"),
    ],
    ids=["tensor", "number", "number as name", "list", "too deep"],
)
def test_a_pickle_must_hold_tensors_by_name(content, keys, tmp_path):
    torch.save(content, tmp_path / "a.bin")
    said = refused(tower(), tmp_path / "a.bin")
    assert said == "a.bin holds no dict of tensors by name" + keys


@pytest.mark.parametrize(
    "keys", ["model_state_dict", "net", "teacher", "module", "ema.weights", "a.state_dict", "model"]
)
@pytest.mark.parametrize("others", [True, False])
def test_the_dict_that_holds_a_tower_is_found_whatever_its_key(keys, others, tmp_path):
    theirs, ours = tower(), tower()
    content = theirs.state_dict()
    for key in reversed(keys.split(".")):
        content = {key: content}
    if others:
        moments = {0: {"exp_avg": torch.ones(1)}}
        content |= {"epoch": 3, "optimizer": {"state": moments}, "loss": {"t": torch.ones(1)}}
    torch.save(content, tmp_path / "a.bin")
    load_weights(ours, tmp_path / "a.bin")
    assert_equal(ours.state_dict(), theirs.state_dict())


def test_weights_stored_beside_their_average_are_taken_and_other_pairs_refused(tmp_path):
    theirs, average, ours = tower(), tower(), tower()
    for key in ("state_dict", "model"):
        content = {key: theirs.state_dict(), f"{key}_ema": average.state_dict()}
        torch.save(content, tmp_path / "a.bin")
        load_weights(randomized(ours), tmp_path / "a.bin")
        assert_equal(ours.state_dict(), theirs.state_dict())
    content = {"student": theirs.state_dict(), "teacher": average.state_dict()}
    torch.save(content, tmp_path / "a.bin")
    assert refused(ours, tmp_path / "a.bin") == (
        "a.bin holds several dicts of tensors by name, student, teacher; store one of them"
    )


def test_a_compressed_pickle_is_refused_as_it_could_unpack_to_anything(tmp_path):
    torch.save({"x": torch.zeros(2**20)} | tower().state_dict(), tmp_path / "a.bin")
    with (
        zipfile.ZipFile(tmp_path / "a.bin") as stored,
        zipfile.ZipFile(tmp_path / "b.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for part in stored.infolist():
            packed.writestr(part.filename, stored.read(part))
    said = refused(tower(), tmp_path / "b.bin")
    assert re.fullmatch(
        r"b\.bin is compressed: \d+ bytes that unpack to 4\d{6}; torch.save .*", said
    )


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
        ("[" * 99_999, "is no index of a sharded checkpoint: RecursionError("),
        ('{"weight_map": 3}', "is no index of a sharded checkpoint: AttributeError("),
        ({MARK: None}, "is no index of a sharded checkpoint: TypeError("),
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


def test_only_what_the_index_names_counts_and_from_the_file_that_it_names(tmp_path):
    theirs, ours = tower(), tower()
    state = theirs.state_dict()
    names = list(state)
    shards = [{n: state[n] for n in names[:20]}, {n: state[n] for n in names[20:]}]
    save_sharded(shards, tmp_path)
    stale = {name: torch.full_like(tensor, 7) for name, tensor in shards[0].items()}
    spoilt = {"norm.more": torch.ones(1)}
    save(stale | shards[1] | spoilt, tmp_path / "model-00002-of-00002.safetensors")
    found = load_weights(ours, tmp_path)
    assert_equal(ours.state_dict(), state)
    assert (found.tensors, found.others) == (42, 0)


def test_a_tensor_that_its_file_lacks_is_an_error_wherever_else_it_is(tmp_path):
    first = dict(tower().state_dict())
    second = {name: first.pop(name) for name in ("norm.weight", "norm.bias")}
    save_sharded([first, second], tmp_path)
    save({"norm.weight": second["norm.weight"]}, tmp_path / "model-00002-of-00002.safetensors")
    said = refused(tower(), tmp_path)
    assert said == "model-00002-of-00002.safetensors lacks norm.bias, which the index says is there"


@pytest.fixture
def folder():
    """A folder that everybody may enter, and a user for whom modes count."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        user = os.geteuid()
        yield Path(folder)
        os.seteuid(user)


def as_ordinary_user():
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "own.safetensors"])
@pytest.mark.parametrize("what", ["the file", "its folder"])
@pytest.mark.parametrize("give", ["the file", "its folder"])
def test_what_may_not_be_read_is_not_called_missing(give, what, name, folder):
    (folder / "a").mkdir()
    path = folder / "a" / name
    if path.suffix == ".bin":
        torch.save(tower().state_dict(), path)
    else:
        save_weights(tower(), path)
    (path if what == "the file" else path.parent).chmod(0o400 if os.geteuid() == 0 else 0)
    if what == "its folder":
        path.parent.chmod(0o644)  # without x: its names can be listed, and nothing else
    as_ordinary_user()
    said = refused(tower(), path if give == "the file" else path.parent, PermissionError)
    assert said.endswith("' cannot be read: Permission denied")
    assert str(folder / "a") in said


def a_folder(path):
    path.mkdir()


def a_pipe(path):
    os.mkfifo(path)


def a_link_to_nothing(path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "own.safetensors"],
)
@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (a_folder, IsADirectoryError, "' is a folder; it must be a file"),
        (a_pipe, ValueError, "' is neither a file nor a folder, but a pipe or a device"),
        (a_link_to_nothing, FileNotFoundError, "' is a link to 'nowhere', where nothing is"),
    ],
)
def test_what_is_there_under_the_name_but_no_file(make, error, said, name, tmp_path):
    make(tmp_path / name)
    assert refused(tower(), tmp_path, error) == f"'{tmp_path / name}{said}"
    if make is not a_folder:
        assert refused(tower(), tmp_path / name, error) == f"'{tmp_path / name}{said}"


def test_a_shard_that_is_a_folder(tmp_path):
    write_deepseek_vl2(timm_tower(), tmp_path)
    (tmp_path / "model-00003-of-00004.safetensors").unlink()
    (tmp_path / "model-00003-of-00004.safetensors").mkdir()
    said = refused(tower(), tmp_path, IsADirectoryError)
    assert "model-00003-of-00004.safetensors' is a folder" in said


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

    for name in ("hf_hub_download", "model_info", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, never)
    said = refused(tower(), source, FileNotFoundError)
    assert f"no file or folder {str(source)!r}" in said
    assert "hf-hub:owner/name" in said


# --- saving ---


@pytest.mark.parametrize(
    ("path", "layout", "said"),
    [
        (
            "a.safetensors",
            "jax",
            "layout='jax' is unknown; allowed are 'timm', 'deepseek_vl2', 'transf",
        ),
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


@pytest.mark.parametrize("fails", ["writing", "replacing", "a full disk"])
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
        elif fails == "replacing":
            patch.setattr(os, "replace", no_replace)
        if fails == "a full disk":
            with (
                at_most(20_000),
                pytest.raises(OSError, match=r"^cannot write '.*/a\.safetensors': "),
            ):
                save_weights(tower(), path)
        else:
            with pytest.raises(OSError, match="disk full"):
                save_weights(tower(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_who_may_read_the_file_is_what_the_umask_says(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        save_weights(tower(), tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == mode


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_are_not_finite_are_not_saved(value, layout, tmp_path):
    model = tower()
    save_weights(model, tmp_path / "a.safetensors", layout)
    before = (tmp_path / "a.safetensors").read_bytes()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] = value
    said = "model has NaN or infinite elements in blocks.1.mlp.fc2.bias"
    with pytest.raises(ValueError, match=said):
        save_weights(model, tmp_path / "a.safetensors", layout)
    assert (tmp_path / "a.safetensors").read_bytes() == before
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
    monkeypatch.setattr(huggingface_hub, "model_info", lambda repository, timeout: empty)
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


LOADER = """
import json, os, signal, sys, time, traceback
from siglip_lib import VisionTransformer, load_weights, save_weights

assert "huggingface_hub" not in sys.modules  # it reads its settings when it is imported
for line in sys.stdin:  # a process each, which shares what was imported so far
    env, sizes, out, said = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(100)
            os.environ.clear()
            os.environ.update(env)
            from huggingface_hub import hf_hub_download, model_info  # not what is timed
            model, start, told = VisionTransformer(**sizes).double(), time.monotonic(), open(said, "w")
            try:
                print(load_weights(model, "hf-hub:nobody/tower"), file=told)
                save_weights(model, out)
            except OSError as error:
                print(error, file=told)
            print(time.monotonic() - start, file=told, flush=True)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def loader():
    command = [sys.executable, "-W", "ignore", "-c", LOADER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        yield running
        running.stdin.close()


@pytest.fixture
def load_in_another_process(loader):
    """What is printed there, with the settings that huggingface_hub reads when it is imported."""

    def load(endpoint: str, folder: Path, **options: str) -> list[str]:
        env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0", **options}
        job = env, SIZES | SIGLIP, str(folder / "out.safetensors"), str(folder / "said")
        print(json.dumps(job), file=loader.stdin, flush=True)
        assert loader.stdout.readline() == "0\n"
        return (folder / "said").read_text().splitlines()

    return load


def test_of_a_repository_only_the_index_and_the_shards_of_the_tower_are_fetched(
    load_in_another_process, tmp_path
):
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


def test_a_refused_connection_is_told_at_once(load_in_another_process, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens
        said = load_in_another_process(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path)
    assert "cannot fetch 'nobody/tower' from the hub (ConnectError)" in said[0]
    assert float(said[1]) < 5  # a download would try again for 20 seconds


@pytest.mark.parametrize("fetched", [True, False])
def test_a_server_that_never_answers_is_not_waited_for(
    load_in_another_process, fetched, cache, tmp_path
):
    theirs, ours = timm_tower(), tower()
    if fetched:
        write_deepseek_vl2(theirs, cache)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections are made, and no more
        said = load_in_another_process(
            f"http://127.0.0.1:{silent.getsockname()[1]}",
            tmp_path,
            HF_HUB_CACHE=str(tmp_path),
            HF_HUB_ETAG_TIMEOUT="1",
        )
    assert 1 < float(said[-1]) < 5
    if not fetched:
        assert "cannot fetch 'nobody/tower' from the hub (ReadTimeout)" in said[0]
        return
    load_weights(ours, tmp_path / "out.safetensors")
    assert_equal(ours.state_dict(), theirs.state_dict())


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
