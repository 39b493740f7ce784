"""Wrong answers to notebook 02's exercises, each with a piece of what the check must say."""

WRONG = {
    "02.1": {
        "def relu_std(fan_in): return 1 / math.sqrt(fan_in)": "without a ReLU",
        "def relu_std(fan_in): return 2 / fan_in": "that is the variance",
        "def relu_std(fan_in): return math.sqrt(1 / (2 * fan_in))": "must double it",
        "def relu_std(fan_in): return 2 / math.sqrt(fan_in)": "the gain is sqrt(2), not 2",
        "def relu_std(fan_in): return 0.02": "multiplies the size by 0.480",
    },
    "02.2": {
        "def gelu_std(fan_in): return math.sqrt(2 / fan_in)": "that is the ReLU's",
        "def gelu_std(fan_in): return 1 / math.sqrt(fan_in)": "without a GELU",
        "def gelu_std(fan_in): return 1.46796": "divide it by the root",
        "def gelu_std(fan_in): return 1.46796 / fan_in": "not by fan_in",
        "def gelu_std(fan_in): return 1.46796**2 / fan_in": "that is the variance",
        "def gelu_std(fan_in): return 0.02": "then has size 0.4",
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
