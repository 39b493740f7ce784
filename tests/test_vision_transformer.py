"""VisionTransformer: timm's and transformers' are the oracles."""

import copy
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import assert_close, assert_same, randomized
from PIL import Image
from safetensors.torch import load_file
from scipy import stats
from timm.models import _manipulate
from timm.models.vision_transformer import VisionTransformer as TimmsTransformer
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from siglip_lib import (
    Attention,
    AttentionPoolLatent,
    Block,
    LayerScale,
    Mlp,
    PatchEmbed,
    VisionTransformer,
    attention_maps,
    create_siglip_vit,
    save_weights,
)
from siglip_lib.backends.trials import runs
from siglip_lib.base.interval import inner_bounds
from siglip_lib.tower import vision_transformer

SMALL = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
MAP = {"class_token": False, "global_pool": "map", "num_classes": 0}
ALL_PARTS = {"global_pool": "map", "num_classes": 5, "reg_tokens": 2, "pre_norm": True}
GELU_TANH = partial(nn.GELU, approximate="tanh")


def small(**options) -> VisionTransformer:
    return VisionTransformer(**(SMALL | {"num_classes": 5} | options))


def timms(**options) -> TimmsTransformer:
    return TimmsTransformer(**(SMALL | {"num_classes": 5, "act_layer": "gelu_tanh"} | options))


def pictures(*size: int, count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, *(size or (24, 24)), dtype=dtype)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- the oracles ---

TOWERS = [
    {},
    MAP,
    MAP | {"num_classes": 5, "mlp_ratio": 3.7362},
    MAP | {"img_size": (27, 43)},  # pixels are left over
    MAP | {"patch_size": (6, 12), "in_chans": 1},
    MAP | {"qkv_bias": False},
    MAP | {"qk_norm": True},
    MAP | {"init_values": 0.1},
    MAP | {"fc_norm": True},
    ALL_PARTS,
    {"global_pool": "avg"},
    {"global_pool": "avg", "class_token": False, "fc_norm": False},
    {"global_pool": "", "reg_tokens": 1},
    {"global_pool": "", "num_classes": 0, "fc_norm": True},
    {"fc_norm": True},
    {"reg_tokens": 3, "num_classes": 0},
    {"reg_tokens": 3, "no_embed_class": True},
    {"no_embed_class": True, "global_pool": "avg"},
    {"class_token": False, "reg_tokens": 2, "global_pool": "avg", "pre_norm": True},
]


@pytest.mark.parametrize(
    "options", TOWERS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "plain"
)
def test_is_timms(options, device):
    ours, theirs = small(**options).double().to(device), timms(**options).double().to(device)
    size, channels = ours.patch_embed.img_size, options.get("in_chans", 3)
    x = torch.randn(2, channels, *size, dtype=torch.float64, device=device)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same(ours, theirs, x)
    features = ours.forward_features(x)
    torch.testing.assert_close(features, theirs.forward_features(x))
    pooled = ours.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, theirs.forward_head(features, pre_logits=True))
    torch.testing.assert_close(ours.get_classifier()(pooled), ours(x))


SIZES = [(24, 24), (32, 16), (40, 56), (8, 8)]
UNEVEN = [(17, 30), (1, 24), (24, 24), (25, 24)]


@pytest.mark.parametrize("prefix", [{}, {"no_embed_class": True}, MAP], ids=["", "none", "map"])
@pytest.mark.parametrize(
    ("size", "pad"), [(size, False) for size in SIZES] + [(size, True) for size in UNEVEN]
)
def test_is_timms_at_other_sizes(size, pad, prefix, device):
    options = {"dynamic_img_size": True, "dynamic_img_pad": pad, "depth": 1} | prefix
    ours, theirs = small(**options), timms(**options)
    # positions are resampled in float32, where CUDA adds up gradients in an order that varies
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    x = pictures(*size, dtype=dtype).to(device)
    assert_same(ours.to(device, dtype), theirs.to(device, dtype), x)


def test_padded_sizes_that_vary_keep_timms_positions():
    # 27 pixels hold 3 whole patches of 8 on a side; a fourth is filled up when a picture comes
    options = MAP | {"img_size": 27, "dynamic_img_size": True, "dynamic_img_pad": True}
    ours, theirs = small(**options).double(), timms(**options).double()
    assert ours.pos_embed.shape == (1, 9, ours.embed_dim)
    assert_same(ours, theirs, pictures(27, 27, dtype=torch.float64))


def test_is_timms_with_the_exact_gelu():
    x = pictures(dtype=torch.float64)
    assert_same(small(act_layer=nn.GELU).double(), timms(act_layer=None).double(), x)


