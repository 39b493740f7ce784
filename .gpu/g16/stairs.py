"""The steps of notebook 16, straight from its cells, on a GPU of compute capability 9.0; at most 100 s.

    PYTHONPATH=$PWD OMP_NUM_THREADS=1 python .gpu/g16/stairs.py [WORD ...]      only steps with one of these words

Each step is compiled and checked against float64 in a process of its own, at 17, 65, 257 and 729 tokens, all at the same
time; one that is not done 40 s after its first launch is killed (HANG names the tokens it was at). Then all that are right are timed in
turns. One line a step. --compile compiles for sm_90 instead, on any machine.
"""
import ast, json, os, signal, subprocess, sys, time

T0 = time.time()
HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path[:0] = [ROOT, HERE]
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, HERE, *filter(None, [os.environ.get("PYTHONPATH")])])
NOTEBOOK = os.path.join(ROOT, "notebooks", "16_hopper_attention.ipynb")
MODULE = os.path.join(HERE, "stairs_cells.py")


def cells_as_module():
    """Imports, definitions and add_step calls of the notebook, in a file, where Triton can read it."""
    kept = []
    for cell in json.load(open(NOTEBOOK))["cells"]:
        if cell["cell_type"] != "code" or cell["id"].startswith("c16b"):
            continue
        source, body = "".join(cell["source"]), []
        if not any(word in source for word in ("import ", "def ", "gl.constexpr(", "add_step", "steps[", "dict(CONS", "pick_size")):
            continue
        for node in ast.parse(source).body:
            calls = {n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
            defines = isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))
            compiles = "compile_reports" in calls or ("attention" in calls and not defines)
            adds = "add_step" in calls
            is_assign = isinstance(node, (ast.Assign, ast.AugAssign)) and not compiles
            is_assign = is_assign and not ast.unparse(node).startswith(("inputs =", "sixth ="))
            if isinstance(node, ast.For) and not adds:
                continue
            if defines or adds or is_assign:
                lines = source.split("\n")
                first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
                body.append("\n".join(lines[first - 1 : node.end_lineno]))
        kept += [f"# {cell['id']}", *body]
        if cell["id"] == "c16-libraries":
            break
    text = "\n\n".join(kept) + "\n"
    with open(MODULE, "w") as file:
        file.write(text)


def steps():
    import stairs_cells as cells

    import torch

    def stamped(qkv, consumers=3, stages=8, maxnreg=128):
        stamps = torch.zeros(consumers, 12, 6, dtype=torch.int64, device=qkv.device)
        return cells.launch(cells.stamped_kernel, qkv, CONSUMERS=consumers, STAGES=stages, maxnreg=maxnreg, stamps=stamps)

    cells.steps["stamped"] = stamped
    cells.steps["stamped, one consumer"] = lambda qkv: stamped(qkv, 1)
    words = [w for w in sys.argv[1:] if not w.startswith("--")]
    # these orders are only compiled in the notebook: all their products run one by one
    names = [n for n in cells.steps if not n.endswith("104 registers")]
    return cells, [n for n in names if not words or any(w in n for w in words)]


def child_check(name):
    cells, _ = steps()
    import torch

    worst = {}
    for tokens in (17, 65, 257, 729):
        print("AT", tokens, flush=True)
        worst[tokens] = round(cells.deviation(cells.steps[name], tokens), 3)
    qkv = cells.draw(2, 729)
    first = cells.steps[name](qkv)
    same = all(torch.equal(first, cells.steps[name](qkv)) for _ in range(9))
    ok = all(x <= 1 for x in worst.values()) and same
    print("RESULT", json.dumps([ok, f"{'ok   ' if ok else 'WRONG'} {worst} ten times the same {same}"]), flush=True)


def child_time(names):
    cells, _ = steps()
    from siglip_lib import measure_together

    calls = {"13's kernel": cells.flash_attention} | {n: cells.steps[n] for n in names}
    table = {n: [] for n in calls}
    for batch in (64, 8):
        qkv = cells.draw(batch, 729)
        from functools import partial

        for n, t in measure_together({n: partial(f, qkv) for n, f in calls.items()}, "cuda", graph=True).items():
            speed = 4 * batch * 16 * 729**2 * 72 / t.median_ms / 1e9
            table[n].append(f"{batch}x729 {speed:6.1f} TFLOP/s {t.median_ms * 1e3:7.1f} us spread {t.spread:.0%}")
    for n, row in table.items():
        print(f"{time.time() - T0:4.0f}s  {n:28s} " + "   ".join(row), flush=True)


def child_compile():
    cells, names = steps()
    from siglip_lib.kernels.report import compile_reports

    for n in names:
        r = compile_reports({n: cells.launches[n]}, opcodes=True)[n]
        bodies = [l for l in r.loops if "HGMMA" in l]
        print(f"{n:28s} registers {r.registers} spilled {r.spilled} in the loop {any({'LDL', 'STL'} & set(l) for l in bodies)} shared {r.shared} serialised {r.serialised}", flush=True)


def start(*arguments):
    return subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def kill(p):
    try:
        os.killpg(p.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def main():
    cells_as_module()
    if "--compile" in sys.argv:
        return child_compile()
    import threading

    import torch, triton

    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    _, names = steps()
    lines = {n: [] for n in names}
    running = {}
    for n in names:
        p = running[n] = start("--check", n)
        threading.Thread(target=lambda p=p, n=n: lines[n].extend(p.stdout), daemon=True).start()
    end, since, right = time.time() + 60, {}, []
    while running:
        for n in list(running):
            p = running[n]
            if any(l.startswith("AT ") for l in lines[n]):
                since.setdefault(n, time.time())
            if p.poll() is not None:
                time.sleep(0.05)
                found = [l for l in lines[n] if l.startswith("RESULT ")]
                ok, text = json.loads(found[0][7:]) if found else (False, "DIED  " + " | ".join("".join(lines[n]).split("\n")[-4:])[-400:])
                right += [n] * ok
            elif time.time() > min(end, since.get(n, end) + 40):
                kill(p)
                at = [l.strip() for l in lines[n] if l.startswith("AT ")]
                text = f"HANG, or slower than 40 s, {at[-1] if at else 'before its first launch'}"
            else:
                continue
            running.pop(n)
            print(f"{time.time() - T0:4.0f}s  {n:28s} {text}", flush=True)
        time.sleep(0.05)
    right = [n for n in names if n in right]
    p = start("--time", json.dumps(right))
    threading.Thread(target=lambda: [print(l, end="", flush=True) for l in p.stdout], daemon=True).start()
    try:
        p.wait(timeout=max(1, 95 - (time.time() - T0)))
        time.sleep(0.2)
    except subprocess.TimeoutExpired:
        kill(p)
        print("HANG while timing", flush=True)
    print(f"{time.time() - T0:4.0f}s done", flush=True)


if __name__ == "__main__":
    if "--check" in sys.argv:
        name = sys.argv[sys.argv.index("--check") + 1]
        sys.argv = sys.argv[:1]
        child_check(name)
    elif "--time" in sys.argv:
        names = json.loads(sys.argv[sys.argv.index("--time") + 1])
        sys.argv = sys.argv[:1]
        child_time(names)
    else:
        main()
