"""Patches, their positions and their dropping: timm and the convolution are the oracles."""

from functools import partial

import pytest
import timm.layers
import torch
from comparing import assert_same, randomized
from torch import nn

from siglip_lib import PatchEmbed, resample_abs_pos_embed
from siglip_lib.tower.patches import PatchDropout

EMBEDS = [
    ({}, (24, 24)),
    ({"img_size": 27}, (27, 27)),  # as 384 with patches of 14: the last 3 pixels are left out
    ({"img_size": (16, 26), "patch_size": (4, 6)}, (16, 26)),
    ({"in_chans": 1, "bias": False}, (24, 24)),
    ({"norm_layer": partial(nn.LayerNorm, eps=1e-6)}, (24, 24)),
    ({"strict_img_size": False}, (32, 8)),
    ({"strict_img_size": False, "patch_size": (4, 6)}, (4, 12)),
    ({"strict_img_size": False, "dynamic_img_pad": True}, (17, 30)),
    ({"strict_img_size": False, "dynamic_img_pad": True}, (1, 24)),
    ({"dynamic_img_pad": True, "norm_layer": nn.LayerNorm, "img_size": 21}, (21, 21)),
]
embeds = pytest.mark.parametrize(
    ("options", "size"), EMBEDS, ids=[f"{','.join(o) or 'plain'}-{s[0]}x{s[1]}" for o, s in EMBEDS]
)


def pictures(options, size) -> torch.Tensor:
    return torch.randn(2, options.get("in_chans", 3), *size, dtype=torch.float64)


@embeds
def test_is_timms(options, size, device):
    options = {"img_size": 24, "patch_size": 8, "embed_dim": 10} | options
    theirs, ours = timm.layers.PatchEmbed(**options), PatchEmbed(**options)
    x = pictures(options, size).to(device)
    assert_same(ours.double().to(device), theirs.double().to(device), x)
    assert ours.dynamic_feat_size(size) == theirs.dynamic_feat_size(size)


@pytest.mark.parametrize("size", [(24, 24), (27, 27), (26, 31)])
def test_is_the_convolution(size):
    embed = randomized(PatchEmbed(size, 8, embed_dim=10)).double()
    x = pictures({}, size)
    grid = embed.proj(x)
    assert grid.shape[2:] == embed.grid_size
    torch.testing.assert_close(embed(x), grid.flatten(2).mT, rtol=0, atol=1e-12)


