"""The small parts of a block: LayerScale, DropPath and the MLP."""

from functools import partial

import torch
from torch import Tensor, nn

from siglip_lib.base.checks import finite, positive_int, probability
from siglip_lib.base.observers import is_plain
from siglip_lib.tower.linear_gelu import can_fuse_linear_gelu, fused_linear_gelu

GELU_TANH = partial(nn.GELU, approximate="tanh")  # SigLIP's activation
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)  # SigLIP's norm, and big_vision's


class LayerScale(nn.Module):
    """Multiply each channel by a learned factor: ``x * gamma``.

    Args:
        dim: number of channels D, the last axis of the input.
        init_values: value of every element of ``gamma`` at the start; 0.0 is a value like any other.
        inplace: write the result into the input when no gradient is recorded. While one is, the product is a new
            tensor: autograd would have to keep a copy of the input anyway, to form the gradient of ``gamma``.

    Shapes: x (..., D) to (..., D), in the dtype that x and ``gamma`` (D,) promote to.

    Source: Touvron et al., Going deeper with Image Transformers (2021), section 2.
    """

    def __init__(self, dim: int, init_values: float = 1e-5, inplace: bool = False) -> None:
        super().__init__()
        self.init_values = finite("init_values", init_values)
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.full((positive_int("dim", dim),), self.init_values))

    def init_weights(self) -> None:
        """Set ``gamma`` back to ``init_values``."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        recording = torch.is_grad_enabled() and (x.requires_grad or self.gamma.requires_grad)
        if self.inplace and not recording and torch.result_type(x, self.gamma) == x.dtype:
            return x.mul_(self.gamma)
        return x * self.gamma

    def extra_repr(self) -> str:
        return f"{self.gamma.numel()}, init_values={self.init_values}, inplace={self.inplace}"


class DropPath(nn.Module):
    """Set a residual branch to zero for a random part of the batch (stochastic depth), while training.

    Args:
        drop_prob: probability in [0, 1) that a sample's branch is dropped.
        scale_by_keep: divide what is kept by ``1 - drop_prob``, so that the expectation is that of no dropping.

    Shapes: x (B, ...) to the same shape and dtype; one draw for each of the B samples.

    Source: Huang et al., Deep Networks with Stochastic Depth (2016), section 3.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = probability("drop_prob", drop_prob)
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        keep = self.draw(x)
        if keep is None:
            return x
        keep = keep.view(-1, *(1,) * (x.ndim - 1))  # (B, 1, ...)
        # the division is done on x: 1 / keep_prob rounded to bf16 would be off by up to .2 %
        return torch.where(keep, x / self.keep_prob if self.scale_by_keep else x, 0.0)

    @property
    def keep_prob(self) -> float:
        """Probability that a sample's branch is kept."""
        return 1 - self.drop_prob

    def draw(self, x: Tensor) -> Tensor | None:
        """Draw which of the samples of x (B, ...) keep their branch: (B,) bool; None if all do."""
        if not self.training or self.drop_prob == 0.0:
            return None
        return torch.rand(x.shape[0], device=x.device) < self.keep_prob

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}, scale_by_keep={self.scale_by_keep}"


def passed(module: nn.Module, x: Tensor) -> Tensor:
    """Return ``module(x)``; where that is x itself, without the call, which takes Python longer than to find out."""
    idle = not module.training or type(module) is nn.Identity
    return x if idle and is_plain(module, nn.Identity, nn.Dropout, DropPath) else module(x)


class Mlp(nn.Module):
    """Two linear layers with an activation between them, applied to each token.

    Args:
        in_features: channels D of the input.
        hidden_features: channels between the layers; D if None.
        out_features: channels of the output; D if None.
        act_layer: class of the activation. SigLIP's is GELU in its tanh approximation.
        norm_layer: class of a normalisation before ``fc2``; none if None.
        bias: whether the linear layers have biases; a pair for ``fc1`` and ``fc2``, or one for both.
        drop: dropout probability after each layer, in [0, 1); a pair or one for both.

    Shapes: x (..., in_features) to (..., out_features).

    Source: Vaswani et al., Attention Is All You Need (2017), section 3.3; parameter names are timm's.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: type[nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
    ) -> None:
        super().__init__()
        dim = positive_int("in_features", in_features)
        hidden = dim if hidden_features is None else hidden_features
        hidden = positive_int("hidden_features", hidden)
        out = dim if out_features is None else positive_int("out_features", out_features)
        bias1, bias2 = _for_both("bias", bias)
        drop1, drop2 = (probability("drop", p) for p in _for_both("drop", drop))
        self.fc1 = nn.Linear(dim, hidden, bias=bias1)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop1)
        self.norm = norm_layer(hidden) if norm_layer is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden, out, bias=bias2)
        self.drop2 = nn.Dropout(drop2)

    def forward(self, x: Tensor) -> Tensor:
        fc1, act = self.fc1, self.act
        fused = can_fuse_linear_gelu(fc1, act, x)
        x = fused_linear_gelu(fc1, x) if fused else act(fc1(x))  # (..., hidden)
        x = passed(self.norm, passed(self.drop1, x))
        return passed(self.drop2, self.fc2(x))  # (..., out)


def _for_both(name: str, value: object) -> tuple[object, object]:
    """Return a pair as it is, and anything else twice: for the first and the second layer."""
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name}={value!r} must be one value or two: of fc1 and of fc2")
    return tuple(value)
