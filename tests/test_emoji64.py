"""emoji64: what is in it, how it is split, what its captions say, and batches without a concept twice."""

import dataclasses
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from siglip_lib.data import emoji64
from siglip_lib.data.emoji64 import (
    KEYWORD_TEMPLATES,
    TEMPLATES,
    Emoji64,
    captions,
    load_emoji64,
    split,
    unique_batches,
)
from siglip_lib.data.preprocessing import preprocess

GROUPS = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places")


@pytest.fixture(scope="module")
def emoji() -> Emoji64:
    return load_emoji64()


def canonical(text: str) -> str:
    """Lower case, no punctuation, single spaces: as SigLIP reads a text."""
    kept = "".join(c for c in text.lower() if c.isalnum() or c.isspace())
    return " ".join(kept.split())


def place(emoji, name, vendor) -> int:
    this = (emoji.concept == emoji.names.index(name)) & (
        emoji.vendor == emoji.vendors.index(vendor)
    )
    return int(this.nonzero())


def test_is_what_its_credits_say(emoji):
    assert (emoji.pictures.shape, emoji.pictures.dtype) == ((5094, 4, 64, 64), torch.uint8)
    assert emoji.pictures.is_contiguous()
    assert emoji.concept.dtype == emoji.vendor.dtype == torch.int64
    assert emoji.concept.shape == emoji.vendor.shape == (5094,)
    by_concept = (emoji.names, emoji.groups, emoji.keywords, emoji.symbols)
    assert [len(values) for values in by_concept] == [861] * 4
    assert dict(zip(emoji.vendors, emoji.vendor.bincount().tolist(), strict=True)) == {
        "noto": 861,
        "noto-v1": 649,
        "twemoji": 861,
        "fluent-emoji-flat": 853,
        "fluent-emoji": 853,
        "emojione": 650,
        "fxemoji": 367,
    }
    assert sorted(set(emoji.groups)) == list(GROUPS)
    drawn = torch.stack([emoji.concept, emoji.vendor], 1)
    assert len(drawn.unique(dim=0)) == 5094  # nobody drew a concept twice
    lion = emoji.names.index("lion")
    assert (emoji.symbols[lion], emoji.groups[lion]) == ("🦁", "Animals & Nature")
    assert "mane" in emoji.keywords[lion]


def test_colour_is_zero_where_alpha_is(emoji):
    colour, alpha = emoji.pictures[:, :3], emoji.pictures[:, 3:]
    assert not (colour * (alpha == 0)).any()
    assert (alpha == 0).flatten(1).any(1).float().mean() > 0.99


def test_a_picture_shows_its_concept(emoji):
    # channels in the right order: a green apple is green, a red one red
    for name, channel in (("red apple", 0), ("green apple", 1), ("blue book", 2)):
        for vendor in ("noto", "twemoji"):
            rgba = emoji.pictures[place(emoji, name, vendor)].double()
            assert (rgba[:3] * rgba[3:]).sum((1, 2)).argmax() == channel
    # and upright: a tree is wide below
    for vendor in ("noto", "twemoji"):
        alpha = emoji.pictures[place(emoji, "Christmas tree", vendor), 3].double()
        assert alpha[32:].sum() > 1.3 * alpha[:32].sum()


def test_loads_in_less_than_a_second():
    def seconds() -> float:
        start = time.process_time()  # of a processor, so without its neighbours' work
        load_emoji64()
        return time.process_time() - start

    assert any(seconds() < 1 for _ in range(3))


def test_is_frozen(emoji):
    with pytest.raises(dataclasses.FrozenInstanceError):
        emoji.names = []