class Scaled(nn.Module):
    """A wrapper that shows nothing of what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def subclass(embed):
    embed.proj.__class__ = Doubled


def wrapper(embed):
    embed.proj = Scaled(embed.proj)


def forward_hook(embed):
    embed.proj.register_forward_hook(lambda module, inputs, out: 2 * out)


def forward_pre_hook(embed):
    nn.init.zeros_(embed.proj.bias)
    embed.proj.register_forward_pre_hook(lambda module, inputs: 2 * inputs[0])


def replaced_forward(embed):
    forward = embed.proj.forward
    embed.proj.forward = lambda x: 2 * forward(x)


def parametrization(embed):
    nn.init.zeros_(embed.proj.bias)
    nn.utils.parametrizations.weight_norm(embed.proj).weight = 2 * embed.proj.weight


CHANGES = [subclass, wrapper, forward_hook, forward_pre_hook, replaced_forward, parametrization]


@pytest.mark.parametrize("size", [(24, 24), (27, 27)])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_calls_a_projection_that_is_no_plain_convolution(change, size):
    embed = randomized(PatchEmbed(size, 8, embed_dim=10)).double()
    x = pictures({}, size)
    change(embed)
    torch.testing.assert_close(embed(x), embed.proj(x).flatten(2).mT, rtol=0, atol=1e-12)
    doubled = embed(x)
    plain = PatchEmbed(size, 8, embed_dim=10).double()
    plain.load_state_dict({"proj.weight": weight_of(embed.proj), "proj.bias": bias_of(embed.proj)})
    factor = 1 if change is parametrization else 2
    torch.testing.assert_close(doubled, factor * plain(x), rtol=0, atol=1e-12)


def weight_of(proj):
    return getattr(proj, "inner", proj).weight.detach()


def bias_of(proj):
    return getattr(proj, "inner", proj).bias.detach()


def test_spectral_norms_hook_takes_its_steps():
    embed = randomized(PatchEmbed(24, 8, embed_dim=10))
    embed.proj = nn.utils.spectral_norm(embed.proj)
    out = embed(torch.randn(1, 3, 24, 24))
    assert torch.linalg.matrix_norm(embed.proj.weight.flatten(1), 2).item() < 1.5
    out.sum().backward()
    assert embed.proj.weight_orig.grad.abs().max() > 0


def test_hooks_of_all_modules_and_of_gradients_see_the_projection():
    embed, seen = PatchEmbed(24, 8, embed_dim=10), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        embed(torch.randn(1, 3, 24, 24))
    finally:
        handle.remove()
    assert embed.proj in seen
    seen.clear()
    embed.proj.register_full_backward_hook(lambda m, *_: seen.append(m))
    embed(torch.randn(1, 3, 24, 24, requires_grad=True)).sum().backward()
    assert seen == [embed.proj]


def test_a_convolution_of_another_kind_runs_as_it_is():
    embed = PatchEmbed(24, 8, embed_dim=10)
    embed.proj = nn.Conv2d(3, 10, 8, stride=4, padding=2)
    x = torch.randn(1, 3, 24, 24)
    assert torch.equal(embed(x), embed.proj(x).flatten(2).mT)


def test_a_plain_convolution_runs_as_a_product(monkeypatch):
    monkeypatch.setattr(nn.Conv2d, "forward", lambda *_: pytest.fail("the convolution ran"))
    assert PatchEmbed(24, 8, embed_dim=10)(torch.randn(1, 3, 24, 24)).shape == (1, 9, 10)


@pytest.mark.parametrize("options", [{}, {"strict_img_size": False, "dynamic_img_pad": True}])
def test_another_size_is_set_as_timms(options):
    options = {"img_size": 24, "patch_size": 8, "embed_dim": 10} | options
    theirs, ours = timm.layers.PatchEmbed(**options), PatchEmbed(**options)
    for embed in (ours, theirs):
        embed.set_input_size((40, 16))
    for name in ("img_size", "grid_size", "num_patches"):
        assert getattr(ours, name) == getattr(theirs, name)
    before = vars(ours).copy()
    with pytest.raises(ValueError, match="img_size=7 holds no patch of 8 pixels"):
        ours.set_input_size(7)
    assert vars(ours) == before


def test_384_pixels_with_patches_of_14():
    with torch.device("meta"):
        embed = PatchEmbed(384, 14, embed_dim=1152)
        out = embed(torch.empty(2, 3, 384, 384))
    assert (embed.grid_size, embed.num_patches) == ((27, 27), 729)
    assert out.shape == (2, 729, 1152)


def test_pixels_beyond_the_last_whole_patch_do_not_count():
    embed, x = PatchEmbed(27, 8, embed_dim=10), torch.randn(1, 3, 27, 27)
    changed = x.clone()
    changed[:, :, 24:], changed[:, :, :, 24:] = 7, 7
    assert torch.equal(embed(changed), embed(x))


def test_padding_is_zeros_right_and_below():
    embed = PatchEmbed(24, 8, embed_dim=10, strict_img_size=False, dynamic_img_pad=True)
    x = torch.randn(1, 3, 17, 20)
    whole = torch.zeros(1, 3, 24, 24)
    whole[:, :, :17, :20] = x
    assert torch.equal(embed(x), embed(whole))
    assert embed.dynamic_feat_size((17, 8)) == (3, 1)


def test_its_own_size_is_always_taken():
    embed = PatchEmbed(27, 8, embed_dim=10, strict_img_size=False)
    assert embed(torch.ones(1, 3, 27, 27)).shape == (1, 9, 10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"img_size": 7}, ValueError, "img_size=7 holds no patch of 8 pixels"),
        ({"img_size": (24, 7)}, ValueError, "img_size=(24, 7) holds no patch of 8 pixels"),
        ({"img_size": (1, 2, 3)}, ValueError, "img_size=(1, 2, 3) must be one int or two"),
        ({"patch_size": (8,)}, ValueError, "patch_size=(8,) must be one int or two"),
        ({"patch_size": 0}, ValueError, "patch_size=0 must be at least 1"),
        ({"patch_size": (8, 1.5)}, TypeError, "patch_size=1.5 must be an int, not float"),
        ({"in_chans": 0}, ValueError, "in_chans=0 must be at least 1"),
        ({"embed_dim": True}, TypeError, "embed_dim=True must be an int, not bool"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error) as caught:
        PatchEmbed(**({"img_size": 24, "patch_size": 8} | options))
    assert message in str(caught.value)


DYNAMIC = {"strict_img_size": False}


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (2, 1, 24, 24), "shape (2, 1, 24, 24); it must be (B, 3, H, W)"),
        ({}, (3, 24, 24), "shape (3, 24, 24); it must be (B, 3, H, W)"),
        ({}, (1, 3, 24, 32), "24 x 32 pixels, the model is built for 24 x 24; dynamic_img_size"),
        (DYNAMIC, (1, 3, 24, 30), "24 x 30 pixels; both must be multiples of the patch, 8 x 8"),
        (DYNAMIC, (1, 3, 30, 24), "30 x 24 pixels; both must be multiples of the patch, 8 x 8"),
        (DYNAMIC, (1, 3, 0, 24), "pictures are 0 x 24 pixels, which hold no patch"),
        (DYNAMIC | {"dynamic_img_pad": True}, (1, 3, 24, 0), "24 x 0 pixels, which hold no patch"),
    ],
)
def test_wrong_pictures(options, shape, message):
    with pytest.raises(ValueError, match="pictures") as caught:
        PatchEmbed(24, 8, embed_dim=4, **options)(torch.ones(shape))
    assert message in str(caught.value)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[0.0]], TypeError, "pictures must be a tensor (B, "),
        (
            torch.ones(2, 3, 24, 24).byte(),
            TypeError,
            "pictures is torch.uint8; it must be of fl",
        ),
        (torch.ones(3, 24, 24), ValueError, "H, W); pictures[None] makes a batch of one"),
        (torch.ones(24), ValueError, "pictures has shape (24,); it must be (B, "),
    ],
)
def test_what_are_no_pictures(x, error, message, wrapped):
    embed = PatchEmbed(24, 8, embed_dim=4)
    if wrapped:
        wrapper(embed)
    with pytest.raises(error) as caught:
        embed(x)
    assert message in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(
    ("old", "new", "options"),
    [
        ((4, 4), (7, 7), {}),
        ((6, 6), (3, 4), {}),
        ((6, 6), (2, 11), {"antialias": False}),
        ((3, 5), (5, 3), {"old_size": (3, 5)}),
        ((3, 5), (6, 2), {"old_size": (3, 5), "interpolation": "bilinear"}),
        ((2, 8), (4, 4), {"old_size": (2, 8)}),  # another grid of as many patches
    ],
)
def test_resampling_is_timms(old, new, options, prefix, dtype):
    posemb = torch.randn(1, prefix + old[0] * old[1], 6).to(dtype)
    options = {"num_prefix_tokens": prefix} | options
    found = resample_abs_pos_embed(posemb, new, **options)
    assert found.shape == (1, prefix + new[0] * new[1], 6)
    assert torch.equal(found, timm.layers.resample_abs_pos_embed(posemb, new, **options))
    assert torch.equal(found[:, :prefix], posemb[:, :prefix])


def test_resampling_hands_on_gradients():
    posemb = torch.randn(1, 17, 6, requires_grad=True)
    resample_abs_pos_embed(posemb, (3, 5)).sum().backward()
    assert (posemb.grad != 0).any(-1).all()


@pytest.mark.parametrize("old", [None, (4, 4), [4, 4]])
def test_resampling_to_the_same_grid_gives_the_tensor_itself(old):
    posemb = torch.randn(1, 17, 6)
    assert resample_abs_pos_embed(posemb, (4, 4), old) is posemb
    assert resample_abs_pos_embed(posemb, [4, 4], old) is posemb


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 16, 6), {}, "it must be (1, 17, D); 1 prefix tokens and a grid of 4 x 4"),
        (
            (1, 17, 6),
            {"old_size": (4, 5)},
            "it must be (1, 21, D); 1 prefix tokens and a grid of 4 x 5",
        ),
        ((2, 17, 6), {}, "posemb has shape (2, 17, 6)"),
        ((1, 17), {}, "posemb has shape (1, 17)"),
    ],
)
def test_embeddings_that_fit_no_grid(shape, options, message):
    with pytest.raises(ValueError, match="posemb") as caught:
        resample_abs_pos_embed(torch.ones(shape), (3, 3), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("prob", "prefix", "kept"), [(0.5, 1, 5), (0.25, 0, 7), (0.99, 2, 1), (0.0, 1, 10)]
)
def test_patch_dropout_keeps_that_many(prob, prefix, kept):
    x = torch.arange(4.0 * (prefix + 10)).view(4, -1, 1).expand(-1, -1, 3)  # every token differs
    out = PatchDropout(prob, prefix)(x)
    assert out.shape == (4, prefix + kept, 3)
    assert out.shape == timm.layers.PatchDropout(prob, prefix)(x).shape
    assert torch.equal(out[:, :prefix], x[:, :prefix])
    for given, left in zip(x[:, prefix:, 0].tolist(), out[:, prefix:, 0].tolist(), strict=True):
        assert set(left) <= set(given)
        assert len(set(left)) == len(left)
    assert (out == out[..., :1]).all()  # whole tokens


def test_patch_dropout_draws_for_each_picture_and_each_patch_alike():
    x = torch.arange(10.0).view(1, 10, 1).expand(4000, -1, -1)
    out = PatchDropout(0.5, 0)(x)
    counts = out.flatten().long().bincount()
    assert (counts - 2000).abs().max() < 5 * (4000 * 0.25) ** 0.5
    assert len(out.unique(dim=0)) > 1000


def test_patch_dropout_is_off_while_evaluating():
    x = torch.randn(2, 5, 3)
    assert PatchDropout(0.5).eval()(x) is x
    assert "prob=0.5, num_prefix_tokens=1" in repr(PatchDropout(0.5))


@pytest.mark.parametrize("prob", [1.0, -0.1, 2])
def test_a_patch_dropout_beyond_its_range(prob):
    with pytest.raises(ValueError, match=rf"prob={prob} must lie in \[0, 1\)"):
        PatchDropout(prob)
