"""The draft's roles in the model: right by float64, no deadlock, no race, for some sizes. Needs no GPU."""
import itertools, math
import torch
import torch.nn.functional as F
from siglip_lib.classroom.schedule import *
from siglip_lib.classroom.schedule import Race


class Block:
    def __init__(self, q, k, v, do, o, stages=3, rows=64, costs=(160, 144, 256, 320)):
        self.q, self.k, self.v, self.do, self.rows, self.stages = q, k, v, do, rows, stages
        P, N, D = q.shape
        self.padded = -(-N // (2 * rows)) * 2 * rows
        self.plain = D**-0.5; self.scale = self.plain * math.log2(math.e)
        s = q @ k.transpose(1, 2) * self.scale
        pad = lambda x, value: F.pad(x, (0, self.padded - N), value=value)
        self.lse = pad((s * math.log(2)).logsumexp(-1) / math.log(2), math.inf)
        self.delta = pad((o * do).sum(-1), 0.0)
        self.dq, self.dk, self.dv = (torch.full_like(q, math.nan) for _ in range(3))
        self.c = costs
        B = lambda n, c, N_: [Barrier(f"{n}[{i}]", c) for i in range(N_)]
        self.bq, self.bdo, self.bl = ([Buffer(f"{n}[{i}]") for i in range(stages)] for n in ("q", "do", "lse"))
        self.bk, self.bv = ([Buffer(f"{n}[{i}]") for i in range(4)] for n in ("k", "v"))
        self.bds = [Buffer(f"ds[{i}]") for i in range(4)]
        self.full, self.empty = B("full", 1, stages), B("empty", 2, stages)
        self.kv_full, self.kv_empty = B("kv_full", 1, 2), B("kv_empty", 2, 2)
        self.ds_full, self.ds_empty = B("ds_full", 2, 2), B("ds_empty", 1, 2)

    def cut(self, x, first):
        x = x[first : first + self.rows]
        return F.pad(x, (0, 0, 0, self.rows - len(x)))

    def next(self, s, p):
        return (s + 1, p) if s + 1 < self.stages else (0, p ^ 1)

    def producer(self):
        stage, phase, turn = 0, 1, 0
        for pair in range(len(self.q)):
            for key in range(0, self.padded, 2 * self.rows):
                place = turn & 1
                yield Wait(self.kv_empty[place], ((turn >> 1) & 1) ^ 1)
                yield Arrive(self.kv_full[place], copies=4)
                for half in range(2):
                    row = key + half * self.rows
                    yield Copy(self.cut(self.k[pair], row), self.bk[2 * place + half], self.kv_full[place], self.c[3])
                    yield Copy(self.cut(self.v[pair], row), self.bv[2 * place + half], self.kv_full[place], self.c[3])
                turn += 1
                for query in range(0, self.padded, self.rows):
                    yield Wait(self.empty[stage], phase)
                    yield Arrive(self.full[stage], copies=3)
                    yield Copy(self.cut(self.q[pair], query), self.bq[stage], self.full[stage], self.c[3])
                    yield Copy(self.cut(self.do[pair], query), self.bdo[stage], self.full[stage], self.c[3])
                    both = torch.stack([x[pair, query : query + self.rows] for x in (self.lse, self.delta)])
                    yield Copy(both, self.bl[stage], self.full[stage], 8)
                    stage, phase = self.next(stage, phase)

    def consumer(self, index):
        stage, phase, turn, round_ = 0, 0, 0, 0
        N, every = self.q.shape[1], slice(None)
        dq_scratch = torch.zeros(self.padded, self.q.shape[2], dtype=self.q.dtype)
        for pair in range(len(self.q)):
            for key in range(0, self.padded, 2 * self.rows):
                place = turn & 1
                yield Wait(self.kv_full[place], (turn >> 1) & 1)
                mine = 2 * place + index
                dk, dv = Sums(), Sums()
                for query in range(0, self.padded, 2 * self.rows):
                    for odd in range(2):
                        yield Wait(self.full[stage], phase)
                        s, dp = Sums(), Sums()
                        yield Product(self.bk[mine], self.bq[stage], every, s, self.c[0], transposed=True)
                        yield Product(self.bv[mine], self.bdo[stage], every, dp, self.c[0], transposed=True)
                        yield Finish(Product)
                        lse, delta = self.bl[stage].content
                        yield Exponentials(self.c[2])
                        p = torch.exp2((s.value * self.scale - lse).clamp(max=0))
                        ds = p * (dp.value - delta)
                        yield Product(p, self.bdo[stage], every, dv, self.c[1])
                        yield Product(ds, self.bq[stage], every, dk, self.c[1])
                        yield Wait(self.ds_empty[odd], (round_ & 1) ^ 1)
                        yield Arrive(self.ds_full[odd], copies=1)
                        yield Copy(ds.T, self.bds[2 * odd + index], self.ds_full[odd], 0)
                        if odd == index:
                            yield Wait(self.ds_full[odd], round_ & 1)
                            dq = Sums()
                            for half in range(2):
                                yield Product(self.bds[2 * odd + half], self.bk[2 * place + half], every, dq, self.c[1])
                            yield Finish(Product)
                            yield Arrive(self.ds_empty[odd])
                            yield Arrive(self.empty[stage])
                            at = slice(query + self.rows * odd, query + self.rows * (odd + 1))
                            dq_scratch[at] = dq.value + (dq_scratch[at] if key else 0)
                            if key + 2 * self.rows >= self.padded:
                                got = dq_scratch[at] * self.plain
                                to = self.dq[pair, at]
                                to.copy_(got[: len(to)])
                        else:
                            yield Finish(Product)
                            yield Arrive(self.empty[stage])
                        stage, phase = self.next(stage, phase)
                    round_ += 1
                yield Arrive(self.kv_empty[place])
                turn += 1
                first = key + index * self.rows
                for to, x in ((self.dk, dk.value * self.plain), (self.dv, dv.value)):
                    to = to[pair, first : first + self.rows]
                    to.copy_(x[: len(to)])


for N, rows, stages, pairs in [(5, 4, 3, 2), (8, 4, 2, 3), (33, 4, 3, 2), (1, 4, 3, 1), (64, 8, 4, 3), (33, 4, 1, 2), (729, 64, 3, 2)]:
    torch.manual_seed(0)
    q, k, v = (x.requires_grad_() for x in torch.randn(3, pairs, N, 8, dtype=torch.float64))
    o = F.scaled_dot_product_attention(q, k, v); do = torch.randn_like(o)
    want = torch.autograd.grad(o, (q, k, v), do)
    with torch.no_grad():
        b = Block(q.detach(), k.detach(), v.detach(), do, o.detach(), stages, rows)
        spans = run({"producer": b.producer(), "consumer 0": b.consumer(0), "consumer 1": b.consumer(1)}, 600)
    end = max(s.end for s in spans)
    busy = sum(s.end - s.start for s in spans if s.unit == "product") / end
    print(N, rows, stages, [f"{(a - w).abs().max():.1e}" for a, w in zip((b.dq, b.dk, b.dv), want)], f"{end:.0f} cycles, tensor cores {busy:.2f}")
    if N == 729:
        print("bound at the model's costs, TFLOP/s at 1.755 GHz on 132 SMs:", round(10 * pairs * N * N * 72 / end * 132 * 1.755e9 / 1e12))