def perturbed(model: VisionTransformer) -> VisionTransformer:
    """Move every weight of a fresh model, so that biases and norms count, and the output keeps its scale."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5 * model.embed_dim**-0.5)
    return model


def twins(
    ours: VisionTransformer, folder: Path, **timms_options
) -> tuple[TimmsTransformer, SiglipVisionModel]:
    """timm's model, in the memory of ours, and transformers' that hold our weights."""
    embed, block = ours.patch_embed, ours.blocks[0]
    config = SiglipVisionConfig(
        image_size=embed.img_size[0],
        patch_size=embed.patch_size[0],
        hidden_size=ours.embed_dim,
        intermediate_size=block.mlp.fc1.out_features,
        num_hidden_layers=len(ours.blocks),
        num_attention_heads=block.attn.num_heads,
    )
    with torch.device("meta"):
        by_timm, by_transformers = timms(**MAP, **timms_options), SiglipVisionModel(config)
    by_timm.load_state_dict(ours.state_dict(), strict=True, assign=True)
    save_weights(ours, folder / "model.safetensors", "transformers")
    renamed = load_file(folder / "model.safetensors")
    by_transformers.load_state_dict(renamed, strict=True, assign=True)
    by_transformers.embeddings.position_ids = torch.arange(embed.num_patches)[None]
    return by_timm.eval(), by_transformers.eval()


def differences(ours, by_timm, by_transformers, x: Tensor) -> dict[str, float]:
    """The largest differences to the oracles, relative to the output's largest value."""
    with torch.inference_mode():
        seen = ours.intermediates(x)
        found = {"features": seen["norm"], "pooled": seen["pooled"]}
        features = by_timm.forward_features(x)
        timm_gave = {"features": features, "pooled": by_timm.forward_head(features)}
        out = by_transformers(x)
        gave = {"features": out.last_hidden_state, "pooled": out.pooler_output}
    return {
        f"{name} to {library}": ((value - theirs[name]).abs().max() / value.abs().max()).item()
        for name, value in found.items()
        for library, theirs in (("timm", timm_gave), ("transformers", gave))
    }


@pytest.mark.parametrize("image_size", [24, 27])
def test_is_transformers_and_timms_in_float32(image_size, tmp_path):
    sizes = {"img_size": image_size, "embed_dim": 96, "depth": 4, "mlp_ratio": 3.7362}
    ours = perturbed(small(**MAP, **sizes)).eval()
    found = differences(
        ours, *twins(ours, tmp_path, **sizes), pictures(image_size, image_size, count=3)
    )
    print(found)
    assert max(found.values()) < 1e-5


@pytest.mark.slow
def test_so400m_is_transformers_and_timms_in_float32(tmp_path):
    ours = perturbed(create_siglip_vit()).eval()
    config = {"img_size": 384, "patch_size": 14, "embed_dim": 1152, "depth": 27, "num_heads": 16}
    oracles = twins(ours, tmp_path, **config, mlp_ratio=3.7362)
    found = differences(ours, *oracles, pictures(384, 384, count=1))
    print(found)
    assert max(found.values()) < 1e-5


# --- sizes ---


def test_so400m_on_the_meta_device():
    inner_bounds.cache_clear()  # as in a new process
    with torch.device("meta"):
        model = create_siglip_vit()
        assert model(torch.empty(2, 3, 384, 384)).shape == (2, 1152)
        assert model.forward_features(torch.empty(1, 3, 384, 384)).shape == (1, 729, 1152)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert parameters(model) == 428_225_600
    assert model.blocks[0].mlp.fc1.out_features == 4304
    assert len(model.state_dict()) == 342


def test_ignoring_the_head_gives_the_normalised_tokens():
    model = small(**MAP, ignore_head=True).eval()
    x = pictures()
    assert model(x).shape == (2, 9, 24)
    assert torch.equal(model(x), model.forward_features(x))
    assert [*model.intermediates(x)][-1] == "norm"
    assert model.attn_pool is not None  # weights still load


# --- what is between ---


@pytest.mark.parametrize("options", [MAP, ALL_PARTS], ids=["map", "all parts"])
def test_intermediates_are_what_the_modules_gave(options):
    model, x = small(**options).eval(), pictures()
    prefix, classes = model.num_prefix_tokens, options["num_classes"]
    gave, arrived = {}, {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, out, name=name: gave.update({name: out}))
        module.register_forward_pre_hook(lambda m, i, name=name: arrived.update({name: i[0]}))
    seen = model.intermediates(x)
    tokens = (2, prefix + 9, 24)
    assert {name: tuple(value.shape) for name, value in seen.items()} == {
        "patches": (2, 9, 24),
        "positions": tokens,
        "blocks.0": tokens,
        "blocks.1": tokens,
        "norm": tokens,
        "pooled": (2, 24),
    } | ({"logits": (2, 5)} if classes else {})
    for name in ("blocks.0", "blocks.1", "norm"):
        assert torch.equal(seen[name], gave[name])
    assert torch.equal(seen["patches"], gave["patch_embed"])
    assert torch.equal(seen["positions"], arrived["norm_pre"])
    assert torch.equal(seen["pooled"], gave["head_drop"])
    assert torch.equal(model(x), [*seen.values()][-1])


LAYERS = [1, 3, [0], [0, 2], (1, -1), [-3, -2]]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("reshape", [False, True])
@pytest.mark.parametrize("n", LAYERS, ids=str)
def test_intermediate_layers_are_timms(n, reshape, norm):
    options = {"depth": 3, "reg_tokens": 2}
    theirs = randomized(timms(**options)).double()
    ours = small(**options).double()
    ours.load_state_dict(theirs.state_dict())
    x = pictures(dtype=torch.float64)
    arguments = {"n": n, "reshape": reshape, "return_prefix_tokens": True, "norm": norm}
    found = ours.get_intermediate_layers(x, **arguments)
    expected = theirs.get_intermediate_layers(x, **arguments)
    torch.testing.assert_close(found, tuple(expected))
    arguments["return_prefix_tokens"] = False
    alone = ours.get_intermediate_layers(x, **arguments)
    assert all(torch.equal(a, b) for a, (b, _) in zip(alone, found, strict=True))


