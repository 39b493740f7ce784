"""Text tower and tokenizer, against transformers' SiglipTextModel and SiglipTokenizer."""

import re

import pytest
import torch
from comparing import assert_close, randomized
from hypothesis import given
from hypothesis import strategies as st
from transformers import SiglipTextConfig, SiglipTextModel, SiglipTokenizer

from siglip_lib.siglip.text import TextTransformer, Tokenizer, canonicalize, train_tokenizer
from siglip_lib.storage.fitting import fill
from siglip_lib.storage.names import TEXT_TOWER, under_transformers_names

SIZES = dict(vocab_size=50, context_length=7, width=24, depth=2, num_heads=3, embed_dim=20)
CAPTIONS = [
    f"{start} {adjective} {name}"
    for start in ("a picture of a", "An emoji:", "drawing of the")
    for adjective in ("red", "small", "café’s", "smiling", "")
    for name in ("cat", "cat face", "rocket", "slice of pizza", "crème brûlée", "T-Rex", "ok 100")
]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    train_tokenizer(CAPTIONS, path, 50)
    return path


@pytest.fixture(scope="module")
def pair(pieces):
    """Ours and theirs, from one file."""
    return Tokenizer(pieces, 16), SiglipTokenizer(str(pieces), model_max_length=16)


# --- the tower ---


def their_tower(hidden: int = 61) -> SiglipTextModel:
    config = SiglipTextConfig(
        vocab_size=50,
        max_position_embeddings=7,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=hidden,
        projection_size=20,
        bos_token_id=None,
        eos_token_id=1,
    )
    return randomized(SiglipTextModel(config).double())


def named(model: TextTransformer, gradients: bool) -> dict[str, list[torch.Tensor]]:
    tensors = {k: p.grad if gradients else p.detach() for k, p in model.named_parameters()}
    return under_transformers_names(tensors, TEXT_TOWER)


def test_outputs_and_gradients_are_transformers():
    theirs, ours = their_tower(), TextTransformer(**SIZES, mlp_ratio=61.5 / 24).double()
    expected = {name: p.detach() for name, p in theirs.named_parameters()}
    assert named(ours, gradients=False).keys() == expected.keys()
    fill(named(ours, gradients=False), expected)
    tokens = torch.randint(50, (3, 7))
    tokens[0, 2:] = 1
    found, wanted = ours(tokens), theirs(tokens).pooler_output
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    gradients = {name: torch.cat(rows) for name, rows in named(ours, gradients=True).items()}
    assert_close(
        gradients | {"": found}, {k: p.grad for k, p in theirs.named_parameters()} | {"": wanted}
    )


@pytest.mark.parametrize("shape", [(7,), (2, 6), (2, 8), (1, 2, 7)])
def test_a_text_has_as_many_tokens_as_positions(shape):
    with pytest.raises(ValueError, match=re.escape(f"tokens has shape {shape}; it must be (B, 7)")):
        TextTransformer(**SIZES, mlp_ratio=2.0)(torch.ones(shape, dtype=torch.int64))


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_has_nothing_to_warn_of():
    tower = TextTransformer(**SIZES, mlp_ratio=2.0).eval()
    traced = torch.jit.trace(tower, (torch.ones(2, 7, dtype=torch.int64),))
    tokens = torch.arange(21).view(3, 7) % SIZES["vocab_size"]
    torch.testing.assert_close(traced(tokens), tower(tokens))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("vocab_size", 0, ValueError),
        ("context_length", 0, ValueError),
        ("context_length", 7.0, TypeError),
        ("width", -24, ValueError),
        ("depth", 0, ValueError),
        ("embed_dim", 0, ValueError),
        ("num_heads", 5, ValueError),
        ("mlp_ratio", float("nan"), ValueError),
    ],
)
def test_wrong_sizes_are_refused(name, value, error):
    with pytest.raises(error, match=f"{name}={value}"):
        TextTransformer(**SIZES | {"mlp_ratio": 2.0, name: value})


