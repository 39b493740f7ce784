"""Maps: held against plain loops, autograd on the weights themselves, and differences; the tower is left as it was."""

import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from comparing import randomized
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from siglip_lib import VisionTransformer, attention_maps
from siglip_lib.evaluate.explain import (
    gradient_attention,
    gradient_tokens,
    isolation,
    occlusion,
    pool_attention,
    rollout,
)
from siglip_lib.tower import attention, attention_pool

SIZE = (24, 32)  # 3 rows and 4 columns of patches
PREFIXES = {"plain": {}, "prefix": {"class_token": True, "reg_tokens": 2}}
of_text = {
    "gradient_attention": gradient_attention,
    "gradient_tokens": gradient_tokens,
    "occlusion": partial(occlusion, window=8, stride=8),
    "isolation": partial(isolation, window=8, stride=8),
}
every = of_text | {
    "pool_attention": lambda tower, pixels, text: pool_attention(tower, pixels),
    "rollout": lambda tower, pixels, text: rollout(tower, pixels),
}
each_method = pytest.mark.parametrize("method", every.values(), ids=every)
each_of_text = pytest.mark.parametrize("method", of_text.values(), ids=of_text)


def make(**options: object) -> VisionTransformer:
    options = {
        "img_size": SIZE,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "class_token": False,
        "global_pool": "map",
        "num_classes": 0,
    } | options
    return randomized(VisionTransformer(**options)).eval()


def given(batch: int = 2, size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, *size), F.normalize(torch.randn(batch, 48), dim=1)


def score(tower: VisionTransformer, pixels: Tensor, text: Tensor) -> Tensor:
    return F.cosine_similarity(tower(pixels), text, dim=1)


def assert_same_map(found: Tensor, expected: Tensor) -> None:
    """To float32's rounding, of the map's own scale: gradients are small."""
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    scale = expected.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("options", PREFIXES.values(), ids=PREFIXES)
def test_pool_attention_is_the_mean_over_the_heads(options):
    tower, (pixels, _) = make(**options), given()
    with attention_maps(tower, [-1]) as maps:
        tower(pixels)
    found = pool_attention(tower, pixels)
    assert_same_map(found, maps["attn_pool"].mean(1).reshape(2, 3, 4))
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(2))


@pytest.mark.parametrize("options", PREFIXES.values(), ids=PREFIXES)
def test_rollout_multiplies_from_the_first_block_to_the_head(options):
    tower, (pixels, _) = make(depth=3, **options), given()
    prefix = tower.num_prefix_tokens
    with attention_maps(tower) as maps:
        tower(pixels)
    *blocks, pool = (weights.double().mean(1) for weights in maps.values())
    for i, found in enumerate(rollout(tower, pixels)):
        flow = torch.eye(prefix + 12, dtype=torch.float64)
        for weights in blocks:
            flow = (weights[i] + torch.eye(prefix + 12)) / 2 @ flow
        assert_same_map(found, (pool[i, 0] @ flow[prefix:])[prefix:].reshape(3, 4))


@pytest.fixture
def kept_weights(monkeypatch) -> list[Tensor]:
    """Let every attention run on weights that autograd knows, and collect these."""
    kept = []

    def attend(q, k, v, *, scale=None, **_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.transpose(-2, -1) * (scale or q.shape[-1] ** -0.5)).softmax(-1)
        kept.append(weights)
        return (weights @ v).transpose(1, 2)

    monkeypatch.setattr(
        attention, "attend_packed", lambda qkv, **rest: attend(*qkv.unbind(2), **rest)
    )
    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(attention_pool, "attend", attend)
    return kept


