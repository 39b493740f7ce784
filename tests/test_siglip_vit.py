"""create_siglip_vit: the towers by name, against transformers' sizes."""

import re
from dataclasses import replace

import pytest
import torch
from comparing import randomized
from timm.models import list_models
from torch import nn
from transformers import SiglipVisionConfig as TheirConfig
from transformers import SiglipVisionModel

from siglip_lib import SIGLIP_CONFIGS, create_siglip_vit, save_weights
from siglip_lib.tower.siglip_vit import SigLIPVisionConfig, mlp_ratio


@pytest.fixture
def tiny(monkeypatch) -> str:
    monkeypatch.setitem(SIGLIP_CONFIGS, "tiny", SigLIPVisionConfig(24, 8, 24, 4, 3, 88))
    return "tiny"


@pytest.mark.parametrize("name", SIGLIP_CONFIGS)
def test_sizes_are_transformers(name):
    config = SIGLIP_CONFIGS[name]
    theirs = TheirConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.width,
        intermediate_size=config.mlp_hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
    )
    with torch.device("meta"):
        model, oracle = create_siglip_vit(name), SiglipVisionModel(theirs)
        out = model(torch.empty(1, 3, config.image_size, config.image_size))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(parameter.numel() for parameter in oracle.parameters())
    assert out.shape == (1, config.width)
    assert model.patch_embed.num_patches == oracle.embeddings.num_patches
    assert {norm.eps for norm in model.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}
    acts = [act for act in model.modules() if isinstance(act, nn.GELU)]
    assert [act.approximate for act in acts] == ["tanh"] * (config.layers + 1)


@pytest.mark.parametrize(
    ("name", "size", "width", "depth", "heads", "head_dim", "hidden", "tokens"),
    [
        ("siglip_base_patch16_224", 224, 768, 12, 12, 64, 3072, 196),
        ("siglip_base_patch16_256", 256, 768, 12, 12, 64, 3072, 256),
        ("siglip_base_patch16_384", 384, 768, 12, 12, 64, 3072, 576),
        ("siglip_base_patch16_512", 512, 768, 12, 12, 64, 3072, 1024),
        ("siglip_large_patch16_256", 256, 1024, 24, 16, 64, 4096, 256),
        ("siglip_large_patch16_384", 384, 1024, 24, 16, 64, 4096, 576),
        ("siglip_so400m_patch14_224", 224, 1152, 27, 16, 72, 4304, 256),
        ("siglip_so400m_patch14_384", 384, 1152, 27, 16, 72, 4304, 729),
        ("siglip_so400m_patch16_256", 256, 1152, 27, 16, 72, 4304, 256),
    ],
)
def test_every_tower(name, size, width, depth, heads, head_dim, hidden, tokens):
    with torch.device("meta"):
        model = create_siglip_vit(name)
    block = model.blocks[-1]
    assert model.patch_embed.img_size == (size, size)
    assert model.pos_embed.shape == (1, tokens, width)
    assert len(model.blocks) == depth
    assert (block.attn.num_heads, block.attn.head_dim) == (heads, head_dim)
    assert block.mlp.fc1.out_features == model.attn_pool.mlp.fc1.out_features == hidden
    assert block.attn.qkv.bias is not None
    assert model.cls_token is None
    assert (model.global_pool, model.num_classes) == ("map", 0)


def test_the_names_are_those_of_the_towers_that_were_published():
    # timm's name of each file of Google's, without the mean in the pooling head's place (gap); its 378 are the 384's
    published = re.findall(
        r"vit_(\w+)_siglip_(\d+)\.webli", " ".join(list_models("*_siglip_*", pretrained=True))
    )
    published = {f"siglip_{name}_{size}" for name, size in published if size != "378"}
    assert set(SIGLIP_CONFIGS) == published


def test_so400m_at_384_pixels_unless_told():
    with torch.device("meta"):
        model = create_siglip_vit()
    assert model.patch_embed.img_size == (384, 384)
    assert sum(parameter.numel() for parameter in model.parameters()) == 428_225_600


@pytest.mark.parametrize(
    ("image_size", "grid"), [(None, (16, 16)), (384, (27, 27)), ((98, 56), (7, 4))]
)
def test_the_configs_own_size_unless_told(image_size, grid):
    with torch.device("meta"):
        model = create_siglip_vit("siglip_so400m_patch14_224", image_size)
    assert model.patch_embed.grid_size == grid


@pytest.mark.parametrize(
    ("select_layer", "kept"), [(1, 1), (26, 26), (27, 27), (-1, 27), (-2, 26), (-27, 1)]
)
def test_keeps_the_selected_layers(select_layer, kept):
    with torch.device("meta"):
        model = create_siglip_vit(select_layer=select_layer)
    assert len(model.blocks) == kept


@pytest.mark.parametrize("select_layer", [0, 28, -28, -40, 2.5, True])
def test_layers_out_of_range(select_layer):
    message = f"select_layer={select_layer}; allowed are 1 to 27 and -27 to -1"
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_siglip_vit(select_layer=select_layer)


@pytest.mark.parametrize("select_layer", [1, 3, -1, -2])
def test_selected_layers_are_the_first_ones(select_layer, tiny):
    torch.manual_seed(1)
    whole = create_siglip_vit(tiny).eval()
    torch.manual_seed(1)
    part = create_siglip_vit(tiny, select_layer=select_layer).eval()
    x = torch.randn(2, 3, 24, 24)
    seen = whole.intermediates(x)
    kept = len(part.blocks)
    features = part.forward_features(x)
    assert torch.equal(features, whole.norm(seen[f"blocks.{kept - 1}"]))
    assert torch.equal(part(x), whole.forward_head(features))


