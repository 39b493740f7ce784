"""Parsing of a made-up report, and the kernels' names from the cells; run by stalls.py --test, without a GPU.

With a listing of a kernel (Triton's asm["sass"]) in STALLS_SASS the roles are found in it, too.
"""
import csv, io, os, re
from math import isclose

import stairs, stalls

stairs.cells_as_module()
import stairs_cells as cells

names = [[stalls.THIRTEEN, "_forward_kernel"]] + [[n, cells.launches[n].kernel.fn.__name__] for n in cells.stairs]
assert [n[0] for n in cells.stairs] == list("123456789") and all(callable(cells.steps[n]) for n in cells.stairs)
kernels = [k for _, k in names]
print(names)

# raw page
S, M = "smsp__pcsamp_warps_issue_stalled_", "smsp__average_warps_issue_stalled_"
head = ["ID", "Process ID", "Kernel Name", "gpu__time_duration.sum", "sm__cycles_elapsed.max", "launch__registers_per_thread"]
head += ["sm__pipe_tensor_cycles_active" + stalls.PCT, "sm__inst_executed_pipe_tensor_op_gmma" + stalls.PCT, "sm__inst_executed_pipe_xu" + stalls.PCT]
head += [S + "gmma", S + "gmma_not_issued", S + "barrier", S + "selected", S + "long_scoreboard", M + "barrier_per_issue_active.ratio"]


def page(rows):
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    return out.getvalue()


def row(i, kernel):
    return [str(i), "7", kernel, f"{300000 + i:,}", "1,000,000", "96", "0", "61.5", "30.25", "600", "500", "300", "900", "100", "2.5"]


launched = [*kernels, "_redo_kernel"]
text = "==PROF== Connected to process 7\n" + page([head, [""] * 3 + ["ns", "cycle"] + [""] * 10] + [row(i, k) for i, k in enumerate(launched)])
rows = stalls.raw_rows(text)
assert [r["Kernel Name"] for r in rows] == launched, "no row of units"
found = stalls.matched(rows, names)
assert list(found) == [n for n, _ in names] + ["9 one reference, lost rows"]
assert (found["8 persistent"]["ID"], found["9 one reference"]["ID"]) == ("8", "9")
share, kind = stalls.stalls(rows[0])
assert kind == "samples" and list(share) == ["gmma", "barrier", "long_scoreboard"] and isclose(share["gmma"], 60)
only = {k: v for k, v in rows[0].items() if not k.startswith(S)}
assert stalls.stalls(only) == ({"barrier": 100.0}, "mean") and stalls.stalls({}) == ({}, "none")
assert stalls.first(rows[0], stalls.TENSOR) == 61.5 and stalls.first(rows[0], stalls.XU) == 30.25
print("\n".join(stalls.table(found)))

# what is asked for
asked = stalls.chosen(stalls.known("\nsm__pipe_tensor_cycles_active   counter\nsmsp__average_warps_issue_stalled_gmma_per_issue_active ratio\n"), set())
assert "sm__pipe_tensor_cycles_active" + stalls.PCT in asked and not any("xu" in x for x in asked)
assert "smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio" in asked
assert len(stalls.chosen(set(), set())) == 3 + 9 + 2 - 0, stalls.chosen(set(), set())
assert stalls.called(["sleep", "9"], 1)[0] == 124 and stalls.called(["echo", "a"], 5) == (0, "a\n")


# source page
def listing_of(text, base=0x7F0012340000):
    """Rows as ncu writes them: without labels, jumps to addresses."""
    at, lines = {}, []
    for line in text.splitlines():
        if found := re.fullmatch(r"(\w+):", line.strip()):
            at[found[1]] = len(lines)
        elif "\t" in line:
            lines.append(line.split("\t")[1].rstrip(";"))
    return [re.sub(r"\b(LBB\d+)", lambda m: hex(base + 16 * at[m[1]]) if m[1] in at else m[1], x) for x in lines]


if path := os.environ.get("STALLS_SASS"):
    for base in (0, 0x7F0012340000):
        for path in os.environ["STALLS_SASS"].split(":"):
            source = listing_of(open(path).read(), base)
            title = ["#", "Address", "Source", "Warp Stall Sampling (All Samples)", "stall_barrier", "stall_selected", "stall_barrier_not_issued"]
            body = [[str(i), hex(16 * i), x, "1,003", "1,001", "2", "7"] for i, x in enumerate(source)]
            made = page([["Kernel Name", "a"], title, *body]) + page([["Kernel Name", "b"], title, *body[:5]])
            each = stalls.listings(made)
            assert [len(x) for x in each] == [len(source), 5] and each[0][0][1] == {"barrier": 1001, "selected": 2}
            # a row's role, by giving samples to it alone
            def role(i):
                only = [(x, {"barrier": 0, "long": int(j == i)}) for j, x in enumerate(source)]
                return next(k for k, c in stalls.roles(only).items() if c["long"])
            waits = {i: x for i, x in enumerate(source) if "PHASECHK" in x}
            last = max((i for i, x in enumerate(source) if "EXIT" in x), default=len(source))
            behind = sum(i > last for i in waits)
            by = {}
            for i, x in waits.items():
                by.setdefault(role(i), []).append(re.search(r"\+(0x\w+)", x)[1])
            print(path, len(source), "rows; waits behind the last EXIT:", behind, {k: sorted(set(v)) for k, v in by.items()})
            assert set(by) == {"consumers", "producer"} and not set(by["consumers"]) & set(by["producer"])
            assert all(role(i) == "consumers" for i, x in enumerate(source) if "HGMMA" in x)
            assert all(role(i) == "producer" for i, x in enumerate(source) if "UTMALDG" in x)
            kinds = stalls.roles([(x, {"barrier": 1}) for x in source])
            print({k: sum(v.values()) for k, v in kinds.items()})
    one = dict.fromkeys(found, each[0])
    print("\n".join(stalls.by_role(list(found)[:2], one)))
print("all right")
