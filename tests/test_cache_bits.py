"Keys and values in few bits: one rule, in transformers' modules, in native steps and in PyTorch; what remembers it; bad input."
import ctypes, os, subprocess, sys
import pytest, torch, yaml
import switchable_llm as sl
from torch import nn
from transformers import (
    AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM)
from transformers.masking_utils import sdpa_mask
from switchable_llm.apps.cli import main
from switchable_llm.attention.attending import ATTENDING
from switchable_llm.attention.caches import GROUP, range_codes, range_numbers
from switchable_llm.core.gates import add_gates_
from switchable_llm.system.native import native_features
from switchable_llm.core.profiles import Profile, Rule, as_profile, load_profiles, save_profiles
from switchable_llm.core.switching import make_switchable_, use_profile
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.models.checkpoints import load_switchable, save_switchable
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.search.costs import profile_cost
from switchable_llm.serving import generating
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.generating import LeanCache
from switchable_llm.serving.kept import Cache
from switchable_llm.serving.lean import LiveStep, torch_step
from switchable_llm.serving.packed import load_packed
from switchable_llm.serving.parts import PARTS, native_calls

native = pytest.mark.skipif('decode' not in native_features(),
                            reason='the compiled kernels are not built, or do not run on this processor')
PER_TOKEN = QuantConfig(act='per_token')
COMMON = dict(vocab_size=97, num_hidden_layers=2, hidden_size=48, intermediate_size=80, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
MIXED = ['sliding_attention','full_attention']
CASES = dict(   # name -> model type, settings: heads of odd sizes, windows shorter than groups and longer, norms of heads
    llama=('llama', dict(head_dim=18)), mistral=('mistral', dict(sliding_window=40)), qwen3=('qwen3', dict(head_dim=20)),
    phi3=('phi3', dict(sliding_window=70, original_max_position_embeddings=128)), olmo2=('olmo2', {}),
    gemma3=('gemma3_text', dict(head_dim=20, query_pre_attn_scalar=10, sliding_window=8, layer_types=MIXED)),
    gpt2=('gpt2', dict(n_positions=128, n_embd=48, n_head=4, n_layer=2)))
BITS = 'k8v8','k8v4','k4v2','k2v8','k4','v2'
IDS = torch.randint(3, 97, (1, 90), generator=torch.Generator().manual_seed(5))
KW = dict(do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=12)

def toy(case, **kw):
    "A model whose attention looks at few tokens, so that its keys count."
    kind,settings = CASES[case]
    torch.manual_seed(0)
    own = {} if kind=='gpt2' else COMMON
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON|own|settings|kw)).eval()
    for n,p in model.named_parameters():
        if p.dim()==2 and 'emb' not in n and 'wte' not in n and 'head' not in n: nn.init.normal_(p, std=.15)
    return model

def switchable(case, profiles=(), **kw):
    model = toy(case, **kw)
    make_switchable_(model, ['w8', *('w8'+b for b in BITS), *profiles], PER_TOKEN)
    return model

@torch.no_grad()
def logits(model, profile, ids=IDS, **kw):
    with use_profile(model, profile): return model(ids, **dict(use_cache=False)|kw).logits

def near(a, b, effect):
    "Far less apart than what the bits change; sums in another order move a code at a tie to the next one, now and then."
    return (a-b).norm()<=.05*effect.norm()+1e-3*b.norm()

# ---- the rule ----

