"""Attention and its maps: timm, torch and transformers are the oracles."""

from functools import partial

import pytest
import timm.layers
import torch
from comparing import assert_close, assert_same, outputs_and_gradients, randomized
from torch import nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipAttention

from siglip_lib import Attention, Block, attention_maps
from siglip_lib.backends import attend_packed
from siglip_lib.backends import table as backends
from siglip_lib.evaluate.maps import AttentionMaps
from siglip_lib.tower import attention as attention_module

BACKENDS = ("auto", "sdpa", "eager")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_is_timms(bias, qk_norm, backend, device):
    theirs = timm.layers.Attention(24, 3, qkv_bias=bias, qk_norm=qk_norm, norm_layer=nn.LayerNorm)
    ours = Attention(24, 3, bias, qk_norm, backend=backend)
    assert_same(ours.to(device), theirs.to(device), torch.randn(2, 7, 24, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_torchs(backend, device):
    ours = randomized(Attention(24, 3, qkv_bias=True, backend=backend)).to(device)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True, device=device)
    names = {
        "in_proj_weight": "qkv.weight",
        "in_proj_bias": "qkv.bias",
        "out_proj.weight": "proj.weight",
        "out_proj.bias": "proj.bias",
    }
    weights = ours.state_dict()
    theirs.load_state_dict({name: weights[own] for name, own in names.items()})

    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = theirs

        def forward(self, x):
            return self.inner(x, x, x)

    x = torch.randn(2, 7, 24, device=device)
    found = outputs_and_gradients(SelfAttention(), x)
    renamed = {names.get(name.removeprefix("inner."), name): value for name, value in found.items()}
    assert_close(outputs_and_gradients(ours, x), renamed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_transformers(backend, device):
    config = SiglipVisionConfig(hidden_size=24, num_attention_heads=3)
    config._attn_implementation = "eager"
    theirs = randomized(SiglipAttention(config)).to(device)

    def packed(values):
        """Its q, k, v as the rows of one qkv."""
        ours = {name: value for name, value in values.items() if "_proj." not in name}
        for kind in ("weight", "bias"):
            ours[f"qkv.{kind}"] = torch.cat([values[f"{name}_proj.{kind}"] for name in "qkv"])
            ours[f"proj.{kind}"] = values[f"out_proj.{kind}"]
        return ours

    ours = Attention(24, 3, qkv_bias=True, backend=backend).to(device)
    ours.load_state_dict(packed(theirs.state_dict()))
    x = torch.randn(2, 7, 24, device=device)
    assert_close(outputs_and_gradients(ours, x), packed(outputs_and_gradients(theirs, x)))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_gradcheck(qk_norm, backend):
    attention = randomized(Attention(6, 2, True, qk_norm, backend=backend)).double()
    names, parameters = zip(*attention.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(attention, dict(zip(names, values, strict=True)), x)

    x = torch.randn(1, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_only_while_training(backend):
    x = torch.randn(2, 7, 24)
    attention = Attention(24, 3, attn_drop=0.5, backend=backend)
    plain = Attention(24, 3, backend=backend)
    plain.load_state_dict(attention.state_dict())
    assert not torch.allclose(attention(x), plain(x))
    assert torch.equal(attention.eval()(x), plain(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("replace", [False, True])
def test_attn_drop_is_what_the_layer_itself_would_do(replace, backend):
    x = torch.randn(2, 7, 24)
    attention = Attention(24, 3, attn_drop=0.5, backend=backend)
    if replace:
        attention.attn_drop = nn.Identity()
    else:
        attention.attn_drop.eval()
    assert attention.training
    once = attention(x)
    assert torch.equal(once, attention(x))
    attention.eval().attn_drop = nn.Dropout(0.5)  # which trains, alone
    assert not torch.allclose(attention(x), once)


class OwnDropout(nn.Dropout):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [nn.AlphaDropout, OwnDropout])
def test_an_attn_drop_that_no_backend_can_do(kind):
    attention = Attention(24, 3)
    attention.attn_drop = kind(0.5)
    said = rf"attn_drop is {kind.__name__}; it must be nn\.Dropout or"
    with pytest.raises(TypeError, match=said):
        attention(torch.randn(2, 7, 24))


def test_proj_drop_drops_outputs_while_training():
    attention = Attention(24, 3, proj_drop=0.5)
    x = torch.randn(20, 7, 24)
    assert 0.45 < (attention(x) == 0).double().mean() < 0.55
    assert (attention.eval()(x) != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_with_qk_norm(backend, device):
    attention = Attention(64, 2, qk_norm=True, backend=backend).to(device)
    x = torch.randn(2, 7, 64, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out = attention(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attention(x), rtol=0, atol=0.02)


@pytest.mark.parametrize("deterministic", [False, True])
def test_hands_the_backend_views_of_one_packed_tensor(deterministic, monkeypatch):
    given = []
    eager = backends.BACKENDS["eager"]

    def run(*arguments):
        given.append(arguments)
        return eager.run(*arguments)

    attention = Attention(24, 3, attn_drop=0.25, deterministic=deterministic, backend="eager")
    attention(torch.randn(2, 7, 24))  # the trial has run
    entry = backends.Backend(run, eager.why_not, eager.operator)
    monkeypatch.setitem(backends.BACKENDS, "eager", entry)
    attention(torch.randn(2, 7, 24))
    [(q, k, v, dropout, scale, flag)] = given
    assert len({x.untyped_storage().data_ptr() for x in (q, k, v)}) == 1
    assert [x.storage_offset() for x in (q, k, v)] == [0, 24, 48]
    assert all(x.stride() == (7 * 72, 72, 8, 1) for x in (q, k, v))
    assert (dropout, scale, flag) == (0.25, 8**-0.5, deterministic)


@pytest.mark.parametrize("name", [n for n, b in backends.BACKENDS.items() if b.run_packed])
def test_norms_leave_one_tensor_to_who_takes_no_other(name, monkeypatch):
    attention = Attention(24, 3, qk_norm=True, backend="eager")
    x = torch.randn(2, 7, 24)
    expected, given = attention(x), []
    attention.backend = name

    def instead(qkv, *, backend, **options):
        given.append((qkv.shape, qkv.is_contiguous(), backend))
        return attend_packed(qkv, backend="eager", **options)

    monkeypatch.setattr(attention_module, "attend_packed", instead)
    torch.testing.assert_close(attention(x), expected)
    assert given == [((2, 7, 3, 3, 8), True, name)]


def test_half_precision_module(device):
    attention = Attention(64, 1, qk_norm=True).to(device)
    x = torch.randn(2, 7, 64, device=device)
    expected = attention(x)
    out = attention.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02)


def test_a_norm_that_returns_float32():
    class Widening(nn.LayerNorm):  # as LayerNorm itself under autocast on a GPU
        def forward(self, x):
            return super().forward(x).float()

    attention = Attention(64, 2, qk_norm=True, norm_layer=Widening).bfloat16()
    assert attention(torch.randn(2, 7, 64).bfloat16()).dtype == torch.bfloat16


def test_empty_batch_and_meta_device():
    assert Attention(8, 2)(torch.empty(0, 3, 8)).shape == (0, 3, 8)
    with torch.device("meta"):
        assert Attention(8, 2, qk_norm=True)(torch.empty(2, 3, 8)).is_meta


@pytest.mark.parametrize("shape", [(7, 24), (1, 2, 7, 24), (2, 7, 23), (2, 7, 48)])
def test_wrong_shapes(shape):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below
        Attention(24, 3)(torch.zeros(shape))
    hint = "; x[None] makes a batch of one" if shape == (7, 24) else ""
    assert str(caught.value) == f"x has shape {shape}; it must be (B, N, 24){hint}"


@pytest.mark.parametrize("x", [[[[0.0] * 24]], torch.zeros(2, 7, 24, dtype=torch.uint8)])
def test_what_is_no_tensor_of_floats(x):
    attention = Attention(24, 3, qk_norm=True)
    for call in (attention, attention.attention_map):
        with pytest.raises(
            TypeError, match=r"x must be a tensor \(B, N, 24\)|x is torch.uint8; it must be of f"
        ):
            call(x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 25}, ValueError, "dim=25 must be a multiple of num_heads=3"),
        ({"dim": 0}, ValueError, "dim=0 must be at least 1"),
        ({"dim": 24.0}, TypeError, "dim=24.0 must be an int, not float"),
        ({"num_heads": 0}, ValueError, "num_heads=0 must be at least 1"),
        ({"attn_drop": 1.0}, ValueError, "attn_drop=1.0 must lie in [0, 1)"),
        ({"proj_drop": -0.1}, ValueError, "proj_drop=-0.1 must lie in [0, 1)"),
        ({"attn_drop": None}, TypeError, "attn_drop=None must be a number, not NoneType"),
        (
            {"backend": "fast"},
            ValueError,
            "backend='fast' is unknown; allowed are auto, triton, cudnn",
        ),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error) as caught:
        Attention(**({"dim": 24, "num_heads": 3} | options))
    assert message in str(caught.value)


def test_a_backend_that_cannot_run_here_says_why():
    attention = Attention(24, 3, backend="cudnn")
    with pytest.raises(ValueError, match="backend='cudnn' cannot run here: needs "):
        attention(torch.zeros(2, 7, 24))


# --- the maps ---


@pytest.fixture
def model():
    block = partial(Block, 24, 3, qk_norm=True, attn_drop=0.3)
    return nn.Sequential(block(), nn.Sequential(block(), nn.GELU()), block())


NAMES = ["0.attn", "1.0.attn", "2.attn"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_are_the_weights(backend, device):
    attention = randomized(Attention(24, 3, True, True, backend=backend)).to(device).eval()
    x = torch.randn(2, 7, 24, device=device)
    with attention_maps(attention) as maps:
        out = attention(x)
    [weights] = maps.values()
    assert weights.shape == (2, 3, 7, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7, device=device))
    q, k, v = attention.qkv(x).view(2, 7, 3, 3, 8).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    torch.testing.assert_close(weights, (q @ k.mT / 8**0.5).softmax(-1))
    torch.testing.assert_close(out, attention.proj((weights @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (None, NAMES),
        ([0], NAMES[:1]),
        ([-1, 1], NAMES[:0:-1]),
        ([-3], NAMES[:1]),
        (iter([2]), NAMES[2:]),
        ([], []),
    ],
)
def test_layers(layers, names, model):
    with attention_maps(model, layers) as maps:
        assert maps == {}
        model(torch.randn(2, 7, 24))
    assert sorted(maps) == sorted(names)
    assert isinstance(maps, AttentionMaps)
    assert maps.nbytes == len(names) * 4 * 2 * 3 * 7 * 7


@pytest.mark.parametrize("layer", [3, -4])
def test_layers_that_are_not_there(layer, model):
    with (
        pytest.raises(ValueError, match=f"layers contains {layer}; allowed are -3 to 2"),
        attention_maps(model, [0, layer]),
    ):
        pytest.fail("the body ran")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_without_attention():
    with (
        pytest.raises(ValueError, match="model=Linear contains no attention layer"),
        attention_maps(nn.Linear(2, 2)),
    ):
        pytest.fail("the body ran")


def test_maps_do_not_change_the_output_or_the_gradients(model):
    def run():
        torch.manual_seed(5)  # dropout is on
        return outputs_and_gradients(model, torch.linspace(-1, 1, 2 * 7 * 24).view(2, 7, 24))

    plain = run()
    with attention_maps(model) as maps:
        beside = run()
    assert len(maps) == 3
    assert all(torch.equal(beside[name], plain[name]) for name in plain)


def test_hooks_go_when_the_body_ends_or_raises(model):
    def hooks():
        return [module for module in model.modules() if module._forward_pre_hooks]

    with attention_maps(model, [0]):
        assert len(hooks()) == 1
    assert hooks() == []
    with pytest.raises(ZeroDivisionError), attention_maps(model):
        raise ZeroDivisionError
    assert hooks() == []


def test_maps_are_float32_and_detached_also_under_autocast(model):
    with attention_maps(model, [0]) as maps, torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 7, 24, requires_grad=True))
    weights = maps["0.attn"]
    assert weights.dtype == torch.float32
    assert not weights.requires_grad
    # a softmax rounded to bf16 would be off by 1e-3
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7), rtol=0, atol=1e-6)


def test_a_later_run_overwrites(model):
    with attention_maps(model, [0]) as maps:
        model(torch.randn(2, 7, 24))
        model(torch.randn(1, 5, 24))
    assert maps["0.attn"].shape == (1, 3, 5, 5)


def test_maps_of_a_layer_called_by_keyword():
    attention = Attention(8, 2)
    with attention_maps(attention) as maps:
        attention(x=torch.randn(1, 3, 8))
    assert len(maps) == 1


@pytest.mark.parametrize("qk_norm", [False, True])
def test_triton_runs_with_and_without_norms(qk_norm, gpu):
    attention = Attention(144, 2, True, qk_norm, backend="triton").to(gpu, torch.bfloat16)
    x = torch.randn(3, 37, 144, device=gpu, dtype=torch.bfloat16)
    found = attention(x)
    attention.backend = "eager"
    torch.testing.assert_close(found, attention(x), rtol=0, atol=0.02)
