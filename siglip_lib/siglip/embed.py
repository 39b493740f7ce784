"""Unit vectors of pictures and texts, in batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from siglip_lib.data.augmentation import compose
from siglip_lib.siglip.model import SigLIP
from siglip_lib.siglip.text import Tokenizer


@torch.no_grad()
def embed_pictures(model: SigLIP, rgba: Tensor, batch_size: int = 512) -> Tensor:
    """Return unit vectors (B, width) of pictures (B, 4, H, W) uint8, on white."""
    device = model.logit_scale.device
    found = [model.encode_image(compose(part.to(device))) for part in rgba.split(batch_size)]
    return torch.cat(found)


@torch.no_grad()
def embed_texts(model: SigLIP, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Return unit vectors (M, width) of texts."""
    return model.encode_text(tokenizer(texts).to(model.logit_scale.device))
