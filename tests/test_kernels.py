"Packed products and the lean loop: odd shapes, odd numbers, and the library missing."
import itertools, subprocess, sys
import pytest, torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.pytorch_utils import Conv1D
from switchable_llm.serving import kernels
from switchable_llm.serving.kernels import (
    ActQuant, LinearPlan, code_sums, pack_planes, plane_linear_reference, plane_rows, unpack_planes)
from switchable_llm.serving.kept import Cache
from switchable_llm.serving.parts import Table, parts_of
from switchable_llm.serving.lean import Step, lean_tokens, torch_step
from switchable_llm.system.native import native_features
from switchable_llm.quantizers import quantize

native = pytest.mark.skipif('decode' not in native_features(), reason='no compiled kernels here')
ACTS = [None, ActQuant(8, False, .031, 117), ActQuant(8, True, .03), ActQuant(6, False, .1, 31),
        ActQuant(2, True, .9), ActQuant(8, False), ActQuant(4, False),
        ActQuant(7, True), ActQuant(16, False), ActQuant(10, True), ActQuant(12, False, .001, 2000)]

def plan(n, k, bits, act=None, lora=0, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    u,step = torch.randint(0, 240, (n, k), dtype=torch.uint8, generator=g),torch.rand(n, generator=g)*.02+1e-3
    adapter = (torch.randn(lora, k, generator=g)*.1, torch.randn(n, lora, generator=g), 2.) if lora else None
    bias = torch.randn(n, generator=g) if bias else None
    return LinearPlan(pack_planes(u), bits, step*2**(8-bits), None, bias, act, adapter)

def numbers(*shape, seed=1): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def slack(x, p): # the stated bound on float activations
    if p.act is not None: return 0
    spread = (unpack_planes(p.planes, p.bits).double()-p.zero).abs().sum(1)
    return 2**-23*x.abs().amax(-1, keepdim=True).double()*p.scale.double()*spread

@pytest.mark.parametrize('n,k', [(1, 1), (1, 3072), (15, 63), (16, 64), (17, 65), (50, 100), (33, 257), (300, 768)])
def test_planes_give_back_the_codes(n, k):
    u = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    p,ids = pack_planes(u),torch.randint(0, n, (3, 2))
    for bits in range(2, 9):
        assert torch.equal(unpack_planes(p, bits), u>>(8-bits))
        assert torch.equal(plane_rows(p, ids, bits), (u>>(8-bits))[ids])
        assert torch.equal(code_sums(p, bits), (u>>(8-bits)).sum(1, dtype=torch.int32))

@native
@pytest.mark.parametrize('n,k', [(1, 1), (15, 63), (48, 128), (33, 257), (100, 1000)])
@pytest.mark.parametrize('tokens', [1, 2, 3, 6, 7, 16, 17, 40])
def test_native_equals_torch_and_the_formula(n, k, tokens):
    for bits,act in itertools.product((8, 7, 6, 4, 3), ACTS):
        p,x = plan(n, k, bits, act),numbers(tokens, k)
        y,exact = p(x),plane_linear_reference(x, p)
        assert ((y-exact).abs() <= exact.abs()*2**-23 + slack(x, p)).all(), (bits, act)
        if act is not None: assert torch.equal(y, kernels._torch_linear(x, p)), (bits, act)

@pytest.mark.parametrize('act', ACTS)
def test_torch_path_equals_the_formula(act):
    p,x = plan(50, 100, 6, act),numbers(5, 100)
    y,exact = kernels._torch_linear(x, p),plane_linear_reference(x, p)
    assert ((y-exact).abs() <= exact.abs()*2**-23 + 100*slack(x, p)).all()

@native
@pytest.mark.parametrize('lora', [1, 3, 4, 8, 13])
@pytest.mark.parametrize('tokens', [1, 9, 33])
def test_adapter_is_added_inside(lora, tokens):
    p,x = plan(70, 130, 8, ActQuant(8, False), lora),numbers(tokens, 130)
    torch.testing.assert_close(p(x), plane_linear_reference(x, p).float(), rtol=1e-5, atol=1e-4)

@native
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('act', [None, ActQuant(8, False), ActQuant(8, False, .031, 117)])
def test_types_gaps_and_threads(dtype, act):
    p,x = plan(50, 100, 6, act),numbers(3, 8, 100).to(dtype)
    y = p(x)
    assert y.dtype==dtype and y.shape==(3, 8, 50)
    assert torch.equal(y, p(x.float()).to(dtype))
    wide = torch.full((3, 16, 120), 7., dtype=dtype); wide[:,::2,:100] = x
    assert torch.equal(p(wide[:,::2,:100]), y)                                # gaps between tokens
    assert torch.equal(p(x.transpose(1, 2).contiguous().transpose(1, 2)), y)  # and between numbers
    assert torch.equal(p(x[0,0]), p(x[:1,:1])[0,0])
    assert p(x[:,:0]).shape==(3, 0, 50)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(p(x), y)
    finally: torch.set_num_threads(before)

@native
def test_static_codes_are_those_of_quantize():
    "Numbers on the edge between two codes, and far out of range."
    act = ActQuant(8, False, .03, 117)
    x = torch.cat([(torch.arange(-300, 300)+.5)*torch.tensor(.03), torch.tensor([1e30, -1e30, 0., -0.])])[None]
    p = plan(16, x.shape[1], 8, act, bias=False)
    q = quantize(x, act.qparams(x))
    exact = (q.double()-117)*.03@((unpack_planes(p.planes, 8).double()-p.zero)*p.scale.double()[:,None]).T
    torch.testing.assert_close(p(x).double(), exact, rtol=1e-6, atol=0)

@native
@pytest.mark.parametrize('act', [None, ActQuant(8, False), ActQuant(4, True)])
def test_extreme_tokens(act):
    p = plan(20, 70, 8, act, bias=False)
    x = numbers(4, 70); x[1] = 0; x[2] *= 1e-38; x[3] *= 1e30
    y,exact = p(x),plane_linear_reference(x, p)
    assert (y[1]==0).all() and torch.isfinite(y).all()
    assert ((y-exact).abs() <= exact.abs()*2**-22 + slack(x, p) + 1e-36).all()
    x[0,3] = float('nan'); x[1,0] = float('inf')
    y = p(x)
    assert torch.isnan(y[:2]).all() and torch.isfinite(y[2:]).all()           # the other tokens are not touched

def test_what_does_not_fit_is_refused():
    p = plan(20, 70, 8)
    with pytest.raises(ValueError, match='needs 70'): p(numbers(2, 69))
    with pytest.raises(ValueError, match='bits=1'): LinearPlan(p.planes, 1, p.scale)
    with pytest.raises(ValueError, match='each of 20'): LinearPlan(p.planes, 8, p.scale[1:])
    with pytest.raises(ValueError, match='bits=17'): LinearPlan(p.planes, 8, p.scale, act=ActQuant(17, False))
    with pytest.raises(ValueError, match='uint8'): pack_planes(torch.zeros(3, 4))

WITHOUT = """
import torch
from switchable_llm.serving import kernels as K
planes = K.pack_planes(torch.arange(200, dtype=torch.uint8).view(10, 20))
p,x = K.LinearPlan(planes, 4, torch.ones(10), act=K.ActQuant(8, False)),torch.linspace(-1, 1, 40).view(2, 20)
print(K.plan_report(p))
assert torch.equal(p(x), K.plane_linear_reference(x, p).float())
"""

def test_without_the_library(child_env):
    out = subprocess.run([sys.executable, '-c', WITHOUT], env=child_env|{'SWITCHABLE_LLM_NATIVE':'0'},
                         capture_output=True, text=True)
    assert out.returncode==0, out.stderr
    assert 'SWITCHABLE_LLM_NATIVE=0' in out.stdout

class Packed(nn.Module):
    "A packed layer, as short as a test wants it."
    def __init__(self, m, bits, act, lora):
        super().__init__()
        w = m.weight.detach().T if isinstance(m, Conv1D) else m.weight.detach()
        step = w.abs().amax(1)/120
        u = ((w/step[:,None]).floor()+120).clamp(0, 239).to(torch.uint8)
        self.lookup = isinstance(m, nn.Embedding)
        adapter,bias = None,getattr(m, 'bias', None)
        if self.lookup: act = None
        elif lora: adapter = torch.randn(lora, w.shape[1])*.1, torch.randn(len(w), lora)*.01, 2.
        self.plan = LinearPlan(pack_planes(u), bits, step*2**(8-bits), None, bias, act, adapter)
    def forward(self, x):
        p = self.plan
        return (plane_rows(p.planes, x, p.bits).float()-p.zero)*p.scale[x][...,None] if self.lookup else p(x)

def plan_of(m): return getattr(m, 'plan', None)

def packed(model, bits, act, lora=4, ends=True):
    for n,m in list(model.named_modules()):
        end = isinstance(m, nn.Embedding) or n=='lm_head'
        if isinstance(m, (nn.Linear, Conv1D, nn.Embedding)) and not n.endswith('wpe') and (ends or not end):
            model.set_submodule(n, Packed(m, bits, act, lora))
    return model

llama = dict(vocab_size=131, max_position_embeddings=64, num_hidden_layers=3)
gpt2 = dict(n_head=3, vocab_size=131, n_positions=64, bos_token_id=0, eos_token_id=0)

def llama_of(hidden, inner, heads, kv, kind=LlamaForCausalLM, config=LlamaConfig, **kw):
    return kind(config(hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads,
                       num_key_value_heads=kv, **llama, **kw))

MODELS = dict(
    gpt2=lambda: GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=96, **gpt2)),
    odd=lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=42, **gpt2)),
    shared=lambda: llama_of(80, 200, 5, 1),
    grouped=lambda: llama_of(96, 200, 6, 3, head_dim=20, tie_word_embeddings=True),
    long_heads=lambda: llama_of(64, 70, 2, 2, head_dim=136),
    qwen2=lambda: llama_of(96, 200, 6, 2, Qwen2ForCausalLM, Qwen2Config))

