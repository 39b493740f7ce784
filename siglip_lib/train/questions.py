"""Questions about scenes of emoji64, with their answers: what a captioner is trained on and tested with."""

import math
from collections.abc import Iterator, Sequence
from string import ascii_lowercase

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from siglip_lib.base.checks import check_tensor, positive_int
from siglip_lib.data.augmentation import DRAWS, augment, compose
from siglip_lib.data.emoji64 import Emoji64
from siglip_lib.siglip.text import Tokenizer

CELL = 64  # pixels along a side of the tower's input, and of a drawing
QUESTION = 17  # tokens of a question and of an answer, </s> included: the longest of both fit


def questions(grid: int) -> list[str]:
    """Return the question for each cell of a scene of ``grid`` by ``grid`` drawings, row by row.

    From three on a number tells the row and a letter the column, and there is no other word: both are learned sooner
    where nothing stands before them.

    Raises:
        ValueError: there are more columns than letters.
    """
    if positive_int("grid", grid) == 1:
        return ["what is this"]
    if grid == 2:
        return [
            f"what is {row} {column}" for row in ("top", "bottom") for column in ("left", "right")
        ]
    if grid > len(ascii_lowercase):
        raise ValueError(f"grid={grid} must be at most {len(ascii_lowercase)}, a letter a column")
    rows, columns = range(1, grid + 1), ascii_lowercase[:grid]
    return [f"{row}{column}" for row in rows for column in columns]


def cut_scenes(scenes: Tensor, tiles: int) -> tuple[Tensor, Tensor | None]:
    """Return scenes as thumbnails and as ``tiles`` by ``tiles`` tiles, as ``tile_picture`` does with one picture.

    Args:
        scenes: (B, 3, side, side).
        tiles: along a side; of one there is the thumbnail alone.

    Returns:
        (B, 3, CELL, CELL), and (B, tiles * tiles, 3, CELL, CELL) row by row, or None.
    """
    check_tensor("scenes", scenes, ("B", 3, "side", "side"))

    def resized(side: int) -> Tensor:
        if scenes.shape[2] == scenes.shape[3] == side:
            return scenes
        return F.interpolate(scenes, (side, side), mode="bilinear", antialias=True)

    if positive_int("tiles", tiles) == 1:
        return resized(CELL), None
    whole = resized(tiles * CELL).unflatten(2, (tiles, CELL)).unflatten(4, (tiles, CELL))
    return resized(CELL), whole.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def every_drawing(
    emoji: Emoji64,
    places: Tensor,
    tokenizer: Tokenizer,
    device: torch.device | str = "cpu",
    batch: int = 256,
) -> Iterator[dict[str, Tensor]]:
    """Give batches that ask once of each of the drawings at ``places``, on white, what it is."""
    (asked,) = tokenizer.prompts(questions(1))
    for some in places.split(batch):
        yield {
            "prompts": asked.expand(len(some), -1).to(device),
            "answers": tokenizer([emoji.names[i] for i in emoji.concept[some].tolist()]).to(device),
            "thumbnail": compose(emoji.pictures[some].to(device)),
        }


