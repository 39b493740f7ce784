"""The losses: the whole matrix of logits in float64 is the oracle."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from siglip_lib import measure
from siglip_lib.siglip import loss_block, loss_pairs, softmax_blocks
from siglip_lib.siglip.loss_block import sigmoid_loss_block
from siglip_lib.siglip.losses import (
    plain_sigmoid_loss,
    plain_softmax_loss,
    sigmoid_loss,
    softmax_loss,
)

HALF = (torch.float16, torch.bfloat16)
NAMES = ("image", "text", "logit_scale", "logit_bias")
either_loss = pytest.mark.parametrize("loss", [sigmoid_loss, softmax_loss])


def draw(b, m, d, dtype=torch.float64, device="cpu", scale=1.3, bias=-2.0):
    """Random vectors of length 1, logit_scale and logit_bias, all to be learned."""
    # around one direction, so that the products' sum is far from 0
    image, text = (
        F.normalize(torch.randn(n, d, dtype=torch.float64, device=device) + 0.5, dim=1)
        for n in (b, m)
    )
    scalars = (torch.tensor(x, dtype=torch.float32, device=device) for x in (scale, bias))
    if dtype == torch.float64:
        scalars = (x.double() for x in scalars)
    return tuple(x.requires_grad_() for x in (image.to(dtype), text.to(dtype), *scalars))


def learned_by(loss, arguments):
    return arguments[: 4 if loss is sigmoid_loss else 3]


def loss_and_gradients(loss, arguments, *others, incoming=1.0, **options):
    value = loss(*arguments, *others, **options)
    gradients = torch.autograd.grad(value, arguments, torch.full_like(value, incoming))
    names = NAMES[: len(arguments)]
    return {"loss": value.detach()} | dict(zip(names, gradients, strict=True))


def in_float64(arguments):
    return tuple(x.detach().double().requires_grad_() for x in arguments)


def assert_equal_to_rounding(found, expected, tolerance=1e-13):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype == torch.float64
        assert found[name].shape == value.shape
        scale = max(1, value.abs().max().item())
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


CASES = {  # images, texts, their ids
    "one pair": (1, 1, None, None),
    "diagonal": (8, 8, None, None),
    "diagonal by ids": (4, 4, [7, -3, 9, 0], [7, -3, 9, 0]),
    "several positives": (7, 7, [0, 1, 0, 2, 3, 1, 0], [1, 0, 0, 5, 3, 3, 1]),
    "more images": (9, 4, [0, 1, 2, 3, 3, 2, 1, 0, 0], [0, 1, 2, 3]),
    "more texts": (3, 8, [4, 5, 6], [6, 6, 5, 1, 4, 4, 4, 2]),
    "no positive": (3, 2, [1, 2, 3], [4, 5]),
    "all positive": (3, 2, [1, 1, 1], [1, 1]),
}


@pytest.mark.parametrize("chunk", [1, 2, 3, 8, None])
@pytest.mark.parametrize("case", CASES)
def test_is_the_plain_form(case, chunk, device):
    b, m, *ids = CASES[case]
    ids = [None if x is None else torch.tensor(x, device=device) for x in ids]
    arguments = draw(b, m, 5, device=device)
    found = loss_and_gradients(sigmoid_loss, arguments, *ids, chunk=chunk, incoming=-3.7)
    assert_equal_to_rounding(
        found, loss_and_gradients(plain_sigmoid_loss, arguments, *ids, incoming=-3.7)
    )
    assert sigmoid_loss(*(x.detach() for x in arguments), *ids, chunk=chunk) == found["loss"]


@given(
    b=st.integers(1, 6),
    m=st.integers(1, 6),
    d=st.integers(1, 4),
    chunk=st.integers(1, 7),
    kinds=st.integers(1, 4),
    scale=st.floats(-3, 5),
    bias=st.floats(-200, 200),
    seed=st.integers(0, 2**16),
)
def test_is_the_plain_form_for_any_shape_ids_and_scale(b, m, d, chunk, kinds, scale, bias, seed):
    torch.manual_seed(seed)
    arguments = draw(b, m, d, scale=scale, bias=bias)
    ids = [torch.randint(kinds, (n,), dtype=torch.int32) for n in (b, m)]
    found = loss_and_gradients(sigmoid_loss, arguments, *ids, chunk=chunk)
    assert_equal_to_rounding(found, loss_and_gradients(plain_sigmoid_loss, arguments, *ids))


def test_gradcheck():
    arguments = draw(3, 4, 2)
    ids = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 2, 0])
    assert torch.autograd.gradcheck(lambda *x: sigmoid_loss(*x, *ids, chunk=2), arguments)


def test_at_the_papers_start():
    b = 6
    eye = torch.eye(b, dtype=torch.float64)
    start = torch.tensor(10.0, dtype=torch.float64).log(), torch.tensor(-10.0, dtype=torch.float64)
    # right pairs have logit 0, the others -10
    expected = math.log(2) + (b - 1) * math.log1p(math.exp(-10))
    assert sigmoid_loss(eye, eye, *start).item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("sure", [40.0, 18.0, -25.0, -60.0, -750.0])
def test_sure_pairs_keep_their_digits(sure):
    image = torch.tensor([[1.0], [-1.0]], dtype=torch.float64, requires_grad=True)
    text = math.copysign(1, sure) * image.detach()
    scale = torch.tensor(abs(sure), dtype=torch.float64).log()
    loss = sigmoid_loss(image, text, scale, torch.zeros_like(scale))
    loss.backward()
    # all four pairs have z * logit = sure, and both texts pull or push an image the same way
    small = math.exp(-abs(sure))
    expected = 2 * (max(0, -sure) + math.log1p(small))
    torch.testing.assert_close(loss.item(), expected, rtol=1e-14, atol=0)
    slope = (small if sure > 0 else 1) / (1 + small)
    expected = torch.tensor([[-sure], [sure]], dtype=torch.float64) * slope
    torch.testing.assert_close(image.grad, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_sums_in_float32(dtype):
    arguments = draw(60, 60, 16, dtype, scale=3.0, bias=-8.0)
    found = loss_and_gradients(sigmoid_loss, arguments, chunk=25)
    expected = loss_and_gradients(plain_sigmoid_loss, in_float64(arguments))
    assert found["loss"].dtype == torch.float32
    torch.testing.assert_close(found["loss"].double(), expected["loss"], rtol=1e-6, atol=0)
    for name, argument in zip(NAMES, arguments, strict=True):
        assert found[name].dtype == argument.dtype
        scale = expected[name].abs().max().item()
        # what float32 sums may lose, and one rounding to the dtype in the end
        rounding = 0 if argument.dtype == torch.float32 else torch.finfo(dtype).eps / 2
        torch.testing.assert_close(
            found[name].double(), expected[name], rtol=rounding, atol=2e-6 * scale
        )


@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_scale_and_bias_of_another_dtype(dtype):
    image, text, *scalars = draw(5, 5, 4, torch.float32)
    scalars = [x.detach().to(dtype).requires_grad_() for x in scalars]
    found = loss_and_gradients(sigmoid_loss, (image, text, *scalars))
    assert [found[name].dtype for name in NAMES] == [torch.float32] * 2 + [dtype] * 2
    assert found["loss"].dtype == torch.float32


def test_a_scalers_factor_comes_before_the_rounding():
    image, text, scale, bias = draw(4, 4, 3, torch.float16, bias=-22.0)
    ids = torch.arange(4), torch.arange(4, 8)  # no positives: gradients below what float16 holds
    exact = in_float64((image, text, scale, bias))
    exact = loss_and_gradients(plain_sigmoid_loss, exact, *ids)["text"]
    assert 0 < exact.abs().max() < 2e-8
    scaled = loss_and_gradients(sigmoid_loss, (image, text, scale, bias), *ids, incoming=2.0**20)
    torch.testing.assert_close(scaled["text"].double(), exact * 2**20, rtol=1e-3, atol=1e-7)


@either_loss
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_autocast_changes_nothing(dtype, loss, device):
    arguments = learned_by(loss, draw(7, 7, 5, dtype, device))
    expected = loss_and_gradients(loss, arguments)
    with torch.autocast(device.type, torch.bfloat16):
        value, unrecorded = loss(*arguments), loss(*(x.detach() for x in arguments))
    gradients = torch.autograd.grad(value, arguments)
    assert value.dtype == torch.float32
    assert value == unrecorded == expected["loss"]
    assert all(torch.equal(x, expected[name]) for name, x in zip(NAMES, gradients, strict=False))


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_nan_in_nan_out(name, ids):
    arguments = draw(5, 5, 3)
    with torch.no_grad():
        arguments[NAMES.index(name)].view(-1)[-1] = math.nan
    ids = (torch.arange(5), torch.arange(5)) if ids else ()
    found = loss_and_gradients(sigmoid_loss, arguments, *ids, chunk=2)
    assert found["loss"].isnan()
    assert found["logit_scale"].isnan()
    assert sigmoid_loss(*(x.detach() for x in arguments), *ids).isnan()


@either_loss
def test_only_what_is_learned_gets_a_gradient(loss):
    arguments = learned_by(loss, draw(5, 5, 3))
    expected = loss_and_gradients(loss, arguments)
    for kept, name in enumerate(NAMES[: len(arguments)]):
        some = [x.detach().requires_grad_(i == kept) for i, x in enumerate(arguments)]
        loss(*some).backward()
        assert torch.equal(some[kept].grad, expected[name])
        assert all(x.grad is None for i, x in enumerate(some) if i != kept)


@either_loss
def test_backward_twice_and_second_derivatives(loss):
    arguments = learned_by(loss, draw(3, 3, 2))
    value = loss(*arguments)
    first = torch.autograd.grad(value, arguments, retain_graph=True)
    incoming = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    second = torch.autograd.grad(value, arguments, incoming, create_graph=True)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second[0].sum().backward()


# --- what it holds and what it runs ---


class Recorder(TorchDispatchMode):
    """Counts matrix products and notes the number of elements of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", [False, True])