@pytest.mark.parametrize("options", [{}, MAP], ids=["class token", "map"])
def test_reshaped_layers_have_the_grid_of_their_own_input(options):
    options = {"img_size": 56, "patch_size": 14, "dynamic_img_size": True} | options
    theirs = randomized(timms(**options)).double()
    ours = small(**options).double()
    ours.load_state_dict(theirs.state_dict())
    x = pictures(84, 56, dtype=torch.float64)
    [found] = ours.get_intermediate_layers(x, reshape=True)
    assert found.shape == (2, 24, 6, 4)
    torch.testing.assert_close(found, theirs.get_intermediate_layers(x, reshape=True)[0])
    [tokens] = ours.get_intermediate_layers(x)
    assert torch.equal(found[0, :, 5, 1], tokens[0, 5 * 4 + 1])


def test_layers_come_in_the_order_asked_for():
    model, x = small(**MAP).eval(), pictures()
    last, first = model.get_intermediate_layers(x, [-1, 0])
    seen = model.intermediates(x)
    assert torch.equal(last, seen["blocks.1"])
    assert torch.equal(first, seen["blocks.0"])
    [(_, none)] = model.get_intermediate_layers(x, return_prefix_tokens=True)
    assert none.shape == (2, 0, 24)


@pytest.mark.parametrize("n", [0, -1, 3, [2], [-3], [0, 5], []], ids=str)
def test_layers_that_are_not_there(n):
    with pytest.raises(ValueError, match="asks for blocks that are not there; there are 2"):
        small().get_intermediate_layers(pictures(), n)


CALLS = [
    {},
    {"indices": 1},
    {"indices": [2, 0, 0]},
    {"indices": (-2, 0), "norm": True},
    {"indices": [1], "stop_early": True},
    {"indices": [0, 1], "stop_early": True, "output_dict": True, "return_prefix_tokens": True},
    {"output_fmt": "NLC", "return_prefix_tokens": True},
    {"intermediates_only": True, "output_fmt": "NLC"},
    {"output_dict": True, "intermediates_only": True},
]


