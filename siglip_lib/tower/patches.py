"""From pixels to tokens: patch embedding, position embeddings of another size, dropping patches."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_lib.base.checks import check_tensor, pair, plain_shape, positive_int, probability
from siglip_lib.base.observers import is_plain


class PatchEmbed(nn.Module):
    """Cut pictures into patches that do not overlap and project each to a token.

    A convolution whose stride is its kernel's size is a matrix product with the patches as rows, and runs as one. If
    ``proj`` becomes another layer, or somebody sets a hook on it, it is called instead. Where a side is no multiple of
    the patch, the pixels right and below the last whole patch are left out: 6 of 384 with patches of 14.

    Args:
        img_size: height and width of the pictures in pixels, or one number for both.
        patch_size: height and width of a patch.
        in_chans: colour channels C of a picture.
        embed_dim: channels D of a token.
        norm_layer: class of a norm on the tokens; none if None.
        bias: whether the projection has a bias.
        strict_img_size: raise an error for any size but ``img_size``; else every multiple of the patch is taken too.
        dynamic_img_pad: fill up with zeros, on the right and below, to whole patches.

    Shapes: pictures (B, C, H, W) to tokens (B, N, D), N = rows * columns of the grid, row by row.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (2021), section 3.1; parameter names are timm's.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        bias: bool = True,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = pair("patch_size", patch_size)
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.set_input_size(img_size)
        in_chans = positive_int("in_chans", in_chans)
        embed_dim = positive_int("embed_dim", embed_dim)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take pictures of another ``img_size``, height and width or one number for both."""
        size = pair("img_size", img_size)
        # of sizes that vary, this is the grid of the position embeddings: whole patches, as timm counts
        pad = self.dynamic_img_pad and self.strict_img_size
        grid = _grid(size, self.patch_size, pad)
        if 0 in grid:
            patch = self.patch_size[0] if len({*self.patch_size}) == 1 else self.patch_size
            raise ValueError(f"img_size={img_size!r} holds no patch of {patch} pixels")
        self.img_size, self.grid_size, self.num_patches = size, grid, grid[0] * grid[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the grid of patches for pictures of ``img_size`` (height, width)."""
        return _grid(img_size, self.patch_size, self.dynamic_img_pad)

    def forward(self, x: Tensor) -> Tensor:
        size = self._checked_size(x)
        rows, columns = self.dynamic_feat_size(size)
        height, width = self.patch_size
        if self.dynamic_img_pad:
            x = F.pad(x, (0, columns * width - size[1], 0, rows * height - size[0]))
        if not self._is_product():
            return self.norm(self.proj(x).flatten(2).mT)  # (B, N, D)
        x = x[:, :, : rows * height, : columns * width]
        x = x.unflatten(3, (columns, width))  # (B, C, H, cols, p)
        x = x.unflatten(2, (rows, height))  # (B, C, rows, p, cols, p)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C * p * p)
        return self.norm(F.linear(x, self.proj.weight.flatten(1), self.proj.bias))  # (B, N, D)

    def _is_product(self) -> bool:
        """Whether the projection is nothing but the product: the convolution that was built, which nobody watches."""
        proj = self.proj
        return (
            is_plain(proj, nn.Conv2d)
            and proj.kernel_size == proj.stride == self.patch_size
            and (proj.padding, proj.dilation, proj.groups) == ((0, 0), (1, 1), 1)
        )

    def _checked_size(self, x: Tensor) -> tuple[int, int]:
        """Return height and width of pictures; raise an error for what can't be cut into patches."""
        # a wrapper may not show how many there are
        channels = getattr(self.proj, "in_channels", None) or "C"
        hint = "preprocess makes such of pictures"
        shape = check_tensor("pictures", x, ("B", channels, "H", "W"), hint=hint)
        size = height, width = shape[2:]
        if size == self.img_size:
            return size
        found = f"pictures are {height} x {width} pixels"
        if self.strict_img_size:
            built = "the model is built for {} x {}".format(*self.img_size)
            raise ValueError(f"{found}, {built}; dynamic_img_size=True takes others")
        if not self.dynamic_img_pad and (height % self.patch_size[0] or width % self.patch_size[1]):
            wanted = "both must be multiples of the patch, {} x {}".format(*self.patch_size)
            raise ValueError(f"{found}; {wanted}; dynamic_img_pad=True fills up")
        if 0 in self.dynamic_feat_size(size):
            raise ValueError(f"{found}, which hold no patch")
        return size


def _grid(size: tuple[int, int], patch: tuple[int, int], pad: bool) -> tuple[int, int]:
    """Return rows and columns of the whole patches, or of those that begin within ``size`` if ``pad``."""
    return tuple((n + (p - 1) * pad) // p for n, p in zip(size, patch, strict=True))


def resample_abs_pos_embed(
    posemb: Tensor,
    new_size: tuple[int, int],
    old_size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """Interpolate learned position embeddings to another grid of patches.

    Args:
        posemb: (1, prefix + rows * columns, D), any float dtype; computed in float32.
        new_size: rows and columns of the new grid.
        old_size: those of the old grid; a square one if None.
        num_prefix_tokens: embeddings at the front that belong to no patch and are kept.
        interpolation: mode of ``torch.nn.functional.interpolate``.
        antialias: widen the filter when the grid shrinks, so that no embedding is skipped.

    Returns:
        (1, prefix + new rows * new columns, D), dtype of ``posemb``; ``posemb`` itself if the grids are equal.

    Raises:
        ValueError: the number of embeddings does not fit ``old_size``.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (2021), section 3.2 (fine-tuning at higher resolution).
    """
    shape = plain_shape(posemb)
    num_patches = shape[1] - num_prefix_tokens
    old_size = (round(num_patches**0.5),) * 2 if old_size is None else tuple(old_size)
    hint = f"{num_prefix_tokens} prefix tokens and a grid of {old_size[0]} x {old_size[1]}"
    wanted = num_prefix_tokens + old_size[0] * old_size[1]
    check_tensor("posemb", posemb, (1, wanted, "D"), hint=hint)
    if tuple(new_size) == old_size:
        return posemb
    prefix, grid = posemb[:, :num_prefix_tokens], posemb[:, num_prefix_tokens:]
    grid = grid.float().unflatten(1, old_size).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    grid = F.interpolate(grid, size=tuple(new_size), mode=interpolation, antialias=antialias)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(posemb.dtype)  # (1, new N, D)
    return torch.cat((prefix, grid), dim=1)


class PatchDropout(nn.Module):
    """Keep a random part of the patches of each picture while training, in random order.

    Args:
        prob: part of the patches that is dropped, in [0, 1); at least one patch stays.
        num_prefix_tokens: tokens at the front that always stay.

    Shapes: x (B, prefix + N, D) to (B, prefix + max(1, int(N * (1 - prob))), D).

    Source: Li et al., Scaling Language-Image Pre-training via Masking (2023), section 3.
    """

    def __init__(self, prob: float = 0.5, num_prefix_tokens: int = 1) -> None:
        super().__init__()
        self.prob = probability("prob", prob)
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.prob == 0.0:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        keep = max(1, int(patches.shape[1] * (1 - self.prob)))
        order = torch.rand(patches.shape[:2], device=x.device).argsort(dim=1)[:, :keep]  # (B, keep)
        patches = patches.gather(1, order[..., None].expand(-1, -1, x.shape[2]))  # (B, keep, D)
        return torch.cat((prefix, patches), dim=1)

    def extra_repr(self) -> str:
        return f"prob={self.prob}, num_prefix_tokens={self.num_prefix_tokens}"