@pytest.mark.parametrize("select_layer", [-1, -2, 1])
def test_weights_of_the_whole_tower_whatever_is_kept(select_layer, tiny, tmp_path):
    whole = randomized(create_siglip_vit(tiny)).eval()
    save_weights(whole, tmp_path / "tower.safetensors")
    model = create_siglip_vit(
        tiny, select_layer=select_layer, ckpt_path=tmp_path / "tower.safetensors"
    )
    expected = whole.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    kept = 4 if select_layer == -1 else 3 if select_layer == -2 else 1
    assert len(model.blocks) == kept
    assert all(parameter.requires_grad for parameter in model.parameters())
    x = torch.randn(2, 3, 24, 24)
    [tokens] = whole.get_intermediate_layers(x, [kept - 1], norm=True)
    torch.testing.assert_close(model.eval().forward_features(x), tokens)


@pytest.mark.parametrize("layout", ["timm", "deepseek_vl2", "transformers", "transformers_4"])
def test_weights_under_any_names(layout, tiny, tmp_path):
    whole = create_siglip_vit(tiny)
    save_weights(whole, tmp_path / "model.safetensors", layout)
    loaded = create_siglip_vit(tiny, ckpt_path=str(tmp_path)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in whole.state_dict().items())


def test_weights_of_another_grid_of_as_many_patches_are_resampled(tiny, tmp_path):
    wide = create_siglip_vit(tiny, image_size=(8, 72))
    save_weights(wide, tmp_path / "wide.safetensors")
    with pytest.warns(UserWarning, match="from 1 x 9 to 3 x 3"):
        create_siglip_vit(tiny, ckpt_path=tmp_path / "wide.safetensors")
    torch.save(create_siglip_vit(tiny).state_dict(), tmp_path / "square.bin")
    with pytest.warns(UserWarning, match="from 3 x 3 to 1 x 9"):
        create_siglip_vit(tiny, image_size=(8, 72), ckpt_path=tmp_path / "square.bin")


def test_weights_of_another_depth_are_refused(tiny, tmp_path):
    save_weights(create_siglip_vit(tiny, select_layer=3), tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"missing \(12\): blocks\.3\.attn"):
        create_siglip_vit(tiny, ckpt_path=tmp_path / "part.safetensors")


def test_weights_that_are_not_there(tiny):
    with pytest.raises(FileNotFoundError, match=r"no/such/file\.safetensors"):
        create_siglip_vit(tiny, ckpt_path="no/such/file.safetensors")


def test_further_arguments_are_honoured(tiny):
    model = create_siglip_vit(
        tiny, num_classes=5, drop_path_rate=0.3, deterministic=True, num_recomputing_layers=2
    )
    assert model(torch.randn(2, 3, 24, 24)).shape == (2, 5)
    rates = [block.drop_path1.drop_prob for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert model.attn_pool.deterministic
    assert model.num_recomputing_layers == 2


def test_tokens_as_deepseek_takes_them(tiny):
    model = create_siglip_vit(tiny, select_layer=-2, ignore_head=True)
    assert model(torch.randn(2, 3, 24, 24)).shape == (2, 9, 24)


def test_another_mlp_ratio_counts_for_blocks_and_pooling_head(tiny):
    model = create_siglip_vit(tiny, mlp_ratio=2.6)
    mlps = [block.mlp for block in model.blocks] + [model.attn_pool.mlp]
    assert {mlp.fc1.out_features for mlp in mlps} == {62}


@pytest.mark.parametrize(
    "name", ["image_size", "patch_size", "width", "layers", "heads", "mlp_hidden"]
)
def test_sizes_are_positive_ints(name):
    for value, error in ((0, ValueError), (3.7, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"{name}={value}"):
            replace(SIGLIP_CONFIGS["siglip_base_patch16_224"], **{name: value})


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="width=24 must be a multiple of heads=5"):
        SigLIPVisionConfig(24, 8, 24, 4, 5, 88)


def test_every_hidden_width_comes_out_of_its_ratio():
    for width in (1, 3, 44, 100, 768, 1152, 4096):
        hidden = range(1, 6 * width, max(1, width // 50))
        assert [int(width * mlp_ratio(h, width)) for h in hidden] == [*hidden]


def test_another_width_keeps_the_ratio_of_the_tower():
    # timm's arguments; 368 and 1552 would come out one wider of the ratio of 4304.5 channels
    ratios = {"base_patch16_224": 4.0, "large_patch16_384": 4.0, "so400m_patch14_384": 3.7362}
    for name, ratio in ratios.items():
        config = SIGLIP_CONFIGS[f"siglip_{name}"]
        ours = mlp_ratio(config.mlp_hidden, config.width)
        assert all(int(width * ours) == int(width * ratio) for width in range(16, 6000))


def test_another_depth_counts_for_the_selection(tiny):
    assert len(create_siglip_vit(tiny, depth=3, select_layer=-2).blocks) == 2
    with pytest.raises(ValueError, match="allowed are 1 to 3 and -3 to -1"):
        create_siglip_vit(tiny, depth=3, select_layer=4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"model_name": "siglip_huge"},
            ValueError,
            "'siglip_huge' is unknown; allowed are 'siglip_b",
        ),
        ({"model_name": "siglip_so400m_patch14"}, ValueError, "siglip_so400m_patch14_384"),
        ({"drop_path": 0.1}, TypeError, "unexpected keyword argument 'drop_path'"),
        ({"num_clases": 5}, TypeError, "unexpected keyword argument 'num_clases'"),
        ({"image_size": 13}, ValueError, "img_size=13 holds no patch of 14 pixels"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with torch.device("meta"), pytest.raises(error) as caught:
        create_siglip_vit(**arguments)
    assert message in str(caught.value)
