"""Wrong answers to notebook 08's exercises, each with a piece of what the check must say."""

_COUNT = """
def parameters(width, layers, hidden, patch, tokens):
    mlp = 2 * width * hidden + hidden + width
    block = 4 * width * width + 4 * width + mlp + 4 * width
    head = 4 * width * width + 4 * width + mlp + 3 * width
    return {}
"""
_WHOLE = "3 * patch * patch * width + width + tokens * width + layers * block + 2 * width + head"
_SHARE = """
def share_right(model, tokenizer, vectors, names, wanted, prompt):
    texts = embed_texts(model, tokenizer, {})
    best = (vectors @ texts.T).argmax(dim=1)
    return {}
"""
_PROMPTED = "[prompt.format(name) for name in names]"
_SIGMOIDS = """
def _sigmoids(vectors, texts, model):
    return (model.logit_scale.exp() * vectors @ texts.T + model.logit_bias).sigmoid()
"""

WRONG = {
    "08.1": {
        _COUNT.format(_WHOLE.replace(" + head", "")): "the pooling head is missing",
        _COUNT.format(_WHOLE.replace("+ head", "+ block")): "counts the head as a block",
        _COUNT.format(_WHOLE.replace("+ head", "+ head - width")): "one vector of the width",
        _COUNT.format(_WHOLE.replace("+ 2 * width ", "")): "a norm is missing",
        _COUNT.format(_WHOLE.replace("+ tokens * width ", "")): "the position embeddings",
        _COUNT.format(_WHOLE.replace("3 * patch", "patch")): "three colours",
        _COUNT.format(_WHOLE.replace("layers * block", "block")): "several blocks",
        _COUNT.format(_WHOLE + " + 2 * width"): "one norm, not two",
        _COUNT.format(_WHOLE + " + 7"): "7 too many",
        _COUNT.format(_WHOLE.replace("tokens", "729")): "not for SigLIP's large tower",
        "def parameters(*sizes): return '428 million'": "must return a number",
    },
    "08.2": {
        """
def join(state, i):
    names = [f"encoder.layers.{i}.self_attn.{part}_proj" for part in "qkv"]
    return torch.cat([state[f"{n}.weight"] for n in names], 1), state[f"{names[0]}.bias"]
""": "an output is a row",
        """
def join(state, i):
    names = [f"encoder.layers.{i}.self_attn.{part}_proj" for part in "kqv"]
    return tuple(torch.cat([state[f"{n}.{kind}"] for n in names]) for kind in ("weight", "bias"))
""": "the order is k, q, v",
        """
def join(state, i):
    names = [f"encoder.layers.{i}.self_attn.{part}_proj" for part in "qkv"]
    weight = torch.cat([state[f"{n}.weight"] for n in names])
    return weight, torch.cat([state[f"{n}.bias"] for n in reversed(names)])
""": "the weight is right; the bias is not",
        """
def join(state, i):
    names = [f"encoder.layers.0.self_attn.{part}_proj" for part in "qkv"]
    return tuple(torch.cat([state[f"{n}.{kind}"] for n in names]) for kind in ("weight", "bias"))
""": "layer 0",
        """
def join(state, i):
    names = [f"encoder.layers.{i}.self_attn.{part}_proj" for part in "qkv"]
    weight = torch.stack([state[f"{n}.weight"] for n in names], 1).flatten(0, 1)
    return weight, torch.cat([state[f"{n}.bias"] for n in names])
""": "alternate",
        """
def join(state, i):
    names = [f"encoder.layers.{i}.self_attn.{part}_proj" for part in "qkv"]
    weight = torch.cat([state[f"{n}.weight"].T for n in names])
    return weight, torch.cat([state[f"{n}.bias"] for n in names])
""": "transposed",
        """
def join(state, i):
    return torch.cat([state[f"encoder.layers.{i}.self_attn.{p}_proj.weight"] for p in "qkv"])
""": "must be a pair",
    },
    "08.3": {
        "def second_to_last(tower, x): return tower.intermediates(x)['blocks.2']": "norm is missing",
        "def second_to_last(tower, x): return tower.forward_features(x)": "of the whole tower",
        "def second_to_last(tower, x): return tower.norm(tower.intermediates(x)['blocks.1'])": (
            "one block too few"
        ),
        "def second_to_last(tower, x): return tower.intermediates(x)['blocks.3']": "before the norm",
        "def second_to_last(tower, x): return tower(x)": "not pooled",
        """
def second_to_last(tower, x):
    tower.blocks = tower.blocks[:-1]
    return tower.forward_features(x)
""": "changed the tower",
    },
    "08.4": {
        _SHARE.format(_PROMPTED, "(best == wanted).sum().item()"): "divide by the number",
        _SHARE.format(_PROMPTED, "100 * (best == wanted).double().mean()"): "in per cent",
        _SHARE.format(_PROMPTED, "(best != wanted).double().mean().item()"): "of wrong ones",
        _SHARE.format("names", "(best == wanted).double().mean().item()"): "stand in the prompt",
        _SHARE.format(_PROMPTED, "(best == 0).double().mean().item()"): "is right",
        "def share_right(*given): return 1.0": "is right",
        _SHARE.format(
            _PROMPTED, "(_sigmoids(vectors, texts, model)[range(20), wanted] > 0.5).double().mean()"
        )
        + _SIGMOIDS: "is right",
        _SHARE.format(
            _PROMPTED,
            "((vectors @ texts.T).softmax(0).argmax(1) == wanted).double().mean()",
        ): "is right",
        _SHARE.format(_PROMPTED, "best"): "must return a number",
    },
}
