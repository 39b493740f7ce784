"""Wrong answers to notebook 04's exercises, each with a piece of what the check must say."""

_IN_TURNS = """
def in_turns(first, second, clock, rounds):
    first(), second()
    times = {{first: [], second: []}}
    for turn in range(rounds):
        for fn in (first, second)[:: 1 - 2 * (turn % 2)]:
            start = clock(); fn(); times[fn].append(clock() - start)
    return {}
"""
_EXCHANGED = """
def overtakes(second, first):
    found = None
    for n in sorted(first, reverse=True):
        if not first[n].slowest_ms < second[n].fastest_ms:
            break
        found = n
    return found
"""

WRONG = {
    "04.1": {
        """
def in_turns(first, second, clock, rounds):
    for fn in (first, second): fn()
    found = []
    for fn in (first, second):
        some = []
        for _ in range(rounds):
            start = clock(); fn(); some.append(clock() - start)
        found.append(statistics.median(some))
    return found[1] / found[0]
""": "time both in each round",
        """
def in_turns(first, second, clock, rounds):
    first(), second()
    a, b = [], []
    for _ in range(rounds):
        start = clock(); first(); middle = clock(); second(); end = clock()
        a.append(middle - start), b.append(end - middle)
    return statistics.median(b) / statistics.median(a)
""": "change places",
        """
def in_turns(first, second, clock, rounds):
    times = {first: [], second: []}
    for turn in range(rounds):
        for fn in (first, second)[:: 1 - 2 * (turn % 2)]:
            start = clock(); fn(); times[fn].append(clock() - start)
    return statistics.median(times[second]) / statistics.median(times[first])
""": "before the clock",
        """
def in_turns(first, second, clock, rounds):
    first(), second()
    times = {first: 0, second: 0}
    for turn in range(rounds):
        for fn in (first, second)[:: 1 - 2 * (turn % 2)]:
            start = clock(); fn(); times[fn] += clock() - start
    return times[second] / times[first]
""": "take the median",
        """
def in_turns(first, second, clock, rounds):
    start = clock(); first(); middle = clock(); second()
    return (middle - start) / (clock() - middle)
""": "first over that of second",
        """
def in_turns(first, second, clock, rounds):
    start = clock(); first(); middle = clock(); second()
    return (clock() - middle) / (middle - start)
""": "20 rounds are to time each",
        _IN_TURNS.format("min(times[second]) / min(times[first])"): "far too fast",
        _IN_TURNS.format(
            "statistics.median(b / a for a, b in zip(times[first], times[second]))"
        ): "none of ratios",
    },
    "04.2": {
        """
def overtakes(first, second):
    return min(n for n in first if first[n].slowest_ms < second[n].fastest_ms)
""": "must be ahead at all from there on",
        """
def overtakes(first, second):
    return max(n for n in first if first[n].slowest_ms < second[n].fastest_ms)
""": "ahead at a smaller number too",
        """
def overtakes(first, second):
    found = None
    for n in sorted(first, reverse=True):
        if not first[n].median_ms < second[n].median_ms:
            break
        found = n
    return found
""": "within the spread",
        """
def overtakes(first, second):
    found = None
    for n in reversed(first):
        if not first[n].slowest_ms < second[n].fastest_ms:
            break
        found = n
    return found
""": "need not come in order",
        """
def overtakes(first, second):
    return max(n for n in first if first[n].median_ms > second[n].median_ms)
""": "last number at which it is behind",
        _EXCHANGED: "first and second are exchanged",
        "overtakes = lambda first, second: None": "the answer is None, not 1024",
        "def overtakes(first, second): return None": "the answer is None, not 1024",
    },
    "04.3": {
        "def missed(q, k, v): return attend(q, k, v)": "right wherever we looked",
        "def missed(q, k, v): return attend(q, k, v, scale=1.0)": "the check notices it",
        "def missed(q, k, v): return attend(q, k[:, :-1], v[:, :-1])": "the check notices it",
        "def missed(q, k, v): return attend(q, k, v) + 1e-7": "right wherever we looked",
        "def missed(q, k, v): return attend(q, k, v) * float('nan')": "the check notices it",
        """
def missed(q, k, v):
    out = attend(q, k, v)
    return torch.cat([out[:1], out[1:-1] * 1.03, out[-1:]]) if len(out) > 2 else out
""": "right wherever we looked",
    },
}
