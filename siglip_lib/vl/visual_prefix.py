"""All that a language model reads of a picture: tower, adaptor, and the vectors between rows and views."""

from pathlib import Path

import torch
from torch import Tensor, nn

from siglip_lib.base.checks import check_tensor, pair
from siglip_lib.storage.fitting import check_finite, check_fit, check_plain, fill
from siglip_lib.storage.names import tower_of, whole_state, without_wrappers
from siglip_lib.storage.reading import find_weights, read_weights
from siglip_lib.tower.vision_transformer import VisionTransformer
from siglip_lib.vl.adaptor import Adaptor, lay_out

_BESIDE = ("projector.", "image_newline", "view_seperator")  # of the tower, in a checkpoint


class VisualPrefix(nn.Module):
    """A picture as tokens that stand before a text.

    Every view goes through the tower on its own; its tokens after the last norm, not the pooled vector, through the
    adaptor; ``lay_out`` puts them in a row.

    Args:
        tower: takes pictures of one size; no class token.
        n_embed: channels E of the language model.

    Its parts have DeepSeek-VL2's names, and its spelling. ``image_newline`` and ``view_seperator`` are vectors (E,),
    normal with std E to the power -1/2 at the start.

    Shapes: thumbnail (B, 3, size, size), tiles (B, m * n, 3, size, size) or None, grid (m, n) to (B, N, E).

    Source: Wu et al., DeepSeek-VL2 (2024), section 2, and its code (DeepseekVLV2ForCausalLM).
    """

    def __init__(self, tower: VisionTransformer, n_embed: int) -> None:
        super().__init__()
        if tower.num_prefix_tokens:
            raise ValueError(f"tower has {tower.num_prefix_tokens} tokens that are no patches")
        self.vision = tower
        self.projector = Adaptor(tower.embed_dim, n_embed)
        self.image_newline = nn.Parameter(torch.randn(n_embed) * n_embed**-0.5)
        self.view_seperator = nn.Parameter(torch.randn(n_embed) * n_embed**-0.5)

    def forward(
        self, thumbnail: Tensor, tiles: Tensor | None = None, grid: tuple[int, int] = (1, 1)
    ) -> Tensor:
        size = self.vision.patch_embed.img_size
        batch = check_tensor("thumbnail", thumbnail, ("B", 3, *size), empty=False)[0]
        local = None
        if tiles is not None:
            down, across = pair("grid", grid)
            check_tensor("tiles", tiles, (batch, down * across, 3, *size))
            local = self.tokens_of(tiles.flatten(0, 1)).unflatten(0, (batch, down * across))
        vectors = self.image_newline, self.view_seperator
        return lay_out(self.tokens_of(thumbnail), local, grid, *vectors)

    def tokens_of(self, views: Tensor) -> Tensor:
        """Return the adaptor's tokens (B, rows, columns, E) of views (B, 3, size, size)."""
        rows, columns = self.vision.patch_embed.grid_size
        tokens = self.projector(self.vision.forward_features(views), (rows, columns))
        return tokens.unflatten(1, (-(-rows // 2), -(-columns // 2)))


def load_visual_prefix(prefix: VisualPrefix, source: str | Path) -> int:
    """Copy DeepSeek-VL2's weights of tower, adaptor and learned vectors into ``prefix``, all or none.

    Args:
        prefix: of the checkpoint's sizes.
        source: as for ``load_weights``: a file, a folder or ``hf-hub:owner/name``. The language model's tensors are
            left alone; of parts that an index names, those that hold none of these are not read.

    Returns:
        How many tensors of other parts were left alone.

    Raises:
        FileNotFoundError, PermissionError, OSError, ValueError: as ``load_weights``; nothing was changed.
    """
    state, where = read_weights(find_weights(str(source), beside=_BESIDE))
    tower, state = tower_of(state, where)[1], without_wrappers(state, where)
    found = {
        "vision." + name.removeprefix(tower) if name.startswith(tower) else name: tensor
        for name, tensor in state.items()
        if name.startswith((tower, *_BESIDE))
    }
    wanted = {name: [tensor] for name, tensor in whole_state(prefix).items()}
    check_plain(found, where)
    check_fit(found, wanted, f"{where} does not fit the model, which is unchanged")
    check_finite(found, wanted, where)
    fill(wanted, found)
    return len(state) - len(found)
