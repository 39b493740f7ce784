"""The attention kernels of other packages, which are pretended here: no test has them."""

import importlib.metadata
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from siglip_lib.classroom import opponents
from siglip_lib.classroom.opponents import OPPONENTS

NAMES = ("flash-attn 3", "flash-attn 4")
names = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def install(monkeypatch):
    """A function that pretends packages, and a CUDA device of a compute capability."""
    monkeypatch.setattr(opponents, "_fine", set())
    found = importlib.metadata.version

    def pretend(versions, capability=(9, 0), attention=None):
        def version(package):
            if package in versions:
                return versions[package]
            if package in ("fa3-fwd", "flash-attn-4"):
                raise importlib.metadata.PackageNotFoundError(package)
            return found(package)

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        module = SimpleNamespace(flash_attn_func=attention)
        for opponent in OPPONENTS.values():
            monkeypatch.setitem(sys.modules, opponent.module, module)
        opponents._function.cache_clear()

    yield pretend
    opponents._function.cache_clear()


BOTH = {"fa3-fwd": "0.0.3", "flash-attn-4": "4.0.0b36"}


def test_they_are_no_backends_and_one_has_no_gradients():
    assert tuple(OPPONENTS) == NAMES
    assert [OPPONENTS[name].has_backward for name in NAMES] == [False, True]


@names
def test_a_missing_package_is_told_with_the_line_that_installs_it(name, install):
    install({})
    opponent = OPPONENTS[name]
    reason = f"not installed: pip install {opponent.package}=={opponent.version}"
    assert opponent.why_not("cuda", torch.bfloat16, 72) == reason
    assert opponent.operator == ""
    with pytest.raises(ValueError, match=r"^not installed: pip install"):
        opponent(*torch.zeros(3, 1, 2, 1, 8))


def test_flash_attn_2_with_a_module_of_that_name_is_not_taken_for_4(install):
    install({"flash-attn": "2.8.3"}, attention=lambda *qkv: pytest.fail("was called"))
    assert OPPONENTS["flash-attn 4"].why_not("cuda", torch.bfloat16, 72).startswith("not installed")


@names
def test_the_installed_version_is_named(name, install):
    install(dict.fromkeys(BOTH, "9.9"))
    assert OPPONENTS[name].operator == f"{OPPONENTS[name].package} 9.9"


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "head_dim", "reason"),
    [
        ("flash-attn 3", (9, 0), torch.bfloat16, 72, None),
        ("flash-attn 3", (9, 0), torch.float16, 72, "needs bfloat16, not float16"),
        ("flash-attn 3", (8, 0), torch.bfloat16, 72, "needs compute capability 9.0, not 8.0"),
        ("flash-attn 3", (10, 0), torch.bfloat16, 72, "needs compute capability 9.0, not 10.0"),
        ("flash-attn 4", (9, 0), torch.float16, 256, None),
        ("flash-attn 4", (10, 0), torch.bfloat16, 8, None),
        ("flash-attn 4", (9, 0), torch.float32, 72, "needs bfloat16 or float16, not float32"),
        ("flash-attn 4", (8, 9), torch.bfloat16, 72, "needs compute capability 9.0 or newer, not 8.9"),
        ("flash-attn 4", (9, 0), torch.bfloat16, 60, "a multiple of 8 up to 256, not 60"),
        ("flash-attn 3", (9, 0), torch.bfloat16, 264, "a multiple of 8 up to 256, not 264"),
        ("flash-attn 3", (9, 0), torch.bfloat16, 0, "a multiple of 8 up to 256, not 0"),
    ],
)  # fmt: skip
def test_reasons(name, capability, dtype, head_dim, reason, install):
    install(BOTH, capability)
    found = OPPONENTS[name].why_not(torch.device("cuda", 0), dtype, head_dim)
    assert found == reason if reason is None else found.endswith(reason)


@names
def test_a_cpu_is_refused_before_any_call(name, install):
    install(BOTH, attention=lambda *qkv: pytest.fail("was called"))
    with pytest.raises(ValueError, match=r"^needs a CUDA device, not cpu$"):
        OPPONENTS[name](*torch.zeros(3, 1, 2, 1, 8))


