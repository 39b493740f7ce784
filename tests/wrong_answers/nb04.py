"""Wrong answers to notebook 04's exercises, each with a piece of what the check must say."""

WRONG = {
    "04.1": {
        "def useful(tokens, head_dim, block, width): return head_dim / width": "only the channels",
        """
def useful(tokens, head_dim, block, width):
    return tokens / (math.ceil(tokens / block) * block)
""": "only the keys",
        """
def useful(tokens, head_dim, block, width):
    return (tokens // block * block / tokens) * (head_dim // width * width / head_dim)
""": "counting multiplications gives",
        """
def useful(tokens, head_dim, block, width):
    return (tokens / (tokens // block * block)) * (head_dim / width)
""": "round up",
        """
def useful(tokens, head_dim, block, width):
    return math.ceil(tokens / block) * block / tokens * math.ceil(head_dim / width) * width / head_dim
""": "computed over useful",
        """
def useful(tokens, head_dim, block, width):
    return tokens / (math.ceil(tokens / block) * block) * head_dim / width
""": "round up",
    },
    "04.2": {
        "def longest(memory, batch, heads): return math.isqrt(memory // (2 * batch * heads))": "two tensors",
        "def longest(memory, batch, heads): return math.isqrt(memory // (4 * heads))": "each sample",
        "def longest(memory, batch, heads): return memory // (4 * batch * heads)": "square root",
        "def longest(memory, batch, heads): return math.ceil((memory / (4 * batch * heads)) ** 0.5)": "round down",
        "def longest(memory, batch, heads): return (memory / (4 * batch * heads)) ** 0.5": "is whole",
    },
    "04.3": {
        "def whole(share, faster): return faster": "only a tenth",
        "def whole(share, faster): return 1 - share + share / faster": "its inverse",
        "def whole(share, faster): return 1 / (1 - share)": "does not vanish",
        "def whole(share, faster): return 1 + share - share / faster": "divide the old time",
    },
}
