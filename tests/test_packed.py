"The packed file: real model classes, odd shapes, every setting, faults while writing and reading."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.serving.packed import load_packed, packed_size
from switchable_llm.serving.exports import freeze
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.core.profiles import Profile
from switchable_llm.core.calibration import calibrate_
from switchable_llm.core.switching import make_switchable_, use_profile

COMMON = dict(vocab_size=97, num_hidden_layers=2, hidden_size=48, intermediate_size=84, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64)
GPT2 = dict(vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4)
CLASSES = dict(
    gpt2=lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    llama_tied=lambda: LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=True)),
    llama=lambda: LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=False)),
    qwen2=lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON)))
PATHS = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
PROFILES = ['bw4','bw8','mixed8648', Profile('w5', Bits(5)), Profile('w6a12', Bits(6, 12))]

def switchable(kind='gpt2', dtype=torch.float32, ends=True, adapters=True, profiles=PROFILES, **kw):
    torch.manual_seed(0)
    model = CLASSES[kind]().to(dtype).eval()
    make_switchable_(model, profiles, QuantConfig(**kw), embedding=ends, lm_head=ends)
    calibrate_(model, [inputs()])
    if adapters:
        add_adapters_(model, dropout=0.)
        for l in model.switch.layers:
            for a in l.adapters.values(): torch.nn.init.normal_(a.b, std=.02)
    return model

def inputs():
    ids = torch.randint(1, 97, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids); mask[0, :4] = 0
    return dict(input_ids=ids, attention_mask=mask)

def layer_inputs(model):
    seen,hooks = [],[l.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for l in model.switch.layers]
    with torch.no_grad(): logits = model(**inputs(), use_cache=False).logits
    for h in hooks: h.remove()
    return seen, logits

def check_same(model, packed, profiles=None):
    tolerance = dict(float32=2**-17, bfloat16=2**-6)[str(model.dtype)[6:]]
    for p in profiles or packed.switch.profiles:
        with use_profile(model, p), use_profile(packed, p), torch.no_grad():
            seen,logits = layer_inputs(model)
            mine = {s.name:l for s,l in zip(packed.switch.sites, packed.switch.layers)}
            for x,s,l in zip(seen, model.switch.sites, model.switch.layers):
                y = l(x)
                assert (y-mine[s.name](x)).abs().max() <= tolerance*y.abs().max(), (p, s.name)
            assert (packed(**inputs()).logits-logits).norm() <= 32*tolerance*logits.norm()+.02*logits.norm(), p

@pytest.mark.parametrize('kind', CLASSES)
@pytest.mark.parametrize('act', ['per_tensor','per_token'])
def test_every_profile_as_in_training(kind, act, tmp_path):
    model = switchable(kind, act=act)
    freeze(model, tmp_path/'m.safetensors')
    packed = load_packed(tmp_path/'m.safetensors')
    assert set(packed.switch.profiles)==set(model.switch.profiles)-{'float'}
    check_same(model, packed)
    for p in ('bw8','mixed8648'):
        with use_profile(model, p), use_profile(packed, p):
            kw = dict(**inputs(), max_new_tokens=6, do_sample=False, pad_token_id=0)
            assert torch.equal(model.generate(**kw), packed.generate(**kw))

@pytest.mark.parametrize('kw', [
    dict(weight='per_group', group_size=32), dict(weight='per_tensor'), dict(act_symmetric=True),
    dict(act_symmetric=True, act='per_token')], ids=str)
def test_every_setting_of_the_quantizer(kw, tmp_path):
    model = switchable(**kw)
    freeze(model, tmp_path/'m.safetensors')
    check_same(model, load_packed(tmp_path/'m.safetensors'))

@pytest.mark.parametrize('kind', ['gpt2','llama'])
def test_bfloat16(kind, tmp_path):
    model = switchable(kind, torch.bfloat16, act='per_token')
    freeze(model, tmp_path/'m.safetensors')
    packed = load_packed(tmp_path/'m.safetensors')
    assert packed(**inputs()).logits.dtype==torch.bfloat16
    check_same(model, packed)

@pytest.mark.parametrize('kind', ['gpt2','llama','llama_tied'])
@pytest.mark.parametrize('ends', [dict(), dict(embedding=8), dict(lm_head=6), dict(embedding=8, lm_head=4)], ids=str)
def test_ends_at_a_width_of_their_own(kind, ends, tmp_path):
    model = switchable(kind, ends=False, adapters=False)
    freeze(model, tmp_path/'m.safetensors', **ends)
    packed = load_packed(tmp_path/'m.safetensors')
    bits = {s.site:Bits(ends[s.site]) for s in packed.switch.sites if s.site in ends}
    assert set(bits)==set(ends)
    if not ends: check_same(model, packed)
    both = switchable(kind, adapters=False, profiles=['bw8'])
    with torch.no_grad(), use_profile(packed, 'bw8'):
        ids = torch.arange(5)
        if 'embedding' in ends:
            right = both.get_input_embeddings().weight_at(ends['embedding'])[ids]
            torch.testing.assert_close(packed.get_input_embeddings()(ids), right, rtol=1e-6, atol=1e-7)
        if 'lm_head' in ends:
            x,w = torch.randn(3, 48),both.get_output_embeddings().weight_at(ends['lm_head'])
            torch.testing.assert_close(packed.get_output_embeddings()(x), x@w.T, rtol=1e-4, atol=1e-5)

def test_tied_codes_are_stored_once(tmp_path):
    size = freeze(switchable('llama_tied'), tmp_path/'m.safetensors')
    with safe_open(tmp_path/'m.safetensors', 'pt') as f:
        assert [k for k in f.keys() if 'lm_head' in k and k.endswith('high')]==[]
    assert sum(size.values())==(tmp_path/'m.safetensors').stat().st_size

