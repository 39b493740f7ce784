import torch, sys
from siglip_lib import attend
from siglip_lib.kernels.hopper_attention import hopper_attention
torch.manual_seed(0)
def ref(q, k, v):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q * q.shape[-1]**-0.5) @ k.transpose(-2, -1)).softmax(-1).matmul(v).transpose(1, 2)
for n in (1, 17, 255, 257, 729):
    qkv = torch.randn(2, n, 3, 2, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = hopper_attention(qkv); g = torch.randn_like(out); (d,) = torch.autograd.grad(out, qkv, g)
    x = qkv.detach().double().requires_grad_(); (w,) = torch.autograd.grad(ref(*x.unbind(2)), x, g.double())
    parts = qkv.detach().requires_grad_()
    o2 = attend(*parts.unbind(2), backend="hopper"); (d2,) = torch.autograd.grad(o2, parts, g)
    print(n, ((d - w).abs().max() / w.abs().max()).item(), "parts same bits:", torch.equal(o2, out), torch.equal(d2, d), flush=True)
