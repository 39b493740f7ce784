"""The loss of pairs in one kernel: the same written out in float64 is the oracle."""

import pytest
import torch

from siglip_lib import sigmoid_loss
from siglip_lib.siglip import loss_block

pytest.importorskip("triton")

from siglip_lib.kernels import pair_losses as module
from siglip_lib.kernels.pair_losses import pair_losses

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = [(1, 1), (4, 1024), (5, 1025), (9, 2100), (130, 3)]
NO_MATCH = 10_000  # a diagonal outside


def draw(shape, device):
    generator = torch.Generator().manual_seed(0)
    dots = 0.5 * torch.randn(shape, generator=generator)
    return dots.to(device), torch.tensor(20.0, device=device), torch.tensor(-3.0, device=device)


def exact(dots, scale, bias, positive):
    wide = (x.double().clone() for x in (dots, scale, bias))
    return loss_block._pair_losses(*wide, positive, torch.float64, 1.0)


@pytest.mark.parametrize("positive", [0, 2, -3, NO_MATCH, "matrix"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_derivatives(dtype, shape, positive, device):
    dots, scale, bias = draw(shape, device)
    if positive == "matrix":
        positive = (torch.rand(shape[::-1], device=device) < 0.3).t()  # its rows lie apart
    unit = 2.0**-15 if dtype == torch.float16 else 1.0
    before = dots.clone()
    loss, d_bias, d_logits = pair_losses(dots, scale, bias, positive, dtype, unit)
    assert torch.equal(dots, before)
    wanted_loss, wanted_d_bias, wanted = exact(dots, scale, bias, positive)
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=1e-6, atol=0)
    # terms of both signs may cancel
    torch.testing.assert_close(
        d_bias.double(), wanted_d_bias, rtol=0, atol=1e-6 * wanted.abs().sum().item()
    )
    assert d_logits.dtype == dtype
    # the interpreter cuts bfloat16 off where a GPU rounds; float16 has fewer digits near its smallest numbers
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        d_logits.double() * unit, wanted, rtol=max(eps, 4e-6), atol=unit * 6e-8 if unit < 1 else 0
    )


@pytest.mark.parametrize("positive", [0, "matrix"])
def test_without_derivatives_and_the_same_bits_again(positive, device):
    dots, scale, bias = draw((9, 2100), device)
    if positive == "matrix":
        positive = torch.rand(dots.shape, device=device) < 0.3
    first = pair_losses(dots, scale, bias, positive, torch.float32)
    assert all(map(torch.equal, first, pair_losses(dots, scale, bias, positive, torch.float32)))
    loss, d_bias, d_logits = pair_losses(dots, scale, bias, positive, None)
    assert torch.equal(loss, first[0])
    assert (d_bias.shape, d_bias.item(), d_logits) == ((), 0, None)


def test_large_and_small_logits_keep_their_digits(device):
    dots = torch.tensor([[-100.0, -30.0, -17.0, -5.0, 0.0, 5.0, 17.0, 100.0]], device=device)
    one, zero = torch.tensor(1.0, device=device), torch.tensor(0.0, device=device)
    for positive in (NO_MATCH, torch.ones_like(dots, dtype=torch.bool)):
        for some in dots.split(1, dim=1):
            here = positive if isinstance(positive, int) else positive[:, :1]
            wanted = exact(some, one, zero, here)
            for found, value in zip(
                pair_losses(some.contiguous(), one, zero, here, torch.float32), wanted, strict=True
            ):
                torch.testing.assert_close(found.double(), value, rtol=2e-6, atol=1e-42)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_of_large_blocks_goes_through_it(dtype, ids, gpu, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments[0].numel())
        return pair_losses(*arguments)

    monkeypatch.setattr(module, "pair_losses", counted)
    monkeypatch.setattr(loss_block, "_LARGE", 200 * 200)
    vectors = torch.nn.functional.normalize(torch.randn(2, 500, 64, device=gpu), dim=-1).to(dtype)
    scalars = torch.tensor(2.3, device=gpu), torch.tensor(-6.0, device=gpu)
    given = [torch.randint(300, (500,), device=gpu)] * 2 if ids else [None, None]

    def results(kind):
        learned = [x.to(kind).detach().requires_grad_() for x in (*vectors, *scalars)]
        loss = sigmoid_loss(*learned, *given, chunk=200)
        return [loss.detach(), *torch.autograd.grad(loss, learned)]

    found = results(dtype)
    assert calls == [40_000] * 4  # the narrower blocks at the edges are small
    with monkeypatch.context() as patch:
        patch.setattr(loss_block, "_LARGE", 10**9)
        plain = results(dtype)
    for mine, other, wanted in zip(found, plain, results(torch.float64), strict=True):
        far = (other.double() - wanted).norm()
        assert (mine.double() - wanted).norm() <= 1.2 * far + 1e-6 * wanted.norm()