@pytest.mark.parametrize("options", [*PREFIXES.values(), {"qk_norm": True}], ids=[*PREFIXES, "qk"])
def test_gradient_attention_is_the_rule_with_autograds_own_gradients(
    options, kept_weights, monkeypatch
):
    tower, (pixels, text) = make(depth=3, **options), given()
    prefix = tower.num_prefix_tokens
    gradients = torch.autograd.grad(score(tower, pixels, text).sum(), kept_weights)
    expected = []
    for i in range(2):
        cams = []
        for weights, gradient in zip(kept_weights, gradients, strict=True):
            heads = [(g * w).clamp(min=0) for g, w in zip(gradient[i], weights[i], strict=True)]
            cams.append(torch.stack(heads).mean(0).double())
        relevance = torch.eye(prefix + 12, dtype=torch.float64)
        for cam in cams[:-1]:
            relevance = relevance + cam @ relevance
        mixed = relevance - torch.eye(prefix + 12)
        relevance = mixed / mixed.sum(1, keepdim=True) + torch.eye(prefix + 12)
        expected.append((cams[-1] @ relevance[prefix:])[0, prefix:].reshape(3, 4))
    monkeypatch.undo()
    assert_same_map(gradient_attention(tower, pixels, text), torch.stack(expected).detach())


@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_gradient_attention_is_the_same_with_every_backend(backend):
    pixels, text = given()
    towers = [make(backend=b) for b in (backend, "eager")]
    towers[0].load_state_dict(towers[1].state_dict())
    assert_same_map(*(gradient_attention(tower, pixels, text) for tower in towers))


@pytest.mark.parametrize("options", PREFIXES.values(), ids=PREFIXES)
def test_gradient_tokens_is_the_slope_of_the_score_when_a_token_grows(options):
    tower, (pixels, text) = make(**options).double(), given()
    pixels, text, prefix = pixels.double(), text.double(), tower.num_prefix_tokens
    tokens = tower.forward_features(pixels).detach()

    def scored(patch: int, factor: float) -> Tensor:
        grown = tokens.clone()
        grown[:, prefix + patch] *= factor
        return F.cosine_similarity(tower.forward_head(grown), text, dim=1)

    slopes = [(scored(n, 1 + 1e-5) - scored(n, 1 - 1e-5)) / 2e-5 for n in range(12)]
    expected = torch.stack(slopes, dim=1).clamp(min=0).reshape(2, 3, 4).detach()
    assert (expected == 0).any()
    assert_same_map(gradient_tokens(tower, pixels, text), expected)


@pytest.mark.parametrize("batch_size", [7, 256])
@pytest.mark.parametrize("size", [SIZE, (29, 35)])  # whose last pixels belong to no patch
@pytest.mark.parametrize("fill", [-0.5, "mean"])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (11, 5), (24, 3), (6, 6)])
def test_occlusion_and_isolation_are_those_of_a_plain_loop(window, stride, fill, size, batch_size):
    tower, (pixels, text) = make(img_size=size).double().requires_grad_(False), given(size=size)
    pixels, text = pixels.double(), text.double()
    drops, scores = torch.zeros(2, 2, 3, 4, dtype=torch.float64)
    total = torch.zeros(3, 4)
    for y in [*range(0, size[0] - window, stride), size[0] - window]:
        for x in [*range(0, size[1] - window, stride), size[1] - window]:
            inside = torch.zeros(size, dtype=torch.bool)
            inside[y : y + window, x : x + window] = True
            covered, alone = pixels.clone(), pixels.clone()
            for i in range(2):
                for c in range(3):
                    colour = pixels[i, c].mean() if fill == "mean" else fill
                    covered[i, c][inside] = colour
                    alone[i, c][~inside] = colour
            share = inside[:24, :32].reshape(3, 8, 4, 8).sum((1, 3))
            drop = score(tower, pixels, text) - score(tower, covered, text)
            drops += share * drop[:, None, None]
            scores += share * score(tower, alone, text)[:, None, None]
            total += share
    options = {"window": window, "stride": stride, "fill": fill, "batch_size": batch_size}
    assert_same_map(occlusion(tower, pixels, text, **options), drops / total)
    assert_same_map(isolation(tower, pixels, text, **options), scores / total)


