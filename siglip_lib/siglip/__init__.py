"""SigLIP: image and text tower, its loss on one process and on many, its folder on disk, and the one that ships."""

from siglip_lib.siglip.folder import (
    EMOJI64_CAPTIONER,
    EMOJI64_SIGLIP,
    EMOJI64_VECTORS,
    EMOJI64_WEIGHTS,
    load_siglip,
    save_siglip,
)
from siglip_lib.siglip.gathered_loss import chunked_sigmoid_loss, gathered_sigmoid_loss
from siglip_lib.siglip.loss_block import sigmoid_loss_block
from siglip_lib.siglip.losses import sigmoid_loss, softmax_loss
from siglip_lib.siglip.model import SigLIP, SigLIPConfig, embed_pictures, embed_texts
from siglip_lib.siglip.picture_folder import PictureFolder, embed_folder
from siglip_lib.siglip.ring_loss import ring_sigmoid_loss
from siglip_lib.siglip.ring_softmax import ring_softmax_loss
from siglip_lib.siglip.text import TextTransformer, Tokenizer, train_tokenizer

__all__ = [
    "EMOJI64_CAPTIONER",
    "EMOJI64_SIGLIP",
    "EMOJI64_VECTORS",
    "EMOJI64_WEIGHTS",
    "PictureFolder",
    "SigLIP",
    "SigLIPConfig",
    "TextTransformer",
    "Tokenizer",
    "chunked_sigmoid_loss",
    "embed_folder",
    "embed_pictures",
    "embed_texts",
    "gathered_sigmoid_loss",
    "load_siglip",
    "ring_sigmoid_loss",
    "ring_softmax_loss",
    "save_siglip",
    "sigmoid_loss",
    "sigmoid_loss_block",
    "softmax_loss",
    "train_tokenizer",
]
