"""The image tower of SigLIP, one component at a time: the library that the notebooks build and test."""

from siglip_lib.attention import Attention, AttentionMaps, attention_maps
from siglip_lib.backends import BackendStatus, attend, attention_backends, choose_backend
from siglip_lib.block import Block
from siglip_lib.exercises import check_exercise
from siglip_lib.layers import DropPath, LayerScale, Mlp
from siglip_lib.measure import Timing, device_report, measure, package_version, pick_device
from siglip_lib.oracles import import_timm
from siglip_lib.plots import COLOURS, figure, picture, plot_histogram, show, show_attention
from siglip_lib.trunc_normal import trunc_normal_
from siglip_lib.weight_init import init_weights_vit_timm, named_apply

__version__ = "0.1.0"
__all__ = [
    "COLOURS",
    "Attention",
    "AttentionMaps",
    "BackendStatus",
    "Block",
    "DropPath",
    "LayerScale",
    "Mlp",
    "Timing",
    "attend",
    "attention_backends",
    "attention_maps",
    "check_exercise",
    "choose_backend",
    "device_report",
    "figure",
    "import_timm",
    "init_weights_vit_timm",
    "measure",
    "named_apply",
    "package_version",
    "pick_device",
    "picture",
    "plot_histogram",
    "show",
    "show_attention",
    "trunc_normal_",
]
