"""vl: what DeepSeek-VL2 does between tower and language model, against short independent forms."""

import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from comparing import randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import log_softmax
from torch.testing import assert_close

from siglip_lib import VisionTransformer, attention_maps, create_siglip_vit
from siglip_lib.siglip.text import EOS
from siglip_lib.vl import (
    Adaptor,
    LanguageModel,
    VisualPrefix,
    candidate_resolutions,
    caption_loss,
    choose_resolution,
    lay_out,
    load_visual_prefix,
    tile_picture,
)
from siglip_lib.vl.language_model import rotate

SIDES = st.integers(1, 6000)


def independent_choice(size, candidates):
    """Exact fractions in place of integer division, a loop in place of a key."""
    best = None
    for high, wide in candidates:
        scale = min(Fraction(high, size[0]), Fraction(wide, size[1]))
        shown = min(math.floor(size[0] * scale) * math.floor(size[1] * scale), math.prod(size))
        waste = high * wide - shown
        if best is None or (shown, -waste) > best[:2]:
            best = (shown, -waste, (high, wide))
    return best[2]


@given(size=st.tuples(SIDES, SIDES), most=st.integers(1, 12), tile=st.sampled_from([16, 384]))
def test_the_choice_is_that_of_exact_fractions(size, most, tile):
    candidates = candidate_resolutions(tile, most)
    assert choose_resolution(size, candidates) == independent_choice(size, candidates)


@pytest.mark.parametrize(
    ("size", "chosen"),
    [
        ((384, 384), (384, 384)),
        ((10, 10), (384, 384)),  # all show all of it, this one wastes least
        ((768, 768), (768, 768)),
        ((384, 1000), (384, 1152)),
        ((1000, 384), (1152, 384)),
        ((3000, 3000), (1152, 1152)),
        ((720, 1280), (768, 1536)),
        ((100, 6000), (384, 3456)),
    ],
)
def test_pictures_whose_choice_is_known(size, chosen):
    assert choose_resolution(size, candidate_resolutions()) == chosen


def test_of_equal_candidates_the_first():
    both = [(384, 768), (768, 384)]
    assert choose_resolution((50, 50), both) == (384, 768)
    assert choose_resolution((50, 50), both[::-1]) == (768, 384)


def test_nine_tiles_at_most_in_every_shape():
    found = candidate_resolutions()
    assert len(found) == len({*found}) == 23
    assert max(rows * columns for rows, columns in found) == 9 * 384**2
    assert {(384, 9 * 384), (3 * 384, 3 * 384)} < {*found}
    assert (4 * 384, 3 * 384) not in found


@pytest.mark.parametrize(
    ("size", "candidates", "error", "said"),
    [
        ((0, 5), [(384, 384)], ValueError, "size"),
        ((5.0, 5), [(384, 384)], TypeError, "size"),
        ((5, 5), [], ValueError, "candidates is empty"),
        ((5, 5), [(384, 384), (384, 0)], ValueError, r"candidates\[1\]"),
    ],
)
def test_sizes_that_are_none(size, candidates, error, said):
    with pytest.raises(error, match=said):
        choose_resolution(size, candidates)


@settings(max_examples=25, deadline=None)
@given(height=st.integers(20, 300), width=st.integers(20, 300))
def test_tiles_put_together_are_the_framed_picture(height, width):
    noise = np.random.default_rng(height * 301 + width)
    picture = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
    cut = tile_picture(picture, candidate_resolutions(32, 9), size=32)
    rows, columns = cut.grid
    assert (rows * 32, columns * 32) == choose_resolution(
        (height, width), candidate_resolutions(32, 9)
    )
    for views, down, across in ((cut.tiles, rows, columns), (cut.thumbnail[None], 1, 1)):
        assert views.shape == (down * across, 3, 32, 32)
        whole = np.full((down * 32, across * 32, 3), 127, np.uint8)
        # as PIL's contain and pad round
        if width * down > height * across:
            inner = (round(height / width * across * 32), across * 32)
        else:
            inner = (down * 32, round(width / height * down * 32))
        top, left = (
            round((big - small) * 0.5) for big, small in zip(whole.shape, inner, strict=False)
        )
        resized = Image.fromarray(picture).resize(inner[::-1], Image.Resampling.BICUBIC)
        whole[top : top + inner[0], left : left + inner[1]] = np.asarray(resized)
        for i in range(down):
            for j in range(across):
                tile = whole[32 * i : 32 * i + 32, 32 * j : 32 * j + 32]
                expected = torch.from_numpy(tile / 127.5 - 1).permute(2, 0, 1)
                assert_close(views[i * across + j], expected.float(), atol=1e-6, rtol=0)


