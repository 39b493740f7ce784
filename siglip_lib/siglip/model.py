"""SigLIP: an image tower and a text tower in one space."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_lib.data.augmentation import compose
from siglip_lib.siglip.text import TextTransformer, Tokenizer
from siglip_lib.tower.siglip_vit import SigLIPVisionConfig, mlp_ratio
from siglip_lib.tower.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class SigLIPConfig(SigLIPVisionConfig):
    """Sizes of both towers, of the image tower first; the text tower's output is as wide as the image tower."""

    text_width: int
    text_layers: int
    text_heads: int
    text_mlp_hidden: int
    vocab_size: int
    context_length: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads("text_width", "text_heads")


class SigLIP(nn.Module):
    """Image tower and text tower, trained to give matching pictures and texts nearby unit vectors.

    Args:
        config: sizes of both towers.
        drop_path_rate: of the image tower, see ``VisionTransformer``.
        weight_init: rule by which both towers start, see there: ``jax``, what timm made of big_vision's, by which the
            library's shipped weights started, or ``big_vision`` for its code's own.

    Attributes:
        image: the image tower, pooled by attention. It takes pictures of other sizes too, in whole patches, and
            resamples its position embeddings to them.
        text: the text tower.
        logit_scale: logarithm t' of the inverse temperature, shape (), log 10 at the start.
        logit_bias: bias b of the logits, shape (), -10 at the start: most pairs don't match.

    The two rules differ: timm's draws q, k and v as one layer and positions with std .02; big_vision's own code draws
    q, k and v as layers apart, positions with std width to the power -1/2, and the pooling query uniformly with
    variance 2 / (1 + width).

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (2023), section 3.2.
    """

    def __init__(
        self, config: SigLIPConfig, *, drop_path_rate: float = 0.0, weight_init: str = "jax"
    ) -> None:
        super().__init__()
        self.config = config
        self.image = VisionTransformer(
            **config.tower_arguments(),
            dynamic_img_size=True,
            drop_path_rate=drop_path_rate,
            weight_init=weight_init,
        )
        self.text = TextTransformer(
            vocab_size=config.vocab_size,
            context_length=config.context_length,
            width=config.text_width,
            depth=config.text_layers,
            num_heads=config.text_heads,
            mlp_ratio=mlp_ratio(config.text_mlp_hidden, config.text_width),
            embed_dim=config.width,
            weight_init=weight_init,
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights anew, as the constructor does; after ``to_empty`` for the first time."""
        self.image.init_weights()
        self.text.init_weights()
        self.logit_scale.fill_(math.log(10))
        self.logit_bias.fill_(-10)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return unit vectors (B, width) of pictures (B, 3, H, W) with values in [-1, 1]."""
        return F.normalize(self.image(pixels), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return unit vectors (B, width) of token ids (B, context_length)."""
        return F.normalize(self.text(tokens), dim=-1)

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """Return (B, M): how well each picture's vector (B, width) fits each text's (M, width), before the sigmoid."""
        return self.logit_scale.exp() * image @ text.T + self.logit_bias


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


def check_tokenizer(tokenizer: Tokenizer, config: SigLIPConfig) -> None:
    """Raise ``ValueError`` for a tokenizer whose token ids the text tower could not read."""
    if tokenizer.context_length != config.context_length:
        raise ValueError(
            f"the tokenizer gives {tokenizer.context_length} tokens, the model takes {config.context_length}"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model embeddings for {config.vocab_size}"
        )
