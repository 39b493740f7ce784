"""Captioning: what a stage trains and what not, what a captioner reads, and what it is asked."""

import math
from itertools import pairwise, product

import pytest
import torch
from comparing import randomized
from torch import nn
from torch.testing import assert_close

from siglip_lib import Tokenizer, VisionTransformer, load_emoji64, load_siglip
from siglip_lib.data import compose, split
from siglip_lib.evaluate import Share
from siglip_lib.siglip import EMOJI64_CAPTIONER, EMOJI64_WEIGHTS
from siglip_lib.siglip.text import EOS, canonicalize
from siglip_lib.storage.writing import write_tensors
from siglip_lib.train.captioning import (
    EMOJI64_LANGUAGE,
    Captioner,
    load_captioner,
    share_right,
    train_stage,
)
from siglip_lib.train.questions import (
    QUESTION,
    Questions,
    cut_scenes,
    every_drawing,
    questions,
)
from siglip_lib.vl import LanguageModel, caption_loss


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(vocab_size=13, width=16, depth=1, num_heads=2)


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    first = torch.randint(2, 13, (32, 1), generator=generator)
    tokens = torch.cat((first, first, torch.ones_like(first)), 1)  # a word twice, then </s>
    return {"tokens": tokens}


def test_a_model_learns_to_repeat_a_word(model):
    prefix = torch.zeros(32, 2, 16)

    def loss(tokens):
        return caption_loss(model.caption_logits(prefix, tokens), tokens)

    losses = train_stage(loss, model.parameters(), batch, 200, 1e-2, progress=False)
    assert losses.shape == (200,)
    # the first word can't be known: log 11 of three tokens
    assert losses[-20:].mean().item() == pytest.approx(math.log(11) / 3, abs=0.05)


def test_what_is_not_trained_stays(model):
    prefix = nn.Parameter(torch.zeros(1, 2, 16))
    before = {name: x.clone() for name, x in model.state_dict().items()}

    def loss(tokens):
        return caption_loss(model.caption_logits(prefix.expand(32, -1, -1), tokens), tokens)

    train_stage(loss, [prefix], batch, 20, 1e-2, progress=False)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert prefix.abs().min() > 0


def test_rates_and_decay():
    matrix, positions = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(1, 3, 2))
    seen = []

    def loss(x):
        seen.append((matrix[0, 0].item(), positions[0, 0, 0].item()))
        return 0 * (matrix.sum() + positions.sum()) + x.sum()

    train_stage(
        loss, [matrix, positions], lambda _: {"x": torch.ones(2)}, 40, 0.5, weight_decay=0.1,
        progress=False,
    )  # fmt: skip
    shrunk = [after / before for (before, _), (after, _) in pairwise(seen)]
    rates = [(1 - factor) / 0.1 for factor in shrunk]
    rise = [min(1, (i + 1) / 2) for i in range(39)]
    expected = [0.5 * r * (1 + math.cos(math.pi * i / 40)) / 2 for i, r in enumerate(rise)]
    assert rates == pytest.approx(expected, abs=1e-4)
    assert {position for _, position in seen} == {1.0}


def test_the_gradient_is_clipped():
    x = nn.Parameter(torch.zeros(3))

    def loss(y):
        return (1000 * x * y).sum()

    train_stage(loss, [x], lambda _: {"y": torch.ones(3)}, 1, 1e-3, progress=False)
    assert x.grad.norm().item() == pytest.approx(1, abs=1e-4)


def test_a_loss_that_is_no_number_ends_it():
    x = nn.Parameter(torch.ones(1))

    def loss(y):
        return (x * y).sum()

    def inputs(step):
        return {"y": torch.full((1,), math.nan if step == 3 else 1.0)}

    with pytest.raises(FloatingPointError, match=r"nan at step 3; lower lr=0\.01"):
        train_stage(loss, [x], inputs, 5, 1e-2, progress=False)


@pytest.mark.parametrize(
    ("trained", "steps", "lr", "decay", "said"),
    [
        ([], 1, 1e-3, 0.1, "trained holds no parameters"),
        ([nn.Parameter(torch.ones(1))], 0, 1e-3, 0.1, "steps"),
        ([nn.Parameter(torch.ones(1))], 1, 0.0, 0.1, "lr"),
        ([nn.Parameter(torch.ones(1))], 1, 1e-3, -0.1, "weight_decay"),
    ],
)
def test_numbers_that_are_none(trained, steps, lr, decay, said):
    with pytest.raises(ValueError, match=said):
        train_stage(
            lambda: None, trained, lambda _: {}, steps, lr, weight_decay=decay, progress=False
        )


# --- Captioner ---

SIZES = dict(vocab_size=1500, width=16, depth=1, num_heads=2)


def tower() -> VisionTransformer:
    return VisionTransformer(
        64, 16, embed_dim=16, depth=1, num_heads=2, class_token=False, global_pool="map", num_classes=0
    )  # fmt: skip


@pytest.fixture
def captioner() -> Captioner:
    torch.manual_seed(0)
    return randomized(Captioner(tower(), **SIZES)).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(EMOJI64_WEIGHTS / "spiece.model", QUESTION)