@pytest.mark.parametrize("options", [MAP, {"reg_tokens": 2}], ids=["map", "prefix"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_forward_intermediates_is_timms(call, options):
    options = options | {"depth": 3, "img_size": (24, 40)}
    theirs = randomized(timms(**options)).double()
    ours = small(**options).double()
    ours.load_state_dict(theirs.state_dict())
    x = pictures(24, 40, dtype=torch.float64)
    found, expected = (model.forward_intermediates(x, **call) for model in (ours, theirs))
    assert type(found) is type(expected)
    torch.testing.assert_close(found, expected)


def test_timms_names():
    options = {"depth": 3, "patch_size": (4, 8)}
    ours, theirs = small(**options), timms(**options)
    assert ours.feature_info == theirs.feature_info
    assert ours.head_hidden_size == theirs.head_hidden_size == ours.num_features


@pytest.mark.parametrize(
    "options", [MAP, {"reg_tokens": 2}, {"no_embed_class": True}], ids=range(3)
)
@pytest.mark.parametrize("size", [(40, 16), (24, 24)])
def test_another_input_size_is_timms(size, options):
    theirs = randomized(timms(**options)).double()
    ours = small(**options).double()
    ours.load_state_dict(theirs.state_dict())
    ours.pos_embed.requires_grad_(False)
    for model in (ours, theirs):
        model.set_input_size(size)
    assert torch.equal(ours.pos_embed, theirs.pos_embed)
    assert not ours.pos_embed.requires_grad
    x = pictures(*size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("indices", [0, 3, [2], [-3], []], ids=str)
def test_forward_intermediates_of_blocks_that_are_not_there(indices):
    with pytest.raises(ValueError, match=r"indices=.* asks for blocks that are not there"):
        small().forward_intermediates(pictures(), indices)


def test_forward_intermediates_refuses():
    with pytest.raises(ValueError, match="output_fmt='NHWC' is unknown; allowed are 'NCHW', 'NLC'"):
        small().forward_intermediates(pictures(), output_fmt="NHWC")
    with pytest.raises(ValueError, match="output_fmt='NCHW' needs every patch"):
        small(patch_drop_rate=0.5).forward_intermediates(pictures())


def test_dropped_patches_form_no_grid():
    model, x = small(patch_drop_rate=0.5), pictures()
    with pytest.raises(ValueError, match="patch_drop_rate drops some"):
        model.get_intermediate_layers(x, reshape=True)
    assert model.get_intermediate_layers(x)[0].shape == (2, 4, 24)
    assert model.eval().get_intermediate_layers(x, reshape=True)[0].shape == (2, 24, 3, 3)


@pytest.mark.parametrize("options", [MAP, ALL_PARTS], ids=["map", "all parts"])
def test_maps_of_the_whole_tower_leave_its_output_alone(options):
    model, x = small(**options).eval(), pictures()
    expected, prefix = model(x), model.num_prefix_tokens
    with attention_maps(model) as maps:
        assert torch.equal(model(x), expected)
    tokens = prefix + 9
    assert {name: tuple(value.shape) for name, value in maps.items()} == {
        "blocks.0.attn": (2, 3, tokens, tokens),
        "blocks.1.attn": (2, 3, tokens, tokens),
        "attn_pool": (2, 3, 1, 9),
    }
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    with attention_maps(model, layers=[-1]) as last:
        model(x)
    assert torch.equal(last["attn_pool"], maps["attn_pool"])


# --- training ---


def training_step(model: VisionTransformer, x: Tensor) -> tuple[dict[str, Tensor], list[int]]:
    """Gradients, and how often each block ran."""
    runs = [0] * len(model.blocks)

    def hook(i):
        def count(*_):
            runs[i] += 1  # before it runs, as recomputing may stop before the end

        return count

    handles = [block.register_forward_pre_hook(hook(i)) for i, block in enumerate(model.blocks)]
    torch.manual_seed(1)  # the same dropouts
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    for handle in handles:
        handle.remove()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return gradients | {"input": x.grad}, runs


@pytest.mark.parametrize("layers", [0, 1, 3, 4])
def test_recomputes_as_many_blocks_as_it_says(layers):
    rates = {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.5}
    model = small(depth=4, num_recomputing_layers=layers, **rates)
    x = pictures()
    gradients, runs = training_step(model, x)
    assert runs == [2] * layers + [1] * (4 - layers)
    model.num_recomputing_layers = 0
    assert_close(gradients, training_step(model, x)[0])
    model.num_recomputing_layers = layers
    assert training_step(model.eval(), x)[1] == [1] * 4


def test_the_first_thing_of_a_process_may_be_recomputed():
    runs.clear()  # the trial of the backends then runs inside the checkpoint
    assert training_step(small(num_recomputing_layers=2), pictures())[1] == [2, 2]


def test_recomputing_keeps_fewer_tensors():
    def kept(layers: int) -> int:
        sizes = []
        model = small(depth=4, num_recomputing_layers=layers)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            model(pictures())
        return sum(sizes)

    assert kept(4) < 0.3 * kept(0)
    assert kept(4) < kept(2) < kept(0)


def test_no_checkpoint_without_gradients_or_while_evaluating(monkeypatch):
    monkeypatch.delattr(vision_transformer, "checkpoint")
    model, x = small(num_recomputing_layers=2), pictures()
    with torch.no_grad():
        model(x)
    model.eval()(x)
    with pytest.raises(NameError):
        model.train()(x)


def test_gradient_checkpointing_is_all_blocks_or_none():
    model, x = small(depth=3), pictures()
    model.set_grad_checkpointing()
    assert training_step(model, x)[1] == [2, 2, 2]
    model.set_grad_checkpointing(False)
    assert training_step(model, x)[1] == [1, 1, 1]


@pytest.mark.parametrize("training", [False, True])
def test_compiles_for_any_batch(training, device):
    model = small(**ALL_PARTS, num_recomputing_layers=1).to(device).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # needs no C compiler
    first = pictures(count=3).to(device)
    torch._dynamo.mark_dynamic(first, 0)
    compiled(first).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (2, 5):
            x = pictures(count=count).to(device)
            model.zero_grad()
            found = compiled(x)
            found.square().sum().backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
            model.zero_grad()
            expected = model(x)
            expected.square().sum().backward()
            expected_gradients = {name: p.grad for name, p in model.named_parameters()}
            assert_close(gradients | {"": found}, expected_gradients | {"": expected})


def test_rates_arrive():
    rates = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate")
    given = {name: (i + 1) / 10 for i, name in enumerate(rates)}
    model = small(depth=5, drop_path_rate=0.2, reg_tokens=2, **given)
    theirs = timms(depth=5, drop_path_rate=0.2, reg_tokens=2, **given)
    assert (model.head_drop.p, model.pos_drop.p, model.patch_drop.prob) == (0.1, 0.2, 0.3)
    assert model.patch_drop.num_prefix_tokens == 3
    for i, block in enumerate(model.blocks):
        assert (block.attn.proj_drop.p, block.mlp.drop1.p, block.mlp.drop2.p) == (0.4, 0.4, 0.4)
        assert block.attn.attn_drop.p == 0.5
        assert block.drop_path1.drop_prob == block.drop_path2.drop_prob == pytest.approx(i * 0.05)
        timms_prob = getattr(theirs.blocks[i].drop_path1, "drop_prob", 0.0)
        assert block.drop_path1.drop_prob == pytest.approx(timms_prob)
    assert small(depth=1, drop_path_rate=0.2).blocks[0].drop_path1.drop_prob == 0


def test_patches_are_dropped_after_their_positions_while_training():
    model, x = small(reg_tokens=2, patch_drop_rate=0.7), pictures()
    assert model.forward_features(x).shape == (2, 3 + 2, 24)
    seen = {}
    model.norm_pre.register_forward_hook(lambda m, i, out: seen.update(kept=out))
    placed = model.intermediates(x)["positions"]
    assert torch.equal(seen["kept"][:, :3], placed[:, :3])
    for token in seen["kept"][0, 3:]:
        assert (placed[0, 3:] == token).all(1).any()
    assert model.eval().forward_features(x).shape == (2, 3 + 9, 24)


# --- the start ---


def std(values: Tensor) -> float:
    return values.detach().double().std(correction=0).item()


@pytest.mark.parametrize("weight_init", ["", "jax", "jax_nlhb", "moco"])
def test_weights_start_as_timms(weight_init):
    options = {"embed_dim": 96, "depth": 1, "weight_init": weight_init, "num_classes": 50}
    options |= {"global_pool": "map", "reg_tokens": 20, "init_values": 0.1, "qk_norm": True}
    ours, theirs = small(**options), timms(**options)
    expected = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == expected.keys()
    for name, parameter in ours.named_parameters():
        pair = [p.detach().flatten().double().numpy() for p in (parameter, expected[name])]
        assert stats.ks_2samp(*pair).pvalue > 1e-3, name
        assert std(parameter) == pytest.approx(pair[1].std(), rel=0.3, abs=1e-9), name


@pytest.mark.parametrize(
    ("weight_init", "qkv", "head", "bias"),
    [
        ("", 0.02, 0.02, 0),
        ("jax", (2 / (64 + 192)) ** 0.5, 0, 0),
        ("jax_nlhb", (2 / (64 + 192)) ** 0.5, 0, -math.log(5)),
        ("moco", (2 / (64 + 64)) ** 0.5, (2 / (64 + 5)) ** 0.5, 0),
    ],
)
def test_moments_of_the_modes(weight_init, qkv, head, bias):
    model = small(embed_dim=64, num_heads=2, weight_init=weight_init)
    attn, mlp = model.blocks[1].attn, model.blocks[1].mlp
    assert std(attn.qkv.weight) == pytest.approx(qkv, rel=0.05)
    assert std(model.head.weight) == pytest.approx(head, rel=0.2)
    assert model.head.bias.tolist() == pytest.approx([bias] * 5)
    assert (attn.qkv.bias == 0).all()
    assert 0 < model.cls_token.abs().max() < 1e-5
    assert std(model.pos_embed) == pytest.approx(0.02, rel=0.1)
    if weight_init.startswith("jax"):
        assert std(mlp.fc1.bias) == pytest.approx(1e-6, rel=0.3)
        assert std(model.patch_embed.proj.weight) == pytest.approx((3 * 64) ** -0.5, rel=0.05)
    else:
        assert (mlp.fc1.bias == 0).all()


def test_skipping_leaves_what_pytorch_starts_with():
    model = small(weight_init="skip", embed_dim=48, reg_tokens=1)
    assert (model.pos_embed == 0).all()
    weight = model.blocks[0].mlp.fc1.weight.detach()
    assert weight.abs().max() <= 48**-0.5
    assert std(weight) == pytest.approx((3 * 48) ** -0.5, rel=0.05)
    assert model.head.bias.abs().max() > 0


def test_weights_are_drawn_anew():
    model = small(init_values=0.1, reg_tokens=2, global_pool="map")
    kept = copy.deepcopy(model)
    randomized(model.blocks)
    model.init_weights()
    assert (model.blocks[0].ls1.gamma == 0.1).all()
    for name in ("pos_embed", "cls_token", "reg_token", "head.weight", "attn_pool.latent"):
        assert not torch.equal(model.get_parameter(name), kept.get_parameter(name)), name


RULES = ["", "jax", "jax_nlhb", "big_vision", "moco", "skip"]
RICH = {
    "global_pool": "map",
    "reg_tokens": 2,
    "init_values": 0.1,
    "qk_norm": True,
    "pre_norm": True,
}


@pytest.mark.parametrize("options", [MAP, RICH, {"global_pool": "avg"}], ids=["map", "rich", "avg"])
@pytest.mark.parametrize("weight_init", RULES)
def test_a_tower_from_the_meta_device_starts_as_one_that_was_built(weight_init, options):
    options = options | {"weight_init": weight_init}
    torch.manual_seed(7)
    built = small(**options)
    with torch.device("meta"):
        model = small(**options)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(math.nan)
    torch.manual_seed(7)
    model.init_weights()
    for (name, found), expected in zip(
        model.state_dict().items(), built.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("weight_init", RULES)
def test_a_stage_from_the_meta_device_starts_whole(weight_init, rank):
    with torch.device("meta"):
        stage = small(depth=3, weight_init=weight_init, **RICH).to_pipeline(3, rank)
    stage.to_empty(device="cpu")
    for tensor in stage.state_dict().values():
        tensor.fill_(math.nan)
    stage.init_weights()
    assert all(tensor.isfinite().all() for tensor in stage.state_dict().values())
    if weight_init != "skip" and rank == 0:
        assert stage.pos_embed.std() > 0.01


def test_parts_that_cannot_start_anew_are_named():
    class OwnNorm(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(dim))

    model = small(norm_layer=OwnNorm)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"blocks.0.norm1 is a OwnNorm, whose weights can't be"):
        model.init_weights()
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def uniform(*fans: int):
    """What Xavier's rule draws for a matrix with these two sides."""
    limit = (6 / sum(fans)) ** 0.5
    return stats.uniform(-limit, 2 * limit)


def test_big_visions_rule():
    # google-research/big_vision, models/vit.py: q, k and v of a block, and of the pooling head, are matrices (dim, dim)
    # of flax's MultiHeadDotProductAttention; a Dense or Conv without a rule of its own is flax's, which is LeCun's
    dim, hidden = 128, 256
    options = {"embed_dim": dim, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 5, "img_size": 64}
    model = small(**options, global_pool="map", weight_init="big_vision", no_embed_class=True)
    state = model.state_dict()
    for name in [name for name in state if name.endswith("kv.weight")]:
        letters = "qkv" if name.endswith("qkv.weight") else "kv"
        parts = state.pop(name).chunk(len(letters))
        state |= {name.replace("weight", x): part for x, part in zip(letters, parts, strict=True)}
    cut = (3 * 64) ** -0.5 / stats.truncnorm(-2, 2).std()
    starts = {
        r"attn\.(qkv\.[qkv]|proj\.weight)|attn_pool\.(kv\.[kv]|(q|proj)\.weight)": uniform(
            dim, dim
        ),
        r"mlp\.fc[12]\.weight": uniform(dim, hidden),
        r"mlp\.fc[12]\.bias": stats.norm(0, 1e-6),
        r"pos_embed": stats.norm(0, dim**-0.5),
        r"attn_pool\.latent": uniform(1, dim),
        r"patch_embed\.proj\.weight": stats.truncnorm(-2, 2, scale=cut),
        r"norm\d?\.weight": 1.0,
        r"cls_token|head\.weight|(norm\d?|head|qkv|kv|q|proj)\.bias": 0.0,
    }
    for name, tensor in state.items():
        (start,) = (x for pattern, x in starts.items() if re.search(rf"(^|\.)({pattern})$", name))
        if isinstance(start, float):
            assert (tensor == start).all(), name
        else:
            values = tensor.flatten().double().numpy()
            assert stats.kstest(values, start.cdf).pvalue > 1e-3, name
            low, high = start.support()
            assert low <= values.min() < values.max() <= high, name


@pytest.mark.parametrize("weight_init", ["", "jax", "jax_nlhb", "big_vision", "moco"])
def test_register_tokens_differ_from_each_other(weight_init):
    tokens = small(reg_tokens=4, weight_init=weight_init).reg_token[0]
    assert (tokens != 0).all()
    assert len(tokens.unique(dim=0)) == 4


# --- its parts ---

NORMS_OF_A_BLOCK = ("norm1", "norm2", "attn.q_norm", "attn.k_norm")


def test_hands_on_its_layers():
    class OwnEmbed(PatchEmbed):
        pass

    class OwnNorm(nn.LayerNorm):
        pass

    class OwnMlp(Mlp):
        pass

    class OwnBlock(Block):
        pass

    options = {"qk_norm": True, "pre_norm": True, "fc_norm": True, "act_layer": nn.SiLU}
    own = {"embed_layer": OwnEmbed, "norm_layer": OwnNorm, "mlp_layer": OwnMlp}
    model = small(**options, **own, block_fn=OwnBlock, global_pool="map")
    assert isinstance(model.patch_embed, OwnEmbed)
    assert model.patch_embed.proj.bias is None
    assert all(isinstance(block, OwnBlock) for block in model.blocks)
    assert all(isinstance(block.mlp, OwnMlp) for block in model.blocks)
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert norms == {n for n, m in model.named_modules() if isinstance(m, OwnNorm)}
    blocks = {f"blocks.{i}.{n}" for i in (0, 1) for n in NORMS_OF_A_BLOCK}
    assert norms == {"norm_pre", "fc_norm", "attn_pool.norm"} | blocks
    acts = {n for n, m in model.named_modules() if isinstance(m, nn.SiLU)}
    assert acts == {"blocks.0.mlp.act", "blocks.1.mlp.act", "attn_pool.mlp.act"}
    assert model(pictures()).shape == (2, 5)


def test_what_it_is_made_of_unless_told():
    model = small(**MAP, init_values=1e-5)
    assert isinstance(model.blocks[0].ls1, LayerScale)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    acts = [m for m in model.modules() if isinstance(m, nn.GELU)]
    assert [act.approximate for act in acts] == ["tanh"] * 3


def test_the_pool_may_have_its_own_activation():
    model = small(**MAP, pool_act_layer=nn.GELU)
    assert model.attn_pool.mlp.act.approximate == "none"
    assert model.blocks[0].mlp.act.approximate == "tanh"
    theirs = timms(**MAP).double()
    theirs.attn_pool.mlp.act = nn.GELU()
    assert_same(model.double(), theirs, pictures(dtype=torch.float64))


@pytest.mark.parametrize("deterministic", [False, True])
def test_flag_and_backend_reach_every_attention(deterministic):
    model = small(**MAP, deterministic=deterministic, backend="eager")
    layers = [m for m in model.modules() if isinstance(m, (Attention, AttentionPoolLatent))]
    assert [(m.deterministic, m.backend) for m in layers] == [(deterministic, "eager")] * 3


# --- the head ---


def test_a_new_head_keeps_the_pool():
    model, x = small(**MAP).double().eval(), pictures(dtype=torch.float64)
    pool, pooled = model.attn_pool, model(x)
    model.reset_classifier(5, "map")
    assert model.attn_pool is pool
    assert model.num_classes == 5
    assert model.head.weight.dtype == torch.float64
    torch.testing.assert_close(model(x), model.head(pooled))
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    assert isinstance(model.get_classifier(), nn.Identity)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_new_head_has_the_models_dtype_and_device(dtype, device):
    model = small().to(device, dtype)
    model.reset_classifier(7)
    assert (model.head.weight.dtype, model.head.weight.device.type) == (dtype, device.type)
    meta = small().to("meta")
    meta.reset_classifier(7)
    assert meta.head.weight.is_meta


@pytest.mark.parametrize("pool", ["avg", "token", ""])
def test_another_pool_is_timms(pool):
    theirs, ours = timms(global_pool="map").double(), small(global_pool="map").double()
    theirs.reset_classifier(3, pool)
    ours.reset_classifier(3, pool)
    assert_same(ours, theirs, pictures(dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ({}, (5, "map"), ValueError, "global_pool='map' needs a model that was built with it"),
        ({}, (5, "map "), ValueError, "global_pool='map ' is unknown"),
        (MAP, (5, "token"), ValueError, "global_pool='token' needs class_token=True"),
        ({}, (-1,), ValueError, "num_classes=-1 must be at least 0"),
        ({}, (5.0,), TypeError, "num_classes=5.0 must be an int"),
    ],
)
def test_a_head_that_cannot_be(options, arguments, error, message):
    model = small(**options)
    before = (model.head, model.attn_pool, model.global_pool, model.num_classes)
    with pytest.raises(error) as caught:
        model.reset_classifier(*arguments)
    assert message in str(caught.value)
    assert before == (model.head, model.attn_pool, model.global_pool, model.num_classes)


# --- for optimizers ---


def test_names_without_weight_decay_are_timms():
    ours, theirs = small(**ALL_PARTS), timms(**ALL_PARTS)
    names = {name for name, _ in ours.named_parameters()}
    assert ours.no_weight_decay() <= names
    assert ours.no_weight_decay() == theirs.no_weight_decay() & names


@pytest.mark.parametrize("options", [{}, MAP, ALL_PARTS, {"fc_norm": True}], ids=range(4))
def test_parameters_are_grouped_as_timms(options):
    ours, theirs = small(**options), timms(**options)
    found = _manipulate.group_parameters(ours, ours.group_matcher(), reverse=True)
    expected = _manipulate.group_parameters(theirs, theirs.group_matcher(), reverse=True)
    if "norm_pre" not in theirs.group_matcher()["stem"]:  # timm before 1.0.31 puts it with the head
        expected |= {name: 0 for name in expected if name.startswith("norm_pre")}
    assert found == expected
    assert found["blocks.1.norm1.weight"] == 2
    coarse = _manipulate.group_parameters(ours, ours.group_matcher(coarse=True), reverse=True)
    for name, layer in coarse.items():
        if name.startswith(("blocks", "patch_embed", "pos_embed", "cls_token", "norm_pre")):
            assert layer == expected[name]


# --- pipelines ---

STAGES = [(size, None) for size in (1, 2, 3, 4)] + [(2, [1, 3]), (3, [0, 4, 0]), (4, [2, 0, 1, 1])]


@pytest.mark.parametrize("options", [MAP, ALL_PARTS, {"no_embed_class": True}], ids=range(3))
@pytest.mark.parametrize(("size", "splits"), STAGES, ids=str)
def test_stages_chained_are_the_whole(size, splits, options):
    whole, x = small(depth=4, **options).eval(), pictures()
    stages = [copy.deepcopy(whole).to_pipeline(size, rank, splits) for rank in range(size)]
    out = x
    for stage in stages:
        out = stage(out)
    assert torch.equal(out, whole(x))
    parts = [stage.state_dict() for stage in stages]
    assert sum(map(len, parts)) == len(whole.state_dict())
    joined = {name: value for part in parts for name, value in part.items()}
    assert joined.keys() == whole.state_dict().keys()
    assert all(torch.equal(joined[name], value) for name, value in whole.state_dict().items())


def test_without_splits_the_first_stages_have_one_more():
    model = small(depth=5)
    stages = [copy.deepcopy(model).to_pipeline(3, rank) for rank in range(3)]
    assert [[i for i, b in enumerate(s.blocks) if isinstance(b, Block)] for s in stages] == [
        [0, 1],
        [2, 3],
        [4],
    ]


def test_a_stage_recomputes_the_blocks_that_the_whole_would():
    last = small(depth=4, num_recomputing_layers=3).to_pipeline(2, 1)
    runs = []
    for i, block in enumerate(last.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: runs.append(i))
    last(torch.randn(2, 10, 24, requires_grad=True)).sum().backward()
    assert runs == [2, 3, 2]


def test_the_last_stage_takes_a_new_head():
    last = small(**MAP).to_pipeline(2, 1).double()
    last.reset_classifier(7, "map")
    assert last(torch.randn(2, 9, 24, dtype=torch.float64)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "pp_size=0 must lie in 1 to 2"),
        ((3, 0), "pp_size=3 must lie in 1 to 2"),
        ((2, 2), "pp_rank=2 in 0 to 1"),
        ((2, -1), "pp_rank=-1 in 0 to 1"),
        ((2, 0, [1, 2]), "pp_splits=[1, 2] must be 2 numbers that add up to 2"),
        ((2, 0, [2]), "pp_splits=[2] must be 2 numbers"),
        ((2, 0, [3, -1]), "pp_splits=[3, -1] must be 2 numbers"),
    ],
)
def test_stages_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match="pp_") as caught:
        small().to_pipeline(*arguments)
    assert message in str(caught.value)