def test_picture_is_upright_and_on_its_background(emoji):
    index = place(emoji, "red apple", "twemoji")
    shown = emoji.picture(index)
    assert (shown.mode, shown.size) == ("RGB", (64, 64))
    whole = Image.fromarray(emoji.pictures[index].permute(1, 2, 0).numpy())
    assert torch.equal(preprocess(shown, 64), preprocess(whole, 64))
    blue = emoji.picture(index, size=96, background=(0, 0, 255))
    assert blue.size == (96, 96)
    assert blue.getpixel((0, 0)) == (0, 0, 255)
    # the same in the middle, whatever its size and background
    assert np.abs(np.subtract(blue.getpixel((48, 48)), shown.getpixel((32, 32)))).max() < 30


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"index": 5094}, ValueError, "index=5094 must be below 5094"),
        ({"index": -1}, ValueError, "index=-1 must be at least 0"),
        ({"size": 0}, ValueError, "size=0 must be at least 1"),
        ({"background": (0, 0, 256)}, ValueError, "background=(0, 0, 256) must be three numbers"),
        ({"background": (0, 0)}, ValueError, "background=(0, 0) must be three numbers in 0..255"),
    ],
)
def test_wrong_arguments_of_picture(emoji, options, error, message):
    with pytest.raises(error) as caught:
        emoji.picture(**({"index": 0} | options))
    assert message in str(caught.value)


def test_split_leaks_neither_designer_nor_concept(emoji):
    for vendors in (("twemoji",), ("fluent-emoji", "fluent-emoji-flat"), ("noto", "twemoji")):
        parts = split(emoji, vendors, unseen=100)
        held = {emoji.vendors.index(name) for name in vendors}
        for part in (parts.seen, parts.unseen):
            assert set(emoji.vendor[part].tolist()) == held
        assert not held & set(emoji.vendor[parts.train].tolist())
        train, seen, unseen = (
            set(emoji.concept[part].tolist()) for part in (parts.train, parts.seen, parts.unseen)
        )
        assert seen <= train
        assert not unseen & train
        assert all((part.diff() > 0).all() for part in (parts.train, parts.seen, parts.unseen))


def test_split_leaves_out_no_more_than_it_must(emoji):
    parts = split(emoji)
    assert [len(part) for part in (parts.train, parts.seen, parts.unseen)] == [3795, 775, 86]
    new = torch.isin(emoji.concept, emoji.concept[parts.unseen])
    assert int((new & (emoji.vendor != 2)).sum()) == 5094 - 3795 - 775 - 86
    nothing = split(emoji, unseen=0)
    assert (len(nothing.train), len(nothing.seen), len(nothing.unseen)) == (4233, 861, 0)


def test_seen_concepts_were_drawn_by_another_designer(emoji):
    # with five of seven held out some concepts have no picture to train on
    vendors = [name for name in emoji.vendors if name not in ("noto-v1", "fxemoji")]
    parts = split(emoji, vendors, unseen=0)
    assert set(emoji.concept[parts.seen].tolist()) == set(emoji.concept[parts.train].tolist())
    assert len(parts.seen) < 861 + 861 + 853 + 853 + 650
    assert len(parts.unseen) == 0


@pytest.mark.parametrize("number", [1, 2, 5, 43, 86, 200, 860])
def test_unseen_concepts_are_spread_over_the_groups(emoji, number):
    unseen = set(emoji.concept[split(emoji, unseen=number).unseen].tolist())
    assert len(unseen) == number
    drawn = np.array([sum(emoji.groups[c] == group for c in unseen) for group in GROUPS])
    exact = np.array([emoji.groups.count(group) for group in GROUPS]) * number / 861
    assert np.ptp(drawn - exact) <= 1  # else one moved to another group would be nearer


