"""Wrong answers to notebook 05's exercises, each with a piece of what the check must say."""

_MEASURED = """
def measure_drop(layer):
    out = layer(torch.ones({}, 1))
    return (out == 0).double().mean().item(), out.max().item()
"""

WRONG = {
    "05.1": {
        """
def measure_drop(layer):
    out = layer(torch.ones(2**18, 1))
    return (out != 0).double().mean().item(), out[out != 0].mean().item()
""": "is the share kept",
        """
def measure_drop(layer):
    out = layer(torch.ones(2**18, 1))
    return (out == 0).double().mean().item(), out.mean().item()
""": "over the samples kept, not over all",
        """
def measure_drop(layer):
    out = layer(torch.ones(2**18, 1))
    return out[out != 0].mean().item(), (out == 0).double().mean().item()
""": "in the other order",
        """
def measure_drop(layer):
    p = (layer(torch.ones(2**18, 1)) == 0).double().mean().item()
    return p, 1 / (1 - p)
""": "need not divide",
        """
def measure_drop(layer):
    out = layer(torch.ones(16, 1))
    return (out == 0).double().mean().item(), out.max().item()
""": "off by about .5 / sqrt(n)",
        _MEASURED.format("1000"): "off by about .5 / sqrt(n)",
        _MEASURED.format("3000"): "off by about .5 / sqrt(n)",
        """
def measure_drop(layer):
    out = layer.eval()(torch.ones(2**18, 1))
    return 0.25, out.max().item()
""": "set to eval",
        """
def measure_drop(layer):
    return (layer(torch.ones(2**18, 1)) == 0).double().mean()
""": "return two numbers",
    },
    "05.2": {
        "def drop_path_std(p): return p / (1 - p)": "square root",
        "def drop_path_std(p): return (p * (1 - p)) ** 0.5": "without the division",
        "def drop_path_std(p): return p * (1 - p)": "does not divide",
        "def drop_path_std(p): return ((1 - p) / p) ** 0.5": "exchanged",
        "def drop_path_std(p): return (1 / (1 - p)) ** 0.5": "square of the mean",
        "def drop_path_std(p): return 0.5": "the formula gives 1.000000",
        "def drop_path_std(p): return F.dropout(torch.ones(2**20), p).std().item()": "the formula gives 0.500000",
    },
    "05.3": {
        """
def fold(linear, gamma):
    with torch.no_grad():
        linear.weight.mul_(gamma[:, None])
        linear.bias.mul_(gamma)
    return linear
""": "the given Linear was changed",
        """
def fold(linear, gamma):
    folded = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    with torch.no_grad():
        folded.weight.copy_(linear.weight * gamma)
        folded.bias.copy_(linear.bias * gamma)
    return folded
""": "columns of W",
        """
def fold(linear, gamma):
    folded = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    with torch.no_grad():
        folded.weight.copy_(linear.weight * gamma[:, None])
        folded.bias.copy_(linear.bias)
    return folded
""": "the bias is unchanged",
        """
def fold(linear, gamma):
    folded = nn.Linear(linear.in_features, linear.out_features)
    with torch.no_grad():
        folded.weight.copy_(linear.weight * gamma[:, None])
        folded.bias.copy_(linear.bias * gamma if linear.bias is not None else 0 * gamma)
    return folded
""": "without a bias",
        "def fold(linear, gamma): return lambda h: linear(h) * gamma": "must return an nn.Linear",
    },
}
