"""emoji64: pictures of 861 things, each drawn by up to seven designers, with names and keywords.

The data lie beside this file; ``CREDITS.md`` says who drew what, and under which licence.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from siglip_lib.base.checks import INTEGERS, check_tensor, count, one_of, positive_int

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = Path(__file__).parent
SIZE = 64
# the SHA-256 of the files: a picture or a name that changed would change every figure measured with it
DIGESTS = {
    "emoji64.npz": "d702027dbc9fa89898bd00e52f2cf9351bf7f2197d120b30ba5863b0af038e6a",
    "emoji64.json": "8d73313c10618faa6d6a970e31d47d23c179f70969845a5ad61885c6e9207076",
}

# The two's pictures of a concept differ by 5 % of the range in the median, those of any other two by 14 % or more.
SAME_DESIGN = ("fluent-emoji", "fluent-emoji-flat")

# the sentences that a name is put into in training
TEMPLATES = (
    "{}",
    "a picture of {}",
    "a picture of a {}",
    "a drawing of {}",
    "a small picture of the {}",
    "an emoji of {}",
    "the {} emoji",
    "an icon of {}",
    "this is {}",
)
# the name stands first; without it a caption would be true of other concepts, too
KEYWORD_TEMPLATES = ("{}, {}", "a picture of {}, {}", "an emoji of {}, {}")


@dataclass(frozen=True, eq=False)
class Emoji64:
    """Pictures and what they show; a picture's ``concept`` and ``vendor`` are places in the lists."""

    pictures: Tensor  # (N, 4, 64, 64) uint8, RGBA; colour is not multiplied by alpha, and 0 where alpha is 0
    concept: Tensor  # (N,) int64
    vendor: Tensor  # (N,) int64
    names: list[str]  # by concept, all different
    groups: list[str]  # by concept
    keywords: list[list[str]]  # by concept
    symbols: list[str]  # by concept: the emoji itself, a string
    vendors: list[str]  # the designers

    def picture(
        self, index: int, size: int = SIZE, background: tuple[int, int, int] = (255, 255, 255)
    ) -> Image:
        """Return picture ``index``, RGB, ``size`` by ``size`` pixels, on a background of three numbers in 0..255.

        Raises:
            TypeError: index or size is no int.
            ValueError: index, size or background is out of range.
        """
        from PIL import Image

        index, size = count("index", index), positive_int("size", size)
        if index >= len(self.pictures):
            raise ValueError(f"index={index} must be below {len(self.pictures)}")
        if len(background) != 3 or not all(0 <= value <= 255 for value in background):
            raise ValueError(f"background={background!r} must be three numbers in 0..255")
        drawn = Image.fromarray(self.pictures[index].permute(1, 2, 0).numpy())
        if size != SIZE:
            drawn = drawn.resize((size, size), Image.Resampling.BICUBIC)
        ground = Image.new("RGBA", drawn.size, (*background, 255))
        return Image.alpha_composite(ground, drawn).convert("RGB")


@dataclass(frozen=True, eq=False)
class Split:
    """Three sets of pictures that share none: ascending places in ``Emoji64.pictures``, int64."""

    train: Tensor  # other designers, concepts to train on
    seen: Tensor  # held-out designers, concepts that ``train`` has
    unseen: Tensor  # held-out designers, concepts that no picture of ``train`` shows


def load_emoji64() -> Emoji64:
    """Read the pictures, their names and their keywords; 83 MB in memory.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not the one that was shipped.
    """
    for name, digest in DIGESTS.items():
        if not (FOLDER / name).is_file():
            raise FileNotFoundError(f"{FOLDER / name} is missing; install the package again")
        if hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{FOLDER / name} is damaged or changed; install the package again")
    with np.load(FOLDER / "emoji64.npz") as arrays:
        # each access decompresses the whole array, so once each
        images, concept, vendor = (arrays[key] for key in ("images", "concept", "vendor"))
    table = json.loads((FOLDER / "emoji64.json").read_text(encoding="utf-8"))
    entries = table["concepts"]
    return Emoji64(
        pictures=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        concept=torch.from_numpy(concept.astype(np.int64)),
        vendor=torch.from_numpy(vendor.astype(np.int64)),
        names=[entry["name"] for entry in entries],
        groups=[entry["group"] for entry in entries],
        keywords=[entry["keywords"] for entry in entries],
        symbols=[entry["emoji"] for entry in entries],
        vendors=table["vendors"],
    )


