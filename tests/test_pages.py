"The pool of pages: bounds, sharing, threads, and memory that comes back."
import gc, random, resource, sys
from concurrent.futures import ThreadPoolExecutor
import pytest, torch
import test_cache_bits as bits
from switchable_llm.core.switching import use_profile
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.serving import kept
from switchable_llm.serving.kept import Cache, NoPages, Page, Pages
from switchable_llm.serving.lean import LiveStep, lean_tokens, together
from switchable_llm.serving.parts import parts_of
from test_rows import packed

FEW = (Bits(k=8, v=4), None)

@pytest.fixture(scope='module')
def model(tmp_path_factory): return packed(bits.toy('llama'), tmp_path_factory.mktemp('p')/'m.safetensors', QuantConfig(act='per_token'))

@pytest.fixture
def parts(model): return parts_of(model)

def step_on(model, pool): return LiveStep(model, cache=Cache(LiveStep(model).parts, pages=pool))

@torch.no_grad()
def test_a_bound_in_the_middle_of_a_batch_changes_nothing(model):
    for name in ('w8a8','w8a8_k4v2'):
        with use_profile(model, name):
            pool = Pages(LiveStep(model).parts)
            one = LiveStep(model).now(); one.prompt([5]*33)
            pool.most = 5*pool.page_bytes(one.bits)+3*pool.layout(one.bits).recent
            steps = [step_on(model, pool).now() for _ in range(3)]
            for s in steps[:2]: s.prompt(list(range(3, 34)))             # a page each
            steps[2].prompt(list(range(3, 40)))                          # two
            used = pool.nbytes
            with pytest.raises(NoPages, match='let a text end'): together([(s, [7]*30) for s in steps])
            with pytest.raises(NoPages): steps[0].prompt([7]*70)
            with pytest.raises(NoPages): [steps[0].cache.copy() for _ in range(2)]
            gc.collect()
            assert pool.nbytes==used and [s.cache.length for s in steps]==[31, 31, 37]
            steps[2].cache.begin()
            got = together([(s, [7]*30) for s in steps[:2]])             # there is room now
            right = LiveStep(model).prompt(list(range(3, 34))+[7]*30)
            assert torch.equal(got[0], right) and torch.equal(got[1], right)
            assert pool.nbytes+pool.free<=pool.most

@torch.no_grad()
def test_a_bound_ends_a_text_with_a_clear_word(model):
    with use_profile(model, 'w8a8'):
        pool = Pages(LiveStep(model).parts); pool.most = 2*pool.page_bytes()
        step = step_on(model, pool)
        with pytest.raises(NoPages, match=f'{pool.most:,}'): list(lean_tokens(step, [5]*60, 20))
        assert step.cache.length==64 and len(list(lean_tokens(step, [5]*60, 5)))==5

def test_a_system_without_memory(parts, monkeypatch):
    pool,made = Pages(parts),[]
    def page(size):
        if len(made)==2: raise OSError(12, 'Cannot allocate memory')
        made.append(Page(size))
        return made[-1]
    monkeypatch.setattr(kept, 'Page', page)
    with pytest.raises(NoPages, match='the system has no memory left'): pool.take(n=3)
    assert pool.nbytes==0 and pool.free==2*pool.page_bytes()
    assert len(pool.take(n=2))==2

def test_pages_come_back_however_a_text_ends(parts):
    pool = Pages(parts)
    def text(b):
        c = Cache(parts, pages=pool); c.adopt(b); c.reserve(70)
        return c
    for b in ((), FEW):
        c = text(b); c.begin(); assert pool.nbytes==0
        c = text(b); c.adopt(FEW if b==() else ()); assert pool.nbytes==0
        c = text(b); del c; assert pool.nbytes==0
        c = text(b); c.me = c; del c; gc.collect(); assert pool.nbytes==0
        c = text(b); d = c.share(0); c.length = c.most = 64; e = c.share(64); del c
        assert pool.nbytes==2*pool.page_bytes(b) and d.nbytes==0
        del e, d; assert pool.nbytes==0

def test_a_text_that_is_cleared_away_anywhere_waits_for_nobody(parts):
    pool = Pages(parts)
    c = Cache(parts, pages=pool); c.reserve(33)
    with pool.lock: del c                                                # as Python may do within any call of the pool
    assert pool.nbytes==0 and pool.free==2*pool.page_bytes()

def test_a_text_at_work_is_not_begun_again(parts):
    c = Cache(parts); c.reserve(5)
    with c.alone():
        for f in (c.begin, c.copy, lambda: c.share(0)):
            with pytest.raises(RuntimeError, match='another thread is at work'): f()
    c.begin()

def test_many_threads_share_one_pool(parts):
    "Each text keeps its own numbers while others begin, are copied, are cut and end."
    pool,errors = Pages(parts),[]
    pool.SPARE = 3*pool.page_bytes()
    def numbers(c): return torch.stack([x for i in range(len(parts.blocks)) for x in c.seen(i, c.length, end=c.length)])
    def put(c, n, g):
        n = min(n, c.context-c.length)
        c.reserve(c.length+n)
        for i in range(len(parts.blocks)): c.put(i, c.length, *torch.randn(2, parts.kv_heads, n, parts.head_dim, generator=g))
        c.length = c.most = c.length+n
    def caller(seed):
        rng,g,live = random.Random(seed),torch.Generator().manual_seed(seed),[]
        for _ in range(60):
            if len(live)<2 or rng.random()<.2: c = Cache(parts, pages=pool); c.adopt(rng.choice(((), FEW)))
            else:
                c = rng.choice(live)[0]
                c = c.copy() if rng.random()<.5 else c.share(c.length//32*32)
                if rng.random()<.3: c.length = c.length//64*32
            put(c, rng.randrange(1, 50), g)
            live.append((c, numbers(c)))
            if len(live)>5: live.pop(rng.randrange(6))
            errors.extend(1 for c,x in live if not torch.equal(numbers(c), x))
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as threads: list(threads.map(caller, range(6)))
    finally: sys.setswitchinterval(.005)
    gc.collect()
    assert not errors and pool.nbytes==0 and 0<pool.free<=pool.SPARE

@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_the_system_has_the_memory_again(parts):
    def resident():
        with open('/proc/self/statm') as f: return int(f.read().split()[1])*resource.getpagesize()
    pool = Pages(parts)
    before,n = resident(),2**26//pool.page_bytes()
    caches = [Cache(parts, parts.context, pool) for _ in range(-(-n//4))]
    for c in caches:
        c.reserve(128)
        for p in c.pages: p.memory.fill_(1)
    full = resident()
    assert full-before>.9*2**26
    del c, caches; gc.collect()
    assert pool.nbytes==0 and resident()-before<pool.SPARE+2**23