def test_holds_blocks_only(ids, dtype):
    b, m, d, chunk = (96, 72, 3, 15) if ids else (96, 96, 3, 15)
    arguments = draw(b, m, d, dtype)
    ids = (torch.randint(9, (b,)), torch.randint(9, (m,))) if ids else ()
    with Recorder() as seen:
        loss = sigmoid_loss(*arguments, *ids, chunk=chunk)
        loss.backward()
    assert seen.largest == max(b * d, chunk * chunk)  # a thirtieth of b * m
    with Recorder() as seen:
        plain_sigmoid_loss(*arguments, *ids).backward()
    assert seen.largest == b * m  # the recorder sees such a tensor where there is one


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_softmax_holds_blocks_only(dtype):
    b, d, chunk = 96, 3, 15
    arguments = draw(b, b, d, dtype)[:3]
    with Recorder() as seen:
        softmax_loss(*arguments, chunk=chunk).backward()
    assert seen.largest == max(b * d, chunk * chunk)
    with Recorder() as seen:
        plain_softmax_loss(*arguments).backward()
    assert seen.largest == b * b


@either_loss
def test_default_block(loss):
    side = 4096
    arguments = learned_by(loss, draw(side + 4, side + 4, 2, torch.float32))
    with Recorder() as seen:
        loss(*(x.detach() for x in arguments))
    assert seen.largest == side**2
    assert 4 * side**2 == 64 * 2**20


