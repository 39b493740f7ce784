"""What the warps of notebook 16's steps wait for, by Nsight Compute, on a GPU of compute capability 9.0; at most 95 s.

    bash .gpu/stalls.sh                     into /tmp/logs: stalls.txt (the table, and each role's), stalls_raw.csv,
                                            stalls_source.csv.gz, stalls.ncu-rep where it has less than 3 MB
    python .gpu/g16/stalls.py --test        on any machine: kernels from the cells, parsing of a made-up report

The kernels come from the notebook's cells (stairs.py), each launched once at 64 x 729 x 16 x 72 after a first launch.
"""
import csv, glob, gzip, io, json, os, re, shutil, signal, subprocess, sys, time
from collections import Counter

T0 = time.time()
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE]
import stairs

LOGS = os.environ.get("STALLS_LOGS", "/tmp/logs")
REPORT, NAMES = f"{LOGS}/stalls.ncu-rep", f"{LOGS}/stalls_names.json"
LIMIT, SMALL = 95, 3 << 20
THIRTEEN = "13's kernel"
PCT = ".avg.pct_of_peak_sustained_active"
# of what is there; "tensor" takes the first that is not 0
TENSOR = ["sm__pipe_tensor_cycles_active", "sm__pipe_tensor_op_gmma_cycles_active", "sm__pipe_tensor_op_hmma_cycles_active", "sm__inst_executed_pipe_tensor_op_gmma"]
XU = ["sm__inst_executed_pipe_xu", "sm__pipe_xu_cycles_active"]
OTHERS = ["sm__inst_executed_pipe_alu", "sm__inst_executed_pipe_fma", "smsp__issue_active"]
REFUSED = "ERR_NVGPUCTRPERM", "LibraryNotLoaded", "Failed to initialize the profiler", "does not have permission"


def left():
    return LIMIT - (time.time() - T0)


def say(*words):
    print(f"{time.time() - T0:4.0f}s", *words, flush=True)


def called(command, limit):
    """Exit status and all output; one that takes longer is killed with what it started (status 124)."""
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        text, _ = p.communicate(timeout=max(1, limit))
        return p.returncode, text
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        return 124, p.communicate()[0]


# --- under ncu ---


def launch_all():
    import stairs_cells as cells
    import torch

    qkv = cells.draw(64, 729)
    calls = {THIRTEEN: cells.flash_attention} | {name: cells.steps[name] for name in cells.stairs}
    wanted = calls[THIRTEEN](qkv).float()
    for name, call in calls.items():
        worst = (call(qkv).float() - wanted).abs().max().item()
        print(f"PY {name}: largest difference from the first {worst:.4f}", flush=True)
    names = [[THIRTEEN, "_forward_kernel"]]
    names += [[name, cells.launches[name].kernel.fn.__name__] for name in cells.stairs]
    with open(NAMES, "w") as file:
        json.dump(names, file)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for call in calls.values():
        call(qkv)
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    print("PY done", flush=True)


# --- asking ncu ---


def find_ncu():
    places = sorted(glob.glob("/opt/nvidia/nsight-compute/*/ncu"))[::-1]
    return shutil.which("ncu") or next((x for x in ["/usr/local/cuda/bin/ncu", *places] if os.path.exists(x)), None)


def known(text):
    """The names of a list of metrics, each at the beginning of its line."""
    return set(re.findall(r"^\s*([a-z]+__[a-z0-9_]+)", text, re.MULTILINE))


def chosen(profiling, sampling):
    """Metrics to ask for; where a list could not be had, those that the documentation names."""
    pipes = [x for x in TENSOR + XU + OTHERS if not profiling or x in profiling]
    found = ["gpu__time_duration.sum", "sm__cycles_elapsed.max", "launch__registers_per_thread"]
    found += [x + PCT for x in pipes]
    means = [x for x in profiling if re.fullmatch(r"smsp__average_warps_issue_stalled_\w+_per_issue_active", x)]
    found += sorted(x + ".ratio" for x in means)
    if any("pcsamp_warps_issue_stalled" in x for x in sampling) or not sampling:
        found += ["group:smsp__pcsamp_warp_stall_reasons", "smsp__pcsamp_sample_count"]
    return found


