"What the native calls do with descriptions that lie: a fault, and never a read or a write past an end."
import ctypes, os, random
import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from switchable_llm.quantizers import Bits
from switchable_llm.serving.kernels import ActQuant, FAULTS, LinearPlan, _Linear, _native, pack_planes
from switchable_llm.serving.kept import Cache, _Cache, _Kept
from switchable_llm.serving.parts import Dense, Table, _Layer, _Model, native_calls, parts_of
from switchable_llm.serving.lean import Step, torch_step
from switchable_llm.system.native import native_features
from test_kernels import packed, plan, plan_of

pytestmark = pytest.mark.skipif('decode' not in native_features(), reason='no compiled kernels here')
# more by hand, and over a library built with the address sanitizer
CASES = int(os.environ.get('SWITCHABLE_LLM_FUZZ', 1500))
NUMBERS = [-2**63, -2**31, -65, -1, 0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 128, 1000, 65536, 2**31-1,
           2**31, 2**40, 2**63-1]
FLOATS = [0., -1., float('nan'), float('inf'), 1e300, 1e-300]

def small(kind):
    torch.manual_seed(0)
    if kind=='gpt2':
        return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=42, n_head=3, vocab_size=61, n_positions=32,
                                          bos_token_id=0, eos_token_id=0))
    sizes = dict(hidden_size=48, intermediate_size=84, num_hidden_layers=2, num_attention_heads=6,
                 num_key_value_heads=3, head_dim=10)
    sizes |= dict(vocab_size=61, max_position_embeddings=32)
    if kind=='llama': return LlamaForCausalLM(LlamaConfig(**sizes))
    more = dict(intermediate_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if kind=='phi3': del sizes['head_dim']
    if kind=='gemma3_text': more |= dict(sliding_window=5, layer_types=['full_attention','sliding_attention'])
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes|more))

def integers(struct): return [n for n,kind in struct._fields_ if kind is ctypes.c_int64]
def pointers(struct): return [n for n,kind in struct._fields_ if kind is ctypes.c_void_p]

def spoil(d, rng):
    "Change one thing of a description: a number, a length, a step, or a buffer that is gone."
    lists = [n for n,kind in d._fields_ if hasattr(kind, '_length_')]
    fields = integers(d)+pointers(d)+lists+[n for n,kind in d._fields_ if kind is ctypes.c_double]
    # the last four are the native side's own
    name = rng.choice([n for n in fields if n not in ('checked','packed','max_kp','max_r')])
    kind = dict(d._fields_)[name]
    if kind is ctypes.c_void_p: setattr(d, name, None)
    elif kind is ctypes.c_double: setattr(d, name, rng.choice(FLOATS))
    elif name in lists:
        values = getattr(d, name)
        i = rng.randrange(len(values))
        values[i] = None if kind._type_ is ctypes.c_void_p else rng.choice(NUMBERS)
    else: setattr(d, name, rng.choice([*NUMBERS, getattr(d, name)+rng.choice((-1, 1, 16))]))
    return name

def clone(d):
    out = type(d)()
    ctypes.memmove(ctypes.addressof(out), ctypes.addressof(d), ctypes.sizeof(d))
    return out