@pytest.mark.parametrize(("loss", "of_block"), [(sigmoid_loss, 3), (softmax_loss, 4)])
def test_forms_gradients_in_the_forward_pass_and_only_if_recorded(loss, of_block):
    """One product for the logits and two for the gradients; softmax makes the logits twice."""
    arguments = learned_by(loss, draw(7, 7, 5))
    blocks = 3 * 3
    with Recorder() as forward:
        recorded = loss(*arguments, chunk=3)
    with Recorder() as backward:
        recorded.backward()
    assert (forward.products, backward.products) == (of_block * blocks, 0)
    with Recorder() as seen, torch.no_grad():
        value = loss(*arguments, chunk=3)
    assert (seen.products, value.requires_grad, value) == (blocks, False, recorded)
    with Recorder() as seen:
        loss(*(x.detach() for x in arguments), chunk=3)
    assert seen.products == blocks


@pytest.mark.parametrize("offset", range(-5, 7))
def test_a_block_with_any_diagonal(offset):
    image, text, *scalars = (x.detach() for x in draw(4, 6, 3))
    positive = torch.arange(4)[:, None] + offset == torch.arange(6)
    results = []
    for given_ in (offset, positive):
        sums = torch.full_like(image, 0.5), torch.full_like(text, 0.5)
        results.append((*sigmoid_loss_block(image, text, *scalars, given_, sums), *sums))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    without = sigmoid_loss_block(image, text, *scalars, offset, None)
    assert torch.equal(without[0], results[0][0])


