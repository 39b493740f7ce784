"""Block: timm's is the oracle."""

import importlib
import math
import shutil
from functools import partial

import pytest
import torch
from comparing import assert_same
from timm.models import vision_transformer
from torch import nn

from siglip_lib import Block, DropPath, LayerScale

BLOCKS = [
    {},
    {"qkv_bias": True, "mlp_ratio": 3.7},
    {"qk_norm": True, "init_values": 0.1},
    {
        "qkv_bias": True,
        "act_layer": partial(nn.GELU, approximate="tanh"),
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
    },
]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("options", BLOCKS, ids=lambda options: ",".join(options) or "plain")
def test_is_timms(options, backend, device):
    options = {"norm_layer": nn.LayerNorm} | options  # timm's own has another epsilon
    theirs = vision_transformer.Block(24, 3, **options).to(device)
    ours = Block(24, 3, **options, backend=backend).to(device)
    # in float64, where even another epsilon of a norm shows
    x = torch.randn(2, 7, 24, dtype=torch.float64, device=device)
    assert_same(ours.double(), theirs.double(), x)


def test_zero_is_a_value_of_layer_scale_and_none_is_none():
    x = torch.randn(2, 3, 8)
    assert isinstance(Block(8, 2, init_values=0.0).ls1, LayerScale)
    assert torch.equal(Block(8, 2, init_values=0.0)(x), x)
    assert isinstance(Block(8, 2).ls2, nn.Identity)


def test_drop_path_leaves_the_residual():
    torch.manual_seed(1)
    block, x = Block(8, 2, drop_path=0.5), torch.randn(64, 3, 8)
    untouched = (block(x) == x).flatten(1).all(1).double().mean()
    assert 0.1 < untouched < 0.4  # a quarter of the samples loses both branches
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


def test_each_dropout_goes_where_it_belongs():
    block = Block(8, 2, proj_drop=0.1, attn_drop=0.2, drop_path=0.3)
    drops = {name: m.p for name, m in block.named_modules() if isinstance(m, nn.Dropout)}
    assert drops == {
        "attn.attn_drop": 0.2,
        "attn.proj_drop": 0.1,
        "mlp.drop1": 0.1,
        "mlp.drop2": 0.1,
    }
    assert (block.drop_path1.drop_prob, block.drop_path2.drop_prob) == (0.3, 0.3)


def test_hands_on_its_layers_and_flags():
    class OwnMlp(nn.Identity):
        def __init__(self, dim, hidden, act_layer, drop):
            super().__init__()
            self.given = (dim, hidden, act_layer, drop)

    class OwnNorm(nn.LayerNorm):
        pass

    block = Block(
        8,
        2,
        2.5,
        act_layer=nn.ReLU,
        norm_layer=OwnNorm,
        mlp_layer=OwnMlp,
        qk_norm=True,
        deterministic=True,
        backend="eager",
    )
    assert block.mlp.given == (8, 20, nn.ReLU, 0.0)
    assert sum(isinstance(m, OwnNorm) for m in block.modules()) == 4
    assert block.attn.deterministic
    assert block.attn.backend == "eager"


def test_so400m_on_the_meta_device():
    with torch.device("meta"):
        block = Block(1152, 16, mlp_ratio=3.7362, qkv_bias=True)
        out = block(torch.empty(2, 729, 1152))
    assert out.is_meta
    assert out.shape == (2, 729, 1152)
    assert block.mlp.fc1.out_features == 4304
    assert sum(p.numel() for p in block.parameters()) == 15_239_504


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 10}, ValueError, "dim=10 must be a multiple of num_heads=4"),
        ({"mlp_ratio": math.inf}, ValueError, "mlp_ratio=inf must be finite"),
        ({"mlp_ratio": "4"}, TypeError, "mlp_ratio='4' must be a number"),
        ({"mlp_ratio": 0.01}, ValueError, "hidden_features=0 must be at least 1"),
        ({"init_values": math.nan}, ValueError, "init_values=nan must be finite"),
        ({"drop_path": 1.0}, ValueError, "drop_prob=1.0 must lie in [0, 1)"),
        ({"proj_drop": -1.0}, ValueError, "proj_drop=-1.0 must lie in [0, 1)"),
        ({"attn_drop": 2}, ValueError, "attn_drop=2 must lie in [0, 1)"),
        (
            {"backend": "flash"},
            ValueError,
            "backend='flash' is unknown; allowed are auto, triton, cudnn",
        ),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error) as caught:
        Block(**({"dim": 16, "num_heads": 4} | options))
    assert message in str(caught.value)


def test_compiles_without_graph_breaks_forward_and_backward(device):
    block = Block(
        16, 2, qk_norm=True, init_values=0.1, drop_path=0.1, attn_drop=0.1, proj_drop=0.1
    ).to(device)
    x = torch.randn(2, 5, 16, device=device, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")  # needs no C compiler
    compiled(x).sum().backward()
    compiled.eval()
    torch.testing.assert_close(compiled(x), block.eval()(x))


def test_compiled_code_gives_the_same(device):
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("needs a C++ compiler")
    block = Block(16, 2).to(device).eval()
    x = torch.randn(2, 5, 16, device=device)
    with torch.no_grad():
        # scalar code, as the compilation of vector code takes twice as long
        compiled = torch.compile(block, fullgraph=True, options={"cpp.simdlen": 1})(x)
        torch.testing.assert_close(compiled, block(x))


@pytest.mark.parametrize("init_values", [None, 0.3])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_the_kernel_gives_what_the_steps_give(init_values, drop_path, gpu, monkeypatch):
    block = Block(128, 2, init_values=init_values, drop_path=drop_path).to(gpu, torch.bfloat16)
    x = torch.randn(300, 120, 128, device=gpu, dtype=torch.bfloat16)
    pull = torch.randn_like(x)

    def results():
        torch.manual_seed(3)
        inputs = x.clone().requires_grad_()
        out = block(inputs)
        gradients = torch.autograd.grad((out * pull).sum(), [inputs, *block.parameters()])
        return [out, *gradients]

    module = importlib.import_module("siglip_lib.tower.block")
    assert module._can_fuse(x, x, block.ls1, block.drop_path1) == bool(init_values or drop_path)
    fused = results()
    monkeypatch.setattr(module, "_can_fuse", lambda *_: False)
    for ours, theirs in zip(fused, results(), strict=True):
        assert ours.dtype == theirs.dtype
        limit = 0.02 * theirs.double().abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=limit)


def test_when_the_kernel_is_not_taken(gpu):
    module = importlib.import_module("siglip_lib.tower.block")
    x = torch.zeros(64, 729, 128, device=gpu, dtype=torch.bfloat16)
    scale, drop = LayerScale(128).to(gpu, torch.bfloat16), DropPath(0.1)
    assert module._can_fuse(x, x, scale, drop)
    assert not module._can_fuse(x, x, nn.Identity(), DropPath(0.0))  # nothing to do
    assert not module._can_fuse(x[:1], x[:1], scale, drop)
    assert not module._can_fuse(x, x, LayerScale(128).to(gpu), drop)  # float32: so would the sum be
    assert not module._can_fuse(x, x, nn.Linear(128, 128), drop)
    drop.register_forward_hook(lambda *_: None)
    assert not module._can_fuse(x, x, scale, drop)
