"""Maps of where an image tower looks, and of what in a picture speaks for a text.

Each function takes a tower with a pooling head and pictures, and gives one value for each patch. ``rollout`` and
``pool_attention`` know attention weights alone and so the same map for every text. The others explain a score: the
cosine of the pooled picture and a text's vector. Whether a map shows where the model looks is a question for
``pointing``, not for the eye.

The length of a text's vector plays no part, but a vector of zeros raises ``ValueError``. The score is linear in the
unit vector, so the difference of two texts' vectors asks what speaks for the one rather than the other.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from siglip_lib.base.checks import check_tensor, finite, positive_int
from siglip_lib.evaluate.maps import attention_layers, attention_maps, uncompiled
from siglip_lib.storage.names import unwrapped
from siglip_lib.tower.attention import attention_weights
from siglip_lib.tower.vision_transformer import VisionTransformer


def pool_attention(tower: VisionTransformer, pixels: Tensor) -> Tensor:
    """Return where the pooling head looks: its attention weights, the mean over its heads.

    Args:
        tower: an image tower with a pooling head (``global_pool="map"``); it is run in evaluation mode and its own
            dtype, whatever autocast says, and left as it was.
        pixels: pictures (B, C, H, W) that the tower takes.

    Returns:
        (B, rows, columns) on the grid of patches, float32; a picture's map sums to 1.

    Raises:
        TypeError: the tower is no ``VisionTransformer``.
        ValueError: the tower has no pooling head or is a stage of a pipeline, or the pictures' shape is wrong.
    """
    with evaluation_mode(check_tower(tower, pixels), pixels) as tower:
        *_, pool = layer_weights(tower, pixels)
    return _on_grid(tower, pixels, pool.mean(1)[:, 0])


def rollout(tower: VisionTransformer, pixels: Tensor) -> Tensor:
    """Return where the pooling head looks if every block passes on what its tokens looked at and themselves by half.

    The blocks' weights, averaged over heads, are multiplied as ``(A + I) / 2`` from the last to the first; values,
    MLPs and the size of the residual stream play no part. Arguments and errors as for ``pool_attention``.

    Returns:
        (B, rows, columns), float32; a picture's map sums to 1 but for what prefix tokens take.

    Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers (2020), section 3, attention rollout. There
    the last block's class token reads; here it is the pooling head.
    """
    with evaluation_mode(check_tower(tower, pixels), pixels) as tower:
        *blocks, pool = layer_weights(tower, pixels)
        read = F.pad(pool.mean(1), (tower.num_prefix_tokens, 0))  # (B, 1, prefix + N)
        for weights in reversed(blocks):
            read = (read @ weights.mean(1) + read) / 2
    return _on_grid(tower, pixels, read[:, 0, tower.num_prefix_tokens :])


def gradient_attention(tower: VisionTransformer, pixels: Tensor, text: Tensor) -> Tensor:
    """Return which patches raise the score through attention: gradient times weight, positive part, mean over heads.

    Relevance goes through the blocks: a token is relevant to itself, and to others by their weights for it. What the
    blocks mixed is scaled to rows of sum 1, and the pooling head reads it.

    Args:
        tower: as for ``pool_attention``.
        pixels: pictures (B, C, H, W).
        text: one vector for each picture (B, D), see the module's head.

    Returns:
        (B, rows, columns), float32, not negative.

    Raises:
        TypeError, ValueError: as for ``pool_attention``; texts of another shape, not finite, or zero.

    Source: Chefer et al., Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
    Transformers (2021), section 3, equations 5, 6 and 8 to 10.
    """
    with evaluation_mode(check_tower(tower, pixels, text), pixels) as tower:
        *blocks, pool = [
            (weights * gradient).clamp(min=0).mean(1)  # (B, queries, keys)
            for weights, gradient in _weights_and_gradients(tower, pixels, text)
        ]
        mixed = torch.zeros_like(blocks[0])  # what the blocks add to the identity
        for relevance in blocks:
            mixed = mixed + relevance + relevance @ mixed
        mixed = mixed / mixed.sum(-1, keepdim=True).clamp(min=torch.finfo(mixed.dtype).tiny)
        read = F.pad(pool, (tower.num_prefix_tokens, 0))  # (B, 1, prefix + N)
        read = read + read @ mixed
    return _on_grid(tower, pixels, read[:, 0, tower.num_prefix_tokens :])


def gradient_tokens(tower: VisionTransformer, pixels: Tensor, text: Tensor) -> Tensor:
    """Return which tokens raise the score as the pooling head reads them: gradient times token, summed over channels.

    To first order this is how much the score falls when a token becomes zero. What would raise the score counts as 0.
    The tokens are those after the last norm: before it the sum is zero for every token, since a LayerNorm gives the
    same for a token of any length. Arguments, result and errors are those of ``gradient_attention``.

    Source: Selvaraju et al., Grad-CAM (2017), section 3; there the gradient is averaged over places before the product.
    """
    with (
        evaluation_mode(check_tower(tower, pixels, text), pixels) as tower,
        _recording(pixels) as pixels,
    ):
        tokens = tower.forward_features(pixels)  # (B, prefix + N, D)
        (gradient,) = torch.autograd.grad(_score(tower, tokens, text).sum(), tokens)
    relevance = (gradient.float() * tokens.detach().float()).sum(-1).clamp(min=0)
    return _on_grid(tower, pixels, relevance[:, tower.num_prefix_tokens :])


def occlusion(
    tower: VisionTransformer,
    pixels: Tensor,
    text: Tensor,
    window: int,
    stride: int,
    fill: float | str = 1.0,
    *,
    batch_size: int = 256,
) -> Tensor:
    """Return how much the score falls when what lies around a patch is covered.

    A square window moves over the picture, and a last one closes each row and column flush with the border. A patch
    gets the mean over the windows that cover it, each by how many of its pixels it covers.

    Args:
        tower: as for ``pool_attention``.
        pixels: pictures (B, C, H, W).
        text: one vector for each picture (B, D), see the module's head.
        window: pixels along a side of the window, at most the picture's.
        stride: pixels from one window to the next, at most ``window``, so that no pixel is left out.
        fill: what covers, a number on the pixels' scale, or ``mean`` for each picture's mean colour.
        batch_size: pictures in one run of the tower; more need more memory.

    Returns:
        (B, rows, columns), float32; negative where covering raises the score.

    Raises:
        TypeError, ValueError: as for ``gradient_attention``; a window, stride or fill that is not allowed.

    Source: Zeiler and Fergus, Visualizing and Understanding Convolutional Networks (2014), section 4.2.
    """
    with evaluation_mode(check_tower(tower, pixels, text), pixels) as tower, torch.no_grad():
        covered = _over_windows(tower, pixels, text, window, stride, fill, batch_size, alone=False)
        parts = zip(pixels.split(batch_size), text.split(batch_size), strict=True)
        whole = torch.cat([_score(tower, tower.forward_features(x), t) for x, t in parts])  # (B,)
    return (whole[:, None, None] - covered).float()


def isolation(
    tower: VisionTransformer,
    pixels: Tensor,
    text: Tensor,
    window: int,
    stride: int,
    fill: float | str = 1.0,
    *,
    batch_size: int = 256,
) -> Tensor:
    """Return the score when nothing but what lies around a patch is left, and all else is covered.

    The opposite of ``occlusion``, with its arguments, windows and errors. Covering one of several objects can leave the
    score as it is; an object alone can't hide behind the others.

    Returns:
        Cosines, each the mean over the windows around a patch, (B, rows, columns), float32 in [-1, 1].

    Source: Petsiuk et al., RISE (2018), section 3.1, with square windows in place of random masks.
    """
    with evaluation_mode(check_tower(tower, pixels, text), pixels) as tower, torch.no_grad():
        mean = _over_windows(tower, pixels, text, window, stride, fill, batch_size, alone=True)
    return mean.float()


def _over_windows(
    tower: VisionTransformer,
    pixels: Tensor,
    text: Tensor,
    window: int,
    stride: int,
    fill: float | str,
    batch_size: int,
    *,
    alone: bool,
) -> Tensor:
    """Return for each patch the mean score over the windows around it: with each covered, or all else if ``alone``."""
    height, width = pixels.shape[2:]
    window, stride = positive_int("window", window), positive_int("stride", stride)
    if window > min(height, width):
        raise ValueError(f"window={window} is larger than the pictures, {height} x {width} pixels")
    if stride > window:
        raise ValueError(f"stride={stride} must be at most window={window}, or pixels are left out")
    batch_size = positive_int("batch_size", batch_size)
    if isinstance(fill, str):
        if fill != "mean":
            raise ValueError(f"fill={fill!r} must be a number or 'mean'")
        colours = pixels.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
    else:
        colours = torch.full_like(pixels[:, :, :1, :1], finite("fill", fill))

    along_y = _windows(height, window, stride, pixels.device)  # (windows down, H)
    along_x = _windows(width, window, stride, pixels.device)  # (windows across, W)
    windows = len(along_y) * len(along_x)
    scores = []
    for run in torch.arange(len(pixels) * windows, device=pixels.device).split(batch_size):
        which, place = run // windows, run % windows
        inside = along_y[place // len(along_x), :, None] & along_x[place % len(along_x), None]
        covered = (~inside if alone else inside)[:, None]  # (run, 1, H, W)
        some = torch.where(covered, colours[which], pixels[which])
        scores.append(_score(tower, tower.forward_features(some), text[which]))
    score = torch.cat(scores).view(-1, len(along_y), len(along_x))

    rows, columns = tower.patch_embed.dynamic_feat_size((height, width))
    patch_height, patch_width = tower.patch_embed.patch_size
    share_y = _by_patch(along_y, rows, patch_height).to(score.dtype)  # (windows down, rows)
    share_x = _by_patch(along_x, columns, patch_width).to(score.dtype)
    total = share_y.sum(0)[:, None] * share_x.sum(0)  # (rows, columns)
    return share_y.T @ score @ share_x / total


def check_tower(
    tower: VisionTransformer, pixels: Tensor, text: Tensor | None = None
) -> VisionTransformer:
    """Return the tower, out of what wraps it, see ``unwrapped``; raise an error if no map can be made."""
    tower = unwrapped(tower) if isinstance(tower, nn.Module) else tower
    if not isinstance(tower, VisionTransformer):
        raise TypeError(f"tower is a {type(tower).__name__}; it must be a VisionTransformer")
    if tower.global_pool != "map":
        raise ValueError(
            f"tower pools by global_pool={tower.global_pool!r}; these maps need a pooling head, 'map'"
        )
    if not (tower.is_first_stage and tower.is_last_stage):
        raise ValueError("tower is one stage of a pipeline; these maps need the whole")
    hint = "preprocess makes such of pictures"
    check_tensor("pixels", pixels, ("B", "C", "H", "W"), empty=False, hint=hint)
    if text is None:
        return tower
    check_tensor("text", text, (len(pixels), tower.embed_dim), hint="a vector for each picture")
    if not (text.isfinite().all() and text.any(1).all()):
        raise ValueError("text holds a vector that is zero or not finite")
    return tower


@contextmanager
def evaluation_mode(tower: VisionTransformer, pixels: Tensor) -> Iterator[VisionTransformer]:
    """Give the tower in evaluation mode, and without autocast, whose rounding makes ties of a map.

    Afterwards every part of the tower is in the mode it was. Autocast is that of the device of ``pixels``.
    """
    modes = [(module, module.training) for module in tower.modules()]
    tower.eval()
    try:
        with torch.autocast(pixels.device.type, enabled=False):
            yield tower
    finally:
        for module, training in modes:
            module.training = training


def layer_weights(tower: VisionTransformer, pixels: Tensor) -> list[Tensor]:
    """Return the attention weights (B, heads, queries, keys) of each block, then of the pooling head."""
    with torch.no_grad(), attention_maps(tower) as maps:
        tower.forward_head(tower.forward_features(pixels))
    _check_count(tower, len(maps))
    return list(maps.values())


@contextmanager
def _recording(pixels: Tensor) -> Iterator[Tensor]:
    """Give a copy of the pixels that asks for a gradient, so that frozen weights and an outer no_grad do not matter."""
    with torch.inference_mode(False), torch.enable_grad():
        yield pixels.detach().clone().requires_grad_()


def _score(tower: VisionTransformer, tokens: Tensor, text: Tensor) -> Tensor:
    """Return the cosine of pooled tokens and text, (B,), in at least float32."""
    pooled = tower.forward_head(tokens, pre_logits=True)
    pooled = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
    text = text.to(pooled.dtype)
    # else a very short or long one under- or overflows
    text = text / text.abs().amax(1, keepdim=True)
    return F.cosine_similarity(pooled, text, dim=1)


def _weights_and_gradients(
    tower: VisionTransformer, pixels: Tensor, text: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return weights and the score's gradient with respect to them, of each block, then of the pooling head.

    Fast attention never holds its weights, so autograd can't be asked for their gradient. But they act through
    ``out = weights @ v`` alone, and what autograd says of ``out`` is enough: the gradient is ``d out @ v.T``.
    """
    layers = attention_layers(tower).values()
    inputs: list[Tensor] = []  # of each attention, in the order in which they run
    outs: list[Tensor] = []  # what each read, (B, queries, heads * head_dim), before its projection
    with _recording(pixels) as pixels:
        # without hooks in the backward pass, where a checkpointed block runs again
        with ExitStack() as hooks, uncompiled():
            for layer in layers:
                for module, kept in ((layer, inputs), (layer.proj, outs)):
                    keep = lambda _, arguments, kept=kept: kept.append(arguments[0])  # noqa: E731
                    hooks.enter_context(module.register_forward_pre_hook(keep))
            score = _score(tower, tower.forward_features(pixels), text)
        _check_count(tower, len(inputs))
        gradients = torch.autograd.grad(score.sum(), outs)
    found = []
    with torch.no_grad():
        for layer, x, gradient in zip(layers, inputs, gradients, strict=True):
            q, k, v = layer._heads(x)
            gradient = gradient.unflatten(-1, v.shape[2:]).float()  # (B, queries, heads, head_dim)
            gradient = torch.einsum("bqhc,bkhc->bhqk", gradient, v.float())
            found.append((attention_weights(q, k, layer.head_dim**-0.5), gradient))
    return found


