"""From the tower to a language model, as in DeepSeek-VL2: tiles, adaptor, layout, and a small model that reads them."""

from siglip_lib.vl.adaptor import Adaptor, lay_out
from siglip_lib.vl.language_model import LanguageModel, caption_loss
from siglip_lib.vl.tiles import Tiles, candidate_resolutions, choose_resolution, tile_picture
from siglip_lib.vl.visual_prefix import VisualPrefix, load_visual_prefix

__all__ = [
    "Adaptor",
    "LanguageModel",
    "Tiles",
    "VisualPrefix",
    "candidate_resolutions",
    "caption_loss",
    "choose_resolution",
    "lay_out",
    "load_visual_prefix",
    "tile_picture",
]
