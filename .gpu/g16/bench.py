"""One call on an H100 or H200 that answers what notebook 16's kernel needs to know.

    PYTHONPATH=$PWD:PEERS python .gpu16/bench.py [PART ...]      parts: compile check time backward host compiled load; all by default
    PYTHONPATH=$PWD compute-sanitizer --tool memcheck python .gpu16/bench.py one 1 729     (racecheck likewise)

Every answer is one line, so that a call which is cut short has told what it had. A worker that is silent for HANG seconds
is killed: the line HANG names what it was at, and the next worker goes on behind it. PEERS: folders of flash-attn 3 or 4.
"""
import json, math, os, queue, statistics, subprocess, sys, threading, time

T0 = time.time()
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "draft")]
HANG = float(os.environ.get("HANG", "60"))
H, DEVICE = 16, "cuda"
TOKENS = [1, 2, 17, 64, 65, 255, 256, 257, 729, 1024, 4096]
TIMED = [(64, 729, 72), (64, 1024, 72), (8, 729, 72), (64, 256, 72), (4, 4096, 72), (1, 729, 72), (64, 729, 64), (64, 729, 80), (64, 729, 96), (64, 729, 128)]


def say(*words):
    print(f"{time.time() - T0:5.0f}s", *words, flush=True)


# --- the contenders: qkv (B, N, 3, H, D) -> o, or None where they can't ---


def contenders(qkv, grad=False):
    import torch
    from siglip_lib.kernels import flash_attention as f, hopper_attention as h
    from siglip_lib.backends.dispatch import attend_packed
    D = qkv.shape[-1]
    q, k, v = qkv.unbind(2)
    found = {}
    if grad:
        found["hopper"] = lambda: h.hopper_attention(qkv)
        found["triton"] = lambda: f.flash_attention(qkv)
    else:
        found["hopper"] = lambda: h._launch(qkv, D**-0.5, False)[0]
        found["hopper exact"] = lambda: h._launch(qkv, D**-0.5, True)[0]
        found["triton"] = lambda: f._forward(qkv, D**-0.5)[0]
    found["cudnn"] = lambda: attend_packed(qkv, backend="cudnn")
    if not grad:
        try:
            import fa3_fwd_interface as f3
            found["fa3"] = lambda: first(f3.flash_attn_func(q, k, v))
        except Exception as e:
            say("no fa3:", e)
    try:
        from flash_attn.cute import flash_attn_func as f4
        found["fa4"] = lambda: first(f4(q, k, v))
    except Exception as e:
        say("no fa4:", str(e)[:80])
    if D == 72 and not grad:
        for name in ("ws6", "ws2"):
            try:
                found["draft " + name] = draft(name, qkv)
            except Exception as e:
                say("no draft", name, type(e).__name__, str(e)[:120])
    return found


def first(x):
    return x[0] if isinstance(x, tuple) else x


