"""Shares, ranks, recall, zero-shot: held against plain loops, and neither NaN nor a constant ever looks good."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from siglip_lib.evaluate import retrieval
from siglip_lib.evaluate.retrieval import Share, ranks, recall, zero_shot


def unit(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (551, 1000), (1, 3), (1, 1)])
def test_share_has_wilsons_interval(hits, total):
    share, z, p = Share(hits, total), 1.959963984540054, hits / total
    middle = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    assert share.value == p
    assert [share.low, share.high] == pytest.approx([middle - half, middle + half], abs=1e-12)


def test_share_as_text():
    assert str(Share(551, 1000)) == "55.1 % (52.0 to 58.2)"


@pytest.mark.parametrize(
    ("hits", "total", "error", "message"),
    [
        (0, 0, ValueError, "total=0 must be at least 1"),
        (-1, 4, ValueError, "hits=-1 must be at least 0"),
        (5, 4, ValueError, "hits=5 must be at most total=4"),
        (math.nan, 4, TypeError, "hits=nan must be an int, not float"),
    ],
)
def test_share_refuses(hits, total, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Share(hits, total)


def by_hand(queries, gallery, query_ids, gallery_ids) -> list[int]:
    found = []
    for query, wanted in zip(queries, query_ids.tolist(), strict=True):
        scored = [
            ((query @ g).item(), i) for g, i in zip(gallery, gallery_ids.tolist(), strict=True)
        ]
        best = max(score for score, i in scored if i == wanted)
        found.append(1 + sum(score >= best for score, i in scored if i != wanted))
    return found


@pytest.mark.parametrize("chunk", [1, 100, 2**24])
def test_ranks_are_those_of_a_plain_loop(chunk, device, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    gallery, gallery_ids = unit(31, 4), torch.randint(5, (31,))  # several right answers each
    queries, query_ids = unit(23, 4), gallery_ids[torch.randint(31, (23,))]
    found = ranks(*(x.to(device) for x in (queries, gallery, query_ids, gallery_ids)))
    assert found.dtype == torch.int64
    assert found.tolist() == by_hand(queries, gallery, query_ids, gallery_ids)
    assert len(found.unique()) > 5


def test_an_embedding_that_is_the_same_for_everything_gets_the_worst_ranks(device):
    queries, gallery = unit(1, 192).to(device), unit(1, 192).to(device)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for size in (3, 61, 861):
            # odd sizes: the products of equal vectors differ in the last bit where tiles end
            q, g = queries.repeat(57, 1).to(dtype), gallery.repeat(size, 1).to(dtype)
            ids = torch.arange(size, device=device)
            assert (ranks(q, g, ids[:1].repeat(57), ids) == size).all()
            assert recall(q, g, ids[:1].repeat(57), ids, size - 1).hits == 0


def test_ties_are_counted_against_to_rounding():
    gallery = torch.tensor([[1.0, 0.0], [1.0, 1e-4], [0.0, 1.0]], dtype=torch.float64)
    query, ids = gallery[:1], torch.arange(3)
    # the second is 5e-9 less similar than the first once it has length 1
    gallery = F.normalize(gallery, dim=1)
    assert ranks(query, gallery, ids[:1], ids).tolist() == [1]
    assert ranks(query.float(), gallery.float(), ids[:1], ids).tolist() == [2]


def test_other_right_answers_do_not_push_one_back():
    gallery = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), dim=1)
    assert ranks(gallery[:1], gallery, torch.tensor([4]), torch.tensor([4, 4, 5])).tolist() == [1]


def test_autocast_does_not_round_the_similarities(device):
    gallery = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.02]], device=device), dim=1)
    ids = torch.arange(2, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        assert ranks(gallery, gallery, ids, ids).tolist() == [1, 1]


def test_vectors_normalised_in_half_precision_are_of_unit_length():
    x, ids = F.normalize(torch.randn(50, 192).bfloat16(), dim=1), torch.arange(50)
    assert recall(x, x, ids, ids, 1) == Share(50, 50)


def test_recall_counts_ranks_up_to_k():
    gallery, ids = unit(40, 3), torch.arange(40)
    queries = F.normalize(gallery + 0.3 * torch.randn(40, 3), dim=1)
    found = ranks(queries, gallery, ids, ids)
    shares = [recall(queries, gallery, ids, ids, k) for k in (1, 5, 40)]
    assert shares == [Share(int((found <= k).sum()), 40) for k in (1, 5, 40)]
    assert 0 < shares[0].hits < shares[1].hits < shares[2].hits == 40


def test_zero_shot_by_group():
    texts, text_ids = torch.eye(4), torch.tensor([10, 11, 12, 13])
    texts[2] = torch.tensor([0, 0.6, 0.8, 0])  # the second best for what equals the second
    seen_as = torch.tensor([0, 1, 1, 3, 2])  # the text that a picture equals
    image_ids = torch.tensor([10, 11, 12, 13, 13])
    groups = ["food", "food", "animals", "food", "places"]
    assert [*zero_shot(texts, texts, text_ids, text_ids, "dbca")] == ["a", "b", "c", "d", "all"]
    found = zero_shot(texts[seen_as], texts, image_ids, text_ids, groups)
    assert list(found) == ["animals", "food", "places", "all"]
    assert found == {
        "animals": Share(0, 1),
        "food": Share(3, 3),
        "places": Share(0, 1),
        "all": Share(3, 5),
    }


GOOD = {
    "queries": torch.eye(3),
    "gallery": torch.eye(3),
    "query_ids": torch.arange(3),
    "gallery_ids": torch.arange(3),
}
BROKEN = [
    (
        "queries",
        torch.eye(3).fill_diagonal_(math.nan),
        ValueError,
        "queries: 3 of 3 vectors hold NaN",
    ),
    (
        "gallery",
        torch.diag(torch.tensor([1, math.inf, 1])),
        ValueError,
        "gallery: 1 of 3 vectors hold",
    ),
    ("queries", 2 * torch.eye(3), ValueError, "queries holds a vector of length 2; all must be of"),
    ("gallery", torch.eye(3) * 0.98, ValueError, "gallery holds a vector of length 0.98"),
    ("gallery", torch.zeros(3, 3), ValueError, "gallery holds a vector of length 0"),
    ("queries", torch.zeros(0, 3), ValueError, "queries has shape (0, 3); it must be (Q, D), each"),
    ("gallery", torch.zeros(0, 3), ValueError, "gallery has shape (0, 3)"),
    ("queries", torch.ones(3), ValueError, "queries has shape (3,)"),
    ("gallery", torch.eye(4)[:3], ValueError, "gallery has shape (3, 4); it must be (G, 3)"),
    ("queries", torch.eye(3).long(), TypeError, "queries is torch.int64; it must be of float"),
    ("query_ids", torch.arange(4), ValueError, "query_ids has shape (4,); it must be (3,)"),
    ("gallery_ids", torch.arange(2), ValueError, "gallery_ids has shape (2,); it must be (3,)"),
    (
        "gallery_ids",
        torch.arange(3.0),
        TypeError,
        "gallery_ids is torch.float32; it must be of int",
    ),
    ("query_ids", torch.tensor([0, 7, 8]), ValueError, "query_ids: 2 of 3 have no right answer in"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BROKEN)
def test_refuses(name, value, error, message):
    given = GOOD | {name: value}
    with pytest.raises(error, match=re.escape(message)):
        ranks(**given)
    if error is ValueError:
        with pytest.raises(error):
            recall(**given, k=1)
        with pytest.raises(error):
            zero_shot(*given.values(), ["a"] * len(given["queries"]))


def test_what_a_diverged_model_gives_is_no_perfect_recall():
    broken = F.normalize(torch.full((5, 8), math.nan), dim=1)
    with pytest.raises(ValueError, match="NaN"):
        recall(broken, broken, torch.arange(5), torch.arange(5), 1)


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "k=0 must be at least 1"),
        (4, ValueError, "k=4 must be at most the size of the gallery, 3"),
        (1.0, TypeError, "k=1.0 must be an int, not float"),
    ],
)
def test_recall_refuses_k(k, error, message):
    with pytest.raises(error, match=re.escape(message)):
        recall(**GOOD, k=k)


@pytest.mark.parametrize(
    ("groups", "message"),
    [(["a", "b"], "groups has 2 names for 3 images"), (["a", "b", "all"], "groups contains 'all'")],
)
def test_zero_shot_refuses_groups(groups, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        zero_shot(*GOOD.values(), groups)
