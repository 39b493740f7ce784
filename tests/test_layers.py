"""LayerScale, DropPath and Mlp: timm is the oracle."""

import math
from functools import partial

import pytest
import timm.layers
import torch
from comparing import assert_close, assert_same, outputs_and_gradients
from torch import nn

from siglip_lib import DropPath, LayerScale, Mlp
from siglip_lib.tower.layers import passed

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def test_layer_scale_is_timms(device):
    theirs = timm.layers.LayerScale(6, init_values=0.3).to(device)
    assert_same(LayerScale(6).to(device), theirs, torch.randn(2, 3, 6, device=device))


@pytest.mark.parametrize("pair", [tuple, list])
@pytest.mark.parametrize("biases", [(True, False), (False, True)])
def test_mlp_takes_pairs_as_timms_does(biases, pair):
    options = {"bias": pair(biases), "drop": pair((0.25, 0.5))}
    ours, theirs = (kind(6, 8, **options) for kind in (Mlp, timm.layers.Mlp))
    assert str(ours) == str(theirs)
    assert_same(ours.eval(), theirs.eval(), torch.randn(2, 6))


@pytest.mark.parametrize("options", [{"bias": (True,) * 3}, {"drop": ()}])
def test_mlp_takes_no_other_number_of_values(options):
    with pytest.raises(ValueError, match=r"=\(.*\) must be one value or two: of fc1 and of fc2"):
        Mlp(6, **options)


@pytest.mark.parametrize("value", [0.0, 1e-5, -2, 1])
def test_layer_scale_starts_at_its_value(value):
    scale = LayerScale(4, value)
    assert scale.gamma.tolist() == pytest.approx([value] * 4)
    nn.init.ones_(scale.gamma)
    scale.init_weights()
    x = torch.randn(3, 4)
    torch.testing.assert_close(scale(x), x * value)
    assert f"4, init_values={float(value)}, inplace=False" in repr(scale)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("recording", [True, False])
def test_layer_scale_in_place_without_gradients(recording, frozen):
    scale = LayerScale(4, 0.5, inplace=True).requires_grad_(not frozen)
    x = torch.ones(2, 4)
    with torch.set_grad_enabled(recording):
        out = scale(x)
    assert (out == 0.5).all()
    may_write = frozen or not recording
    assert (out is x) == may_write
    assert (x == (0.5 if may_write else 1)).all()


def test_layer_scale_in_place_while_training_gives_the_same_gradients():
    x = torch.randn(3, 4)
    found = outputs_and_gradients(LayerScale(4, 0.5, inplace=True), x)
    assert_close(found, outputs_and_gradients(timm.layers.LayerScale(4, 0.5), x))


def test_layer_scale_in_place_leaves_a_frozen_layers_recorded_input_alone():
    scale = LayerScale(4, 0.5, inplace=True).requires_grad_(False)
    x = torch.ones(2, 4, requires_grad=True)  # a leaf: autograd forbids writing into it
    scale(x).sum().backward()
    assert (x == 1).all()
    assert (x.grad == 0.5).all()


def test_layer_scale_in_place_does_not_narrow_the_result():
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        assert LayerScale(4, 0.3, inplace=True)(x).dtype == torch.float32
    assert (x == 1).all()


def test_layer_scale_gradcheck():
    scale = LayerScale(3, 0.7).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, gamma: torch.func.functional_call(scale, {"gamma": gamma}, x), (x, scale.gamma)
    )


@pytest.mark.parametrize("shape", [(20_000,), (20_000, 2), (20_000, 2, 1, 3)])
@pytest.mark.parametrize("p", [0.1, 0.75])
def test_drop_path_drops_whole_samples_at_its_rate(p, shape, device):
    x = torch.rand(shape, device=device) + 1
    dropped = (DropPath(p)(x) == 0).flatten(1) if len(shape) > 1 else (DropPath(p)(x) == 0)[:, None]
    assert (dropped.any(1) == dropped.all(1)).all()
    share = dropped[:, 0].double().mean().item()
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / shape[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.3])
def test_drop_path_keeps_exactly(p, dtype, device):
    x = torch.randn(1000, 8, dtype=dtype, device=device) * 3
    out = DropPath(p)(x)
    kept = out.any(1)
    assert out.dtype == dtype
    assert 0 < kept.sum() < 1000
    assert torch.equal(out[kept], x[kept] / (1 - p))
    exact = x[kept].double() / (1 - p)
    tolerance = exact.abs() * (0.51 * torch.finfo(dtype).eps + 2e-7) + 1e-7
    assert ((out[kept].double() - exact).abs() <= tolerance).all()


