"""What a training looks at in each step: pictures, captions and random numbers."""

import torch
from torch import Tensor

from siglip_lib.data.emoji64 import Emoji64, captions
from siglip_lib.siglip.text import Tokenizer

BLOCK = 50  # steps whose random numbers are drawn at once, and whose losses are looked at together


def caption_table(
    tokenizer: Tokenizer, emoji: Emoji64, keywords: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of all captions, concept after concept; by concept the place of the first, and how many."""
    texts = [
        captions(name, words if keywords else [])
        for name, words in zip(emoji.names, emoji.keywords, strict=True)
    ]
    counts = torch.tensor([len(found) for found in texts])
    tokens = tokenizer([caption for found in texts for caption in found])
    return tokens, counts.cumsum(0) - counts, counts
