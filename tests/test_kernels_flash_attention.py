"""The Triton attention against float64: on a GPU as it is, on a CPU small, in Triton's interpreter."""

import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from siglip_lib.base.offers import TRITON_HEAD_DIMS as HEAD_DIMS
from siglip_lib.base.offers import TRITON_MAX_TOKENS as MAX_TOKENS
from siglip_lib.kernels import device as kernel_device
from siglip_lib.kernels import flash_attention as module
from siglip_lib.kernels.flash_attention import flash_attention


def draw(batch, tokens, heads, dim, device, dtype=None, size=1.0):
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    qkv = torch.randn(batch, tokens, 3, heads, dim) * size
    return qkv.to(device, dtype).requires_grad_()


def eager(qkv, scale=None):
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (B, heads, N, head_dim)
    scores = q @ k.transpose(-2, -1) * (qkv.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def results(attention, qkv, pull, **options):
    """The output, and the gradients of q, k and v."""
    out = attention(qkv, **options)
    (gradient,) = torch.autograd.grad(out, qkv, pull.to(out.dtype))
    return dict(zip(("o", "dq", "dk", "dv"), (out.detach(), *gradient.unbind(2)), strict=True))


def assert_good(qkv, attention=flash_attention, **options):
    """flash-attn's criterion: at most twice the error of the plain form in the same dtype, and of a rounding."""
    scale = options.get("scale", qkv.shape[-1] ** -0.5)
    q, k, _ = qkv.detach().double().unbind(2)
    highest = torch.einsum("bnhd,bmhd->bhnm", q, k).abs().max() * scale
    pull = torch.randn(*qkv.shape[:2], *qkv.shape[3:], device=qkv.device)
    exact = results(eager, qkv.detach().double().requires_grad_(), pull, **options)
    plain = results(eager, qkv, pull, **options)
    found = results(attention, qkv, pull, **options)
    for name, wanted in exact.items():
        rounding = (wanted + 0.3 - 0.3 - wanted).abs().max()
        rounding += torch.finfo(qkv.dtype).eps * wanted.abs().max()
        # weights are made from float32 scores: of large ones the last bit counts
        rounding += torch.finfo(torch.float32).eps * highest * wanted.abs().max()
        if name in ("dq", "dk"):
            # the scores' gradient is a difference, of which one side is made of the rounded o
            side = (exact["o"] * pull).abs().sum(-1).max() * scale
            rounding += torch.finfo(qkv.dtype).eps * side * qkv.detach().abs().max()
        allowed = 2 * (plain[name] - wanted).abs().max() + 2 * rounding
        error = (found[name] - wanted).abs().max()
        assert error <= allowed, f"{name}: {error:.2g}, allowed {allowed:.2g}"
        assert found[name].dtype == qkv.dtype


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 1)])
def test_every_kernel_has_blocks_for_what_is_offered(capability):
    blocks = module.blocks_of(capability)
    assert tuple(blocks) == tuple(module.KERNELS)
    assert all(tuple(by_dim) == HEAD_DIMS for by_dim in blocks.values())
    assert all(b.own <= module._ROWS for by_dim in blocks.values() for b in by_dim.values())


@pytest.mark.parametrize("dim", [72, 96, 128])
def test_blocks_of_other_gpus_are_right(dim, device, monkeypatch):
    monkeypatch.setattr(module, "_capability", lambda device: (8, 6))
    assert_good(draw(1, 150, 1, dim, device))


def test_a_launch_asks_its_gpu(monkeypatch, request):
    """The capability of the GPU that the tensor is on, once; Hopper's in the interpreter."""
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: asked.append(i) or (8, i))
    module._capability.cache_clear()
    request.addfinalizer(module._capability.cache_clear)
    assert [module._capability(i) for i in (-1, 6, 0, 6)] == [(9, 0), (8, 6), (8, 0), (8, 6)]
    assert asked == [6, 0]


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_head_dim(dim, device):
    assert_good(draw(1, 70, 2, dim, device))


# one token, less than a tile, all but one, a whole one, one more, and tails of every width
@pytest.mark.parametrize("tokens", [1, 2, 17, 63, 64, 65, 90, 128, 150])
def test_every_number_of_tokens(tokens, device):
    assert_good(draw(1, tokens, 1, 72, device))


@pytest.mark.parametrize(("batch", "heads"), [(3, 1), (1, 3), (2, 2)])
def test_samples_and_heads_keep_apart(batch, heads, device):
    assert_good(draw(batch, 20, heads, 72, device))


@pytest.mark.parametrize("size", [1e-3, 10.0])
def test_small_and_large_scores(size, device):
    assert_good(draw(1, 33, 1, 64, device, size=size))  # scores are the square of it


@pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
def test_any_scale(scale, device):
    assert_good(draw(1, 40, 1, 72, device), scale=scale)


