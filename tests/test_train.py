"""Training: the same from the same seed, in one go or in parts; what breaks stops it, and nothing is lost."""

import copy
import math
import os
import re
import signal
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from siglip_lib import SigLIP, load_siglip, recall
from siglip_lib.data.augmentation import augment
from siglip_lib.data.emoji64 import captions, load_emoji64, split
from siglip_lib.siglip.folder import EMOJI64_SIGLIP, EMOJI64_VECTORS, EMOJI64_WEIGHTS
from siglip_lib.siglip.model import embed_pictures, embed_texts
from siglip_lib.train.batches import Batches
from siglip_lib.train.recipe import TrainConfig, schedule
from siglip_lib.train.training import Diverged, Training
from siglip_lib.train.variants import _RememberingTokenizer

SIZES = replace(
    EMOJI64_SIGLIP, width=32, layers=1, heads=2, mlp_hidden=32, text_width=32, text_layers=1
)
SMALL = TrainConfig(steps=8, batch=16, warmup=2, seed=3)
FOUR = replace(SMALL, steps=4)


@pytest.fixture(scope="module")
def emoji():
    return load_emoji64()


@pytest.fixture(scope="module")
def places(emoji):
    return split(emoji).train


@pytest.fixture(scope="module")
def tokenizer():
    """Tokenizes the same strings once: every training of this file asks for the same thousands of captions."""
    return _RememberingTokenizer(EMOJI64_WEIGHTS / "spiece.model", EMOJI64_SIGLIP.context_length)


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
    assert not torch.equal(
        runs[0]._batches.of_block(0)["draws"], runs[0]._batches.of_block(1)["draws"]
    )
    assert len(runs[0].losses) == runs[0].step == 8


