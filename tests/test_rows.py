"One row, one answer: the same bits whether tokens come one by one, as a prompt or in chunks, and with one thread or several."
import ctypes, itertools, random
import pytest, torch
import test_cache_bits as bits, test_lean_families as families
from switchable_llm.core.calibration import calibrate_
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import make_switchable_, use_profile
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.serving.exports import freeze
from switchable_llm.serving import lean
from switchable_llm.serving.lean import LiveStep, together
from switchable_llm.serving.packed import load_packed
from switchable_llm.serving.parts import Row, native_calls

pytestmark = families.native
PROFILES = [Profile('w8', Bits(8)), Profile('w4', Bits(4)), 'w8a8', 'w6a6', 'w4a8', 'w4a8_k8v4', 'w8a8_k4v2']

@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

def packed(model, path, cfg, profiles=PROFILES):
    made = [p if isinstance(p, Profile) else Profile(p, Bits.parse(p.replace('_', ''))) for p in profiles]
    make_switchable_(model, made, cfg)
    calibrate_(model, [dict(input_ids=bits.IDS)])
    add_adapters_(model, r=3)
    for l in model.switch.layers:
        for p in l.adapters.parameters(): torch.nn.init.normal_(p, std=.1)
    freeze(model, path)
    return load_packed(path)

def check(model, seed, threads, rounds=2):
    "Number of answers that were compared."
    rng,n = random.Random(seed),0
    for name in [p for p in model.switch.profiles if p!='float']:
        for _ in range(rounds):
            ids = [rng.randrange(3, 97) for _ in range(rng.randrange(40, 120))]
            with use_profile(model, name):
                threads(rng.choice((1, 2, 3)))
                one,some = LiveStep(model),LiveStep(model)
                alone = [one(t).clone() for t in ids]
                threads(rng.choice((1, 2, 3)))
                i = 0
                while i<len(ids):
                    part = ids[i:i+rng.choice((1, 2, 5, 8, 13, 31, 64, 90))]
                    i += len(part); n += 1
                    assert torch.equal(some.prompt(part), alone[i-1]), f'{name}: {len(part)} tokens that end at {i} of {len(ids)}'
    return n

@pytest.mark.parametrize('act', ['per_token','per_tensor'])
@pytest.mark.parametrize('case', bits.CASES)
def test_chunks_do_not_matter(case, act, tmp_path, threads):
    model = packed(bits.toy(case), tmp_path/'m.safetensors', QuantConfig(act=act))
    with torch.no_grad(): assert check(model, 0, threads)>20

def test_groups_and_rotation(tmp_path, threads):
    cfg = QuantConfig(act='per_token', weight='per_group', group_size=16, rotate=True)
    with torch.no_grad(): check(packed(bits.toy('llama'), tmp_path/'m.safetensors', cfg), 0, threads)

def batches(model, seed, threads, texts=5, passes=14):
    "Texts that come and go, each at its own profile and with as many tokens as it likes; answers compared, tokens."
    rng,n,tokens = random.Random(seed),0,0
    names = [p for p in model.switch.profiles if p!='float']
    def begin():
        with use_profile(model, rng.choice(names)): return LiveStep(model).now(),LiveStep(model).now()
    live = [begin() for _ in range(texts)]
    for _ in range(passes):
        if rng.random()<.3: live[rng.randrange(len(live))] = begin()
        now = [s for s in rng.sample(live, rng.randrange(1, texts+1)) if s[0].cache.length<100]
        parts = [[rng.randrange(3, 97) for _ in range(rng.choice((1, 1, 1, 4, 9, 20)))] for _ in now]
        wanted = [rng.random()<.8 for _ in now]
        threads(rng.choice((1, 2, 3)))
        got = together(zip([a for a,_ in now], parts), wanted)
        threads(rng.choice((1, 2, 3)))
        alone = [b.prompt(p).clone() for (_,b),p in zip(now, parts)]
        assert len(got)==sum(wanted)
        for x,y in zip(got, [a for a,w in zip(alone, wanted) if w]): assert torch.equal(x, y)
        n += len(now); tokens += sum(map(len, parts))
    return n, tokens

