"""Wrong answers to notebook 15's exercises, each with a piece of what the check must say."""

_TOKENS = """
def tokens_of(size):
    height, width = choose_resolution(size, candidate_resolutions())
    rows, columns = 14 * height // 384, 14 * width // 384
    return 14 * 15 + 1 + rows * (columns + 1)
"""
_REPAIRED = """
def repaired(x, grid, side):
    m, n = grid
    head = side * (side + 1) + 1
    rows = x[:, head:].unflatten(1, (n * side, m * side + 1))
    newline = rows[:, :1, -1:]
    tiles = rows[:, :, :-1].unflatten(2, (m, side)).unflatten(1, (n, side))
    tiles = tiles.transpose(2, 3).flatten(1, 2)
    whole = tiles.unflatten(1, (m, n)).transpose(2, 3)
    whole = whole.flatten(3, 4).flatten(1, 2)
    whole = torch.cat((whole, newline.expand(-1, m * side, -1, -1)), 2)
    return torch.cat((x[:, :head], whole.flatten(1, 2)), 1)
"""
_LIST = """
def best_list(sizes, most):
    import itertools

    def shown(size, candidate):
        (h, w), (high, wide) = size, candidate
        return min(min(high, h * wide // w) * min(wide, w * high // h), h * w)

    def tokens(candidate):
        rows, columns = 14 * candidate[0] // 384, 14 * candidate[1] // 384
        return 14 * 15 + 1 + rows * (columns + 1)

    best = None
    for three in itertools.combinations(candidate_resolutions(), 3):
        chosen = [choose_resolution(size, three) for size in sizes]
        if sum(map(tokens, chosen)) <= most * len(sizes):
            pixels = sum(map(shown, sizes, chosen))
            if best is None or pixels > best[0]:
                best = pixels, list(three)
    return None if best is None else best[1]
"""
_NATS = """
def nats(logits, tokens):
    each = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    before = (tokens == EOS).cumsum(1) - (tokens == EOS).long()
    return (each * (before == 0)).sum(1)
"""


def _instead(code: str, old: str, new: str) -> str:
    assert old in code
    return code.replace(old, new)


WRONG = {
    "15.1": {
        _instead(_TOKENS, "14 * 15 + 1 + ", ""): "the thumbnail is missing",
        _instead(_TOKENS, "14 * 15 + 1", "14 * 15"): "the separator",
        _instead(
            _TOKENS, "14 * 15 + 1 + rows * (columns + 1)", "196 + 1 + rows * columns"
        ): "each row ends with a newline",
        _instead(
            _TOKENS, "14 * 15 + 1 + rows * (columns + 1)", "196 + rows * columns"
        ): "those are tokens, too",
        _instead(
            _TOKENS, "rows * (columns + 1)", "rows * columns * 15 // 14"
        ): "one newline for the row of all",
        _instead(
            _instead(_TOKENS, "14 * height", "27 * height"), "14 * width", "27 * width"
        ).replace("14 * 15", "27 * 28"): "become 14 by 14",
        _instead(_TOKENS, "rows, columns =", "columns, rows ="): "are exchanged",
        _instead(_TOKENS, "(size, candidate", "(size[::-1], candidate"): "are exchanged",
        _instead(_TOKENS, "candidate_resolutions()", "[(384, 384)]"): "you count 421",
        "def tokens_of(size): return 421": "you count 421",
        "def tokens_of(size): return '421'": "must be one number",
    },
    "15.2": {
        "def repaired(x, grid, side): return x.clone()": "nothing is repaired",
        _instead(
            _REPAIRED, ".unflatten(2, (m, side))", ".unflatten(2, (side, m)).transpose(2, 3)"
        ): "for 2 x 2",
        _instead(
            _REPAIRED,
            "expand(-1, m * side, -1, -1)), 2)",
            "expand(-1, m * side, -1, -1)), 2)[:, :, :-1]",
        ): "how many rows end with a newline",
        _instead(_REPAIRED, "(whole, newline.expand", "(newline.expand").replace(
            "-1, -1)), 2)", "-1, -1), whole), 2)"
        ): "newlines stand at wrong places",
        _instead(
            _REPAIRED, "whole.flatten(3, 4)", "whole.flip(1).flatten(3, 4)"
        ): "at wrong places",
        _instead(
            _REPAIRED, "    m, n = grid", "    x = x[:1].expand(2, -1, -1)\n    m, n = grid"
        ): "second picture",
        _instead(_REPAIRED, "(x[:, :head],", "(0 * x[:, :head],"): "thumbnail and separator",
        _instead(
            _REPAIRED, "    m, n = grid", "    x[:, -1] = 0\n    m, n = grid"
        ): "changed the tokens",
        "def repaired(x, grid, side): return 'transposed grid'": "must be a tensor",
    },
    "15.3": {
        _instead(_LIST, "pixels > best[0]", "pixels < best[0]"): "of what the best one shows",
        _instead(
            _LIST,
            "sum(map(shown, sizes, chosen))",
            "sum(shown(s, c) / (s[0] * s[1]) for s, c in zip(sizes, chosen))",
        ): "of what the best one shows",
        _instead(_LIST, "<= most * len(sizes)", "<= 10**9"): "tokens a picture",
        _instead(
            _LIST, "<= most * len(sizes)", "< most * len(sizes)"
        ): "of what the best one shows",
        _instead(_LIST, ", h * w)", ", high * wide)"): "of what the best one shows",
        _instead(_LIST, "<= most * len(sizes)", "<= most"): "your result is None",
        _instead(
            _LIST, "candidate_resolutions(), 3", "candidate_resolutions(), 2"
        ): "list of three",
        _instead(
            _LIST, "return None if best is None else best[1]", "return best[1] if best else []"
        ): "must be None",
        _instead(_LIST, "    best = None", "    sizes.sort()\n    best = None"): "changed the list",
        "def best_list(sizes, most): return [(1, 1), (2, 2), (3, 3)]": "none of candidate_resolutions",
        "def best_list(sizes, most): return candidate_resolutions()[:3]": "of what the best one shows",
    },
    "15.4": {
        _instead(_NATS, "(each * (before == 0)).sum(1)", "each.sum(1)"): "those that fill it up",
        _instead(_NATS, "before == 0", "tokens != EOS"): "the first </s> counts too",
        _instead(
            _NATS, ".sum(1)\n", ".sum(1) / (before == 0).sum(1)\n"
        ): "the mean over the tokens",
        _instead(_NATS, "return (", "return -("): "minus the loss",
        _instead(_NATS, "return (each", "return torch.exp(-(each").replace(
            ".sum(1)\n", ".sum(1))\n"
        ): "is a probability",
        _instead(_NATS, ".sum(1)\n", ".sum()\n"): "shape (B,)",
        _instead(_NATS, "return (", "return 2 * ("): "minus the sum of log-probabilities",
        _instead(_NATS, "    each =", "    logits[:] = 0\n    each ="): "changed the logits",
    },
}
