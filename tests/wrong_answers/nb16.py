"""Wrong answers to notebook 16's exercises, each with a piece of what the check must say."""

_MENDED = """
def mended(ring, tiles):
    stage, phase = 0, 1
    for blocks in tiles:
        for block in blocks:
            yield Wait(ring.empty[stage], phase)
            yield Arrive(ring.full[stage], copies=1)
            yield Copy(block, ring.buffers[stage], ring.full[stage], 100)
            if stage + 1 < len(ring.full):
                stage += 1
            else:
                stage, phase = 0, 1 - phase
"""
_TAIL = """
def tail_mask(tokens):
    last = (tokens - 1) % 64 + 1
    width = 16
    while width < last:
        width *= 2
    return torch.zeros(width).masked_fill(torch.arange(width) >= last, -math.inf)
"""
_STAGES = """
def stages(dim, consumers, busy):
    wide = 64 + max(16, dim - 64) if dim > 64 else 64
    block = 64 * wide * 2
    most = (226 * 1024 - 2 * consumers * block) // (2 * block)
    return next(n for n in range(2, most + 1) if busy(n) >= busy(most) - 0.01), most
"""
_REGISTERS = """
def registers(dim, consumers, ahead):
    needs = 32 + 32 * ahead + 16 + dim // 2 + 28
    start = 65_536 // (128 * (consumers + 1)) // 8 * 8
    return needs, (start * (consumers + 1) - 24) // consumers // 8 * 8
"""


def _changed(right: str, old: str, new: str) -> str:
    assert old in right
    return right.replace(old, new)


def _mended(old: str, new: str) -> str:
    return _changed(_MENDED, old, new)


def _stages(old: str, new: str) -> str:
    return _changed(_STAGES, old, new)


def _tail(old: str, new: str) -> str:
    return _changed(_TAIL, old, new)


def _registers(old: str, new: str) -> str:
    return _changed(_REGISTERS, old, new)


_WAIT = "            yield Wait(ring.empty[stage], phase)\n"
_ARRIVE = "            yield Arrive(ring.full[stage], copies=1)\n"