def test_blocks_of_texts_that_come_around_make_the_whole():
    """As several GPUs would do it: each keeps its images, and the texts with their sums pass by."""
    image, text, logit_scale, logit_bias = draw(6, 6, 3)
    expected = loss_and_gradients(sigmoid_loss, (image, text, logit_scale, logit_bias))
    with torch.no_grad():
        scale = logit_scale.exp()
        d_image, d_text = torch.zeros_like(image), torch.zeros_like(text)
        loss = d_bias = 0
        for step in range(3):
            for i in range(0, 6, 2):
                j = (i + 2 * step) % 6
                one, other = slice(i, i + 2), slice(j, j + 2)
                sums = d_image[one], d_text[other]
                got = sigmoid_loss_block(image[one], text[other], scale, logit_bias, i - j, sums)
                loss, d_bias = loss + got[0] / 6, d_bias + got[1] / 6
        found = {
            "loss": loss,
            "image": d_image * scale / 6,
            "text": d_text * scale / 6,
            "logit_scale": scale * (d_image * image).sum() / 6,
            "logit_bias": d_bias,
        }
    assert_equal_to_rounding(found, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
@pytest.mark.parametrize("bias", [-2.0, -20.0])
def test_a_block_in_half_precision(bias, dtype, tolerance, monkeypatch):
    """What runs on a GPU, with its matrix product imitated."""

    def product(a, b):
        assert a.dtype == b.dtype == dtype
        return a.float() @ b.float()

    monkeypatch.setattr(loss_block, "product", product)
    image, text, logit_scale, logit_bias = draw(40, 50, 16, dtype, bias=bias)
    ids = torch.arange(40) % 30, torch.arange(50) + 15
    exact = loss_and_gradients(
        plain_sigmoid_loss, in_float64((image, text, logit_scale, logit_bias)), *ids
    )
    with torch.no_grad():
        scale = logit_scale.exp()
        sums = torch.zeros(40, 16), torch.zeros(50, 16)
        positive = ids[0][:, None] == ids[1]
        loss, d_bias = sigmoid_loss_block(image, text, scale, logit_bias, positive, sums)
        torch.testing.assert_close(loss.double() / 40, exact["loss"], rtol=1e-6, atol=0)
        torch.testing.assert_close(d_bias.double() / 40, exact["logit_bias"], rtol=1e-3, atol=0)
        for found, name in zip(sums, ("image", "text"), strict=True):
            assert distance(found * scale / 40, exact[name]) < tolerance
        # the first ten images and the last twenty texts have negatives only: tiny derivatives, and not lost
        assert distance(sums[0][:10] * scale / 40, exact["image"][:10]) < tolerance
        assert distance(sums[1][30:] * scale / 40, exact["text"][30:]) < tolerance


def distance(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


# --- compiled ---


@pytest.mark.parametrize(
    ("loss", "ids"), [(sigmoid_loss, False), (sigmoid_loss, True), (softmax_loss, False)]
)
def test_compiled_code_keeps_it_whole(loss, ids, device):
    ids = (torch.arange(5, device=device), torch.zeros(5, device=device).long()) if ids else ()
    arguments = learned_by(loss, draw(5, 5, 3, device=device))
    torch.compiler.reset()  # one function may be compiled eight times
    graphs = []

    def keep(graph, _):
        inner = [x for x in graph.modules() if isinstance(x, torch.fx.GraphModule)]
        graphs.append("\n".join(str(x.graph) for x in inner))
        return graph

    def call(*given_):
        return 2 * loss(*given_, *ids, chunk=2)

    expected = loss_and_gradients(call, arguments)
    for backend in (keep, "aot_eager"):
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        found = loss_and_gradients(compiled, arguments)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        with torch.no_grad():
            assert compiled(*arguments) == expected["loss"]
    assert len(graphs) == 2
    name = f"siglip_lib.{loss.__name__}"
    assert all(name in graph and "mm" not in graph for graph in graphs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_the_operators_are_what_they_say(with_gradients, dtype, device):
    image, text, *scalars = (x.detach() for x in draw(5, 4, 3, dtype, device))
    ids = [torch.arange(n, device=device) for n in (5, 4)]
    given_ = {
        "sigmoid_loss": (image, text, *scalars, *ids),
        "softmax_loss": (image[:4], text, scalars[0]),
    }
    for name, arguments in given_.items():
        torch.library.opcheck(
            getattr(torch.ops.siglip_lib, name).default,
            (*arguments, 2, with_gradients),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("with_gradients", [False, True])
def test_the_operators_results_are_contiguous_as_compiled_code_expects(with_gradients, device):
    image, text, *scalars = (x.detach() for x in draw(5, 5, 3, device=device))
    image, text = image.t().contiguous().t(), text.t().contiguous().t()  # columns lie together
    operators, options = torch.ops.siglip_lib, (2, with_gradients)
    results = (*operators.sigmoid_loss(image, text, *scalars, None, None, *options),)
    results += operators.softmax_loss(image, text, scalars[0], *options)
    assert all(x.is_contiguous() for x in results)


# --- refused ---

X, S, I = torch.ones(4, 3), torch.tensor(0.0), torch.arange(4)  # noqa: E741
RIGHT = {"image": X, "text": X, "logit_scale": S, "logit_bias": S}


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"image": [[1.0]]}, TypeError, "image must be a tensor (B, D), not list"),
        (
            {"image": X.long()},
            TypeError,
            "image is torch.int64; it must be of float16, bfloat16, float32, float64",
        ),
        (
            {"image": X[0]},
            ValueError,
            "image has shape (3,); it must be (B, D), each at least 1; image[None] makes a batch of one",
        ),
        (
            {"text": X[None]},
            ValueError,
            "text has shape (1, 4, 3); it must be (M, 3), each at least 1",
        ),
        (
            {"image": X[:0]},
            ValueError,
            "image has shape (0, 3); it must be (B, D), each at least 1",
        ),
        (
            {"text": X[:, :0]},
            ValueError,
            "text has shape (4, 0); it must be (M, 3), each at least 1",
        ),
        (
            {"text": X[:, :2]},
            ValueError,
            "text has shape (4, 2); it must be (M, 3), each at least 1",
        ),
        (
            {"text": X.double()},
            TypeError,
            "text is torch.float64; it must be torch.float32, as image is",
        ),
        (
            {"text": X.to("meta")},
            ValueError,
            "text is on meta; it must be on cpu, as image is",
        ),
        ({"text": X[:3]}, ValueError, "text has 3 rows; without ids it must have 4, as image has"),
        ({"logit_scale": 1.0}, TypeError, "logit_scale must be a tensor () or (1,), not float"),
        (
            {"logit_scale": S.expand(2)},
            ValueError,
            "logit_scale has shape (2,); it must be () or (1,)",
        ),
        (
            {"logit_scale": S.long()},
            TypeError,
            "logit_scale is torch.int64; it must be of float16, bfloat16, float32, float64",
        ),
        (
            {"logit_scale": S.to("meta")},
            ValueError,
            "logit_scale is on meta; it must be on cpu, as image is",
        ),
        ({"logit_bias": None}, TypeError, "logit_bias must be a tensor () or (1,), not NoneType"),
        (
            {"logit_bias": S.expand(4)},
            ValueError,
            "logit_bias has shape (4,); it must be () or (1,)",
        ),
        ({"image_ids": I}, ValueError, "text_ids=None must be given, as the other ids are"),
        ({"text_ids": I}, ValueError, "image_ids=None must be given, as the other ids are"),
        (
            {"image_ids": I, "text_ids": I[:3]},
            ValueError,
            "text_ids has shape (3,); it must be (4,)",
        ),
        (
            {"image_ids": I[:, None], "text_ids": I},
            ValueError,
            "image_ids has shape (4, 1); it must be (4,)",
        ),
        (
            {"image_ids": [0, 1, 2, 3], "text_ids": I},
            TypeError,
            "image_ids must be a tensor (4,), not list",
        ),
        (
            {"image_ids": I, "text_ids": I.float()},
            TypeError,
            "text_ids is torch.float32; it must be of integers",
        ),
        (
            {"image_ids": I.bool(), "text_ids": I},
            TypeError,
            "image_ids is torch.bool; it must be of integers",
        ),
        (
            {"image_ids": I, "text_ids": I.to("meta")},
            ValueError,
            "text_ids is on meta; it must be on cpu, as image is",
        ),
        ({"chunk": 0}, ValueError, "chunk=0 must be at least 1"),
        ({"chunk": -3}, ValueError, "chunk=-3 must be at least 1"),
        ({"chunk": 2.0}, TypeError, "chunk=2.0 must be an int, not float"),
    ],
)
def test_wrong_arguments(wrong, error, message):
    with Recorder() as seen, pytest.raises(error) as caught:
        sigmoid_loss(**(RIGHT | wrong))
    assert str(caught.value) == message
    assert seen.largest == 0  # nothing was computed


