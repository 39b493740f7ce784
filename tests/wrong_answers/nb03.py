"""Wrong answers to notebook 03's exercises, each with a piece of what the check must say."""

_CHUNKS = """
def attend_in_chunks(q, k, v, chunk):
    largest = q.new_full((q.shape[0], 1), {start})
    total, out = torch.zeros_like(largest), torch.zeros_like(q)
    for k_part, v_part in zip(k.split(chunk), v.split(chunk)):
        scores = q @ k_part.T * {scale}
        grown = {grown}
        weights = (scores - grown).exp()
        total = total * {rescale} + weights.sum(dim=1, keepdim=True)
        out = out * {rescale} + weights @ v_part
        largest = grown
    return out / total
"""
_RIGHT = dict(
    start="-math.inf",
    scale="q.shape[1] ** -0.5",
    grown="torch.maximum(largest, scores.amax(dim=1, keepdim=True))",
    rescale="(largest - grown).exp()",
)


_KEYS = """
def keys_seen(std):
    attention = Attention(288, 4)
    nn.init.normal_(attention.qkv.weight, std={std})
    with torch.no_grad():
        w = attention.attention_map(torch.randn(1, {tokens}, 288))
    entropy = -torch.special.xlogy(w, w).sum(dim=-1).mean()
    return {answer}
"""


def _keys(std: str = "std", tokens: str = "729", answer: str = "entropy.exp().item()") -> str:
    return _KEYS.format(std=std, tokens=tokens, answer=answer)


def _chunks(**changed: str) -> str:
    return _CHUNKS.format(**_RIGHT | changed)


WRONG = {
    "03.1": {
        "def score_std(dim, num_heads, std): return dim * std**2 * (dim / num_heads) ** 0.5": "before the scale",
        "def score_std(dim, num_heads, std): return dim**0.5 * std": "one channel of q",
        "def score_std(dim, num_heads, std): return (dim * std**2) ** 2": "that is the variance",
        "def score_std(dim, num_heads, std): return dim * std**2 / (dim / num_heads) ** 0.5": "one product",
        "def score_std(dim, num_heads, std): return 0.4608": "random draws give",
        "def score_std(dim, num_heads, std): return 1.0": "random draws give",
    },
    "03.2": {
        _keys(std="0.02"): "changes nothing",
        _keys(std="std**0.5"): "not their variance",
        _keys(tokens="256"): "729 tokens",
        _keys(answer="entropy.item()"): "the entropy H",
        _keys(answer="(entropy / math.log(2)).exp().item()"): "in bits",
        _keys(answer="entropy.exp().item() / 4"): "this measurement gives",
        "def keys_seen(std): return 729 * math.exp(-((288 * std**2) ** 2) / 2)": "what the approximation says",
    },
    "03.3": {
        "def attend_in_chunks(q, k, v, chunk): return (q @ k.T / math.sqrt(q.shape[1])).softmax(-1) @ v": "N x N",
        _chunks(scale="1.0"): "lack the scale",
        _chunks(rescale="1.0"): "exp(old - new)",
        _chunks(rescale="0.0"): "only the last chunk",
        _chunks(start="0.0", grown="largest"): "overflow",
        _chunks(start="0.0"): "far below 0",
        _chunks(start="-100.0"): "far below 0",
        _chunks()
        + "_right, attend_in_chunks = attend_in_chunks, lambda *x: _right(*x).float()": "in torch.float32",
        """
def attend_in_chunks(q, k, v, chunk):
    parts = [
        (q @ a.T / math.sqrt(q.shape[1])).softmax(-1) @ b
        for a, b in zip(k.split(chunk), v.split(chunk))
    ]
    return sum(parts)
""": "softmax of its own",
        """
def attend_in_chunks(q, k, v, chunk):
    parts = [
        (q @ a.T / math.sqrt(q.shape[1])).softmax(-1) @ b
        for a, b in zip(k.split(chunk), v.split(chunk))
    ]
    return sum(parts) / len(parts)
""": "softmax of its own",
    },
}