def test_a_stage_refuses_what_needs_the_whole():
    first, last = (small(**MAP).to_pipeline(2, rank) for rank in range(2))
    with pytest.raises(ValueError, match="reset_classifier needs the last stage of a pipeline"):
        first.reset_classifier(5)
    tokens = torch.zeros(1, 9, last.embed_dim)
    for stage, x in ((first, pictures()), (last, tokens)):
        for method in (stage.get_intermediate_layers, stage.forward_intermediates):
            with pytest.raises(ValueError, match=f"{method.__name__} needs the whole model"):
                method(x)
    with pytest.raises(ValueError, match="forward_head needs the last stage of a pipeline"):
        first.forward_head(tokens)
    with pytest.raises(ValueError, match="get_classifier needs the last stage of a pipeline"):
        first.get_classifier()
    with pytest.raises(ValueError, match="set_input_size needs the first stage of a pipeline"):
        last.set_input_size(32)
    with pytest.raises(ValueError, match=r"x has shape \(.*\); it must be"):
        last(pictures())


def test_a_stage_is_not_divided_again():
    with pytest.raises(ValueError, match="one stage of a pipeline already"):
        small().to_pipeline(2, 0).to_pipeline(2, 0)


# --- wrong arguments ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"depth": 0}, ValueError, "depth=0 must be at least 1"),
        ({"embed_dim": 25}, ValueError, "dim=25 must be a multiple of num_heads=3"),
        ({"embed_dim": 24.0}, TypeError, "embed_dim=24.0 must be an int, not float"),
        ({"num_heads": 0}, ValueError, "num_heads=0 must be at least 1"),
        ({"img_size": 7}, ValueError, "img_size=7 holds no patch of 8 pixels"),
        ({"patch_size": 0}, ValueError, "patch_size=0 must be at least 1"),
        ({"in_chans": 0}, ValueError, "in_chans=0 must be at least 1"),
        ({"num_classes": -1}, ValueError, "num_classes=-1 must be at least 0"),
        ({"num_classes": None}, TypeError, "num_classes=None must be an int"),
        ({"reg_tokens": -1}, ValueError, "reg_tokens=-1 must be at least 0"),
        ({"mlp_ratio": math.nan}, ValueError, "mlp_ratio=nan must be finite"),
        ({"global_pool": "max"}, ValueError, "global_pool='max' is unknown; allowed are 'token'"),
        ({"class_token": False}, ValueError, "global_pool='token' needs class_token=True"),
        ({"weight_init": "he"}, ValueError, "weight_init='he' is unknown; allowed are '', 'jax'"),
        ({"num_recomputing_layers": 3}, ValueError, "num_recomputing_layers=3; depth is 2"),
        ({"num_recomputing_layers": True}, TypeError, "num_recomputing_layers=True must be an"),
        ({"drop_rate": 1.0}, ValueError, "drop_rate=1.0 must lie in [0, 1)"),
        ({"pos_drop_rate": -0.1}, ValueError, "pos_drop_rate=-0.1 must lie in [0, 1)"),
        ({"patch_drop_rate": 1.0}, ValueError, "prob=1.0 must lie in [0, 1)"),
        ({"proj_drop_rate": 2}, ValueError, "proj_drop=2 must lie in [0, 1)"),
        ({"attn_drop_rate": 1.5}, ValueError, "attn_drop=1.5 must lie in [0, 1)"),
        ({"drop_path_rate": 1.0}, ValueError, "drop_path_rate=1.0 must lie in [0, 1)"),
        (
            {"backend": "flash"},
            ValueError,
            "backend='flash' is unknown; allowed are auto, triton, cudnn",
        ),
        ({"pos_embed": "learn"}, TypeError, "unexpected keyword argument 'pos_embed'"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error) as caught:
        small(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({}, (24, 32), "24 x 32 pixels, the model is built for 24 x 24; dynamic_img_size=True"),
        ({"dynamic_img_size": True}, (24, 31), "both must be multiples of the patch, 8 x 8"),
    ],
)
def test_pictures_of_a_wrong_size(options, size, message):
    with pytest.raises(ValueError, match="pixels") as caught:
        small(**options)(pictures(*size))
    assert message in str(caught.value)


