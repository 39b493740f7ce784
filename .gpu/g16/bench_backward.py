"""One call on an H100 or H200: is the backward pass of kernels/hopper_backward.py right, how fast, and which make-up is best.

    PYTHONPATH=$PWD:PEERS python .gpu/g16/bench_backward.py [PART ...]
    parts, in this order: check time alone roles forward fa4; all by default
    PYTHONPATH=$PWD compute-sanitizer --tool memcheck python .gpu/g16/bench_backward.py one 72 1 729     (racecheck likewise)

One line an answer. A worker that is silent for HANG seconds is killed (the line HANG names what it was at) and the next one
goes on behind it. Kernels are compiled first, many at a time. PEERS: the folder of flash-attn 4, if it is not installed.
"""
import gc, json, math, os, queue, statistics, subprocess, sys, threading, time

sys.path[:0] = [os.path.dirname(os.path.abspath(__file__))]
T0 = float(os.environ.get("BENCH_T0", time.time()))
os.environ["BENCH_T0"] = str(T0)
HANG = float(os.environ.get("HANG", "40"))
H = 16
DIMS, TOKENS = (72, 64, 80, 128), (729, 1, 17, 64, 65, 257, 1024)
TIMED = [(64, 729, 72), (64, 1024, 72), (8, 729, 72), (64, 729, 64), (64, 729, 80)]
# pass, then consumers, stages, registers, rows read at a time, blocks held in registers, turns; at head_dim 72
MAKE_UPS = [
    ("keys", 2, 7, 240, 64, 2, 0), ("keys", 2, 7, 240, 64, 0, 0), ("keys", 2, 7, 240, 64, 2, 1), ("keys", 2, 7, 240, 64, 0, 1),
    ("keys", 2, 3, 240, 64, 2, 0), ("keys", 3, 10, 160, 32, 0, 0),
    ("queries", 3, 5, 160, 64, 0, 0), ("queries", 3, 5, 160, 64, 0, 1), ("queries", 3, 3, 160, 64, 0, 0),
    ("queries", 2, 7, 240, 64, 2, 0), ("queries", 2, 7, 240, 64, 0, 0), ("queries", 2, 7, 240, 64, 2, 1),
]


def say(*words):
    print(f"{time.time() - T0:5.0f}s", *words, flush=True)


def graphed(fn):
    """Replay of a captured call. It keeps fn, and so all tensors that fn closes over: captures free unused memory."""
    import torch
    s = torch.cuda.Stream()
    s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        for _ in range(2):
            fn()
    torch.cuda.current_stream().wait_stream(s)
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        kept = fn()
    return lambda kept=(fn, kept): g.replay()


def times(calls, rounds=20):
    """Median milliseconds, the contenders in turns."""
    import torch
    took = {name: [] for name in calls}
    for _ in range(rounds + 4):
        for name, call in calls.items():
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record(); call(); b.record()
            took[name].append((a, b))
    torch.cuda.synchronize()
    return {n: statistics.median(a.elapsed_time(b) for a, b in t[4:]) for n, t in took.items()}


def draw(B, N, D, dtype="bfloat16", size=1.0):
    import torch
    torch.manual_seed(N)
    if size == "low":  # exp2(-lse), the weight of a key of zeros past the end, is infinite
        x = torch.randn(B, N, 3, H, D, device="cuda")
        x[:, :, 0] += 40
        x[:, :, 1] -= 40
        return x.to(getattr(torch, dtype))
    return torch.randn(B, N, 3, H, D, device="cuda").mul_(size).to(getattr(torch, dtype))


def gradient(qkv, d_out):
    """Of plain attention, in the dtype of qkv."""
    import torch
    x = qkv.detach().clone().requires_grad_()
    q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
    s = q @ k.transpose(-1, -2) * x.shape[-1] ** -0.5
    o = (s.softmax(-1) @ v).transpose(1, 2)
    return o.detach(), torch.autograd.grad(o, x, d_out.to(x.dtype))[0], s.abs().max().item()


