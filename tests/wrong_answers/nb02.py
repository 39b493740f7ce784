"""Wrong answers to notebook 02's exercises, each with a piece of what the check must say."""

WRONG = {
    "02.1": {
        "def kaiming_std(fan_in, a): return math.sqrt(6 / ((1 + a * a) * fan_in))": "that is the bound",
        "def kaiming_std(fan_in, a): return 2 / ((1 + a * a) * fan_in)": "that is the variance",
        "def kaiming_std(fan_in, a): return math.sqrt(6 / ((1 + a * a) * fan_in)) / 3": "divided by 3",
        "def kaiming_std(fan_in, a): return math.sqrt(2 / ((1 + a) * fan_in))": "a enters squared",
        "def kaiming_std(fan_in, a): return 1 / math.sqrt(3 * fan_in)": "right for a = sqrt(5) only",
    },
    "02.2": {
        "def relu_std(fan_in): return 1 / math.sqrt(fan_in)": "without a ReLU",
        "def relu_std(fan_in): return 2 / fan_in": "that is the variance",
        "def relu_std(fan_in): return math.sqrt(1 / (2 * fan_in))": "must double it",
        "def relu_std(fan_in): return 2 / math.sqrt(fan_in)": "the gain is sqrt(2), not 2",
        "def relu_std(fan_in): return 0.02": "multiplies the size by 0.480",
    },
    "02.3": {
        """
def init_std(name):
    return 0.02 / math.sqrt(54) if name.endswith(("proj", "fc2")) else 0.02
""": "patch_embed.proj",
        """
def init_std(name):
    return 0.02 / math.sqrt(27) if name.endswith((".attn.proj", ".mlp.fc2")) else 0.02
""": "a block has two",
        """
def init_std(name):
    return 0.02 / 54 if name.endswith((".attn.proj", ".mlp.fc2")) else 0.02
""": "not by its square root",
        "def init_std(name): return 0.02": "must be smaller",
        "def init_std(name): return 0.02 / math.sqrt(54)": "not the last Linear",
        """
def init_std(name):
    if name.endswith((".attn.proj", ".mlp.fc2")):
        return 0.02 / math.sqrt(54)
""": "every Linear needs a std",
    },
}
