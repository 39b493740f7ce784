"""The loss over several processes is the one over the whole batch in one; what they disagree on is refused by all.

So are those of the ring's contenders.
"""

import itertools
import math
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_group
from torch.utils._python_dispatch import TorchDispatchMode

from siglip_lib.siglip import loss_pairs, ring_loss, ring_softmax
from siglip_lib.siglip.gathered_loss import chunked_sigmoid_loss, gathered_sigmoid_loss
from siglip_lib.siglip.loss_pairs import Pairs
from siglip_lib.siglip.losses import plain_sigmoid_loss, plain_softmax_loss
from siglip_lib.siglip.ring_loss import ring_sigmoid_loss
from siglip_lib.siglip.ring_softmax import ring_softmax_loss

WORLDS = (1, 2, 3, 4)
CASES = {  # images and texts of a rank, how many kinds of ids there are, chunk
    "diagonal": (5, 5, None, None),
    "diagonal in blocks": (5, 5, None, 2),
    "several positives": (6, 6, 4, None),
    "several positives in blocks, more texts": (3, 8, 5, 3),
    "more images, few positives": (7, 2, 40, 2),
}
CONTENDERS = {  # the function, its oracle, which of the arguments they take, its options
    "gathered": (gathered_sigmoid_loss, plain_sigmoid_loss, 4, {}),
    "chunked": (chunked_sigmoid_loss, plain_sigmoid_loss, 4, {}),
    "chunked, blocks of 2": (chunked_sigmoid_loss, plain_sigmoid_loss, 4, {"chunk": 2}),
    "softmax": (ring_softmax_loss, plain_softmax_loss, 3, {}),
    "softmax, blocks of 2": (ring_softmax_loss, plain_softmax_loss, 3, {"chunk": 2}),
}
NAMES = ("image", "text", "logit_scale", "logit_bias")
INCOMING = -2.3
X, S = torch.ones(4, 3), torch.tensor(1.0)
WRONG = {  # what one rank of three gives beside X, X, S, S; what it raises, and what the others say
    "uneven batch": (
        {"image": X[:3], "text": X[:3]},
        "ValueError: the ranks' arguments differ, rank by rank: {'images': [4, 3, 4], 'texts': [4, 3, 4]}",
        "ValueError: the ranks' arguments differ, rank by rank: {'images': [4, 3, 4], 'texts': [4, 3, 4]}",
    ),
    "dtype": (
        {"image": X.half(), "text": X.half()},
        "ValueError: the ranks' arguments differ, rank by rank: {'bits': [32, 17, 32]}",
        "ValueError: the ranks' arguments differ, rank by rank: {'bits': [32, 17, 32]}",
    ),
    "ids": (
        {"image_ids": torch.arange(4), "text_ids": torch.arange(4)},
        "ValueError: the ranks' arguments differ, rank by rank: {'ids': [0, 1, 0]}",
        "ValueError: the ranks' arguments differ, rank by rank: {'ids': [0, 1, 0]}",
    ),
    "chunk": (
        {"chunk": 2},
        "ValueError: the ranks' arguments differ, rank by rank: {'chunk': [0, 2, 0]}",
        "ValueError: the ranks' arguments differ, rank by rank: {'chunk': [0, 2, 0]}",
    ),
    "gradients": (
        {"logit_bias": S.clone().requires_grad_()},
        "ValueError: the ranks' arguments differ, rank by rank: {'gradients': [0, 1, 0]}",
        "ValueError: the ranks' arguments differ, rank by rank: {'gradients': [0, 1, 0]}",
    ),
    "no tensor": (
        {"text": [1.0]},
        "TypeError: text must be a tensor (M, 3), not list",
        "ValueError: the arguments of rank 1 were refused there",
    ),
    "shape": (
        {"text": X[:3]},
        "ValueError: text has 3 rows; without ids it must have 4",
        "ValueError: the arguments of rank 1 were refused there",
    ),
    "chunk of 0": (
        {"chunk": 0},
        "ValueError: chunk=0 must be at least 1",
        "ValueError: the arguments of rank 1 were refused there",
    ),
}


def whole_batch(world: int, case: str) -> tuple[list, list, int | None]:
    """All ranks' arguments, the same wherever it is called."""
    images, texts, kinds, chunk = CASES[case]
    generator = torch.Generator().manual_seed(world)
    draw = {"generator": generator, "dtype": torch.float64}
    image = F.normalize(torch.randn(world * images, 4, **draw) + 0.5, dim=1)
    text = F.normalize(torch.randn(world * texts, 4, **draw) + 0.5, dim=1)
    scalars = (torch.tensor(x, dtype=torch.float64) for x in (1.3, -2.0))
    ids = [None, None]
    if kinds:
        ids = [
            torch.randint(kinds, (len(x),), generator=generator, dtype=torch.int32)
            for x in (image, text)
        ]
    return [image, text, *scalars], ids, chunk


