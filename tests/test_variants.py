"""Short trainings: the same seed, the same curves; what diverges ends nothing; the table says what is level."""

import itertools
import math
from dataclasses import replace

import matplotlib as mpl
import pytest
import torch
from torch import nn

from siglip_lib import SigLIP, Tokenizer
from siglip_lib.classroom import figure, plot_curves
from siglip_lib.data.augmentation import compose
from siglip_lib.data.emoji64 import load_emoji64, split
from siglip_lib.siglip.folder import EMOJI64_SIGLIP, EMOJI64_WEIGHTS
from siglip_lib.siglip.losses import plain_sigmoid_loss, plain_softmax_loss
from siglip_lib.train import (
    SHORT_COURSES,
    Runs,
    TrainConfig,
    Training,
    Variant,
    lowest_loss,
    runs_table,
    short_runs,
)
from siglip_lib.train.batches import Batches
from siglip_lib.train.variants import _Course, _verdict, training_and_validation

mpl.use("Agg")

SIZES = replace(
    EMOJI64_SIGLIP,
    patch_size=32,
    width=32,
    layers=1,
    heads=2,
    mlp_hidden=32,
    text_width=32,
    text_layers=1,
    text_heads=2,
    text_mlp_hidden=32,
)
CONFIG = TrainConfig(steps=6, batch=16, warmup=2, strength=0.0)
CROWDED = replace(CONFIG, steps=1, batch=64)  # drawn blindly, it has several drawings of a concept


@pytest.fixture(scope="module", autouse=True)
def emoji():
    """The pictures, read once for all tests of this file."""
    found = load_emoji64()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("siglip_lib.train.variants.load_emoji64", lambda: found)
        yield found


def plain() -> SigLIP:
    return SigLIP(SIZES)


def dropping() -> SigLIP:
    return SigLIP(replace(SIZES, layers=2), drop_path_rate=0.5)


def broken() -> SigLIP:
    """Its vectors are no numbers in the fourth step."""
    model, calls = plain(), itertools.count()

    def spoil(module, given, output):
        return output * (math.nan if next(calls) == 3 else 1.0)

    model.image.register_forward_hook(spoil)
    return model


def run(**variants) -> dict:
    return short_runs(variants, CONFIG, [0, 1], "cpu")


@pytest.fixture(scope="module")
def runs():
    return run(
        plain=Variant(plain, [1e-2]),
        again=Variant(plain, [1e-2]),
        late=Variant(plain, [1e-2], warmup=5),
        decayed=Variant(plain, [1e-2], weight_decay=20.0),
        dropping=Variant(dropping, [1e-2]),
        dropping_again=Variant(dropping, [1e-2]),
    )


def test_a_row_for_each_seed_and_a_figure_for_each_step(runs):
    assert list(runs) == ["plain", "again", "late", "decayed", "dropping", "dropping_again"]
    for found in runs.values():
        assert found.losses.shape == found.gradients.shape == (2, 6)
        assert found.recall.shape == found.final_loss.shape == (2,)
        for values in (found.losses, found.gradients, found.recall):
            assert values.dtype == torch.float32
            assert values.isfinite().all()
        assert ((found.recall >= 0) & (found.recall <= 1)).all()
        assert (found.gradients > 0).all()
        assert (found.lr, found.tried) == (1e-2, {})


@pytest.mark.parametrize(("one", "other"), [("plain", "again"), ("dropping", "dropping_again")])
def test_the_same_seed_gives_the_same_curves(runs, one, other):
    for name in ("losses", "gradients", "recall"):
        assert torch.equal(getattr(runs[one], name), getattr(runs[other], name))
    assert not torch.equal(runs[one].losses[0], runs[one].losses[1])


@pytest.mark.parametrize("other", ["late", "decayed"])
def test_a_variants_warm_up_and_decay_count_and_the_batches_are_the_same(runs, other):
    # the first loss is before any step
    assert torch.equal(runs["plain"].losses[:, 0], runs[other].losses[:, 0])
    assert not torch.equal(runs["plain"].losses[:, 2], runs[other].losses[:, 2])