def split(
    emoji: Emoji64, vendors: Sequence[str] = ("twemoji",), unseen: int = 86, seed: int = 0
) -> Split:
    """Hold out designers and concepts.

    Unseen concepts are spread over the groups in proportion. Which ones depends on their names and the seed alone: the
    same on every machine and with every version. The other designers' pictures of them are in no set, nor is a
    held-out designer's picture of a concept that nobody else drew.

    Args:
        emoji: what ``load_emoji64`` returns.
        vendors: the designers to hold out. "fluent-emoji" and "fluent-emoji-flat" are the same designs, shaded and
            flat, so only both together. "noto" is the successor of "noto-v1" and redrew almost all: 3 % of the pictures
            that both have are as near as the two Fluent sets' are.
        unseen: how many concepts to hold out.
        seed: another seed, other unseen concepts.

    Raises:
        TypeError: vendors is a str, unseen or seed no int.
        ValueError: a designer is unknown or named twice, one of the Fluent sets comes without the other, or nothing is
            left to train on.
    """
    if isinstance(vendors, str):
        raise TypeError(f"vendors={vendors!r} must be a sequence of names, such as ({vendors!r},)")
    vendors = tuple(vendors)
    for name in vendors:
        one_of("vendors", name, emoji.vendors)
    if not 0 < len(vendors) < len(emoji.vendors) or len(set(vendors)) < len(vendors):
        raise ValueError(f"vendors={vendors!r} must be different names, at least one and not all")
    if len(set(SAME_DESIGN) & set(vendors)) == 1:
        raise ValueError(
            f"vendors={vendors!r} must name both of {' and '.join(SAME_DESIGN)} or neither: they are the same designs, "
            "so training on one would show the pictures of the other"
        )
    unseen, seed = count("unseen", unseen), count("seed", seed)
    if unseen >= len(emoji.names):
        raise ValueError(f"unseen={unseen} must be below {len(emoji.names)}, else none is left")

    held = torch.isin(emoji.vendor, torch.tensor([emoji.vendors.index(name) for name in vendors]))
    new = torch.isin(emoji.concept, _unseen_concepts(emoji, unseen, seed))
    train = ~held & ~new
    if not train.any():
        given = f"vendors={vendors!r} and unseen={unseen}"
        raise ValueError(f"{given} leave nothing to train on; hold out fewer of either")
    seen = held & torch.isin(emoji.concept, emoji.concept[train])
    return Split(*(mask.nonzero().squeeze(1) for mask in (train, seen, held & new)))


def captions(name: str, keywords: Sequence[str]) -> list[str]:
    """Return all captions of one concept: its name in each of ``TEMPLATES``, then followed by one or two keywords.

    The first ``len(TEMPLATES)`` are those without keywords. A keyword never stands alone: "animal" is true of a hundred
    concepts, and the loss takes all of a batch but one for its negatives. Keywords that add no word to the name, or
    come twice, are left out. The order is always the same.

    Raises:
        TypeError: keywords is a str.
    """
    if isinstance(keywords, str):
        raise TypeError(f"keywords={keywords!r} must be a sequence of keywords, not a str")
    told: dict[str, str] = {}  # "e-mail" and "email" are one
    for keyword in keywords:
        words = _words(keyword)
        if not set(words) <= set(_words(name)):
            told.setdefault("".join(words), keyword)
    added = [*told.values(), *map(", ".join, itertools.combinations(told.values(), 2))]
    plain = [template.format(name) for template in TEMPLATES]
    return plain + [
        template.format(name, words) for words in added for template in KEYWORD_TEMPLATES
    ]


def unique_batches(
    concept: Tensor, batch: int, generator: torch.Generator, steps: int | None = None
) -> Tensor:
    """Draw the batches of a training, none of which shows a concept twice.

    Two pictures of one concept in a batch would each be a wrong negative of the other's caption. Each batch draws its
    concepts without replacement, then one picture of each at random: all concepts are equally frequent, whatever their
    number of pictures.

    Args:
        concept: (n,) integers on the CPU, the concept of each picture to draw from.
        batch: pictures in a batch, at most the number of different concepts.
        generator: of the CPU. The same state, the same batches.
        steps: number of batches; None for as many as it takes to draw n pictures.

    Returns:
        (steps, batch) int64, places in ``concept``. For a part of the pictures, as in
        ``unique_batches(emoji.concept[train], ...)``, ``train[places]`` are the pictures.

    Raises:
        TypeError: concept holds no integers, or batch or steps is no int.
        ValueError: another shape or device, or a batch larger than the number of concepts.
    """
    check_tensor("concept", concept, ("n",), dtypes=INTEGERS)
    for name, given in (("concept", concept), ("generator", generator)):
        if given.device.type != "cpu":
            raise ValueError(f"{name} is on {given.device}; it must be on the CPU")
    order = concept.argsort(stable=True)  # pictures of one concept side by side
    sizes = concept.unique(return_counts=True)[1]
    batch = positive_int("batch", batch)
    if batch > len(sizes):
        raise ValueError(f"batch={batch} must be at most {len(sizes)}, the number of concepts")
    steps = math.ceil(len(concept) / batch) if steps is None else positive_int("steps", steps)

    # the places of the smallest of random numbers are a draw without replacement
    uniform = torch.rand(steps, len(sizes), generator=generator)
    chosen = uniform.argsort(dim=1, stable=True)[:, :batch]
    uniform = torch.rand(steps, batch, generator=generator, dtype=torch.float64)
    which = (uniform * sizes[chosen]).long()
    return order[(sizes.cumsum(0) - sizes)[chosen] + which]


def _unseen_concepts(emoji: Emoji64, number: int, seed: int) -> Tensor:
    """Return ``number`` concepts, each group's share of them in proportion to its size."""
    members = defaultdict(list)
    for concept, group in enumerate(emoji.groups):
        members[group].append(concept)
    exact = {group: number * len(found) / len(emoji.names) for group, found in members.items()}
    shares = {group: math.floor(share) for group, share in exact.items()}
    # what rounding down left over goes to the largest remainders
    by_remainder = sorted(exact, key=lambda group: (shares[group] - exact[group], group))
    for group in by_remainder[: number - sum(shares.values())]:
        shares[group] += 1

    def shuffled(concept: int) -> bytes:
        return hashlib.sha256(f"{seed} {emoji.names[concept]}".encode()).digest()

    drawn = [sorted(found, key=shuffled)[: shares[group]] for group, found in members.items()]
    return torch.tensor(sorted(itertools.chain(*drawn)), dtype=torch.int64)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