def part(x: torch.Tensor | None, rank: int, world: int) -> torch.Tensor | None:
    return x.chunk(world)[rank] if isinstance(x, torch.Tensor) and x.ndim else x


def in_a_process(folder) -> dict:
    """What each rank of each world finds, and what it raises."""
    found = {"threw": {}}
    rank = dist.get_rank()
    for world in WORLDS:
        group = dist.new_group(range(world))
        if rank >= world:
            continue
        for case in CASES:
            arguments, ids, chunk = whole_batch(world, case)
            mine = [part(x, rank, world).clone().requires_grad_() for x in arguments]
            ids = [part(x, rank, world) for x in ids]
            loss = ring_sigmoid_loss(*mine, *ids, chunk=chunk, group=group)
            gradients = torch.autograd.grad(loss, mine, torch.full_like(loss, INCOMING))
            bare = ring_sigmoid_loss(*(x.detach() for x in mine), *ids, chunk=chunk, group=group)
            found[f"{world} {case}"] = [loss.detach(), *gradients, bare]
        for name, (function, _, count, options) in CONTENDERS.items():
            arguments, _, _ = whole_batch(world, "diagonal")
            mine = [part(x, rank, world).clone().requires_grad_() for x in arguments[:count]]
            loss = function(*mine, **options, group=group)
            gradients = torch.autograd.grad(loss, mine, torch.full_like(loss, INCOMING))
            bare = function(*(x.detach() for x in mine), **options, group=group)
            found[f"{world} {name}"] = [loss.detach(), *gradients, bare]
        if world == 2:  # logits 4100 and 4092: float32 has nothing between 4100 and 4100.0005
            sure = torch.tensor([[64.0, 2.0 - 4 * rank]])
            found["sure pairs"] = ring_softmax_loss(sure, sure, S - 1, group=group)
        if (
            world == 4
        ):  # each image likes a text of its neighbour best; exp(t) is more than float64 holds
            image, text = torch.eye(4)[rank, None], torch.eye(4)[rank ^ 1, None]
            found["cold"] = ring_softmax_loss(image, text, torch.tensor(12.0), group=group)
        if world != 3:
            continue
        for function in (chunked_sigmoid_loss, ring_softmax_loss):
            scalars = [S] * (2 if function is chunked_sigmoid_loss else 1)
            try:
                function(X, X, *scalars, chunk=0 if rank == 1 else None, group=group)
            except ValueError as error:
                found["threw"][function.__name__] = str(error)
        for name, (wrong, _, _) in WRONG.items():
            given = {"image": X, "text": X, "logit_scale": S, "logit_bias": S}
            try:
                ring_sigmoid_loss(**given | (wrong if rank == 1 else {}), group=group)
            except (TypeError, ValueError) as error:
                found["threw"][name] = f"{type(error).__name__}: {error}"
        found["afterwards"] = ring_sigmoid_loss(X, X, S, S, group=group)
        found["as transformers stores them"] = ring_sigmoid_loss(
            X, X, S[None], S[None], group=group
        )
        half = [x.to(torch.bfloat16).requires_grad_() for x in (X, X)]
        loss = ring_sigmoid_loss(*half, S, S, group=group)
        loss.backward()
        found["bfloat16"] = [loss.detach(), *(x.grad for x in half)]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_group(in_a_process, max(WORLDS), tmp_path_factory.mktemp("group"), limit=60)


@pytest.mark.parametrize(("world", "case"), [*itertools.product(WORLDS, CASES)])
def test_equals_the_loss_of_the_whole_batch(found, world, case):
    arguments, ids, _ = whole_batch(world, case)
    check_whole(found, world, case, plain_sigmoid_loss, arguments, ids)


@pytest.mark.parametrize(("world", "name"), [*itertools.product(WORLDS, CONTENDERS)])
def test_contenders_equal_the_loss_of_the_whole_batch(found, world, name):
    _, oracle, count, _ = CONTENDERS[name]
    arguments, _, _ = whole_batch(world, "diagonal")
    check_whole(found, world, name, oracle, arguments[:count])