@pytest.mark.parametrize(
    ("name", "change"),
    [("plain", {}), ("late", {"warmup": 5}), ("decayed", {"weight_decay": 20.0})],
)
def test_it_is_what_training_gives(runs, emoji, monkeypatch, name, change):
    norms, clip = [], nn.utils.clip_grad_norm_

    def noting(*given):
        norms.append(clip(*given))

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", noting)
    config = replace(CONFIG, lr=1e-2, seed=1, **change)
    tokenizer = Tokenizer(EMOJI64_WEIGHTS / "spiece.model", EMOJI64_SIGLIP.context_length)
    torch.manual_seed(1)
    model = plain()
    model.logit_bias.data.fill_(-math.log(16))
    training = Training(model, tokenizer, emoji, training_and_validation(emoji)[0], config, "cpu")
    training.run(progress=False)
    assert training.losses == runs[name].losses[1].tolist()
    assert torch.equal(torch.stack(norms), runs[name].gradients[1])


def first_step(variant: Variant) -> tuple[SigLIP, float]:
    """The model at the start of a variant's training with seed 0, and the loss of the first step."""
    found = short_runs({"": variant}, CROWDED, [0], "cpu")[""]
    torch.manual_seed(0)
    model = plain()
    model.logit_bias.data.fill_(-math.log(64) if variant.bias is None else variant.bias)
    return model, found.losses[0, 0].item()


@pytest.mark.parametrize(
    "variant",
    [
        Variant(plain, [1e-2], bias=-3.0),
        Variant(plain, [1e-2], loss="softmax"),
        Variant(plain, [1e-2], batches="blind"),
        Variant(plain, [1e-2], batches="blind", loss="softmax"),
        Variant(plain, [1e-2], batches="ids"),
    ],
)
def test_the_first_loss_is_what_the_variant_says(variant, emoji):
    model, loss = first_step(variant)
    places = training_and_validation(emoji)[0]
    tokenizer = Tokenizer(EMOJI64_WEIGHTS / "spiece.model", EMOJI64_SIGLIP.context_length)
    unique = variant.batches == "unique"
    batches = Batches(emoji, places, tokenizer, CROWDED, torch.device("cpu"), unique)
    drawn = batches.of_step(0)
    with torch.no_grad():
        assert (len(drawn["concept"].unique()) == 64) == unique
        image = model.encode_image(compose(batches.pictures[drawn["which"]]))
        text = model.encode_text(batches.tokens[drawn["text"]])
        ids = (drawn["concept"],) * 2 if variant.batches == "ids" else ()
        if variant.loss == "softmax":
            wanted = plain_softmax_loss(image, text, model.logit_scale)
        else:
            wanted = plain_sigmoid_loss(image, text, model.logit_scale, model.logit_bias, *ids)
    assert loss == pytest.approx(wanted.item(), rel=1e-5)


def test_recall_at_the_marks_changes_nothing_else():
    config = replace(CONFIG, steps=60)
    marked = short_runs({"": Variant(dropping, [1e-2])}, config, [0], "cpu", [20, 50, 60])[""]
    assert list(marked.courses) == ["training", "validation"]
    assert all(x.shape == (1, 3) and x.dtype == torch.float32 for x in marked.courses.values())
    assert marked.courses["validation"][0, 2] == marked.recall[0]
    unmarked = short_runs({"": Variant(dropping, [1e-2])}, config, [0], "cpu")[""]
    assert torch.equal(marked.losses, unmarked.losses)
    assert unmarked.courses["training"].shape == (1, 0)


