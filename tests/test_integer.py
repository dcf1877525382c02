"Integer arithmetic against float64, and against itself with kernels taken away."
import ctypes, json, os, shutil, subprocess, sys
from functools import lru_cache
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from switchable_llm.core.integer import KERNELS, as_signed, int_linear, pick_kernel, signed_codes, try_kernel
from switchable_llm.system.native import library
from switchable_llm.lora_routing import add_adapters_, adapter_params
from switchable_llm.quantizers import (
    Bits, LearnedRange, QParams, QuantConfig, fake_quant, fake_quant_weight, qparams, range_gradient, token_qparams)
from switchable_llm.core.profiles import Profile
from switchable_llm.core.calibration import calibrate_, learn_ranges_
from switchable_llm.core.switching import kernel_report, make_switchable_, use_profile
from switchable_llm.search.costs import held_bytes

HERE = [n for n in KERNELS if try_kernel(n, 'cpu')[0]]

def compared(kernel, x, w, wbits, abits, cfg, symmetric, bias, dtype):
    "Errors of result and gradient against float64, each with its bound."
    dense = fake_quant_weight(w, wbits, cfg).double()
    dynamic = cfg.act=='per_token'
    qp = None if dynamic or abits is None else qparams(x.float().min()*.7, x.float().max()*.7, abits, symmetric)
    ours,ref = (x.clone().to(dtype).requires_grad_() for _ in range(2))
    q = ref.float()
    if abits is not None: q = fake_quant(q, token_qparams(q, abits, symmetric) if qp is None else qp, qp is None)
    prepared = kernel.prepare(signed_codes(w, wbits, cfg), lambda: dense.float())
    y = int_linear(ours, prepared, kernel, abits, symmetric, qp, bias)
    exact = q.double() @ dense.T + bias.double()
    g = torch.randn_like(y)
    y.backward(g); exact.backward(g.double())
    half = dtype==torch.bfloat16
    unit = 2**-8 if half else 2**-22
    rows = q.double().abs().amax(-1, keepdim=True)*(1 if abits is None else 2)
    # bfloat16 activations go in as two bytes, relative to the largest of their token.
    sums = 2**-16 if abits is None and half else 2**-21
    bound = unit*exact.abs()+sums*rows*dense.abs().sum(1)+1e-30
    scale,grad = dense.abs().amax(1),ref.grad.double()
    largest = (g.double().abs()*scale).amax(-1, keepdim=True)             # of a row of the gradient, in its codes
    weights = (dense.abs()/scale.clamp_min(1e-30)[:, None]).sum(0)
    grad_bound = unit*2*grad.abs()+(unit if half else 2**-21)*largest*weights+1e-30
    return (y.double()-exact).abs(), bound, (ours.grad.double()-grad).abs(), grad_bound

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('name', HERE)
def test_within_the_rounding_of_a_float_sum(name, dtype):
    kernel,_ = try_kernel(name, 'cpu')
    gen = torch.Generator().manual_seed(1)
    def pick(*choices): return choices[torch.randint(len(choices), (1,), generator=gen)]
    torch.manual_seed(0)
    for _ in range(120):
        m,k,n = pick(1, 2, 5, 31, 33, 70),pick(1, 3, 63, 64, 65, 130, 300),pick(1, 2, 15, 16, 17, 90)
        x = (torch.randn(m, 2*k)*pick(.01, 1., 300.)+pick(0., 2.))[:, ::2] if pick(0, 1) else torch.randn(m, k)
        codes,act,weight = pick('independent','nested'),pick('per_tensor','per_token'),pick('per_channel','per_tensor')
        cfg = QuantConfig(codes=codes, act=act, weight=weight)
        wbits,abits = pick(2, 3, 4, 5, 6, 7, 8),pick(2, 4, 6, 8, *[None]*hasattr(kernel, 'forward_float'))
        w,symmetric,bias = torch.randn(n, k),pick(True, False),torch.randn(n)
        dy,by,dg,bg = compared(kernel, x.to(dtype), w, wbits, abits, cfg, symmetric, bias, dtype)
        assert (dy<=by).all() and (dg<=bg).all(), (m, k, n, cfg, wbits, abits, (dy/by).max(), (dg/bg).max())