def test_half_precision(device):
    assert_good(draw(1, 81, 2, 72, device, torch.float16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 17, 255, 256, 257, 729, 1024, 4096])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_real_shapes(gpu, dim, tokens, dtype):
    for batch in (1, 3):
        assert_good(draw(batch, tokens, 4, dim, gpu, dtype))
    assert_good(draw(1, tokens, 4, dim, gpu, dtype, size=10.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_bits_ten_times(gpu, dtype):
    qkv = draw(8, 729, 16, 72, gpu, dtype)
    pull = torch.randn(8, 729, 16, 72, device=gpu)
    first = results(flash_attention, qkv, pull)
    for _ in range(9):
        again = results(flash_attention, qkv, pull)
        assert all(torch.equal(again[name], first[name]) for name in first)


def test_writes_every_element_and_nothing_else(device):
    """Memory that was full of NaN before comes back without: nothing was left out."""
    qkv = draw(1, 37, 1, 72, device)
    out = flash_attention(qkv)
    assert out.isfinite().all()
    assert out.is_contiguous()
    (gradient,) = torch.autograd.grad(out.sum(), qkv)  # a gradient that is one number, expanded
    assert gradient.isfinite().all()
    assert gradient.is_contiguous()
    assert gradient.shape == qkv.shape


def test_rows_are_means_of_the_values(device):
    qkv = draw(1, 50, 1, 64, device).detach()
    qkv[:, :, 2] = 3.0
    torch.testing.assert_close(flash_attention(qkv), torch.full_like(qkv[:, :, 2], 3.0))


def test_no_gradient_no_graph(device):
    with torch.no_grad():
        assert not flash_attention(draw(1, 5, 1, 64, device)).requires_grad


def test_the_operator_is_what_it_says(device):
    qkv = draw(1, 9, 1, 64, device)
    torch.library.opcheck(torch.ops.siglip_lib.flash_attention, (qkv, 0.1))


def test_compiled_code_keeps_it_whole(device):
    qkv = draw(1, 9, 1, 64, device)
    compiled = torch.compile(lambda x: flash_attention(x) * 2, fullgraph=True, backend="aot_eager")
    out = compiled(qkv)
    torch.testing.assert_close(out, flash_attention(qkv) * 2)
    out.sum().backward()
    assert qkv.grad.isfinite().all()


def test_flop_counters_see_it(device):
    qkv = draw(2, 10, 3, 64, device)
    with FlopCounterMode(display=False) as counter:
        flash_attention(qkv).sum().backward()
    product = 2 * 2 * 3 * 10 * 10 * 64  # a product with (N, N) scores
    assert counter.get_total_flops() == (2 + 5) * product


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 4, 2, 1, 64), "must be (B, N, 3, heads, head_dim)"),
        ((1, 4, 3, 64), "must be (B, N, 3, heads, head_dim)"),
        ((1, 0, 3, 1, 64), "(B, N, 3, heads, head_dim), each at least 1"),
        ((1, 4, 3, 1, 60), "head_dim=60, N=4, scale=0.12"),
        (
            (1, 4, 3, 1, 60),
            "the kernel needs a head_dim of 64, 72, 80, 96, 128, not 60; attend() takes",
        ),
        (
            (1, MAX_TOKENS + 1, 3, 1, 64),
            "N=16385, scale=0.125: the kernel needs at most 16,384 tokens",
        ),
    ],
)
def test_shapes_that_are_not_offered(shape, said, device):
    with pytest.raises(ValueError, match=re.escape(said)):
        flash_attention(torch.empty(shape, device=device, dtype=torch.float16))


def test_strides_dtypes_devices_and_scales_that_are_not_offered(device, monkeypatch):
    qkv = draw(1, 4, 2, 64, device).detach()
    with pytest.raises(ValueError, match="must be contiguous"):
        flash_attention(qkv.transpose(3, 1).contiguous().transpose(3, 1))
    with pytest.raises(
        TypeError, match=r"qkv is torch.float64; it must be of b?float\d\d, float16"
    ):
        flash_attention(qkv.double())
    with pytest.raises(ValueError, match="scale=nan"):
        flash_attention(qkv, math.nan)
    for scale in (0, -0.125):
        with pytest.raises(ValueError, match=rf"scale={scale}.*: the kernel needs a scale above 0"):
            flash_attention(qkv, scale)
    with pytest.raises(ValueError, match="qkv is on meta; the kernel needs a CUDA GPU"):
        flash_attention(qkv.to("meta"))
    monkeypatch.setattr(kernel_device, "is_interpreted", lambda kernel: False)
    with pytest.raises(ValueError, match=r"TRITON_INTERPRET=1 .* attend\(backend='sdpa'\)"):
        flash_attention(qkv.cpu())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU has no interpreter on")
def test_bfloat16_is_refused_where_the_interpreter_is_wrong():
    with pytest.raises(TypeError, match=r"qkv is torch\.bfloat16; it must be of float32, float16"):
        flash_attention(torch.zeros(1, 4, 3, 1, 64, dtype=torch.bfloat16))