# --- softmax ---


def both_ways(image, text, logit_scale):
    logits = logit_scale.exp() * image @ text.t()
    return -sum(logits.log_softmax(dim).diagonal().mean() for dim in (0, 1)) / 2


@pytest.mark.parametrize("b", [1, 2, 7, 8])
def test_softmax_is_the_plain_form(b, device):
    arguments = draw(b, b, 5, device=device)[:3]
    plain = loss_and_gradients(plain_softmax_loss, arguments, incoming=-2.3)
    assert_equal_to_rounding(loss_and_gradients(both_ways, arguments, incoming=-2.3), plain)
    for chunk in {1, 2, 3, max(1, b - 1), b, b + 1, None}:
        found = loss_and_gradients(softmax_loss, arguments, chunk=chunk, incoming=-2.3)
        assert_equal_to_rounding(found, plain)
        assert softmax_loss(*(x.detach() for x in arguments), chunk=chunk) == found["loss"]


@given(
    b=st.integers(1, 7),
    d=st.integers(1, 4),
    chunk=st.integers(1, 8),
    scale=st.floats(-40, 7),
    seed=st.integers(0, 2**16),
)
def test_softmax_is_the_plain_form_for_any_shape_and_scale(b, d, chunk, scale, seed):
    torch.manual_seed(seed)
    arguments = draw(b, b, d, scale=scale)[:3]
    found = loss_and_gradients(softmax_loss, arguments, chunk=chunk)
    # logits of size t are rounded by t * eps, and so are the gradients, relative to their bound t
    tolerance = 1e-13 + 4 * math.exp(scale) * torch.finfo(torch.float64).eps
    expected = loss_and_gradients(plain_softmax_loss, arguments)
    for name, value in expected.items():
        bound = max(1.0, math.exp(scale)) ** (name != "loss")
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * bound)