def profile(ncu):
    """Profile by metrics, or by sections if that fails; return whether there is a report."""
    lists = []
    for collection in ("profiling", "pcsampling"):
        status, text = called([ncu, "--query-metrics", "--query-metrics-collection", collection, "--chips", "gh100"], 15)
        lists.append(known(text) if status == 0 else set())
        say(f"{collection}: {len(lists[-1])} metrics", "" if lists[-1] else text[-200:])
    metrics = chosen(*lists)
    say("asks for", *metrics)
    ways = [["--metrics", ",".join(metrics)]]
    sections = "WarpStateStats", "SourceCounters", "ComputeWorkloadAnalysis", "LaunchStats", "SpeedOfLight"
    ways.append([x for section in sections for x in ("--section", section)])
    for way in ways:
        if left() < 35:
            return False
        if os.path.exists(REPORT):
            os.remove(REPORT)
        command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--target-processes", "application-only"]
        command += [*way, "-f", "-o", REPORT.removesuffix(".ncu-rep"), sys.executable, os.path.abspath(__file__), "--launch"]
        status, text = called(command, min(60, left() - 20))
        with open(f"{LOGS}/stalls_ncu.log", "a") as file:
            file.write(text)
        refused = [line for line in text.splitlines() if any(word in line for word in REFUSED)]
        if refused:
            say("this machine refuses its counters:", refused[0])
            sys.exit(3)
        passes = re.findall(r"(\d+) pass", text)
        say("ncu", way[0], "status", status, "report", os.path.exists(REPORT), "passes", passes)
        if status == 0 and os.path.exists(REPORT):
            return True
        print(text[-1500:], flush=True)
    return False


# --- reading ---