def asked(count: int = 3) -> dict[str, torch.Tensor]:
    prompts = torch.randint(2, 1500, (count, 5))
    answers = torch.full((count, 4), EOS)
    answers[:, :2] = torch.randint(2, 1500, (count, 2))
    return {"prompts": prompts, "answers": answers, "thumbnail": torch.randn(count, 3, 64, 64)}


def test_a_captioner_reads_picture_then_question_and_pays_for_the_answer(captioner):
    batch = asked()
    seen = captioner.prefix(batch["thumbnail"])
    x = [seen, *(captioner.language.token_embed(batch[name]) for name in ("prompts", "answers"))]
    logits = captioner.language(torch.cat(x, 1))[0][:, seen.shape[1] + 5 - 1 : -1]
    expected = nn.functional.cross_entropy(
        logits[:, :3].flatten(0, 1), batch["answers"][:, :3].flatten()
    )
    assert captioner(**batch).item() == pytest.approx(expected.item(), rel=1e-5)
    tiles = torch.randn(3, 2, 3, 64, 64)
    before = captioner.read(batch["prompts"], batch["thumbnail"], tiles, (1, 2))
    assert_close(before[:, :-5], captioner.prefix(batch["thumbnail"], tiles, (1, 2)))


def test_several_questions_about_a_picture_are_as_one_each(captioner):
    batch, about = asked(4), torch.tensor([2, 0, 2, 1])
    pictures, tiles = torch.randn(3, 3, 64, 64), torch.randn(3, 2, 3, 64, 64)
    repeated = batch | {"thumbnail": pictures[about], "tiles": tiles[about]}
    shared = batch | {"thumbnail": pictures, "tiles": tiles, "about": about}
    learned = [p for p in captioner.parameters() if p.requires_grad]
    found = []
    for one in (shared, repeated):
        loss = captioner(**one, grid=(1, 2))
        found.append((loss, *torch.autograd.grad(loss, learned)))
    assert_close(*found)


def test_a_picture_is_read_once_for_all_of_its_questions(captioner):
    read = []
    captioner.language.blocks[0].register_forward_pre_hook(lambda _, x: read.append(x[0].shape[:2]))
    batch = asked(6) | {"thumbnail": torch.randn(2, 3, 64, 64)}
    captioner(**batch, about=torch.tensor([0, 1, 1, 0, 1, 0]))
    assert read == [(2, 6), (6, 5 + 3)]  # two pictures of 2 * (2 + 1) tokens, then six questions


def test_the_tower_of_a_captioner_is_frozen_and_not_stored(captioner):
    captioner(**asked()).backward()
    assert all(p.grad is None for p in captioner.prefix.vision.parameters())
    kept = captioner.trained_state()
    assert {"prefix.image_newline", "prefix.view_seperator", "language.norm.weight"} < kept.keys()
    assert not any("vision" in name for name in kept)
    assert len(kept) + len(captioner.prefix.vision.state_dict()) == len(captioner.state_dict())


def test_right_answers_are_those_to_the_letter(captioner):
    batch = asked(4)
    with torch.no_grad():
        before = captioner.read(batch["prompts"], batch["thumbnail"])
        written = captioner.language.write(before, 4)
    batch["answers"] = nn.functional.pad(written, (0, 4 - written.shape[1]), value=EOS)
    assert share_right(captioner, [batch, batch]) == Share(8, 8)
    batch["answers"] = batch["answers"].clone()
    batch["answers"][1, -1] += 1
    assert share_right(captioner, [batch]) == Share(3, 4)


def test_what_is_stored_of_a_captioner_is_loaded(tmp_path):
    first, path = tower_that_ships(), tmp_path / "captioner.safetensors"
    torch.manual_seed(1)
    captioner = randomized(Captioner(first, **EMOJI64_LANGUAGE))
    write_tensors({k: v.half() for k, v in captioner.trained_state().items()}, path)
    assert path.stat().st_size < 5e6
    loaded = load_captioner(first, path)
    assert not loaded.training
    for name, tensor in loaded.trained_state().items():
        assert torch.equal(tensor, captioner.trained_state()[name].half().float()), name
    state = captioner.trained_state()
    del state["prefix.image_newline"]
    write_tensors(state, path)
    with pytest.raises(ValueError, match=r"missing \(1\): prefix\.image_newline"):
        load_captioner(first, path)
    with pytest.raises(FileNotFoundError):
        load_captioner(first, tmp_path / "none.safetensors")


def test_the_captioner_that_ships_names_drawings(tokenizer):
    emoji = load_emoji64()
    captioner = load_captioner(tower_that_ships())
    assert EMOJI64_CAPTIONER.stat().st_size < 5e6
    found = share_right(captioner, every_drawing(emoji, split(emoji).seen[::8], tokenizer))
    assert found.value > 0.5


def tower_that_ships() -> VisionTransformer:
    return load_siglip(EMOJI64_WEIGHTS)[0].image


# --- Questions ---