def check_whole(found, world, case, oracle, arguments, ids=()):
    """Loss and gradients of all ranks are those that the oracle has of the whole batch."""
    whole = [x.requires_grad_() for x in arguments]
    expected = oracle(*whole, *ids)
    expected_gradients = torch.autograd.grad(expected, whole, torch.full_like(expected, INCOMING))
    ranks = [found[rank][f"{world} {case}"] for rank in range(world)]
    losses, *gradients, without_gradients = (list(x) for x in zip(*ranks, strict=True))

    def same(one, other):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)

    same(sum(losses) / world, expected)
    assert losses == without_gradients
    if world > 1:
        assert losses[0] != losses[1]  # each is its own images'
    # as DDP would average them; each rank's vectors are its own
    for name, parts, gradient in zip(NAMES, gradients, expected_gradients, strict=False):
        same(torch.cat(parts) / world if name in NAMES[:2] else sum(parts) / world, gradient)


@pytest.mark.parametrize("name", WRONG)
def test_all_ranks_refuse_what_one_gets_wrong(found, name):
    _, here, elsewhere = WRONG[name]
    for rank in range(3):
        assert found[rank]["threw"][name].startswith(here if rank == 1 else elsewhere)
    assert found[0]["afterwards"] > 0  # nobody waits for what was refused


def test_softmax_of_many_processes_keeps_digits_at_any_temperature(found):
    for rank in range(2):
        assert found[rank]["sure pairs"].item() == pytest.approx(math.log1p(math.exp(-8)), rel=1e-3)
    for rank in range(4):
        assert found[rank]["cold"].item() == pytest.approx(math.exp(12), rel=1e-6)


@pytest.mark.parametrize("name", ["chunked_sigmoid_loss", "ring_softmax_loss"])
def test_all_ranks_refuse_what_a_contender_gets_wrong_on_one(found, name):
    said = [found[rank]["threw"][name] for rank in range(3)]
    refused = "the arguments of rank 1 were refused there"
    assert said == [refused, "chunk=0 must be at least 1", refused]


def test_an_uneven_batch_is_told_what_to_do(found):
    assert found[2]["threw"]["uneven batch"].endswith("so leave out an uneven last batch")


def test_half_precision_is_added_up_in_float32(found):
    loss, d_image, d_text = found[0]["bfloat16"]
    assert loss.dtype == torch.float32
    assert d_image.dtype == d_text.dtype == torch.bfloat16
    # every pair has the same logit
    logit = 3 * math.e + 1
    expected = 11 * math.log1p(math.exp(logit)) + math.log1p(math.exp(-logit))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


class Paused:
    """In the place of an exchange: it notes when it is begun and when it is waited for."""

    def __init__(self, log):
        self.log = log

    def wait(self):
        self.log.append("wait")


def test_texts_travel_while_a_block_is_computed_and_few_at_a_time(monkeypatch):
    """One rank's view, its neighbours imitated."""
    log, held = [], []

    def pass_on(parcel, coming, texts, gradient, group):
        coming.part(True, True).zero_()
        log.append("begin")
        held.append(parcel.part(texts, gradient).numel())
        return [Paused(log)]

    def block(*args):
        log.append("compute")
        return torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(ring_loss, "_pass_on", pass_on)
    monkeypatch.setattr(loss_pairs, "sigmoid_loss_block", block)
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
    x = torch.ones(8, 2)
    ring_loss._loss_and_gradients(Pairs(x, x, S, S), True, 4, None)
    step = ["begin", "compute", "compute", "wait"]
    assert log == step * 6 + ["begin", "wait"]
    one = 4 * 2 * 4  # bytes of four texts, or of their gradient
    # the first texts have nothing with them, and at the last rank of each round only the gradient goes on
    assert held == [one, 2 * one, one, 2 * one, 2 * one, one, one]


class Blocks(TorchDispatchMode):
    """Counts how many tensors of a size are held together at most; views of one count once."""

    def __init__(self, nbytes):
        super().__init__()
        self.nbytes, self.known, self.most = nbytes, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() == self.nbytes:
            storage = out.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.known.add(storage.data_ptr())
                weakref.finalize(storage, self.known.discard, storage.data_ptr())
                self.most = max(self.most, len(self.known))
        return out


def test_softmax_frees_a_block_before_it_takes_the_next(monkeypatch):
    """One rank of one: a block's logits and one matrix beside them, in either turn."""
    for name, value in (("get_rank", 0), ("get_world_size", 1), ("all_reduce", None)):
        monkeypatch.setattr(dist, name, lambda *args, value=value, **kwargs: value)
    x = F.normalize(torch.randn(96, 2), dim=1)
    with Blocks(32 * 32 * 4) as held:
        ring_softmax._loss_and_gradients(x, x, S, True, 32, None)
    assert held.most == 2


def test_without_a_group_it_says_what_is_missing():
    with pytest.raises(ValueError, match="init_process_group"):
        ring_sigmoid_loss(X, X, S, S)


def test_scale_and_bias_as_transformers_stores_them(found):
    for rank in range(3):
        assert torch.equal(found[rank]["as transformers stores them"], found[rank]["afterwards"])