def test_the_draw_is_the_same_everywhere(emoji):
    names = [emoji.names[c] for c in emoji.concept[split(emoji).unseen]]
    assert names[:5] == ["lion", "tiger", "leopard", "giraffe", "hippopotamus"]
    assert names[-3:] == ["shower", "basket", "cigarette"]
    torch.manual_seed(5)  # no global state
    assert [emoji.names[c] for c in emoji.concept[split(emoji).unseen]] == names
    other = [emoji.names[c] for c in emoji.concept[split(emoji, seed=1).unseen]]
    assert 0 < len(set(names) & set(other)) < 30  # a tenth of 86 by chance
    # on which designers are held out it doesn't depend
    pair = split(emoji, ("fluent-emoji", "fluent-emoji-flat"))
    assert {emoji.names[c] for c in emoji.concept[pair.unseen]} <= set(names)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"vendors": "twemoji"}, TypeError, "vendors='twemoji' must be a sequence of names"),
        ({"vendors": ("apple",)}, ValueError, "'apple' is unknown; allowed are 'noto', 'noto-v1'"),
        ({"vendors": ()}, ValueError, "vendors=() must be different names, at least one"),
        ({"vendors": ("noto", "noto")}, ValueError, "must be different names"),
        ({"vendors": ("fluent-emoji",)}, ValueError, "the same designs, so training on one"),
        ({"vendors": ("noto", "fluent-emoji-flat")}, ValueError, "must name both of fluent-emoji"),
        ({"unseen": 861}, ValueError, "unseen=861 must be below 861"),
        ({"unseen": 8.6}, TypeError, "unseen=8.6 must be an int"),
        ({"seed": -1}, ValueError, "seed=-1 must be at least 0"),
    ],
)
def test_wrong_arguments_of_split(emoji, options, error, message):
    with pytest.raises(error) as caught:
        split(emoji, **options)
    assert message in str(caught.value)


def test_not_all_designers_can_be_held_out(emoji):
    with pytest.raises(ValueError, match="at least one and not all"):
        split(emoji, emoji.vendors)


def test_something_is_left_to_train_on(emoji):
    # the one concept that is left was not drawn by the one designer who is
    others = tuple(name for name in emoji.vendors if name != "fxemoji")
    with pytest.raises(ValueError, match=r"and unseen=860 leave nothing to train on; hold out"):
        split(emoji, others, unseen=860)
    assert len(split(emoji, iter(others), unseen=800).train) > 0


def test_captions_of_one_concept():
    names = [template.format("black cat") for template in TEMPLATES]
    assert captions("black cat", []) == names
    assert captions("black cat", ["cat", "Black", "*"]) == names  # no word more
    two = captions("black cat", ["cat", "meow", "bad luck", "bad-luck", "Meow"])
    assert two[: len(TEMPLATES)] == names
    assert two[len(TEMPLATES) :] == [
        template.format("black cat", told)
        for told in ("meow", "bad luck", "meow, bad luck")
        for template in KEYWORD_TEMPLATES
    ]
    assert all("black cat" in text for text in two)


def test_keywords_are_no_str():
    with pytest.raises(TypeError, match="keywords='pet' must be a sequence"):
        captions("cat", "pet")


def test_templates_take_what_they_are_given():
    assert all(template.count("{}") == 1 for template in TEMPLATES)
    # the name first: without it a caption would be true of other concepts
    assert all(template.count("{}") == 2 for template in KEYWORD_TEMPLATES)
    assert TEMPLATES[0] == "{}"


def test_no_caption_belongs_to_two_concepts(emoji):
    owner: dict[str, str] = {}
    for name, keywords in zip(emoji.names, emoji.keywords, strict=True):
        own = [canonical(text) for text in captions(name, keywords)]
        assert len(set(own)) == len(own) >= len(TEMPLATES)
        for text in own:
            assert owner.setdefault(text, name) == name


@pytest.fixture
def concept() -> torch.Tensor:
    # 40 concepts with gaps between their numbers, 1 to 4 pictures each, mixed
    sizes = torch.arange(40) % 4 + 1
    mixed = torch.arange(40).mul(3).repeat_interleave(sizes)
    return mixed[torch.randperm(len(mixed))]


def test_no_batch_shows_a_concept_twice(concept):
    places = unique_batches(concept, 30, torch.Generator().manual_seed(0), steps=200)
    assert (places.shape, places.dtype) == ((200, 30), torch.int64)
    assert all(len(set(row)) == 30 for row in concept[places].tolist())