def number(text):
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def raw_rows(text):
    """Each kernel's metrics by name, in the order of the launches; the second line of the table has the units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.reader(lines))
    head = table[0]
    return [dict(zip(head, row)) for row in table[1:] if row[0].strip()]


def matched(rows, names):
    """Rows by step: the next launch of the kernel that the step is known to launch."""
    found, rest = {}, list(rows)
    for step, kernel in names:
        at = next((i for i, row in enumerate(rest) if row["Kernel Name"].partition("(")[0] == kernel), None)
        if at is None:
            continue
        found[step], rest = rest[at], rest[at + 1 :]
        if rest and rest[0]["Kernel Name"].startswith("_redo"):
            found[f"{step}, lost rows"], rest = rest[0], rest[1:]
    return found


def shares(counts):
    """Percent of all but the warps that issue."""
    counts = {k: v for k, v in counts.items() if k != "selected" and v}
    return {k: 100 * v / sum(counts.values()) for k, v in sorted(counts.items(), key=lambda x: -x[1])}


def stalls(row):
    """Reasons in percent, by samples, or else by the mean of warps; and which of both it is."""
    for pattern, kind in (
        (r"smsp__pcsamp_warps_issue_stalled_(\w+?)(?:\.\w+)?", "samples"),
        (r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio", "mean"),
    ):
        counts = {}
        for name, text in row.items():
            found, value = re.fullmatch(pattern, name), number(text or "")
            if found and value is not None and not found[1].endswith("_not_issued"):
                counts[found[1]] = value
        if any(counts.values()):
            return shares(counts), kind
    return {}, "none"


def first(row, names):
    values = [number(row.get(name + PCT) or "") for name in names]
    return next((x for x in values if x), float("nan"))


def words(share, n=5):
    return "  ".join(f"{name} {x:.0f}" for name, x in list(share.items())[:n])


def table(found):
    lines = [f"{'step':28s} {'ms':>6s} {'Mcyc':>6s} {'regs':>4s} {'tens%':>5s} {'xu%':>5s} {'alu%':>5s} {'fma%':>5s} {'issue':>5s}  five reasons, % of stalls"]
    for step, row in found.items():
        share, kind = stalls(row)
        time_ns, cycles = (number(row.get(x) or "") or float("nan") for x in ("gpu__time_duration.sum", "sm__cycles_elapsed.max"))
        parts = [first(row, x) for x in (TENSOR, XU, *([y] for y in OTHERS))]
        lines.append(
            f"{step:28s} {time_ns / 1e6:6.3f} {cycles / 1e6:6.3f} {row.get('launch__registers_per_thread', ''):>4s} "
            + " ".join(f"{x:5.1f}" for x in parts) + f"  {words(share)}  ({kind})"
        )
    return lines


def listings(text):
    """Of each kernel the rows of its listing: what stands there, and samples by reason."""
    found, head = [], None
    for row in csv.reader(io.StringIO(text)):
        if "Source" in row and any("stall_" in x for x in row):
            head = row
            found.append([])
        elif head and len(row) == len(head):
            row = dict(zip(head, row))
            samples = {
                x.removeprefix("stall_"): int(number(row[x]) or 0)
                for x in head
                if x.startswith("stall_") and "not issued" not in x.lower() and "not_issued" not in x
            }
            found[-1].append((row["Source"].strip(), samples))
    return found


def roles(listing):
    """Samples by role and reason.

    Each role's code begins where it asks for its registers (USETMAXREG); the producer copies and multiplies nothing.
    Whoever waits at barrier 1 has no role, or has done with it. A wait that did not pass at once goes on behind the
    last EXIT and then jumps back: there a line belongs to where it jumps to. The last jump of a listing is one to
    itself, which says what an address is.
    """
    source = [text for text, _ in listing]
    is_split = any("USETMAXREG" in text for text in source)
    part, parts = 0, []
    for text in source:
        part += "USETMAXREG" in text
        parts.append(part)
    jumps = {}
    for i, text in enumerate(source):
        if to := re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text):
            jumps[i] = int(to[1], 16)
    plain = [i for i in jumps if not source[i].startswith("@")]
    exits = [i for i, text in enumerate(source) if re.search(r"\bEXIT\b", text)]
    if plain and exits:
        base, last = jumps[plain[-1]] - 16 * plain[-1], exits[-1]
        for i in range(len(source) - 1, last, -1):
            back = (jumps[i] - base) // 16 if i in plain else None
            if back is not None and 0 <= back <= last:
                parts[i] = parts[back]
            elif i + 1 < len(source) and i not in plain:
                parts[i] = parts[i + 1]
    kinds = {}
    for n in set(parts):
        text = "\n".join(x for x, p in zip(source, parts) if p == n)
        kinds[n] = "consumers" if "GMMA" in text else "producer" if "UTMALDG" in text else "start"
    found = {}
    parked = {j for i, x in enumerate(source) if is_split and re.search(r"BAR\.SYNC\S* 0x1\b(?!,)", x) for j in (i, i + 1)}
    for i, (_, samples) in enumerate(listing):
        kind = "parked" if i in parked and samples.get("barrier") else kinds[parts[i]] if is_split else "all"
        found.setdefault(kind, Counter()).update(samples)
    return found


def by_role(steps, listing_of):
    lines = ["", "by role: samples, of them issuing in %, and reasons in % of the stalls"]
    for step in steps:
        for kind, counts in sorted(roles(listing_of[step]).items()):
            total = sum(counts.values())
            if total:
                lines.append(f"{step:28s} {kind:10s} {total:7d} {100 * counts['selected'] / total:5.1f}  {words(shares(counts), 6)}")
        top = sorted(listing_of[step], key=lambda x: -sum(x[1].values()))[:6]
        every = sum(sum(x.values()) for _, x in listing_of[step]) or 1
        for text, samples in top:
            if sum(samples.values()):
                lines.append(f"      {100 * sum(samples.values()) / every:4.1f} %  {text[:60]:60s} {words(shares(samples), 2)}")
    return lines


def read_report(ncu):
    _, text = called([ncu, "-i", REPORT, "--page", "raw", "--csv", "--print-units", "base"], min(15, left()))
    with open(f"{LOGS}/stalls_raw.csv", "w") as file:
        file.write(text)
    rows = raw_rows(text)
    say(len(rows), "kernels:", *(row["Kernel Name"] for row in rows))
    found = matched(rows, json.load(open(NAMES)))
    lines = table(found)
    write(lines)
    for more in (["--print-source", "sass"], []):
        if left() < 4:
            break
        status, text = called([ncu, "-i", REPORT, "--page", "source", "--csv", *more], min(15, left() - 2))
        each = listings(text)
        say("source page, status", status, len(each), "listings", text[:300] if not each else "")
        if status == 0 and each:
            with gzip.open(f"{LOGS}/stalls_source.csv.gz", "wt") as file:
                file.write(text)
            if len(each) == len(rows):
                listing_of = {step: each[next(i for i, x in enumerate(rows) if x is row)] for step, row in found.items()}
                write(lines + by_role(found, listing_of))
            break
    if os.path.getsize(REPORT) > SMALL:
        say("the report has", os.path.getsize(REPORT) >> 20, "MB and is removed")
        os.remove(REPORT)
    print(open(f"{LOGS}/stalls.txt").read())


def write(lines):
    with open(f"{LOGS}/stalls.txt", "w") as file:
        file.write("\n".join(lines) + "\n")


def main():
    os.makedirs(LOGS, exist_ok=True)
    ncu = find_ncu()
    if ncu is None:
        say("there is no ncu on this machine")
        sys.exit(3)
    say(ncu, called([ncu, "--version"], 10)[1].strip().splitlines()[-1])
    stairs.cells_as_module()
    if not profile(ncu):
        say("no report")
        sys.exit(1)
    read_report(ncu)
    say("done")


if __name__ == "__main__":
    if "--launch" in sys.argv:
        launch_all()
    elif "--test" in sys.argv:
        import stalls_test
    else:
        main()
