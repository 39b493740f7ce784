"""Wrong answers to notebook 05's exercises, each with a piece of what the check must say."""

WRONG = {
    "05.1": {
        "def expected_blocks(drop_path_rate, depth): return depth * (1 - drop_path_rate)": "full rate",
        "def expected_blocks(drop_path_rate, depth): return depth * drop_path_rate / 2": "dropped",
        """
def expected_blocks(drop_path_rate, depth):
    return sum(1 - drop_path_rate * block / depth for block in range(depth))
""": "depth - 1, not by depth",
        """
def expected_blocks(drop_path_rate, depth):
    return sum(1 - drop_path_rate * block / depth for block in range(1, depth + 1))
""": "the first is never dropped",
        """
def expected_blocks(drop_path_rate, depth):
    return sum(1 - drop_path_rate * block / (depth - 1) for block in range(1, depth + 1))
""": "0 to depth - 1",
        "def expected_blocks(drop_path_rate, depth): return 1 - drop_path_rate / 2": "average share",
        "def expected_blocks(drop_path_rate, depth): return 21.6": "it must be 10.8",
    },
    "05.2": {
        "def drop_path_std(p): return p / (1 - p)": "square root",
        "def drop_path_std(p): return math.sqrt(p * (1 - p))": "without the division",
        "def drop_path_std(p): return p * (1 - p)": "does not divide",
        "def drop_path_std(p): return math.sqrt((1 - p) / p)": "exchanged",
        "def drop_path_std(p): return math.sqrt(1 / (1 - p))": "square of the mean",
        "def drop_path_std(p): return 0.5": "a million draws",
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
