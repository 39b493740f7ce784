"""Training: the same from the same seed, in one go or in parts; what breaks stops it, and nothing is lost."""

import math
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import siglip_lib.train as train
from siglip_lib import SigLIP, Tokenizer, load_siglip, recall
from siglip_lib.emoji64 import captions, load_emoji64, split
from siglip_lib.siglip import embed_pictures, embed_texts
from siglip_lib.train import (
    EMOJI64_SIGLIP,
    EMOJI64_VECTORS,
    EMOJI64_WEIGHTS,
    Diverged,
    TrainConfig,
    Training,
)

SIZES = replace(
    EMOJI64_SIGLIP, width=32, layers=1, heads=2, mlp_hidden=32, text_width=32, text_layers=1
)
SMALL = TrainConfig(steps=8, batch=16, warmup=2, seed=3)


@pytest.fixture(scope="module")
def emoji():
    return load_emoji64()


@pytest.fixture(scope="module")
def places(emoji):
    return split(emoji).train


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(EMOJI64_WEIGHTS / "spiece.model", EMOJI64_SIGLIP.context_length)


@pytest.fixture
def new(emoji, places, tokenizer):
    def build(config=SMALL, sizes=SIZES, where="cpu", places=places, **options):
        torch.manual_seed(0)
        return Training(SigLIP(sizes), tokenizer, emoji, places, config, where, **options)

    return build


def weights(training) -> dict:
    return {name: tensor.cpu().clone() for name, tensor in training.model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(new):
    runs = [new(), new(), new(replace(SMALL, seed=4))]
    for training in runs:
        training.run(progress=False)
    assert runs[0].losses == runs[1].losses
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))  # though the model starts the same
    assert not torch.equal(runs[0]._draw(0)["draws"], runs[0]._draw(1)["draws"])
    assert len(runs[0].losses) == runs[0].step == 8


@pytest.mark.parametrize(
    "block", [3, 50]
)  # the stop lies in a later block of draws, and in the first
def test_taken_up_again_it_is_as_if_never_stopped(new, tmp_path, block, monkeypatch):
    monkeypatch.setattr(train, "BLOCK", block)
    whole, first, second = new(), new(), new(SMALL)
    whole.run(progress=False)
    first.run(5, progress=False)
    first.save(tmp_path / "t.pt")
    second.run(1, progress=False)  # what it has drawn must not be used
    second.load(tmp_path / "t.pt")
    assert (second.step, second.losses) == (5, first.losses)
    second.run(progress=False)
    assert second.losses == whole.losses
    assert same(weights(second), weights(whole))


def test_each_block_of_steps_and_each_seed_has_its_own_numbers(new, monkeypatch):
    monkeypatch.setattr(train, "BLOCK", 2)
    training = new()
    training.run(3, progress=False)
    before, now, elsewhere = (
        training._draw(0),
        training._draw(1),
        new(replace(SMALL, seed=4))._draw(1),
    )
    for name, place in training._inputs.items():  # of the third step
        assert torch.equal(place, now[name][0])
        assert not torch.equal(place, before[name][0])
        assert not torch.equal(place, elsewhere[name][0])


def test_on_a_gpu_with_its_graph_too(new, gpu, tmp_path):
    whole, again, first, second = (new(where=gpu) for _ in range(4))
    whole.run(progress=False)
    again.run(progress=False)
    assert same(weights(whole), weights(again))
    first.run(5, progress=False)
    first.save(tmp_path / "t.pt")
    second.load(tmp_path / "t.pt")
    second.run(progress=False)
    assert same(weights(second), weights(whole))
    cpu = new()
    cpu.run(progress=False)
    assert whole.losses == pytest.approx(cpu.losses, rel=0.02)  # bfloat16 against float32


def test_compiled_it_learns_the_same_and_is_as_reproducible(new, gpu):
    plain, compiled, again = (new(where=gpu, compile=compile) for compile in (False, True, True))
    for training in (plain, compiled, again):
        training.run(progress=False)
    assert compiled.losses == pytest.approx(plain.losses, rel=0.02)
    assert same(weights(compiled), weights(again))
    assert not torch.are_deterministic_algorithms_enabled()  # left as it was


def test_it_learns(new):
    training = new(replace(SMALL, steps=60, lr=3e-3, logit_lr=3e-3))
    training.run(progress=False)
    assert sum(training.losses[-5:]) < 0.6 * sum(training.losses[:5])