@pytest.mark.parametrize('name', HERE)
def test_strange_rows(name):
    "Constant rows, zeros, one huge number, infinities: what float arithmetic says."
    kernel,_ = try_kernel(name, 'cpu')
    w,cfg = torch.randn(6, 10),QuantConfig(act='per_token')
    dense = fake_quant_weight(w, 8)
    x = torch.zeros(5, 10); x[1] = 3.; x[2, 4] = 1e30; x[3] = -2.; x[4, 0] = 1e-30
    y = int_linear(x, kernel.prepare(signed_codes(w, 8, cfg), None), kernel, 8, False)
    right = fake_quant(x, token_qparams(x, 8, False), True) @ dense.T
    torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-30)

def gpt2():
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4, embd_pdrop=0., attn_pdrop=0., resid_pdrop=0.))
def llama():
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64))

def small(kind='gpt2', **kw):
    torch.manual_seed(0)
    model = dict(gpt2=gpt2, llama=llama)[kind]()
    profiles = ['bw4','bw8','mixed8648',Profile('w4', Bits(4))]
    make_switchable_(model, profiles, QuantConfig(**kw))
    calibrate_(model, [batch()])
    add_adapters_(model, dropout=0.)
    for l in model.switch.layers:
        for a in l.adapters.values(): torch.nn.init.normal_(a.b, std=.02)
    return model

def batch():
    ids = torch.randint(1, 97, (3, 24), generator=torch.Generator().manual_seed(2))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))

def gradients(model, profile):
    model.zero_grad()
    with use_profile(model, profile):
        loss = model(**batch(), labels=batch()['input_ids']).loss
        loss.backward()
    return loss.detach(), {n:p.grad.clone() for n,p in adapter_params(model).items() if p.grad is not None}

def close(a, b):
    assert abs(a[0]-b[0])<1e-3*abs(b[0]) and a[1].keys()==b[1].keys()
    for n in a[1]: assert (a[1][n]-b[1][n]).norm() <= 2e-2*b[1][n].norm()+1e-7, n

@pytest.mark.parametrize('kind', ['gpt2','llama'])
@pytest.mark.parametrize('act', ['per_tensor','per_token'])
@pytest.mark.parametrize('codes', ['independent','nested'])
def test_training_step_is_the_same_with_and_without(kind, act, codes):
    model = small(kind, act=act, codes=codes)
    for profile in ('bw4','bw8','mixed8648','w4'):
        model.switch.kernel = 'float'; right = gradients(model, profile)
        for k in ['auto',*HERE]: model.switch.kernel = k; close(gradients(model, profile), right)

def test_gradient_checkpointing_changes_nothing():
    model = small(act='per_tensor', codes='nested')
    right = gradients(model, 'bw8')
    model.train(); model.gradient_checkpointing_enable()
    model.zero_grad()
    with use_profile(model, 'bw8'):
        loss = model(**batch(), labels=batch()['input_ids'], use_cache=False).loss
        loss.backward()
    got = {n:p.grad for n,p in adapter_params(model).items() if p.grad is not None}
    assert torch.equal(loss.detach(), right[0]) and all(torch.equal(got[n], right[1][n]) for n in right[1])

