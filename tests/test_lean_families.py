"Native steps of every family that is Llama with changes: real classes, windows shorter than the text, all that a block may have."
import os, subprocess, sys, warnings
from pathlib import Path
import pytest, torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from switchable_llm.core.calibration import calibrate_
from switchable_llm.system.native import native_features
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import make_switchable_, use_profile
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.generating import LeanCache
from switchable_llm.serving.lean import LiveStep, torch_step
from switchable_llm.serving.packed import load_packed
from switchable_llm.serving.kept import Cache
from switchable_llm.serving.parts import LIKE_LLAMA, NotLean, parts_of

native = pytest.mark.skipif('decode' not in native_features(),
                            reason='the compiled kernels are not built, or do not run on this processor')
COMMON = dict(vocab_size=97, num_hidden_layers=4, hidden_size=48, intermediate_size=80, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MIXED = ['sliding_attention','full_attention']*2
YARN = dict(rope_type='yarn', rope_theta=1e4, factor=2., original_max_position_embeddings=32)
CASES = dict(   # name -> model type, settings
    llama=('llama', dict(attention_bias=True, mlp_bias=True)),
    llama_yarn=('llama', dict(rope_parameters=YARN)),
    mistral=('mistral', dict(sliding_window=7)),
    qwen2=('qwen2', dict(use_sliding_window=True, sliding_window=5, max_window_layers=2)),
    qwen3=('qwen3', dict(head_dim=20, tie_word_embeddings=True)),
    qwen3_window=('qwen3', dict(head_dim=16, attention_bias=True, use_sliding_window=True, sliding_window=17,
                                layer_types=MIXED)),
    smollm3=('smollm3', {}),
    smollm3_window=('smollm3', dict(no_rope_layers=[1, 0, 0, 1], use_sliding_window=True, sliding_window=3)),
    phi3=('phi3', dict(original_max_position_embeddings=64)),
    phi3_partial=('phi3', dict(sliding_window=6, tie_word_embeddings=True, original_max_position_embeddings=64,
                               rope_parameters=dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=.5))),
    olmo2=('olmo2', dict(attention_bias=True)),
    olmo3=('olmo3', dict(sliding_window=9, rope_parameters=dict(
        sliding_attention=dict(rope_type='default', rope_theta=1e4), full_attention=YARN))),
    gemma=('gemma', dict(head_dim=16)),
    gemma3=('gemma3_text', dict(head_dim=20, query_pre_attn_scalar=10, sliding_window=8, layer_types=MIXED[::-1])))
SCALED = 'gemma','gemma3'   # embeddings that do more than look up rows stay float
FLOAT = [Profile(f'w{b}', Bits(b)) for b in (8, 6, 4)]   # float activations: no code flips, so texts can be compared
IDS = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(5))
KW = dict(do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=12)

def toy(case, **kw):
    "A model of random weights, norms and biases."
    kind,settings = CASES[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON|settings|kw)).eval()
    for p in model.parameters(): p.data.add_(.1*torch.randn_like(p))
    return model

def frozen(case, path, act='per_tensor'):
    model,ends = toy(case),case not in SCALED
    make_switchable_(model, FLOAT+['bw8'], QuantConfig(act=act), embedding=ends, lm_head=ends)
    calibrate_(model, [dict(input_ids=IDS, attention_mask=torch.ones_like(IDS))])
    add_adapters_(model, dropout=0.)
    for l in model.switch.layers:
        for a in l.adapters.values(): nn.init.normal_(a.b, std=.02)
    freeze(model, path)
    return path

@pytest.fixture(scope='module', params=CASES)
def packed(request, tmp_path_factory):
    return load_packed(frozen(request.param, tmp_path_factory.mktemp('packed')/'m.safetensors'))

@torch.no_grad()
def exact(packed, ids): return packed(ids, use_cache=False).logits[0]

def off(a, b): return float((a-b).abs().max()/b.abs().max())

def test_all_families_are_here(): assert {k for k,_ in CASES.values()}==set(LIKE_LLAMA)

@native
@pytest.mark.parametrize('profile', ['w8','w6','w4'])
def test_native_steps_are_the_modules(packed, profile):
    "Token by token and in pieces of several lengths, beyond every window; and the step in PyTorch."
    with use_profile(packed, profile):
        right,step = exact(packed, IDS),LiveStep(packed)
        table,plain = step.now().table,Cache(step.parts)
        plain.reserve(40)
        for i,t in enumerate(IDS[0].tolist()):
            assert off(step(t), right[i])<=1e-5
            assert off(torch_step(table, plain, t, i), right[i])<=1e-5
        for i in range(len(step.parts.blocks)):
            for a,b in zip(step.cache.seen(i, 39), plain.seen(i, 39)): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for pieces in ((0, 40), (0, 1, 2, 19, 20, 40), (0, 16, 33, 40), (0, 3, 11, 28, 37, 40)):
            step.cache.length = 0
            for a,b in zip(pieces, pieces[1:]): assert off(step.prompt(IDS[0,a:b].tolist()), right[b-1])<=1e-5