@pytest.mark.parametrize("concepts", [775, 5])
def test_a_step_is_adamw_on_the_loss_of_its_batch(new, emoji, places, tokenizer, concepts):
    """Against a step written out, from the same draws; of five concepts the 16 pairs share some."""
    places = places[emoji.concept[places] <= emoji.concept[places].unique()[concepts - 1]]
    training = new(places=places)
    copy = SigLIP(SIZES)
    copy.load_state_dict(training.model.state_dict())
    training.run(1, progress=False)

    block = training._drawn(0)
    which, text, draws = (block[name][0] for name in ("which", "text", "draws"))
    table = [
        text
        for name, words in zip(emoji.names, emoji.keywords, strict=True)
        for text in captions(name, words)
    ]
    pictures = train.augment(emoji.pictures[places][which], draws, 1.0)
    texts = [table[i] for i in text.tolist()]
    for caption, place in zip(texts, places[which].tolist(), strict=True):
        assert emoji.names[emoji.concept[place]] in caption
    image, text = copy.encode_image(pictures), copy.encode_text(tokenizer(texts))
    logits = copy.logits(image, text)
    concept = emoji.concept[places][which]
    assert len(which.unique()) == 16
    assert len(concept.unique()) == min(16, concepts)
    together = (concept[:, None] == concept).float()
    loss = -torch.nn.functional.logsigmoid(logits * (2 * together - 1)).sum() / 16
    assert training.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(copy.parameters(), SMALL.clip)
    assert norm > SMALL.clip  # so that the clipping is seen
    for name, parameter in copy.named_parameters():
        plain = name.startswith("logit") or name.endswith(("pos_embed", "latent"))
        decay = 0.0 if plain or parameter.ndim < 2 else SMALL.weight_decay
        lr = SMALL.lr / SMALL.warmup  # the first step of a rise over two
        gradient = parameter.grad
        update = gradient / (gradient.abs() + 1e-8)  # Adam's first, of either moment's correction
        wanted = parameter.detach() * (1 - lr * decay) - lr * update
        found = dict(training.model.named_parameters())[name].detach()
        clear = gradient.abs() > 1e-3 * gradient.abs().max()  # not the rounding of a 0, as k's bias
        assert clear.any()
        torch.testing.assert_close(found[clear], wanted[clear], rtol=0, atol=2e-2 * lr, msg=name)


def test_the_rate_rises_along_a_line_and_falls_along_a_cosine():
    config = TrainConfig(steps=1000, warmup=100)
    rates = [train._schedule(step, config) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[49] == pytest.approx(0.5)
    assert rates[100] == 1
    assert rates[550] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-4


@pytest.mark.parametrize("keywords", [True, False])
def test_captions_with_and_without_keywords(new, keywords):
    training = new(replace(SMALL, keywords=keywords))
    assert (len(training._tokens) == 9 * 861) is not keywords


def test_stops_when_the_loss_is_no_number_and_says_what_to_do(new):
    training = new()
    training.run(2, progress=False)
    with torch.no_grad():
        training.model.logit_scale.fill_(math.inf)
    message = r"the loss is (nan|inf) at step 2; lower lr=.* or logit_lr=.*, or lengthen warmup=2"
    with pytest.raises(Diverged, match=message):
        training.run(progress=False)
    assert training.step == 2
    assert len(training.losses) == 2


def test_a_bar_shows_loss_and_rate(new, capfd):
    new().run(3)
    assert re.search(r"3/3 .*loss=\d+\.\d+, lr=\d\.\de-\d+", capfd.readouterr().err)


def test_a_failed_save_leaves_the_old_file_and_no_other(new, tmp_path, monkeypatch):
    training, path = new(), tmp_path / "t.pt"
    training.save(path)
    before = path.read_bytes()
    training.run(1, progress=False)

    def fail(state, file):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        training.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.pt"]


@pytest.mark.parametrize(
    ("config", "sizes", "differs"),
    [
        (replace(SMALL, lr=1e-4), SIZES, "{'lr': 0.002}"),
        (SMALL, replace(SIZES, text_width=64), "{'text_width': 32}"),
    ],
)
def test_another_training_is_not_taken_up(new, tmp_path, config, sizes, differs):
    new().save(tmp_path / "t.pt")
    other = new(config, sizes)
    before = weights(other)
    with pytest.raises(ValueError, match=re.escape(f"other settings: {differs}")):
        other.load(tmp_path / "t.pt")
    assert same(weights(other), before)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps=0"),
        ({"lr": -1.0}, "lr=-1.0 must not be negative"),
        ({"clip": math.nan}, "clip=nan"),
        ({"strength": -0.5}, "strength=-0.5 must not be negative"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_settings(wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        TrainConfig(**wrong)


def test_what_does_not_fit_is_refused_before_anything_moves(new, emoji, places):
    with pytest.raises(ValueError, match=f"must be at most {len(places)}, each picture once"):
        new(replace(SMALL, batch=len(places) + 1))
    with pytest.raises(ValueError, match="the tokenizer has 1500 pieces"):
        new(sizes=replace(SIZES, vocab_size=1000))
    with pytest.raises(ValueError, match="until=9 must lie in 0 to 8"):
        new().run(9)


# --- the weights that ship ---


def test_shipped_files_are_small():
    files = [*EMOJI64_WEIGHTS.iterdir(), EMOJI64_VECTORS]
    assert {path.name for path in files} == {
        "config.json",
        "model.safetensors",
        "spiece.model",
        "emoji64_vectors.safetensors",
    }
    assert sum(path.stat().st_size for path in files) < 10e6


def test_shipped_weights_are_what_the_notebook_says(emoji):
    """The recall of the held-out designer that 10 reports, from texts, vectors and pictures."""
    model, tokenizer = load_siglip(EMOJI64_WEIGHTS)
    assert model.config == EMOJI64_SIGLIP
    model.eval()
    vectors = load_file(EMOJI64_VECTORS)["pictures"].float()
    assert vectors.shape == (5094, EMOJI64_SIGLIP.width)
    some = torch.arange(0, 5094, 150)
    torch.testing.assert_close(
        embed_pictures(model, emoji.pictures[some]), vectors[some], rtol=0, atol=2e-3
    )
    texts, seen = embed_texts(model, tokenizer, emoji.names), split(emoji).seen
    assert recall(vectors[seen], texts, emoji.concept[seen], torch.arange(861), 1).value > 0.73