def test_weights_start_as_in_big_vision():
    model = TextTransformer(4000, 64, 64, 2, 4, 4.0, 64)
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.ndim > 1:
            embedding = "embed" in name
            expected = 64**-0.5 if embedding else (2 / sum(tensor.shape)) ** 0.5
            assert tensor.std().item() == pytest.approx(expected, rel=0.05), name
            # a normal has a kurtosis of 3, a uniform distribution of 1.8
            kurtosis = ((tensor / tensor.std()) ** 4).mean().item()
            assert kurtosis == pytest.approx(3 if embedding else 1.8, rel=0.1), name
        elif "norm" in name:
            assert torch.equal(tensor, torch.full((64,), float(name.endswith("weight"))))
        else:
            assert tensor.abs().max() < 1e-5, name
    before = {name: tensor.clone() for name, tensor in state.items()}
    model.init_weights()
    assert all(
        not torch.equal(before[name], tensor) for name, tensor in state.items() if tensor.ndim > 1
    )


@pytest.mark.parametrize("weight_init", ["jax", "big_vision"])
def test_a_tower_from_the_meta_device_starts_as_one_that_was_built(weight_init):
    def make() -> TextTransformer:
        return TextTransformer(50, 8, 16, 2, 2, 2.0, 24, weight_init=weight_init)

    torch.manual_seed(7)
    built = make()
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan)
    torch.manual_seed(7)
    model.init_weights()
    for name, tensor in built.state_dict().items():
        assert torch.equal(model.get_parameter(name), tensor), name


