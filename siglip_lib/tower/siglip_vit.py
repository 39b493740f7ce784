"""SigLIP's image towers by name."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from siglip_lib.base.checks import one_of, positive_int
from siglip_lib.tower.checkpoints import load_weights
from siglip_lib.tower.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class SigLIPVisionConfig:
    """Sizes of an image tower, each an int of at least 1; ``width`` is a multiple of ``heads``.

    ``mlp_hidden`` is the number of hidden channels of each MLP.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_hidden: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():  # NumPy's numbers can't be stored as JSON
            object.__setattr__(self, name, positive_int(name, value))
        self._check_heads("width", "heads")

    def _check_heads(self, width: str, heads: str) -> None:
        sizes = asdict(self)
        if sizes[width] % sizes[heads]:
            raise ValueError(f"{width}={sizes[width]} must be a multiple of {heads}={sizes[heads]}")

    def tower_arguments(self) -> dict[str, object]:
        """Return what ``VisionTransformer`` is built with: no class token, pooled by attention, no classifier."""
        return dict(
            img_size=self.image_size,
            patch_size=self.patch_size,
            embed_dim=self.width,
            depth=self.layers,
            num_heads=self.heads,
            mlp_ratio=mlp_ratio(self.mlp_hidden, self.width),
            class_token=False,
            global_pool="map",
            num_classes=0,
        )


def mlp_ratio(hidden: int, width: int) -> float:
    """Return an ``mlp_ratio`` that gives ``hidden`` channels, rounded down; of SO400M's sizes it is timm's 3.7362."""
    return (hidden + 0.1024) / width


# The towers that Google published, each as google/siglip-... with its sizes. The base tower at 256 pixels also has
# multilingual weights (-multilingual), and SO400M with patches of 16 has only such (-i18n). Zhai et al., Sigmoid Loss
# for Language Image Pre-Training (2023), section 4; SO400M's shape: Alabdulmohsin et al., Getting ViT in Shape (2023).
SIGLIP_CONFIGS = {
    "siglip_base_patch16_224": SigLIPVisionConfig(224, 16, 768, 12, 12, 3072),
    "siglip_base_patch16_256": SigLIPVisionConfig(256, 16, 768, 12, 12, 3072),
    "siglip_base_patch16_384": SigLIPVisionConfig(384, 16, 768, 12, 12, 3072),
    "siglip_base_patch16_512": SigLIPVisionConfig(512, 16, 768, 12, 12, 3072),
    "siglip_large_patch16_256": SigLIPVisionConfig(256, 16, 1024, 24, 16, 4096),
    "siglip_large_patch16_384": SigLIPVisionConfig(384, 16, 1024, 24, 16, 4096),
    "siglip_so400m_patch14_224": SigLIPVisionConfig(224, 14, 1152, 27, 16, 4304),
    "siglip_so400m_patch14_384": SigLIPVisionConfig(384, 14, 1152, 27, 16, 4304),
    "siglip_so400m_patch16_256": SigLIPVisionConfig(256, 16, 1152, 27, 16, 4304),
}


def create_siglip_vit(
    model_name: str = "siglip_so400m_patch14_384",
    image_size: int | tuple[int, int] | None = None,
    select_layer: int = -1,
    ckpt_path: str | Path = "",
    **kwargs: object,
) -> VisionTransformer:
    """Build one of SigLIP's image towers: no class token, pooled by attention, no classifier.

    Args:
        model_name: one of ``SIGLIP_CONFIGS``.
        image_size: height and width in pixels; the config's own if None.
        select_layer: how many blocks to keep: a number from 1 on, or a negative one, -1 for all, -2 without the last.
        ckpt_path: weights of the whole tower, whatever ``select_layer`` keeps: a file, a folder or
            ``hf-hub:owner/name``, see ``load_weights``; random ones if empty.
        **kwargs: further arguments of ``VisionTransformer``, such as ``ignore_head=True`` for the tokens that
            DeepSeek-VL2 takes.

    Raises:
        ValueError: the name is unknown or ``select_layer`` is out of range; see also ``load_weights``.
        TypeError: an argument that ``VisionTransformer`` does not have.
    """
    config = SIGLIP_CONFIGS[one_of("model_name", model_name, SIGLIP_CONFIGS)]
    arguments = config.tower_arguments()
    if image_size is not None:
        arguments["img_size"] = image_size
    arguments |= kwargs
    depth = arguments["depth"]
    if type(select_layer) is not int or not 1 <= abs(select_layer) <= depth:
        raise ValueError(
            f"select_layer={select_layer}; allowed are 1 to {depth} and -{depth} to -1"
        )
    # weights that will be overwritten need not be drawn
    with torch.device("meta") if ckpt_path else nullcontext():
        model = VisionTransformer(**arguments)
    if ckpt_path:
        load_weights(model.to_empty(device=torch.get_default_device()), ckpt_path)
    keep = select_layer if select_layer > 0 else depth + select_layer + 1
    model.blocks = model.blocks[:keep]
    return model
