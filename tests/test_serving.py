"Serving one packed model to many: caches, tables, threads and memory, and why a call does not run natively."
import copy, gc, itertools, os, pickle, random, subprocess, sys, warnings, weakref
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
from transformers import (
    DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM)
from switchable_llm.serving import generating, lean
from switchable_llm.serving.parts import Dense
from switchable_llm.serving.generating import LeanCache, lean_class
from switchable_llm.serving.lean import LiveStep, Step, lean_tokens, live_of
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.system.native import native_features
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.packed import load_packed
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.core.profiles import Profile, Rule
from switchable_llm.core.switching import make_switchable_, use_profile

native = pytest.mark.skipif('decode' not in native_features(),
                            reason='the compiled kernels are not built, or do not run on this processor')
REQUESTS = int(os.environ.get('SWITCHABLE_LLM_REQUESTS', 1500))   # more by hand
PROFILES = [Profile(f'w{b}', Bits(b)) for b in (8, 6, 4)]       # float activations: no code flips
SIZES = dict(vocab_size=97, bos_token_id=0, eos_token_id=0)
IDS = torch.randint(1, 97, (1, 9), generator=torch.Generator().manual_seed(5))
KW = dict(do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=4)

def llama(context=400, **kw):
    sizes = dict(hidden_size=48, intermediate_size=84, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=context, **SIZES | sizes | kw))
def gpt2(context=400):
    config = GPT2Config(n_positions=context, n_embd=48, n_layer=2, n_head=4, initializer_range=.3, **SIZES)
    return GPT2LMHeadModel(config)
def opt():
    return OPTForCausalLM(OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
                                    max_position_embeddings=64, word_embed_proj_dim=32, **SIZES))

def frozen(path, make=llama, dtype=torch.float32, ends=False, adapters=True, profiles=PROFILES, **kw):
    "A packed model from random weights."
    torch.manual_seed(0)
    model = make(**kw).to(dtype).eval()
    make_switchable_(model, profiles, QuantConfig(codes='nested', act='per_token'), embedding=ends, lm_head=ends)
    if adapters:
        add_adapters_(model, r=4, dropout=0.)
        for l in model.switch.layers:
            for a in l.adapters.values(): torch.nn.init.normal_(a.b, std=.02)
    freeze(model, path)
    return load_packed(path)

@pytest.fixture
def packed(tmp_path): return frozen(tmp_path/'m.safetensors')

def write(model, ids=IDS, **kw): return model.generate(ids, attention_mask=torch.ones_like(ids), **KW|kw)

# --- what is said ---

@native
def test_status_before_and_after(packed):
    assert packed.native_status==(None, 0, 0, ()) and str(packed.native_status)=='native steps'
    write(packed)
    assert packed.native_status==(None, IDS.shape[1]+KW['max_new_tokens']-1, 0, ())
    assert '12 tokens natively, 0 by modules' in str(packed.native_status)

def reasons_of(model, ids=IDS, **kw):
    "What one `generate()` says, and its record."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        model.generate(ids, **dict(attention_mask=torch.ones_like(ids)) | KW | kw)
    return [str(w.message) for w in said if 'through the modules' in str(w.message)], model.native_status

@native
@pytest.mark.parametrize('kw,why', [
    (dict(prompt_lookup_num_tokens=2), 'generation mode assisted_generation'),
    (dict(use_cache=False), 'use_cache=False'),
    (dict(cache_implementation='static'), "cache_implementation='static'"),
    (dict(output_hidden_states=True, return_dict_in_generate=True), 'argument output_hidden_states'),
    (dict(max_new_tokens=500, stopping_criteria=[lambda ids, scores, **kw: torch.tensor([ids.shape[1]>12])]),
     'more tokens than the context'),
    (dict(attention_mask=torch.tensor([[1]*3+[0]+[1]*5])), 'padding')], ids=str)
def test_why_not_is_said_once(packed, kw, why):
    said,status = reasons_of(packed, **kw)
    assert len(said)==1
    assert why in said[0]
    assert why in status.reasons[0]
    assert status.native==0
    assert status.modules>=IDS.shape[1]
    assert status.obstacle is None and why in str(status)
    assert reasons_of(packed, **kw)[0]==[]                      # the second time it is known
    assert reasons_of(packed)[1].modules==0                     # and the next call runs natively again