@pytest.mark.parametrize('act', ['per_token','per_tensor'])
@pytest.mark.parametrize('case', bits.CASES)
def test_company_does_not_matter(case, act, tmp_path, threads):
    model = packed(bits.toy(case), tmp_path/'m.safetensors', QuantConfig(act=act))
    with torch.no_grad():
        for seed in range(3): assert batches(model, seed, threads)[0]>10

def test_company_in_groups(tmp_path, threads):
    cfg = QuantConfig(act='per_token', weight='per_group', group_size=16, rotate=True)
    with torch.no_grad(): batches(packed(bits.toy('llama'), tmp_path/'m.safetensors', cfg), 0, threads)

@pytest.mark.parametrize('names', [('w4a8','w6a6','w8a8'), ('w3a8','w4','w5a8'), ('w6a6','w7a8','w8')])
def test_any_numbers_of_three_precisions(names, tmp_path):
    "One kernel takes rows of 4, 6 and 8 bits together, whatever their numbers; other widths go by themselves."
    model = packed(bits.toy('llama'), tmp_path/'m.safetensors', QuantConfig(act='per_token'), names)
    def step(name):
        with use_profile(model, name): return LiveStep(model).now()
    def answers(steps, ids):
        for s in steps: s.cache.begin()
        return together([(s, [i]) for s,i in zip(steps, ids)])
    steps = [[step(n) for _ in range(8)] for n in names]
    with torch.no_grad():
        alone = [[answers([s], [i])[0].clone() for i,s in enumerate(own, 3)] for own in steps]
        for counts in itertools.product(range(9), repeat=3):
            if not 2<=sum(counts)<=8: continue
            who = [(p, i) for p,n in enumerate(counts) for i in range(n)]
            random.Random(str(counts)).shuffle(who)
            got = answers([steps[p][i] for p,i in who], [i+3 for _,i in who])
            for y,(p,i) in zip(got, who): assert torch.equal(y, alone[p][i]), counts

def test_what_cannot_go_together(tmp_path):
    model = packed(bits.toy('gpt2'), tmp_path/'m.safetensors', QuantConfig(act='per_token'))
    with torch.no_grad():
        a,b = LiveStep(model).now(),LiveStep(model).now()
        assert together([]).numel()==0
        with pytest.raises(ValueError, match='two rows have one cache'): together([(a, [3]), (a, [4])])
        with pytest.raises(ValueError, match='empty'): together([(a, [3]), (b, [])])
        with pytest.raises(ValueError, match='wanted has 1 entries for 2 rows'): together([(a, [3]), (b, [4])], [True])
        other = LiveStep(packed(bits.toy('gpt2'), tmp_path/'n.safetensors', QuantConfig(act='per_token'))).now()
        with pytest.raises(ValueError, match='not of one model'): together([(a, [3]), (other, [4])])
        a.cache.lock.acquire()
        with pytest.raises(RuntimeError, match='another thread'): together([(b, [3]), (a, [4])])
        assert not b.cache.lock.locked() and b.cache.length==0