@pytest.mark.parametrize("patch", range(12))
def test_windows_find_the_only_patch_that_is_not_background(patch):
    tower, (_, text) = make(), given(1)
    row, column = divmod(patch, 4)
    pixels = torch.ones(1, 3, *SIZE)
    pixels[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = torch.randn(3, 8, 8)
    found = occlusion(tower, pixels, text, 8, 8)[0].abs()
    assert found[row, column] > 1e-3
    found[row, column] = 0
    assert found.max() < 1e-6  # rounding: the other windows change no pixel
    found = isolation(tower, pixels, text, 8, 8)[0]
    torch.testing.assert_close(found[row, column], score(tower, pixels, text)[0])
    found[row, column] = torch.nan
    found = found[found.isfinite()]
    torch.testing.assert_close(found, score(tower, torch.ones_like(pixels), text).expand(11))


def test_a_text_of_the_opposite_direction_has_the_opposite_map():
    tower, (pixels, text) = make(), given()
    for method in (occlusion, isolation):
        torch.testing.assert_close(
            method(tower, pixels, -text, 8, 8), -method(tower, pixels, text, 8, 8)
        )


@each_method
def test_pictures_of_another_size_than_the_towers(method):
    tower, (pixels, text) = make(dynamic_img_size=True), given(size=(40, 16))
    assert method(tower, pixels, text).shape == (2, 5, 2)


@each_method
def test_pixels_beyond_the_last_whole_patch_belong_to_no_cell(method):
    pixels, text = given(size=(29, 35))
    tower, whole = make(img_size=(29, 35)), make()
    whole.load_state_dict(tower.state_dict())
    found = method(tower, pixels, text)
    assert found.shape == (2, 3, 4)
    if method not in (of_text["occlusion"], of_text["isolation"]):  # last windows stand elsewhere
        assert_same_map(found, method(whole, pixels[:, :, :24, :32], text))


@each_method
def test_pictures_filled_up_to_whole_patches(method):
    tower, (pixels, text) = make(img_size=(21, 27), dynamic_img_pad=True), given(size=(21, 27))
    found = method(tower, pixels, text)
    assert found.shape == (2, 3, 4)
    assert found.isfinite().all()


@each_method
def test_a_picture_has_the_same_map_alone(method):
    tower, (pixels, text) = make(), given(3)
    alone = [method(tower, pixels[i : i + 1], text[i : i + 1]) for i in range(3)]
    assert_same_map(method(tower, pixels, text), torch.cat(alone))


@each_of_text
def test_the_length_of_a_text_does_not_matter_and_its_direction_does(method):
    tower, (pixels, text) = make(), given()
    found = method(tower, pixels, text)
    assert_same_map(method(tower, pixels, 7 * text), found)
    assert (method(tower, pixels, text.flip(0)) - found).abs().max() > 0.1 * found.abs().max()


@each_method
@pytest.mark.parametrize("options", [{"num_classes": 5}, {"ignore_head": True}], ids=str)
def test_a_classifier_or_an_ignored_head_changes_nothing(method, options):
    pixels, text = given()
    tower, other = make(), make(**options)
    other.load_state_dict(tower.state_dict(), strict=False)
    assert torch.equal(method(tower, pixels, text), method(other, pixels, text))


def state(tower: VisionTransformer) -> list[object]:
    modules, parameters = list(tower.modules()), list(tower.parameters())
    return [
        [module.training for module in modules],
        [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules],
        [p.requires_grad for p in parameters],
        [None if p.grad is None else p.grad.sum().item() for p in parameters],
        [p.detach().sum().item() for p in parameters],
    ]


@each_method
@pytest.mark.parametrize("works", [True, False])
def test_the_tower_is_left_as_it_was(method, works):
    tower, (pixels, text) = make(drop_path_rate=0.5, num_recomputing_layers=2), given()
    expected = method(tower, pixels, text)
    tower.train()
    tower.blocks[1].mlp.eval()
    tower.attn_pool.requires_grad_(False)
    for parameter in tower.blocks.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = state(tower)
    if works:
        assert torch.equal(method(tower, pixels, text), expected)  # without dropout
    else:
        with pytest.raises(ValueError, match="pictures are 32 x 32 pixels, the model is built"):
            method(tower, torch.randn(2, 3, 32, 32), text)
    assert state(tower) == before
    assert pixels.grad is None
    assert not pixels.requires_grad


@each_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
@pytest.mark.parametrize("frozen", [True, False])
def test_modes_of_autograd_around_it_do_not_matter(method, mode, frozen):
    tower, (pixels, text) = make().requires_grad_(not frozen), given()
    expected = method(tower, pixels, text)
    with mode():
        found = method(tower, pixels.clone(), text.clone())
    assert torch.equal(found, expected)
    assert not found.requires_grad
    wanted = method(tower, pixels.clone().requires_grad_(), text.clone().requires_grad_())
    assert torch.equal(wanted, expected)
    assert not wanted.requires_grad


@each_method
def test_half_precision(method, device):
    tower, (pixels, text) = make().to(device), given()
    pixels, text = pixels.to(device), text.to(device)
    expected = method(tower, pixels, text)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(method(tower, pixels, text), expected)
    found = method(tower.bfloat16(), pixels.bfloat16(), text)
    assert found.dtype == torch.float32
    # a score is a cosine, and occlusion's map the difference of two that are nearly equal
    of_scores = method in (of_text["occlusion"], of_text["isolation"])
    scale = 0.25 if of_scores else expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=2**-5 * scale)


