"""SigLIP's image towers by name."""

from dataclasses import dataclass
from pathlib import Path

import torch

from siglip_lib.tower.checkpoints import load_weights
from siglip_lib.tower.vision_transformer import VisionTransformer


@dataclass(frozen=True)
class SigLIPVisionConfig:
    """Sizes of an image tower; ``mlp_ratio`` times ``width``, rounded down, is the MLP's hidden width."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float


# Zhai et al., Sigmoid Loss for Language Image Pre-Training (2023), section 4; SO400M's shape: Alabdulmohsin et al.,
# Getting ViT in Shape (2023).
SIGLIP_CONFIGS = {
    "siglip_base_patch16_224": SigLIPVisionConfig(224, 16, 768, 12, 12, 4.0),
    "siglip_base_patch16_384": SigLIPVisionConfig(384, 16, 768, 12, 12, 4.0),
    "siglip_large_patch16_224": SigLIPVisionConfig(224, 16, 1024, 24, 16, 4.0),
    "siglip_large_patch16_384": SigLIPVisionConfig(384, 16, 1024, 24, 16, 4.0),
    "siglip_so400m_patch14_224": SigLIPVisionConfig(224, 14, 1152, 27, 16, 3.7362),
    "siglip_so400m_patch14_384": SigLIPVisionConfig(384, 14, 1152, 27, 16, 3.7362),
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
    if model_name not in SIGLIP_CONFIGS:
        raise ValueError(
            f"model_name={model_name!r} is unknown; allowed are {', '.join(SIGLIP_CONFIGS)}"
        )
    config = SIGLIP_CONFIGS[model_name]
    arguments: dict[str, object] = dict(
        img_size=config.image_size if image_size is None else image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        class_token=False,
        global_pool="map",
        num_classes=0,
    )
    arguments |= kwargs
    depth = arguments["depth"]
    if type(select_layer) is not int or not 1 <= abs(select_layer) <= depth:
        raise ValueError(
            f"select_layer={select_layer}; allowed are 1 to {depth} and -{depth} to -1"
        )
    if ckpt_path:
        # weights that will be overwritten need not be drawn
        with torch.device("meta"):
            model = VisionTransformer(**arguments)
        load_weights(model.to_empty(device=torch.get_default_device()), ckpt_path)
    else:
        model = VisionTransformer(**arguments)
    keep = select_layer if select_layer > 0 else depth + select_layer + 1
    model.blocks = model.blocks[:keep]
    return model