def _check_count(tower: VisionTransformer, count: int) -> None:
    """Raise ``ValueError`` if more or fewer attention layers ran than a map is made of."""
    expected = len(tower.blocks) + 1
    if count != expected:
        raise ValueError(
            f"tower ran {count} attention layers that show their weights; this map needs {expected}, "
            "one for each block and the pooling head's"
        )


def _on_grid(tower: VisionTransformer, pixels: Tensor, values: Tensor) -> Tensor:
    """Lay values (B, N) out on the grid of patches, (B, rows, columns)."""
    return values.unflatten(1, tower.patch_embed.dynamic_feat_size(pixels.shape[2:])).float()


def _windows(length: int, window: int, stride: int, device: torch.device) -> Tensor:
    """Which pixels along a side lie in each window, (windows, length)."""
    starts = [*range(0, length - window, stride), length - window]
    start = torch.tensor(starts, device=device)[:, None]
    pixel = torch.arange(length, device=device)
    return (start <= pixel) & (pixel < start + window)


def _by_patch(inside: Tensor, patches: int, patch: int) -> Tensor:
    """How many of each patch's pixels lie in each window, (windows, patches): from (windows, length)."""
    padded = F.pad(inside.float(), (0, max(0, patches * patch - inside.shape[1])))
    return padded[:, : patches * patch].unflatten(1, (patches, patch)).sum(2)