@each_method
@pytest.mark.parametrize(
    ("options", "shape", "error", "message"),
    [
        ({"global_pool": "avg"}, (2, 3, *SIZE), ValueError, "tower pools by global_pool='avg'"),
        ({"global_pool": ""}, (2, 3, *SIZE), ValueError, "these maps need a pooling head, 'map'"),
        ({}, (3, *SIZE), ValueError, "pixels has shape (3, 24, 32); it must be (B, C, H, W)"),
        ({}, (0, 3, *SIZE), ValueError, "pixels has shape (0, 3, 24, 32)"),
        ({}, (2, 1, *SIZE), ValueError, "1, 24, 32); it must be (B, 3, H, W)"),
        ({}, (2, 3, 32, 24), ValueError, "pictures are 32 x 24 pixels, the model is built for"),
    ],
)
def test_refuses_towers_and_pictures(method, options, shape, error, message):
    with pytest.raises(error, match=re.escape(message)):
        method(make(**options), torch.zeros(shape), torch.ones(2, 48))


@each_method
def test_refuses_what_is_no_whole_tower(method):
    pixels, text = given()
    with pytest.raises(TypeError, match="tower is a Linear; it must be a VisionTransformer"):
        method(torch.nn.Linear(2, 2), pixels, text)
    with pytest.raises(ValueError, match="tower is one stage of a pipeline"):
        method(make().to_pipeline(2, 1), pixels, text)


@each_of_text
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (torch.ones(48), "text has shape (48,); it must be (2, 48); a vector for each picture"),
        (torch.ones(1, 48), "text has shape (1, 48); it must be (2, 48)"),
        (torch.ones(2, 24), "text has shape (2, 24); it must be (2, 48)"),
        (torch.ones(2, 48) * torch.tensor([[1], [0]]), "text holds a vector that is zero or not"),
        (torch.full((2, 48), torch.nan), "text holds a vector that is zero or not finite"),
    ],
)
def test_refuses_texts(method, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        method(make(), given()[0], text)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 25}, ValueError, "window=25 is larger than the pictures, 24 x 32 pixels"),
        ({"window": 0}, ValueError, "window=0 must be at least 1"),
        ({"window": 8.0}, TypeError, "window=8.0 must be an int, not float"),
        ({"stride": 0}, ValueError, "stride=0 must be at least 1"),
        ({"stride": 9}, ValueError, "stride=9 must be at most window=8, or pixels are left out"),
        ({"batch_size": 0}, ValueError, "batch_size=0 must be at least 1"),
        ({"fill": "white"}, ValueError, "fill='white' must be a number or 'mean'"),
        ({"fill": torch.inf}, ValueError, "fill=inf must be finite"),
        ({"fill": None}, TypeError, "fill=None must be a number"),
    ],
)
def test_windows_refuse(options, error, message):
    for method in (occlusion, isolation):
        with pytest.raises(error, match=re.escape(message)):
            method(make(), *given(), **({"window": 8, "stride": 4} | options))


