"""AttentionPoolLatent: timm's is the oracle, with the activation that SigLIP's weights were trained with."""

import math
import re
from functools import partial

import pytest
import timm.layers
import torch
from comparing import assert_same, randomized
from scipy import stats
from torch import nn

from siglip_lib import AttentionPoolLatent, attention_maps
from siglip_lib.tower import attention_pool

BACKENDS = ("auto", "sdpa", "eager")
GELU_TANH = partial(nn.GELU, approximate="tanh")
POOLS = [
    {},
    {"norm_layer": partial(nn.LayerNorm, eps=1e-6), "mlp_ratio": 3.7},
    {"qk_norm": True},
    {"qk_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-3)},
    {"qkv_bias": False},
    {"latent_len": 3},
    {"latent_len": 3, "pool_type": "avg"},
    {"latent_dim": 10},
    {"pos_embed": "abs", "feat_size": 7},
    {"act_layer": nn.GELU},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", POOLS, ids=lambda options: ",".join(options) or "plain")
def test_is_timms(options, backend, device):
    theirs = timm.layers.AttentionPoolLatent(
        24, num_heads=3, **({"act_layer": GELU_TANH} | options)
    )
    ours = AttentionPoolLatent(24, 3, **options, backend=backend)
    x = torch.randn(2, 7, 24, dtype=torch.float64, device=device)
    assert_same(ours.double().to(device), theirs.double().to(device), x)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_is_torchs():
    pool = randomized(AttentionPoolLatent(24, 3)).double()
    theirs = nn.MultiheadAttention(24, 3, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight.data = torch.cat([pool.q.weight, pool.kv.weight])
    theirs.in_proj_bias.data = torch.cat([pool.q.bias, pool.kv.bias])
    theirs.out_proj = pool.proj
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    read, weights = theirs(pool.latent.expand(2, -1, -1), x, x, average_attn_weights=False)
    torch.testing.assert_close(pool(x), (read + pool.mlp(read))[:, 0])
    torch.testing.assert_close(pool.attention_map(x), weights.float())


def test_timms_class_is_left_alone():
    theirs = timm.layers.AttentionPoolLatent
    assert theirs.init_weights.__module__ == theirs.__module__ == "timm.layers.attention_pool"
    assert not issubclass(AttentionPoolLatent, theirs)


def test_the_activation_is_the_tanh_gelu_unless_told():
    assert AttentionPoolLatent(8, 2).mlp.act.approximate == "tanh"
    assert AttentionPoolLatent(8, 2, act_layer=nn.GELU).mlp.act.approximate == "none"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "latent_len": 3, "pos_embed": "abs", "feat_size": 7}]
)
def test_maps_sum_to_one_and_reproduce_the_output(options, backend, device):
    pool = randomized(AttentionPoolLatent(24, 3, **options, backend=backend)).to(device)
    x = torch.randn(2, 7, 24, device=device)
    weights = pool.attention_map(x)
    assert weights.shape == (2, 3, options.get("latent_len", 1), 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    placed = x if pool.pos_embed is None else x + pool.pos_embed
    v = pool.kv(placed)[..., 24:].unflatten(-1, (3, 8)).transpose(1, 2)  # (B, heads, N, head_dim)
    read = pool.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(pool(x), (read + pool.mlp(read))[:, 0])


def test_its_maps_are_collected_without_changing_the_output():
    pool, x = AttentionPoolLatent(24, 3, latent_len=2), torch.randn(2, 7, 24)
    expected = pool(x)
    with attention_maps(nn.Sequential(pool)) as maps:
        assert torch.equal(nn.Sequential(pool)(x), expected)
    assert torch.equal(maps["0"], pool.attention_map(x))
    assert not maps["0"].requires_grad


def test_latents_and_positions_start_with_their_widths_as_variance():
    pool = AttentionPoolLatent(64, 2, 500, latent_len=300, latent_dim=144, pos_embed="abs")
    for _ in range(2):
        for values, std in ((pool.latent, 1 / 12), (pool.pos_embed, 1 / 8)):
            values = values.detach().flatten().double().numpy()
            assert stats.kstest(values, stats.norm(0, std).cdf).pvalue > 1e-3
        nn.init.zeros_(pool.latent)
        nn.init.zeros_(pool.pos_embed)
        pool.init_weights()


def test_the_head_of_so400m_on_the_meta_device():
    with torch.device("meta"):
        pool = AttentionPoolLatent(1152, 16, mlp_ratio=3.7362, norm_layer=nn.LayerNorm)
        assert pool(torch.empty(2, 729, 1152)).shape == (2, 1152)
    assert pool.mlp.fc1.out_features == 4304


def test_dropout_comes_after_the_projection_and_only_while_training():
    pool = AttentionPoolLatent(24, 3, drop=0.5)
    pool.mlp = nn.Identity()  # the output is twice what was projected
    x = torch.randn(200, 7, 24)
    assert 0.45 < (pool(x) == 0).double().mean() < 0.55
    assert (pool.eval()(x) != 0).all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_hands_on_its_backend_and_flag(deterministic, monkeypatch):
    given = []
    attend = attention_pool.attend

    def record(*tensors, **options):
        given.append(options)
        return attend(*tensors, **options)

    monkeypatch.setattr(attention_pool, "attend", record)
    AttentionPoolLatent(8, 2, deterministic=deterministic, backend="eager")(torch.ones(1, 3, 8))
    assert given == [{"backend": "eager", "deterministic": deterministic}]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_half_precision(qk_norm, device):
    pool = AttentionPoolLatent(24, 3, 7, qk_norm=qk_norm, pos_embed="abs").to(device)
    x = torch.randn(2, 7, 24, device=device)
    expected = pool(x)
    with torch.autocast(device.type, torch.bfloat16):
        torch.testing.assert_close(pool(x).float(), expected, rtol=0, atol=0.05)
    out = pool.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)


