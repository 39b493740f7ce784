"""What heads do: shares that can be told beforehand, and ablation and patching against blocks written out."""

import re
from functools import partial

import pytest
import torch
from comparing import randomized
from torch import Tensor, nn

from siglip_lib import VisionTransformer
from siglip_lib.evaluate.explain import pool_attention
from siglip_lib.evaluate.heads import activation_patching, mean_ablation, own_object_share

SIZE = (24, 32)  # 3 rows and 4 columns of patches
DEPTH, HEADS = 2, 3
BOXES = torch.tensor([[[0, 0, 16, 16], [21, 0, 32, 24]], [[0, 8, 8, 24], [8, 0, 24, 8.0]]])
IN_BOXES = [[[0, 1, 4, 5], [3, 7, 11]], [[4, 8], [1, 2]]]  # the patches whose centre is inside
both = pytest.mark.parametrize("change", [mean_ablation, activation_patching])
each_site = pytest.mark.parametrize("site", [(0, 1), (1, 2), (0, None), (1, None)], ids=str)


def make(**options: object) -> VisionTransformer:
    sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": DEPTH, "num_heads": HEADS}
    options = {"class_token": False, "global_pool": "map", "num_classes": 0} | options
    return randomized(VisionTransformer(**sizes, **options)).eval()


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *SIZE)


# --- where they look ---


each_prefix = pytest.mark.parametrize(
    "options", [{}, {"class_token": True, "reg_tokens": 2}], ids=str
)


@each_prefix
def test_a_head_that_looks_evenly_gives_the_objects_part_of_all_tokens(options):
    tower = make(**options)
    for block in tower.blocks:
        nn.init.zeros_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
    shares, even = own_object_share(tower, pictures(), BOXES)
    tokens = 12 + tower.num_prefix_tokens
    assert even == pytest.approx((4 * 4 + 3 * 3 + 2 * 2 + 2 * 2) / (4 + 3 + 2 + 2) / tokens)
    torch.testing.assert_close(shares, torch.full((DEPTH, HEADS), even))


@each_prefix
def test_shares_are_those_of_a_plain_loop(options):
    tower, pixels = make(**options), pictures()
    prefix = tower.num_prefix_tokens
    shares, _ = own_object_share(tower, pixels, BOXES)
    assert shares.shape == (DEPTH, HEADS)
    before = [tower.intermediates(pixels)[name] for name in ("positions", "blocks.0")]
    for block, x, found in zip(tower.blocks, before, shares, strict=True):
        weights = block.attn.attention_map(block.norm1(x))[:, :, prefix:, prefix:]
        given = [
            weights[i, :, q, own].sum(-1)
            for i, objects in enumerate(IN_BOXES)
            for own in objects
            for q in own
        ]
        torch.testing.assert_close(found, torch.stack(given).mean(0))