@each_of_text
@pytest.mark.parametrize("length", [1e-12, 1e20])
def test_the_length_of_a_text_plays_no_part(method, length):
    tower, (pixels, text) = make(), given()
    assert_same_map(method(tower, pixels, text * length), method(tower, pixels, text))


# --- what is between the layers and the hooks ---


def compiled_blocks(tower: VisionTransformer) -> VisionTransformer:
    for block in tower.blocks:
        block.compile(backend="eager")
    return tower


def compiled_parts(tower: VisionTransformer) -> VisionTransformer:
    for i, block in enumerate(tower.blocks):
        block.attn = torch.compile(block.attn, backend="eager")
        tower.blocks[i] = torch.compile(block, backend="eager")
    return tower


def compiled_whole(tower: VisionTransformer) -> VisionTransformer:
    tower.compile(backend="eager")
    return tower


def compiled_wrapper(tower: VisionTransformer) -> VisionTransformer:
    return torch.compile(tower, backend="eager")


def data_parallel(tower: VisionTransformer) -> VisionTransformer:
    return torch.nn.DataParallel(torch.compile(tower, backend="eager"))


def checkpointed(tower: VisionTransformer) -> VisionTransformer:
    for i, block in enumerate(tower.blocks):
        tower.blocks[i] = checkpoint_wrapper(block)
    return tower


COMPILED = [compiled_blocks, compiled_parts, compiled_whole, compiled_wrapper]
CHANGES = [*COMPILED, data_parallel, checkpointed]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_layer_is_seen_in_a_tower_that_was_changed(change):
    tower, (pixels, text) = make(depth=1), given()
    with torch.no_grad(), attention_maps(tower) as expected:
        tower(pixels)
    maps = rollout(tower, pixels), gradient_attention(tower, pixels, text)
    tower = change(tower)
    tower(pixels)
    with torch.no_grad():
        tower(pixels)  # compiled for both modes, before any hook is set
        with attention_maps(tower) as found:
            tower(pixels)
    if change in COMPILED:  # the other names say what wraps the blocks
        assert found.keys() == expected.keys()
    # DataParallel takes its model to a GPU, if there is one
    torch.testing.assert_close([m.cpu() for m in found.values()], [*expected.values()])
    pixels, text = (x.to(next(tower.parameters()).device) for x in (pixels, text))
    assert_same_map(rollout(tower, pixels).cpu(), maps[0])
    assert_same_map(gradient_attention(tower, pixels, text).cpu(), maps[1])


@pytest.mark.parametrize("method", [rollout, gradient_attention])
def test_a_block_that_shows_no_weights_is_not_left_out(method):
    tower, given_ = make(depth=3), given()
    tower.blocks[1] = torch.nn.Sequential(torch.nn.LayerNorm(48), torch.nn.Linear(48, 48))
    with pytest.raises(
        ValueError, match="ran 3 attention layers that show their weights; this map needs 4"
    ):
        method(tower, *given_[: 2 if method is gradient_attention else 1])


@each_method
@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ([[0.0]], "pixels must be a tensor (B, C, H, W), not list; preprocess makes"),
        (torch.zeros(2, 3, *SIZE, dtype=torch.uint8), "pixels is torch.uint8; it must be of f"),
    ],
)
def test_refuses_what_are_no_pictures(method, pixels, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        method(make(), pixels, torch.ones(2, 48))


@each_of_text
@pytest.mark.parametrize(
    ("text", "said"), [("a cat", r"\(2, 48\), not str"), (torch.ones(2, 48).long(), "of float16")]
)
def test_refuses_what_is_no_vector(method, text, said):
    with pytest.raises(TypeError, match=rf"text .*must be .*{said}"):
        method(make(), given()[0], text)
