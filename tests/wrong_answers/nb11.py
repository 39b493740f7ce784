"""Wrong answers to notebook 11's exercises, each with a piece of what the check must say."""

_MASS = """
def mass(maps, boxes, size):
    rows, columns = maps.shape[1:]
    y = (torch.arange(rows) + 0.5) * size / rows
    x = (torch.arange(columns) + 0.5) * size / columns
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    inside = ((y0 <= y) & (y < y1))[:, :, None] & ((x0 <= x) & (x < x1))[:, None]
    return (maps * inside).sum((1, 2)) / maps.sum((1, 2))
"""
_TWINS = """
def twins(tower, pixels, boxes, block, head):
    half = pixels.shape[-1] // 2
    scene = pixels.clone()
    scene[:, :, half:, half:] = pixels[:, :, :half, :half]
    with attention_maps(tower, layers=[block]) as maps, torch.no_grad():
        tower(scene)
    (weights,) = maps.values()
    n = int(weights.shape[-1] ** 0.5)
    centre = (torch.arange(n) + 0.5) * 2 * half / n

    def covered(box):
        x0, y0, x1, y1 = box[:, :, None].unbind(1)
        down, across = (y0 <= centre) & (centre < y1), (x0 <= centre) & (centre < x1)
        return (down[:, :, None] & across[:, None]).flatten(1).float()

    own, twin = covered(boxes[:, 0]), covered(boxes[:, 0] + half)
    given = torch.einsum("bq, bqk -> bk", own, weights[:, head])
    return tuple((given * there).sum().item() / own.sum().item() for there in (own, twin))
"""
_SQUARES = """
@torch.no_grad()
def squares(tower, pixels, text, window):
    rows, columns = (side // window for side in pixels.shape[2:])
    score = torch.empty(len(pixels), rows, columns, dtype=pixels.dtype)
    for row in range(rows):
        for column in range(columns):
            y, x = slice(row * window, (row + 1) * window), slice(column * window, (column + 1) * window)
            covered = torch.ones_like(pixels)
            covered[:, :, y, x] = pixels[:, :, y, x]
            score[:, row, column] = F.cosine_similarity(tower(covered), text)
    return score
"""


def _instead(code: str, old: str, new: str) -> str:
    assert old in code
    return code.replace(old, new)


WRONG = {
    "11.1": {
        _instead(_MASS, " / maps.sum((1, 2))", ""): "divide it by the map's own sum",
        _instead(_MASS, "/ maps.sum((1, 2))", "/ maps.sum()"): "not by that of all maps",
        _instead(_MASS, "/ maps.sum((1, 2))", "/ inside.sum((1, 2))"): "the mean inside the box",
        _instead(
            _MASS, "(maps * inside).sum((1, 2)) / maps.sum((1, 2))", "inside.float().mean((1, 2))"
        ): "counts patches",
        _instead(_MASS, "x0, y0, x1, y1 =", "y0, x0, y1, x1 ="): "x and y are swapped",
        _instead(_instead(_MASS, "x < x1", "x <= x1"), "y < y1", "y <= y1"): "is outside",
        _instead(_MASS, "+ 0.5", ""): "when its centre is",
        _instead(_MASS, "* size /", "* 1 /"): "in pixels and not in patches",
        _instead(_MASS, "return (", "return ((").replace(
            "(1, 2))\n", "(1, 2))).mean()\n"
        ): "shape (B,)",
        "def mass(maps, boxes, size): return 0.5": "must be a tensor",
    },
    "11.2": {
        _instead(_TWINS, "tower(scene)", "tower(pixels)"): "without a twin",
        _instead(_TWINS, "in (own, twin))", "in (twin, own))"): "the order is",
        _instead(_TWINS, "weights[:, head]", "weights[:, head - 1]"): "another head",
        _instead(_TWINS, "layers=[block]", "layers=[block - 1]"): "another block",
        _instead(
            _TWINS,
            "return tuple((given * there).sum().item() / own.sum().item()",
            "return tuple(((given * there).sum(1) / own.sum(1)).mean().item()",
        ): "do not take the mean over scenes",
        _instead(
            _TWINS, "/ own.sum().item()", "/ (given * (own + twin)).sum().item()"
        ): "number of the object's patches",
        _instead(_TWINS, "+ 0.5", ""): "by its centre",
        _instead(_TWINS, "boxes[:, 0] + half", "boxes[:, 0] + half - 4"): "half a picture further",
        _instead(_TWINS, "scene = pixels.clone()", "scene = pixels"): "changed the pixels",
        _instead(_TWINS, "return tuple(", "return torch.tensor(list(").replace(
            "(own, twin))", "(own, twin)))[None]"
        ): "two numbers",
    },
    "11.3": {
        _instead(
            _instead(_SQUARES, "ones_like(pixels)", "clone(pixels)"),
            "= pixels[:, :, y, x]",
            "= 1.0",
        ): "all but the square",
        _instead(
            _instead(
                _instead(_SQUARES, "ones_like(pixels)", "clone(pixels)"),
                "= pixels[:, :, y, x]",
                "= 1.0",
            ),
            "= F.cos",
            "= F.cosine_similarity(tower(pixels), text) - F.cos",
        ): "that is occlusion",
        _instead(
            _SQUARES, "= F.cos", "= F.cosine_similarity(tower(pixels), text) - F.cos"
        ): "the score itself",
        _instead(_SQUARES, "ones_like", "zeros_like"): "a grey",
        _instead(_SQUARES, "torch.ones_like", "-torch.ones_like"): "black",
        _instead(
            _SQUARES, "F.cosine_similarity(tower(covered), text)", "(tower(covered) * text).sum(1)"
        ): "is a cosine",
        _instead(
            _SQUARES,
            "covered = torch.ones_like(pixels)",
            "covered = pixels\n            covered[:] = 1.0",
        ): "changed the pixels",
        _instead(_SQUARES, "return score", "return score.mT"): "the shape (B, rows, columns)",
        _instead(
            _SQUARES, "score[:, row, column] =", "score[:, -row, -column] ="
        ): "rows and columns of pixels",
    },
}