def test_the_frame_is_grey():
    cut = tile_picture(np.zeros((384, 100, 3), np.uint8))
    assert cut.grid == (1, 1)
    assert cut.thumbnail[:, :, 0].unique().tolist() == pytest.approx([127 / 127.5 - 1])
    assert (cut.thumbnail[:, :, 192] == -1).all()


def test_a_picture_too_thin_and_a_grid_that_is_no_grid():
    with pytest.raises(ValueError, match="800 x 1 is too thin"):
        tile_picture(np.zeros((1, 800, 3), np.uint8))
    tile_picture(np.zeros((1, 767, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\(384, 400\).* must be multiples of size=384"):
        tile_picture(np.zeros((9, 9, 3), np.uint8), [(384, 384), (384, 400)])
    with pytest.raises(TypeError, match="picture: ndarray of float64 must be"):
        tile_picture(np.zeros((9, 9, 3)))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 7), columns=st.integers(1, 7), width=st.integers(1, 5))
def test_the_adaptor_is_its_independent_form(rows, columns, width):
    torch.manual_seed(rows * 64 + columns * 8 + width)
    adaptor = randomized(Adaptor(width, 6)).double()
    x = torch.randn(2, rows * columns, width, dtype=torch.float64)
    first, _, last = adaptor.layers
    expected = []
    for i in range(0, rows, 2):
        for j in range(0, columns, 2):
            four = torch.zeros(2, width, 2, 2, dtype=torch.float64)
            for di in range(min(2, rows - i)):
                for dj in range(min(2, columns - j)):
                    four[:, :, di, dj] = x[:, (i + di) * columns + j + dj]
            hidden = four.flatten(1) @ first.weight.T + first.bias
            hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            expected.append(hidden @ last.weight.T + last.bias)
    assert_close(adaptor(x, (rows, columns)), torch.stack(expected, 1), atol=1e-12, rtol=0)


def test_so400ms_tokens_become_196():
    with torch.device("meta"):
        assert Adaptor(1152, 1280)(torch.empty(1, 729, 1152), (27, 27)).shape == (1, 196, 1280)
    with pytest.raises(ValueError, match=r"x has shape \(1, 12, 4\)"):
        Adaptor(4, 2)(torch.zeros(1, 12, 4), (3, 5))


@settings(max_examples=40, deadline=None)
@given(
    down=st.integers(1, 4),
    across=st.integers(1, 4),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
)
def test_the_layout_is_its_independent_form(down, across, rows, columns):
    thumbnail = torch.arange(rows * columns).view(1, rows, columns, 1).float()
    tiles = 1000 + torch.arange(down * across * rows * columns).view(
        1, down * across, rows, columns, 1
    )
    newline, separator = torch.tensor([-1.0]), torch.tensor([-2.0])
    expected = []
    for i in range(rows):
        expected += [i * columns + j for j in range(columns)] + [-1]
    alone = list(expected)
    expected.append(-2)
    for y in range(down * rows):
        for x in range(across * columns):
            tile = y // rows * across + x // columns
            expected.append(1000 + (tile * rows + y % rows) * columns + x % columns)
        expected.append(-1)
    found = lay_out(thumbnail, tiles.float(), (down, across), newline, separator)
    assert found.flatten().tolist() == expected
    assert len(expected) == rows * (columns + 1) + 1 + down * rows * (across * columns + 1)
    found = lay_out(thumbnail, None, (1, 1), newline, separator)
    assert found.flatten().tolist() == alone


def test_one_tile_takes_421_tokens():
    view, vector = torch.zeros(2, 14, 14, 3), torch.zeros(3)
    assert lay_out(view, view[:, None], (1, 1), vector, vector).shape == (2, 421, 3)
    assert lay_out(view, None, (1, 1), vector, vector).shape == (2, 210, 3)


def test_layouts_that_do_not_fit():
    view, vector = torch.zeros(2, 3, 4, 5), torch.zeros(5)
    tiles = torch.zeros(2, 6, 3, 4, 5)
    lay_out(view, tiles, (2, 3), vector, vector)
    for wrong in (
        (view[0], tiles, (2, 3), vector, vector),
        (view, tiles, (2, 2), vector, vector),
        (view, tiles[:1], (2, 3), vector, vector),
        (view, tiles, (2, 3), vector[1:], vector),
        (view, tiles, (2, 3), vector, vector[None]),
    ):
        with pytest.raises(ValueError, match="has shape"):
            lay_out(*wrong)


def tower(**options) -> VisionTransformer:
    sizes = dict(img_size=12, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=0)
    return VisionTransformer(**sizes, **dict(class_token=False, global_pool="map") | options)


def test_the_prefix_is_made_of_its_parts():
    torch.manual_seed(0)
    prefix = randomized(VisualPrefix(tower(), 6)).eval()
    thumbnail, tiles = torch.randn(2, 3, 12, 12), torch.randn(2, 6, 3, 12, 12)
    read = [
        prefix.projector(prefix.vision.forward_features(view), (3, 3)).view(2, 2, 2, 6)
        for view in (thumbnail, *tiles.unbind(1))
    ]
    vectors = prefix.image_newline, prefix.view_seperator
    expected = lay_out(read[0], torch.stack(read[1:], 1), (2, 3), *vectors)
    assert expected.shape == (2, 2 * 3 + 1 + 4 * 7, 6)
    assert_close(prefix(thumbnail, tiles, (2, 3)), expected, atol=1e-5, rtol=0)
    assert_close(prefix(thumbnail), lay_out(read[0], None, (1, 1), *vectors), atol=1e-5, rtol=0)


def test_the_learned_vectors_start_as_the_references():
    torch.manual_seed(0)
    prefix = VisualPrefix(tower(), 4096)
    for vector in (prefix.image_newline, prefix.view_seperator):
        assert vector.std().item() == pytest.approx(4096**-0.5, rel=0.05)
    assert not torch.equal(prefix.image_newline, prefix.view_seperator)


def test_pictures_and_towers_that_do_not_fit():
    with pytest.raises(ValueError, match="1 tokens that are no patches"):
        VisualPrefix(tower(class_token=True), 6)
    prefix = VisualPrefix(tower(), 6)
    with pytest.raises(ValueError, match="thumbnail has shape"):
        prefix(torch.zeros(1, 3, 16, 12))
    with pytest.raises(ValueError, match="tiles has shape"):
        prefix(torch.zeros(1, 3, 12, 12), torch.zeros(1, 5, 3, 12, 12), (2, 3))


def reference_checkpoint(prefix: VisualPrefix) -> dict[str, torch.Tensor]:
    """Random tensors under the reference's names, with a language model's among them."""
    state = {name: torch.randn_like(x) for name, x in prefix.state_dict().items()}
    assert {"projector.layers.0.weight", "projector.layers.2.bias"} < state.keys()
    assert {"image_newline", "view_seperator", "vision.attn_pool.latent"} < state.keys()
    return state | {f"language.model.layers.{i}.mlp.weight": torch.randn(3) for i in range(4)}


def test_a_reference_checkpoint_loads_whole(tmp_path):
    prefix = VisualPrefix(tower(), 6)
    state = reference_checkpoint(prefix)
    save_file(state, tmp_path / "model.safetensors")
    assert load_visual_prefix(prefix, tmp_path) == 4
    for name, tensor in prefix.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.slow
def test_a_checkpoint_of_deepseek_vl2_smalls_shapes_loads_whole(tmp_path):
    with torch.device("meta"):
        prefix = VisualPrefix(create_siglip_vit(ignore_head=True), 2048).bfloat16()
    prefix = prefix.to_empty(device="cpu")
    state, path = reference_checkpoint(prefix), tmp_path / "model.safetensors"
    assert sum(x.numel() for x in prefix.parameters()) == 428_225_600 + 13_635_584 + 2 * 2048
    assert state["projector.layers.0.weight"].shape == (2048, 4 * 1152)
    save_file(state, path)
    assert load_visual_prefix(prefix, path) == 4
    path.unlink()  # pytest would keep three
    for name, tensor in prefix.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_of_a_sharded_checkpoint_only_the_parts_that_matter_are_read(tmp_path):
    prefix = VisualPrefix(tower(), 6)
    state = reference_checkpoint(prefix)
    where = {name: f"{name.split('.')[0]}.safetensors" for name in state}
    for part in {*where.values()}:
        save_file({n: x for n, x in state.items() if where[n] == part}, tmp_path / part)
    (tmp_path / "language.safetensors").write_bytes(b"not read")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert load_visual_prefix(prefix, tmp_path) == 0
    for name, tensor in prefix.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("projector.layers.2.bias", "missing (1): projector.layers.2.bias"),
        ("view_seperator", "missing (1): view_seperator"),
        ("vision.norm.bias", "missing (1): vision.norm.bias"),
    ],
)
def test_what_a_checkpoint_lacks_is_named_and_nothing_changed(tmp_path, name, said):
    prefix = VisualPrefix(tower(), 6)
    before = {name: x.clone() for name, x in prefix.state_dict().items()}
    state = reference_checkpoint(prefix)
    whole = state.pop(name)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(said)):
        load_visual_prefix(prefix, tmp_path)
    state[name] = whole.fill_(math.nan)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_visual_prefix(prefix, tmp_path)
    assert all(torch.equal(x, before[n]) for n, x in prefix.state_dict().items())


