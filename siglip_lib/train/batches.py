"""What a training looks at in each step: pictures, captions and random numbers."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from siglip_lib.data.augmentation import DRAWS
from siglip_lib.data.emoji64 import Emoji64, captions, unique_batches
from siglip_lib.siglip.text import Tokenizer
from siglip_lib.train.recipe import TrainConfig


class Batches:
    """The batches of a training, each of which follows from the seed and the step's number alone.

    Args:
        emoji: the pictures and names.
        places: (n,) which of the pictures to train on.
        tokenizer: of the captions.
        config: how to train.
        device: where the batches are needed.
        unique: whether no batch shows a concept twice where there are enough of them, else pictures are drawn blindly.

    Attributes:
        block: steps whose random numbers are drawn at once, and whose losses are read together.
        pictures: (n, 4, 64, 64) uint8, those to train on.
        tokens: (captions, N) int64, of all captions, concept after concept.
        unique: whether no batch shows a concept twice.

    Raises:
        ValueError: there are fewer pictures than a batch needs.
    """

    block = 50

    def __init__(
        self,
        emoji: Emoji64,
        places: Tensor,
        tokenizer: Tokenizer,
        config: TrainConfig,
        device: torch.device,
        unique: bool = True,
    ) -> None:
        if config.batch > len(places):
            raise ValueError(
                f"batch={config.batch} must be at most {len(places)}, each picture once"
            )
        self._config, self._device = config, device
        self._concept = emoji.concept[places]
        self.unique = unique and config.batch <= len(self._concept.unique())
        self.pictures = emoji.pictures[places].to(device)
        table = [
            captions(name, words if config.keywords else [])
            for name, words in zip(emoji.names, emoji.keywords, strict=True)
        ]
        self.tokens = tokenizer([caption for concept in table for caption in concept]).to(device)
        self._captions = torch.tensor([len(concept) for concept in table])
        self._first_caption = self._captions.cumsum(0) - self._captions
        self.of_block = lru_cache(maxsize=2)(self._draw)  # this one, and the next in advance

    def of_step(self, step: int) -> dict[str, Tensor]:
        """Return the row of ``step`` in what was drawn for its block."""
        drawn = self.of_block(step // self.block)
        return {name: tensor[step % self.block] for name, tensor in drawn.items()}

    def _draw(self, block: int) -> dict[str, Tensor]:
        """Draw a block of steps: (steps, batch) int64 and, for the augmentation, (steps, batch, DRAWS) float32."""
        batch = self._config.batch
        # torch's generator looks at 32 bits of a seed: two numbers can't be packed into it by hand
        seed = np.random.SeedSequence((self._config.seed, block)).generate_state(1).item()
        generator = torch.Generator().manual_seed(seed)
        shape = (self.block, batch)
        if self.unique:
            which = unique_batches(self._concept, batch, generator, self.block)
        else:
            order = torch.rand(self.block, len(self._concept), generator=generator)
            which = order.argsort(dim=1, stable=True)[:, :batch]
        concept = self._concept[which]
        chance = torch.rand(shape, generator=generator, dtype=torch.float64)
        text = self._first_caption[concept] + (chance * self._captions[concept]).long()
        draws = torch.rand(*shape, DRAWS, generator=generator)
        drawn = {"which": which, "text": text, "concept": concept, "draws": draws}
        return {name: tensor.to(self._device) for name, tensor in drawn.items()}
