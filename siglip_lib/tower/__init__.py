"""SigLIP's image tower, one component a module: what notebooks 01 to 08 build."""

from siglip_lib.tower.attention import Attention
from siglip_lib.tower.attention_pool import AttentionPoolLatent
from siglip_lib.tower.block import Block
from siglip_lib.tower.checkpoints import LoadedWeights, load_weights, save_weights
from siglip_lib.tower.layers import DropPath, LayerScale, Mlp
from siglip_lib.tower.patches import PatchDropout, PatchEmbed, resample_abs_pos_embed
from siglip_lib.tower.siglip_vit import SIGLIP_CONFIGS, SigLIPVisionConfig, create_siglip_vit
from siglip_lib.tower.trunc_normal import trunc_normal_
from siglip_lib.tower.vision_transformer import VisionTransformer
from siglip_lib.tower.weight_init import init_weights_vit_timm, named_apply

__all__ = [
    "SIGLIP_CONFIGS",
    "Attention",
    "AttentionPoolLatent",
    "Block",
    "DropPath",
    "LayerScale",
    "LoadedWeights",
    "Mlp",
    "PatchDropout",
    "PatchEmbed",
    "SigLIPVisionConfig",
    "VisionTransformer",
    "create_siglip_vit",
    "init_weights_vit_timm",
    "load_weights",
    "named_apply",
    "resample_abs_pos_embed",
    "save_weights",
    "trunc_normal_",
]
