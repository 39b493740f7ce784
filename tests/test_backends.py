"""attend against a float64 einsum, and what attention_backends says of who can run."""

import importlib.util
import math
import subprocess
import sys
import time
import timeit
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from siglip_lib import (
    Attention,
    AttentionPoolLatent,
    VisionTransformer,
    attend,
    attention_backends,
    choose_backend,
)
from siglip_lib.backends import BackendStatus, attend_packed, dispatch, is_large, table, trials
from siglip_lib.backends.table import BACKENDS, Backend

NAMES = ("triton", "cudnn", "flash_attn", "sdpa", "xformers", "eager", "hopper")
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)
EAGER = BACKENDS["eager"]


@pytest.fixture(autouse=True)
def _forget_what_ran():
    trials.runs.clear()
    yield
    trials.runs.clear()


@pytest.fixture
def broken_cudnn(monkeypatch):
    """A backend that nothing speaks against until it is tried."""

    def run(*_):
        raise RuntimeError("\nno kernel image\nand much else")

    entry = Backend(run, lambda case: None, lambda *_: "cuDNN")
    monkeypatch.setitem(BACKENDS, "cudnn", entry)


@pytest.fixture
def tried_cudnn(monkeypatch):
    """A backend that nothing speaks against, and that runs; what it was given."""
    tried = []

    def run(*arguments):
        tried.append(arguments)
        return EAGER.run(*arguments)

    entry = Backend(run, lambda case: None, lambda *_: "cuDNN")
    monkeypatch.setitem(BACKENDS, "cudnn", entry)
    return tried


def reference(q, k, v, scale):
    """Softmax attention in float64."""
    q, k, v = q.double(), k.double(), v.double()
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) * scale).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def heads(layout, batch, tokens, keys, n_heads, head_dim, dtype, device="cpu"):
    """Random q, k and v (B, N, heads, head_dim) that lie in memory as ``layout`` says."""
    if layout == "packed":
        packed = torch.randn(batch, tokens, 3, n_heads, head_dim, device=device).to(dtype)
        return packed.unbind(2)
    if layout == "heads first":
        shapes = [(batch, n_heads, n, head_dim) for n in (tokens, keys, keys)]
        return tuple(torch.randn(s, device=device).to(dtype).transpose(1, 2) for s in shapes)
    shapes = [(batch, 2 * n, n_heads, head_dim) for n in (tokens, keys, keys)]
    return tuple(torch.randn(s, device=device).to(dtype)[:, ::2] for s in shapes)


def tolerance(dtype):
    return 20 * torch.finfo(dtype).eps


def usable(device, dtype, head_dim, **options):
    found = attention_backends(device, dtype, head_dim, **options)
    return [name for name, status in found.items() if status.usable]


@given(
    layout=st.sampled_from(["packed", "heads first", "every other token"]),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 9),
    keys=st.integers(1, 9),
    n_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 8, 16, 72]),
    dtype=st.sampled_from(DTYPES),
    scale=st.none() | st.sampled_from([1.0, 0.3]),
)
def test_usable_backends_agree_with_float64(
    layout, batch, tokens, keys, n_heads, head_dim, dtype, scale
):
    q, k, v = heads(layout, batch, tokens, keys, n_heads, head_dim, dtype)
    expected = reference(q, k, v, head_dim**-0.5 if scale is None else scale)
    for name in ("auto", *usable("cpu", dtype, head_dim)):
        out = attend(q, k, v, backend=name, scale=scale)
        assert out.dtype == dtype
        torch.testing.assert_close(
            out.double(), expected, rtol=0, atol=tolerance(dtype) * v.abs().max().item()
        )


@pytest.mark.parametrize("layout", ["packed", "heads first", "every other token"])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpu_backends_agree_with_float64(dtype, head_dim, layout, gpu):
    inputs = heads(layout, 2, 37, 37, 3, head_dim, dtype, gpu)
    expected = [x.double().detach().requires_grad_() for x in inputs]
    out = reference(*expected, head_dim**-0.5)
    out.square().sum().backward()
    for name in usable(gpu, dtype, head_dim, packed=layout == "packed"):
        found = [x.detach().requires_grad_() for x in inputs]
        attended = attend(*found, backend=name)
        attended.square().sum().backward()
        pairs = zip(
            (attended, *(x.grad for x in found)), (out, *(x.grad for x in expected)), strict=True
        )
        for ours, theirs in pairs:
            limit = 2 * tolerance(dtype) * theirs.abs().max().item()
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=limit, msg=name)