@pytest.mark.parametrize("form", ["an output", "a tuple"])
@names
def test_the_output_is_returned_alone(name, form, install):
    calls = []

    def attention(q, k, v):
        calls.append([tuple(x.shape) for x in (q, k, v)])
        return q + 10 * k + 100 * v if form == "an output" else (q + 10 * k + 100 * v, None)

    install(BOTH, attention=attention)
    q, k, v = torch.randn(3, 1, 2, 3, 8).bfloat16()
    opponent = OPPONENTS[name]
    # the check has no CUDA tensors to look at; what it found is all that a call asks for
    opponents._fine.add((opponent.package, q.device, q.dtype, 8))
    assert torch.equal(opponent(q, k, v), q + 10 * k + 100 * v)
    assert calls == [[(1, 2, 3, 8)] * 3]


def eager(q, k, v, softmax_scale=None):
    """Attention as the packages have it, and the logsumexp that some return beside."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    s = scale * torch.einsum("bqhd, bkhd -> bhqk", q, k)
    return torch.einsum("bhqk, bkhd -> bqhd", s.softmax(-1), v), s.logsumexp(-1)


@pytest.mark.parametrize(("dim", "filled"), [(64, 64), (72, 96), (80, 96), (128, 128), (8, 32)])
@pytest.mark.parametrize("learned", [(), ("q",), ("k",), ("v",), ("q", "k", "v")])
@names
def test_heads_are_filled_up_where_gradients_would_be_wrong(name, learned, dim, filled, install):
    widths = []

    def attention(q, k, v, softmax_scale=None):
        widths.append([x.shape[-1] for x in (q, k, v)])
        return eager(q, k, v, softmax_scale)

    install(BOTH, attention=attention)
    opponent = OPPONENTS[name]
    inputs = dict(zip("qkv", torch.randn(3, 2, 5, 3, dim, dtype=torch.float64), strict=True))
    for x in learned:
        inputs[x].requires_grad_()
    opponents._fine.add((opponent.package, inputs["q"].device, torch.float64, dim))
    found, (wanted, _) = opponent(**inputs), eager(**inputs)
    padded = name == "flash-attn 4" and learned
    assert widths == [[filled if padded else dim] * 3]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    if learned:
        leaves = [inputs[x] for x in learned]
        incoming = torch.randn_like(wanted)
        gradients = (torch.autograd.grad(x, leaves, incoming) for x in (found, wanted))
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
        with torch.no_grad():
            opponent(**inputs)
        assert widths[1] == [dim] * 3  # the forward pass alone has its own kernel


def test_what_is_missing_is_asked_for_again_and_what_ran_is_not(install, monkeypatch):
    install({}, attention=lambda q, k, v: v)
    opponent, x = OPPONENTS["flash-attn 4"], torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match="not installed"):
        opponent(x, x, x)
    asked = []
    monkeypatch.setattr(opponents.Opponent, "why_not", lambda *case: asked.append(case))
    for _ in range(3):
        opponent(x, x, x)
    assert asked == [(opponent, x.device, x.dtype, 8)]


def test_an_error_of_the_package_reaches_the_caller(install):
    def attention(q, k, v):
        raise AssertionError("head_dim 8 is not supported")

    install(BOTH, attention=attention)
    opponent, x = OPPONENTS["flash-attn 4"], torch.zeros(1, 2, 1, 8)
    opponents._fine.add((opponent.package, x.device, x.dtype, 8))
    with pytest.raises(AssertionError, match="head_dim 8 is not supported"):
        opponent(x, x, x)


def test_a_package_that_cannot_be_imported_says_so(install, monkeypatch):
    install(BOTH)
    broken = replace(OPPONENTS["flash-attn 4"], module="no_such_opponent")
    monkeypatch.setattr(opponents.Opponent, "why_not", lambda *case: None)
    with pytest.raises(ModuleNotFoundError, match="no_such_opponent"):
        broken(*torch.zeros(3, 1, 2, 1, 8))