def test_big_visions_own_rule():
    model = TextTransformer(400, 64, 64, 1, 4, 4.0, 256, weight_init="big_vision")
    weights = *model.blocks[0].attn.qkv.weight.chunk(3), model.head.weight
    for weight in weights:  # flax's Dense layer starts the head: variance 1 / inputs
        assert weight.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert model.pos_embed.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert (model.head.bias == 0).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["a cat"], "tokens must be a tensor (B, 8), not list; a Tokenizer makes such"),
        (torch.ones(2, 8), "tokens is torch.float32; it must be of integers; a Tokenizer"),
    ],
)
def test_what_are_no_token_ids(tokens, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        TextTransformer(50, 8, 16, 1, 2, 2.0, 24)(tokens)


# --- the tokenizer ---

TEXTS = [
    "",
    " ",
    "a cat",
    "  A  Cat! ",
    "\tsmall\ncat\x0bface\u00a0ok\u3000",
    "! a cat",
    "cat-face",
    "it's 100 %, (ok)?",
    "_^`~|",
    "café crème",
    "CRÈME BRÛLÉE",
    "cafe\u0301",
    "“quoted” … ¡hola!",
    "😀",
    "a 😀 cat 👩‍🚀",
    "\u200b\x00\x07",
    "ﬁ ½ ① ẞ İstanbul",
    "日本語",
    "▁small▁cat",
    "▁ a",
    "x" * 100,
    "a red cat " * 50,
    "<pad> a </ s>",
]


def assert_same_ids(pair, texts):
    ours, theirs = pair
    expected = theirs(texts, padding="max_length", truncation=True, return_tensors="pt")
    found = ours(texts)
    assert found.dtype == torch.int64
    assert found.tolist() == expected["input_ids"].tolist()


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_transformers(text, pair):
    assert_same_ids(pair, [text])


@given(st.lists(st.text() | st.text("ac mt.,'-▁\n😀é"), min_size=1, max_size=5))
def test_ids_of_any_text_are_transformers(pair, texts):
    assert_same_ids(pair, texts)


@given(st.text())
def test_canonical_text_is_transformers(pair, text):
    assert canonicalize(text) == pair[1].canonicalize_text(text)


def test_names_of_special_tokens_are_words_like_others(pair):
    # transformers takes them out of the text first; here a caption cannot hold a special token
    ours, theirs = pair
    assert ours(["a </s> <unk> cat"]).equal(ours(["a s unk cat"]))
    assert theirs("a </s>cat")["input_ids"].count(1) == 2


def test_the_end_comes_last_and_fills_up(pair):
    ours, _ = pair
    short, long, empty = ours(["a cat", "a cat " * 50, "?"])
    assert short[:-3].tolist() != long[:-3].tolist()
    length = (short != 1).sum()
    assert 0 < length < 15
    assert (short[length:] == 1).all()
    assert (long[:-1] != 1).all()
    assert long[-1] == 1
    assert (empty == 1).all()
    assert ours([]).shape == (0, 16)


def test_what_was_cut_is_put_together_again(pair):
    ours, theirs = pair
    texts = ["A cat!", "  two  cats", "a cat " * 50, "?", ""]
    tokens = ours(texts)
    assert ours.decode(tokens)[:2] == ["a cat", "two cats"]
    assert ours.decode(tokens)[3:] == ["", ""]
    assert ours.decode(tokens) == theirs.batch_decode(tokens, skip_special_tokens=True)
    tokens[0, 1:3] = torch.tensor([1, tokens[1, 0]])  # nothing counts after </s>
    assert ours.decode(tokens[:1, :1]) == ours.decode(tokens[:1])
    assert ours.decode(tokens[:0]) == []


def test_prompts_end_with_their_last_word(pair):
    ours, _ = pair
    texts = ["a cat", "two cats", "a cat " * 50, ""]
    tokens, prompts = ours(texts), ours.prompts(texts)
    assert prompts.shape == tokens.shape
    for row, prompt in zip(tokens.tolist(), prompts.tolist(), strict=True):
        words = [token for token in row if token != 1]
        assert prompt == [1] * (len(row) - len(words)) + words
    assert ours.decode(prompts) == ours.decode(tokens)
    assert ours.prompts([]).shape == (0, 16)


def test_what_no_tokenizer_gave_is_not_decoded(pair):
    ours, _ = pair
    for beyond in (-1, ours.vocab_size):
        with pytest.raises(ValueError, match=f"tokens holds {beyond}; it must lie in 0 to"):
            ours.decode(torch.tensor([[3, beyond]]))
    with pytest.raises(ValueError, match="tokens has shape"):
        ours.decode(torch.tensor([3]))
    with pytest.raises(TypeError, match="tokens"):
        ours.decode(torch.ones(1, 2))


@pytest.mark.parametrize("texts", ["a cat", ["a cat", None], [b"a cat"], [["a cat"]]])
def test_texts_are_a_list_of_strings(texts, pair):
    with pytest.raises(TypeError, match="texts must be a list of strings, not "):
        pair[0](texts)


def test_half_of_a_character_is_named(pair, tmp_path):
    texts = ["a 😀 cat", "a \ud83d cat"]
    said = r"\[1\]='a \\ud\w+ cat' holds half of a character at 2; "
    with pytest.raises(ValueError, match=f"^texts{said}"):
        pair[0](texts)
    with pytest.raises(ValueError, match=f"^captions{said}"):
        train_tokenizer(texts, tmp_path / "a.model", 50)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_sentencepiece_model(tmp_path):
    for content in (b"", b"garbage" * 9):
        (tmp_path / "a.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.model' (is no SentencePiece model|ends a text)"):
            Tokenizer(tmp_path / "a.model")
    with pytest.raises(FileNotFoundError):
        Tokenizer(tmp_path / "b.model")


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ({}, "ends a text with piece 2; SigLIP's is 1"),  # sentencepiece's own defaults
        (
            {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},  # Gemma's, which SigLIP 2 takes
            "has piece 3 for what is unknown; SigLIP's is",
        ),
    ],
)
def test_a_vocabulary_with_other_special_pieces(tmp_path, pieces, said):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_prefix=str(tmp_path / "a"),
        vocab_size=50,
        minloglevel=2,
        **pieces,
    )
    with pytest.raises(ValueError, match=rf"a\.model' {said}"):
        Tokenizer(tmp_path / "a.model")


