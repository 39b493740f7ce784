import torch, math, itertools
from siglip_lib.classroom.hopper_schedule import ThreadBlock
from siglip_lib.classroom.schedule import *
class Steps(ThreadBlock):
    def __init__(self, *a, form, **k):
        super().__init__(*a, **k); self.form = form
    # one tile a thread block: q (1, N, C) with N <= consumers * rows
    def producer(self):
        for i in range(self.consumers):
            full = self.q_full[0][i]
            yield Arrive(full, copies=1)
            yield Copy(self.copied(self.q[0], i * self.rows), self.places[0][i], full, self.costs.copy)
        stage, phase = 0, 1
        for block in range(self.blocks):
            yield Wait(self.empty[stage], phase)
            yield Arrive(self.full[stage], copies=2)
            for x, ring in ((self.k, self.keys), (self.v, self.values)):
                yield Copy(self.copied(x[0], (self.blocks - 1 - block) * self.rows), ring[stage], self.full[stage], self.costs.copy)
            stage, phase = self.next(stage, phase)
    def soft(self, s, left, st):
        m, total, o = st
        s = s.clone(); s[:, left:] = -math.inf if left < s.shape[1] else s[:, left:]
        s = s * self.scale
        most = torch.maximum(m, s.amax(1, keepdim=True)); shrink = torch.exp2(m - most)
        p = torch.exp2(s - most)
        return most, total * shrink + p.sum(1, keepdim=True), shrink, p
    def consumer(self, index):
        R, n = self.rows, self.blocks
        N = self.q.shape[1]
        m = torch.full((R, 1), -math.inf, dtype=self.q.dtype); total = torch.zeros_like(m)
        o = Sums(torch.zeros(R, self.q.shape[2], dtype=self.q.dtype))
        q = self.places[0][index]
        left = lambda b: N - (n - 1 - b) * R
        yield Wait(self.q_full[0][index], 0)
        def values(p, stage, start=0):
            return Product(p, self.values[stage], slice(start, start + p.shape[1]), o, self.costs.values)
        if self.form == "waits":
            stage, phase = 0, 0
            for b in range(n):
                yield Wait(self.full[stage], phase)
                s = yield from self._scores(q, stage, R); yield Finish(Product)
                m, total, shrink, p = self.soft(s.value, left(b), (m, total, o))
                o.value = o.value * shrink
                yield values(p, stage); yield Finish(Product)
                yield Arrive(self.empty[stage]); stage, phase = self.next(stage, phase)
        elif self.form == "early":
            yield Wait(self.full[0], 0)
            s = yield from self._scores(q, 0, R); yield Finish(Product)
            stage = 0; ahead, phase = self.next(0, 0)
            for b in range(1, n):
                yield Wait(self.full[ahead], phase)
                later = yield from self._scores(q, ahead, R)
                m, total, shrink, p = self.soft(s.value, N - (n - b) * R, (m, total, o))
                o.value = o.value * shrink
                yield values(p, stage); yield Finish(Product)
                s = later
                yield Arrive(self.empty[stage]); stage = ahead; ahead, phase = self.next(stage, phase)
            m, total, shrink, p = self.soft(s.value, N, (m, total, o)); o.value = o.value * shrink
            yield values(p, stage); yield Finish(Product)
        elif self.form == "behind":
            yield Wait(self.full[0], 0)
            s = yield from self._scores(q, 0, R); yield Finish(Product)
            m, total, shrink, p = self.soft(s.value, N - (n - 1) * R, (m, total, o))
            stage = 0; ahead, phase = self.next(0, 0)
            if n > 1: yield Wait(self.full[ahead], phase)
            for b in range(1, n):
                s = yield from self._scores(q, ahead, R)
                yield values(p, stage)
                yield Finish(Product)  # the kernel waits here for s alone
                m, total, shrink, p = self.soft(s.value, left(b), (m, total, o))
                read, stage = stage, ahead
                ahead, phase = self.next(stage, phase)
                if b + 1 < n: yield Wait(self.full[ahead], phase)
                yield Arrive(self.empty[read]); o.value = o.value * shrink
            yield values(p, stage); yield Finish(Product)
        else:
            yield Wait(self.full[0], 0)
            s = yield from self._scores(q, 0, self.tail); yield Finish(Product)
            m, total, shrink, p = self.soft(s.value, N - (n - 1) * R, (m, total, o))
            yield values(p, 0); yield Finish(Product); yield Arrive(self.empty[0])
            stage, phase = self.next(0, 0)
            for b in range(1, n):
                yield Wait(self.full[stage], phase)
                s = yield from self._scores(q, stage, R); yield Finish(Product)
                m, total, shrink, p = self.soft(s.value, R, (m, total, o)); o.value = o.value * shrink
                yield values(p[:, : R // 2], stage); yield values(p[:, R // 2 :], stage, R // 2); yield Finish(Product)
                yield Arrive(self.empty[stage]); stage, phase = self.next(stage, phase)
        mine = index * R
        yield Store(o.value / total, q, self.out[0, mine : mine + R], 1)
        yield Finish(Store)
bad = 0
for form in ("waits", "early", "behind", "halves"):
    seen = {}
    for consumers, stages, N in itertools.product((1, 2, 3, 4), (1, 2, 3, 8), (1, 5, 16, 17, 33, 63, 64, 65)):
        torch.manual_seed(0)
        q, k, v = torch.randn(3, 1, N, 8, dtype=torch.float64)
        b = Steps(q, k, v, form=form, consumers=consumers, stages=stages, rows=16)
        try:
            run({"producer": b.producer()} | {f"c{i}": b.consumer(i) for i in range(consumers)})
            rows = min(N, consumers * 16)
            want = (q @ k.mT * 8**-0.5).softmax(-1) @ v
            ok = torch.allclose(b.out[0, :rows], want[0, :rows])
            r = "ok" if ok else "WRONG"
        except (Deadlock, Race) as e: r = type(e).__name__
        seen.setdefault((r, stages), []).append((consumers, N))
    print(form, {k: len(v) for k, v in seen.items()})
