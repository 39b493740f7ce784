"""SigLIP's text tower, and the tokenizer that turns captions into its input."""

import io
import itertools
import string
import textwrap
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from siglip_lib.base.checks import INTEGERS, check_tensor, count, plain_shape, positive_int
from siglip_lib.storage.writing import replacing
from siglip_lib.tower.block import Block
from siglip_lib.tower.layers import GELU_TANH, LAYER_NORM
from siglip_lib.tower.weight_init import init_rule, lecun_normal_, named_apply, reset_parameters

PAD, EOS, UNKNOWN = 0, 1, 2  # as in SigLIP's vocabulary; the first is never used
# SentencePiece leaves out of a training, without a word, lines of more bytes and those with its sign for the unknown
_LONGEST_LINE, _UNKNOWN_SIGN = 4192, "▅"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize(text: str) -> str:
    """Lower the case, drop ASCII punctuation, and leave one space between words and none around them."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


class Tokenizer:
    """Captions to token ids, as SigLIP's: canonical text, SentencePiece, then ``</s>`` up to the end.

    ``</s>`` always comes last: what is too long is cut before it, and what is short is filled up with it.

    Args:
        path: a SentencePiece model, such as ``spiece.model`` of a SigLIP checkpoint.
        context_length: tokens N of each text.

    Shapes: a list of B texts to (B, N), int64, on the CPU.

    Raises:
        TypeError: the texts are no list of strings.
        ValueError: the file is no SentencePiece model, or its piece 1 does not end a text or its piece 2
            does not stand for the unknown, as in the tokenizer of SigLIP 2; a text holds half of a
            character (a lone surrogate).

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (2023), section 4, and its code (big_vision);
    Kudo and Richardson, SentencePiece (2018).
    """

    def __init__(self, path: str | Path, context_length: int = 64) -> None:
        from sentencepiece import SentencePieceProcessor

        self.context_length = positive_int("context_length", context_length)
        self.proto = Path(path).read_bytes()
        try:
            self._pieces = SentencePieceProcessor(model_proto=self.proto)
        except RuntimeError as error:
            raise ValueError(f"path={str(path)!r} is no SentencePiece model: {error}") from error
        if self._pieces.eos_id() != EOS:
            raise ValueError(
                f"path={str(path)!r} ends a text with piece {self._pieces.eos_id()}; SigLIP's is {EOS}"
            )
        if self._pieces.unk_id() != UNKNOWN:
            raise ValueError(
                f"path={str(path)!r} has piece {self._pieces.unk_id()} for what is unknown; SigLIP's is {UNKNOWN}. "
                "SigLIP 2's tokenizer, Gemma's, has 3 and fills texts up with another piece"
            )

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._pieces.get_piece_size()

    def __call__(self, texts: Iterable[str]) -> Tensor:
        texts = _strings("texts", texts)
        # rows of NumPy's take a list in a fraction of the time that torch's do
        tokens = np.full((len(texts), self.context_length), EOS, dtype=np.int64)
        for row, ids in zip(tokens, self._pieces.encode([*map(canonicalize, texts)]), strict=True):
            ids = ids[: self.context_length - 1]
            row[: len(ids)] = ids
        return torch.from_numpy(tokens)

    def prompts(self, texts: Iterable[str]) -> Tensor:
        """Return the token ids of texts that something is to follow, filled up with ``</s>`` in front, (B, N) int64.

        So what follows begins right after the last word, however long the text.
        """
        tokens = self(texts)
        rows = [row.roll(int((row == EOS).sum())) for row in tokens]
        return torch.stack(rows) if rows else tokens

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the texts of token ids (B, N): what ``canonicalize`` left of them.

        Each begins after the ``</s>`` in front, if there are any, and ends at the next.

        Raises:
            TypeError, ValueError: ids that are no integers, of another shape, or beyond the vocabulary.
        """
        check_tensor("tokens", tokens, ("B", "N"), dtypes=INTEGERS)
        beyond = (tokens < 0) | (tokens >= self.vocab_size)
        if beyond.any():
            raise ValueError(
                f"tokens holds {tokens[beyond][0]}; it must lie in 0 to {self.vocab_size - 1}"
            )
        begun = (itertools.dropwhile(lambda i: i == EOS, row) for row in tokens.tolist())
        rows = [[*itertools.takewhile(lambda i: i != EOS, row)] for row in begun]
        return [self._pieces.decode(row) for row in rows]


