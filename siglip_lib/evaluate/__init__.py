"""What a trained SigLIP can do, and where its image tower looks."""

from siglip_lib.evaluate.explain import (
    gradient_attention,
    gradient_tokens,
    isolation,
    occlusion,
    pool_attention,
    rollout,
)
from siglip_lib.evaluate.heads import activation_patching, mean_ablation, own_object_share
from siglip_lib.evaluate.maps import AttentionMaps, attention_maps
from siglip_lib.evaluate.pointing_game import Scenes, chance, make_scenes, mix_patches, pointing
from siglip_lib.evaluate.retrieval import Share, ranks, recall, zero_shot

__all__ = [
    "AttentionMaps",
    "Scenes",
    "Share",
    "activation_patching",
    "attention_maps",
    "chance",
    "gradient_attention",
    "gradient_tokens",
    "isolation",
    "make_scenes",
    "mean_ablation",
    "mix_patches",
    "occlusion",
    "own_object_share",
    "pointing",
    "pool_attention",
    "ranks",
    "recall",
    "rollout",
    "zero_shot",
]