def test_concepts_and_their_pictures_are_equally_frequent(concept):
    steps, batch = 8000, 10
    places = unique_batches(concept, batch, torch.Generator().manual_seed(0), steps=steps)
    found = places.flatten().bincount(minlength=len(concept)).double()
    concepts, sizes = concept.unique(return_counts=True)
    expected = steps * batch / len(concepts)
    by_concept = torch.stack([found[concept == c].sum() for c in concepts])
    # a share of 1 / 4 of the steps: 39 is the standard deviation, and 40 are looked at
    assert (by_concept - expected).abs().max() < 4.5 * 39
    for c, size in zip(concepts, sizes, strict=True):
        mine = found[concept == c]
        assert (mine - expected / size).abs().max() < 4.5 * (expected / size) ** 0.5
    # each place of a batch, too
    for column in places.T:
        assert concept[column].unique().numel() == 40


def test_a_batch_may_hold_all_concepts(concept):
    places = unique_batches(concept, 40, torch.Generator().manual_seed(0), steps=3)
    assert (concept[places].sort(1).values == torch.arange(40) * 3).all()


def test_an_epoch_draws_as_many_pictures_as_there_are(concept):
    generator = torch.Generator().manual_seed(0)
    assert len(concept) == 100
    assert unique_batches(concept, 30, generator).shape == (4, 30)
    assert unique_batches(concept, 25, generator).shape == (4, 25)


def test_the_generator_alone_decides(concept):
    first = unique_batches(concept, 8, torch.Generator().manual_seed(3))
    torch.manual_seed(9)
    assert torch.equal(first, unique_batches(concept, 8, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, unique_batches(concept, 8, torch.Generator().manual_seed(4)))


def test_a_training_is_drawn_at_once(emoji):
    concept = emoji.concept[split(emoji).train]

    def seconds() -> float:
        start = time.process_time()
        unique_batches(concept, 512, torch.Generator(), steps=1000)
        return time.process_time() - start

    assert any(seconds() < 0.5 for _ in range(3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": 4}, ValueError, "batch=4 must be at most 3, the number of concepts"),
        ({"batch": 0}, ValueError, "batch=0 must be at least 1"),
        ({"steps": 0}, ValueError, "steps=0 must be at least 1"),
        ({"steps": 2.5}, TypeError, "steps=2.5 must be an int"),
        (
            {"concept": torch.zeros(2, 2).long()},
            ValueError,
            "concept has shape (2, 2); it must be (n,)",
        ),
        ({"concept": torch.zeros(2)}, TypeError, "concept is torch.float32; it must be of int"),
        (
            {"concept": torch.zeros(2, device="meta").long()},
            ValueError,
            "concept is on meta; it must be on",
        ),
    ],
)
def test_wrong_arguments_of_unique_batches(options, error, message):
    given = {"concept": torch.tensor([0, 5, 5, 7]), "batch": 2, "generator": torch.Generator()}
    with pytest.raises(error) as caught:
        unique_batches(**(given | options))
    assert message in str(caught.value)


def test_a_generator_of_the_gpu_is_refused(gpu):
    with pytest.raises(ValueError, match="must be on the CPU"):
        unique_batches(torch.arange(4), 2, torch.Generator(gpu))


@pytest.mark.parametrize("name", ["emoji64.npz", "emoji64.json"])
def test_missing_and_changed_files(tmp_path, monkeypatch, name):
    shutil.copytree(emoji64.FOLDER, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(emoji64, "FOLDER", tmp_path)
    load_emoji64()
    file = tmp_path / name
    whole = file.read_bytes()
    middle = len(whole) // 2
    one_bit_less = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for changed in (b"", b"nothing", whole[:middle], whole + b" ", one_bit_less):
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=f"{name} is damaged or changed; install the pack"):
            load_emoji64()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing; install the package again"):
        load_emoji64()


def test_names_are_all_different(emoji):
    assert len(set(emoji.names)) == len(emoji.names)
