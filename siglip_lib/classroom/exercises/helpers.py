"""What checks of several notebooks ask of an answer: its type, which known mistake it is, what it did on the way."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def is_number(value: object) -> bool:
    """Whether ``value`` is an int or a float; a bool is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_pair(value: object) -> bool:
    """Whether ``value`` is a tuple or list of two."""
    return isinstance(value, (tuple, list)) and len(value) == 2


def is_tensor(value: object, *shape: int) -> bool:
    """Whether ``value`` is a tensor of that shape."""
    return isinstance(value, Tensor) and value.shape == shape


def was_changed(now: object, before: object) -> bool:
    """Whether tensors, or the tensors in lists or dicts, differ from what they were ``before``."""
    now, before = tree_leaves(now), tree_leaves(before)
    return len(now) != len(before) or not all(map(torch.equal, now, before))


def near(rel_tol: float) -> Callable[[float, float], bool]:
    """Return a function that tells whether two numbers differ by at most that share of the larger one."""
    return partial(math.isclose, rel_tol=rel_tol)


def first_match(
    found: object,
    mistakes: Mapping[str, object],
    same: Callable[[object, object], bool] = torch.allclose,
) -> str | None:
    """Return the first reason whose wrong value ``found`` is, None if it is none of them.

    Args:
        found: the reader's value.
        mistakes: by reason the value that this mistake leads to, or a tuple of such values.
        same: called with ``found`` and a wrong value.
    """
    for reason, wrong in mistakes.items():
        if any(same(found, value) for value in (wrong if isinstance(wrong, tuple) else (wrong,))):
            return reason
    return None


class ShapesMade(TorchDispatchMode):
    """Collects the shapes of all tensors that operators return inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    @property
    def most_elements(self) -> int:
        """Number of elements of the largest tensor."""
        return max((shape.numel() for shape in self.shapes), default=0)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.shapes |= {x.shape for x in tree_leaves(out) if isinstance(x, Tensor)}
        return out
