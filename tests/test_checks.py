import pytest
import torch

from siglip_lib.checks import finite_tensors


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