WRONG = {
    "16.1": {
        _mended("    stage, phase = 0, 1\n    for blocks in tiles:\n",
                "    for blocks in tiles:\n        stage, phase = 0, 1\n"): "does not begin with phase 1",
        _mended("    for blocks in tiles:\n",
                "    for blocks in tiles:\n        stage = 0\n"): "does not begin with stage 0",
        _mended("stage, phase = 0, 1 - phase", "stage = 0"): "a race: producer: v[0] is overwritten",
        _mended("    stage, phase = 0, 1\n", "    stage, phase = 0, 0\n"): "lets a wait for phase 1 pass",
        _mended(_WAIT, ""): "a race: producer",
        _mended(_ARRIVE, ""): "a deadlock",
        _mended(_WAIT + _ARRIVE, _ARRIVE + _WAIT).replace("copies=1", "copies=0"): "a race",
        _mended("len(ring.full)", "2"): "not always two",
        _mended("for block in blocks:", "for block in blocks[::-1]:"): "no barrier minds",
        _mended("            yield Wait", "            yield None\n            yield Wait"): "yields NoneType",
        _mended("            yield Wait(ring.empty[stage], phase)",
                "            yield Wait(ring.empty[stage], phase)\n"
                "            while True:\n                yield Wait(ring.empty[stage], phase)"): "has not ended",
        "def mended(ring, tiles): return list(tiles)": "must be a generator",
    },
    "16.2": {
        _stages("226 * 1024", "226_000"): "227 x 1024",
        _stages("226 * 1024", "227_000"): "227 x 1024",
        _stages("- 2 * consumers", "- consumers"): "two places",
        _stages("- 2 * consumers * block", ""): "queries need room",
        _stages("- 2 * consumers * block", "- 2 * block"): "queries of its own",
        _stages("// (2 * block)", "// block"): "keys and values",
        _stages("block = 64 * wide * 2", "block = 64 * wide * 4").replace(
            "next(n for n in range(2, most + 1) if busy(n) >= busy(most) - 0.01)", "2"): "two bytes",
        _stages("block = 64 * wide * 2", "block = 64 * dim * 2"): "16 at least",
        _stages("block = 64 * wide * 2", "block = 64 * (64 if dim == 64 else 128) * 2"): "power of two",
        _stages("// (2 * block)\n", "// (2 * block) + 1\n"): "round down",
        _stages("range(2,", "range(1,"): "your code raised Deadlock: one stage",
        _stages("return next(n for n in range(2, most + 1) if busy(n) >= busy(most) - 0.01), most",
                "return most, most"): "that is the largest ring",
        _stages("next(n for n in range(2, most + 1) if busy(n) >= busy(most) - 0.01)",
                "next((n for n in range(2, most) if busy(n + 1) - busy(n) < 0.01), most)"): "not with the next",
        _stages("busy(most) - 0.01", "max(map(busy, range(2, most + 1))) - 0.01"): "not with the best",
        _stages("busy(most) - 0.01", "busy(most)"): "is good enough",
        _stages("busy(most) - 0.01", "0.99 * busy(most)"): "look for the first",
        _stages("next(n for n in range(2, most + 1) if busy(n) >= busy(most) - 0.01)",
                "next((n + 1 for n in range(most, 1, -1) if busy(n) < busy(most) - 0.01), 2)"): "look for the first",
        _stages("next(n for", "next(n - 2 for"): "places in a list",
        "def stages(dim, consumers, busy): return 7": "two numbers",
        _stages("- 0.01), most", "- 0.01), most").replace("return next(", "return most, next(").replace(
            "- 0.01), most", "- 0.01)"): "comes first",
        "def stages(dim, consumers, busy): return 5, 7": "stages fit; yours are 7",
    },
    "16.3": {
        _tail("(tokens - 1) % 64 + 1", "tokens % 64"): "tokens % 64 is 0",
        _tail(">= last", "> last"): "your mask keeps 26",
        _tail(">= last", "< last"): "those past the end",
        _tail("width = 16", "width = 1"): "16 columns hold them; your mask has 1",
        _tail("width = 16", "width = 64"): "32 columns hold them; your mask has 64",
        _tail("-math.inf", "-1e9"): "any other number",
        _tail("-math.inf", "1.0"): "added to scores",
        _tail("torch.zeros(width).masked_fill(torch.arange(width) >= last, -math.inf)",
              "torch.arange(width) < last"): "added to scores",
        _tail("width *= 2", "width += 16").replace("return", "width = min(width, 32)\n    return"): "only 32 columns",
        _tail("masked_fill(torch.arange(width) >= last", "masked_fill(torch.arange(width) >= 0"): "becomes nan",
        "def tail_mask(tokens): return [0.0] * 16": "a tensor (width,)",
    },
    "16.4": {
        _registers("+ 16 +", "+ 32 +"): "two weights of bfloat16",
        _registers("+ 16 +", "+"): "weights are needed",
        _registers(" + 28", ""): "28 are for all else",
        _registers("+ dim // 2 ", ""): "the output is needed",
        _registers("+ 16 +", "+ 16 * (1 + ahead) +"): "nothing else",
        _registers("32 * ahead + ", ""): "there are scores twice",
        _registers("(start * (consumers + 1) - 24)", "(65_536 // 128 - 24)"): "fewer than 65,536 in all",
        _registers(" // 8 * 8\n    return", "\n    return"): "fewer than 65,536 in all",
        _registers("// consumers // 8 * 8", "// consumers"): "a multiple of 8",
        _registers(" - 24)", ")"): "keeps 24",
        _registers(" - 24)", " - 6)"): "128 threads",
        _registers("(start * (consumers + 1) - 24) // consumers // 8 * 8", "start"): "gives back",
        _registers("return needs, (start * (consumers + 1) - 24) // consumers // 8 * 8",
                   "return needs, 65_536 // (128 * consumers) // 8 * 8"): "starts with registers, too",
        "def registers(dim, consumers, ahead): return 112": "two numbers",
        _registers("return needs, ", "return ").replace("8 * 8\n", "8 * 8, needs\n").replace(
            "8 * 8, needs\n    return", "8 * 8\n    return"): "comes first",
        "def registers(dim, consumers, ahead): return 100, 112": "needs 112: yours needs 100",
    },
}  # fmt: skip
