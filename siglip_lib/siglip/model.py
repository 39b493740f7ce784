"""SigLIP: an image tower and a text tower in one space, and its folder on disk, which transformers reads too."""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_lib.base.checks import positive_int
from siglip_lib.siglip.text import TextTransformer, Tokenizer
from siglip_lib.tower.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class SigLIPConfig:
    """Sizes of both towers; the text tower's output is as wide as the image tower."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_hidden: int
    text_width: int
    text_layers: int
    text_heads: int
    text_mlp_hidden: int
    vocab_size: int
    context_length: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():  # NumPy's numbers can't be stored as JSON
            object.__setattr__(self, name, positive_int(name, value))
        for width, heads in (("width", "heads"), ("text_width", "text_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{width}={getattr(self, width)} must be a multiple of {heads}={getattr(self, heads)}"
                )


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
            img_size=config.image_size,
            patch_size=config.patch_size,
            num_classes=0,
            global_pool="map",
            embed_dim=config.width,
            depth=config.layers,
            num_heads=config.heads,
            mlp_ratio=_ratio(config.mlp_hidden, config.width),
            class_token=False,
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
            mlp_ratio=_ratio(config.text_mlp_hidden, config.text_width),
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


def _ratio(hidden: int, width: int) -> float:
    """The ``mlp_ratio`` that gives ``hidden`` channels: half a channel more, as it is rounded down."""
    return (hidden + 0.5) / width


def check_tokenizer(tokenizer: Tokenizer, config: SigLIPConfig) -> None:
    """Refuse a tokenizer whose texts the text tower could not read."""
    if tokenizer.context_length != config.context_length:
        raise ValueError(
            f"the tokenizer gives {tokenizer.context_length} tokens, the model takes {config.context_length}"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model embeddings for {config.vocab_size}"
        )