def draft(name, qkv):
    import importlib, torch, triton
    import triton.experimental.gluon.language as gl
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    import plain_triton
    if not hasattr(gl, "thread_barrier"):
        gl.thread_barrier = gl.barrier
    B, N = qkv.shape[:2]
    n = -(-N // 64)
    tail = max(16, triton.next_power_of_2(N - (n - 1) * 64))
    out = torch.empty(B, N, H, 72, device="cuda", dtype=qkv.dtype)
    lse = torch.empty(B, H, -(-N // 128) * 128, device="cuda")
    flat = qkv.view(B, N, 3 * H, 72)
    d = lambda t, c: TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 64, 1, c], NVMMASharedLayout(2 * c, 16, 4))
    ds = [d(flat, 64), d(flat, 16), d(flat, 64), d(flat, 16), d(out, 64), d(out, 16)]
    tiles = B * H * -(-N // 256)
    common = dict(BM=64, BN=64, NC=4, HEADS=H, TAIL=tail, MANY=n > 1, RN=8, EMU=0, R0=112, RP=24, maxnreg=96, num_warps=4)
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    flags = torch.zeros(B * H, device="cuda", dtype=torch.int32)
    kernel = importlib.import_module("attn_" + name).attn_ws[(min(tiles, sms),)]
    sizes = (72**-0.5 * math.log2(math.e), N, lse.shape[2], tiles)

    def call():
        if name == "ws6":
            kernel(*ds, lse, flags, *sizes, STAGES=7, SPLIT=2, **common)
            plain_triton.redo(qkv, out, lse, flags, sms)
        else:
            kernel(*ds, lse, *sizes, STAGES=4, INTRA=1, QREG=0, TREE=1, LAZY=1, PP=0, CP=0, **common)
        return out

    return call


def graphed(fn):
    import torch
    s = torch.cuda.Stream()
    s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        for _ in range(2):
            fn()
    torch.cuda.current_stream().wait_stream(s)
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        fn()
    return g.replay


def times(calls, rounds=25):
    """Median milliseconds, the contenders in turns, so that a clock that sinks sinks for all."""
    import torch
    took = {name: [] for name in calls}
    for i in range(rounds + 5):
        for name, call in calls.items():
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record(); call(); b.record()
            took[name].append((a, b))
    torch.cuda.synchronize()
    return {n: statistics.median(a.elapsed_time(b) for a, b in t[5:]) for n, t in took.items()}


# --- the parts; each yields (key, function) ---


def draw(B, N, D, dtype="bfloat16", size=1.0, seed=0):
    import torch
    torch.manual_seed(seed + N)
    return torch.randn(B, N, 3, H, D, device=DEVICE).mul_(size).to(getattr(torch, dtype))


def reference(qkv, eager_dtype=None):
    import torch
    x = qkv if eager_dtype else qkv.double()
    q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
    s = q @ k.transpose(-1, -2) * qkv.shape[-1] ** -0.5
    return (s.softmax(-1) @ v).transpose(1, 2), None if eager_dtype else s.logsumexp(-1) / math.log(2)


def check(dtype, D, B, N, size, exact):
    """flash-attn's criterion, and the lse; how many rows had lost their reference."""
    import torch
    from siglip_lib.kernels import flash_attention as f, hopper_attention as h
    qkv = draw(B, N, D, dtype, size)[:, :, :, :4].contiguous()
    wanted, lse = reference(qkv)
    plain, _ = reference(qkv, True)
    flagged = 0
    redo = h._redo_kernel
    if not exact:  # without the second kernel: which rows it would be asked for
        class Nothing:
            def __getitem__(self, grid): return lambda *a, **k: None
        h._redo_kernel = Nothing()
        flagged = int(h._launch(qkv, D**-0.5, False)[1].isnan().sum())
        h._redo_kernel = redo
    o, l = h._launch(qkv, D**-0.5, exact)
    again = [h._launch(qkv, D**-0.5, exact) for _ in range(9)]
    same = all(torch.equal(o, a) and torch.equal(l, b) for a, b in again)
    round_ = (wanted + 0.3 - 0.3 - wanted).abs().max() + torch.finfo(qkv.dtype).eps * wanted.abs().max()
    allowed = (2 * (plain - wanted).abs().max() + 2 * round_).item()
    e = (o - wanted).abs().max().item()
    el = (l[..., :N] - lse).abs().max().item()
    pad = bool((l[..., N:] == math.inf).all())
    ok = e <= allowed and el < 1e-3 * max(1, lse.abs().max().item() * 1e-2) and pad and same and bool(o.isfinite().all())
    return f"{'ok   ' if ok else 'WRONG'} o {e:.1e} allowed {allowed:.1e} lse {el:.1e} padding {pad} ten times the same {same} rows done again {flagged} of {B * 4 * N}"


def gradients(dtype, D, N):
    import torch
    from siglip_lib.kernels import hopper_attention as h
    sys.path.insert(0, "tests")
    from test_kernels_flash_attention import assert_good
    assert_good(draw(2, N, D, dtype)[:, :, :, :4].contiguous().requires_grad_(), h.hopper_attention)
    return "ok    o, dq, dk, dv by the test's criterion"


def load(exact, launches=10_000):
    """Beside a stream of matmuls, which takes multiprocessors away at any time."""
    import torch
    from siglip_lib.kernels import hopper_attention as h
    qkv = draw(8, 729, 72)
    want, _ = h._launch(qkv, 0.1, exact)
    other, a = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    changed = torch.zeros((), device="cuda", dtype=torch.int64)
    begun = time.time()
    for i in range(launches):
        if i % 20 == 0:
            with torch.cuda.stream(other):
                a @ a
        o, _ = h._launch(qkv, 0.1, exact)
        changed += (o != want).any()
        if i % 1000 == 0:
            torch.cuda.synchronize(); say("  load", i, "changed", int(changed))
    torch.cuda.synchronize()
    return f"{'ok   ' if not int(changed) else 'WRONG'} {launches} launches, changed {int(changed)}, {time.time() - begun:.0f} s"


def timed(B, N, D):
    qkv = draw(B, N, D)
    calls = {}
    for name, call in contenders(qkv).items():
        try:
            calls[name] = graphed(call)
        except Exception as e:
            say("  ", name, type(e).__name__, str(e)[:150])
    tf = {n: 4 * B * H * N * N * D / ms / 1e9 for n, ms in times(calls).items()}
    return json.dumps({n: round(x, 1) for n, x in tf.items()})


def timed_grad(B, N, D):
    import torch
    qkv = draw(B, N, D).requires_grad_()
    pull = torch.randn(B, N, H, D, device="cuda", dtype=qkv.dtype)
    calls = {}
    for name, call in contenders(qkv, True).items():
        try:
            def both(call=call): return torch.autograd.grad(call(), qkv, pull)
            calls[name] = graphed(both)
        except Exception as e:
            say("  ", name, type(e).__name__, str(e)[:150])
    tf = {n: 14 * B * H * N * N * D / ms / 1e9 for n, ms in times(calls).items()}
    return json.dumps({n: round(x, 1) for n, x in tf.items()})


def backward_draft(qkv, out, lse, d_out, stages=3):
    """The call of hopper_backward.py; delta is made outside, as the forward pass could."""
    import torch, hopper_backward as hb
    from siglip_lib.kernels import hopper_attention as h
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    B, N, _, _, D = qkv.shape
    heads, padded = qkv.shape[3], lse.shape[2]
    delta = torch.zeros_like(lse)
    delta[..., :N] = (out.float() * d_out.float()).sum(-1).transpose(1, 2)
    line = lambda x: TensorDescriptor(x, [B * heads, padded], [padded, 1], [1, 64], NVMMASharedLayout(0, 32, 2))
    programs = min(B * heads, torch.cuda.get_device_properties(0).multi_processor_count)
    scratch = torch.empty(programs, padded, D, device="cuda")
    d_qkv = torch.full_like(qkv, math.nan)
    ds = (*h.descriptors(qkv.view(B, N, 3 * heads, D)), *h.descriptors(d_out), line(lse), line(delta))
    scale = D**-0.5

    def call():
        hb._backward_kernel[(programs,)](*ds, d_qkv, scratch, scale * math.log2(math.e), scale, N, padded, B * heads, HEADS=heads, REST=D - 64,
                                         STAGES=stages, REGISTERS=240, PRODUCER_REGISTERS=24, maxnreg=168, num_warps=4)
        return d_qkv

    return call


def backward_check(D, B, N, size):
    import torch
    from siglip_lib.kernels import flash_attention as f
    qkv = draw(B, N, D, size=size)[:, :, :, :4].contiguous()
    d_out = torch.randn(B, N, 4, D, device="cuda").to(qkv.dtype)
    out, lse = f._forward(qkv, D**-0.5)
    x = qkv.double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(x)[0], x, d_out.double())
    plain = f._backward(d_out, qkv, out, lse, D**-0.5)
    call = backward_draft(qkv, out, lse, d_out)
    got = call().clone()
    same = all(torch.equal(got, call()) for _ in range(9))
    lines = []
    for i, name in enumerate(("dq", "dk", "dv")):
        e, p = ((x[:, :, i].double() - wanted[:, :, i]).abs().max().item() for x in (got, plain))
        lines.append(f"{name} {e:.1e} (triton {p:.1e})")
    ok = same and bool(got.isfinite().all()) and (got.double() - wanted).abs().max() <= 2 * (plain.double() - wanted).abs().max() + 1e-6
    return f"{'ok   ' if ok else 'WRONG'} {' '.join(lines)} ten times the same {same}"


def backward_time(B, N, D):
    import torch
    from siglip_lib.kernels import flash_attention as f
    qkv = draw(B, N, D)
    d_out = torch.randn(B, N, H, D, device="cuda").to(qkv.dtype)
    out, lse = f._forward(qkv, D**-0.5)
    calls = {f"draft, {s} stages": graphed(backward_draft(qkv, out, lse, d_out, s)) for s in (2, 3, 4)}
    calls["triton"] = graphed(lambda: f._backward(d_out, qkv, out, lse, D**-0.5))
    return "without delta: " + json.dumps({n: round(10 * B * H * N * N * D / ms / 1e9, 1) for n, ms in times(calls).items()})


def worst(B, N):
    """Every row done again: bounded by the sum of both kernels."""
    from siglip_lib.kernels import flash_attention as f, hopper_attention as h
    qkv = draw(B, N, 72, size=30.0)
    calls = {"every row again": graphed(lambda: h._launch(qkv, 0.5, False)), "exact": graphed(lambda: h._launch(qkv, 0.5, True)), "triton": graphed(lambda: f._forward(qkv, 0.5))}
    return json.dumps({n: round(4 * B * H * N * N * 72 / ms / 1e9, 1) for n, ms in times(calls).items()})


def roles(consumers, stages, registers, exact):
    """Other make-ups of a thread block at head_dim 72."""
    from siglip_lib.kernels import hopper_attention as h
    kept = dict(h.ROLES)
    h.ROLES[72] = h.Roles(consumers, stages, registers)
    h.constants_of.cache_clear()
    try:
        found = {}
        for B, N in ((64, 729), (64, 1024), (64, 256)):
            qkv = draw(B, N, 72)
            found[f"{B}x{N}"] = round(4 * B * H * N * N * 72 / times({"x": graphed(lambda: h._launch(qkv, 0.1, exact))})["x"] / 1e9, 1)
        return json.dumps(found)
    finally:
        h.ROLES.update(kept)
        h.constants_of.cache_clear()


def host():
    """Microseconds that Python takes for a call, GPU work too small to matter."""
    import torch
    from siglip_lib.kernels import flash_attention as f, hopper_attention as h
    qkv = draw(1, 16, 72)
    found = {}
    for name, call in (("hopper", lambda: h.hopper_attention(qkv)), ("hopper exact", lambda: h._launch(qkv, 0.1, True)), ("triton", lambda: f.flash_attention(qkv))):
        for _ in range(200): call()
        torch.cuda.synchronize(); begun = time.perf_counter()
        for _ in range(1000): call()
        found[name] = round((time.perf_counter() - begun) * 1e3, 1)
        torch.cuda.synchronize()
    return json.dumps(found)


def compiled():
    import torch
    from siglip_lib.kernels import hopper_attention as h
    qkv = draw(8, 729, 72)
    fn = torch.compile(lambda x: h.hopper_attention(x) * 2, fullgraph=True, mode="reduce-overhead")
    want = h.hopper_attention(qkv) * 2
    same = [torch.equal(fn(qkv), want) for _ in range(4)]
    x = draw(2, 729, 72).requires_grad_(); y = x.detach().clone().requires_grad_()
    torch.compile(h.hopper_attention, fullgraph=True)(x).float().pow(2).sum().backward(); h.hopper_attention(y).float().pow(2).sum().backward()
    return f"{'ok   ' if all(same) and torch.equal(x.grad, y.grad) else 'WRONG'} with CUDA graphs {same} gradient {torch.equal(x.grad, y.grad)}"


PARTS = {
    "check": [(check, (t, D, B, N, size, exact)) for D in (72, 64, 80, 128, 96) for t, exact in (("bfloat16", False), ("bfloat16", True), ("float16", True))
              for N in TOKENS for B, size in ((1, 1.0), (3, 1.0), (1, 10.0)) if D in (72, 64) or N in (17, 257, 729)]
    + [(gradients, (t, D, N)) for D in (64, 72, 80, 128) for t in ("bfloat16", "float16") for N in (17, 257, 729)],
    "time": [(timed, c) for c in TIMED] + [(timed_grad, c) for c in ((64, 729, 72), (64, 1024, 72), (8, 729, 72), (64, 729, 64))] + [(worst, (64, 729)), (worst, (4, 4096))]
    + [(roles, c) for c in ((4, 7, 112, False), (4, 5, 112, False), (4, 4, 112, True), (3, 8, 160, False), (3, 8, 160, True), (3, 4, 160, True))],
    "backward": [(backward_check, (D, B, N, 1.0)) for D in (72, 64) for N in (729, 17, 1, 257, 1024) for B in (1, 3)] + [(backward_check, (72, 2, 729, 10.0))]
    + [(backward_time, c) for c in ((64, 729, 72), (64, 1024, 72), (8, 729, 72), (64, 729, 64))],
    "host": [(host, ())],
    "compiled": [(compiled, ())],
    "load": [(load, (False,)), (load, (True,))],
}


def warm(D, N, exact):
    """In a process of its own: compile, so that workers find it in Triton's cache."""
    import torch
    from siglip_lib.kernels import hopper_attention as h
    for dtype in ("bfloat16", "float16") if exact else ("bfloat16",):
        h._launch(draw(1, N, D, dtype)[:, :, :, :4 if N < 100 else H].contiguous(), 0.1, exact)
        h._launch(draw(1, N, D, dtype)[:, :, :, :4].contiguous(), 0.1, exact)
        torch.cuda.synchronize()


def main(parts):
    import torch, triton
    say(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), "torch", torch.__version__, "triton", triton.__version__)
    if not parts or "compile" in parts:
        todo = [(D, N, e) for D in (72, 64, 80, 128, 96) for N in (17, 65, 729, 1024, 1) for e in (0, 1)]
        running = []
        for D, N, e in todo:
            while len(running) >= 14:
                running = [p for p in running if p.poll() is None]; time.sleep(0.1)
            running.append(subprocess.Popen([sys.executable, __file__, "warm", str(D), str(N), str(e)]))
        for p in running:
            try: p.wait(timeout=max(5, 120 - (time.time() - T0)))
            except subprocess.TimeoutExpired: p.kill(); say("HANG or slow to compile:", p.args[-3:])
        say("compiled")
    names = [n for n in ("check", "time", "backward", "host", "compiled", "load") if not parts or n in parts]
    todo = [(n, i) for n in names for i in range(len(PARTS[n]))]
    bad = 0
    while todo and bad < 6:
        w = subprocess.Popen([sys.executable, __file__, "work", json.dumps(todo)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = queue.Queue()
        threading.Thread(target=lambda w=w, lines=lines: [lines.put(x) for x in w.stdout] and None or lines.put(None), daemon=True).start()
        at = todo[0]
        while True:
            try: line = lines.get(timeout=HANG)
            except queue.Empty:
                say("HANG", at, PARTS[at[0]][at[1]][1]); w.kill(); todo = todo[todo.index(at) + 1:]; bad += 1; break
            if line is None:
                if w.wait(): say("DIED", at, PARTS[at[0]][at[1]][1]); todo = todo[todo.index(at) + 1:]; bad += 1
                else: todo = []
                break
            if line.startswith("AT "): at = tuple(json.loads(line[3:]))
            else: print(line, end="", flush=True)
    say("done")


def work(todo):
    for n, i in todo:
        print("AT " + json.dumps([n, i]), flush=True)
        fn, given = PARTS[n][i]
        try:
            say(fn.__name__, *given, "|", fn(*given))
        except Exception as e:
            say(fn.__name__, *given, "| FAILED", type(e).__name__, " ".join(str(e).split())[:300])
            if "CUDA" in str(e): sys.exit(1)  # the context is lost


if __name__ == "__main__":
    what = sys.argv[1:]
    if what[:1] == ["warm"]: warm(int(what[1]), int(what[2]), bool(int(what[3])))
    elif what[:1] == ["work"]: work([tuple(x) for x in json.loads(what[1])])
    elif what[:1] == ["one"]:
        for exact in (False, True): print(check("bfloat16", 72, int(what[1]), int(what[2]), 1.0, exact))
    else: main(what)
