"""What two results or a number keep is said as a bound, and what they break raises."""

import math

import pytest
import torch

from siglip_lib import agree
from siglip_lib.classroom import between

WANTED = torch.tensor([2.0, -4.0, 0.5])


def test_says_the_bound():
    found = WANTED + torch.tensor([0.0, 0.0, 3e-5])  # 7.5e-6 of the largest element, 4
    assert agree(found, WANTED) == "equal to within 1e-05 of the largest element"
    with pytest.raises(AssertionError, match=r"the tensor: the largest difference is 7\.5e-06 of"):
        agree(found, WANTED, within=7e-6)


def test_zero_asks_for_the_same_bits():
    assert agree(WANTED.clone(), WANTED, within=0) == "the same bits"
    with pytest.raises(AssertionError, match="largest difference"):
        agree(torch.nextafter(WANTED, WANTED + 1), WANTED, within=0)


@pytest.mark.parametrize("kind", [list, tuple, lambda pair: dict(zip("ab", pair, strict=True))])
def test_several_tensors_each_by_its_own_size(kind):
    wanted = kind([WANTED, 1e6 * WANTED])
    assert agree(kind([WANTED, 1e6 * WANTED + 1]), wanted).startswith("equal")
    name = "a" if isinstance(wanted, dict) else "tensor 0"
    with pytest.raises(AssertionError, match=f"{name}: the largest difference is 2.5e-01"):
        agree(kind([WANTED + 1, 1e6 * WANTED]), wanted)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (WANTED[None], "shape|found"),
        (WANTED.double(), "float64"),
        (WANTED * math.nan, "nan"),
        (WANTED * math.inf, "inf|nan"),
        ([WANTED], "found .'tensor 0'"),
    ],
)
def test_other_kinds_and_nan_are_no_agreement(found, said):
    with pytest.raises(AssertionError, match=said):
        agree(found, WANTED, within=1e9)


def test_nothing_zeros_and_integers():
    with pytest.raises(ValueError, match="no element"):
        agree([], [])
    with pytest.raises(ValueError, match="no element"):
        agree(torch.empty(0), torch.empty(0))
    with pytest.raises(ValueError, match="within"):
        agree(WANTED, WANTED, within=-1)
    assert agree(torch.zeros(2), torch.zeros(2)).startswith("equal")
    with pytest.raises(AssertionError):
        agree(torch.ones(2), torch.zeros(2))  # of zeros nothing is near
    with pytest.raises(AssertionError):
        agree(torch.tensor([1, 2]), torch.tensor([1, 3]))


def test_gradients_and_devices_are_no_matter():
    assert agree(WANTED.clone().requires_grad_(), WANTED).startswith("equal")


def test_a_number_between_two_bounds():
    assert between(0.52, 0.4, 0.6) == "between 0.4 and 0.6"
    assert between(1e-5, 1e-5, 1) == "between 1e-05 and 1"  # the bounds belong to it
    for value, said in ((0.3, "0.3"), (0.7, "0.7"), (math.nan, "nan")):
        with pytest.raises(AssertionError, match=f"{said} is not between 0.4 and 0.6"):
            between(value, 0.4, 0.6)