@pytest.fixture
def reader() -> LanguageModel:
    torch.manual_seed(0)
    return randomized(LanguageModel(vocab_size=11, width=8, depth=2, num_heads=2))


def turned(x: torch.Tensor, first: int = 0) -> torch.Tensor:
    """The rotation as the product of complex numbers."""
    half = x.shape[-1] // 2
    turns = [[t / 10_000 ** (i / half) for i in range(half)] for t in range(first, first + x.shape[1])]  # fmt: skip
    angles = torch.tensor(turns, dtype=torch.float64)[:, None]  # (N, 1, half)
    points = torch.complex(x[..., :half].double(), x[..., half:].double())
    points = points * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((points.real, points.imag), -1)


def test_a_rotation_is_a_product_of_complex_numbers():
    x = torch.randn(2, 300, 3, 8)
    assert_close(rotate(x).double(), turned(x), atol=1e-4, rtol=0)
    assert_close(rotate(x, 7).double(), turned(x, 7), atol=1e-4, rtol=0)
    assert rotate(x.bfloat16()).dtype == torch.bfloat16


def test_what_two_tokens_have_in_common_depends_on_their_distance(reader):
    attention = reader.blocks[0].attn
    x = torch.randn(1, 1, 8).expand(1, 9, 8)  # the same token nine times
    with torch.no_grad():
        q, k, _ = attention._turned(x, None)
    products = torch.einsum("bihc, bjhc -> bhij", q, k)[0]  # (heads, 9, 9)
    assert_close(products[:, 1:, 1:], products[:, :-1, :-1], atol=1e-5, rtol=1e-4)
    assert (products[:, 8, :8] - products[:, 8, 1:]).abs().min() > 1e-4


