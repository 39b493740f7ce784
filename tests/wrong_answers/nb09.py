"""Wrong answers to notebook 09's exercises, each with a piece of what the check must say."""

_HALVES = """
def in_halves(image, text, logit_scale, logit_bias):
    ids = torch.arange(len(image))
    total = 0
    for i, x in enumerate(image.chunk(2)):
        for j, y in enumerate(text.chunk(2)):
            {}
    return {}
"""
_CALL = "total += sigmoid_loss(x, y, logit_scale, logit_bias, *(ids.chunk(2)[k] for k in (i, j)))"
_PLAIN_CALL = "total += sigmoid_loss(x, y, logit_scale, logit_bias)"

_REACH = """
def reach(loss, logits):
    def gradient(place):
        place = place.detach().clone().requires_grad_()
        return torch.autograd.grad(loss(place), place)[0]

    before, moved = gradient(logits), logits.clone()
    {}
    return {}
"""

WRONG = {
    "09.1": {
        _REACH.format(
            "logits[0, 0] += 1", "(before != gradient(logits)).sum()"
        ): "changed the logits",
        _REACH.format(
            "moved[0, 0] += 1", "(gradient(moved) != 0).sum()"
        ): "count those that change",
        _REACH.format("moved[0, 0] += 1", "(before == gradient(moved)).sum()"): "stay as they were",
        _REACH.format(
            "moved[0, 0] += 1", "(before != gradient(moved)).sum() - 1"
        ): "counts as well",
        _REACH.format(
            "moved[0, 0] += 1", "(before != gradient(moved))[0].sum()"
        ): "the row is not all",
        _REACH.format(
            "moved[0, 0] += 1", "sum((before != gradient(moved)).sum(k)[0] for k in (0, 1))"
        ): "counts once",
        _REACH.format("moved += 1", "(before != gradient(moved)).sum()"): "you say",
        _REACH.format("moved[0, 0] += 1", "before != gradient(moved)"): "must return a number",
        "def reach(loss, logits): return 2 * len(logits) - 1": "there are 1 that change",
    },
    "09.2": {
        "def by_logits(logits, yes): return logits.sigmoid() - yes.double()": "the sum over pairs",
        "def by_logits(logits, yes): return (logits.sigmoid() - yes.double()) / logits.numel()": "number of pairs",
        "def by_logits(logits, yes): return (logits.sigmoid() - yes.double()) / logits.shape[1]": "number of texts",
        "def by_logits(logits, yes): return (yes.double() - logits.sigmoid()) / len(logits)": "sign is wrong",
        "def by_logits(logits, yes): return logits.sigmoid() / len(logits)": "all pairs as wrong",
        "def by_logits(logits, yes): return (logits.softmax(1) - yes.double()) / len(logits)": "stands alone",
        """
def by_logits(logits, yes):
    z = 2.0 * yes - 1.0
    return -F.logsigmoid(z * logits) / len(logits)
""": "not its derivative",
        """
def by_logits(logits, yes):
    z = 2.0 * yes - 1.0
    return -z * torch.sigmoid(z * logits) / len(logits)
""": "yours is large",
        "def by_logits(logits, yes): return (logits.sigmoid_() - yes.double()) / len(logits)": "changed the logits",
        "def by_logits(logits, yes): return (logits.sigmoid() - yes.double()).sum(1)": "shape of the logits",
        "def by_logits(logits, yes): return torch.zeros_like(logits)": "where it must be",
    },
    "09.3": {
        _HALVES.format(_CALL, "total"): "twice too large",
        _HALVES.format(_CALL, "total / 4"): "half of what it must be",
        _HALVES.format("if i == j: " + _CALL, "total / 2"): "never asked",
        _HALVES.format("if i == j: " + _CALL, "total"): "never asked",
        _HALVES.format(_PLAIN_CALL, "total / 2"): "without ids",
        _HALVES.format(_CALL.replace("(i, j)", "(0, 1)"), "total / 2"): "the loss of 16 pairs is",
        _HALVES.format(
            _CALL.replace(
                "(x, y,", "(image.chunk(2)[min(i, j)], text.chunk(2)[max(i, j)],"
            ).replace("(i, j))", "(min(i, j), max(i, j)))"),
            "total / 2",
        ): "comes twice",
        _HALVES.format(_CALL, "(total / 2).item()"): "a tensor of shape ()",
        _HALVES.format(_CALL, "(total / 2).detach()"): "no gradient can flow",
        _HALVES.format(_CALL, "(total / 2).float()"): "dtype float32",
        "def in_halves(*learned): return sigmoid_loss(*learned)": "matrix of all pairs",
        """
def in_halves(image, text, logit_scale, logit_bias):
    ids, total = torch.arange(len(image)), 0
    for x, image_ids in zip(image.chunk(2), ids.chunk(2)):
        total += sigmoid_loss(x, text, logit_scale, logit_bias, image_ids, ids)
    return total / 2
""": "one half of the texts",
        _HALVES.format(_CALL.replace("(x, y,", "(x.detach(), y,"), "total / 2"): "gradients",
    },
}