@native
def test_each_reason_and_each_model_is_told(packed, tmp_path):
    assert 'use_cache=False' in reasons_of(packed, use_cache=False)[0][0]
    given = {generating._GIVES: DynamicCache(config=packed.config)}
    assert 'a cache was given, a DynamicCache' in reasons_of(packed, **given)[0][0]
    assert reasons_of(packed, use_cache=False)[0]==[]
    assert 'use_cache=False' in reasons_of(frozen(tmp_path/'n.safetensors'), use_cache=False)[0][0]

@native
def test_an_argument_that_the_step_does_not_know(tmp_path):
    model = frozen(tmp_path/'m.safetensors', gpt2)
    said,status = reasons_of(model, token_type_ids=torch.ones_like(IDS))
    assert 'argument token_type_ids' in said[0] and status.native==0

def test_obstacles_are_known_beforehand(tmp_path, packed):
    model = frozen(tmp_path/'m.safetensors', opt)
    assert "model type 'opt'" in model.native_status.obstacle and "model type 'opt'" in reasons_of(model)[0][0]
    if 'decode' not in native_features(): assert 'no kernels' in packed.native_status.obstacle
    path = tmp_path/'g.safetensors'
    torch.manual_seed(0)
    grouped = llama().eval()
    cfg = QuantConfig(codes='nested', act='per_token', weight='per_group', group_size=24)
    make_switchable_(grouped, PROFILES, cfg)
    freeze(grouped, path)
    if 'decode' in native_features(): assert 'multiple of 16 inputs' in load_packed(path).native_status.obstacle

WITHOUT = """
import sys, warnings, torch
from switchable_llm.serving.packed import load_packed
warnings.simplefilter('always')
m,i = load_packed(sys.argv[1]),torch.ones(1, 3, dtype=torch.long)
for _ in range(3): m.generate(i, attention_mask=i, max_new_tokens=2, pad_token_id=0)
print(m.native_status)
"""

@native
def test_without_kernels_it_is_said(packed, tmp_path, child_env):
    out = subprocess.run([sys.executable, '-c', WITHOUT, tmp_path/'m.safetensors'],
                         env=child_env|{'SWITCHABLE_LLM_NATIVE':'0'}, capture_output=True, text=True)
    assert out.returncode==0, out.stderr
    assert 'modules: no kernels' in out.stdout and 'SWITCHABLE_LLM_NATIVE=0' in out.stdout
    assert out.stderr.count('runs through the modules of the model')==1

class WithoutCacheName(LlamaForCausalLM):   # a transformers that calls it otherwise
    def forward(self, input_ids=None, attention_mask=None, memory=None, **kw):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kw)

class OtherHook(LlamaForCausalLM):          # one that passes its hook other things
    def _prepare_cache_for_generation(self, everything, *args):
        raise AssertionError('must not be reached with names that are gone')
    def generate(self, input_ids, **kw): self._prepare_cache_for_generation(1, 2, 3, 4, 5)

class NoHook(LlamaForCausalLM):             # and one that never asks
    def generate(self, input_ids, attention_mask=None, **kw): return self(input_ids=input_ids, use_cache=False).logits

@native
@pytest.mark.parametrize('cls,why', [
    (WithoutCacheName, 'argument of the cache'), (NoHook, '_prepare_cache_for_generation')])
def test_names_of_the_framework_that_are_gone(packed, cls, why):
    packed.__class__ = lean_class(cls)
    said,status = reasons_of(packed)
    assert len(said)==1 and why in said[0] and 'transformers' in said[0] and status.native==0

def test_a_hook_with_other_arguments(packed):
    assert generating._asked(OtherHook, (1, 2, 3), {})[1]=='generation_config'
    whole = dict(generation_config=0, model_kwargs=0, generation_mode=0, batch_size=0, max_cache_length=0)
    assert generating._asked(LlamaForCausalLM, (), whole)[1] is None
    packed.__class__ = lean_class(OtherHook)
    # it comes through to the framework's own
    with pytest.raises(AssertionError, match='not be reached'):
        packed.generate(IDS)

# --- caches ---