def test_layers_that_are_float_everywhere_stay_float(tmp_path):
    half = Profile.from_dict(dict(name='half', default='w4a8', rules=[dict(layers=1, bits='float')]))
    model = switchable(profiles=[half], act='per_token', ends=False)
    freeze(model, tmp_path/'m.safetensors')
    packed = load_packed(tmp_path/'m.safetensors')
    assert len(packed.switch.layers)==4
    with use_profile(model, 'half'), torch.no_grad():
        torch.testing.assert_close(packed(**inputs()).logits, model(**inputs()).logits, rtol=2e-2, atol=2e-2)

def test_float_in_one_profile_and_packed_in_another(tmp_path):
    half = Profile.from_dict(dict(name='half', default='w4a8', rules=[dict(layers=1, bits='float')]))
    model = switchable(profiles=[half, 'bw4'], act='per_token')
    with pytest.raises(ValueError, match='leave that one out'): freeze(model, tmp_path/'m.safetensors')
    assert not list(tmp_path.iterdir())

def test_a_profile_that_came_later(tmp_path):
    model = switchable(act='per_token')
    freeze(model, tmp_path/'m.safetensors')
    packed = load_packed(tmp_path/'m.safetensors')
    late = Profile.from_dict(dict(name='late', default='w5a7', rules=[dict(site='mlp_in', bits='w8a3')]))
    for m in (model, packed): m.switch.add(late)
    check_same(model, packed, ['late'])

def test_never_calibrated_is_an_error(tmp_path):
    model = switchable(profiles=['bw8'])
    freeze(model, tmp_path/'m.safetensors')
    packed = load_packed(tmp_path/'m.safetensors')
    packed.switch.add(Profile('a5', Bits(8, 5)))
    with pytest.raises(RuntimeError, match='never calibrated for 5-bit'), use_profile(packed, 'a5'):
        packed(**inputs())

def test_a_profile_without_ranges_is_not_frozen(tmp_path):
    model = switchable(profiles=['bw8'])
    model.switch.add(Profile('a5', Bits(8, 5)))
    with pytest.raises(ValueError, match="profile 'a5'.*never calibrated for 5-bit.*leave it out"):
        freeze(model, tmp_path/'m.safetensors')
    assert not list(tmp_path.iterdir())
    freeze(model, tmp_path/'m.safetensors', profiles=['bw8'])

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs SIGKILL')
def test_killed_while_writing(tmp_path):
    code = f"""
import os, signal
from test_packed import freeze, switchable
import switchable_llm.serving.exports as exports
real = exports.save_file
def dies(*args, **kw): real(*args, **kw); os.kill(os.getpid(), signal.SIGKILL)
model = switchable(adapters=False); freeze(model, '{tmp_path}/m.safetensors')
exports.save_file = dies
freeze(switchable(), '{tmp_path}/m.safetensors')
"""
    p = subprocess.run([sys.executable, '-c', code], env=os.environ|dict(PYTHONPATH=PATHS), capture_output=True)
    assert p.returncode==-signal.SIGKILL
    assert packed_size(tmp_path/'m.safetensors')['adapters']==0   # the older one
    load_packed(tmp_path/'m.safetensors')                         # whole

@pytest.mark.parametrize('keep', [0, 5, 200, .5, .999])
def test_a_cut_file_is_named(keep, tmp_path):
    path = tmp_path/'m.safetensors'; freeze(switchable(), path)
    data = path.read_bytes(); path.write_bytes(data[:int(keep*len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match='m.safetensors'): load_packed(path)

def test_other_files_are_named(tmp_path):
    model = CLASSES['gpt2'](); model.save_pretrained(tmp_path/'plain')
    with pytest.raises(ValueError, match='not one that `freeze` wrote'):
        load_packed(tmp_path/'plain'/'model.safetensors')
    with pytest.raises(FileNotFoundError, match='missing'): load_packed(tmp_path/'nothing')

def test_switch_is_fast_and_copies_nothing(tmp_path):
    freeze(switchable(), tmp_path/'m.safetensors')
    packed = load_packed(tmp_path/'m.safetensors')
    for p in packed.switch.profiles:
        with use_profile(packed, p): packed(**inputs())
    held = sum(b.numel()*b.element_size() for b in packed.buffers())
    names,times = list(packed.switch.profiles)*200,[]
    for n in names:
        start = time.perf_counter(); packed.switch.profile = n; times.append(time.perf_counter()-start)
    assert sorted(times)[len(times)//2]<20e-6
    assert held==sum(b.numel()*b.element_size() for b in packed.buffers())

PROBE = """
import json, sys, torch
from test_packed import inputs, load_packed
from switchable_llm.core.switching import use_profile
packed,out = load_packed(sys.argv[1]),{}
for p in packed.switch.profiles:
    with use_profile(packed, p), torch.no_grad(): out[p] = packed(**inputs()).logits[:, -1].tolist()
print(json.dumps(out))
"""
def test_the_same_numbers_without_the_compiled_kernels(tmp_path):
    freeze(switchable('llama', act='per_token'), tmp_path/'m.safetensors')
    def run(**env):
        p = subprocess.run([sys.executable, '-c', PROBE, str(tmp_path/'m.safetensors')], capture_output=True,
                           text=True, env=os.environ|env|dict(PYTHONPATH=PATHS))
        assert p.returncode==0, p.stderr[-2000:]
        return {k:torch.tensor(v) for k,v in json.loads(p.stdout.splitlines()[-1]).items()}
    a,b = run(),run(SWITCHABLE_LLM_NATIVE='0')
    for p in a: assert (a[p]-b[p]).norm() <= .02*a[p].norm(), p
