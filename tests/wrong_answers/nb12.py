"""Wrong answers to notebook 12's exercises, each with a piece of what the check must say."""

_AVERAGE = """
@triton.jit
def average_kernel(average_ptr, weight_ptr, size, decay, BLOCK: tl.constexpr):
    place = {place}
    inside = place < {size}
    average = tl.load(average_ptr + place, mask=inside)
    weight = tl.load(weight_ptr + place, mask=inside)
    tl.store({pointer} + place, {value}, mask={mask})
"""
_MEAN = """
@triton.jit
def row_mean_kernel(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    row = {row}
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * {stride} + column{mask})
    tl.store({store}, {value})
"""
_SOFTMAX = """
@triton.jit
def softmax_kernel(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    place = {row} * {stride} + column
    x = tl.load(x_ptr + place{load}){cast}
    e = tl.exp(x - {most})
    {kept}
    tl.store(out_ptr + place, {value}, mask={mask})
"""
_LIMIT = """
def limit(run, copy, size):
    def seconds(call, size):
        {first}
        start = time.perf_counter()
        for _ in range(4):
            call(size)
        return time.perf_counter() - start
    if {launch}:
        return "launch"
    return "memory" if {memory} else "arithmetic"
"""


def _average(**changes: str) -> str:
    return _AVERAGE.format(
        **{
            "place": "tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)",
            "size": "size",
            "pointer": "average_ptr",
            "value": "decay * average + (1 - decay) * weight",
            "mask": "inside",
        }
        | changes
    )


def _mean(**changes: str) -> str:
    return _MEAN.format(
        **{
            "row": "tl.program_id(0)",
            "stride": "columns",
            "mask": ", mask=column < columns, other=0.0",
            "store": "out_ptr + row",
            "value": "tl.sum(x) / columns",
        }
        | changes
    )


def _softmax(**changes: str) -> str:
    return _SOFTMAX.format(
        **{
            "row": "tl.program_id(0)",
            "stride": "columns",
            "load": ", mask=column < columns, other=-float('inf')",
            "cast": ".to(tl.float32)",
            "most": "tl.max(x)",
            "kept": "total = tl.sum(e)",
            "value": "(e / total).to(out_ptr.dtype.element_ty)",
            "mask": "column < columns",
        }
        | changes
    )


def _limit(**changes: str) -> str:
    return _LIMIT.format(
        **{
            "first": "call(size)",
            "launch": "seconds(run, size // 8) > seconds(run, size) / 2",
            "memory": "seconds(run, size) < 2 * seconds(copy, size)",
        }
        | changes
    )


WRONG = {
    "12.1": {
        "def average_kernel(average, weight, size, decay, BLOCK): return average": "no kernel",
        _average(place="tl.arange(0, BLOCK)"): "only the first block",
        _average(mask="place >= 0"): "beyond the end",
        _average(mask="place >= 0", size="(size + BLOCK)"): "beyond the end",
        _average(mask="place <= size", size="(size + 1)"): "beyond the end",
        _average(pointer="weight_ptr"): "the weights changed",
        _average(value="average"): "no average changed",
        _average(value="decay * weight + (1 - decay) * average"): "belongs to the old average",
        _average(value="average + (1 - decay) * weight"): "must be multiplied by decay",
        _average(value="decay * average + weight"): "multiplied by 1 - decay",
        _average(value="(1 - decay) * weight"): "the old average is missing",
        _average(value="decay * average"): "the weight is missing",
        _average(value="0.75 * average + 0.25 * weight"): "fixed in your code",
        _average(place="tl.program_id(0) * 128 + tl.arange(0, 128)"): "with a BLOCK of 256",
        _average(size="(size // BLOCK * BLOCK)"): "did not change",
        _average(value="average * weight"): "is wrong",
    },
    "12.2": {
        "def row_mean_kernel(x, out, columns, BLOCK): return x.mean(1)": "no kernel",
        _mean(mask=", mask=column < columns"): "right by luck",
        _mean(mask=", column < columns"): "right by luck",
        _mean(value="tl.sum(x)"): "that is the sum",
        _mean(value="tl.sum(x) / BLOCK"): "not by BLOCK",
        _mean(mask=""): "mask the load, with other",
        _mean(mask="", value="tl.sum(x) / BLOCK"): "and counted",
        _mean(stride="BLOCK"): "not at r * BLOCK",
        _mean(row="0 * tl.program_id(0)", store="out_ptr + tl.program_id(0)"): "read row 0",
        _mean(store="out_ptr"): "only out[0]",
        _mean(store="out_ptr + column", value="x"): "more numbers were stored",
        _mean(store="x_ptr + row"): "the matrix changed",
        _mean(value="tl.max(x)"): "has the mean",
        _mean().replace("tl.arange(0, BLOCK)", "tl.arange(0, 128)"): "of 200 columns",
    },
    "12.3": {
        "def softmax_kernel(x, out, columns, BLOCK): return x.softmax(1)": "no kernel",
        _softmax(value="e.to(out_ptr.dtype.element_ty)"): "divide by the sum of the row, or",
        _softmax(most="0.0", value="e.to(out_ptr.dtype.element_ty)"): "that is exp alone",
        _softmax(value="x - tl.max(x) - tl.log(total)"): "logarithm",
        _softmax(load=", mask=column < columns, other=0.0"): "as exp(0)",
        _softmax(load=""): "beyond the row count",
        _softmax(
            load=", mask=column < columns, other=0.0",
            kept="total = tl.sum(tl.where(column < columns, e, 0.0))",
        ): "row of negative scores",
        _softmax(most="0.0"): "large ones overflow",
        _softmax(load=", mask=column < columns, other=-1000.0"): "no masked place",
        _softmax().replace("tl.arange(0, BLOCK)", "tl.arange(0, 128)"): "wrong for 200",
        _softmax(row="0 * tl.program_id(0)"): "only row 0",
        _softmax(stride="BLOCK"): "row r begins at r * columns",
        _softmax(mask="place < columns * tl.num_programs(0) + 9"): "beyond the end",
        _softmax(cast="", most="tl.max(x).to(x.dtype)"): "wrong in bfloat16",
        _softmax(value="(e / total / 2).to(out_ptr.dtype.element_ty)"): "they add up to 0.500",
        _softmax(value="tl.where(column < columns, 0.01, 0.0)"): "no softmax of the rows",
    },
    "12.4": {
        "def limit(run, copy, size): return True": "it must be 'launch'",
        "def limit(run, copy, size): return 'bandwidth'": "it must be 'launch'",
        "def limit(run, copy, size): return 'memory'": "never called with",
        _limit(launch="False"): "never called with",
        _limit(first="pass"): "4 ms and 0.5 ms",
        _limit(first="pass").replace("range(4)", "range(1)"): "must not count",
        _limit(launch="seconds(run, size // 8) > seconds(run, size) / 4"): "0.387 ms",
        _limit(launch="seconds(run, size // 8) > seconds(run, size)"): "0.537 ms",
        _limit(memory="seconds(run, size) < 1.5 * seconds(copy, size)"): "3.4 ms",
        _limit(memory="seconds(run, size) < 4 * seconds(copy, size)"): "6 ms",
        _limit(memory="seconds(run, size) > 2 * seconds(copy, size)"): "4 ms",
        """
def limit(run, copy, size):
    run(size), run(size // 8), copy(size)
    return "arithmetic"
""": "must not count",
    },
}