@pytest.mark.parametrize('kernel', ['auto', *HERE])
def test_autocast_gives_its_type_and_gradients(kernel):
    model = small(act='per_token'); model.switch.kernel = kernel
    right = gradients(model, 'bw8')
    with torch.autocast('cpu', torch.bfloat16):
        with use_profile(model, 'bw8'): y = model.transformer.h[0].attn.c_attn(torch.randn(2, 48))
        assert y.dtype==torch.bfloat16
        got = gradients(model, 'bw8')
    assert abs(got[0]-right[0])<.05 and all(g.dtype==torch.float32 for g in got[1].values())
    for n,g in right[1].items(): assert F.cosine_similarity(got[1][n].flatten(), g.flatten(), 0)>.95, n

def test_report_says_what_ran_and_why():
    model = small()
    auto,reason = pick_kernel()
    assert list(kernel_report(model, 'bw8'))==[f"{auto.name if auto else 'float'}: {reason}"]
    assert list(kernel_report(model, 'float'))==['float: the original layer']
    model.switch.add(Profile('w8a12', Bits(8, 12)))
    assert 'at most 8 bits' in next(iter(kernel_report(model, 'w8a12')))
    model.switch.kernel = 'float'
    assert "switched off by kernel='float'" in next(iter(kernel_report(model, 'bw8')))

def test_memory_against_speed():
    def used(keep):
        model = small(act='per_token'); model.switch.keep,model.switch.kernel = keep,'reference'
        for p in ('bw4','bw8'): gradients(model, p)
        return held_bytes(model)
    everything,last = used(None),used(1)
    assert any('w4' in k for k in everything) and not any('w4' in k for k in last)
    assert last['base']==everything['base']

@pytest.mark.skipif(try_kernel('native', 'cpu')[0] is None, reason='no compiled kernels here')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_all_widths_are_one_byte_for_each_weight(dtype):
    "Codes that widths share: the numbers are those of codes of their own, and there is one copy."
    model = small(act='per_token').to(dtype)
    for p in ('bw4','bw8','w6a6'):
        model.switch.add(p)
        gradients(model, p)
    layer = model.switch.layers[1]
    (kind,shared), = layer._weights.items()
    assert kind[1]=='all' and shared[0].numel()<1.5*layer.base.weight.numel()+10000
    native = try_kernel('native', 'cpu')[0]
    x = torch.randn(5, layer.in_features).to(dtype)
    for bits in range(2, 9):
        own = native.prepare(as_signed(*layer.codes_at(bits), layer.axis), None)
        q = native.quantize(x, 8, False, None)
        a,b = (native.forward(q, p, None, torch.float32) for p in (own, layer.prepared_at(bits, native)))
        assert (a-b).abs().max()<=1e-6*a.abs().max()
        g = torch.randn(5, layer.out_features).to(dtype)
        a,b = (native.backward(g, p, None, torch.float32) for p in (own, layer.prepared_at(bits, native)))
        assert (a-b).abs().max()<=1e-6*a.abs().max()

# --- learned ranges -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('name', HERE)
def test_a_learned_range_gets_the_gradient_of_float_arithmetic(name, symmetric, dtype):
    kernel,_ = try_kernel(name, 'cpu')
    torch.manual_seed(0)
    for m,k,n,bits in ((0, 5, 3, 8), (1, 1, 1, 2), (33, 130, 17, 4), (70, 300, 90, 8)):
        w,cfg = torch.randn(n, k),QuantConfig()
        dense = fake_quant_weight(w, 8, cfg)
        prepared = kernel.prepare(signed_codes(w, 8, cfg), lambda: dense)
        wide = torch.randn(m, 2*k).to(dtype)
        got = []
        for integer in (True, False):
            learned = LearnedRange(torch.tensor(-1.3), torch.tensor(.8), symmetric)
            leaf = wide.clone().requires_grad_()
            x = leaf[:, ::2]
            if integer and m: y = int_linear(x, prepared, kernel, bits, symmetric, learned=learned)
            else: y = F.linear(learned.fake_quant(x, bits, symmetric), dense.to(dtype))
            g = torch.randn(m, n, generator=torch.Generator().manual_seed(3)).to(dtype)
            y.backward(g)
            got.append((y.detach(), leaf.grad, learned.log_ratio.grad))
        (y,gx,gr),(y2,gx2,gr2) = got
        rel = 3e-2 if dtype==torch.bfloat16 else 1e-5
        for a,b in ((y, y2), (gx, gx2), (gr, gr2)):
            assert torch.equal(a!=0, b!=0) or dtype==torch.bfloat16 or a is y
            assert (a.float()-b.float()).norm() <= rel*b.float().norm()+1e-6, (name, m, k, n, bits)

