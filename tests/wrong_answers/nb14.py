"""Wrong answers to notebook 14's exercises, each with a piece of what the check must say."""

_RANK = """
def rank_loss(image, texts, logit_scale, logit_bias, rank):
    logits = logit_scale.exp() * image @ texts.T + logit_bias
    z = torch.full_like(logits, -1)
    z.diagonal({}).fill_(1)
    return {}
"""
_SUM = "-F.logsigmoid(z * logits).sum()"
_OFFSET = "rank * len(image)"

_SENT = """
def sent(world, pairs, width):
    block = pairs * width
    return (6 * world - 2) * block, {}
"""

WRONG = {
    "14.1": {
        "def meets(images, texts, world): return (texts - images) % world": "go to the next one",
        "def meets(images, texts, world): return images - texts": "from the last rank to rank 0",
        "def meets(images, texts, world): return abs(images - texts)": "one way only",
        "def meets(images, texts, world): return (images - texts) % world + 1": "one too many",
        "def meets(images, texts, world): return (images - texts) % 5": "a number fixed",
        "def meets(images, texts, world): return 0": "you say 0",
        "def meets(images, texts, world): return 'never'": "a hop is an integer",
    },
    "14.2": {
        "def sent(world, pairs, width): return (world - 1) * pairs * width * 2, 0": "the texts alone",
        "def sent(world, pairs, width): return (world - 1) * pairs * width * 6, 0": "come home",
        "def sent(world, pairs, width): return world * pairs * width * 6, 0": "no texts leave",
        "def sent(world, pairs, width): return (2 * world - 1) * pairs * width * 2, 0": "4 bytes",
        "def sent(world, pairs, width): return 2 * (world - 1) * pairs * width * 2, 0": "one send more",
        "def sent(world, pairs, width): return world * (6 * world - 2) * pairs * width, 0": "all ranks together",
        "def sent(world, pairs, width): return 1, 1": "is not right",
        "def sent(world, pairs, width): return 6 * world": "two numbers",
        "def sent(world, pairs, width): return 'many', 'few'": "two numbers",
        _SENT.format("(world - 1) * block * 2"): "the way there",
        _SENT.format("world * block * 4"): "to itself",
        _SENT.format("(2 * world - 1) * block * 2"): "keeps its own",
        _SENT.format("(world - 1) * block * 6"): "in bfloat16",
        _SENT.format("(world - 1) * world * block * 4"): "all ranks together",
        _SENT.format("1"): "the all-gather",
        "def sent(world, pairs, width): return 17600, 9600": "a number fixed",
    },
    "14.3": {
        _RANK.format(_OFFSET, _SUM + " / len(texts)"): "done so already",
        _RANK.format(_OFFSET, _SUM): "this rank's number of images",
        _RANK.format(_OFFSET, _SUM + " * len(texts) / len(image) ** 2"): "by the number of ranks",
        _RANK.format(_OFFSET, "-F.logsigmoid(z * logits).mean()"): "not of pairs",
        _RANK.format("0", _SUM + " / len(image)"): "take the first texts for its own",
        _RANK.format("rank", _SUM + " / len(image)"): "begins at column rank · B",
        _RANK.replace(".exp()", "").format(_OFFSET, _SUM + " / len(image)"): "its exponential",
        "def rank_loss(image, texts, logit_scale, logit_bias, rank):\n"
        "    mine = texts[rank * len(image) : (rank + 1) * len(image)]\n"
        "    return sigmoid_loss(image, mine, logit_scale, logit_bias)": "never asked",
        _RANK.format(_OFFSET, "2 + " + _SUM + " / len(image)"): "must be",
        _RANK.format(_OFFSET, "(" + _SUM + " / len(image)).item()"): "a tensor of shape ()",
        _RANK.format(_OFFSET, "(" + _SUM + " / len(image)).detach()"): "no gradient can flow",
        _RANK.replace("texts.T", "texts.detach().T").format(
            _OFFSET, _SUM + " / len(image)"
        ): "gradient of the text tower",
    },
}
