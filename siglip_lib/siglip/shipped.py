"""The SigLIP that ships: its sizes, its weights, and its vectors of all pictures."""

from pathlib import Path

from siglip_lib.siglip.model import SigLIPConfig

# The sizes of the weights that ship, 2.0 million parameters; 1,500 pieces of words, 16 to a caption.
EMOJI64_SIGLIP = SigLIPConfig(
    image_size=64,
    patch_size=8,
    width=128,
    layers=6,
    heads=4,
    mlp_hidden=512,
    text_width=128,
    text_layers=2,
    text_heads=4,
    text_mlp_hidden=512,
    vocab_size=1500,
    context_length=16,
)


EMOJI64_WEIGHTS = Path(__file__).parent / "weights" / "emoji64"


# their unit vectors (5094, 128) of all pictures, "pictures" in a safetensors file, float16
EMOJI64_VECTORS = EMOJI64_WEIGHTS.with_name("emoji64_vectors.safetensors")