def test_gpu_has_cudnn_and_what_is_installed(gpu):
    found = attention_backends(gpu, torch.bfloat16, 72)
    assert found["cudnn"].usable, found["cudnn"].reason
    assert found["cudnn"].operator.startswith("cuDNN ")
    for name in ("flash_attn", "xformers"):
        installed = importlib.util.find_spec(name) is not None
        assert found[name].usable == installed, found[name].reason
        assert bool(found[name].operator) == installed
    assert usable(gpu, torch.float32, 72)[0] == "sdpa"


@pytest.mark.parametrize("name", NAMES)
def test_one_token_on_a_gpu(name, gpu):
    q, k, v = heads("packed", 2, 1, 1, 3, 64, torch.bfloat16, gpu)
    status = attention_backends(gpu, torch.bfloat16, 64, tokens=1)[name]
    if status.usable:
        torch.testing.assert_close(attend(q, k, v, backend=name), v)
    else:
        with pytest.raises(ValueError, match=f"backend='{name}' cannot run here"):
            attend(q, k, v, backend=name)


def test_one_token_is_its_own_value(device):
    q, k, v = heads("packed", 2, 1, 1, 3, 8, torch.float32, device)
    torch.testing.assert_close(attend(q, k, v), v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_dropout_drops_at_its_rate_and_rescales(p, dtype, device):
    # equal weights over N ones: the mean of what is kept, times 1 / (1 - p)
    n = 512
    q, v = (
        torch.zeros(2, n, 1, 64, dtype=dtype, device=device),
        torch.ones(2, n, 1, 64, dtype=dtype, device=device),
    )
    for name in usable(device, dtype, 64, dropout=p):
        sums = attend(q, q, v, backend=name, dropout=p)[..., 0].double()
        assert sums.mean().item() == pytest.approx(1, abs=0.01), name
        assert sums.std().item() == pytest.approx(math.sqrt(p / (1 - p) / n), rel=0.15), name


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_deterministic_backends_repeat_every_bit(dropout, device):
    def gradients(name, dtype):
        torch.manual_seed(1)
        packed = torch.randn(2, 99, 3, 2, 64, device=device).to(dtype).requires_grad_()
        attend(
            *packed.unbind(2), backend=name, deterministic=True, dropout=dropout
        ).square().sum().backward()
        return packed.grad

    for dtype in (torch.bfloat16, torch.float32):
        names = usable(device, dtype, 64, dropout=dropout, deterministic=True)
        assert "eager" in names
        for name in names:
            first = gradients(name, dtype)
            assert all(torch.equal(gradients(name, dtype), first) for _ in range(2)), name


def test_statuses_on_a_cpu():
    found = attention_backends("cpu", torch.float32, 64)
    assert set(found) == set(NAMES)
    assert found["cudnn"] == BackendStatus("cudnn", False, "", "needs a CUDA device, not cpu")
    assert found["eager"] == BackendStatus("eager", True, "matmul, softmax, matmul", "")
    assert found["sdpa"].usable
    assert found["sdpa"].operator.startswith("torch ")
    assert usable("cpu", torch.float16, 72, dropout=0.1, deterministic=True) == ["sdpa", "eager"]


def test_statuses_on_the_meta_device():
    assert usable("meta", torch.bfloat16, 64) == ["sdpa", "eager"]
    out = attend(*torch.empty(1, 5, 3, 2, 8, device="meta").unbind(2))
    assert out.shape == (1, 5, 2, 8)
    assert out.is_meta


def test_a_package_that_is_missing_or_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = attention_backends("cpu", torch.bfloat16, 64)
    assert found["flash_attn"].reason == "the package flash-attn is not installed"
    assert found["xformers"].reason == "the package xformers is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    found = attention_backends("cpu", torch.bfloat16, 64)
    assert found["flash_attn"].reason == "needs a CUDA device, not cpu"
    assert found["xformers"].reason == "needs a CUDA device, not cpu"


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Enough of a GPU, and of packages for it, to ask what speaks against them."""
    found = importlib.util.find_spec
    there = ("flash_attn", "xformers", "triton")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name in there else found(name)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "deterministic", "reason"),
    [
        ("cudnn", torch.float32, 64, False, "needs float16 or bfloat16, not float32"),
        ("cudnn", torch.float16, 64, True, "torch gives no way to ask cuDNN for a deterministic"),
        ("triton", torch.float32, 64, False, "needs float16 or bfloat16, not float32"),
        ("triton", torch.float16, 48, False, "needs a head_dim of 64, 72, 80, 96, 128, not 48"),
        ("flash_attn", torch.float32, 64, False, "needs float16 or bfloat16, not float32"),
        ("flash_attn", torch.float16, 36, False, "a multiple of 8 up to 256, not 36"),
        ("flash_attn", torch.float16, 264, False, "a multiple of 8 up to 256, not 264"),
        ("xformers", torch.float16, 64, True, "it offers no deterministic backward pass"),
        ("sdpa", torch.float32, 64, True, "its kernels add gradients in an order that varies"),
    ],
)
def test_reasons_on_a_gpu(name, dtype, head_dim, deterministic, reason, pretended_gpu):
    found = attention_backends(pretended_gpu, dtype, head_dim, deterministic=deterministic)
    assert not found[name].usable
    assert reason in found[name].reason
    assert found[name].operator == ""


@pytest.mark.parametrize("capability", [(8, 6), (10, 0), (12, 0)])
def test_hopper_takes_its_own_gpu_alone(capability, pretended_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = attention_backends(pretended_gpu, torch.bfloat16, 72)
    assert found["hopper"].reason == "needs a GPU of compute capability 9.0 (Hopper)"


def test_hopper_is_chosen_where_attention_is_large(pretended_gpu, monkeypatch):
    monkeypatch.setattr(trials, "_try", lambda *_: None)
    assert choose_backend("auto", pretended_gpu, torch.bfloat16, 72) == "hopper"
    assert choose_backend("hopper", pretended_gpu, torch.bfloat16, 72) == "hopper"
    with pytest.raises(ValueError, match="head_dim of 64, 72, 80, 96, 128, not 48"):
        choose_backend("hopper", pretended_gpu, torch.bfloat16, 48)
    with pytest.raises(ValueError, match="needs q, k and v in one tensor"):
        choose_backend("hopper", pretended_gpu, torch.bfloat16, 72, packed=False)


@pytest.mark.parametrize("head_dim", [8, 72, 256])
def test_flash_attn_takes_every_multiple_of_8(head_dim, pretended_gpu):
    found = attention_backends(pretended_gpu, torch.float16, head_dim)
    assert "head_dim" not in found["flash_attn"].reason  # without a real GPU its trial says another


def test_triton_takes_no_dropout_and_no_parts_from_here_and_there(pretended_gpu):
    for options, reason in (
        ({"dropout": 0.1}, "has no dropout"),
        ({"packed": False}, "needs q, k and v in one tensor"),
    ):
        found = attention_backends(pretended_gpu, torch.float16, 64, **options)
        assert reason in found["triton"].reason


@pytest.mark.parametrize(
    ("head_dim", "large", "long", "first"),
    [
        (64, True, False, "triton"),
        (72, True, False, "triton"),
        (72, True, True, "cudnn"),
        (72, False, False, "cudnn"),
        (128, True, False, "cudnn"),
    ],
)
def test_which_auto_prefers(head_dim, large, long, first):
    found = list(attention_backends("cpu", torch.float32, head_dim, large=large, long=long))
    assert found[0] == first
    assert found[1:] == [name for name in NAMES if name != first]


@pytest.mark.parametrize(
    ("capability", "head_dim", "work", "first"),
    [
        ((9, 0), 72, {}, ["hopper", "triton"]),
        ((9, 0), 72, {"long": True}, ["hopper", "cudnn"]),
        ((9, 0), 128, {}, ["hopper", "cudnn"]),
        ((9, 0), 72, {"large": False}, ["cudnn"]),
        ((9, 0), 72, {"packed": False}, ["triton"]),
        ((10, 0), 72, {}, ["triton"]),
        ((8, 0), 72, {"long": True}, ["cudnn"]),
    ],
)
def test_which_auto_prefers_on_a_gpu(capability, head_dim, work, first, pretended_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = list(attention_backends(pretended_gpu, torch.bfloat16, head_dim, **work))
    assert found == [*first, *(name for name in NAMES if name not in first)]


def test_packed_is_the_same_as_its_parts(device):
    packed = torch.randn(2, 33, 3, 2, 72, device=device, dtype=torch.float16)
    for name in usable(device, torch.float16, 72):
        together, apart = (packed.clone().requires_grad_() for _ in range(2))
        out = attend_packed(together, backend=name)
        expected = attend(*apart.unbind(2), backend=name)
        assert torch.equal(out, expected), name
        (out * packed[:, :, 0]).sum().backward()
        (expected * packed[:, :, 0]).sum().backward()
        torch.testing.assert_close(together.grad, apart.grad, msg=name)


def test_packed_needs_its_shape():
    with pytest.raises(ValueError, match=r"qkv has shape \(2, 5, 8\); it must be"):
        attend_packed(torch.zeros(2, 5, 8))


def test_what_lies_packed(gpu):
    packed = torch.zeros(2, 5, 3, 2, 64, device=gpu)
    q, k, v = packed.unbind(2)
    assert dispatch._lie_packed(q, k, v)
    assert dispatch._lie_packed(*(x.detach() for x in (q, k, v)))
    assert not dispatch._lie_packed(q, v, k)
    assert not dispatch._lie_packed(q, k, k)
    assert not dispatch._lie_packed(q[:, :3], k[:, :3], v[:, :3])
    assert not dispatch._lie_packed(q.clone(), k.clone(), v.clone())


@pytest.mark.parametrize(
    ("batch", "tokens", "head_dim", "large"),
    [
        (64, 729, 72, True),
        (8, 729, 64, True),
        (8, 512, 72, False),  # 9.7e9 FLOP, level
        (1, 729, 80, False),
        (64, 1023, 72, True),
        (64, 1024, 72, True),
    ],
)
def test_what_is_large(batch, tokens, head_dim, large):
    assert is_large((batch, tokens, 16, head_dim)) is large


def test_auto_takes_triton_where_it_was_fastest(gpu):
    options = {"packed": True, "large": True}
    assert choose_backend("auto", gpu, torch.bfloat16, 72, **options) == "triton"
    assert choose_backend("auto", gpu, torch.bfloat16, 128, **options) == "cudnn"
    assert choose_backend("auto", gpu, torch.bfloat16, 128, 0.0, True, **options) == "triton"


def test_flash_attn_needs_ampere(pretended_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    found = attention_backends(pretended_gpu, torch.float16, 64)
    assert "compute capability 8.0 (Ampere) or newer" in found["flash_attn"].reason


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = attention_backends("cuda", torch.bfloat16, 64)
    assert found["cudnn"].reason == "needs a CUDA device, and torch sees none"


def test_auto_passes_over_a_backend_that_fails_its_trial(broken_cudnn):
    assert attention_backends("cpu", torch.float32, 8)["cudnn"].reason == "no kernel image"
    assert choose_backend("auto", torch.device("cpu"), torch.float32, 8) == "sdpa"
    q, k, v = heads("packed", 1, 4, 4, 1, 8, torch.float32)
    torch.testing.assert_close(attend(q, k, v), attend(q, k, v, backend="eager"))


def test_auto_tries_none_after_the_first_that_can_run(monkeypatch):
    entry = Backend(
        lambda *_: pytest.fail("was tried"), lambda case: pytest.fail("was asked"), lambda *_: ""
    )
    for name in ("xformers", "eager"):
        monkeypatch.setitem(BACKENDS, name, entry)
    assert choose_backend("auto", torch.device("cpu"), torch.float32, 8) == "sdpa"


def test_a_trial_without_memory_is_an_error_and_not_remembered(monkeypatch):
    free = []

    def run(q, *_):
        if not free:
            raise torch.OutOfMemoryError("no memory")
        return q

    entry = Backend(run, lambda case: None, lambda *_: "cuDNN")
    monkeypatch.setitem(BACKENDS, "cudnn", entry)
    with pytest.raises(torch.OutOfMemoryError):
        attention_backends("cpu", torch.float32, 8)
    free.append(True)
    assert attention_backends("cpu", torch.float32, 8)["cudnn"].usable


def test_a_forced_backend_that_cannot_run_names_the_reason(broken_cudnn):
    q, k, v = heads("packed", 1, 4, 4, 1, 8, torch.float32)
    with pytest.raises(
        ValueError,
        match=r"backend='cudnn' cannot run here: no kernel image\. Usable: auto, sdpa, eager",
    ):
        attend(q, k, v, backend="cudnn")


def test_forced_and_automatic_choice():
    cpu = torch.device("cpu")
    assert choose_backend("eager", cpu, torch.float32, 8) == "eager"
    assert choose_backend("auto", cpu, torch.float32, 8, 0.1, True) == "sdpa"
    with pytest.raises(ValueError, match="backend='cudnn' cannot run here: needs a CUDA device"):
        choose_backend("cudnn", cpu, torch.float32, 8)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_says_so_when_none_can_run(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("sdpa", "eager"):
        entry = Backend(None, lambda case: "is switched off", None)
        monkeypatch.setitem(BACKENDS, name, entry)
    with pytest.raises(ValueError, match="is switched off"):
        choose_backend("auto", torch.device(device), torch.float32, 8)


def test_integers_are_refused_with_a_reason():
    q, k, v = torch.ones(1, 4, 3, 1, 8, dtype=torch.int64).unbind(2)
    with pytest.raises((TypeError, ValueError), match="dtype"):
        attend(q, k, v)


def test_trials_leave_the_random_numbers_and_the_modes_alone():
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert usable("cpu", torch.float32, 24, dropout=0.1) == ["sdpa", "eager"]
    assert torch.equal(torch.get_rng_state(), before)


def test_each_case_is_tried_once(tried_cudnn):
    for dropout in (0.1, 0.2, 0.3):
        attention_backends("cpu", torch.float32, 8, dropout)
    assert len(tried_cudnn) == 1


X = torch.zeros(2, 5, 3, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: attend(X[0], X, X),
            ValueError,
            "q, k, v have shapes (5, 3, 8), (2, 5, 3, 8), (2, 5, 3, 8); all must be (B, N",
        ),
        (lambda: attend(X, X[0], X[0]), ValueError, "all must be (B, N, heads, head_dim)"),
        (lambda: attend(X, X, X[:, :4]), ValueError, "all must be (B, N, heads, head_dim)"),
        (lambda: attend(X[:1], X, X), ValueError, "all must be (B, N, heads, head_dim)"),
        (lambda: attend(X[:, :, :2], X, X), ValueError, "all must be (B, N, heads, head_dim)"),
        (lambda: attend(X[..., :4], X, X), ValueError, "all must be (B, N, heads, head_dim)"),
        (
            lambda: attend(X.double(), X, X),
            TypeError,
            "q, k, v have dtypes torch.float64, torch.float32, torch.float32; they must",
        ),
        (lambda: attend(X, X, X.half()), TypeError, "they must be the same"),
        (lambda: attend(X, X, X, dropout=1.0), ValueError, "dropout=1.0 must lie in [0, 1)"),
        (
            lambda: attend(X, X, X, backend="flash"),
            ValueError,
            "backend='flash' is unknown; allowed are auto, triton, cudnn, flash_attn, sdpa, xformers, eager",
        ),
        (
            lambda: attention_backends("cpu", "float32", 8),
            TypeError,
            "dtype='float32' must be a torch.dtype",
        ),
        (
            lambda: attention_backends("cpu", torch.float32, 0),
            ValueError,
            "head_dim=0 must be at least 1",
        ),
        (
            lambda: attention_backends("cpu", torch.float32, 8, -1),
            ValueError,
            "dropout=-1 must lie in [0, 1)",
        ),
        (
            lambda: attention_backends("cpu", torch.float32, 8, tokens=0),
            ValueError,
            "tokens=0 must be at least 1",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


# --- what is remembered, and when nothing is tried ---


def loss(q):
    return attend(q, q, q).square().sum()


Q = torch.linspace(-1, 1, 2 * 5 * 3 * 8).view(2, 5, 3, 8)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda: torch.func.grad(loss)(Q),
        lambda: torch.func.vmap(loss)(Q[None]),
        lambda: torch.func.vmap(torch.func.grad(loss))(Q[None]),
        lambda: torch.func.jvp(loss, (Q,), (Q,)),
        lambda: torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(Q),
    ],
    ids=["grad", "vmap", "vmap of grad", "jvp", "grad of grad"],
)
def test_transforms_run_first_and_leave_no_verdict(transformed):
    transformed()
    torch.testing.assert_close(attend(Q, Q, Q), attend(Q, Q, Q, backend="eager"))
    assert choose_backend("auto", torch.device("cpu"), torch.float32, 8) == "sdpa"


def test_transforms_give_the_right_derivatives():
    def by_hand(q):
        return reference(q, q, q, 8**-0.5).square().sum()

    x = Q.double()
    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(transform(loss)(x[:, :2]), transform(by_hand)(x[:, :2]))
    (_, slope), (_, expected) = (torch.func.jvp(f, (x,), (x + 1,)) for f in (loss, by_hand))
    torch.testing.assert_close(slope, expected)


def test_forward_mode_differentiation_takes_eager():
    with forward_ad.dual_level():
        loss(forward_ad.make_dual(Q, Q))


@contextmanager
def tracing():
    def run(x):
        given.append(choose_backend("auto", torch.device("cpu"), torch.float32, 8))
        return x

    given = []
    torch.jit.trace(run, (torch.zeros(1),), check_trace=False)
    yield given.pop()


@contextmanager
def mode():
    with FakeTensorMode():
        yield choose_backend("auto", torch.device("cpu"), torch.float32, 8)


@pytest.mark.parametrize("observer", [tracing, mode])
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_nothing_is_tried_or_remembered_where_somebody_looks(observer, tried_cudnn):
    with observer() as name:
        assert name == "cudnn"
    assert not tried_cudnn
    assert not trials.runs
    assert choose_backend("auto", torch.device("cpu"), torch.float32, 8) == "cudnn"
    assert len(tried_cudnn) == 1


def test_nothing_is_tried_while_a_graph_is_recorded(tried_cudnn, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose_backend("auto", torch.device("cpu"), torch.float32, 8) == "cudnn"
    assert not tried_cudnn
    assert not trials.runs


def test_eager_and_the_cpus_sdpa_are_never_tried(monkeypatch):
    monkeypatch.setattr(trials, "_try", lambda *_: pytest.fail("was tried"))
    assert usable("cpu", torch.float32, 8, dropout=0.1) == ["sdpa", "eager"]
    attend(Q, Q, Q)


def test_what_a_trial_met_is_not_a_verdict(monkeypatch):
    broken = [RuntimeError("the weather")]

    def run(*arguments):
        if broken:
            raise broken.pop()
        return EAGER.run(*arguments)

    entry = Backend(run, lambda case: None, lambda *_: "cuDNN")
    monkeypatch.setitem(BACKENDS, "cudnn", entry)
    with pytest.raises(ValueError, match="backend='cudnn' cannot run here: the weather"):
        attend(Q, Q, Q, backend="cudnn")
    attend(Q, Q, Q, backend="cudnn")


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_want_of_memory_by_any_name_is_an_error(error, monkeypatch):
    def run(*_):
        raise error

    entry = Backend(run, lambda case: None, lambda *_: "cuDNN")
    monkeypatch.setitem(BACKENDS, "cudnn", entry)
    with pytest.raises(RuntimeError, match=str(error)):
        choose_backend("auto", torch.device("cpu"), torch.float32, 8)
    assert not trials.runs


def test_auto_does_not_try_again_what_it_passed_over(monkeypatch):
    tried = []

    def run(*_):
        tried.append(1)
        raise RuntimeError("no kernel image")

    entry = Backend(run, lambda case: None, lambda *_: "cuDNN")
    monkeypatch.setitem(BACKENDS, "cudnn", entry)
    for _ in range(3):
        assert choose_backend("auto", torch.device("cpu"), torch.float32, 8) == "sdpa"
    assert len(tried) == 1


def test_first_calls_of_many_threads(monkeypatch):
    inside = []

    def run(*arguments):
        inside.append(1)
        time.sleep(0.02)
        assert len(inside) == 1
        inside.clear()
        warnings.warn("said while trying", stacklevel=1)
        return EAGER.run(*arguments)

    entry = Backend(run, lambda case: None, lambda *_: "cuDNN")
    monkeypatch.setitem(BACKENDS, "cudnn", entry)
    filters = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        cpu, dims = torch.device("cpu"), [8, 16, 24, 32] * 4
        names = pool.map(lambda dim: choose_backend("auto", cpu, torch.float32, dim), dims)
        assert list(names) == ["cudnn"] * 16
    assert warnings.filters == filters


FIRST = """
import os, sys, traceback
import torch
import torch.nn.functional as F
from siglip_lib import VisionTransformer

assert "torch._dynamo" not in sys.modules
for use in sys.argv[1:]:  # a process each, in which nothing was used before
    child = os.fork()
    if child == 0:
        try:
            model = VisionTransformer(
                16, 8, embed_dim=16, depth=1, num_heads=2, class_token=False, global_pool="map"
            ).eval()
            x = torch.randn(2, 3, 16, 16)
            torch.testing.assert_close(eval(use)(model, x), model(x))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""
FIRST_USES = {
    "export": "lambda m, x: torch.export.export(m, (x,)).module()(x)",
    "strict export": "lambda m, x: torch.export.export(m, (x,), strict=True).module()(x)",
    "compile": "lambda m, x: torch.compile(m, fullgraph=True, backend='aot_eager')(x)",
    "dynamic compile": "lambda m, x: torch.compile(m, fullgraph=True, dynamic=True, backend='aot_eager')(x)",
    "trace": "lambda m, x: torch.jit.trace(m, (x,))(x)",
}


@pytest.fixture(scope="module")
def first_uses() -> tuple[dict[str, str], str]:
    """How the process of each use ended, and what all of them said."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST, *FIRST_USES.values()],
        capture_output=True,
        text=True,
    )
    return dict(zip(FIRST_USES, done.stdout.splitlines(), strict=False)), done.stderr


@pytest.mark.parametrize("use", FIRST_USES)
def test_the_first_use_of_a_process(first_uses, use):
    ended, said = first_uses
    assert ended.get(use) == "0", said


@pytest.mark.parametrize("pool", [{"global_pool": "map"}, {"global_pool": ""}, {"qk_norm": True}])
# PatchEmbed compares sizes, which the tracer tells
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_traced_tower_gives_the_same(pool):
    options = {"global_pool": "avg", "class_token": False} | pool
    tower = VisionTransformer(16, 8, embed_dim=16, depth=2, num_heads=2, **options).eval()
    traced = torch.jit.trace(tower, (torch.randn(2, 3, 16, 16),))
    x = torch.randn(3, 3, 16, 16)  # the batch is not part of the trace
    torch.testing.assert_close(traced(x), tower(x))


@pytest.mark.parametrize("module", [Attention(16, 2), AttentionPoolLatent(16, 2, feat_size=5)])
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_has_nothing_to_warn_of(module):
    traced = torch.jit.trace(module.eval(), (torch.randn(2, 5, 16),))
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(traced(x), module(x))
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 15\); it must be \(B, N, 16\)"):
        torch.jit.trace(module, (torch.randn(2, 5, 15),))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(device):
    with FakeTensorMode():
        packed = torch.empty(64, 729, 3, 16, 72, dtype=torch.bfloat16, device=device)
        for out in (attend_packed(packed), attend(*packed.unbind(2))):
            assert out.shape == (64, 729, 16, 72)
            assert out.device.type == device
    assert not trials.runs


# --- scales, and many tokens ---


@pytest.mark.parametrize("scale", [-0.125, -0.3, 0.0, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_finite_scale(scale, dtype, device):
    packed = torch.randn(2, 37, 3, 2, 64, device=device).to(dtype)
    q, k, v = packed.unbind(2)
    expected = reference(q, k, v, scale)
    for name in ("auto", *usable(device, dtype, 64, scale=scale)):
        limit = tolerance(dtype) * v.abs().max().item()
        for out in (
            attend(q, k, v, backend=name, scale=scale),
            attend_packed(packed, backend=name, scale=scale),
        ):
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=limit, msg=name)


def test_no_kernel_is_given_a_scale_of_0_or_less(monkeypatch):
    given = []
    run = lambda *arguments: given.append(arguments[4]) or EAGER.run(*arguments)  # noqa: E731
    entry = Backend(run, EAGER.why_not, EAGER.operator, sure=EAGER.sure)
    monkeypatch.setitem(BACKENDS, "eager", entry)
    q = Q.clone().requires_grad_()
    for scale in (-0.5, 0.0, 2):
        out = attend(q, Q, Q, backend="eager", scale=scale)
        (found,) = torch.autograd.grad(out.square().sum(), q)
        (expected,) = torch.autograd.grad(reference(q, Q, Q, scale).square().sum(), q)
        torch.testing.assert_close(found, expected)
    assert given == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scales_that_are_not_finite(scale):
    for call in (
        lambda: attend(Q, Q, Q, scale=scale),
        lambda: attend_packed(torch.stack([Q] * 3, 2), scale=scale),
        lambda: attention_backends("cpu", torch.float32, 8, scale=scale),
    ):
        with pytest.raises(ValueError, match=f"scale={scale} must be finite"):
            call()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scale": -0.125}, "needs a scale above 0"),
        ({"scale": 0}, "needs a scale above 0"),
        ({"tokens": 16_385}, "needs at most 16,384 tokens"),
    ],
)
def test_auto_passes_over_triton_where_its_kernel_refuses(
    options, reason, pretended_gpu, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    arguments = (pretended_gpu, torch.float16, 64)
    assert attention_backends(*arguments, **options)["triton"].reason == reason
    with FakeTensorMode():  # nothing is tried
        assert choose_backend("auto", *arguments) == "triton"
        chosen = choose_backend("auto", *arguments, deterministic=True, **options)
        # flash-attn can be imported only where it is more than pretended to be there
        assert chosen in ("flash_attn", "eager")
        with pytest.raises(ValueError, match=f"backend='triton' cannot run here: {reason}"):
            choose_backend("triton", *arguments, **options)


def test_what_torch_func_cannot_transform(pretended_gpu):
    def ask(x):
        found.update(attention_backends(pretended_gpu, torch.float16, 64))
        return x.sum()

    found = {}
    torch.func.grad(ask)(Q)
    assert next(iter(found)) == "eager"
    for name in ("triton", "flash_attn", "xformers"):
        assert found[name].reason == "its operator can't be transformed by torch.func"


# --- what a call costs in Python ---


def plain_sdpa(q, k, v):
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2)


def cost_ratio(call, plain):
    """The shortest times of both, measured in turn: what else runs on the machine lengthens the others."""
    best = [math.inf, math.inf]
    for _ in range(600):
        for i, function in enumerate((call, plain)):
            best[i] = min(best[i], timeit.timeit(function, number=10))
    return best[0] / best[1]


@pytest.mark.parametrize("packed", [False, True])
def test_a_call_costs_little_more_than_plain_sdpa(packed):
    qkv = torch.randn(1, 4, 3, 2, 8)
    q, k, v = qkv.unbind(2)
    if packed:
        call, plain = (lambda: attend_packed(qkv, scale=0.3)), lambda: plain_sdpa(*qkv.unbind(2))
    else:
        call, plain = (lambda: attend(q, k, v, scale=0.3)), lambda: plain_sdpa(q, k, v)
    assert torch.equal(call(), plain())
    ratios = []
    while not ratios or (ratios[-1] > 1.5 and len(ratios) < 5):
        ratios.append(cost_ratio(call, plain))
    assert min(ratios) <= 1.5, ratios


@pytest.mark.parametrize("math_allowed", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_cudnn_is_all_that_sdpa_may_take_and_only_for_the_call(fails, math_allowed, monkeypatch):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        expected = sdpa_flags()
    seen = []

    def record(*_):
        seen.append(sdpa_flags())
        if fails:
            raise RuntimeError("no")

    monkeypatch.setattr(table, "_sdpa", record)
    outside = [SDPBackend.FLASH_ATTENTION, *([SDPBackend.MATH] if math_allowed else [])]
    with sdpa_kernel(outside):
        before = sdpa_flags()
        with pytest.raises(RuntimeError) if fails else nullcontext():
            BACKENDS["cudnn"].run(None, None, None, 0.0, 1.0, False)
        assert sdpa_flags() == before != expected
    assert seen == [expected]


def sdpa_flags() -> dict[str, bool]:
    names = ("cudnn", "flash", "mem_efficient", "math", "overrideable")
    return {name: getattr(torch._C, f"_get_{name}_sdp_enabled")() for name in names}