def inputs(B, N, D, dtype="bfloat16", size=1.0):
    import torch
    from siglip_lib.kernels import flash_attention as f
    qkv = draw(B, N, D, dtype, size)
    d_out = torch.randn(B, N, H, D, device="cuda").to(qkv.dtype)
    out, lse = f._forward(qkv, D**-0.5)
    return d_out, qkv, out, lse, D**-0.5


def make_up(name, *given):
    """Change how a pass is made up at head_dim 72."""
    from siglip_lib.kernels import hopper_backward as b
    b.ROLES[name][72] = b.BackwardRoles(*given[:5], bool(given[5]))
    b.constants_of.cache_clear()


# --- the parts ---


def check(D, B, N, size, dtype="bfloat16"):
    """The criterion of tests/test_kernels_flash_attention.py, ten runs, and Triton's kernel beside it."""
    import torch
    from siglip_lib.kernels import flash_attention as f, hopper_backward as b
    given = inputs(B, N, D, dtype, size)
    d_out, qkv, _, _, scale = given
    got = b._backward(*given)
    same = all(torch.equal(got, b._backward(*given)) for _ in range(9))
    o, wanted, highest = gradient(qkv.double(), d_out)
    plain, triton = gradient(qkv, d_out)[1], f._backward(*given)
    eps = torch.finfo(qkv.dtype).eps
    side = (o * d_out).abs().sum(-1).max().item() * scale
    ok, lines = same and bool(got.isfinite().all()), []
    for i, name in enumerate(("dq", "dk", "dv")):
        w = wanted[:, :, i]
        rounding = (w + 0.3 - 0.3 - w).abs().max().item() + (eps + torch.finfo(torch.float32).eps * highest) * w.abs().max().item()
        if i < 2:
            rounding += eps * side * qkv.abs().max().item()
        error, beside, allowed = ((x[:, :, i].double() - w).abs().max().item() for x in (got, triton, plain))
        allowed = 2 * allowed + 2 * rounding
        ok = ok and error <= min(allowed, 2 * beside + 1e-5)  # the criterion alone lets 5 % of dq pass
        lines.append(f"{name} {error:.1e} (triton {beside:.1e}, allowed {allowed:.1e})")
    return f"{'ok   ' if ok else 'WRONG'} {' '.join(lines)} ten times the same {same}"


def autograd_check(N):
    """Through the operator, with the switch on: bits of the two parts, a pull that is expanded, one at an odd address."""
    import torch
    from siglip_lib.kernels import hopper_attention as h, hopper_backward as b
    h.OWN_BACKWARD = True
    qkv = draw(2, N, 72).requires_grad_()
    pull = torch.randn(2, N, H, 72, device="cuda").to(qkv.dtype)
    out, lse = h._forward(qkv.detach(), 72**-0.5)
    (x,) = torch.autograd.grad(h.hopper_attention(qkv), qkv, pull)
    same = torch.equal(x, b._backward(pull, qkv.detach(), out, lse, 72**-0.5))
    (y,) = torch.autograd.grad(h.hopper_attention(qkv).sum(), qkv)
    expanded = torch.equal(y, b._backward(torch.ones_like(pull), qkv.detach(), out, lse, 72**-0.5))
    moved = torch.empty(pull.numel() + 1, dtype=pull.dtype, device="cuda")[1:].view_as(pull).copy_(pull)
    odd = torch.equal(b._backward(moved, qkv.detach(), out, lse, 72**-0.5), x)
    return f"{'ok   ' if same and expanded and odd else 'WRONG'} bits {same} expanded {expanded} odd address {odd}"


def both(call, qkv, pull):
    import torch
    return lambda: torch.autograd.grad(call(), qkv, pull)


