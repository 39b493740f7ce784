"""Tokens of a tower to what a language model reads: four to one, then in rows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_lib.base.checks import check_tensor, pair, plain_shape, positive_int

Grid = tuple[int, int]  # rows and columns


class Adaptor(nn.Module):
    """Two by two neighbouring tokens to one, and their channels to a language model's.

    A grid with an odd number of rows or columns is filled up with zeros, at the bottom or the right.

    Args:
        width: channels D of the tower's tokens.
        n_embed: channels E of the language model's.

    Shapes: x (B, rows * columns, D) and grid (rows, columns) to (B, ceil(rows / 2) * ceil(columns / 2), E).

    Source: Wu et al., DeepSeek-VL2 (2024), section 2 (vision-language adaptor), and its code (downsample_mlp_gelu); the
    parameters have its names.
    """

    def __init__(self, width: int, n_embed: int) -> None:
        super().__init__()
        self.width = positive_int("width", width)
        n_embed = positive_int("n_embed", n_embed)
        layers = nn.Linear(4 * width, n_embed), nn.GELU(), nn.Linear(n_embed, n_embed)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        rows, columns = pair("grid", grid)
        check_tensor("x", x, ("B", rows * columns, self.width))
        x = x.transpose(1, 2).unflatten(2, (rows, columns))  # (B, D, rows, columns)
        x = F.pad(x, (0, columns % 2, 0, rows % 2))
        # of four neighbours channel after channel, and of each channel row after row
        x = F.unfold(x, kernel_size=2, stride=2).transpose(1, 2)  # (B, n, 4 * D)
        return self.layers(x)


def lay_out(
    thumbnail: Tensor, tiles: Tensor | None, grid: Grid, newline: Tensor, separator: Tensor
) -> Tensor:
    """Put the tokens of a thumbnail and of its picture's tiles into one sequence.

    First the thumbnail, row by row, each row closed by ``newline``; then ``separator``; then the tiles as the one
    picture that they are, each of its rows running through all tiles beside each other and closed by ``newline``.

    Args:
        thumbnail: (B, rows, columns, E).
        tiles: (B, tiles, rows, columns, E), tiles row by row; None for the thumbnail alone, without a separator.
        grid: rows and columns of tiles; of None not looked at.
        newline: (E,), after each row.
        separator: (E,), between the views.

    Returns:
        (B, N, E), with N = rows * (columns + 1), and of m by n tiles 1 + m * rows * (n * columns + 1) more.

    Source: Wu et al., DeepSeek-VL2 (2024), section 2, and its code (tile_tag "2D", global view first).
    """
    batch, *side, channels = check_tensor("thumbnail", thumbnail, ("B", "rows", "columns", "E"))
    check_tensor("newline", newline, (channels,))
    check_tensor("separator", separator, (channels,))
    parts = [_rows_closed(thumbnail, newline)]
    if tiles is not None:
        down, across = pair("grid", grid)
        check_tensor("tiles", tiles, (batch, down * across, *side, channels))
        whole = tiles.unflatten(1, (down, across)).transpose(2, 3)  # (B, down, rows, across, ...)
        whole = whole.flatten(3, 4).flatten(1, 2)  # (B, down * rows, across * columns, E)
        parts += [separator.expand(batch, 1, channels), _rows_closed(whole, newline)]
    return torch.cat(parts, dim=1)


def _rows_closed(tokens: Tensor, newline: Tensor) -> Tensor:
    """Return (B, rows, columns, E) as (B, rows * (columns + 1), E)."""
    ends = newline.expand(*plain_shape(tokens)[:2], 1, -1)
    return torch.cat((tokens, ends), dim=2).flatten(1, 2)
