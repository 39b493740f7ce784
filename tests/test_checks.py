import numpy as np
import pytest
import torch

import siglip_lib
from siglip_lib.base import checks
from siglip_lib.base.checks import finite_tensors
from siglip_lib.tower.patches import PatchDropout


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_that_are_not_finite_are_named(value, dtype):
    tensors = {f"w{i}": torch.ones(3, dtype=dtype) for i in range(9)}
    tensors |= {"count": torch.tensor(2**62), "empty": torch.empty(0)}
    finite_tensors("the file holds", tensors)
    for i in range(2, 9):
        tensors[f"w{i}"][1] = value
    with pytest.raises(ValueError, match=r"the file holds NaN .* w2, w3, w4, w5, w6 and 2 more"):
        finite_tensors("the file holds", tensors)


INTEGERS = [np.int64(8), np.int8(8), np.uint16(8), 8]


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_integers_become_pythons(value):
    for found in (
        checks.count("n", value),
        checks.positive_int("n", value),
        *checks.pair("n", value),
    ):
        assert type(found) is int
        assert found == 8
    assert checks.pair("n", (value, 3)) == (8, 3)


@pytest.mark.parametrize(
    "value", [np.float16(0.5), np.float32(0.5), np.float64(0.5), 0.5], ids=repr
)
def test_floats_become_pythons(value):
    for check in (checks.number, checks.finite, checks.probability):
        assert type(check("x", value)) is float
        assert check("x", value) == 0.5


@pytest.mark.parametrize("value", [True, np.True_, "1", None, torch.tensor(1)], ids=repr)
def test_what_is_no_number(value):
    for check in (checks.number, checks.finite, checks.probability, checks.count, checks.pair):
        with pytest.raises(TypeError, match=r"x=.* must be a"):
            check("x", value)


@pytest.mark.parametrize("value", [np.float32("nan"), np.inf, -np.inf])
def test_numbers_that_are_not_finite(value):
    with pytest.raises(ValueError, match=r"x=.* must be finite"):
        checks.finite("x", value)


def numbers_of(module):
    """Every number that a module and its parts hold, and the elements of their pairs."""
    for part in module.modules():
        for value in vars(part).values():
            yield from value if isinstance(value, tuple) else [value]


@pytest.mark.parametrize(
    "build",
    [
        lambda i, f: siglip_lib.Attention(i(8), i(2), attn_drop=f(0.5), proj_drop=f(0.5)),
        lambda i, f: siglip_lib.AttentionPoolLatent(
            i(8), i(2), i(5), f(1.5), latent_len=i(2), latent_dim=i(4), pos_embed="abs", drop=f(0.5)
        ),
        lambda i, f: siglip_lib.Block(
            i(8), i(2), f(1.5), init_values=f(0.5), drop_path=f(0.5), attn_drop=f(0.5)
        ),
        lambda i, f: siglip_lib.DropPath(f(0.5)),
        lambda i, f: siglip_lib.LayerScale(i(8), f(0.5)),
        lambda i, f: siglip_lib.Mlp(i(8), i(16), i(4), drop=(f(0.5), f(0.25))),
        lambda i, f: siglip_lib.PatchEmbed((i(8), i(8)), i(4), i(3), i(8)),
        lambda i, f: PatchDropout(f(0.5)),
        lambda i, f: siglip_lib.TextTransformer(i(9), i(5), i(8), i(1), i(2), f(2.0), i(4)),
        lambda i, f: siglip_lib.VisionTransformer(
            i(8),
            i(4),
            i(3),
            i(2),
            "map",
            i(8),
            i(2),
            i(2),
            f(2.0),
            class_token=False,
            reg_tokens=i(1),
            drop_rate=f(0.5),
            drop_path_rate=f(0.5),
            num_recomputing_layers=i(1),
        ),
    ],
)
def test_modules_of_numpys_numbers_hold_pythons(build):
    torch.manual_seed(0)
    built = build(np.int64, np.float32)
    torch.manual_seed(0)
    plain = build(int, float)
    assert str(built) == str(plain)
    assert built.state_dict().keys() == plain.state_dict().keys()
    assert all(map(torch.equal, built.state_dict().values(), plain.state_dict().values()))
    assert not any(isinstance(value, np.generic) for value in numbers_of(built))


def test_spreads_and_counts_of_numpy():
    x, y = torch.empty(9), torch.empty(9)
    torch.manual_seed(0)
    siglip_lib.trunc_normal_(x, std=np.float32(0.5), a=np.float32(-1), b=np.int64(1))
    torch.manual_seed(0)
    assert torch.equal(x, siglip_lib.trunc_normal_(y, std=0.5, a=-1.0, b=1.0))
    image = torch.randn(3, 4)
    found = siglip_lib.sigmoid_loss(image, image, x[0], x[1], chunk=np.int64(2))
    assert torch.equal(found, siglip_lib.sigmoid_loss(image, image, x[0], x[1], chunk=2))
    q = torch.randn(1, 3, 2, 8)
    found = siglip_lib.attend(q, q, q, scale=np.float32(0.5), dropout=np.float64(0))
    assert torch.equal(found, siglip_lib.attend(q, q, q, scale=0.5))


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "x must be a tensor (B, 3) or (), not list; h"),
        (X.bool(), {}, TypeError, "x is torch.bool; it must be of float16, bfloat"),
        (X, {"dtypes": checks.INTEGERS}, TypeError, "x is torch.float32; it must be of integers; h"),
        (torch.ones(2, 4), {}, ValueError, "x has shape (2, 4); it must be (B, 3) or (); h"),
        (torch.ones(3), {}, ValueError, "(B, 3) or (); x[None] makes a batch of one; h"),
        (torch.ones(0, 3), {"empty": False}, ValueError, "must be (B, 3) or (), each at least 1; h"),
        (X, {"like": ("y", X.to("meta"))}, ValueError, "x is on cpu; it must be on meta, as y is"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_as_described(given, options, error, message):
    with pytest.raises(error) as caught:
        checks.check_tensor("x", given, ("B", 3), (), hint="h", **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("x", [X[:0], X.double(), X[0, 0]])
def test_tensors_as_described(x):
    assert checks.check_tensor("x", x, ("B", 3), (), like=("x", x)) == tuple(x.shape)
    assert checks.check_tensor("x", x.long(), dtypes=checks.NUMBERS) == tuple(x.shape)