@pytest.mark.parametrize(
    "block", [3, 50]
)  # the stop lies in a later block of draws, and in the first
def test_taken_up_again_it_is_as_if_never_stopped(new, tmp_path, block, monkeypatch):
    monkeypatch.setattr(Batches, "block", block)
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
    monkeypatch.setattr(Batches, "block", 2)
    training = new()
    training.run(3, progress=False)
    other = new(replace(SMALL, seed=4))
    before, now = (training._batches.of_block(block) for block in (0, 1))
    elsewhere = other._batches.of_block(1)
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

    first = training._batches.of_step(0)
    which, text, draws = (first[name] for name in ("which", "text", "draws"))
    table = [
        text
        for name, words in zip(emoji.names, emoji.keywords, strict=True)
        for text in captions(name, words)
    ]
    pictures = augment(emoji.pictures[places][which], draws, 1.0)
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
    rates = [schedule(step, config) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[49] == pytest.approx(0.5)
    assert rates[100] == 1
    assert rates[550] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-4


def test_rate_is_the_learning_rate(new):
    assert new().rate(0) == SMALL.lr / SMALL.warmup
    assert new().rate(SMALL.warmup) == SMALL.lr


@pytest.mark.parametrize("keywords", [True, False])
def test_captions_with_and_without_keywords(new, keywords):
    training = new(replace(SMALL, keywords=keywords))
    assert (len(training._batches.tokens) == 9 * 861) is not keywords


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


def test_a_spoilt_training_neither_runs_nor_is_stored(new, tmp_path):
    training = new()
    training.save(tmp_path / "good.pt")
    with torch.no_grad():
        training.model.logit_bias.fill_(math.nan)
    with pytest.raises(
        ValueError, match=r"bad.pt was not written: .* NaN or infinite .*logit_bias"
    ):
        training.save(tmp_path / "bad.pt")
    with pytest.raises(Diverged, match="in a new training"):
        training.run(progress=False)
    for use in (training.run, lambda: training.save(tmp_path / "bad.pt")):
        with pytest.raises(
            RuntimeError, match=r"its loss was not finite; resume from '.*good\.pt'"
        ):
            use()
    assert [path.name for path in tmp_path.iterdir()] == ["good.pt"]
    training.load(tmp_path / "good.pt")
    training.run(1, progress=False)


@pytest.fixture(scope="module")
def whole(emoji, places, tokenizer):
    """A training of four steps that nothing stopped."""
    torch.manual_seed(0)
    training = Training(SigLIP(SIZES), tokenizer, emoji, places, FOUR, "cpu")
    training.run(progress=False)
    return training


@pytest.mark.parametrize(
    ("where", "stride", "wanted"),
    [("siglip_lib/train/", 3, {"went on", "refused"}), ("optim/adam.py", 61, {"refused"})],
)
def test_an_interrupt_anywhere_spoils_nothing_unseen(
    new, whole, tmp_path, where, stride, wanted, monkeypatch
):
    """Raised before every third line, or the 61st, in turn: the training goes on bit by bit, or says that it can't."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    training, outcomes, path = new(FOUR), set(), tmp_path / "one.pt"
    training.run(1, progress=False)
    training.save(path)
    at = lines = 0

    def watch(frame, event, argument):
        nonlocal lines
        if where not in frame.f_code.co_filename:
            return None
        if event == "line":
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return watch

    while lines >= at:  # else all of them had their turn
        training.load(path)
        at, lines = at + stride, 0
        before = sys.gettrace()
        sys.settrace(watch)
        try:
            training.run(3, progress=False)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        said = ""
        try:
            training.save(tmp_path / "then.pt")
            training.run(progress=False)
        except RuntimeError as error:
            said = str(error)
        if said:
            assert re.search(r"broken off within a step, .* resume from '.*one\.pt'", said)
        else:
            assert training.losses == whole.losses
            assert same(weights(training), weights(whole))
        if lines >= at:
            outcomes.add("refused" if said else "went on")
    assert outcomes == wanted


def test_ctrl_c_waits_for_the_end_of_a_step_and_a_second_one_does_not(
    new, whole, tmp_path, monkeypatch
):
    training, clip, presses = new(FOUR), Training._clip, 1

    def press(self):
        if self.step == 1:
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
        clip(self)

    monkeypatch.setattr(Training, "_clip", press)
    with pytest.raises(KeyboardInterrupt):
        training.run(progress=False)
    assert training.step == 2
    assert training.losses == whole.losses[:2]
    training.save(tmp_path / "two.pt")
    again = new(FOUR)
    again.load(tmp_path / "two.pt")
    for stopped in (training, again):
        stopped.run(progress=False)
        assert stopped.losses == whole.losses
        assert same(weights(stopped), weights(whole))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    training, presses = new(FOUR), 2
    with pytest.raises(KeyboardInterrupt):
        training.run(progress=False)
    assert training.step == 1  # in its second step nothing had changed yet
    presses = 0
    training.run(progress=False)
    assert same(weights(training), weights(whole))


def test_a_training_that_has_not_begun_is_stored_as_any_other(new, whole, tmp_path):
    new(FOUR).save(tmp_path / "t.pt")
    training = new(FOUR)
    training.run(2, progress=False)
    training.load(tmp_path / "t.pt")
    training.run(progress=False)
    assert same(weights(training), weights(whole))


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


WEIGHT, FIRST_MOMENT = "image.patch_embed.proj.weight", ("optimizer", "state", 0)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("step",), -5, "step=-5 must lie in 0 to 8"),
        (("step",), 10**9, "step=1000000000 must lie in 0 to 8"),
        (("step",), True, "step=True"),
        (("losses",), torch.zeros(0), "the losses of 2 steps"),
        (("losses",), torch.tensor([1.0, math.nan]), "a loss is not finite"),
        (("losses",), torch.zeros(2, device="meta"), "no stored training"),
        (("config",), {}, "of another version, or damaged: not in both are ['batch', "),
        (("config", "colour"), 1, "not in both are ['colour']"),
        (("model",), {}, "t.pt is damaged. missing (50): model.image."),
        (("model", "extra"), torch.zeros(1), "t.pt is damaged. unexpected (1): model.extra"),
        (
            ("model", WEIGHT),
            torch.zeros(1),
            f"of the wrong shape (1): model.{WEIGHT} (1,), not (32, 3, 8, 8)",
        ),
        (
            ("model", "logit_bias"),
            torch.tensor(math.inf),
            "NaN or infinite elements in model.logit_bias",
        ),
        (
            ("model", "logit_bias"),
            torch.zeros((), device="meta"),
            "does not store each element of model.logit_bias: ",
        ),
        (
            ("model", "logit_bias"),
            torch.tensor(1),
            "not of the model's dtype (1): model.logit_bias torch.int64",
        ),
        (
            (*FIRST_MOMENT, "exp_avg"),
            None,
            f"does not store each element of optimizer.state.{WEIGHT}.exp_avg: ",
        ),
        ((*FIRST_MOMENT, "step"), torch.tensor(7.0), f"{WEIGHT}.step is not 2"),
        (("optimizer", "state"), {}, "t.pt is damaged. missing (150): optimizer.state."),
        (("optimizer",), 3, "no stored training, or is damaged"),
    ],
)
def test_a_damaged_training_is_refused_before_anything_changes(new, tmp_path, place, value, said):
    training, path = new(), tmp_path / "t.pt"
    training.run(2, progress=False)
    training.save(path)
    state = inner = torch.load(path, weights_only=True)
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    torch.save(state, path)
    before = copy.deepcopy(training.tensors())
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        training.load(path)
    assert "t.pt" in str(raised.value)
    assert same(training.tensors(), before)
    training.run(3, progress=False)


class Touch:
    """Where it is unpickled without care, a file appears."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_what_a_file_wants_run_is_not_run(new, tmp_path):
    training, path = new(), tmp_path / "t.pt"
    training.save(path)
    torch.save(torch.load(path, weights_only=True) | {"step": Touch(tmp_path / "ran")}, path)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(path.read_bytes()[:1000])
    for file in (path, cut):
        with pytest.raises(ValueError, match=f"{file.name} is no stored training"):
            training.load(file)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError):
        training.load(tmp_path / "missing.pt")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("out of memory")])
def test_without_memory_a_file_is_not_called_damaged(new, tmp_path, monkeypatch, error):
    def fail(*args, **options):
        raise error

    training, path = new(), tmp_path / "t.pt"
    training.save(path)
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(type(error)):
        training.load(path)


def test_another_programs_file_beside_it_stays(new, tmp_path):
    (tmp_path / "t.pt.part").write_text("mine")
    new().save(tmp_path / "t.pt")
    assert (tmp_path / "t.pt.part").read_text() == "mine"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps=0"),
        ({"lr": -1.0}, "lr=-1.0 must not be negative"),
        ({"clip": math.nan}, "clip=nan"),
        ({"strength": -0.5}, "strength=-0.5 must not be negative"),
        ({"strength": 3}, "strength=3 must lie in [0, 2]"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed=18446744073709551616 must be below"),
        ({"steps": 10**9}, "steps=1000000000 must be below"),
    ],
)
def test_wrong_settings(wrong, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        TrainConfig(**wrong)


def test_keywords_are_wanted_or_not():
    with pytest.raises(TypeError, match="keywords=1 must be True or False"):
        TrainConfig(keywords=1)


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