@torch.no_grad()
def test_a_cache_grows_and_stays_right(packed):
    ids = torch.randint(1, 97, (1, 300), generator=torch.Generator().manual_seed(1))
    step,right = LiveStep(packed),packed(ids).logits[0]
    seen = [step.cache.capacity]
    for a,b in ((0, 60), (60, 70), (70, 71), (71, 129), (129, 130), (130, 290), (290, 300)):
        logits = step.prompt(ids[0, a:b].tolist())
        assert (logits-right[b-1]).abs().max() <= 1e-5*right.abs().max()
        seen.append(step.cache.capacity)
    assert seen==[0, 64, 96, 96, 160, 160, 320, 320]   # whole pages of 32
    assert step.cache.length==300

@native
@torch.no_grad()
def test_a_long_prompt_comes_in_parts(packed, monkeypatch):
    ids = torch.randint(1, 97, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    whole = LiveStep(packed).prompt(ids).clone()
    for n in (1, 7, 32, 89):
        monkeypatch.setattr(Step, 'AT_ONCE', n)
        assert (LiveStep(packed).prompt(ids)-whole).abs().max() <= 1e-5*whole.abs().max()

def test_a_million_positions_cost_nothing_until_they_are_used(tmp_path):
    model = frozen(tmp_path/'m.safetensors', context=2**20)
    step = LiveStep(model)
    list(lean_tokens(step, IDS[0], 5))
    assert step.cache.context==2**20 and step.cache.capacity==32 and step.parts.rotary.cos.shape[1]==256
    write(model)
    with pytest.raises(ValueError, match='holds 1048576'): list(lean_tokens(step, IDS[0], 2**20))

def test_two_at_once_have_two_caches(packed):
    a,b,pool = LeanCache(packed),LeanCache(packed),live_of(packed).pool
    for c in (a, b): c.step.cache.reserve(5)
    assert a.step.cache.pool is b.step.cache.pool is pool and a.step.cache.pages!=b.step.cache.pages
    mine,before = a.step.cache.pages[0],pool.nbytes
    del a, c; gc.collect()
    assert pool.nbytes==before-pool.page_bytes()
    c = LeanCache(packed); c.step.cache.reserve(5)
    assert c.step.cache.pages==[mine]                      # what is free is used again

def test_what_somebody_looked_at_stays(packed):
    out = write(packed, return_dict_in_generate=True)
    cache = out[generating._GIVES]
    if not isinstance(cache, LeanCache):                   # without kernels: one of transformers' own
        cache = LeanCache(packed)
        with torch.no_grad(): packed(IDS, **{generating._GIVES: cache})
    keys = cache.layers[0].keys
    kept = keys.clone()
    del out, cache; gc.collect()
    for _ in range(3): write(packed, IDS.flip(1))
    assert torch.equal(keys, kept)

def test_memory_goes_back(packed, monkeypatch):
    gc.collect()
    many = [LeanCache(packed) for _ in range(20)]
    pool = live_of(packed).pool
    before = pool.nbytes
    for c in many: c.step.cache.reserve(40)
    assert pool.nbytes==before+40*pool.page_bytes()
    del c, many; gc.collect()
    assert pool.nbytes==before and 0<pool.free<=pool.SPARE
    monkeypatch.setattr(pool, 'SPARE', 2*pool.page_bytes(), raising=False)
    assert pool.free==2*pool.page_bytes()

def test_a_model_that_is_gone_leaves_nothing(packed):
    model = load_packed(packed.packed_file)
    write(model)
    assert model in lean._lives
    gone,live = weakref.ref(model),weakref.ref(lean._lives[model])
    del model; gc.collect()
    assert gone() is None and live() is None

@torch.no_grad()
def test_crop_and_copies(packed):
    cache,name = LeanCache(packed),generating._GIVES
    packed(IDS, **{name: cache})
    right = packed(torch.cat([IDS[:, :6], IDS[:, :2]], 1)).logits[:, -2:]
    other = copy.deepcopy(cache)
    for c in (cache, other):
        c.crop(-3)
        assert c.get_seq_length()==6
        out = packed(IDS[:, :2], **{name: c}).logits
        assert (out-right).abs().max() <= 1e-5*right.abs().max()
    assert other.step.cache is not cache.step.cache
    if generating._CROPS_TO:
        cache.crop(5); assert cache.get_seq_length()==5
        cache.crop(50); assert cache.get_seq_length()==5
    else:
        with pytest.raises(ValueError, match='negative'): cache.crop(5)
    cache.crop(-50); assert cache.get_seq_length()==0

@torch.no_grad()
def test_a_cache_of_another_model(packed, tmp_path):
    other = frozen(tmp_path/'o.safetensors', num_hidden_layers=2)
    for p in other.parameters(): p.data = p.data*1.5
    cache = LeanCache(packed)
    out = other(IDS[:, :1], **{generating._GIVES: cache}).logits
    right = other(IDS[:, :1]).logits
    assert (out-right).abs().max() <= 1e-5*right.abs().max()

def test_modes_of_autograd(packed):
    with torch.inference_mode(): a = write(packed)
    gc.collect()
    cache = LeanCache(packed)                                       # the buffer that inference mode made
    with torch.no_grad(): packed(IDS, **{generating._GIVES: cache})
    assert torch.equal(write(packed), a)
    x = packed.get_input_embeddings()(IDS).detach().requires_grad_()
    with pytest.raises(NotImplementedError, match='no gradient'):
        packed(inputs_embeds=x, **{generating._GIVES: LeanCache(packed)})

def test_pickles_and_copies_of_a_model_serve(tmp_path):
    model = frozen(tmp_path/'m.safetensors', adapters=False)
    right = write(model)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(other) is type(model) and torch.equal(write(other), right)

# --- threads ---

def test_one_handle_is_for_one_text(packed):
    step = LiveStep(packed)
    a,b = lean_tokens(step, IDS[0], 5),lean_tokens(step, IDS[0].flip(0), 5)
    next(a); next(b)
    with pytest.raises(RuntimeError, match='another text'): next(a)
    next(b)

def test_a_handle_in_two_threads_is_refused(packed):
    step = LiveStep(packed)
    with step.cache.lock, ThreadPoolExecutor(1) as pool:
        with pytest.raises(RuntimeError, match='another thread'): pool.submit(step, 1).result()
    assert step.cache.length==0
    step(1)

def mixed(seed):
    "A profile of its own object, of three kinds that repeat."
    rules = (Rule(Bits((8, 6, 4)[seed%3]), site=('mlp_in',)), Rule(Bits((4, 8, 6)[seed%3]), layers=(1,)))
    return Profile('mixed', Bits(6), rules)

@pytest.mark.parametrize('make', [llama, gpt2])
def test_eight_threads(tmp_path, make):
    "Greedy texts of 8 threads, at 3 profiles and at profiles made for each request, by generate() and the lean loop."
    model = frozen(tmp_path/'m.safetensors', make)
    prompts = [IDS, IDS.flip(1), IDS[:, :1], IDS.repeat(1, 3)]
    def ask(key):
        at,i,n,lean_loop = key
        with use_profile(model, mixed(at) if isinstance(at, int) else at):
            if lean_loop: return list(lean_tokens(LiveStep(model), prompts[i][0], n))
            return write(model, prompts[i], max_new_tokens=n)[0, prompts[i].shape[1]:].tolist()
    keys = list(itertools.product(('w8', 'w6', 'w4', 0, 1, 2), range(4), (1, 3, 9), (False, True)))
    right = {k:ask(k) for k in keys}
    assert len({*map(tuple, right.values())})>len(keys)//6, 'the answers must differ for this test to mean anything'
    def caller(seed):
        rng = random.Random(seed)
        return sum(ask(k)!=right[k] for k in rng.choices(keys, k=REQUESTS//8))
    with ThreadPoolExecutor(8) as pool: wrong = sum(pool.map(caller, range(8)))
    assert wrong==0
    gc.collect()
    live = live_of(model)
    assert len(live.tables.kept)<=6 and live.pool.nbytes==0 and live.pool.free<=live.pool.SPARE
    if 'decode' in native_features(): assert not live.told

def test_profiles_made_anew_find_the_table_of_the_one_before(packed):
    step,tables = LiveStep(packed),live_of(packed).tables
    made = []
    for seed in (0, 1, 0, 1, 0):
        with use_profile(packed, mixed(seed)): made.append(step.now().table)
    assert made[0] is made[2] is made[4] and made[1] is made[3] and made[0] is not made[1] and len(tables.kept)==2

def test_tables_are_bounded(tmp_path):
    packed = frozen(tmp_path/'m.safetensors', adapters=False)
    tables = live_of(packed).tables
    for i in range(60):
        with use_profile(packed, Profile('p', Bits(2+i%7), (Rule(Bits(2+i//7%7), layers=(0,)),))):
            LiveStep(packed).now()
    assert len(tables.kept)==tables.most

# --- memory ---

def tensors_of(tables):
    "All that tables point at."
    for t in tables:
        yield from (x for n in t.norms.values() for x in n if x is not None)
        if t.positions is not None: yield t.positions
        for p in t.linears.values():
            if isinstance(p, Dense): yield from (x for x in p if x is not None)
            else: yield from (x for x in (*p.planes[:3], p.scale, p.sums, p.bias) if x is not None)
            if not isinstance(p, Dense) and p.lora is not None: yield from p.lora[:2]

@pytest.mark.parametrize('make', [llama, gpt2])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_profiles_share_all_that_is_large(tmp_path, make, dtype):
    model = frozen(tmp_path/'m.safetensors', make, dtype)
    tables = []
    for p in model.switch.profiles:
        with use_profile(model, p): tables.append(LiveStep(model).now().table)
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if not t.is_meta}
    own = {t.untyped_storage().data_ptr():t for t in tensors_of(tables)}
    own = {at:t for at,t in own.items() if at not in held}
    ends = {t.linears[id(m)].weight.data_ptr() for t in tables for m in (t.parts.embedding, t.parts.head)}
    assert ends=={m.weight.data_ptr() for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    rows = sum(l.n for l in model.switch.layers)
    adapters = sum(a.b.numel() for l in model.switch.layers for a in l.adapters.values())
    small = sum(p.numel() for n,p in model.named_parameters() if p.dim()==1 and 'adapters' not in n)
    copies = 1 if dtype==torch.float32 else 3
    assert sum(t.numel() for t in own.values()) <= len(tables)*2*rows + copies*adapters + small + rows

MEMORY = """
import sys, torch
from switchable_llm.serving.packed import load_packed
from switchable_llm.serving.lean import LiveStep, lean_tokens
def own(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))/1024
m = load_packed(sys.argv[1])
before = own()
for p in m.switch.profiles:
    m.switch.profile = p
    list(lean_tokens(LiveStep(m), [1, 2, 3], 4))
    m.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, pad_token_id=0)
print(own()-before)
"""

@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='memory is read from /proc')
@pytest.mark.parametrize('kernels', ['0', '1'])
def test_memory_of_a_second_and_third_profile(tmp_path, child_env, kernels):
    "Ends of 2 x 16 MB in bfloat16: a copy in float32 for each profile would be 64 MB each."
    frozen(tmp_path/'m.safetensors', dtype=torch.bfloat16, vocab_size=64000, hidden_size=128,
           tie_word_embeddings=False)
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', MEMORY, tmp_path/'m.safetensors'],
                         env=child_env|{'SWITCHABLE_LLM_NATIVE':kernels}, capture_output=True, text=True)
    assert out.returncode==0, out.stderr
    assert float(out.stdout)<64

# --- damage ---

def test_layers_that_a_damaged_file_would_bring(tmp_path):
    packed = frozen(tmp_path/'m.safetensors', profiles=['bw8'])
    def ask(): return write(packed)
    layer = packed.model.layers[1].mlp.down_proj
    wrong = dict(high=layer.high[:1], middle=torch.empty(0, dtype=torch.uint8), bias=torch.ones(3),
                 sums8=torch.ones(5, dtype=torch.int32))
    for name,bad in wrong.items():
        keep = getattr(layer, name, None)
        tables = live_of(packed).tables; tables.forget(tables.parts); layer._plans = {}
        setattr(layer, name, bad)
        with pytest.raises(ValueError, match=r'plane: |bias of shape|sums of shape'): ask()
        setattr(layer, name, keep)
    layer._plans = {}; tables.forget(tables.parts)
    ask()

@native
def test_ten_times_the_rows_of_one_layer(packed):
    layer = packed.model.layers[1].mlp.up_proj
    n = layer.n
    for name in ('high', 'middle', 'low', 'step', 'sums8', 'sums6', 'sums4'):
        t = getattr(layer, name, None)
        if t is None: continue
        more = torch.cat([t]*10)
        setattr(layer, name, more[:-(-n*10//16)] if name in ('high', 'middle', 'low') else more)
    layer.n, layer._plans = n*10, {}
    for a in layer.adapters.values(): a.b.data = torch.cat([a.b.data]*10)
    with pytest.raises(ValueError, match=r'block 1, up: 840 outputs, and its neighbours need 84'): write(packed)
    with pytest.raises(ValueError, match='block 1, up'): LiveStep(packed).now()
