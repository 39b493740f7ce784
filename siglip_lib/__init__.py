"""SigLIP, one component at a time: the library that the notebooks build and test."""

from siglip_lib.attention import Attention, AttentionMaps, attention_maps
from siglip_lib.attention_pool import AttentionPoolLatent
from siglip_lib.backends import (
    BackendStatus,
    attend,
    attend_packed,
    attention_backends,
    choose_backend,
)
from siglip_lib.block import Block
from siglip_lib.checkpoints import LoadedWeights, load_weights, save_weights
from siglip_lib.evaluate import Share, ranks, recall, zero_shot
from siglip_lib.exercises import check_exercise
from siglip_lib.explain import (
    gradient_attention,
    gradient_tokens,
    isolation,
    occlusion,
    pool_attention,
    rollout,
)
from siglip_lib.layers import DropPath, LayerScale, Mlp
from siglip_lib.losses import sigmoid_loss, softmax_loss
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
from siglip_lib.pointing import Scenes, chance, make_scenes, pointing
from siglip_lib.preprocess import preprocess
from siglip_lib.ring import ring_sigmoid_loss
from siglip_lib.siglip import SigLIP, SigLIPConfig, load_siglip, save_siglip
from siglip_lib.siglip_vit import SIGLIP_CONFIGS, SigLIPVisionConfig, create_siglip_vit
from siglip_lib.text import TextTransformer, Tokenizer, train_tokenizer
from siglip_lib.trunc_normal import trunc_normal_
from siglip_lib.vision_transformer import VisionTransformer
from siglip_lib.weight_init import init_weights_vit_timm, named_apply
from siglip_lib.widgets import attention_viewer, search_box

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
    "Scenes",
    "Share",
    "SigLIP",
    "SigLIPConfig",
    "SigLIPVisionConfig",
    "TextTransformer",
    "Timing",
    "Tokenizer",
    "VisionTransformer",
    "attend",
    "attend_packed",
    "attention_backends",
    "attention_maps",
    "attention_viewer",
    "chance",
    "check_exercise",
    "choose_backend",
    "create_siglip_vit",
    "device_report",
    "figure",
    "gradient_attention",
    "gradient_tokens",
    "import_timm",
    "import_transformers",
    "init_weights_vit_timm",
    "isolation",
    "kernel_times",
    "load_siglip",
    "load_weights",
    "make_scenes",
    "measure",
    "named_apply",
    "occlusion",
    "package_version",
    "pick_device",
    "picture",
    "plot_histogram",
    "pointing",
    "pool_attention",
    "preprocess",
    "ranks",
    "recall",
    "resample_abs_pos_embed",
    "ring_sigmoid_loss",
    "rollout",
    "save_siglip",
    "save_weights",
    "search_box",
    "show",
    "show_attention",
    "sigmoid_loss",
    "softmax_loss",
    "train_tokenizer",
    "trunc_normal_",
    "zero_shot",
]
