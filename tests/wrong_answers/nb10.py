"""Wrong answers to notebook 10's exercises, each with a piece of what the check must say."""

_BIAS = """
def best_bias(scores, yes):
    low, high = -1000.0, 1000.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        said = torch.sigmoid(scores + middle)
        if {}:
            high = middle
        else:
            low = middle
    return {}
"""
_RIGHT = "said.sum() > yes.sum()"
_RECALL = """
def recall_at(similarity, right, k):
    {}
    own = similarity.gather(1, right[:, None])
    before = {}
    return (before < k).float().{}
"""
_FINITE = "if not similarity.isfinite().all(): raise ValueError('not finite')"
_BEFORE = "(similarity >= own).sum(1) - 1"
_RANKED = """
def recall_at(similarity, right, k):
    if not similarity.isfinite().all(): raise ValueError('not finite')
    return ({} == right[:, None]).any(1).double().mean().item()
"""
_ENSEMBLE = """
def ensemble(vectors):
    mean = vectors.mean({})
    return {}
"""

WRONG = {
    "10.1": {
        _BIAS.format(_RIGHT, "-middle"): "sign is wrong",
        _BIAS.format(_RIGHT, "middle + 0.05"): "the loss is least at",
        _BIAS.format(_RIGHT, "str(middle)"): "must return a number",
        _BIAS.format("(said > 0.5).sum() > yes.sum()", "middle"): "must add up to the pairs",
        _BIAS.format("said[~yes].mean() > (1 - said[yes]).mean()", "middle"): "count alike",
        "def best_bias(scores, yes): return torch.logit(yes.double().mean())": "all scores were 0",
        "def best_bias(scores, yes): return 0.0": "the loss is least at",
        "def best_bias(scores, yes): scores.zero_(); return 0.0": "changed",
        "def best_bias(scores, yes): yes.zero_(); return 0.0": "changed",
    },
    "10.2": {
        _RECALL.format(_FINITE, "(similarity > own).sum(1)", "mean().item()"): "as similar as",
        _RECALL.format(_FINITE, "(similarity >= own).sum(1)", "mean().item()"): "before itself",
        _RANKED.format("similarity.topk(k, dim=1).indices"): "as being before",
        _RANKED.format(
            "similarity.argsort(dim=1, descending=True, stable=True)[:, :k]"
        ): "whichever column",
        _RANKED.format(
            "similarity.flip(1).argsort(dim=1, descending=True, stable=True).mul(-1).add(3)[:, :k]"
        ): "whichever column",
        _RECALL.format(_FINITE, _BEFORE, "sum().item()"): "not a number of queries",
        _RECALL.format(_FINITE, "(similarity <= own).sum(1) - 1", "mean().item()"): "0.2, 0.8",
        _RECALL.format("", _BEFORE, "mean().item()"): "similarity of nan",
        _RECALL.format(
            "if similarity.isnan().any(): raise ValueError", _BEFORE, "mean().item()"
        ): "similarity of inf",
        _RECALL.format(
            "if not similarity[0, 0].isfinite(): raise ValueError", _BEFORE, "mean().item()"
        ): "ValueError",
        _RECALL.format(
            "if similarity.max().isinf() or similarity.isnan().any(): raise ValueError",
            _BEFORE,
            "mean().item()",
        ): "similarity of -inf",
        _RECALL.format(
            "if not similarity[0].isfinite().all(): raise ValueError", _BEFORE, "mean().item()"
        ): "ValueError",
        "def recall_at(similarity, right, k): return similarity": "must be one number",
        _RECALL.format("similarity.mul_(2)", _BEFORE, "mean().item()"): "changed",
    },
    "10.3": {
        _ENSEMBLE.format("0", "mean"): "shorter than 1",
        _ENSEMBLE.format("0", "mean / mean.norm()"): "not all of them together",
        _ENSEMBLE.format("0", "mean / mean.norm(dim=0)"): "last axis",
        _ENSEMBLE.format("1", "mean / mean.norm(dim=-1, keepdim=True)"): "must be (3, 5)",
        "def ensemble(vectors): return vectors[0]": "another direction",
        "def ensemble(vectors): return vectors.sum(0)": "not the mean",
        "def ensemble(vectors): return 'mean'": "must be a tensor",
        """
def ensemble(vectors):
    mean = vectors.mul_(2).mean(0)
    return mean / mean.norm(dim=-1, keepdim=True)
""": "changed",
    },
}
