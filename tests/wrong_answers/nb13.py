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
        "def resident(registers, threads, *others): return 65536 // (registers * threads)": "count q, k and v",
        """
def resident(registers, threads, own, read, width, stages):
    return 228 * 1024 // (2 * (own * width + stages * 2 * read * width) + 1024)
""": "registers are forgotten",
        """
def resident(registers, threads, own, read, width, stages):
    shared = 2 * (own * width + stages * 2 * read * width)
    return min(65536 // (registers * threads), 228 * 1024 // shared)
""": "loses 1 KiB",
        """
def resident(registers, threads, own, read, width, stages):
    shared = 2 * (own * width + stages * read * width)
    return min(65536 // (registers * threads), 228 * 1024 // (shared + 1024))
""": "you count one of them",
        """
def resident(registers, threads, own, read, width, stages):
    shared = 2 * stages * (own * width + 2 * read * width)
    return min(65536 // (registers * threads), 228 * 1024 // (shared + 1024))
""": "q lies there once",
        """
def resident(registers, threads, own, read, width, stages):
    shared = 2 * (own * width + 2 * read * width)
    return min(65536 // (registers * threads), 228 * 1024 // (shared + 1024))
""": "only one stage",
        """
def resident(registers, threads, own, read, width, stages):
    shared = 4 * (own * width + stages * 2 * read * width)
    return min(65536 // (registers * threads), 228 * 1024 // (shared + 1024))
""": "2 bytes, not 4",
        """
def resident(registers, threads, own, read, width, stages):
    shared = 2 * (own * width + stages * 2 * read * width)
    return min(65536 / (registers * threads), 228 * 1024 / (shared + 1024))
""": "round down",
        """
def resident(registers, threads, own, read, width, stages):
    shared = 2 * (own * width + stages * 2 * read * width)
    return min(65536 // registers, 228 * 1024 // (shared + 1024))
""": "for each of its threads",
        "def resident(*arguments): return 2": "fit",
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