def forward_backward(B, N, D, peer=False):
    """Useful TFLOP/s, forward + backward."""
    import torch
    from siglip_lib.backends.dispatch import attend_packed
    from siglip_lib.kernels import flash_attention as f, hopper_attention as h
    qkv = draw(B, N, D).requires_grad_()
    pull = torch.randn(B, N, H, D, device="cuda", dtype=qkv.dtype)
    calls, made = {}, {}

    def own(on):
        def call():
            h.OWN_BACKWARD = on
            return torch.autograd.grad(h.hopper_attention(qkv), qkv, pull)
        return call
    made["hopper"] = own(True)
    if not peer:
        made["hopper, triton's backward"] = own(False)
        made["triton"] = both(lambda: f.flash_attention(qkv), qkv, pull)
        made["cudnn"] = both(lambda: attend_packed(qkv, backend="cudnn"), qkv, pull)
    else:
        made |= flash_attn_4(qkv, pull)
    for name, call in made.items():
        try:
            calls[name] = graphed(call)
        except Exception as e:
            say("  ", name, type(e).__name__, " ".join(str(e).split())[:200])
    tf = {n: round(14 * B * H * N * N * D / ms / 1e9, 1) for n, ms in times(calls).items()}
    return json.dumps(tf | {"hopper by": {n: round(tf["hopper"] / x, 3) for n, x in tf.items() if n != "hopper"}})


def flash_attn_4(qkv, pull):
    """Its gradients are right at multiples of 32: filled up inside the call, and on tensors that are filled up already."""
    import torch, torch.nn.functional as F
    B, N, _, _, D = qkv.shape
    try:
        from flash_attn.cute import flash_attn_func as attention
    except Exception as e:
        say("no flash-attn 4:", type(e).__name__, str(e)[:100])
        return {}
    first = lambda x: x[0] if isinstance(x, tuple) else x
    extra = -D % 32
    q, k, v = (F.pad(x.detach(), (0, extra)).contiguous().requires_grad_() for x in qkv.unbind(2))
    wide = F.pad(pull, (0, extra)).contiguous()
    found = {"fa4, wide": lambda: torch.autograd.grad(first(attention(q, k, v, softmax_scale=D**-0.5)), (q, k, v), wide)}
    if extra:
        def inside():
            a, b, c = qkv.unbind(2)
            a, b, c = (F.pad(x, (0, extra)) for x in (a, b, c))
            return torch.autograd.grad(first(attention(a, b, c, softmax_scale=D**-0.5))[..., :D], qkv, pull)
        found["fa4, filled up inside"] = inside
    return found


def alone(B, N, D):
    """The backward pass by itself, and its kernels: milliseconds, and useful TFLOP/s of the whole."""
    import torch
    from siglip_lib.kernels import flash_attention as f, hopper_backward as b
    given = inputs(B, N, D)
    d_out, qkv, out, lse, scale = given
    calls = {"hopper": graphed(lambda: b._backward(*given)), "triton": graphed(lambda: f._backward(*given))}
    calls |= {name: graphed(one) for name, one in kernels(given).items()}
    ms = times(calls)
    tf = {n: round(10 * B * H * N * N * D / ms[n] / 1e9, 1) for n in ("hopper", "triton")}
    return json.dumps(tf) + " ms " + json.dumps({n: round(x, 4) for n, x in ms.items()})


