"""named_apply and init_weights_vit_timm: timm is the oracle of the order."""

import pytest
import torch
from scipy import stats
from timm.models import _manipulate
from torch import nn

from siglip_lib import Block, LayerScale, init_weights_vit_timm, named_apply


def tree() -> nn.Module:
    shared = nn.Linear(2, 2)
    return nn.ModuleDict(
        {
            "z": nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.GELU(), shared)),
            "a": nn.ModuleList([shared, nn.LayerNorm(2)]),
        }
    )


@pytest.mark.parametrize("depth_first", [True, False])
@pytest.mark.parametrize("include_root", [True, False])
@pytest.mark.parametrize("name", ["", "tower"])
def test_named_apply_visits_as_timm_does(name, depth_first, include_root):
    def visits(apply):
        seen = []
        returned = apply(
            lambda module, name: seen.append((name, module)), model, name, depth_first, include_root
        )
        assert returned is model
        return seen

    model = tree()
    assert visits(named_apply) == visits(_manipulate.named_apply)


def test_named_apply_by_default_ends_with_the_root():
    seen = []
    named_apply(lambda module, name: seen.append(name), tree())
    assert seen == ["z.0", "z.1.0", "z.1.1", "z.1", "z", "a.0", "a.1", "a", ""]


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    linear = nn.Linear(300, 400, bias=bias)
    init_weights_vit_timm(linear)
    weight = linear.weight.detach().flatten()
    assert stats.kstest(weight.double().numpy(), stats.norm(0, 0.02).cdf).pvalue > 1e-3
    assert weight.abs().max() < 6 * 0.02
    assert linear.weight.requires_grad
    assert linear.bias is None or (linear.bias == 0).all()


def test_a_module_with_its_own_rule():
    scale = LayerScale(3, 0.5)
    nn.init.zeros_(scale.gamma)
    init_weights_vit_timm(scale, "ls1")
    assert (scale.gamma == 0.5).all()


def test_a_linear_goes_by_the_rule_of_linears():
    class Odd(nn.Linear):
        def init_weights(self):
            raise AssertionError("timm does not call it either")

    init_weights_vit_timm(Odd(2, 2))


def test_touches_linears_alone():
    model = nn.Sequential(Block(8, 2, qkv_bias=True, qk_norm=True), nn.Conv2d(1, 1, 1))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7)
    named_apply(init_weights_vit_timm, model)
    touched = {name for name, parameter in model.named_parameters() if (parameter != 7).any()}
    linears = ("0.attn.qkv", "0.attn.proj", "0.mlp.fc1", "0.mlp.fc2")
    assert touched == {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")}


def test_meta_model():
    with torch.device("meta"):
        model = Block(8, 2)
    assert named_apply(init_weights_vit_timm, model) is model
