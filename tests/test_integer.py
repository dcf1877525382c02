"Integer arithmetic against float64, and against itself with kernels taken away."
import json, os, subprocess, sys
from pathlib import Path
import pytest, torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from switchable_llm.core.integer import KERNELS, int_linear, pick_kernel, signed_codes, try_kernel
from switchable_llm.lora_routing import add_adapters_, adapter_params
from switchable_llm.quantizers import Bits, QuantConfig, fake_quant, fake_quant_weight, qparams, token_qparams
from switchable_llm.core.profiles import Profile
from switchable_llm.core.calibration import calibrate_
from switchable_llm.core.switching import held_bytes, kernel_report, make_switchable_, use_profile

HERE = [n for n in KERNELS if try_kernel(n, 'cpu')[0]]

def compared(kernel, x, w, wbits, abits, cfg, symmetric, bias, dtype):
    "Errors of result and gradient against float64, each with its bound."
    dense = fake_quant_weight(w, wbits, cfg).double()
    dynamic = cfg.act=='per_token'
    qp = None if dynamic or abits is None else qparams(x.float().min()*.7, x.float().max()*.7, abits, symmetric)
    ours,ref = (x.clone().to(dtype).requires_grad_() for _ in range(2))
    q = ref.float() if abits is None else fake_quant(ref.float(), token_qparams(ref.float(), abits, symmetric) if qp is None else qp, qp is None)
    y = int_linear(ours, kernel.prepare(signed_codes(w, wbits, cfg), lambda: dense.float()), kernel, abits, symmetric, qp, bias)
    exact = q.double() @ dense.T + bias.double()
    g = torch.randn_like(y)
    y.backward(g); exact.backward(g.double())
    unit = 2**-8 if dtype==torch.bfloat16 else 2**-22
    rows = q.double().abs().amax(-1, keepdim=True)*2 if abits is not None else ref.double().abs().amax(-1, keepdim=True)
    scale = dense.abs().amax(1)
    sums = 2**-16 if abits is None and dtype==torch.bfloat16 else 2**-21    # bfloat16 activations go in as two bytes, relative to the largest of their token
    return ((y.double()-exact).abs(), unit*exact.abs()+sums*rows*dense.abs().sum(1)+1e-30,
            (ours.grad.double()-ref.grad.double()).abs(), unit*2*ref.grad.double().abs()+(unit if dtype==torch.bfloat16 else 2**-21)*(g.double().abs()*scale).amax(-1, keepdim=True)*(dense.abs()/scale.clamp_min(1e-30)[:, None]).sum(0)+1e-30)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('name', HERE)
def test_within_the_rounding_of_a_float_sum(name, dtype):
    kernel,_ = try_kernel(name, 'cpu')
    gen = torch.Generator().manual_seed(1)
    pick = lambda *choices: choices[torch.randint(len(choices), (1,), generator=gen)]
    torch.manual_seed(0)
    for _ in range(120):
        m,k,n = pick(1, 2, 5, 31, 33, 70),pick(1, 3, 63, 64, 65, 130, 300),pick(1, 2, 15, 16, 17, 90)
        x = (torch.randn(m, 2*k)*pick(.01, 1., 300.)+pick(0., 2.))[:, ::2] if pick(0, 1) else torch.randn(m, k)
        cfg = QuantConfig(codes=pick('independent','nested'), act=pick('per_tensor','per_token'), weight=pick('per_channel','per_tensor'))
        wbits,abits = pick(2, 3, 4, 5, 6, 7, 8),pick(2, 4, 6, 8, *[None]*hasattr(kernel, 'forward_float'))
        dy,by,dg,bg = compared(kernel, x.to(dtype), torch.randn(n, k), wbits, abits, cfg, pick(True, False), torch.randn(n), dtype)
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

def small(kind='gpt2', **kw):
    torch.manual_seed(0)
    if kind=='gpt2': model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4, embd_pdrop=0., attn_pdrop=0., resid_pdrop=0.))
    else: model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64))
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
    with use_profile(model, profile): loss = model(**batch(), labels=batch()['input_ids']).loss; loss.backward()
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
    with use_profile(model, 'bw8'): loss = model(**batch(), labels=batch()['input_ids'], use_cache=False).loss; loss.backward()
    got = {n:p.grad for n,p in adapter_params(model).items() if p.grad is not None}
    assert torch.equal(loss.detach(), right[0]) and all(torch.equal(got[n], right[1][n]) for n in right[1])

@pytest.mark.parametrize('kernel', ['auto', *HERE])
def test_autocast_gives_its_type_and_gradients(kernel):
    model = small(act='per_token'); model.switch.kernel = kernel
    right = gradients(model, 'bw8')
    with torch.autocast('cpu', torch.bfloat16):
        with use_profile(model, 'bw8'): assert model.transformer.h[0].attn.c_attn(torch.randn(2, 48)).dtype==torch.bfloat16
        got = gradients(model, 'bw8')
    assert abs(got[0]-right[0])<.05 and all(g.dtype==torch.float32 for g in got[1].values())
    for n in right[1]: assert torch.nn.functional.cosine_similarity(got[1][n].flatten(), right[1][n].flatten(), 0)>.95, n

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
        model = small(act='per_token'); model.switch.keep = keep
        for p in ('bw4','bw8'): gradients(model, p)
        return held_bytes(model)
    everything,last = used(None),used(1)
    assert any('w4' in k for k in everything) and not any('w4' in k for k in last) and last['base']==everything['base']

# --- without the kernels --------------------------------------------------------------------------------------------

PROBE = """
import json, torch
from test_integer import gradients, small
from switchable_llm.core.integer import pick_kernel
from switchable_llm.core.integer import native_report
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
    lacking = dict(nothing={}, library=dict(SWITCHABLE_LLM_NATIVE='0'), instructions=dict(SWITCHABLE_LLM_NATIVE='0', ATEN_CPU_CAPABILITY='default', ONEDNN_MAX_CPU_ISA='SSE41'))
    def run(env):
        p = subprocess.run([sys.executable, '-c', PROBE], capture_output=True, text=True, env=os.environ|env|dict(PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])))
        assert p.returncode==0, p.stderr[-2000:]
        return json.loads(p.stdout.splitlines()[-1])
    return {k:run(env) for k,env in lacking.items()}

@pytest.mark.parametrize('without', ['library','instructions'])
def test_the_same_numbers_without(everywhere, without):
    for k,right in everywhere['nothing']['numbers'].items(): assert everywhere[without]['numbers'][k]==pytest.approx(right, rel=2e-2), k

def test_without_the_library_it_says_so(everywhere):
    assert everywhere['library']['kernel']!='native' and all('SWITCHABLE_LLM_NATIVE=0' in v for v in everywhere['library']['native'].values())