@pytest.mark.skipif('native' not in HERE, reason='no compiled kernels here')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_the_pass_over_a_range_is_that_of_plain_operators(dtype):
    kernel,_ = try_kernel('native', 'cpu')
    torch.manual_seed(0)
    for m,k in ((0, 4), (1, 1), (3, 15), (5, 64), (40, 333)):
        for qp in (QParams(torch.tensor(.02), torch.tensor(100, dtype=torch.int32), 0, 255),
                   QParams(torch.tensor(.3), torch.tensor(0, dtype=torch.int32), -7, 7)):
            x,g = torch.randn(m, 2*k).to(dtype)[:, 1::2],torch.randn(m, k).to(dtype)
            right,scale,end = range_gradient(g.double(), x, qp)
            masked,s,e = kernel.range_gradient(g.clone(), x, qp)
            bound = 1e-6*g.double().abs().sum()*max(1, qp.qmax)+1e-9
            assert torch.equal(masked.double(), right) and abs(s-scale)<=bound and abs(e-end)<=bound

@pytest.mark.parametrize('kind', ['gpt2','llama'])
@pytest.mark.parametrize('symmetric', [True, False])
def test_training_with_learned_ranges_is_the_same_with_and_without(kind, symmetric):
    model = small(kind, codes='nested', act_symmetric=symmetric)
    learn_ranges_(model)
    def step(profile):
        loss,grads = gradients(model, profile)
        ranges = {n:p.grad.clone() for n,p in model.named_parameters() if n.endswith('log_ratio') and p.grad is not None}
        assert ranges
        return loss, grads | ranges
    for profile in ('bw4','bw8','mixed8648'):
        model.switch.kernel = 'float'; right = step(profile)
        for k in ['auto',*HERE]:
            model.switch.kernel = k
            if k!='auto': assert list(kernel_report(model, profile))[0].startswith(f'{k}:')
            close(step(profile), right)

@pytest.mark.skipif(not pick_kernel()[0], reason='no integer kernel here')
@pytest.mark.parametrize('route', ['bits','shared','shared+bits'])
@pytest.mark.parametrize('rotate', [False, True])
def test_rotation_and_shared_adapters_stay_on_integers(route, rotate):
    torch.manual_seed(0)
    model = llama()
    make_switchable_(model, ['bw4','bw8'], QuantConfig(codes='nested', rotate=rotate))
    calibrate_(model, [batch()])
    learn_ranges_(model)
    add_adapters_(model, dropout=0., route=route)
    for profile in ('bw4','bw8'):
        assert list(kernel_report(model, profile))[0].startswith(f'{pick_kernel()[0].name}:')
        right = gradients(model, profile)
        model.switch.kernel = 'float'
        close(right, gradients(model, profile))
        model.switch.kernel = 'auto'

# --- without the kernels --------------------------------------------------------------------------------------------

PROBE = """
import json, torch
from test_integer import gradients, small
from switchable_llm.core.integer import pick_kernel
from switchable_llm.system.native import native_report
out = {}
for act in ('per_tensor','per_token'):
    model = small(act=act, codes='nested')
    for p in ('bw4','bw8','w4'):
        loss,grads = gradients(model, p)
        out[f'{act} {p}'] = [loss.item()]+[g.norm().item() for g in grads.values()]
kernel,why = pick_kernel()
print(json.dumps(dict(numbers=out, kernel=kernel and kernel.name, why=why, native=native_report())))
"""

