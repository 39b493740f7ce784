"""The image tower of SigLIP, one component at a time: the library that the notebooks build and test."""

from siglip_lib.attention import Attention, AttentionMaps, attention_maps
from siglip_lib.attention_pool import AttentionPoolLatent
from siglip_lib.backends import BackendStatus, attend, attention_backends, choose_backend
from siglip_lib.block import Block
from siglip_lib.checkpoints import LoadedWeights, load_weights, save_weights
from siglip_lib.exercises import check_exercise
from siglip_lib.layers import DropPath, LayerScale, Mlp
from siglip_lib.measure import (
    Timing,
    device_report,
    kernel_times,
    measure,
    package_version,
    pick_device,
)
from siglip_lib.oracles import import_timm, import_transformers
from siglip_lib.patches import PatchDropout, PatchEmbed, resample_abs_pos_embed
from siglip_lib.plots import COLOURS, figure, picture, plot_histogram, show, show_attention
from siglip_lib.preprocess import preprocess
from siglip_lib.siglip_vit import SIGLIP_CONFIGS, SigLIPVisionConfig, create_siglip_vit
from siglip_lib.trunc_normal import trunc_normal_
from siglip_lib.vision_transformer import VisionTransformer
from siglip_lib.weight_init import init_weights_vit_timm, named_apply

__version__ = "0.1.0"
__all__ = [
    "COLOURS",
    "SIGLIP_CONFIGS",
    "Attention",
    "AttentionMaps",
    "AttentionPoolLatent",
    "BackendStatus",
    "Block",
    "DropPath",
    "LayerScale",
    "LoadedWeights",
    "Mlp",
    "PatchDropout",
    "PatchEmbed",
    "SigLIPVisionConfig",
    "Timing",
    "VisionTransformer",
    "attend",
    "attention_backends",
    "attention_maps",
    "check_exercise",
    "choose_backend",
    "create_siglip_vit",
    "device_report",
    "figure",
    "import_timm",
    "import_transformers",
    "init_weights_vit_timm",
    "kernel_times",
    "load_weights",
    "measure",
    "named_apply",
    "package_version",
    "pick_device",
    "picture",
    "plot_histogram",
    "preprocess",
    "resample_abs_pos_embed",
    "save_weights",
    "show",
    "show_attention",
    "trunc_normal_",
]
