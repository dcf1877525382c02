"""The training kernels against exact arithmetic in plain PyTorch, bit for bit: `python levels_worker.py [library]`.

test_integer.py runs it once for each level of instructions. It prints how many products it compared, and a digest of the
gradients of ranges: they are float sums, of which an exact one is only near, but all levels add them in one order."""
import ctypes, sys
from hashlib import sha256
import torch
from switchable_llm.core.integer import NativeKernel, ReferenceKernel, SignedCodes, _declare
from switchable_llm.quantizers import QParams, range_gradient

RANGES = sha256()   # of what ranges get

class Native(NativeKernel):
    def __init__(self, path):
        super().__init__()
        if path: self.lib = _declare(ctypes.CDLL(path))

def fixed(x):
    "Rows as integers, and what one of them is worth, as train.h says it."
    most = x.abs().amax(1, keepdim=True) if x.numel() else torch.zeros(x.shape[0], 1)
    def given(digits):
        if digits==4:
            e = torch.frexp(most.clamp_min(2.**-90))[1]
            return torch.ldexp(x, 30-e).round(), torch.ldexp(torch.ones_like(most), e-30)
        top,largest = torch.full_like(most, {2:32767., 3:8388600.}[digits]),most.clamp_min(2.**-100)
        return (x*(top/largest)).round(), largest/top
    return given

def bits_of(mask, k): return ((mask[:, :, None]>>torch.arange(8))&1).flatten(1)[:, :k].bool()

def strided(x, how):
    "The same numbers: as they are, every second one, or a part of longer rows."
    wide = torch.zeros(x.shape[0], 2*x.shape[1], dtype=x.dtype)
    if how=='second': wide[:, ::2] = x; return wide[:, ::2]
    if how=='part': wide[:, :x.shape[1]] = x; return wide[:, :x.shape[1]]
    return x

def exact(v, codes, d, back=False):   # what all levels compute: an exact sum, rounded once
    w = codes.double()
    return (v.double() @ (w if back else w.T)).float()+(d*v.double().sum(1, keepdim=True)).float()

def compare(native, pick, m, k, n, dtype):
    "One weight: gradient, float activations, codes of activations."
    codes,s,d = torch.randint(-128, 128, (n, k)).to(torch.int8),torch.rand(n)+.1,pick(0., .5)
    prepared,out = native.prepare(SignedCodes(codes, s, d), None),pick(torch.float32, torch.bfloat16)
    if pick(True, False):   # one width of codes that all widths share
        u,bits = torch.randint(0, 240, (n, k)).to(torch.uint8),pick(*range(2, 9))
        prepared = native.prepared_at(native.share(u, s), bits)
        codes,d = ((u>>8-bits<<8-bits).short()-128).to(torch.int8),128-(120-2.**(7-bits))
    half = dtype==torch.bfloat16
    g,how = (torch.randn(m, n)*pick(1e-4, 1., 300.)).to(dtype),pick('whole','second','part')
    if m>2: g[1] = 0
    mask = torch.randint(0, 256, (m, -(-k//64)*8), dtype=torch.uint8) if pick(0, 1) else None
    v,worth = fixed(g.float()*s)(2 if half else 3)
    right = exact(v, codes, d, True)*worth
    if mask is not None: right = torch.where(bits_of(mask, k), right, 0.)
    assert torch.equal(native.backward(strided(g, how), prepared, mask, out), right.to(out)), ('backward', m, k, n, dtype)
    x = torch.randn(m, k).to(dtype)
    v,worth = fixed(x.float())(2 if half else 4)
    got = native.forward_float(strided(x, how), prepared, None, out)
    assert torch.equal(got, (exact(v, codes, d)*worth*s).to(out)), ('float forward', m, k, n, dtype)
    bits,symmetric = pick(2, 4, 8),pick(True, False)
    ends = (1-2**(bits-1), 2**(bits-1)-1) if symmetric else (0, 2**bits-1)
    zero = torch.tensor(0 if symmetric else pick(0, 1, 2), dtype=torch.int32)
    qp = pick(None, QParams(torch.tensor(pick(.01, .3)), zero, *ends))
    if m==0: return
    q,r = native.quantize(strided(x, how), bits, symmetric, qp),ReferenceKernel().quantize(x, bits, symmetric, qp)
    assert torch.equal(q.codes[:, :k], r.codes) and (q.codes[:, k:]==0).all(), ('codes', m, k, dtype, bits)
    assert qp is None or torch.equal(bits_of(q.mask, k), r.mask), ('clipped', m, k, dtype, bits)
    if qp is not None:
        gx = torch.randn(m, k).to(dtype)
        right,*ends = range_gradient(gx.double(), x, qp)
        masked,*got = native.range_gradient(gx.clone(), strided(x, how), qp)
        RANGES.update(torch.stack(got).numpy().tobytes())
        bound = 1e-6*gx.double().abs().sum()*max(1, qp.qmax)+1e-9
        assert torch.equal(masked.double(), right) and all(abs(a-b)<=bound for a,b in zip(got, ends)), ('range', m, k)
    sums = (r.codes.double()-r.zero) @ (codes.double()+d).T
    right = sums.float()*q.scale.view(-1, 1)*s
    assert torch.equal(native.forward(q, prepared, None, out), right.to(out)), ('forward', m, k, n, dtype)
    bias = torch.randn(n)
    torch.testing.assert_close(native.forward(q, prepared, bias, torch.float32), right+bias, rtol=1e-6, atol=1e-5)

def main(path=None, rounds=40):
    gen = torch.Generator().manual_seed(1)
    def pick(*choices): return choices[torch.randint(len(choices), (1,), generator=gen)]
    torch.manual_seed(0)
    native = Native(path)
    for i in range(rounds):
        m,k = pick(0, 1, 2, 5, 23, 24, 25, 31, 33, 70, 130),pick(1, 3, 63, 64, 65, 130, 300, 500, 1000)
        n = pick(1, 2, 15, 16, 17, 90, 200, 700)
        for dtype in (torch.float32, torch.bfloat16): compare(native, pick, m, k, n, dtype)
    # sums of the largest numbers, in which 32 bits would overflow, and weights that come in chunks
    for m,k,n in ((3, 8200, 3), (2, 5, 8500), (50, 700, 1100)):
        for dtype in (torch.float32, torch.bfloat16): compare(native, pick, m, k, n, dtype)
    for n in (513, 8192, 20000):
        codes,s = torch.full((n, 3), -128, dtype=torch.int8),torch.ones(n)
        prepared = native.prepare(SignedCodes(codes, s, 0.), None)
        for dtype in (torch.float32, torch.bfloat16):
            g = torch.full((2, n), -1., dtype=dtype)
            right = torch.full((2, 3), 128.*n)
            torch.testing.assert_close(native.backward(g, prepared, None, torch.float32), right, rtol=1e-6, atol=0)
            prepared_t = native.prepare(SignedCodes(codes.T.contiguous(), s[:3], 0.), None)
            torch.testing.assert_close(native.forward_float(g, prepared_t, None, torch.float32), right, rtol=1e-6, atol=0)
    print('equal', rounds, RANGES.hexdigest())

if __name__=='__main__': main(*sys.argv[1:])