def test_a_tower_that_sees_no_picture_has_the_same_shares_for_all():
    tower = make()
    nn.init.zeros_(tower.patch_embed.proj.weight)
    shares, _ = own_object_share(tower, pictures(), BOXES)
    assert torch.equal(own_object_share(tower, pictures(), BOXES)[0], shares)
    torch.testing.assert_close(own_object_share(tower, pictures(), BOXES.flip(0))[0], shares)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (BOXES[:1], "boxes has shape (1, 2, 4); it must be (2, objects, 4)"),
        (BOXES[:, 0], "boxes has shape (2, 4); it must be (2, objects, 4)"),
        (BOXES[:, :0], "boxes has shape (2, 0, 4)"),
        (BOXES + 5, "boxes hold [26.0, 5.0, 37.0, 29.0]"),
        (torch.tensor([5, 5, 9, 9.0]).expand(2, 1, 4), "boxes hold no patch's centre"),
    ],
)
def test_shares_refuse(boxes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        own_object_share(make(), pictures(), boxes)


# --- what the tower does without them ---


def written_out(tower: VisionTransformer, pixels: Tensor, site: tuple, new: list[Tensor]) -> Tensor:
    """The tower, with what the head or the block's branches give replaced by ``new``, and kept in ``new`` if empty."""
    x = tower.patch_embed(pixels) + tower.pos_embed
    for i, block in enumerate(tower.blocks):
        attention = block.attn
        q, k, v = attention.qkv(block.norm1(x)).unflatten(-1, (3, HEADS, 8)).unbind(2)
        weights = torch.einsum("bqhc, bkhc -> bhqk", q, k) * 8**-0.5
        read = torch.einsum("bhqk, bkhc -> bqhc", weights.softmax(-1), v)
        here, head = site[0] == i, site[1]
        if here and head is not None:
            new[:] = new or [read[:, :, head].clone()]
            read[:, :, head] = new[0]
        added = attention.proj(read.flatten(2))
        after = block.mlp(block.norm2(x + added))
        if here and head is None:
            new[:] = new or [added, after]
            added, after = new
        x = x + added + after
    return tower.forward_head(tower.norm(x))


@each_site
@torch.no_grad()
def test_ablation_puts_the_mean_of_the_pictures_in_its_place(site):
    tower, pixels, reference = make(), pictures(4), pictures(5)
    new = []
    written_out(tower, reference, site, new)
    expected = written_out(tower, pixels, site, [x.mean(0) for x in new])
    with mean_ablation(tower, reference, *site):
        found = tower(pixels)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, tower(pixels), rtol=1e-3)


@each_site
@torch.no_grad()
def test_patching_puts_the_other_pictures_in_its_place(site):
    tower, pixels, others = make(), pictures(3), pictures(3)
    for source in (others, others[:1]):
        new = []
        written_out(tower, source, site, new)
        expected = written_out(tower, pixels, site, new)
        with activation_patching(tower, source, *site):
            found = tower(pixels)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, tower(pixels), rtol=1e-3)


@each_site
def test_a_picture_patched_with_itself_is_the_same_to_the_bit(site):
    tower, pixels = make(), pictures()
    expected = tower(pixels)
    with activation_patching(tower, pixels, *site):
        assert torch.equal(tower(pixels), expected)
    with activation_patching(tower, pixels.flip(0), *site):
        assert not torch.equal(tower(pixels), expected)


def test_what_a_patched_block_adds_is_what_it_adds_to_the_other_pictures():
    tower, pixels, others = make(), pictures(), pictures()
    with activation_patching(tower, others, 0), torch.no_grad():
        found = tower.intermediates(pixels)
    expected = tower.intermediates(others)
    added = [stages["blocks.0"] - stages["positions"] for stages in (found, expected)]
    torch.testing.assert_close(*added)


@each_site
def test_a_tower_that_sees_no_picture_loses_nothing(site):
    tower = make()
    nn.init.zeros_(tower.patch_embed.proj.weight)
    expected = tower(pictures(4))
    with mean_ablation(tower, pictures(4), *site):
        torch.testing.assert_close(tower(pictures(4)), expected)


@both
def test_a_head_that_nothing_reads_does_not_matter(change):
    tower, pixels = make(), pictures()
    nn.init.zeros_(tower.blocks[1].attn.proj.weight[:, 8:16])
    expected = tower(pixels)
    with change(tower, pictures(), 1, 1):
        assert torch.equal(tower(pixels), expected)
    with change(tower, pictures(), 1, 0):
        assert not torch.allclose(tower(pixels), expected)


def test_ablation_reaches_every_function_inside_it_and_two_of_them_add_up():
    tower, pixels = make(), pictures()
    with mean_ablation(tower, pixels, 1, 0):
        once = pool_attention(tower, pixels)
        with mean_ablation(tower, pixels, 1, 2):
            twice = pool_attention(tower, pixels)
        assert torch.equal(pool_attention(tower, pixels), once)
    plain = pool_attention(tower, pixels)
    assert not torch.allclose(once, plain)
    assert not torch.allclose(twice, once)