def test_softmax_gradcheck():
    assert torch.autograd.gradcheck(lambda *x: softmax_loss(*x, chunk=2), draw(3, 3, 2)[:3])


def test_softmax_both_ways():
    # image 0 likes both texts alike, text 0 likes image 0 more: rows and columns differ
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    text = torch.tensor([[1.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    rows = (math.log(2) + math.log1p(math.exp(-3))) / 2
    columns = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 2
    for loss in (softmax_loss, plain_softmax_loss):
        found = loss(image, text, torch.tensor(0.0, dtype=torch.float64))
        assert found.item() == pytest.approx((rows + columns) / 2, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("scale", [12.0, 8.0, -30.0])
def test_softmax_at_any_temperature(scale, chunk, dtype):
    # each image likes its neighbour's text best, which comes early or late in its row: one logit of t, the others 0
    image, text = torch.eye(4, dtype=dtype), torch.eye(4, dtype=dtype)[[1, 0, 3, 2]]
    arguments = [x.requires_grad_() for x in (image, text, torch.tensor(scale, dtype=dtype))]
    found = loss_and_gradients(softmax_loss, arguments, chunk=chunk)
    t = math.exp(scale)  # exp(t) is more than float64 holds
    assert found["loss"].item() == pytest.approx(t + math.log1p(3 * math.exp(-t)), rel=1e-6)
    # the products are exact; t, exp and a few sums are rounded
    eps = torch.finfo(dtype).eps
    for name, value in loss_and_gradients(plain_softmax_loss, in_float64(arguments)).items():
        largest = value.abs().max().item()
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=8 * eps * largest)


def test_softmax_keeps_the_digits_of_sure_pairs():
    # logits 4100 and 4092; float32 has nothing between 4100 and 4100.0005, and the loss is less
    image = torch.tensor([[64.0, 2.0], [64.0, -2.0]])
    loss = softmax_loss(image, image, torch.tensor(0.0), chunk=1)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-8)), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_softmax_in_float32(dtype):
    arguments = draw(60, 60, 16, dtype, scale=3.0)[:3]
    expected = loss_and_gradients(plain_softmax_loss, in_float64(arguments))
    for loss, options in ((softmax_loss, {"chunk": 25}), (plain_softmax_loss, {})):
        found = loss_and_gradients(loss, arguments, **options)
        assert found["loss"].dtype == torch.float32
        torch.testing.assert_close(found["loss"].double(), expected["loss"], rtol=1e-6, atol=0)
        for name, argument in zip(NAMES[:3], arguments, strict=True):
            assert found[name].dtype == argument.dtype
            largest = expected[name].abs().max().item()
            # float32 logits up to t = 20 are rounded by t * eps / 2, and the dtype's rounding comes last
            rounding = 0 if argument.dtype == torch.float32 else torch.finfo(dtype).eps / 2
            torch.testing.assert_close(
                found[name].double(), expected[name], rtol=rounding, atol=2.4e-6 * largest
            )


@pytest.fixture
def gpu_products(monkeypatch):
    """Half precision runs as on a GPU, with its matrix product imitated."""

    def product(a, b):
        assert a.dtype == b.dtype
        return a.float() @ b.float()

    for module in (loss_block, softmax_blocks):
        monkeypatch.setattr(module, "product", product)
    monkeypatch.setattr(loss_pairs, "product_dtype", lambda x: x.dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_softmax_in_half_precision(dtype, tolerance, gpu_products):
    arguments = draw(50, 50, 16, dtype, scale=math.log(30))[:3]
    exact = loss_and_gradients(plain_softmax_loss, in_float64(arguments))
    found = loss_and_gradients(softmax_loss, arguments, chunk=20)
    torch.testing.assert_close(found["loss"].double(), exact["loss"], rtol=1e-6, atol=0)
    for name in NAMES[:3]:
        assert distance(found[name], exact[name]) < tolerance, name


def test_softmax_of_sure_pairs_in_float16(gpu_products):
    """Derivatives of 4e-8 keep their digits, and one of 1 is not too large for their unit."""
    image = torch.eye(40, dtype=torch.float16)
    text = image.clone()
    text[:2] = text[[1, 0]]  # two pairs are surely wrong
    arguments = *(x.requires_grad_() for x in (image, text)), torch.tensor(17.0).log()
    loss = softmax_loss(*arguments, chunk=16)
    found = torch.autograd.grad(loss, arguments[:2], torch.tensor(2.0**14))
    exact = in_float64(arguments)
    exact = torch.autograd.grad(2**14 * plain_softmax_loss(*exact), exact[:2])
    rows, columns = torch.triu_indices(40, 40, 1)[:, 100:]  # without the wrong pairs
    for x, wanted in zip(found, exact, strict=True):
        assert distance(x[:2], wanted[:2]) < 1e-3
        tiny = wanted[rows, columns]
        assert 0 < tiny.max() < 17 * 2**14 / 40 * 5e-8
        torch.testing.assert_close(x[rows, columns].double(), tiny, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", NAMES[:3])
def test_softmax_nan_in_nan_out(name):
    arguments = draw(5, 5, 3)[:3]
    with torch.no_grad():
        arguments[NAMES.index(name)].view(-1)[-1] = math.nan
    found = loss_and_gradients(softmax_loss, arguments, chunk=2)
    assert found["loss"].isnan()
    assert found["logit_scale"].isnan()
    assert softmax_loss(*(x.detach() for x in arguments)).isnan()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"image": [[1.0]]}, TypeError, "image must be a tensor (B, D), not list"),
        ({"image": X.long()}, TypeError, "image is torch.int64; it must be of float16"),
        ({"image": X[:0]}, ValueError, "image has shape (0, 3); it must be (B, D)"),
        ({"text": X[:, :2]}, ValueError, "text has shape (4, 2); it must be (M, 3)"),
        ({"text": X.half()}, TypeError, "text is torch.float16; it must be torch.float32"),
        ({"text": X.to("meta")}, ValueError, "text is on meta; it must be on cpu, as image is"),
        ({"text": X[:3]}, ValueError, "text has 3 rows; it must have 4, as image has"),
        (
            {"logit_scale": S.expand(2)},
            ValueError,
            "logit_scale has shape (2,); it must be () or (1,)",
        ),
        ({"chunk": 0}, ValueError, "chunk=0 must be at least 1"),
        ({"chunk": True}, TypeError, "chunk=True must be an int, not bool"),
    ],
)
def test_softmax_wrong_arguments(wrong, error, message):
    with Recorder() as seen, pytest.raises(error) as caught:
        softmax_loss(**({"image": X, "text": X, "logit_scale": S} | wrong))
    assert message in str(caught.value)
    assert seen.largest == 0


