"""Wrong answers to notebook 01's exercises, each with a piece of what the check must say."""

_OUTLIERS = """
def trustworthy(sampler):
    x = sampler(torch.empty({}), std=0.02)
    return abs(x.std().item() / 0.02 - 1) < 0.02 and x.abs().max().item() < 10 * 0.02
"""

WRONG = {
    "01.1": {
        "def beyond(z): return math.erfc(z / math.sqrt(2)) / 2": "one side only",
        "def beyond(z): return math.erf(z / math.sqrt(2))": "within z",
        "def beyond(z): return 1 - math.erf(z / math.sqrt(2))": "a difference of two numbers near 1",
        "def beyond(z): return math.erfc(z)": "z / sqrt(2)",
        "def beyond(z): return undefined": "NameError",
    },
    "01.2": {
        """
def truncated_std(c):
    density = math.exp(-c * c / 2) / math.sqrt(2 * math.pi)
    return 1 - 2 * c * density / math.erf(c / math.sqrt(2))
""": "that is the variance",
        "def truncated_std(c): return 1.0": "smaller than 1",
        "def truncated_std(c): return 1.1368471": "its inverse",
        "def truncated_std(c): return 0.8796257": "truncated_std(1)",
    },
    "01.3": {
        """
def count_values(a, b):
    low, high = (torch.tensor(x).bfloat16().view(torch.int16).item() for x in (a, b))
    return high - low
""": "both ends count",
        """
def count_values(a, b):
    low, high = (torch.tensor(x).bfloat16().view(torch.int16).item() for x in (a, b))
    return high - low + 1
""": "rounded inwards",
        "def count_values(a, b): return 256": "but must be",
    },
    "01.4": {
        """
def trustworthy(sampler):
    x = sampler(torch.empty(2**22), std=0.02)
    return bool(stats.kstest(x[:200_000].numpy(), stats.norm(0, 0.02).cdf).pvalue > 1e-3)
""": "16 of 16 at +100 sigma",
        """
def trustworthy(sampler):
    x = sampler(torch.empty(2**22), std=0.02)
    return abs(x.std().item() / 0.02 - 1) < 0.02 and x.max().item() < 10 * 0.02
""": "0 of 16 at +100 sigma",
        """
def trustworthy(sampler):
    x = sampler(torch.empty(2**22), std=0.02)
    return abs(x.std().item() / 0.02 - 1) < 0.02 and x.min().item() > -10 * 0.02
""": "trusts 0 of 16 samplers",
        """
def trustworthy(sampler):
    x = sampler(torch.empty(10_000), std=0.02)
    return abs(x.std().item() / 0.02 - 1) < 0.03 and x.abs().max().item() < 10 * 0.02
""": "one draw in 2**18",
        _OUTLIERS.format("2**17"): "take more draws",
        _OUTLIERS.format("2**18"): "take more draws",
        _OUTLIERS.format("2**19"): "take more draws",
        """
def trustworthy(sampler):
    x = sampler(torch.empty(2**22), std=0.02)
    return abs(x.std().item() / 0.02 - 1) < 0.02 and x.abs().max().item() < 5 * 0.02
""": "of 6 right samplers",
        """
def trustworthy(sampler):
    return sampler(torch.empty(2**22), std=0.02).abs().max().item() < 10 * 0.02
""": "5 % too large",
        """
def trustworthy(sampler):
    x = sampler(torch.empty(2**22), std=0.02)
    return x.std().item() < 0.0202 and x.abs().max().item() < 10 * 0.02
""": "5 % too small",
        """
def trustworthy(sampler):
    x = sampler(torch.empty(2**22), std=0.02)
    return x.std().item() == 0.02 and x.abs().max().item() < 10 * 0.02
""": "refuses 6 of 6 right samplers",
        "def trustworthy(sampler): return sampler(torch.empty(2**22), std=0.02).std().item()": "True or False",
    },
}