def oracle(module, query, key, value, attention_mask, scaling=None, bits=None, **kw):
    "Token by token in float64: own group exact, earlier groups per channel, values per token."
    bits,(_,H,n,_) = Bits.parse(module.config.oracle_bits),query.shape
    out = torch.empty(query.shape[:3]+value.shape[3:], dtype=torch.float64)
    for h in range(H):
        k,v = (x[0, h//(H//x.shape[1])] for x in (key, value))
        few = torch.stack([range_numbers(*range_codes(x, bits.v, 0)) for x in v]).double() if bits.v else v.double()
        for t in range(n):
            own = t//GROUP*GROUP if bits.k else 0
            old = [range_numbers(*range_codes(k[i:i+GROUP], bits.k, 0)) for i in range(0, own, GROUP)]
            keys = torch.cat([*old, k[own:t+1]]).double()
            scores = scaling*keys@query[0, h, t].double()
            if attention_mask is not None: scores = scores.masked_fill(~attention_mask[0, 0, t, :t+1], -torch.inf)
            out[0, h, t] = scores.softmax(0)@few[:t+1]
    return out.transpose(1, 2).to(query.dtype).contiguous(), None

AttentionInterface.register('cache_bits_oracle', oracle)
AttentionMaskInterface.register('cache_bits_oracle', sdpa_mask)

@pytest.mark.parametrize('case', ['llama','mistral','gpt2'])
def test_the_rule_of_an_oracle(case):
    model,plain = toy(case),toy(case, attn_implementation='cache_bits_oracle')
    make_switchable_(model, BITS, PER_TOKEN)            # float layers: only the cache differs
    float_ = logits(model, 'float')
    for b in BITS:
        plain.config.oracle_bits = b
        with torch.no_grad(): right = plain(IDS, use_cache=False).logits
        effect = right-float_
        assert effect.norm()>1e-4*right.norm() and (logits(model, b)-right).norm()<=.02*effect.norm()+1e-4*right.norm(), b

@pytest.mark.parametrize('case', list(CASES))
def test_one_row_has_one_answer(case):
    "However it is cut, and beside whatever row, behind padding."
    m = switchable(case)
    for b in ('w8k8v4', 'w8k4v2'):
        whole,plain = logits(m, b),logits(m, 'w8')
        cache,pieces = DynamicCache(config=m.config),[]
        for i,j in zip((0, 31, 32, 33, 70), (31, 32, 33, 70, 90)):
            out = logits(m, b, IDS[:, i:j], use_cache=True, **{generating._GIVES: cache})
            pieces.append(out)
        assert near(torch.cat(pieces, 1), whole, whole-plain)
        rows = torch.cat([torch.cat([torch.zeros(1, 13).long(), IDS[:, :77]], 1), IDS.flip(1)])
        mask = torch.ones_like(rows); mask[0, :13] = 0
        places = (mask.cumsum(1)-1).clamp(0)
        padded = logits(m, b, rows, attention_mask=mask, position_ids=places)[0, 13:]
        assert near(padded, whole[0, :77], (whole-plain)[0, :77])

def test_generation_is_what_scoring_sees():
    m = switchable('gemma3')
    rows = torch.cat([IDS[:, :40], torch.cat([torch.zeros(1, 7).long(), IDS[:, 40:73]], 1)])
    mask = (rows!=0).long()
    with use_profile(m, 'w8k8v4'): new = m.generate(rows, attention_mask=mask, **KW)
    for row,start in zip(new, (0, 7)):
        text = row[start:][None]
        seen = logits(m, 'w8k8v4', text)[0, -13:-1]
        assert (seen.max(-1).values-seen.gather(1, text[0, -12:, None])[:, 0]<1e-3).all()

def test_a_float_cache_is_exact():
    plain = toy('llama')
    with torch.no_grad(): right = plain(IDS, use_cache=False).logits
    m,other = switchable('llama'),toy('llama')
    make_switchable_(other, ['w8'], PER_TOKEN)
    for _ in range(2):
        assert torch.equal(logits(m, 'float'), right) and torch.equal(logits(m, 'w8'), logits(other, 'w8'))
        assert not torch.equal(logits(m, 'w8k8v8'), logits(m, 'w8'))
    assert m.switch.find('w8k4v2')['settings']==m.switch.find('w8')['settings']

def test_layers_have_their_own():
    p = Profile('half', 'w8', (Rule('w8k2v2', layers=(1,), site=('attn_qkv',)),))
    m = switchable('llama', [p])
    assert m.switch.find('half')['cache']==(None, Bits(k=2, v=2))
    first = m.model.layers[0].register_forward_hook(lambda *a: kept.append(a[2].clone()))
    kept = []
    a,b = logits(m, 'half'),logits(m, 'w8')
    assert torch.equal(*kept) and not torch.equal(a, b)
    first.remove()

def test_trained_with_gradient_and_checkpointing():
    def gradient(again):
        m = switchable('llama'); m.train()
        add_adapters_(m, r=2)
        if again: m.gradient_checkpointing_enable()
        with use_profile(m, 'w8k4v2'): loss = m(IDS, labels=IDS, use_cache=False).loss
        m.switch.profile = 'float'                      # the backward pass stays at the pass's own
        loss.backward()
        return m.model.layers[0].self_attn.k_proj.adapters['8'].b.grad
    torch.manual_seed(3); a = gradient(False)
    torch.manual_seed(3); b = gradient(True)
    assert a.abs().sum()>0 and torch.equal(a, b)

# ---- native steps ----

@pytest.fixture(scope='module', params=list(CASES))
def pair(request, tmp_path_factory):
    path,model = tmp_path_factory.mktemp('cache')/'m.safetensors',switchable(request.param)
    freeze(model, path)
    return model,load_packed(path)

@native
def test_native_steps_see_what_modules_see(pair):
    model,packed = pair
    for b in BITS:
        right = logits(model, 'w8'+b)[0]
        effect = right-logits(model, 'w8')[0]
        with use_profile(packed, 'w8'+b), torch.no_grad():
            step = LiveStep(packed)
            one = torch.stack([step(t).clone() for t in IDS[0].tolist()])
            assert near(one, right, effect), b
            table,plain = step.now().table,Cache(step.parts)
            plain.adopt(step.now().bits); plain.reserve(90)
            some = torch.stack([torch_step(table, plain, t, i) for i,t in enumerate(IDS[0].tolist())])
            assert near(some, right, effect), b
            ends = []
            for pieces in ((0, 90), (0, 1, 31, 32, 33, 64, 90), (0, 40, 70, 90)):
                step.cache.begin()
                ends.append([step.prompt(IDS[0, i:j].tolist()).clone() for i,j in zip(pieces, pieces[1:])][-1])
            assert all(near(e, right[-1], effect[-1]) for e in ends), b

@native
def test_generate_is_native_and_the_same(pair):
    model,packed = pair
    for b in ('w8k8v4', 'w8k2v8'):
        with use_profile(model, b), use_profile(packed, b):
            new = packed.generate(IDS[:, :60], **KW)
            assert packed.native_status.native==71 and torch.equal(new, model.generate(IDS[:, :60], **KW))
            cache = LeanCache(packed)                   # the prompt by modules, for its logits; then native steps
            with torch.no_grad():
                all_ = packed(input_ids=IDS[:, :60], **{generating._GIVES: cache}, use_cache=True).logits
                assert cache.step.cache.bits and near(all_, logits(model, b, IDS[:, :60]), logits(model, b)-logits(model, 'w8'))
                last = packed(input_ids=IDS[:, 60:61], **{generating._GIVES: cache}, use_cache=True).logits[0, -1]
                again = packed(input_ids=IDS[:, 61:80], **{generating._GIVES: cache}, use_cache=True).logits[0]
            right = logits(model, b, IDS[:, :80])[0]
            effect = right-logits(model, 'w8', IDS[:, :80])[0]
            assert near(last, right[60], effect[60]) and near(again, right[61:], effect[61:])

def test_without_the_kernels(tmp_path):
    "The same text by PyTorch's operators."
    m = switchable('llama')
    freeze(m, tmp_path/'m.safetensors')
    with use_profile(m, 'w8k8v4'): right = m.generate(IDS[:, :50], **KW)[0].tolist()
    code = (f"import torch; from switchable_llm.serving.packed import load_packed; m = load_packed({str(tmp_path/'m.safetensors')!r})\n"
            "from switchable_llm.serving.lean import LiveStep, lean_tokens\n"
            f"ids = {IDS[0, :50].tolist()}\nm.switch.profile = 'w8k8v4'\nstep = LiveStep(m)\n"
            "print(ids+list(lean_tokens(step, ids, 12)), len(step.cache.kept))")
    env = os.environ | dict(SWITCHABLE_LLM_NATIVE='0', PYTHONWARNINGS='ignore')
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip()==f'{right} 2'

def test_memory_grows_and_is_a_quarter(tmp_path):
    m = toy('llama', head_dim=64, max_position_embeddings=2**20)
    make_switchable_(m, ['w8', 'w8k8v4', 'w8k8v8'], PER_TOKEN)
    freeze(m, tmp_path/'m.safetensors')
    packed,sizes = load_packed(tmp_path/'m.safetensors'),{}
    for p in packed.switch.profiles:
        with use_profile(packed, p):
            step = LiveStep(packed)
            assert step.cache.nbytes==0
            step(5)
            first = step.cache.nbytes
            step.cache.reserve(2048)
            sizes[p] = step.cache.nbytes
            assert step.cache.pool.nbytes>=sizes[p] and first<sizes[p]/12
        per_token = profile_cost(m, p, 32).cache_bytes
        assert 2048*per_token<=sizes[p]<=1.1*2048*per_token
    assert sizes['w8']>4*sizes['w8k8v4']>3*sizes['w8k8v8']

@native
def test_a_text_keeps_the_bits_that_it_began_in(pair):
    _,packed = pair
    step = LiveStep(packed)
    with use_profile(packed, 'w8k8v4'): step.prompt(IDS[0, :70].tolist())
    for other in ('w8', 'w8k8v8'):
        with use_profile(packed, other), pytest.raises(ValueError, match='begun with a cache of k8v4.*begin it again'): step(3)
    with use_profile(packed, 'w8k8v4'):
        step.cache.length = 66; step(3)                 # within the group that is exact
        step.cache.length = 50
        with pytest.raises(ValueError, match='from 32 on only a few bits are left; cut it to a multiple of 32'): step(3)
        step.cache.length = 32; step(3)
    step.cache.begin()
    with use_profile(packed, 'w8'): step(3)
    assert step.cache.bits==() and not step.cache.recent

@native
def test_a_kept_cache_that_lies(pair):
    "Each number and each address of a block's description is compared before anything is read."
    _,packed = pair
    with use_profile(packed, 'w8k8v4'):
        step = LiveStep(packed); step(3)
        table,cache,out,calls = step.now().table,step.cache,torch.empty(97),native_calls()
        def token(): return calls.token(table.ref, cache.ref, 3, 1, out.data_ptr())
        assert token()==0
        for d in cache.layout.native:
            for name,_ in d._fields_:
                good = getattr(d, name)
                for bad in {good+1, -1, 0, 2, 64, 2**62}-{good}:
                    setattr(d, name, bad)
                    assert token(), (name, bad)
                setattr(d, name, good)
        for name,kind in cache.native._fields_:
            good = getattr(cache.native, name)
            if kind is ctypes.c_void_p: wrong = {None, good+1} if name=='recent' else {None}
            else: wrong = {0, 1, 3, good-1, good+1, -1, 2**40, 2**63-1}-{good}
            unused = not good or name.startswith(('cos','sin')) and not cache.parts.rotary
            for bad in () if unused else wrong:
                setattr(cache.native, name, bad)
                assert token(), (name, bad)
            setattr(cache.native, name, good)
        assert token()==0

# ---- what remembers it ----

def test_files_remember(tmp_path):
    m = switchable('llama', ['w4a8k8v4'])
    right = logits(m, 'w8k4v2')
    save_switchable(m, tmp_path/'c')
    m.save_pretrained(tmp_path/'p')
    for c in (load_switchable(tmp_path/'c', toy('llama')), AutoModelForCausalLM.from_pretrained(tmp_path/'p')):
        assert c.switch.profiles==m.switch.profiles and torch.equal(logits(c, 'w8k4v2'), right)
    for name in ('p.yaml', 'p.json'):
        save_profiles(m.switch.profiles.values(), tmp_path/name)
        assert load_profiles(tmp_path/name)==list(m.switch.profiles.values())
    assert yaml.safe_load((tmp_path/'p.yaml').read_text())['profiles'][-1]['default']=='w4a8k8v4'

def test_the_commands_take_them(tmp_path, capsys):
    save_profiles([as_profile('w4a8k8v4')], tmp_path/'p.yaml')
    main(['profiles', 'check', str(tmp_path/'p.yaml')])
    main(['profiles', 'show', str(tmp_path/'p.yaml'), '--preset', 'tiny'])
    assert 'w4a8k8v4' in capsys.readouterr().out

def test_evaluation_says_what_a_token_takes():
    m,t = sl.load('tiny')
    sl.make_switchable(m, ['w8a8', 'w8a8k8v4'])
    found = sl.evaluate(m, t, sl.squad('tiny', 'validation', 4), max_new_tokens=4)
    assert 'cache B/token' in found.table()[0] and found['w8a8'].cost.cache_bytes>found['w8a8k8v4'].cost.cache_bytes
    assert type(found).from_dict(found.to_dict())['w8a8k8v4'].cost==found['w8a8k8v4'].cost

# ---- bad input ----

@pytest.mark.parametrize('text,why', [('k1', 'k=1: keys and values are cached in 2, 4 or 8 bits'), ('w4k16', 'k=16'),
                                      ('v3', 'v=3'), ('v4k8', "write 'w4a8'"), ('k', "bits='k'"), ('w4a8kv', "bits='w4a8kv'")])
def test_bits_that_make_no_sense(text, why):
    with pytest.raises(ValueError, match=why): Bits.parse(text)

def test_profiles_that_do_not_fit():
    m = switchable('llama')
    with pytest.raises(ValueError, match='give all of site attn_qkv the same k and v'):
        m.switch.add(Profile('odd', 'w8k8', (Rule('w8k4', glob='*.v_proj'),)))
    with pytest.raises(ValueError, match='write w8 here, and k8 for site attn_qkv'):
        m.switch.add(Profile('odd', 'w8', (Rule('w8k8', site=('mlp_in',)),)))
    with pytest.raises(ValueError, match='here w4a4; those of a cache'): add_gates_(m, ['w4a4k8', 'w8a8'])
    assert 'odd' not in m.switch.profiles
    with pytest.raises(ValueError, match="model type 'bloom': a cache in few bits works with"):
        make_switchable_(AutoModelForCausalLM.from_config(AutoConfig.for_model('bloom', vocab_size=97, n_layer=2, n_head=4)), ['k8v8'])
    few = LlamaForCausalLM(LlamaConfig(**COMMON))
    with pytest.raises(ValueError, match='no layer of site attn_qkv is switchable'):
        make_switchable_(few, ['w8k8v8'], sites=dict(mlp_in=('*.up_proj',)))

def test_the_families_are_those_of_the_native_steps(): assert ATTENDING==set(PARTS)

@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('mean', [0., 5., 50., 5000.])
def test_the_bound_of_a_kept_number(bits, mean):
    "Half a step, and what float16 rounds off the smallest number and the steps above it: no more, also far from 0."
    x = mean+torch.randn(400, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codes,lo,step = range_codes(x, bits, -1)
    off = (range_numbers(codes, lo, step)-x).abs()
    low,high = x.amin(-1, keepdim=True),x.amax(-1, keepdim=True)
    whole = (high-low)/(2**bits-1)
    ends = 2**-11*low.abs()+2**-25+(2**bits-1)*(2**-11*whole+2**-25)
    assert (off<=whole*(1+2**-11)/2+ends+1e-6*x.abs()).all()
    if mean==50 and bits==8: assert 1<(off/whole).max()<1.5   # more than the half a step that one would expect
    if mean==0: assert (off/whole).max()<.5+.07*(bits==8)+.01

def test_beyond_float16_numbers_end():
    x = torch.tensor([[-1e5, 0, 7e4, 1e5]])
    assert range_numbers(*range_codes(x, 8, -1)).min()==-65504 and torch.isfinite(range_numbers(*range_codes(x, 8, -1))).all()