def train_tokenizer(captions: Iterable[str], path: str | Path, vocab_size: int) -> None:
    """Choose pieces of words that write the captions briefly, and store them as a SentencePiece model.

    The same captions in the same order give the same file.

    Args:
        captions: texts of any length; they are canonicalized as ``Tokenizer`` does, and "▅", which SentencePiece
            reserves, counts as a space.
        path: the file to write.
        vocab_size: number of pieces, with ``<pad>`` (id 0), ``</s>`` (1), ``<unk>`` (2) and every character of the
            captions among them.

    Raises:
        TypeError: the captions are no list of strings, or vocab_size is no int.
        ValueError: there are no captions, one holds half of a character (a lone surrogate), or that number of pieces is
            too small or too large for them.

    Source: Kudo, Subword Regularization (2018), section 3.2 (unigram language model).
    """
    from sentencepiece import SentencePieceTrainer

    vocab_size = count("vocab_size", vocab_size, least=4)
    texts = [text.replace(_UNKNOWN_SIGN, " ") for text in _strings("captions", captions)]
    lines = [line for text in texts for line in _lines(canonicalize(text))]
    if not lines:
        raise ValueError("captions hold no text")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            character_coverage=1.0,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNKNOWN,
            bos_id=-1,  # none
            num_threads=1,  # the order in which threads add up would change the last bits
            minloglevel=2,  # errors alone
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size={vocab_size} does not fit the captions: {error}") from error
    with replacing(path) as temporary:
        temporary.write_bytes(model.getvalue())


def _lines(text: str) -> list[str]:
    """The text in as many lines as SentencePiece needs; pieces end at spaces, so it is cut there where it can be."""
    if len(text.encode()) <= _LONGEST_LINE:
        return [text] if text else []
    # a character has at most 4 bytes
    return textwrap.wrap(text, _LONGEST_LINE // 4, break_on_hyphens=False)


def _strings(name: str, texts: Iterable[str]) -> list[str]:
    """The texts as a list; a single one would be taken for a list of its letters."""
    found = [texts] if isinstance(texts, str) else list(texts)
    if isinstance(texts, str) or not all(isinstance(text, str) for text in found):
        raise TypeError(f"{name} must be a list of strings, not {texts!r}")
    for place, text in enumerate(found):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}[{place}]={text!r} holds half of a character at {error.start}; "
                "text.encode(errors='replace').decode() puts ? in its place"
            ) from error
    return found


class TextTransformer(nn.Module):
    """SigLIP's text tower: every token attends to every other, and the last one stands for the text.

    There is no mask, so the ``</s>`` that fill a text up take part; the last of them is always at the same place.

    Args:
        vocab_size: number of tokens that have an embedding.
        context_length: tokens N of a text.
        width: channels D of a token.
        depth: number of blocks.
        num_heads: heads of each attention; divides ``width``.
        mlp_ratio: hidden channels of an MLP over D, rounded down.
        embed_dim: channels of the output.
        weight_init: rule by which the linear layers start, a name as for ``VisionTransformer``: ``big_vision`` for its
            code's own, ``jax`` for what timm made of that, by which the library's shipped weights started. Embeddings
            of tokens and positions are normal with std D to the power -1/2, as big_vision's.

    Shapes: token ids (B, N), int64 or int32, to (B, embed_dim).

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (2023), section 4, and its code (big_vision,
    models/proj/image_text/text_transformer.py).
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        embed_dim: int,
        *,
        weight_init: str = "jax",
    ) -> None:
        super().__init__()
        self.weight_init = weight_init
        context_length = positive_int("context_length", context_length)
        width = positive_int("width", width)
        self.token_embed = nn.Embedding(positive_int("vocab_size", vocab_size), width)
        self.pos_embed = nn.Parameter(torch.zeros(1, context_length, width))
        kind = dict(qkv_bias=True, act_layer=GELU_TANH, norm_layer=LAYER_NORM)
        depth = positive_int("depth", depth)
        self.blocks = nn.Sequential(
            *(Block(width, num_heads, mlp_ratio, **kind) for _ in range(depth))
        )
        self.norm = LAYER_NORM(width)
        self.head = nn.Linear(width, positive_int("embed_dim", embed_dim))
        self._apply_rule()

    def init_weights(self) -> None:
        """Draw all weights anew, as building the model does; see ``VisionTransformer.init_weights``."""
        reset_parameters(self)
        self._apply_rule()

    def _apply_rule(self) -> None:
        rule = init_rule(self.weight_init)
        std = self.pos_embed.shape[-1] ** -0.5
        nn.init.normal_(self.token_embed.weight, std=std)
        nn.init.normal_(self.pos_embed, std=std)
        named_apply(rule, self.blocks, "blocks")
        if self.weight_init == "big_vision":
            lecun_normal_(self.head)
        else:
            # without its name: by that a rule knows a classifier, which may start with zeros
            rule(self.head)

    def forward(self, tokens: Tensor) -> Tensor:
        length = plain_shape(self.pos_embed)[1]
        hint = "a Tokenizer makes such of texts"
        check_tensor("tokens", tokens, ("B", length), dtypes=INTEGERS, hint=hint)
        x = self.token_embed(tokens) + self.pos_embed  # (B, N, D)
        x = self.norm(self.blocks(x))  # (B, N, D)
        return self.head(x[:, -1])  # (B, embed_dim)