ENTRIES = {
    "forward": lambda model, x: model(x),
    "forward_features": lambda model, x: model.forward_features(x),
    "intermediates": lambda model, x: model.intermediates(x),
    "get_intermediate_layers": lambda model, x: model.get_intermediate_layers(x, reshape=True),
    "forward_intermediates": lambda model, x: model.forward_intermediates(x),
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            torch.zeros(3, 24, 24),
            ValueError,
            "shape (3, 24, 24); it must be (B, 3, H, W); pictures[",
        ),
        (torch.zeros(2, 1, 24, 24), ValueError, "shape (2, 1, 24, 24); it must be (B, 3, H, W)"),
        (
            [1.0],
            TypeError,
            "pictures must be a tensor (B, 3, H, W), not list; preprocess makes such",
        ),
        (
            Image.new("RGB", (24, 24)),
            TypeError,
            "pictures must be a tensor (B, 3, H, W), not Image",
        ),
        (
            np.zeros((1, 3, 24, 24)),
            TypeError,
            "pictures must be a tensor (B, 3, H, W), not ndarray",
        ),
        (
            torch.zeros(1, 3, 24, 24).byte(),
            TypeError,
            "pictures is torch.uint8; it must be of float16",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_are_no_pictures(x, error, message, entry):
    with pytest.raises(error) as caught:
        entry(small(), x)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(9, 24), ValueError, "x has shape (9, 24); it must be (B, N, 24)"),
        (torch.zeros(2, 9, 23), ValueError, "x has shape (2, 9, 23); it must be (B, N, 24)"),
        ([1.0], TypeError, "x must be a tensor (B, N, 24), not list"),
        (torch.zeros(2, 9, 24).int(), TypeError, "x is torch.int32; it must be of float16, bfl"),
    ],
)
def test_what_are_no_tokens(x, error, message):
    model = small(depth=2, **MAP)
    stage = copy.deepcopy(model).to_pipeline(2, 1)
    for entry in (model.forward_head, stage.forward_features, stage):
        with pytest.raises(error) as caught:
            entry(x)
        assert message in str(caught.value)


def test_refusals_do_not_stop_tracing():
    model, x = small(**MAP).eval(), pictures()
    expected = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


@pytest.mark.parametrize("options", [{}, {"dynamic_img_size": True}, {"reg_tokens": 2}])
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_has_nothing_to_warn_of(options):
    model = small(**MAP | options).eval()
    traced = torch.jit.trace(model, (pictures(),))
    x = pictures()
    torch.testing.assert_close(traced(x), model(x))