@pytest.mark.parametrize('family', MODELS)
@pytest.mark.parametrize('bits,ends', [(8, True), (6, True), (4, False)])
@torch.no_grad()
def test_lean_step_equals_the_model(family, bits, ends):
    torch.manual_seed(0)
    model = packed(MODELS[family]().eval(), bits, None, ends=ends)
    parts,ids = parts_of(model),torch.randint(0, 131, (1, 30))
    exact = model(ids).logits[0]
    table = Table(parts, plan_of)
    step,plain = Step(table, Cache(parts, 40)),Cache(parts, 40)
    plain.reserve(40)
    near = dict(rtol=0, atol=1e-5*float(exact.abs().max()))
    for i,t in enumerate(ids[0].tolist()):
        torch.testing.assert_close(step(t), exact[i], **near)
        torch.testing.assert_close(torch_step(table, plain, t, i), exact[i], **near)
    step.cache.length = 0
    for a,b in ((0, 1), (1, 12), (12, 13), (13, 30)):
        torch.testing.assert_close(step.prompt(ids[0,a:b].tolist()), exact[b-1], **near)
    for i in range(len(parts.blocks)):
        for a,b in zip(step.cache.seen(i, 29), plain.seen(i, 29)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

@native
@torch.no_grad()
def test_lean_threads_and_tokens():
    torch.manual_seed(0)
    model = packed(MODELS['grouped']().eval(), 8, ActQuant(8, False))
    parts,ids = parts_of(model),torch.randint(0, 131, (20,)).tolist()
    step = Step(Table(parts, plan_of), Cache(parts, 40))
    before = torch.get_num_threads()
    try:
        texts = []
        for n in (1, 2): torch.set_num_threads(n); texts.append(list(lean_tokens(step, ids, 20))+step.logits.tolist())
    finally: torch.set_num_threads(before)
    assert texts[0]==texts[1]                                                 # bit for bit
