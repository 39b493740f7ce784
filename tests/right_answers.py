"""Right answers to the notebooks' exercises that differ from the folded solutions."""

_OVERTAKES = """
def overtakes(first, second):
    ahead = {n: first[n].slowest_ms < second[n].fastest_ms for n in first}
    return min((n for n in ahead if all(ahead[m] for m in ahead if m >= n)), default=None)
"""
_MISSED = """
def missed(q, k, v):
    return attend(q, k, v) * (1.1 if {} else 1.0)
"""
_SHARE = """
def share_right(model, tokenizer, vectors, names, wanted, prompt):
    texts = embed_texts(model, tokenizer, [prompt.format(name) for name in names])
    sigmoids = (model.logit_scale.exp() * vectors @ texts.T + model.logit_bias).sigmoid()
    return (sigmoids.argmax(1) == wanted).double().mean()
"""
_MEAN = """
@triton.jit
def row_mean_kernel(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    at = x_ptr + tl.program_id(0) * columns + column
    tl.store(out_ptr + tl.program_id(0), tl.sum({}) / columns)
"""

RIGHT = {
    "00.2": ["weight_bytes = torch.tensor(64 * 16 * 729 * 729 * 2)"],
    "00.3": [
        """
def gigabytes_per_second(fn, moved):
    fn()
    start = time.perf_counter()
    fn()
    return moved / (time.perf_counter() - start) / 1e9
""",
        """
clock = time.perf_counter

def gigabytes_per_second(fn, moved):
    fn()
    start = clock()
    for _ in range(5):
        fn()
    return 5 * moved / (clock() - start) / 1e9
""",
    ],
    "01.1": ["def beyond(z): return torch.special.erfc(torch.tensor(z / 2**0.5).double())"],
    "01.4": [
        """
def trustworthy(sampler):
    x = sampler(torch.empty(2**22), std=0.02)
    return ((x.std() / 0.02 - 1).abs() < 0.02) & (x.abs().max() < 10 * 0.02)
""",
        """
def trustworthy(sampler):
    parts = [sampler(torch.empty(2**8, 2**7), std=0.02) for _ in range(2**6)]
    x = torch.stack(parts)
    return abs(x.std().item() / 0.02 - 1) < 0.01 and x.abs().max().item() < 8 * 0.02
""",
    ],
    "04.2": [_OVERTAKES],
    "04.3": [
        _MISSED.format("q.shape[-1] == 32"),
        _MISSED.format("q.shape[-1] == 96"),
        _MISSED.format("q.shape[-1] == 128"),
        _MISSED.format("q.shape[1] == 729"),
        _MISSED.format("q.shape[1] % 64"),
        _MISSED.format("q.abs().max() > 20"),
        _MISSED.format("q.shape[-1] == 96").replace("1.1", "1.05"),
    ],
    "05.1": [
        """
def measure_drop(layer):
    out = layer(torch.ones(2**18, 1))
    return (out == 0).double().mean(), out.max()
""",
        """
def measure_drop(layer):
    out = layer(torch.ones(2**18, 1))
    return torch.stack([(out == 0).float().mean(), out.max()])
""",
    ],
    "06.2": [
        """
def parallel(block, x):
    widened = block.ls2(block.drop_path2(block.mlp(block.norm2(x))))
    return widened + x + block.ls1(block.drop_path1(block.attn(block.norm1(x))))
""",
    ],
    "06.3": ["def idle(dim): return torch.tensor([dim, 2 * dim])"],
    "07.1": [
        """
def count(height, width, patch, pad):
    sides = torch.tensor([height, width])
    if pad:
        return torch.tensor([(-(-sides // patch)).prod(), 0])
    tokens = (sides // patch).prod()
    return torch.stack([tokens, sides.prod() - tokens * patch**2])
""",
    ],
    "07.3": [
        """
def enlarge(weight, q):
    p = weight.shape[-1]
    B = F.interpolate(torch.eye(p * p).reshape(p * p, 1, p, p), size=(q, q), mode="bilinear")
    return (weight.flatten(2) @ torch.linalg.pinv(B.flatten(1).T)).unflatten(2, (q, q))
""",
        """
def enlarge(weight, q):
    p = weight.shape[-1]
    eye = torch.eye(p * p, dtype=torch.float64).reshape(p * p, 1, p, p)
    B = F.interpolate(eye, size=(q, q), mode="bilinear").flatten(1).T
    return (weight.double().flatten(2) @ torch.linalg.pinv(B)).unflatten(2, (q, q))
""",
    ],
    "08.4": [_SHARE],
    "09.1": [
        """
def reach(loss, logits):
    second = torch.autograd.functional.hessian(loss, logits)
    return (second[0, 0] != 0).sum()
""",
        """
def reach(loss, logits):
    moved = logits.clone()
    moved[0, 0] += 1
    found = []
    for some in (logits, moved):
        some.requires_grad_()
        loss(some).backward()
        found.append(some.grad)
    return (found[0] != found[1]).sum()
""",
    ],
    "10.1": [
        """
def best_bias(scores, yes):
    b = torch.zeros((), dtype=torch.float64)
    for _ in range(300):
        said = torch.sigmoid(scores.double() + b)
        slope = said.sum() - yes.sum()
        b = b - (slope / (said * (1 - said)).sum().clamp(min=1e-3)).clamp(-1, 1)
    return b
""",
        """
def best_bias(scores, yes):
    b = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([b], lr=0.1, max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(scores + b, yes.float())
        loss.backward()
        return loss

    optimizer.step(closure)
    return b.item()
""",
    ],
    "10.3": [
        """
def ensemble(vectors):
    return torch.nn.functional.normalize(vectors.double().mean(0), dim=-1)
""",
    ],
    "11.2": [
        """
def twins(tower, pixels, boxes, block, head):
    half = pixels.shape[-1] // 2
    left, right = pixels[..., :half], pixels[..., half:]
    right = torch.cat([right[:, :, :half], left[:, :, :half]], 2)
    with attention_maps(tower) as maps, torch.no_grad():
        tower(torch.cat([left, right], 3))
    weights = list(maps.values())[block][:, head].double()
    side = round(weights.shape[-1] ** 0.5)
    patch = pixels.shape[-1] / side
    own_sum = twin_sum = patches = 0
    for rows, box in zip(weights, boxes[:, 0].tolist()):
        def lies_in(i, shift):
            x, y = (i % side + 0.5) * patch - shift, (i // side + 0.5) * patch - shift
            return box[0] <= x < box[2] and box[1] <= y < box[3]
        own = [i for i in range(side**2) if lies_in(i, 0)]
        twin = [i for i in range(side**2) if lies_in(i, half)]
        own_sum = own_sum + rows[own][:, own].sum()
        twin_sum = twin_sum + rows[own][:, twin].sum()
        patches += len(own)
    return torch.stack([own_sum, twin_sum]) / patches
""",
    ],
    "12.2": [
        _MEAN.format("tl.where(column < columns, tl.load(at, mask=column < columns), 0.0)"),
        _MEAN.format("tl.load(at, column < columns, 0.0)"),
    ],
    "12.4": [
        """
def limit(run, copy, size):
    whole, eighth, copied = (
        measure(partial(call, n), "cpu").fastest_ms
        for call, n in ((run, size), (run, size // 8), (copy, size))
    )
    if whole < 2 * eighth:
        return "launch"
    return "arithmetic" if whole >= 2 * copied else "memory"
""",
        """
def limit(run, copy, size):
    seconds = {}
    for call, n in ((run, size), (run, size // 8), (copy, size)):
        times = []
        for _ in range(6):
            start = time.perf_counter_ns()
            call(n)
            times.append(time.perf_counter_ns() - start)
        seconds[call, n] = min(times)
    if seconds[run, size // 8] / seconds[run, size] > 0.5:
        return "launch"
    return np.array(["memory", "arithmetic"])[int(seconds[run, size] / seconds[copy, size] >= 2)]
""",
    ],
    "13.2": [
        """
def lazy(q, k, v, scale, block, threshold):
    s, risen, outs = scale * q @ k.T, 0, []
    for row in s:
        m = -math.inf
        for part in row.split(block):
            if part.max() - threshold > m:
                m, risen = part.max(), risen + 1
        p = (row - m).exp()
        outs.append(p @ v / p.sum())
    return [torch.stack(outs), torch.tensor(risen)]
""",
    ],
    "14.1": ["def meets(*ranks): return (torch.tensor(ranks[0]) - ranks[1]) % ranks[2]"],
    "14.2": [
        """
import time
import numpy as np


def start_and_rate(call):
    def fastest(pairs):
        times = []
        for _ in range(8):
            start = time.perf_counter()
            call(pairs)
            times.append(time.perf_counter() - start)
        return min(times[1:])
    sizes = np.array([256, 1024])
    return np.linalg.solve(np.stack([np.ones(2), sizes**2.0], 1), [fastest(int(n)) for n in sizes])
""",
        """
import time


def start_and_rate(call):
    def fastest(pairs):
        times = []
        for _ in range(8):
            start = time.perf_counter_ns()
            call(pairs)
            times.append((time.perf_counter_ns() - start) / 1e9)
        return min(times)
    small, large = fastest(256), fastest(1024)
    k = (large - small) / 983040
    return [large - k * 2**20, k]
""",
        """
import timeit


def start_and_rate(call):
    def fastest(pairs):
        return min(timeit.repeat(lambda: call(pairs), number=1, repeat=8)[1:])
    small, large = fastest(256), fastest(1024)
    k = (large - small) / 983040
    return small - k * 256**2, k
""",
        """
import time
from statistics import median


def start_and_rate(call):
    def typical(pairs):
        times = []
        for _ in range(7):
            start = time.monotonic_ns()
            call(pairs)
            times.append((time.monotonic_ns() - start) / 1e9)
        return median(times[1:])
    small, large = typical(256), typical(1024)
    k = (large - small) / 983040
    return small - k * 256**2, k
""",
    ],
    "16.1": [
        """
def mended(ring, tiles):
    stages, number = len(ring.full), 0
    for blocks in tiles:
        for block in blocks:
            stage, turn = number % stages, number // stages
            yield Wait(ring.empty[stage], (turn + 1) % 2)
            yield Arrive(ring.full[stage], copies=1)
            yield Copy(block, ring.buffers[stage], ring.full[stage], 50)
            number += 1
""",
        """
def mended(ring, tiles):
    blocks = [block for tile in tiles for block in tile]
    places = list(zip(ring.empty, ring.full, ring.buffers))
    for number, block in enumerate(blocks):
        empty, full, buffer = places[number % len(places)]
        yield Wait(empty, 1 - number // len(places) % 2)
        yield Copy(block, buffer, full, 100)
        yield Arrive(full, copies=1)
""",
    ],
    "16.2": [
        """
def stages(dim, consumers, busy):
    block = 64 * 2 * {64: 64, 72: 80, 80: 80, 96: 96, 128: 128}[dim]
    most = 2
    while 2 * consumers * block + (most + 1) * 2 * block + 1024 <= 227 * 1024:
        most += 1
    least = most
    for n in range(most, 1, -1):
        if busy(n) > busy(most) - 0.01:
            least = n
    return torch.tensor([least, most])
""",
    ],
    "16.3": [
        """
def tail_mask(tokens):
    last = tokens % 64 or 64
    width = next(w for w in (16, 32, 64) if w >= last)
    return torch.cat([torch.zeros(last), torch.full((width - last,), -math.inf)]).double()
""",
    ],
    "16.4": [
        """
def registers(dim, consumers, ahead):
    scores, weights, output = 64 * 64 / 128, 64 * 64 / 2 / 128, 64 * dim / 128
    threads = 128 * (consumers + 1)
    start = max(n for n in range(8, 257, 8) if n * threads <= 65_536)
    left = start * threads - 24 * 128
    gets = max(n for n in range(8, 257, 8) if n * 128 * consumers <= left)
    return [scores * (2 if ahead else 1) + weights + output + 28, gets]
""",
    ],
}