def test_the_border_refuses_what_does_not_fit(tmp_path):
    model = packed(bits.toy('gpt2'), tmp_path/'m.safetensors', QuantConfig(act='per_token'))
    calls,ids = native_calls(),(ctypes.c_int64*3)(3, 4, 5)
    with torch.no_grad():
        steps = [LiveStep(model).now() for _ in range(2)]
        for s in steps: s.cache.reserve(8)
        def call(n=2, length=None, **changed):
            rows = (Row*2)(*(lean._row(s, [3, 4, 5], ids, True) for s in steps))
            for k,v in changed.items(): setattr(rows[1], k, v)
            logits = torch.empty(2, steps[0].table.outputs)
            return calls.rows(rows, n, logits.data_ptr(), logits.numel() if length is None else length)
        assert call()==0
        assert call(n=0) and call(n=70_000) and call(size=8) and call(m=0) and call(pos=-1) and call(pos=10**6)
        assert call(length=5) and call(length=0) and call(cache=ctypes.addressof(steps[0].cache.native))   # two texts on one
        addresses = steps[1].cache.native.held[0]                                 # and on one page
        mine,addresses[0] = addresses[0],steps[0].cache.native.held[0][0]
        assert call(); addresses[0] = mine
        assert call()==0
        steps[1].table.model.checked,before = 0,steps[1].table.model.checked
        assert call(); steps[1].table.model.checked = before
        assert call()==0

@pytest.mark.parametrize('name', ['w8a8','w4a8_k8v4','w8a8_k4v2'])
def test_what_texts_share_does_not_matter(name, tmp_path, threads):
    "Copies, shared beginnings and texts that were cut go on together, and each is the text that has its tokens alone."
    model,rng = packed(bits.toy('llama'), tmp_path/'m.safetensors', QuantConfig(act='per_token')),random.Random(5)
    few = '_k' in name
    def tokens(n): return [rng.randrange(3, 97) for _ in range(n)]
    with torch.no_grad(), use_profile(model, name):
        first = LiveStep(model).now()
        live = [(first, tokens(70))]
        first.prompt(live[0][1])
        for _ in range(60):
            s,ids = rng.choice(live)
            if rng.random()<.5: n,c = len(ids),s.cache.copy()
            else:
                n = len(ids)//32*32 if few else rng.randrange(len(ids)+1)
                c = s.cache.share(n)
            live = rng.sample(live, min(len(live), 3))+[(LiveStep(model, cache=c).now(), ids[:n])]
            s,ids = rng.choice(live)
            if rng.random()<.4 and len(ids)>64:                          # cut, maybe inside what others hold
                n = rng.randrange(1, 3)*32
                s.cache.length = n; del ids[n:]
            parts = [tokens(rng.choice((1, 1, 3, 20))) for _ in live]
            threads(rng.choice((1, 2, 3)))
            got = together([(s, p) for (s,_),p in zip(live, parts)])
            for (s,ids),p,x in zip(live, parts, got):
                ids += p
                assert s.cache.length==len(ids) and torch.equal(LiveStep(model).prompt(ids), x)
            live = [(s, ids) for s,ids in live if len(ids)<105] or live[:1]
            if len(live[0][1])>=105: live[0][0].cache.length = 64; del live[0][1][64:]

def test_pages_that_one_writes_are_no_others(tmp_path):
    model,calls = packed(bits.toy('gpt2'), tmp_path/'m.safetensors', QuantConfig(act='per_token')),native_calls()
    for name in ('w8a8','w8a8_k4v2'):
        with torch.no_grad(), use_profile(model, name):
            a = LiveStep(model).now(); a.prompt(list(range(3, 73)))
            b = LiveStep(model, cache=a.cache.share(64)).now()
            for s in (a, b): s.cache.reserve(72)
            ids,logits = (ctypes.c_int64*2)(3, 4),torch.empty(2, a.table.outputs)
            def call(*at):
                rows = (Row*2)(*(lean._row(s, [3, 4], ids, True) for s in (a, b)))
                for r,pos in zip(rows, at): r.pos = pos
                return calls.rows(rows, 2, logits.data_ptr(), logits.numel())
            assert call(70, 64)==0                                       # each writes in a page of its own
            assert call(70, 40)==call(40, 64)==call(0, 0)==call(63, 64)==6   # into one that the other reads or writes
            if a.cache.recent:
                good,b.cache.native.recent = b.cache.native.recent,a.cache.native.recent
                assert call(70, 64)==6
                b.cache.native.recent = good
            assert call(70, 64)==0