def test_recall_on_training_is_that_of_pictures_spread_over_it(emoji):
    places, validation = torch.arange(100), torch.arange(1000, 1010)
    asked = []
    course = _Course(emoji, places, validation, None, torch.device("cpu"))

    def ranks_of(model, course, places):
        asked.extend(places.tolist())
        return torch.tensor([1.0] * 10 + [5.0, 6.0] * 5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("siglip_lib.train.variants._ranks", ranks_of)
        assert course.recall(None).tolist() == [1.0, 0.5]
    assert asked == [*range(0, 100, 11), *range(1000, 1010)]


def test_the_gradient_is_that_before_clipping(runs):
    config = replace(CONFIG, clip=1e-3)
    clipped = short_runs({"": Variant(plain, [1e-2])}, config, [0], "cpu")[""]
    assert clipped.gradients[0, 0] == runs["plain"].gradients[0, 0] > 1


def test_torchs_generators_are_left_as_they_were():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    run(dropping=Variant(dropping, [1e-2]))
    assert torch.equal(torch.rand(3), wanted)


def test_the_search_leaves_no_trace():
    found, alone = (
        short_runs({"": Variant(plain, rates)}, CONFIG, [0], "cpu")[""]
        for rates in ([1e-2, 1e-2 / 2], [1e-2])
    )
    assert list(found.tried) == [1e-2, 1e-2 / 2]
    assert all(0 < value < 1 for value in found.tried.values())
    assert torch.equal(found.losses, alone.losses) == (found.lr == alone.lr)


def test_what_diverges_has_nan_from_there_on_and_the_others_go_on():
    found = run(broken=Variant(broken, [1e-2, 1e-3]), plain=Variant(plain, [1e-2]))
    for values in (found["broken"].losses, found["broken"].gradients):
        assert values[:, :3].isfinite().all()
        assert values[:, 3:].isnan().all()
    assert found["broken"].recall.isnan().all()
    assert all(math.isnan(value) for value in found["broken"].tried.values())
    assert found["plain"].losses.isfinite().all()
    assert "diverged" in runs_table({"plain": found["plain"], "broken": found["broken"]})


def test_a_rate_that_diverges_is_not_chosen(monkeypatch):
    ranks = {0.5: [math.nan, math.nan], 0.1: [6, 70], 0.01: [1, 70], 0.001: [3, 5]}

    trained = []

    def train(variant, config, course, marks, bar):
        trained.append((config.seed, config.lr))
        found = torch.tensor(ranks[config.lr]).float()
        return torch.zeros(6), torch.zeros(6), found, torch.zeros(0, 2)

    monkeypatch.setattr("siglip_lib.train.variants._train", train)
    for rates, chosen in (([0.5, 0.1], 0.1), ([0.1, 0.01, 0.001], 0.01)):
        found = run(some=Variant(plain, rates))["some"]
        assert found.lr == chosen
        assert found.recall.tolist() == [sum(rank <= 5 for rank in ranks[chosen]) / 2] * 2
    # the search has a seed of its own
    assert trained[:4] == [(2, 0.5), (2, 0.1), (0, 0.1), (1, 0.1)]
    assert found.tried[0.001] == pytest.approx((1 / 3 + 1 / 5) / 2)


def test_a_model_whose_vectors_have_no_direction_has_no_recall():
    def silent():
        model = plain()
        for parameter in model.image.attn_pool.parameters():
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
        return model

    assert run(silent=Variant(silent, [1e-2]))["silent"].recall.isnan().all()


def test_validation_is_a_designer_of_the_training_and_not_of_the_test(emoji):
    train, validation = training_and_validation(emoji)
    parts = split(emoji)
    assert set(train.tolist()) | set(validation.tolist()) == set(parts.train.tolist())
    assert not set(train.tolist()) & set(validation.tolist())
    assert {emoji.vendors[i] for i in emoji.vendor[validation]} == {"emojione"}
    assert "emojione" not in {emoji.vendors[i] for i in emoji.vendor[train]}
    assert torch.isin(emoji.concept[validation], emoji.concept[train]).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(variants={}), ValueError, "variants is empty"),
        (dict(seeds=[]), ValueError, "must be different numbers, at least one"),
        (dict(seeds=[1, 1]), ValueError, r"seeds=\[1, 1\] must be different"),
        (dict(seeds=[-1]), ValueError, "seeds=-1 must be at least 0"),
        (dict(seeds=[2**64 - 1]), ValueError, "must be below"),
        (dict(variants={"a": plain}), TypeError, "must be a Variant"),
        (dict(variants={"a": Variant(3, [1e-3])}), TypeError, "a: build=3 must be a function"),
        (dict(variants={"a": Variant(plain, [])}), ValueError, "a: rates is empty"),
        (dict(variants={"a": Variant(plain, [math.nan])}), ValueError, "lr=nan must be finite"),
        (dict(variants={"a": Variant(plain, [1e-3], 0)}), ValueError, "warmup=0 must be"),
        (dict(variants={"a": Variant(plain, [1], 1, -1.0)}), ValueError, "weight_decay=-1.0 must"),
        (dict(variants={"a": Variant(lambda: nn.Linear(2, 2), [1])}), TypeError, "not Linear"),
        (dict(variants={"a": Variant(plain, [1], bias=math.inf)}), ValueError, "a: bias=inf must"),
        (dict(variants={"a": Variant(plain, [1], loss="l2")}), ValueError, "a: loss='l2' is"),
        (dict(variants={"a": Variant(plain, [1], batches="")}), ValueError, "a: batches='' is"),
        (
            dict(variants={"a": Variant(plain, [1], loss="softmax", batches="ids")}),
            ValueError,
            "CLIP's loss takes no ids",
        ),
        (dict(marks=[7]), ValueError, r"marks=\[7\] must ascend, up to 6 at most"),
        (dict(marks=[3, 3]), ValueError, r"marks=\[3, 3\] must ascend"),
        (dict(marks=[0]), ValueError, "marks=0 must be at least 1"),
        (
            dict(variants={"a": Variant(lambda: SigLIP(replace(SIZES, vocab_size=9)), [1])}),
            ValueError,
            "the tokenizer has 1500 pieces",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(change, error, message, monkeypatch):
    monkeypatch.setattr("siglip_lib.train.variants._train", pytest.fail)
    given = dict(variants={}, seeds=[0], marks=[]) | change
    if "variants" not in change:
        given["variants"] = {"first": Variant(plain, [1e-3])}
    elif given["variants"]:
        given["variants"] = {"first": Variant(plain, [1e-3])} | given["variants"]
    with pytest.raises(error, match=message):
        short_runs(given["variants"], CONFIG, given["seeds"], "cpu", given["marks"])


def test_on_a_gpu_the_norms_are_noted_in_the_graph_too(gpu, runs, monkeypatch):
    found = short_runs({"": Variant(plain, [1e-2])}, CONFIG, [0, 1], gpu)[""]
    torch.testing.assert_close(found.losses, runs["plain"].losses, rtol=0.02, atol=0)
    assert not torch.cuda.is_current_stream_capturing()
    # not with the CPU's: norms in bfloat16 are some tenths from those in float32
    monkeypatch.setattr(Training, "_eager_steps", math.inf)
    eager = short_runs({"": Variant(plain, [1e-2])}, CONFIG, [0, 1], gpu)[""]
    torch.testing.assert_close(found.gradients, eager.gradients, rtol=1e-3, atol=0)


def made_up(losses: list[float], recall: list[float], tried: dict | None = None) -> Runs:
    losses = torch.tensor(losses)[:, None].expand(-1, 20)
    return Runs(2e-3, tried or {}, losses, losses, torch.tensor(recall))


def test_the_table_says_what_is_level():
    table = runs_table(
        {
            "first": made_up([1.0, 1.2, 1.4], [0.1, 0.12, 0.14]),
            "near": made_up([1.3, 1.4, 1.5], [0.15, 0.15, 0.15]),
            "far": made_up([2.0, 2.0, 2.0], [0.05, 0.06, 0.07], {2e-3: 0.2, 1e-3: 0.1}),
        }
    ).splitlines()
    assert table[1].split() == [
        *("first", "2e-03", "1.200", "(1.000", "to", "1.400)"),
        *("12.0", "(10.0", "to", "14.0)"),
    ]
    assert table[2].split()[6:] == ["level", "15.0", "(15.0", "to", "15.0)", "level"]
    assert "higher" in table[3]
    assert table[3].endswith("lower")
    assert "2e-03!" in table[3]
    assert "2e-03!" not in table[1]


@pytest.mark.parametrize(("seeds", "level"), [(3, 0.95), (2, 0.79)])
def test_variants_that_are_alike_are_level_as_often_as_it_says(seeds, level):
    found = torch.randn(4000, 2, seeds, generator=torch.Generator().manual_seed(0))
    said = [_verdict(one, other) for one, other in found]
    assert said.count("level") / len(said) == pytest.approx(level, abs=0.02)
    assert said.count("lower") == pytest.approx(said.count("higher"), rel=0.3)


def test_one_seed_has_no_verdict():
    one = made_up([1.0], [0.1])
    line = runs_table({"first": one, "other": made_up([9.0], [0.9])}).splitlines()[2]
    assert line.split() == ["other", "2e-03", "9.000", "?", "90.0", "?"]
    with pytest.raises(ValueError, match="runs is empty"):
        runs_table({})


def test_the_final_loss_is_that_of_the_last_tenth():
    losses = torch.arange(40.0).expand(2, 40)
    assert Runs(1.0, {}, losses, losses, torch.zeros(2)).final_loss.tolist() == [37.5, 37.5]


def test_curves_are_drawn_as_a_mean_and_a_band():
    fig, axes = figure()
    curves = torch.ones(2, 81)  # 40 windows of two steps, and one step over
    curves[:, :4] = torch.tensor([[1.0, 3.0, 5.0, 7.0], [3.0, 5.0, 7.0, math.nan]])
    curves[:, -1] = 100.0
    named = {"some": curves, "other": torch.ones(1, 3)}
    plot_curves(axes[0, 0], named, {"some": dict(linestyle="--")})
    line, other = axes[0, 0].get_lines()
    x, y = line.get_data()
    assert (x[:2].tolist(), len(x)) == ([1, 3], 40)
    assert (y[0], math.isnan(y[1]), y[-1]) == (3, True, 1)
    assert (line.get_label(), line.get_linestyle()) == ("some", "--")
    assert other.get_xdata().tolist() == [0.5, 1.5, 2.5]
    band, _ = axes[0, 0].collections
    assert {2.0, 4.0} <= set(band.get_paths()[0].vertices[:, 1].tolist())
    with pytest.raises(ValueError, match=r"curves\['flat'\] has shape"):
        plot_curves(axes[0, 0], {"good": curves, "flat": curves[0]})
    assert len(axes[0, 0].get_lines()) == 2
    mpl.pyplot.close(fig)


def test_the_lowest_loss_names_those_that_are_level_with_it():
    low = made_up([1.0, 1.2, 1.4], [0.1] * 3)
    others = dict(
        nan=made_up([0.0, math.nan, 0.0], [0.1] * 3),
        far=made_up([2.0, 2.1, 2.2], [0.1] * 3),
        low=low,
        near=made_up([1.3, 1.4, 1.5], [0.1] * 3),
    )
    assert lowest_loss(others) == "low, near"
    assert lowest_loss(others | {"one": made_up([0.5], [0.1])}) == "one seed does not tell"


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_what_a_model_that_knows_no_pair_loses(batch):
    share = torch.full((batch, batch), 1 / batch, dtype=torch.float64)
    each = torch.nn.functional.binary_cross_entropy(
        share, torch.eye(batch, dtype=torch.float64), reduction="sum"
    )
    assert TrainConfig(batch=batch).no_pair_loss == pytest.approx(each.item() / batch)


def test_the_courses_differ_in_length_alone():
    assert list(SHORT_COURSES) == ["cpu", "lab", "full"]
    for course in SHORT_COURSES.values():
        assert course.recipe.warmup < course.recipe.steps
        assert course.recipe.strength == 0
        assert SigLIP(course.towers).config == course.towers
