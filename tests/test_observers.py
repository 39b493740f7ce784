"""Who looks at what runs: it decides whether a kernel may stand in for torch's own operators."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from siglip_lib import DropPath, LayerScale, trunc_normal_
from siglip_lib.base.observers import is_observed, is_plain, is_transformed, takes_kernel


def test_who_looks():
    seen = []

    def look(x):
        seen.append((is_transformed(), is_observed()))
        return x.sum()

    x = torch.ones(2)
    look(x)
    torch.func.grad(look)(x)
    torch.func.vmap(look)(x[None])
    with FakeTensorMode():
        look(torch.ones(2))
    with forward_ad.dual_level():
        look(x)
    look(x)
    nobody, transformed, mode = (False, False), (True, True), (False, True)
    assert seen == [nobody, transformed, transformed, mode, transformed, nobody]


def test_kernels_take_memory_and_nothing_else(device):
    x = torch.ones(2, device=device)
    assert takes_kernel(x, nn.Parameter(x)) == x.is_cuda
    assert not takes_kernel(x, torch.ones(2))
    assert not torch.func.vmap(lambda x: takes_kernel(x) + 0 * x)(x).any()
    with FakeTensorMode():
        fake = torch.empty(2, device="cuda")
        assert fake.is_cuda
        assert not takes_kernel(fake)
    assert not takes_kernel(fake)


class Louder(DropPath):
    pass


def test_what_a_call_may_be_replaced_for():
    assert is_plain(DropPath(), DropPath)
    assert is_plain(nn.Identity(), LayerScale, nn.Identity)
    assert not is_plain(nn.Identity(), LayerScale)
    assert not is_plain(Louder(), DropPath)


@pytest.mark.parametrize(
    "kind", ["forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_are_not_passed_over(kind):
    drop = DropPath()
    hook = getattr(drop, f"register_{kind}")(lambda *_: None)
    assert not is_plain(drop, DropPath)
    hook.remove()
    assert is_plain(drop, DropPath)


def test_other_ways_into_a_layer_are_not_passed_over():
    scale = LayerScale(4)
    parametrize.register_parametrization(scale, "gamma", nn.Identity())
    assert not is_plain(scale, LayerScale)
    scale = LayerScale(4)
    scale.forward = lambda x: x
    assert not is_plain(scale, LayerScale)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not is_plain(DropPath(), DropPath)
    hook.remove()
    assert is_plain(DropPath(), DropPath)


def test_fake_tensors_are_filled_by_nobody(device):
    with FakeTensorMode():
        x = torch.empty(4, 5, device=device)
        assert trunc_normal_(x, std=0.02) is x