WRONG = [
    ({"in_features": 10}, ValueError, "in_features=10 must be a multiple of num_heads=4"),
    ({"in_features": 8.0}, TypeError, "in_features=8.0 must be an int, not float"),
    ({"num_heads": 0}, ValueError, "num_heads=0 must be at least 1"),
    ({"latent_len": 0}, ValueError, "latent_len=0 must be at least 1"),
    ({"latent_dim": 0}, ValueError, "latent_dim=0 must be at least 1"),
    ({"pos_embed": "abs"}, ValueError, "pos_embed='abs' needs feat_size"),
    ({"pos_embed": "abs", "feat_size": 0}, ValueError, "feat_size=0 must be at least 1"),
    ({"pos_embed": "rel"}, ValueError, "pos_embed='rel' is unknown; allowed are '', 'abs'"),
    ({"pool_type": "max"}, ValueError, "pool_type='max' is unknown; allowed are 'token', 'a"),
    ({"drop": 1.0}, ValueError, "drop=1.0 must lie in [0, 1)"),
    ({"mlp_ratio": math.inf}, ValueError, "mlp_ratio=inf must be finite"),
    ({"mlp_ratio": 0.01}, ValueError, "hidden_features=0 must be at least 1"),
    (
        {"backend": "flash"},
        ValueError,
        "backend='flash' is unknown; allowed are auto, triton, cudnn",
    ),
]


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (2, 5, 15), "x has shape (2, 5, 15); it must be (B, N, 16)"),
        ({}, (5, 16), "x has shape (5, 16); it must be (B, N, 16)"),
        ({"pos_embed": "abs", "feat_size": 1}, (2, 5, 16), "x has 5 tokens; feat_size is 1"),
    ],
)
def test_wrong_inputs(options, shape, message):
    pool = AttentionPoolLatent(16, 4, **options)
    for call in (pool, pool.attention_map):
        with pytest.raises(ValueError, match=re.escape(message)):
            call(torch.zeros(shape))


@pytest.mark.parametrize("x", [[[[0.0] * 16]], torch.zeros(2, 5, 16, dtype=torch.uint8)])
def test_what_is_no_tensor_of_floats(x):
    pool = AttentionPoolLatent(16, 4)
    for call in (pool, pool.attention_map):
        with pytest.raises(
            TypeError, match=r"x must be a tensor \(B, N, 16\)|x is torch.uint8; it must be of f"
        ):
            call(x)


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error) as caught:
        AttentionPoolLatent(**({"in_features": 16, "num_heads": 4} | options))
    assert message in str(caught.value)


def test_compiles_without_graph_breaks_forward_and_backward(device):
    pool = AttentionPoolLatent(16, 2, 5, qk_norm=True, pos_embed="abs", drop=0.1).to(device)
    x = torch.randn(2, 5, 16, device=device, requires_grad=True)
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")  # needs no C compiler
    compiled(x).sum().backward()
    compiled.eval()
    torch.testing.assert_close(compiled(x), pool.eval()(x))


class LowRank(nn.Module):
    """A layer with a small correction beside it, which has none of the layer's attributes."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(24, 2, bias=False), nn.Linear(2, layer.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["q", "kv", "proj"])
def test_layers_may_be_wrapped(name):
    pool, x = AttentionPoolLatent(24, 3), torch.randn(2, 7, 24)
    expected = pool(x)
    setattr(pool, name, LowRank(getattr(pool, name)))
    torch.testing.assert_close(pool(x), expected)
    with attention_maps(pool) as maps:
        pool(x)
    assert len(maps) == 1
    with pytest.raises(ValueError, match=r"x has shape \(2, 7, 23\); it must be \(B, N, 24\)"):
        pool(x[..., 1:])