def state(tower: VisionTransformer) -> list[object]:
    return [
        [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in tower.modules()],
        [parameter.grad for parameter in tower.parameters()],
        {name: value.tolist() for name, value in tower.state_dict().items()},
    ]


@both
@each_site
def test_the_tower_is_left_as_it_was(change, site):
    tower, pixels = make(drop_path_rate=0.5), pictures()
    tower.train()
    tower.blocks[0].mlp.eval()
    before = state(tower)
    with change(tower, pixels, *site):
        tower(pixels)
        assert state(tower)[0] != before[0]
    assert state(tower) == before
    with pytest.raises(KeyError), change(tower, pixels, *site):
        raise KeyError
    assert state(tower) == before
    with pytest.raises(ValueError, match="pictures are 8 x 8 pixels"):
        change(tower, pixels[..., :8, :8], *site).__enter__()
    assert state(tower) == before


@both
@each_site
def test_gradients_go_around_what_was_replaced(change, site):
    tower, pixels = make(), pictures().requires_grad_()
    with change(tower, pictures(), *site):
        tower(pixels).sum().backward()
    assert pixels.grad.abs().sum() > 0
    attention = tower.blocks[site[0]].attn
    rows = slice(None) if site[1] is None else slice(8 * site[1], 8 * site[1] + 8)
    own = attention.qkv.weight.grad
    assert own is None or not own[rows].any()  # its queries


@both
@each_site
def test_what_is_put_there_is_without_dropout(change, site):
    tower, others = make(proj_drop_rate=0.5, drop_path_rate=0.5), pictures()
    with change(tower, others, *site):
        expected = tower(pictures(2).zero_())
    with change(tower.train(), others, *site):
        assert torch.equal(tower.eval()(pictures(2).zero_()), expected)


COMPILE = partial(torch.compile, backend="eager")


@both
@each_site
def test_a_compiled_tower(change, site):
    tower, pixels, others = make(), pictures(), pictures()
    with change(tower, others, *site), torch.no_grad():
        expected = tower(pixels)
    for i, block in enumerate(tower.blocks):
        block.attn, block.mlp = COMPILE(block.attn), COMPILE(block.mlp)
        tower.blocks[i] = COMPILE(block)
    tower = COMPILE(tower)
    with torch.no_grad():
        tower(pixels)
        with change(tower, others, *site):
            torch.testing.assert_close(tower(pixels), expected)


@both
def test_refuses(change):
    tower, pixels = make(dynamic_img_size=True), pictures()
    for site, error, message in (
        ((2, None), ValueError, "block=2 must be below 2, the number of blocks"),
        ((-1, 0), ValueError, "block=-1 must be at least 0"),
        ((0, 3), ValueError, "head=3 must be below 3, the number of heads"),
        ((0, -1), ValueError, "head=-1 must be at least 0"),
        ((0, True), TypeError, "head=True must be an int"),
    ):
        with pytest.raises(error, match=message), change(tower, pixels, *site):
            pass
    with (
        change(tower, pixels, 0, 0),
        pytest.raises(ValueError, match=r"runs on activations \(2, 4, 8\); .* there are \(., 12"),
    ):
        tower(pixels[..., :16, :16])
    with pytest.raises(TypeError, match="tower is a Linear"), change(nn.Linear(2, 2), pixels, 0):
        pass


@pytest.mark.parametrize("site", [(0, 1), (0, None)], ids=str)
def test_patching_refuses_another_number_of_pictures_and_ablation_takes_any(site):
    tower = make()
    with (
        activation_patching(tower, pictures(3), *site),
        pytest.raises(ValueError, match=r"activations \(2, 12, \d+\); .* there are \(3, 12"),
    ):
        tower(pictures(2))
    with mean_ablation(tower, pictures(3), *site):
        assert tower(pictures(2)).shape == (2, 24)