@pytest.mark.parametrize('act', [None, ActQuant(8, False), ActQuant(6, True, .1), ActQuant(12, False)], ids=str)
@pytest.mark.parametrize('lora', [0, 3])
def test_a_layer_that_lies(act, lora):
    rng,f = random.Random(0),_native()
    n,k,m = 33,70,9
    x,seen = torch.randn(m, k),set()
    for i in range(CASES//8):
        p = plan(n, k, rng.choice((2, 4, 5, 6, 7, 8)), act, lora)
        d = clone(p.linear)
        changed = [spoil(d, rng) for _ in range(rng.choice((1, 1, 2, 3)))]
        y = torch.empty(m, n)
        fault = f(ctypes.addressof(d), x.data_ptr(), m, k, k, 0, y.data_ptr(), n)
        assert 0<=fault<len(FAULTS)
        seen.add(fault)
        sizes = 'n','k','kp','size'
        if {*sizes}&set(changed) and any(getattr(d, c)!=getattr(p.linear, c) for c in sizes): assert fault, changed
    assert {0, 5, 6, 7} <= seen

@pytest.mark.parametrize('k', [64, 96, 140, 92])
def test_a_rotation_that_lies(k):
    rng,f,seen,m,n = random.Random(0),_native(),set(),9,33
    planes,x = pack_planes(torch.randint(0, 240, (n, k), dtype=torch.uint8)),torch.randn(m, k)
    for act in (None, ActQuant(8, False)):
        p = LinearPlan(planes, 8, torch.rand(n), act=act, rotated=True)
        for i in range(CASES//16):
            d,y = clone(p.linear),torch.empty(m, n)
            for _ in range(rng.choice((1, 1, 2))):
                name = rng.choice(('block','order','signs','matrix','len','kp'))
                if name in ('signs','matrix'): setattr(d, name, None)
                elif name=='len': d.len[rng.choice((-1, -2))] = rng.choice(NUMBERS)
                else: setattr(d, name, rng.choice([*NUMBERS, 4, 12, 20, k//2, k//4]))
            fault = f(ctypes.addressof(d), x.data_ptr(), m, k, k, 0, y.data_ptr(), n)
            assert 0<=fault<len(FAULTS)
            seen.add(fault)
            if not fault and d.order: assert d.block and k%d.block==0 and d.block%d.order==0 and d.signs
    assert {6, 7} <= seen

def test_arguments_that_lie():
    f,p = _native(),plan(33, 70, 8)
    x,y = torch.randn(2, 70),torch.empty(2, 33)
    right = [p.ref, x.data_ptr(), 2, 70, 70, 0, y.data_ptr(), 33]
    assert f(*right)==0
    for i,bad in ((0, None), (1, None), (2, -1), (2, 2**40), (3, 69), (3, 71), (4, -1), (5, 3), (5, -1),
                  (6, None), (7, 32), (7, 34)):
        assert f(*right[:i], bad, *right[i+1:]), (i, bad)

def entries_of(table):
    "All descriptions of a table: itself, its layers, and what multiplies."
    entries,rows = table.held
    return [table.model, *rows, *entries.values()]

@pytest.mark.parametrize('kind', ['gpt2','llama','gemma3_text','olmo2','phi3'])
@pytest.mark.parametrize('ends', [True, False])
def test_a_model_that_lies(kind, ends):
    rng,calls,where = random.Random(1),native_calls(),(ctypes.c_int64*2)()
    model = packed(small(kind).eval(), 6, ActQuant(8, False), ends=ends)
    parts,faults = parts_of(model),{}
    for i in range(CASES//4):
        table,cache = Table(parts, plan_of),Cache(parts)
        table.model.checked = 0
        d = rng.choice(entries_of(table))
        before,logits = clone(d),torch.empty(table.outputs)
        changed = [spoil(d, rng) for _ in range(rng.choice((1, 1, 2)))]
        fault = calls.check(table.ref, where)
        faults[fault] = faults.get(fault, 0)+1
        cache.reserve(20)
        ids = (ctypes.c_int64*12)(*range(12))
        for run in (lambda: calls.token(table.ref, cache.ref, 3, 0, logits.data_ptr()),
                    lambda: calls.prompt(table.ref, cache.ref, ids, 12, 1, logits.data_ptr())):
            code = run()
            # layers in float take their prompt token by token; tables of angles are compared with the cache
            of_angles = code==7 and {'angles','rotated'} & set(changed)
            assert code==0 or fault or of_angles or code==8 and not ends, (changed, code)
            if fault: assert code, changed
        ctypes.memmove(ctypes.addressof(d), ctypes.addressof(before), ctypes.sizeof(before))   # plans are shared
    assert faults[0] and {5, 6, 7, 8} <= set(faults)

@pytest.mark.parametrize('kind', ['gpt2','llama','gemma3_text'])
def test_a_cache_that_lies(kind):
    rng,calls = random.Random(2),native_calls()
    model = packed(small(kind).eval(), 8, None)
    parts = parts_of(model)
    table,cache,logits = Table(parts, plan_of),Cache(parts),torch.empty(61)
    cache.reserve(20)
    good = clone(cache.native)
    for i in range(CASES//4):
        d = clone(good)
        name = spoil(d, rng)
        same = all(getattr(d, n)==getattr(good, n) for n in (*integers(d), *pointers(d)))
        code = calls.token(table.ref, ctypes.addressof(d), 3, 2, logits.data_ptr())
        unused = kind=='gpt2' and name in ('cos','sin','cos_len','sin_len','places')
        assert bool(code)!=(same or unused), (name, code)

@pytest.mark.parametrize('bits', [(), (Bits(k=8, v=4), None), (None, Bits(k=2))], ids=str)
def test_pages_that_lie(bits):
    "A page that is gone, at an odd address, too short, or in another layout; more or fewer than there is room for."
    calls,model = native_calls(),packed(small('llama').eval(), 8, None)
    parts = parts_of(model)
    table,cache,logits = Table(parts, plan_of),Cache(parts),torch.empty(61)
    cache.adopt(bits); cache.reserve(20)
    addresses = cache.native.held[0]
    def token(): return calls.token(table.ref, cache.ref, 3, 2, logits.data_ptr())
    assert token()==0
    for bad in (None, addresses[0]+1, addresses[0]+4, addresses[0]+32):
        good,addresses[0] = addresses[0],bad
        assert token()==7
        addresses[0] = good
    for other in ((), (Bits(k=8, v=4), None), (None, Bits(k=2)), (Bits(k=8, v=4), Bits(k=8, v=4))):
        if other==bits: continue
        layout = cache.pool.layout(other)
        for name,value in (('kept', ctypes.addressof(layout.native)), ('page_len', layout.page)):
            good = getattr(cache.native, name)
            setattr(cache.native, name, value)
            assert token(), (name, other)
            setattr(cache.native, name, good)
    assert token()==0
    cache.begin()
    assert cache.ref is None and token()                        # the pages went back
    cache.copy()
    assert calls.token(table.ref, cache.copy().ref, 3, 0, logits.data_ptr())   # no page yet

def test_places_and_tokens():
    calls,model = native_calls(),packed(small('llama').eval(), 8, None)
    parts = parts_of(model)
    table,cache = Table(parts, plan_of),Cache(parts)
    logits = torch.empty(61)
    cache.reserve(20)
    capacity = cache.capacity
    def token(t, at): return calls.token(table.ref, cache.ref, t, at, logits.data_ptr())
    def prompt(ids, at, m=None):
        return calls.prompt(table.ref, cache.ref, (ctypes.c_int64*max(1, len(ids)))(*ids),
                            len(ids) if m is None else m, at, logits.data_ptr())
    assert token(60, 0)==0 and token(0, capacity-1)==0 and prompt([60], 0)==0 and prompt([1]*capacity, 0)==0
    assert [token(t, 0) for t in (-1, 61, 2**40, -2**63)]==[4]*4
    assert [token(1, at) for at in (-1, capacity, 2**40, 2**63-1, -2**63)]==[3]*5
    assert [prompt([1, bad], 0) for bad in (-1, 61)]==[4]*2
    assert [prompt([1]*2, at) for at in (-1, capacity-1, 2**63-1)]==[3]*3
    assert prompt([], 0)==3
    assert prompt([1], 0, -1)==3
    assert prompt([1]*(capacity+1), 0)==3
    assert calls.token(None, cache.ref, 1, 0, None)
    assert calls.token(table.ref, None, 1, 0, None)
    assert calls.prompt(table.ref, cache.ref, None, 1, 0, None)
    assert calls.token(table.ref, cache.ref, 1, 0, None)==0                   # no logits asked for

def test_the_layouts_of_both_sides():
    "Each struct begins with its size; a field that one side lacks changes it."
    for kind in (_Linear, _Layer, _Model, _Cache, _Kept):
        assert kind._fields_[0][0]=='size'
    p = plan(20, 30, 8)
    p.linear.size += 8
    with pytest.raises(RuntimeError, match='install the package again'): p(torch.randn(1, 30))

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', ['gpt2','llama'])
@torch.no_grad()
def test_float_layers_are_read_where_they_lie(dtype, kind):
    "By rows and by columns, in each type, beside packed ones: as PyTorch multiplies the same numbers in float32."
    torch.manual_seed(0)
    model = small(kind).eval().to(dtype)
    first = model.transformer.h[0] if kind=='gpt2' else model.model.layers[0]
    packed(first, 8, None)
    parts = parts_of(model)
    table,cache,plain = Table(parts, plan_of),Cache(parts),Cache(parts)
    step,again = Step(table, cache),Step(table, Cache(parts))
    plain.reserve(20)
    for i,t in enumerate(torch.randint(0, 61, (20,)).tolist()):
        right = torch_step(table, plain, t, i)
        assert (step(t)-right).abs().max() <= 1e-5*right.abs().max()
    ids = torch.randint(0, 61, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    cache.length = 0
    assert torch.equal(again.prompt(ids), [step(t) for t in ids][-1])
    weights = [getattr(m, 'weight', None) for m in model.modules()]
    held = {w.data_ptr() for w in weights if torch.is_tensor(w) and not isinstance(w, LinearPlan)}
    assert all(p.weight.data_ptr() in held for p in table.linears.values() if isinstance(p, Dense))
