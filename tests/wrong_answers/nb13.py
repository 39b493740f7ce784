"""Wrong answers to notebook 13's exercises, each with a piece of what the check must say."""

_CAUSAL = """
def causal(q, k, v, scale, block):
    m = torch.full_like(q[:, 0], -math.inf)
    total, o = torch.zeros_like(m), torch.zeros_like(q)
    queries = torch.arange(len(q))
    for start in range(0, len(k), block):
        keys, values = k[start : start + block], v[start : start + block]
        s = scale * q @ keys.T
        place = start + torch.arange(len(keys))
        new = torch.maximum(m, s.amax(1))
        s = s.masked_fill(place > queries[:, None], -math.inf)
        new = torch.maximum(m, s.amax(1))
        shrink, p = (m - new).exp(), (s - new[:, None]).exp()
        total, o, m = total * shrink + p.sum(1), o * shrink[:, None] + p @ values, new
    return o / total[:, None]
"""
_MASK = "s = s.masked_fill(place > queries[:, None], -math.inf)\n        new = torch.maximum(m, s.amax(1))"


def _causal(old: str, new: str) -> str:
    assert old in _CAUSAL
    return _CAUSAL.replace(old, new)


_LAZY = """
def lazy(q, k, v, scale, block, threshold):
    m = torch.full_like(q[:, 0], -math.inf)
    best = m
    total, o, risen = torch.zeros_like(m), torch.zeros_like(q), 0
    for keys, values in zip(k.split(block), v.split(block), strict=True):
        s = scale * q @ keys.T
        most = s.amax(1)
        rises = most > m + threshold
        new = torch.where(rises, most, m)
        best = torch.maximum(best, most)
        shrink, p = (m - new).exp(), (s - new[:, None]).exp()
        total, o, m = total * shrink + p.sum(1), o * shrink[:, None] + p @ values, new
        risen += rises.sum().item()
    return o / total[:, None], risen
"""


def _lazy(old: str, new: str) -> str:
    assert old in _LAZY
    return _LAZY.replace(old, new)


WRONG = {
    "13.1": {
        "def merge(a, b): return torch.maximum(a[0], b[0]), a[1] + b[1], a[2] + b[2]": "as they came",
        "def merge(a, b): return a[0] + b[0], a[1] + b[1], a[2] + b[2]": "their sum",
        "def merge(a, b): return torch.minimum(a[0], b[0]), a[1] + b[1], a[2] + b[2]": "the smaller",
        "def merge(a, b): return torch.maximum(a[0], b[0])": "three tensors",
        """
def merge(first, second):
    (m1, l1, a1), (m2, l2, a2) = first, second
    shrink = (m2 - m1).exp()
    return m1, l1 + l2 * shrink, a1 + a2 * shrink[:, None]
""": "never looked at",
        """
def merge(first, second):
    (m1, l1, a1), (m2, l2, a2) = first, second
    m = torch.maximum(m1, m2)
    s1, s2 = (m1 - m).exp(), (m2 - m).exp()
    total = l1 * s1 + l2 * s2
    return m, total, (a1 * s1[:, None] + a2 * s2[:, None]) / total[:, None]
""": "divided already",
        """
def merge(first, second):
    (m1, l1, a1), (m2, l2, a2) = first, second
    m = torch.maximum(m1, m2)
    s1, s2 = (m1 - m).exp(), (m2 - m).exp()
    return m, l1 * s1 + l2 * s2, a1 + a2
""": "a is the sum",
        """
def merge(first, second):
    (m1, l1, a1), (m2, l2, a2) = first, second
    m = torch.maximum(m1, m2)
    s1, s2 = m1.exp() / m.exp(), m2.exp() / m.exp()
    return m, l1 * s1 + l2 * s2, a1 * s1[:, None] + a2 * s2[:, None]
""": "subtract m first",
        """
def merge(first, second):
    (m1, l1, a1), (m2, l2, a2) = first, second
    m = torch.maximum(m1, m2)
    s1, s2 = (m1 - m).exp(), (m2 - m1 + m1 - m).exp()
    return m, l1 * s1 + l2 * s2, a1 * s1[:, None] + a2 * s2[:, None]
""": "must change nothing",
        """
def merge(first, second):
    (m1, l1, a1), (m2, l2, a2) = first, second
    m = torch.maximum(m1, m2)
    return m, l1 * (m - m1).exp() + l2 * (m - m2).exp(), a1
""": "in the first row l is",
    },
    "13.2": {
        _lazy("risen += rises.sum().item()", "risen += 1"): "count queries and blocks",
        _lazy("+ threshold", ""): "does not depend on the threshold",
        _lazy(
            "rises = most > m + threshold", "rises = (most > m) & (most > m + threshold).any()"
        ): "yours raises the m of others",
        _lazy(
            "rises = most > m + threshold", "rises = (most > m + threshold).any().expand(len(q))"
        ): "yours raises the m of others",
        _lazy("risen += rises.sum().item()", "risen += len(q)"): "every m rises",
        _lazy("torch.zeros_like(q), 0", "torch.zeros_like(q), -len(q)"): "that counts",
        _lazy("most > m + threshold", "most > best + threshold"): "compare with m as it is",
        _lazy(
            "new = torch.where(rises, most, m)", "new = torch.maximum(most, m)"
        ): "compare with m as it is",
        _lazy("+= rises.sum()", "+= 2 * rises.sum()"): "in 40 queries, and not",
        _lazy("o * shrink[:, None]", "o"): "not the softmax's",
        _lazy("return o / total[:, None], risen", "return o / total[:, None]"): "two things",
        _lazy("return o / total[:, None], risen", "return o, risen"): "not the softmax's",
        _lazy(
            "return o / total[:, None], risen", "return o / total[:, None], rises"
        ): "must be a number",
        """
def lazy(q, k, v, scale, block, threshold):
    s = scale * q @ k.T
    m, risen = torch.full_like(q[:, 0], -math.inf), 0
    for part in s.split(block, 1):
        rises = part.amax(1) > m + threshold
        m, risen = torch.where(rises, part.amax(1), m), risen + rises.sum()
    return s.exp() / s.exp().sum(1, keepdim=True) @ v, risen
""": "subtract m first",
        "def lazy(q, k, v, scale, block, threshold): return q[:, 0], 3": "a tensor (N, D)",
    },
    "13.3": {
        _causal(_MASK, "pass"): "all keys",
        _causal("place > queries[:, None]", "place < queries[:, None]"): "query 8 becomes nan",
        _causal("place > queries[:, None]", "place >= queries[:, None]"): "query 0 becomes nan",
        _causal("place > queries[:, None]", "place > queries[:, None] + 1"): "one key too many",
        _causal("start + torch.arange", "torch.arange"): "from its block's start",
        _causal(", -math.inf)\n        new", ", 0.0)\n        new"): "a score of 0",
        _causal("o * shrink[:, None] + p", "o + p"): "of 23 is wrong",
        _causal(_MASK, _MASK.rpartition("\n")[0]): "raise m?",
        "def causal(q, k, v, scale, block): return None, q": "the output",
        _causal(
            "return o / total[:, None]", "return (o / total[:, None]).float()"
        ): "in torch.float32",
        """
def causal(q, k, v, scale, block):
    number = torch.arange(len(q))
    s = (scale * q @ k.T).masked_fill(number > number[:, None], -math.inf)
    return s.softmax(1) @ v
""": "held at once",
    },
}
