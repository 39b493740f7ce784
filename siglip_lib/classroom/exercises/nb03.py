"""Checks of notebook 03, attention."""

import math
from functools import partial

import torch

from siglip_lib.classroom.exercises import answered, exercise
from siglip_lib.classroom.exercises.helpers import ShapesMade, first_match, near
from siglip_lib.tower.attention import Attention


@exercise("03.1")
def score_std(answer) -> str | None:
    found, right = float(answered(answer(1152, 16, 0.02))), 1152 * 0.02**2
    mistakes = {
        "those are the scores before the scale head_dim ** -0.5": right * 72**0.5,
        "that is the standard deviation of one channel of q; a score multiplies q by k": right**0.5,
        "that is the variance; the standard deviation is its square root": right**2,
        "that is one product, scaled; a score sums head_dim of them": right / 72**0.5,
    }
    if reason := first_match(found, mistakes, near(1e-2)):
        return reason
    for dim, heads, std in ((1152, 16, 0.02), (1152, 16, 0.05), (768, 12, 0.02), (1152, 8, 0.02)):
        found, right = float(answer(dim, heads, std)), dim * std**2
        if not math.isclose(found, right, rel_tol=1e-2):
            return f"score_std({dim}, {heads}, {std}) is {found:.3f}; random draws give {right:.3f}"
    return None


@exercise("03.2")
def keys_seen(answer) -> str | None:
    stds = (0.02, 0.06, 0.1)
    found, right = [float(answered(answer(std))) for std in stds], [*map(_keys_seen, stds)]
    close = near(0.1)
    if max(found) - min(found) < 1:
        return f"the answer is about {found[0]:.3g} for .02 and for .1: `std` changes nothing in it"
    wrong = {
        "that is the entropy H; the number of keys is e ** H": [math.log(keys) for keys in right],
        "in bits the number of keys is 2 ** H, in natural logarithms e ** H": [
            math.exp(math.log(keys) / math.log(2)) for keys in right
        ],
        "std is the standard deviation of the elements, not their variance": [
            _keys_seen(std**0.5) for std in stds
        ],
        "that is what the approximation says; draw the matrix and look at the maps": [
            729 * math.exp(-((288 * std**2) ** 2) / 2) for std in stds
        ],
        "a picture has 729 tokens": [_keys_seen(std, tokens=256) for std in stds],
    }
    if all(map(close, found, right)):
        return None
    if reason := first_match(found, wrong, lambda a, b: all(map(close, a, b))):
        return reason
    std, is_, wanted = next(x for x in zip(stds, found, right, strict=True) if not close(*x[1:]))
    return f"keys_seen({std}) is {is_:.3g}; this measurement gives {wanted:.3g}"


def _keys_seen(std: float, tokens: int = 729) -> float:
    """Return e to the mean entropy of the maps, parameters and tokens being random."""
    generator = torch.Generator().manual_seed(0)
    attention = Attention(288, 4)
    torch.nn.init.normal_(attention.qkv.weight, std=std, generator=generator)
    with torch.no_grad():
        maps = attention.attention_map(torch.randn(1, tokens, 288, generator=generator))
    return torch.special.entr(maps).sum(-1).mean().exp().item()


@exercise("03.3")
def attend_in_chunks(answer) -> str | None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(96, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    with ShapesMade() as made:
        found = answered(answer(q, k, v, 8))
    if found.shape != q.shape:
        return f"the output has shape {tuple(found.shape)}, not {tuple(q.shape)}"
    if found.dtype != q.dtype:
        return f"the output is in {found.dtype}, and q, k and v are in {q.dtype}"

    same = partial(torch.allclose, rtol=1e-6, atol=1e-9)

    def right(q, k, v, scale=16**-0.5):
        return (q @ k.T * scale).softmax(-1) @ v

    chunks = torch.stack([right(q, *part) for part in zip(k.split(8), v.split(8), strict=True)])
    added = chunks.sum(0)
    mistakes = {
        "the scores lack the scale 1 / sqrt(head_dim)": right(q, k, v, 1.0),
        "only the last chunk counts; add to what the earlier ones gave": right(q, k[-8:], v[-8:]),
        "each chunk has a softmax of its own here; one sum must run over all keys": chunks.mean(0),
        "each chunk has a softmax of its own here, and their results are added; divide once, at the end": added,
    }
    if reason := first_match(found, mistakes, same):
        return reason
    if not same(found, right(q, k, v)):
        if same(answer(q, k, v, 96), right(q, k, v)):
            return (
                "with one chunk it is right, with more it is not: when the largest score grows, "
                "both sums so far must be multiplied by exp(old - new)"
            )
        return "wrong even with a single chunk of all keys"
    if made.most_elements >= 96 * 96:
        return "right, but a tensor of N x N numbers was formed; hold N x chunk at most"
    if not answer(100 * q, 100 * k, v, 8).isfinite().all():
        return "large scores overflow: take exp of the score minus the largest so far"
    if not same(answer(100 * q, 100 * k, v, 8), right(100 * q, 100 * k, v)):
        return "wrong for large scores, where the largest score must be subtracted"
    below = 100 * q.abs(), -100 * k.abs(), v
    if not same(answer(*below, 8), right(*below)):
        return "wrong where all scores are far below 0: the largest so far must start at -inf, not at 0"
    if not same(answer(q, k, v, 7), right(q, k, v)):
        return "wrong when chunk does not divide N: the last chunk is shorter"
    return None