def test_the_decoder_is_pytorchs_but_for_the_rotation(reader, monkeypatch):
    monkeypatch.setattr("siglip_lib.vl.language_model.rotate", lambda x, first=0: x)
    reader.double()
    theirs = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(
            8, 2, 32, 0.0, nn.GELU(approximate="tanh"), 1e-6, True, True, dtype=torch.float64
        ),
        num_layers=2,
        enable_nested_tensor=False,
    )
    names = dict(
        norm1="norm1", norm2="norm2", linear1="mlp.fc1", linear2="mlp.fc2", self_attn="attn.qkv"
    )
    for layer, block in zip(theirs.layers, reader.blocks, strict=True):
        parts = {name: block.get_submodule(ours) for name, ours in names.items()}
        layer.self_attn.out_proj.load_state_dict(block.attn.proj.state_dict())
        layer.self_attn.in_proj_weight.data = parts["self_attn"].weight.data
        layer.self_attn.in_proj_bias.data = parts["self_attn"].bias.data
        for name in ("norm1", "norm2", "linear1", "linear2"):
            getattr(layer, name).load_state_dict(parts[name].state_dict())
    x = torch.randn(3, 9, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    expected = reader.norm(theirs(x, mask)) @ reader.token_embed.weight.T
    assert_close(reader(x)[0], expected, atol=1e-10, rtol=0)


def test_one_at_a_time_gives_what_all_at_once_does(reader):
    x = torch.randn(2, 9, 8)
    whole, _ = reader(x)
    found, past = reader(x[:, :4])
    steps = [found]
    for i in range(4, 9):
        found, past = reader(x[:, i : i + 1], past)
        steps.append(found)
    assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("first", [1, 4, 8])
def test_several_after_a_past_give_what_all_at_once_does(reader, first):
    x = torch.randn(2, 9, 8)
    whole, seen = reader(x)
    found, past = reader(x[:, first:], reader(x[:, :first])[1])
    assert_close(found, whole[:, first:], atol=1e-5, rtol=0)
    assert_close(past, seen, atol=1e-5, rtol=0)


def test_writing_takes_the_likeliest_each_time(reader):
    prefix = torch.randn(3, 4, 8)
    tokens = torch.empty(3, 0, dtype=torch.int64)
    for _ in range(5):  # without a cache
        x = torch.cat((prefix, reader.token_embed(tokens)), 1)
        nearest = reader(x)[0][:, -1].argmax(1)
        ended = (tokens == EOS).any(1)
        tokens = torch.cat((tokens, torch.where(ended, EOS, nearest)[:, None]), 1)
    found = reader.write(prefix, 5)
    assert found.tolist() == tokens[:, : found.shape[1]].tolist()
    assert (tokens[:, found.shape[1] :] == EOS).all()


def test_writing_ends_with_the_text(reader):
    reader.token_embed.weight.data.zero_()
    reader.token_embed.weight.data[EOS] = 1.0
    reader.norm.weight.data.zero_()
    reader.norm.bias.data.fill_(1.0)  # so every logit but that of </s> is 0
    assert reader.write(torch.randn(2, 3, 8), 6).tolist() == [[EOS], [EOS]]


def test_the_loss_is_on_the_caption_alone(reader):
    prefix, tokens = torch.randn(2, 3, 8), torch.tensor([[5, 7, EOS, EOS], [4, EOS, EOS, EOS]])
    logits = reader.caption_logits(prefix, tokens)
    assert logits.shape == (2, 4, 11)
    x = torch.cat((prefix, reader.token_embed(tokens)), 1)
    logged = log_softmax(reader(x)[0].double(), -1)
    counted = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    expected = -sum(logged[b, 2 + t, tokens[b, t]] for b, t in counted) / len(counted)
    assert caption_loss(logits, tokens).item() == pytest.approx(expected.item(), rel=1e-5)
    _, past = reader.read(prefix[:, :2])
    assert_close(reader.caption_logits(prefix[:, 2:], tokens, past), logits, atol=1e-5, rtol=0)


def test_heads_that_can_not_be_turned():
    with pytest.raises(ValueError, match=r"width=12 must be a multiple of 2 \* num_heads=8"):
        LanguageModel(vocab_size=11, width=12, depth=1, num_heads=4)


def test_captions_that_do_not_fit(reader):
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="prefix has shape"):
        reader.caption_logits(torch.zeros(2, 3, 7), tokens)
    with pytest.raises(ValueError, match="tokens has shape"):
        reader.caption_logits(torch.zeros(1, 3, 8), tokens)
    with pytest.raises(ValueError, match="tokens has shape"):
        caption_loss(torch.zeros(2, 4, 11), tokens)
    with pytest.raises(ValueError, match="most"):
        reader.write(torch.zeros(2, 3, 8), 0)


