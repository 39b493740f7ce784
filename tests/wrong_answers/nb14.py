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

_CLOCK = """
import time


def start_and_rate(call):
    seconds = {}
    for pairs in (256, 1024):
        call(pairs)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call(pairs)
            times.append(time.perf_counter() - start)
        seconds[pairs] = statistics.median(times)
    k = (seconds[1024] - seconds[256]) / (1024**2 - 256**2)
    a = seconds[256] - k * 256**2
    return ANSWER
"""


def _clock(answer: str, old: str = "", new: str = "") -> str:
    return (
        _CLOCK.replace("ANSWER", answer).replace(old, new)
        if old
        else _CLOCK.replace("ANSWER", answer)
    )


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
        _clock("a"): "two numbers",
        _clock("1e3 * a, 1e3 * k"): "are wanted in seconds",
        _clock("k, a"): "a comes first",
        _clock("a, (seconds[1024] - seconds[256]) / (1024 - 256)"): "the square of the pairs",
        _clock("seconds[256], k"): "the whole time of the small call",
        _clock("a, seconds[1024] / 1024**2"): "take the difference of both sizes",
        _clock("a, k", "statistics.median", "sum"): "first calls left out",
        _clock("a, k", "statistics.median", "max"): "first calls left out",
        _clock("a, k", "range(5)", "range(1)"): "at least four times",
        _clock("a, k", "1024):", "1024, 4096):"): "measure at 256 and at 1,024",
        "def start_and_rate(call): return 0.003, 2e-9": "must call",
        _clock("0.003, 2e-9"): "a number fixed",
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