@either_loss
def test_scale_and_bias_may_be_vectors_of_one_number(loss):
    arguments = learned_by(loss, draw(5, 5, 8, torch.float32))
    expected = loss_and_gradients(loss, arguments)
    as_vectors = [*arguments[:2], *(x.detach()[None].requires_grad_() for x in arguments[2:])]
    found = loss_and_gradients(loss, as_vectors)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.shape == ((1,) if name.startswith("logit") else expected[name].shape)
        assert torch.equal(value.squeeze(), expected[name]), name


# --- on a GPU ---


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_half_precision_on_a_gpu(dtype, tolerance, ids, gpu):
    arguments = draw(500, 500, 64, dtype, gpu, scale=math.log(10), bias=-10.0)
    ids = torch.randint(300, (2, 500), device=gpu) if ids else ()
    exact = loss_and_gradients(plain_sigmoid_loss, in_float64(arguments), *ids)
    for chunk in (136, 77, None):
        found = loss_and_gradients(sigmoid_loss, arguments, *ids, chunk=chunk)
        torch.testing.assert_close(found["loss"].double(), exact["loss"], rtol=1e-5, atol=0)
        for name, argument in zip(NAMES, arguments, strict=True):
            assert found[name].dtype == argument.dtype
            assert distance(found[name], exact[name]) < tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_softmax_in_half_precision_on_a_gpu(dtype, tolerance, gpu):
    arguments = draw(500, 500, 64, dtype, gpu, scale=math.log(30))[:3]
    exact = loss_and_gradients(plain_softmax_loss, in_float64(arguments))
    for chunk in (136, 77, None):
        found = loss_and_gradients(softmax_loss, arguments, chunk=chunk)
        torch.testing.assert_close(found["loss"].double(), exact["loss"], rtol=1e-5, atol=0)
        for name, argument in zip(NAMES[:3], arguments, strict=True):
            assert found[name].dtype == argument.dtype
            assert distance(found[name], exact[name]) < tolerance, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_waits_for_nothing_and_repeats_itself_on_a_gpu(dtype, gpu):
    arguments = draw(700, 700, 64, dtype, gpu)
    ids = torch.randint(300, (2, 700), device=gpu)
    for loss, given_ids in ((sigmoid_loss, ()), (sigmoid_loss, ids), (softmax_loss, ())):
        call = partial(loss_and_gradients, loss, learned_by(loss, arguments), *given_ids, chunk=200)
        first = call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(first[name], second[name]) for name in first)