def kernels(given):
    """Each kernel's launch."""
    import torch
    from siglip_lib.kernels import hopper_backward as b
    d_out, qkv, out, lse, scale = given
    B, N, _, heads, D = qkv.shape
    delta, d_qkv = torch.zeros_like(lse), torch.empty_like(qkv)

    def one(name):
        c = b.constants_of(name, D, heads, N)
        tiles = -(-N // (64 * c["CONSUMERS"])) * B * heads
        arguments = b.arguments_of(name, qkv, d_out, d_qkv, lse, delta)
        grid = (min(tiles, torch.cuda.get_device_properties(0).multi_processor_count),)
        return lambda: b._backward_kernel[grid](*arguments, scale * math.log2(math.e), scale, N, lse.shape[2], tiles, **c) and d_qkv
    of_delta = lambda: b._delta_kernel[(B * lse.shape[2] * heads // b._DELTAS,)](out, d_out, delta, N, lse.shape[2], **b.delta_constants(D, heads)) and delta
    return {"delta": of_delta, "keys": one("keys"), "queries": one("queries")}


def roles(name, *given):
    """A make-up: right, and how many milliseconds."""
    import torch
    from siglip_lib.kernels import hopper_backward as b
    make_up(name, *given)
    small = inputs(2, 729, 72)
    which = [0] if name == "queries" else [1, 2]
    got = b._backward(*small)[:, :, which]
    wanted = gradient(small[1].double(), small[0])[1][:, :, which]
    error = (got - wanted).abs().max().item()
    ms = {}
    for B, N in ((64, 729), (64, 1024), (8, 729)):
        ms[f"{B}x{N}"] = round(times({"x": graphed(kernels(inputs(B, N, 72))[name])}, 10)["x"], 4)
    return f"{'ok   ' if error < 2e-2 else 'WRONG'} error {error:.1e} ms {json.dumps(ms)}"


def forward(B, N):
    """The forward pass's second kernel as it was, as it is and left out, and two consumers; useful TFLOP/s."""
    import torch
    from old_redo import old_redo
    from siglip_lib.kernels import flash_attention as f, hopper_attention as h
    from siglip_lib.backends.dispatch import attend_packed
    qkv = draw(B, N, 72)
    right = h._launch(qkv, 72**-0.5, True)[0]

    class Old:
        def __getitem__(self, grid):
            def launch(qkv, out, lse, scale, tokens, padded, blocks, AT_ONCE, **c):
                old_redo[(blocks,)](qkv, out, lse, scale, tokens, padded, **c)
            return launch

    class None_:
        def __getitem__(self, grid): return lambda *a, **c: None
    new, calls, apart = h._redo_kernel, {}, {}
    for small in (False, True):
        h.SMALL_BATCHES = small
        for name, redo in (("old", Old()), ("new", new), ("no", None_()), ("exact", None)):
            h._redo_kernel = redo or new
            call = lambda exact=redo is None: h._launch(qkv, 72**-0.5, exact)
            key = f"{name} redo" if redo else "exact"
            key += ", small" * small
            apart[key] = (call()[0] - right).abs().max().item()
            calls[key] = graphed(call)
    h._redo_kernel, h.SMALL_BATCHES = new, False
    calls["triton"], calls["cudnn"] = graphed(lambda: f._forward(qkv, 72**-0.5)), graphed(lambda: attend_packed(qkv, backend="cudnn"))
    worst = max(apart.values())
    tf = {n: round(4 * B * H * N * N * 72 / ms / 1e9, 1) for n, ms in times(calls).items()}
    return f"{'ok   ' if worst < 2e-2 else 'WRONG'} apart {worst:.1e} {json.dumps(tf)}"


def redone(size):
    """Rows that lose their reference, some and most: against the exact form."""
    import torch
    from siglip_lib.kernels import hopper_attention as h
    qkv = draw(3, 729, 72)
    qkv[1, :, :, 5] *= size  # one head of one sample
    got, lse = h._launch(qkv, 72**-0.5, False)
    want, wanted = h._launch(qkv, 72**-0.5, True)
    apart = (got - want).abs().max().item()
    same = all(torch.equal(h._launch(qkv, 72**-0.5, False)[0], got) for _ in range(9))
    fine = apart < 2e-2 * want.abs().max().item() and not lse.isnan().any() and same
    return f"{'ok   ' if fine else 'WRONG'} apart {apart:.1e} nan {int(lse.isnan().sum())} ten times the same {same}"


PARTS = {
    "check": [(check, (D, B, N, size)) for D in DIMS for N in TOKENS for B, size in ((1, 1.0), (3, 1.0), (1, 10.0))]
    + [(check, (72, 3, 729, 1.0, "float16")), (check, (72, 2, 729, "low")), (check, (72, 2, 65, "low")), (autograd_check, (729,)), (autograd_check, (17,))],
    "time": [(forward_backward, c) for c in TIMED],
    "alone": [(alone, c) for c in TIMED],
    "roles": [(roles, m) for m in MAKE_UPS],
    "forward": [(redone, (10.0,))] + [(forward, c) for c in ((64, 256), (1, 729), (1, 256), (2, 729), (64, 729), (8, 729))],
    "fa4": [(forward_backward, (*c, True)) for c in TIMED],
}


# --- compiling, and workers ---


def warm(what):
    """In a process of its own: compile, so that workers find it in Triton's cache."""
    import torch
    from siglip_lib.kernels import hopper_attention as h, hopper_backward as b
    if what[0] in ("keys", "queries"):
        make_up(what[0], *map(int, what[1:]))
        kernels(inputs(1, 729, 72))[what[0]]()
        kernels(inputs(1, 1024, 72))[what[0]]()
    elif what[0] == "forward":
        from old_redo import old_redo
        h.SMALL_BATCHES = True
        for exact in (False, True):
            h._launch(draw(1, int(what[1]), 72), 0.1, exact)
        h.SMALL_BATCHES = False
        for exact in (False, True):
            h._launch(draw(1, int(what[1]), 72), 0.1, exact)
    elif what[0] == "hopper":
        h._forward(draw(1, int(what[2]), int(what[1])), 0.1)
    else:
        D, N = int(what[1]), int(what[2])
        given = inputs(1, N, D, what[3])
        b._backward(*given)
        if N in (729, 64):
            from siglip_lib.kernels import flash_attention as f
            f._backward(*given)
    torch.cuda.synchronize()


def compile_all(names):
    todo = []
    if "check" in names or "time" in names or "alone" in names:
        todo += [("both", str(D), str(N), "bfloat16") for D in DIMS for N in ((729, 1, 17, 64, 65, 1024) if "check" in names else (729, 1024))]
        todo += [("both", "72", "729", "float16")] * ("check" in names)
        todo += [("hopper", str(D), str(N)) for _, N, D in TIMED if (N, D) != (729, 72)] + [("hopper", "72", "729"), ("hopper", "72", "17")]
    if "forward" in names:
        todo += [("forward", "729"), ("forward", "256")]
    if "roles" in names:
        todo += [tuple(map(str, m)) for m in MAKE_UPS]
    running, at_once = [], max(2, (os.cpu_count() or 4) - 2)
    for what in todo:
        while len(running) >= at_once:
            running = [p for p in running if p.poll() is None]
            time.sleep(0.05)
        running.append(subprocess.Popen([sys.executable, __file__, "warm", *what]))
    for p in running:
        try:
            p.wait(timeout=max(5, 90 - (time.time() - T0)))
        except subprocess.TimeoutExpired:
            p.kill(); say("HANG or slow to compile:", p.args[-5:])
    say("compiled")


def main(parts):
    import torch, triton
    say(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    names = [n for n in PARTS if not parts or n in parts]
    compile_all(names)
    todo, bad = [[n, i] for n in names for i in range(len(PARTS[n]))], 0
    while todo and bad < 6:
        w = subprocess.Popen([sys.executable, __file__, "work", json.dumps(todo)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = queue.Queue()
        threading.Thread(target=lambda w=w, lines=lines: [lines.put(x) for x in w.stdout] and None or lines.put(None), daemon=True).start()
        at, ended = todo[0], False
        while not ended:
            try:
                line = lines.get(timeout=HANG)
            except queue.Empty:
                say("HANG", at, PARTS[at[0]][at[1]][1]); w.kill(); ended, bad = True, bad + 1
                todo = todo[todo.index(at) + 1 :]
                continue
            if line is None:
                ended = True
                if w.wait():
                    say("DIED", at, PARTS[at[0]][at[1]][1]); bad += 1
                    todo = todo[todo.index(at) + 1 :]
                else:
                    todo = []
            elif line.startswith("AT "):
                at = json.loads(line[3:])
            else:
                print(line, end="", flush=True)
    say("done")


def work(todo):
    import torch
    torch.backends.cuda.matmul.allow_tf32 = False
    for n, i in todo:
        print("AT " + json.dumps([n, i]), flush=True)
        fn, given = PARTS[n][i]
        try:
            say(fn.__name__, *given, "|", fn(*given))
        except Exception as e:
            say(fn.__name__, *given, "| FAILED", type(e).__name__, " ".join(str(e).split())[:300])
            if "CUDA" in str(e) or "illegal" in str(e):
                os._exit(1)  # the context is lost
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    what = sys.argv[1:]
    if what[:1] == ["warm"]: warm(what[1:])
    elif what[:1] == ["work"]: work(json.loads(what[1]))
    elif what[:1] == ["one"]: print(check(int(what[1]), int(what[2]), int(what[3]), 1.0))
    else: main(what)