def test_maps_of_a_causal_layer_are_masked_and_those_after_a_past_its_last_row(reader):
    x = torch.randn(2, 9, 8)
    with attention_maps(reader) as maps:
        _, past = reader(x[:, :8])
        before = {name: weights.clone() for name, weights in maps.items()}
        _, past = reader(x[:, 8:], past)
        after = dict(maps)
        reader(x)
    for name, weights in maps.items():
        assert weights.shape == (2, 2, 9, 9)
        assert (weights.triu(1) == 0).all()
        assert_close(weights.sum(-1), torch.ones(2, 2, 9))
        assert_close(weights[:, :, :8, :8], before[name])
        assert_close(weights[:, :, 8:], after[name], atol=1e-6, rtol=1e-4)
    block = reader.blocks[0]
    inside = block.norm1(x)
    q, k, v = block.attn.qkv(inside).unflatten(-1, (3, 2, 4)).unbind(2)
    scores = torch.einsum("bihc, bjhc -> bhij", turned(q), turned(k)).float() / 4**0.5
    expected = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(-1)
    assert_close(maps["blocks.0.attn"], expected)
    read = torch.einsum("bhij, bjhc -> bihc", expected, v).flatten(2)
    assert_close(block.attn(inside)[0], block.attn.proj(read), atol=1e-5, rtol=1e-4)
