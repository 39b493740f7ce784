"""The transformer block: attention and MLP, each on a residual branch."""

import torch
from torch import Tensor, nn

from siglip_lib.base.checks import finite, positive_int
from siglip_lib.base.observers import is_plain, takes_kernel
from siglip_lib.tower.attention import Attention
from siglip_lib.tower.layers import DropPath, LayerScale, Mlp, passed

_LARGE = 2**22  # elements: below, Python takes longer to launch a kernel than the GPU to run it


class Block(nn.Module):
    """Pre-norm transformer block: ``x + drop_path1(ls1(attn(norm1(x))))``, then the same with the MLP.

    Args:
        dim: channels D.
        num_heads, qkv_bias, qk_norm, attn_drop, deterministic, backend: see ``Attention``.
        mlp_ratio: hidden channels of the MLP over D, rounded down to whole channels.
        proj_drop: dropout after the attention's projection and in the MLP, in [0, 1).
        init_values: start of both LayerScales; None for none.
        drop_path: probability in [0, 1) of dropping a branch for a sample.
        act_layer: activation of the MLP.
        norm_layer: class of both norms, and of those of q and k; called with a width alone.
        mlp_layer: class of the MLP.

    Shapes: x (B, N, D) to (B, N, D).

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (2021), section 3.1; parameter names are timm's.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        mlp_layer: type[nn.Module] = Mlp,
        deterministic: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        dim, mlp_ratio = positive_int("dim", dim), finite("mlp_ratio", mlp_ratio)

        def scale() -> nn.Module:
            return nn.Identity() if init_values is None else LayerScale(dim, init_values)

        self.norm1 = norm_layer(dim)
        rates = dict(attn_drop=attn_drop, proj_drop=proj_drop)
        how = dict(norm_layer=norm_layer, deterministic=deterministic, backend=backend)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_norm, **rates, **how)
        self.ls1 = scale()
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop)
        self.ls2 = scale()
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = _add(x, self.attn(self.norm1(x)), self.ls1, self.drop_path1)  # (B, N, D)
        return _add(x, self.mlp(self.norm2(x)), self.ls2, self.drop_path2)  # (B, N, D)


def _add(x: Tensor, branch: Tensor, scale: nn.Module, drop_path: nn.Module) -> Tensor:
    """Return ``x + drop_path(scale(branch))``, on a GPU in one pass over memory."""
    if not _can_fuse(x, branch, scale, drop_path):
        return x + passed(drop_path, passed(scale, branch))
    from siglip_lib.kernels.residual import fused_residual

    gamma = scale.gamma if isinstance(scale, LayerScale) else None
    keep = drop_path.draw(branch)
    divisor = drop_path.keep_prob if keep is not None and drop_path.scale_by_keep else 1.0
    return fused_residual(x, branch, gamma, keep, divisor)


def _can_fuse(x: Tensor, branch: Tensor, scale: nn.Module, drop_path: nn.Module) -> bool:
    """Whether the kernel does the same, and has something to do: a plain addition is one pass already."""
    if not (drop_path.training or isinstance(scale, LayerScale)):  # asked first: it takes least
        return False
    if not takes_kernel(x, branch):  # compiled code fuses by itself
        return False
    if not is_plain(scale, LayerScale, nn.Identity) or not is_plain(drop_path, DropPath):
        return False
    factors = [scale.gamma] if isinstance(scale, LayerScale) else []
    drops = drop_path.training and drop_path.drop_prob > 0
    return (
        bool(factors or drops)
        and x.numel() >= _LARGE
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and all(torch.result_type(x, other) == x.dtype for other in (branch, *factors))
    )