@native
def test_quantized_activations(packed):
    "The first numbers that are rounded are equal; later ones may fall to the next code, which moves a logit a little."
    with use_profile(packed, 'bw8'):
        right,step = exact(packed, IDS),LiveStep(packed)
        logits = torch.stack([step(t).clone() for t in IDS[0].tolist()])
        step.cache.length = 0
        assert off(logits, right)<=.1 and off(step.prompt(IDS[0].tolist()), right[-1])<=.1

@native
@pytest.mark.parametrize('length', [1, 9, 40])
def test_generate_writes_the_same_text(packed, length):
    ids = IDS[:, :length]
    kw = KW|dict(attention_mask=torch.ones_like(ids), output_logits=True, return_dict_in_generate=True)
    with use_profile(packed, 'w8'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        right = packed.generate(ids, past_key_values=DynamicCache(config=packed.config), **kw)
        got = packed.generate(ids, **kw)
    assert packed.native_status.native==length+11 and packed.native_status.modules==0
    assert torch.equal(got.sequences, right.sequences) and off(torch.cat(got.logits), torch.cat(right.logits))<=1e-5

@native
def test_modules_and_steps_take_turns_on_one_cache(packed):
    cache = LeanCache(packed)
    with torch.no_grad(), use_profile(packed, 'w8'):
        right = exact(packed, IDS)
        packed(IDS[:, :20], past_key_values=cache)                     # all logits are asked for: the modules
        one = packed(IDS[:, 20:21], past_key_values=cache).logits      # one token: a step
        packed(IDS[:, 21:39], past_key_values=cache)
        last = packed(IDS[:, 39:], past_key_values=cache).logits
    assert off(one[0,-1], right[20])<=1e-5 and off(last[0,-1], right[39])<=1e-5

@native
@pytest.mark.parametrize('case', ['qwen3_window','phi3','gemma3','olmo2'])
def test_ranges_per_token_and_half_precision(case, tmp_path):
    model = load_packed(frozen(case, tmp_path/'m.safetensors', 'per_token'))
    with use_profile(model, 'bw8'): assert off(LiveStep(model).prompt(IDS[0].tolist()), exact(model, IDS)[-1])<=.1
    model.to(torch.bfloat16)
    with use_profile(model, 'w8'):
        right = exact(model, IDS)[-1].float()
        assert off(LiveStep(model).prompt(IDS[0].tolist()), right)<=.06

def test_without_the_kernels(tmp_path):
    "The same text by the step in PyTorch, in a process that does not load them."
    cases = 'qwen3_window','smollm3_window','phi3_partial','olmo2','gemma3'
    for c in cases: frozen(c, tmp_path/f'{c}.safetensors')
    code = """if True:
        import sys, torch
        from switchable_llm.core.switching import use_profile
        from switchable_llm.serving.lean import LiveStep, lean_tokens
        from switchable_llm.serving.packed import load_packed
        from switchable_llm.serving.parts import native_calls
        assert native_calls() is None
        ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(5))
        for path in sys.argv[1:]:
            m = load_packed(path)
            with use_profile(m, 'w6'), torch.no_grad():
                right,got = m(ids, use_cache=False).logits[0],LiveStep(m).prompt(ids[0].tolist())
                assert (got-right[-1]).abs().max()<=1e-5*right.abs().max(), path"""
    env = os.environ|dict(SWITCHABLE_LLM_NATIVE='0', PYTHONPATH=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, '-c', code, *(str(tmp_path/f'{c}.safetensors') for c in cases)], env=env)
    assert done.returncode==0

LONG = dict(rope_type='longrope', rope_theta=1e4, short_factor=[1.]*6, long_factor=[2.]*6)
@pytest.mark.parametrize('case,settings,told', [
    ('qwen3', dict(hidden_act='relu'), "hidden_act='relu'"),
    ('gemma3', dict(hidden_activation='gelu'), "hidden_activation='gelu'"),
    ('gemma3', dict(final_logit_softcapping=30.), 'final_logit_softcapping=30.0'),
    ('gemma3', dict(use_bidirectional_attention=True), 'use_bidirectional_attention=True'),
    ('phi3', dict(rope_parameters=LONG, original_max_position_embeddings=32), "rope_type='longrope'"),
    ('llama', dict(rope_parameters=dict(rope_type='dynamic', rope_theta=1e4, factor=2.)), "rope_type='dynamic'"),
    ('qwen3', dict(layer_types=['chunked_attention']+['full_attention']*3), "layer_types='chunked_attention'")])
def test_what_is_not_covered_is_named(case, settings, told):
    with pytest.raises(NotLean, match=told): parts_of(toy(case, **settings))

@native
def test_an_odd_half_is_for_the_modules(tmp_path):
    CASES['odd'] = 'phi3',dict(intermediate_size=84, original_max_position_embeddings=64)
    try: model = load_packed(frozen('odd', tmp_path/'m.safetensors'))
    finally: del CASES['odd']
    with pytest.warns(UserWarning, match='multiple of 32 outputs, not of 168'):
        assert model.generate(IDS, **KW).shape==(1, 52)

def test_a_gemma2_is_told_by_its_name():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model('gemma2', **COMMON, head_dim=12))
    with pytest.raises(NotLean, match="'gemma2' is not in PARTS"): parts_of(model)