class Questions:
    """Scenes that are asked for each of their places, all of which follow from the seed and a number alone.

    So the tower reads a scene once for all of its questions, and between them only question and answer differ.

    Args:
        emoji: the drawings and their names.
        places: (n,) which of the drawings to show; each of their concepts is equally likely.
        tokenizer: of questions and answers, ``QUESTION`` tokens long.
        grids: drawings along a side of the scenes; each kind has its equal part of the questions.
        batch: questions; of each kind there are ``batch / len(grids) / grid ** 2`` scenes, a whole number.
        tiles: tiles along a side that each scene is cut into.
        strength: of the augmentation, see ``augment``; 0 for drawings as they are, on white.
        seed: of what is drawn.
        device: where scenes and tokens are needed.

    Raises:
        ValueError: the scenes are no whole number, or the tokenizer has another length.
    """

    def __init__(
        self,
        emoji: Emoji64,
        places: Tensor,
        tokenizer: Tokenizer,
        *,
        grids: Sequence[int],
        batch: int,
        tiles: int = 1,
        strength: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        whole = len(grids) * math.lcm(*(positive_int("grid", grid) ** 2 for grid in grids))
        if positive_int("batch", batch) % whole:
            raise ValueError(
                f"batch={batch} must be a multiple of {whole}: {len(grids)} kinds of scenes, of equally many questions"
            )
        if tokenizer.context_length != QUESTION:
            raise ValueError(
                f"the tokenizer gives {tokenizer.context_length} tokens, not {QUESTION}"
            )
        order = places[emoji.concept[places].argsort(stable=True)]  # concept by concept
        self._concept, self._number = emoji.concept[order].unique(return_counts=True)
        self._first = self._number.cumsum(0) - self._number
        self._pictures = emoji.pictures[order].to(device)
        self.grids, self.tiles, self._batch = tuple(grids), tiles, batch
        self._strength, self._seed, self._device = strength, seed, device
        self._asked = {grid: tokenizer.prompts(questions(grid)) for grid in self.grids}
        self.names = tokenizer(emoji.names)  # (concepts, QUESTION)

    def scenes(self, number: int) -> list[tuple[Tensor, Tensor]]:
        """Return for each kind its scenes (S, 3, side, side) in [-1, 1], and which concept stands where (S, cells)."""
        # torch's generator looks at 32 bits of a seed: two numbers can't be packed into it by hand
        seed = np.random.SeedSequence((self._seed, number)).generate_state(1).item()
        generator = torch.Generator().manual_seed(seed)
        return [self._scenes(grid, generator) for grid in self.grids]

    def __call__(self, number: int) -> dict[str, Tensor]:
        """Return what ``Captioner`` takes: prompts and answers (B, QUESTION), thumbnail, about, and tiles if any."""
        kinds = self.scenes(number)
        prompts, answers, asked_for = [], [], []  # scene by scene, and of each scene cell by cell
        for grid, (_, concept) in zip(self.grids, kinds, strict=True):
            prompts.append(self._asked[grid].repeat(len(concept), 1))
            answers.append(self.names[concept.flatten()])
            asked_for += [grid**2] * len(concept)
        about = torch.arange(len(asked_for)).repeat_interleave(torch.tensor(asked_for))
        views = [cut_scenes(scenes, self.tiles) for scenes, _ in kinds]
        batch = {
            "prompts": self._sent(torch.cat(prompts)),
            "answers": self._sent(torch.cat(answers)),
            "thumbnail": torch.cat([thumbnail for thumbnail, _ in views]),
            "about": self._sent(about),
        }
        if self.tiles > 1:
            batch["tiles"] = torch.cat([tiles for _, tiles in views])
        return batch

    def _sent(self, x: Tensor) -> Tensor:
        """Return x on the device, without waiting for what that is still doing: the next scenes are drawn meanwhile."""
        return x.to(self._device, non_blocking=True)

    def _scenes(self, grid: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw scenes as sharp as the tiles need them."""
        shape = self._batch // len(self.grids) // grid**2, grid**2
        row = torch.randint(len(self._concept), shape, generator=generator)
        chance = torch.rand(shape, generator=generator, dtype=torch.float64)
        which = self._first[row] + (chance * self._number[row]).long()
        rgba = self._pictures[self._sent(which.flatten())]  # (S * cells, 4, 64, 64)
        if self._strength:
            draws = self._sent(torch.rand(len(rgba), DRAWS, generator=generator))
            cells = augment(rgba, draws, self._strength)
        else:
            cells = compose(rgba)
        side = max(1, CELL * self.tiles // grid)
        if side != CELL:
            cells = F.interpolate(cells, (side, side), mode="bilinear", antialias=True)
        scenes = cells.unflatten(0, (-1, grid, grid)).permute(0, 3, 1, 4, 2, 5)
        return scenes.reshape(shape[0], 3, grid * side, grid * side), self._concept[row]