@either_loss
def test_in_a_cuda_graph(loss, gpu):
    arguments = draw(300, 300, 64, torch.bfloat16, gpu)
    fresh = draw(300, 300, 64, torch.bfloat16, gpu, scale=0.7, bias=-3.0)
    ids = torch.randint(200, (2, 300), device=gpu) if loss is sigmoid_loss else ()

    def call():
        return loss_and_gradients(loss, learned_by(loss, arguments), *ids, chunk=128)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        for x, new in zip(arguments, fresh, strict=True):
            x.copy_(new)
    graph.replay()
    expected = call()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


def test_a_tenth_of_the_memory_on_a_gpu(gpu):
    arguments = draw(16384, 16384, 64, torch.bfloat16, gpu)

    def peak(loss, learned=arguments):
        return measure(
            lambda: loss_and_gradients(loss, learned), gpu, repeats=1, warmup=1
        ).peak_bytes

    def in_bfloat16(image, text, logit_scale, logit_bias):
        """The plain form at its smallest: no matrix of it in float32."""
        return plain_sigmoid_loss(image, text, logit_scale.bfloat16(), logit_bias.bfloat16())

    assert 10 * peak(sigmoid_loss) < peak(in_bfloat16)
    assert 10 * peak(softmax_loss, arguments[:3]) < peak(plain_softmax_loss, arguments[:3])
