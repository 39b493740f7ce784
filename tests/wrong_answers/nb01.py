"""Wrong answers to notebook 01's exercises, each with a piece of what the check must say."""

WRONG = {
    "01.1": {
        "def beyond(z): return math.erfc(z / math.sqrt(2)) / 2": "one side only",
        "def beyond(z): return math.erf(z / math.sqrt(2))": "within z",
        "def beyond(z): return 1 - math.erf(z / math.sqrt(2))": "a difference of two numbers near 1",
        "def beyond(z): return math.erfc(z)": "31.73 %",
        "def beyond(z): return undefined": "NameError",
    },
    "01.2": {
        """
def truncated_std(c):
    density = math.exp(-c * c / 2) / math.sqrt(2 * math.pi)
    return 1 - 2 * c * density / math.erf(c / math.sqrt(2))
""": "that is the variance",
        "def truncated_std(c): return 1.0": "smaller than 1",
        "def truncated_std(c): return 0.8796": "a million draws",
    },
    "01.3": {
        """
def largest_inside(bound, dtype):
    return torch.tensor(bound).to(dtype).item()
""": "rounds to nearest",
        """
def largest_inside(bound, dtype):
    x = torch.tensor(bound, dtype=torch.float64).to(dtype)
    return torch.nextafter(x, torch.tensor(-math.inf, dtype=dtype)).item()
""": "not the largest",
        "def largest_inside(bound, dtype): return bound": "is no bfloat16 number",
    },
}