@pytest.mark.parametrize("length", [0, 1.5])
def test_context_length_is_a_positive_int(length, pieces):
    with pytest.raises((TypeError, ValueError), match=f"context_length={length}"):
        Tokenizer(pieces, length)


# --- its training ---


def test_training_is_quiet_and_gives_the_same_file_again(pieces, tmp_path, capfd):
    train_tokenizer((text for text in CAPTIONS), tmp_path / "a.model", 50)
    assert (tmp_path / "a.model").read_bytes() == pieces.read_bytes()
    assert capfd.readouterr() == ("", "")
    train_tokenizer(CAPTIONS[1:], tmp_path / "a.model", 50)
    assert (tmp_path / "a.model").read_bytes() != pieces.read_bytes()


@pytest.mark.parametrize("caption", ["quiz " * 860, "quiz" * 2000, "quiz▅quiz", "éé quiz " * 500])
def test_no_caption_is_left_out(caption, tmp_path):
    train_tokenizer([*CAPTIONS, caption, caption], tmp_path / "a.model", 50)
    ids = Tokenizer(tmp_path / "a.model")(["quiz"])
    assert (ids != 2).all()


def test_long_captions_are_cut_at_spaces(tmp_path):
    train_tokenizer([*CAPTIONS, *["quiz " * 500] * 2], tmp_path / "short.model", 50)
    train_tokenizer([*CAPTIONS, "quiz " * 1000], tmp_path / "long.model", 50)
    short, long = (Tokenizer(tmp_path / f"{name}.model", 8) for name in ("short", "long"))
    assert short([*CAPTIONS, "quiz"]).equal(long([*CAPTIONS, "quiz"]))
    assert (long(["quiz"]) != 1).sum() == 1


def test_training_replaces_the_file_whole(pieces, tmp_path, monkeypatch):
    path = tmp_path / "a.model"
    path.write_bytes(b"before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="disk"):
        train_tokenizer(CAPTIONS, path, 50)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [
        ("a.model", b"before")
    ]


def test_the_vocabulary_is_siglips_kind(pair):
    ours, theirs = pair
    assert ours.vocab_size == theirs.vocab_size == 50
    assert theirs.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    assert theirs.sp_model.bos_id() == -1
    assert theirs.sp_model.pad_id() == 0
    # every character of the captions has a piece, and words are in one piece or few
    ids = ours([*CAPTIONS, "à ñ"])
    assert (ids[:-1] != 2).all()
    assert (ids[-1] == 2).any()
    assert (ours(["a picture of a cat"]) != 1).sum() <= 6


@pytest.mark.parametrize("size", [5, 10_000])
def test_a_vocabulary_too_small_or_too_large_for_the_captions(size, tmp_path):
    with pytest.raises(ValueError, match=f"vocab_size={size} does not fit the captions: "):
        train_tokenizer(CAPTIONS, tmp_path / "a.model", size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("captions", "size", "error", "said"),
    [
        ([], 80, ValueError, "captions hold no text"),
        (["", "?!"], 80, ValueError, "captions hold no text"),
        ("a cat", 80, TypeError, "captions must be a list of strings, not 'a cat'"),
        (["a cat", 3], 80, TypeError, "captions must be a list of strings"),
        (CAPTIONS, 3, ValueError, "vocab_size=3 must be at least 4"),
        (CAPTIONS, 80.0, TypeError, "vocab_size=80.0 must be an int"),
    ],
)
def test_wrong_captions_or_size(captions, size, error, said, tmp_path):
    with pytest.raises(error, match=re.escape(said)):
        train_tokenizer(captions, tmp_path / "a.model", size)
