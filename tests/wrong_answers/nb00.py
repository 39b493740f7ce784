"""Wrong answers to notebook 00's exercises, each with a piece of what the check must say."""

WRONG = {
    "00.1": {
        "shape = (2, 729, 3456)": "split its 3456 channels",
        "shape = (2, 3, 16, 729, 72)": "the order is not",
        "shape = (2, 729, 3, 72, 16)": "not 72 heads",
        "shape = (2, 729, 3, 16, 1152)": "one head has 72",
        "shape = (1, 729, 3, 16, 72)": "axis of pictures has 2",
        "shape = (2, 729, 48, 72)": "five axes",
        "shape = 2 * 729": "must be a tuple",
    },
    "00.2": {
        "weight_bytes = 64 * 16 * 729 * 729": "each takes two bytes",
        "weight_bytes = 64 * 16 * 729 * 729 * 4": "that is float32",
        "weight_bytes = 64 * 729 * 729 * 2": "16 heads",
        "weight_bytes = 16 * 729 * 729 * 2": "64 pictures",
        "weight_bytes = 64 * 16 * 729 * 2": "every pair of tokens",
        "weight_bytes = 1e9": "times the right number",
        "weight_bytes = '1 GB'": "must be a number",
    },
    "00.3": {
        """
def gigabytes_per_second(fn, moved):
    return moved / measure(fn, device).median_ms / 1e9
""": "a thousandth of a second",
        """
def gigabytes_per_second(fn, moved):
    return moved / measure(fn, device).median_ms
""": "bytes in a millisecond",
        """
def gigabytes_per_second(fn, moved):
    return 1e3 * moved / measure(fn, device).median_ms
""": "a GB is 10**9",
        """
def gigabytes_per_second(fn, moved):
    return measure(fn, device).median_ms / 1e3
""": "that is seconds",
        """
def gigabytes_per_second(fn, moved):
    start = time.perf_counter()
    fn()
    return moved / (time.perf_counter() - start) / 1e9
""": "must not count",
        """
def gigabytes_per_second(fn, moved):
    return 8 * moved / measure(fn, device).median_ms / 1e6
""": "that is 30 GB/s",
        """
def gigabytes_per_second(fn, moved):
    return 1e3 * moved / measure(fn, device).median_ms / 2**30
""": "in GiB/s",
        """
def gigabytes_per_second(fn, moved):
    return 0.8 * moved / measure(fn, device).median_ms / 1e6
""": "24 GB/s",
        "def gigabytes_per_second(fn, moved): return f'{moved} GB/s'": "must return a number",
    },
}