def test_each_answer_is_the_name_of_what_stands_there(tokenizer):
    emoji = load_emoji64()
    places = split(emoji).train
    for grid in (1, 2, 4):
        draw = Questions(emoji, places, tokenizer, grids=(grid,), batch=32)
        batch = draw(3)
        ((scenes, concept),) = draw.scenes(3)
        assert scenes.shape == (32 // grid**2, 3, 64, 64)
        assert_close(batch["thumbnail"], scenes)
        assert (batch["prompts"][:, -1] != EOS).all()  # an answer begins right after the last word
        asked_for = tokenizer.decode(batch["prompts"])
        asked_of = [
            (i, questions(grid).index(text))
            for i, text in zip(batch["about"].tolist(), asked_for, strict=True)
        ]
        # each place of each scene, once
        assert sorted(asked_of) == list(product(range(len(scenes)), range(grid**2)))
        names = [emoji.names[concept[i, cell]] for i, cell in asked_of]
        assert torch.equal(batch["answers"], tokenizer(names))
        assert torch.isin(concept, emoji.concept[places]).all()


def test_a_drawing_stands_in_the_cell_of_its_row_and_column(tokenizer):
    emoji = load_emoji64()
    seen = split(emoji).seen  # one drawing of each concept
    draw = Questions(emoji, seen, tokenizer, grids=(4,), batch=32, tiles=4)
    ((scenes, concept),) = draw.scenes(0)
    assert scenes.shape == (2, 3, 256, 256)
    for cell in range(16):
        place = seen[emoji.concept[seen] == concept[1, cell]]
        y, x = 64 * (cell // 4), 64 * (cell % 4)
        part = scenes[1, :, y : y + 64, x : x + 64]
        assert_close(part, compose(emoji.pictures[place])[0])
        assert_close(draw(0)["tiles"][1, cell], part)
    mean = scenes.unflatten(2, (4, 64)).unflatten(4, (4, 64)).mean((3, 5))
    thumbnail = draw(0)["thumbnail"].unflatten(2, (4, 16)).unflatten(4, (4, 16)).mean((3, 5))
    assert_close(thumbnail, mean, atol=0.05, rtol=0)  # a pixel's neighbours are mixed in


def test_questions_follow_from_seed_and_number(tokenizer):
    emoji = load_emoji64()
    made = dict(grids=(1, 2), batch=16, strength=1.0)
    first, again, other = (
        Questions(emoji, split(emoji).train, tokenizer, **made, seed=seed) for seed in (0, 0, 1)
    )
    for name, tensor in first(5).items():
        assert torch.equal(tensor, again(5)[name])
    (_, (_, four)), (_, (_, next_four)) = first.scenes(5), first.scenes(6)
    assert not torch.equal(four, next_four)
    assert not torch.equal(first(5)["answers"], other(5)["answers"])
    prompts = tokenizer.decode(first(5)["prompts"])
    assert prompts == ["what is this"] * 8 + questions(2) * 2
    assert first(5)["about"].tolist() == [*range(8), *[8] * 4, *[9] * 4]
    assert len(first(5)["thumbnail"]) == 10


def test_every_drawing_comes_once(tokenizer):
    emoji = load_emoji64()
    places = split(emoji).unseen
    batches = list(every_drawing(emoji, places, tokenizer, batch=50))
    assert [len(batch["prompts"]) for batch in batches] == [50, 36]
    answers = torch.cat([batch["answers"] for batch in batches])
    assert torch.equal(answers, tokenizer([emoji.names[i] for i in emoji.concept[places]]))
    thumbnails = torch.cat([batch["thumbnail"] for batch in batches])
    assert_close(thumbnails, compose(emoji.pictures[places]))


def test_questions_and_answers_fit_their_tokens(tokenizer):
    texts = [text for grid in (1, 2, 4) for text in questions(grid)]
    assert len(set(texts)) == len(texts)
    names = load_emoji64().names
    assert (tokenizer([*texts, *names])[:, -1] == EOS).all()
    assert [*map(canonicalize, names)] == tokenizer.decode(tokenizer(names))  # none is cut


def test_questions_that_do_not_fit(tokenizer):
    emoji = load_emoji64()
    places = split(emoji).train
    for batch, grids, whole in ((12, (1, 2), 8), (24, (4,), 16), (8, (1, 2, 4), 48)):
        with pytest.raises(ValueError, match=f"batch={batch} must be a multiple of {whole}: "):
            Questions(emoji, places, tokenizer, grids=grids, batch=batch)
    assert questions(4)[6] == "2c"  # the second row's third
    with pytest.raises(ValueError, match="grid=27 must be at most 26"):
        questions(27)
    with pytest.raises(ValueError, match="grid"):
        Questions(emoji, places, tokenizer, grids=(0,), batch=8)
    short = Tokenizer(EMOJI64_WEIGHTS / "spiece.model", 16)
    with pytest.raises(ValueError, match="16 tokens, not 17"):
        Questions(emoji, places, short, grids=(1,), batch=8)
    with pytest.raises(ValueError, match="scenes has shape"):
        cut_scenes(torch.zeros(3, 64, 64), 1)