@pytest.fixture(scope='module')
def everywhere():
    "The same steps in processes that lack something."
    no_library = dict(SWITCHABLE_LLM_NATIVE='0')
    lacking = dict(nothing={}, library=no_library,
                   instructions=no_library|dict(ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='SSE41'))
    here = Path(__file__).parent
    paths = dict(PYTHONPATH=os.pathsep.join([str(here), str(here.parent)]))
    def run(env):
        p = subprocess.run([sys.executable, '-c', PROBE], capture_output=True, text=True, env=os.environ|env|paths)
        assert p.returncode==0, p.stderr[-2000:]
        return json.loads(p.stdout.splitlines()[-1])
    return {k:run(env) for k,env in lacking.items()}

@pytest.mark.parametrize('without', ['library','instructions'])
def test_the_same_numbers_without(everywhere, without):
    got = everywhere[without]['numbers']
    for k,right in everywhere['nothing']['numbers'].items(): assert got[k]==pytest.approx(right, rel=2e-2), k

def test_without_the_library_it_says_so(everywhere):
    without = everywhere['library']
    assert without['kernel']!='native' and all('SWITCHABLE_LLM_NATIVE=0' in v for v in without['native'].values())

# --- the same numbers at every level of instructions ----------------------------------------------------------------

def worker(*args, **env):
    "Output of levels_worker.py in a process of its own."
    here = Path(__file__).parent
    paths = dict(PYTHONPATH=os.pathsep.join([str(here.parent)]), OMP_NUM_THREADS='2')
    p = subprocess.run([sys.executable, str(here/'levels_worker.py'), *args], capture_output=True, text=True,
                       env=os.environ|paths|env)
    assert p.returncode==0, p.stderr[-3000:]
    return p.stdout

@lru_cache
def at_level(level): return worker(SWITCHABLE_LLM_MAX_ISA=level).split('equal')[1]

@lru_cache
def levels():
    lib = library()
    if lib is None or not lib.sl_train_features(): return []
    lib.sl_isa_name.restype = ctypes.c_char_p
    names = [lib.sl_isa_name(i).decode() for i in range(1, lib.sl_isa_found()+1)]
    capped = 'import ctypes,sys; print(ctypes.CDLL(sys.argv[1]).sl_isa())'
    def reached(i, name):   # with AVX-512, AVX_VNNI is a thing of its own
        p = subprocess.run([sys.executable, '-c', capped, lib._name], capture_output=True, text=True,
                           env=os.environ|dict(SWITCHABLE_LLM_MAX_ISA=name))
        return p.stdout.strip()==str(i)
    return [n for i,n in enumerate(names, 1) if reached(i, n)]

@pytest.mark.skipif(not levels(), reason='no compiled kernels here')
@pytest.mark.parametrize('level', ['AVX2','AVX_VNNI','AVX512','AMX'])
def test_the_same_bits_at_every_level(level):
    if level not in levels(): pytest.skip(f'this processor has no {level}')
    assert at_level(level)==at_level('AVX2')

@pytest.mark.skipif('AVX512' not in levels() or not shutil.which('g++'), reason='needs AVX-512 and a compiler')
def test_tiles_in_plain_code_give_the_same_bits(tmp_path):
    "The file for AMX, where there is none: what tiles do is written out."
    source,lib = Path(__file__).parent.parent/'csrc',tmp_path/'tiles.so'
    files = [str(source/f'{n}.cpp') for n in ('isa','quantize','train','train_tiles','train_vectors')]
    flags = ['-O1','-w','-std=c++17','-fopenmp','-fPIC','-shared','-DSL_EMULATE_TILES']
    subprocess.run(['g++', *flags, *files, '-o', str(lib)], check=True)
    assert worker(str(lib), SWITCHABLE_LLM_MAX_ISA='AVX512').split('equal')[1]==at_level('AVX2')