def test_drop_path_without_scale():
    x = torch.randn(100, 4)
    out = DropPath(0.5, scale_by_keep=False)(x)
    kept = out.any(1)
    assert 0 < kept.sum() < 100
    assert torch.equal(out[kept], x[kept])


def test_drop_path_drops_what_is_not_finite():
    out = DropPath(0.5)(torch.full((100, 2), math.inf))
    assert set(out.unique().tolist()) == {0, math.inf}


def test_drop_path_is_the_identity_in_eval_and_at_zero():
    x = torch.randn(10, 4)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_drop_path_gradient_is_that_of_what_it_kept():
    x = torch.randn(50, 4, requires_grad=True)
    out = DropPath(0.5)(x)
    out.sum().backward()
    assert torch.equal(x.grad, torch.where(out != 0, 2.0, 0.0))


def test_drop_path_says_its_rate():
    assert "drop_prob=0.25, scale_by_keep=False" in repr(DropPath(0.25, False))


MLPS = [
    {},
    {"hidden_features": 12},
    {"hidden_features": 5, "out_features": 3, "bias": False},
    {"act_layer": partial(nn.GELU, approximate="tanh")},
    {"hidden_features": 8, "norm_layer": nn.LayerNorm, "act_layer": nn.SiLU},
]


@pytest.mark.parametrize("options", MLPS, ids=lambda options: ",".join(options) or "plain")
def test_mlp_is_timms(options, device):
    theirs = timm.layers.Mlp(6, **options).to(device)
    assert_same(Mlp(6, **options).to(device), theirs, torch.randn(2, 3, 6, device=device))


def test_mlp_drops_where_timm_drops_while_training():
    ours, theirs = Mlp(6, 20, drop=0.4), timm.layers.Mlp(6, 20, drop=0.4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 6)
    torch.manual_seed(3)
    expected = theirs(x)
    torch.manual_seed(3)
    assert torch.equal(ours(x), expected)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: LayerScale(0), ValueError, "dim=0 must be at least 1"),
        (lambda: LayerScale(2.0), TypeError, "dim=2.0 must be an int, not float"),
        (lambda: LayerScale(True), TypeError, "dim=True must be an int, not bool"),
        (lambda: LayerScale(2, math.nan), ValueError, "init_values=nan must be finite"),
        (lambda: LayerScale(2, None), TypeError, "init_values=None must be a number, not NoneType"),
        (lambda: DropPath(1), ValueError, "drop_prob=1 must lie in [0, 1)"),
        (lambda: DropPath(-0.1), ValueError, "drop_prob=-0.1 must lie in [0, 1)"),
        (lambda: DropPath(math.nan), ValueError, "drop_prob=nan must lie in [0, 1)"),
        (lambda: DropPath("0.1"), TypeError, "drop_prob='0.1' must be a number, not str"),
        (lambda: Mlp(0), ValueError, "in_features=0 must be at least 1"),
        (lambda: Mlp(4, 0), ValueError, "hidden_features=0 must be at least 1"),
        (lambda: Mlp(4, 4, 2.5), TypeError, "out_features=2.5 must be an int, not float"),
        (lambda: Mlp(4, drop=1.0), ValueError, "drop=1.0 must lie in [0, 1)"),
    ],
)
def test_wrong_arguments(build, error, message):
    with pytest.raises(error) as caught:
        build()
    assert str(caught.value) == message


class Doubling(nn.Dropout):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("layer", [nn.Identity(), nn.Dropout(0.5).eval(), DropPath(0.5).eval()])
def test_what_hands_its_input_on_is_called_only_for_who_looks(layer, monkeypatch):
    x, seen = torch.ones(1000, 1), []
    hook = layer.register_forward_hook(lambda *_: seen.append(1))
    assert passed(layer, x) is layer(x) is x
    assert len(seen) == 2
    hook.remove()
    monkeypatch.setattr(type(layer), "forward", lambda *_: pytest.fail("called"))
    assert passed(layer, x) is x


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), DropPath(0.5), Doubling(0.5).eval()])
def test_what_changes_its_input_is_called(layer):
    assert (passed(layer, torch.ones(1000, 1)) == 2).any()
