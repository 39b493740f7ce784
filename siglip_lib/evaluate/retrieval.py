"""How good an embedding is: shares with their intervals, ranks, recall, zero-shot accuracy.

Every comparison with NaN is false, so a loop that counts what is more similar than the right answer finds nothing and
calls a broken model perfect. Here NaN raises ``ValueError``, and what ties with the right answer counts as being before
it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from siglip_lib.base.checks import INTEGERS, check_tensor, count, positive_int

# Similarities held at once: 64 MiB in float32.
CHUNK = 2**24


@dataclass(frozen=True)
class Share:
    """A share of hits and its 95 % confidence interval, for example ``55.1 % (51.6 to 58.6)``.

    Args:
        hits: how many of ``total`` were right.
        total: how many there were, at least 1.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference (1927).
    """

    hits: int
    total: int

    def __post_init__(self) -> None:
        positive_int("total", self.total)
        if count("hits", self.hits) > self.total:
            raise ValueError(f"hits={self.hits} must be at most total={self.total}")

    @property
    def value(self) -> float:
        """The share itself, in [0, 1]."""
        return self.hits / self.total

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self._interval().low

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self._interval().high

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"

    def _interval(self):
        from scipy.stats import binomtest  # half a second, and only who asks for an interval waits

        return binomtest(self.hits, self.total).proportion_ci(method="wilson")


def ranks(queries: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> Tensor:
    """Return at which place each query's best right answer comes when the gallery is sorted by similarity.

    An answer is right if its id is the query's. Wrong answers that are as similar as the best right one, to rounding,
    count as being before it: an embedding that is the same for everything gets the worst ranks and not the best.

    Args:
        queries: unit vectors (Q, D), any float dtype.
        gallery: unit vectors (G, D).
        query_ids: integers (Q,).
        gallery_ids: integers (G,); may hold several right answers to a query.

    Returns:
        int64 (Q,), from 1 on. Similarities are computed in float32, or in float64 if the vectors are.

    Raises:
        ValueError: a set is empty, a shape is wrong, a vector is not finite or not of unit length, or a query has no
            right answer.
        TypeError: vectors that are not floats, ids that are not integers.
    """
    queries = _vectors("queries", queries, ("Q", "D"))
    gallery = _vectors("gallery", gallery, ("G", queries.shape[1]))
    check_tensor("query_ids", query_ids, (len(queries),), dtypes=INTEGERS)
    check_tensor("gallery_ids", gallery_ids, (len(gallery),), dtypes=INTEGERS)
    missing = query_ids[~torch.isin(query_ids, gallery_ids)]
    if len(missing):
        raise ValueError(
            f"query_ids: {len(missing)} of {len(query_ids)} have no right answer in gallery_ids, "
            f"the first is {missing[0].item()}"
        )
    dtype = torch.promote_types(queries.dtype, gallery.dtype)
    queries, gallery = queries.to(dtype), gallery.to(dtype)
    # Equal vectors can differ in the last bits of their products, by where a matrix product cuts its tiles.
    rounding = 8 * torch.finfo(dtype).eps
    found = []
    rows = max(1, CHUNK // len(gallery))
    for query, ids in zip(queries.split(rows), query_ids.split(rows), strict=True):
        with torch.autocast(query.device.type, enabled=False):
            similarity = query @ gallery.T  # (rows, G)
        right = ids[:, None] == gallery_ids
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)  # (rows, 1)
        before = (similarity >= best - rounding) & ~right
        found.append(1 + before.sum(1))
    return torch.cat(found)


def recall(
    queries: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, k: int
) -> Share:
    """Return how many queries find a right answer among the k most similar of the gallery: recall at k.

    Arguments and errors are those of ``ranks``; k must be at least 1 and at most the size of the gallery.
    """
    if positive_int("k", k) > len(gallery):
        raise ValueError(f"k={k} must be at most the size of the gallery, {len(gallery)}")
    found = ranks(queries, gallery, query_ids, gallery_ids) <= k
    return Share(int(found.sum()), len(found))


def zero_shot(
    images: Tensor, texts: Tensor, image_ids: Tensor, text_ids: Tensor, groups: Sequence[str]
) -> dict[str, Share]:
    """Return, for each group of pictures, how many have their own text as the most similar of all texts.

    Args:
        images: unit vectors (N, D).
        texts: unit vectors (M, D), those of all groups together.
        image_ids: integers (N,).
        text_ids: integers (M,).
        groups: the name of each picture's group, N of them; ``all`` is kept for the result.

    Returns:
        A share for each group, sorted by name, and last one for ``all``.

    Raises:
        ValueError: the number of groups is not N, one is called ``all``, or as for ``ranks``.
    """
    if len(groups) != len(images):
        raise ValueError(f"groups has {len(groups)} names for {len(images)} images")
    if "all" in groups:
        raise ValueError("groups contains 'all', the name of the result over all groups")
    hit = (ranks(images, texts, image_ids, text_ids) == 1).tolist()
    by_group = {
        name: [h for h, group in zip(hit, groups, strict=True) if group == name]
        for name in sorted(set(groups))
    }
    return {name: Share(sum(h), len(h)) for name, h in (by_group | {"all": hit}).items()}


def _vectors(name: str, x: Tensor, shape: tuple[int | str, ...]) -> Tensor:
    """Return unit vectors in at least float32; raise an error for what is empty, not finite or of another length."""
    check_tensor(name, x, shape, empty=False)
    if bad := int((~x.isfinite()).any(1).sum()):
        raise ValueError(f"{name}: {bad} of {len(x)} vectors hold NaN or infinity")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    lengths = x.norm(dim=1)
    worst = lengths[(lengths - 1).abs().argmax()].item()
    if abs(worst - 1) > 1e-2:  # what was normalised in half precision is a few thousandths off
        raise ValueError(f"{name} holds a vector of length {worst:.4g}; all must be of unit length")
    return x
