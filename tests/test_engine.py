"The engine under texts that come, go, fail and want too much; every answer is the one that its text has alone."
import asyncio, gc, json, random, threading, time
from dataclasses import replace
import pytest, torch
import test_cache_bits as bits, test_lean_families as families
import switchable_llm as sl
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import use_profile
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.serving import kept
from switchable_llm.serving.lean import LiveStep, lean_tokens
from switchable_llm.serving.packed import load_packed
from test_rows import packed

pytest.importorskip('fastapi')
from switchable_llm.server.app import Service, make_app
from switchable_llm.server.elastic import Elastic
from switchable_llm.server.engine import Engine
from switchable_llm.server.requests import Failed, Refused, Request

pytestmark = families.native
PROFILES = 'w8','w4','w8a8','w6a6','w4a8_k8v4','w8a8_k4v2'

@pytest.fixture(scope='module')
def model(tmp_path_factory): return packed(bits.toy('llama'), tmp_path_factory.mktemp('e')/'m.safetensors', QuantConfig(act='per_token'))

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "The embedded model in one file, and its path."
    path = tmp_path_factory.mktemp('e')/'tiny.safetensors'
    model,tokenizer = sl.load('tiny')
    torch.manual_seed(0)
    sl.make_switchable(model, ['bw8','bw6','w4a8'])
    sl.freeze(model, path, tokenizer=tokenizer)
    return load_packed(path), tokenizer

@torch.no_grad()
def alone(model, r, profile=None):
    "Tokens of a request without an engine."
    chance = torch.Generator().manual_seed(r.seed) if r.temperature else None
    with use_profile(model, profile or r.profile):
        return list(lean_tokens(LiveStep(model), r.ids, r.max_new_tokens, r.stop, r.temperature, r.top_k, r.top_p, chance))

def tokens(rng, n): return [rng.randrange(3, 97) for _ in range(n)]

def some_request(rng, beginnings=((),), profiles=PROFILES, most=128):
    "Any request that a model of 97 tokens and this context can do."
    ids = (list(rng.choice(beginnings))+tokens(rng, rng.choice((1, 3, 20, 60))))[:most-2]
    drawn = dict(temperature=rng.choice((.3, 1., 2.)), seed=rng.randrange(2**40), top_k=rng.choice((None, 5, 500)),
                 top_p=rng.choice((None, .5))) if rng.random()<.5 else {}
    return Request(ids, rng.randint(1, most-len(ids)), rng.choice(profiles), stop=frozenset(tokens(rng, rng.choice((0, 3)))),
                   logprobs=rng.choice((None, 0, 3)), caller=rng.choice('abc'), **drawn)

def leaves_after(n):
    "A listener that hears so many tokens and is gone."
    left = iter(range(n))
    return lambda token: next(left)

def only_beginnings(engine):
    "Whether all pages in use are those of beginnings that are kept."
    gc.collect()
    pages = {id(p):p.size for _,_,c in engine.prefixes.kept for p in c.pages}
    return engine.pages.nbytes==sum(pages.values())

def quiet(engine, seconds=20):
    "Wait until nobody is written for."
    for _ in range(int(seconds*100)):
        if not (s := engine.stats())['running']+s['waiting']: return
        time.sleep(.01)
    raise AssertionError(s)

def test_every_answer_is_the_one_alone(model):
    "240 texts at six profiles, with draws, stop tokens, shared beginnings, and some that are given up at any moment."
    rng = random.Random(1)
    beginnings = [(), *(tuple(tokens(rng, n)) for n in (32, 40, 70, 96))]
    asked,given_up = [some_request(rng, beginnings) for _ in range(240)],set(rng.sample(range(240), 40))
    with Engine(model, waiting=300) as engine:
        answers = []
        for i,r in enumerate(asked):
            leaves = i in given_up and rng.random()<.5
            answers.append(engine.submit(r, leaves_after(rng.randrange(4)) if leaves else None))
            if i in given_up and not leaves: threading.Timer(rng.random()*.3, answers[-1].cancel).start()
            if rng.random()<.2: time.sleep(rng.random()*.05)
        for i,(r,a) in enumerate(zip(asked, answers)):
            got,right = a.wait(120),alone(model, r)
            assert got==(right if a.reason!='cancelled' else right[:len(got)]), (i, r)
            assert i in given_up or a.reason==('stop' if right[-1] in r.stop else 'length')
            if r.logprobs is not None: assert all(len(t.top)==r.logprobs and -99<t.logprob<=0 for t in a.tokens)
        stats = engine.stats()
        assert stats['reused_tokens']>500 and stats['running']==stats['waiting']==0
        assert sum(a.reason=='cancelled' for a in answers)>5
        assert only_beginnings(engine)
    assert engine.pages.nbytes==0

def test_an_equal_beginning_is_not_computed_again(model):
    rng = random.Random(2)
    with Engine(model) as engine:
        for p in PROFILES:
            first = tokens(rng, 70)
            turns = [(first, 0), (first, 64), (first+[5, 6], 64), (first[:40]+[7]*20, 32), (first[:20]+[7]*30, 0), (first[:64], 32),
                     (first[:65], 64)]
            for ids,most in turns:
                r = Request(ids, 9, p)
                a = engine.submit(r)
                assert a.wait(60)==alone(model, r) and a.reused==most, (p, len(ids))
            a = engine.submit(Request(first+engine.submit(Request(first, 40, p)).wait(60)+[3], 3, p))   # the next turn of a conversation
            assert a.wait(60) and a.reused==96

@pytest.mark.parametrize('pages', [5, 9, 40])
def test_little_memory_makes_beginnings_give_way_and_texts_wait(model, pages):
    rng,layout = random.Random(pages),kept.Pages(LiveStep(model).parts).layout()
    memory,seen,over = pages*layout.page,[],threading.Event()
    beginnings = [(), *(tuple(tokens(rng, n)) for n in (32, 64))]
    with Engine(model, memory) as engine:
        def watch():
            while not over.is_set(): seen.append((engine.pages.nbytes, engine.stats()['waiting'])); time.sleep(.001)
        watcher = threading.Thread(target=watch); watcher.start()
        asked = [some_request(rng, beginnings) for _ in range(80)]
        answers = [engine.submit(r) for r in asked]
        try:
            for r,a in zip(asked, answers): assert a.wait(120)==alone(model, r)
        finally: over.set(); watcher.join()
        assert max(n for n,_ in seen)<=memory and max(w for _,w in seen)>0 and only_beginnings(engine)

@pytest.mark.parametrize('bound', ['places','memory'])
def test_one_caller_does_not_take_everything(model, bound):
    "Another's text begins while the first caller's twenty long ones are written."
    page = kept.Pages(LiveStep(model).parts).layout().page
    with Engine(model, **(dict(most=8) if bound=='places' else dict(memory=32*page, prefixes=0))) as engine:   # a text has 4 pages
        many = [engine.submit(Request([5+i], 120, 'w8a8', caller='many')) for i in range(20)]
        next(iter(many[6]))
        other = engine.submit(Request([7], 3, 'w8a8', caller='other'))
        other.wait(60)
        assert engine.stats()['running']==7 and other.first<min(a.ended or time.monotonic() for a in many)
        for a in many: a.cancel()

def test_a_full_queue_has_room_for_another_caller(model):
    goes_on = threading.Event()
    with Engine(model, most=1, waiting=16) as engine:
        engine.submit(Request([5], 2, 'w8a8', caller='many'), lambda token: goes_on.wait(60))   # the engine's thread waits here
        while not engine.stats()['running']: time.sleep(.01)
        with pytest.raises(Refused, match='wait already'):
            for i in range(99): engine.submit(Request([5], 2, 'w8a8', caller='many'))
        other = engine.submit(Request([7], 3, 'w8a8', caller='other'))
        goes_on.set()
        assert i==14 and len(other.wait(60))==3

def test_long_prompts_of_one_caller_do_not_hold_up_another(model):
    with Engine(model, pause=1e-6, prefixes=0) as engine:   # prompts go in by the least pieces
        for attempt in range(20):   # where the prompts were in before the other could ask, again
            long = [engine.submit(Request([5+i]*120, 8, 'w8a8', caller='many')) for i in range(8)]
            while not any(a.ended for a in long) and engine.stats()['running']<4: time.sleep(.001)
            late = any(a.first for a in long)
            other = engine.submit(Request([7], 1, 'w8a8', caller='other'))
            other.wait(60)
            for a in long: a.wait(60)
            if not late: break
        assert sum(other.first<a.first for a in long)>=4

def test_what_can_never_be_done_is_refused(model):
    layout = kept.Pages(LiveStep(model).parts).layout()
    with Engine(model, 2*layout.page) as engine:
        good = Request([5]*60, 4, 'w8a8')
        for named,r in {'the model has room for 128':replace(good, ids=[5]*125), 'empty':replace(good, ids=[]),
                        'at least 1':replace(good, max_new_tokens=0), 'token 97':replace(good, ids=[97]),
                        'token -1':replace(good, ids=[-1]),
                        'for all texts: ask for less':replace(good, max_new_tokens=5), 'not on this model':replace(good, profile='w7'),
                        'no profile is named':replace(good, profile=None),
                        'needs adapter':replace(good, profile=Profile('own', Bits(3)))}.items():
            with pytest.raises(ValueError, match=named): engine.submit(r)
        assert engine.submit(good).wait(60)==alone(model, good)
    for wrong in (dict(memory=0), dict(most=0), dict(pause=0)):
        with pytest.raises(ValueError, match=[*wrong][0]): Engine(model, **wrong)

def test_a_full_queue_refuses_and_forgets_nobody(model):
    with Engine(model, most=1, waiting=3) as engine:
        long = engine.submit(Request([5], 120, 'w8a8'))
        next(iter(long))
        rest = [engine.submit(Request([6+i], 2, 'w8a8')) for i in range(3)]
        with pytest.raises(Refused, match='3 requests wait') as full: engine.submit(Request([5], 1, 'w8a8'))
        assert full.value.retry
        rest[1].cancel()
        assert [len(a.wait(60)) for a in rest]==[2, 0, 2] and len(long.wait(60))==120

def test_callers_take_turns(model):
    "Who asks once does not wait for another's fifty."
    with Engine(model, most=2) as engine:
        many = [engine.submit(Request([3+i], 20, 'w8a8', caller='many')) for i in range(50)]
        next(iter(many[0]))
        one = engine.submit(Request([5], 20, 'w8a8', caller='one'))
        before = sum(a.ended is not None for a in many)
        assert len(one.wait(60))==20
        assert sum(a.ended is not None and a.ended<=one.ended for a in many)<=before+6
        assert all(len(a.wait(60))==20 for a in many)

def gaps(model, rng):
    """Longest time between two tokens of a text while prompts that nearly fill the model arrive, in seconds and in seconds of the
    processor; how many prompts."""
    at,over,told = [],threading.Event(),[]
    with Engine(model, prefixes=0) as engine:
        engine.submit(Request([5]*200, 1, 'bw8')).wait(60)   # it knows its speed now
        text = engine.submit(Request([7], 250, 'bw8'), lambda t: at.append((time.perf_counter(), time.thread_time())))   # in its thread
        def prompts():
            while not over.is_set():
                told.append(engine.submit(Request(tokens(rng, 250), 2, rng.choice(['bw8','w4a8']), caller='long')).wait(60))
        busy = threading.Thread(target=prompts); busy.start()
        text.wait(60); over.set(); busy.join()
    return *(max(b[i]-a[i] for a,b in zip(at, at[1:])) for i in (0, 1)), len(told)

def test_a_long_prompt_delays_nobodys_next_token(tiny):
    "By 100 ms of work in any try; by the clock in the quietest of several, since the machine may be at other work."
    clock,work,prompts = zip(*(gaps(tiny[0], random.Random(i)) for i in range(5)))
    print('longest gaps, ms:', *([round(1000*s, 1) for s in sorted(x)] for x in (clock, work)), 'prompts:', sum(prompts))
    assert max(work)<.1 and min(clock)<.1 and min(prompts)>=3

def test_broken_weights_end_only_those_who_use_them(model, tmp_path):
    "Adapters of 4 bits that are no numbers: texts at 4 bits fail, and those beside them are right."
    broken = packed(bits.toy('llama'), tmp_path/'m.safetensors', QuantConfig(act='per_token'))
    for l in broken.switch.layers:
        for n,p in l.adapters.named_parameters():
            if '4' in n.split('.'): p.data.fill_(float('nan'))
    rng = random.Random(4)
    with Engine(broken) as engine:
        asked = [replace(some_request(rng), profile=rng.choice(['w8a8','w4'])) for _ in range(40)]
        for r,a in [(r, engine.submit(r)) for r in asked]:
            if r.profile=='w8a8': assert a.wait(60)==alone(broken, r)
            else:
                with pytest.raises(Failed, match='no numbers at w4'): a.wait(60)
        quiet(engine)
        assert engine.broken is None

def break_cache(engine, answer):
    "The table of pages of a text that is being written says that there are none."
    row = next(r for r in engine.rows if r.answer is answer)
    row.step.cache.native.pages_len = 0

def test_a_step_that_fails_ends_only_the_text_that_is_at_fault(model):
    rng = random.Random(5)
    with Engine(model) as engine:
        asked = [Request(tokens(rng, 20), 60, p) for p in PROFILES]
        def tell(t):   # in the engine's thread, between two steps
            if t is not None and len(bad.tokens)==5: break_cache(engine, bad)
        bad = engine.submit(Request([5]*8, 60, 'w8a8'), tell)
        answers = [engine.submit(r) for r in asked]
        with pytest.raises(Failed, match='1 texts: a buffer'): bad.wait(60)
        assert [a.wait(60) for a in answers]==[alone(model, r) for r in asked] and len(bad.tokens)==5
        again = Request([5]*8, 60, 'w8a8')
        assert engine.submit(again).wait(60)==alone(model, again) and only_beginnings(engine)

def test_a_system_without_memory_ends_a_text_and_not_the_engine(model, monkeypatch):
    with Engine(model, prefixes=0) as engine:
        one = engine.submit(Request([5]*3, 100, 'w8a8'))
        next(iter(one))
        def page(size): raise OSError(12, 'Cannot allocate memory')
        with monkeypatch.context() as m:
            m.setattr(kept, 'Page', page)
            with pytest.raises(Failed, match='no memory left'): one.wait(60)
            with pytest.raises(Failed, match='no memory left'): engine.submit(Request([5]*70, 3, 'w8a8')).wait(60)
        r = Request([5]*70, 3, 'w8a8')
        assert engine.submit(r).wait(60)==alone(model, r) and engine.broken is None

def test_a_choice_that_fails_ends_one_request(model):
    class Faulty(Elastic):
        def choose(self, *args): raise ZeroDivisionError('no load today')
    with Engine(model, elastic=Faulty(['w8a8','w4'])) as engine:
        with pytest.raises(Failed, match='no load today'): engine.submit(Request([5], 3)).wait(60)
        assert len(engine.submit(Request([5], 3, 'w4')).wait(60))==3

def test_many_own_profiles_leave_nothing_behind(model):
    with Engine(model) as engine:
        for i in range(150): engine.submit(Request([5]*20, 1, Profile(f'p{i}', Bits(8, 8), ()))).wait(60)
        assert len(engine.per_token)<=64 and engine.stats()['prefixes']<=16

def test_listeners_that_fail_stop_their_own_text(model):
    def deaf(token): raise OSError('nobody there')
    def leave(token): raise SystemExit('by mistake')
    with Engine(model) as engine:
        bad = [engine.submit(Request([5], 100, 'w8a8'), f) for f in (deaf, leave)]
        good = engine.submit(Request([5], 100, 'w8a8'))
        assert len(good.wait(60))==100 and engine.broken is None
        assert all(a.done.wait(10) and a.reason=='cancelled' and len(a.tokens)<5 for a in bad)

def test_an_orderly_end(model):
    engine = Engine(model, most=2)
    answers = [engine.submit(Request([5+i], 60, 'w8a8')) for i in range(6)]
    assert engine.close(60) and all(len(a.wait(0))==60 for a in answers)
    with pytest.raises(Refused, match='about to stop') as e: engine.submit(Request([5], 1, 'w8a8'))
    assert e.value.retry
    engine = Engine(model, most=2)
    answers = [engine.submit(Request([5+i], 120, 'w8a8')) for i in range(20)]
    start = time.monotonic()
    assert not engine.close(0) and time.monotonic()-start<5
    assert all(a.done.is_set() for a in answers) and 'cancelled' in {a.reason for a in answers} and engine.pages.nbytes==0
    assert engine.close()   # again is no fault

async def get(app, path):
    "Status and body of a page, without a socket."
    told = []
    async def receive(): return dict(type='http.request', body=b'', more_body=False)
    async def send(m): told.append(m)
    scope = dict(type='http', asgi=dict(version='3.0'), http_version='1.1', method='GET', scheme='http', path=path, raw_path=path.encode(),
                 query_string=b'', root_path='', headers=[], client=('127.0.0.1', 1), server=('127.0.0.1', 2))
    await app(scope, receive, send)
    return told[0]['status'], json.loads(b''.join(m.get('body', b'') for m in told[1:]))

@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_the_death_of_the_thread_is_told(tiny):
    "To those who wait, to those who come, and to whoever asks for the server's health."
    class Fatal(Elastic):
        def choose(self, *args): raise SystemExit('by mistake')   # in the engine's thread
    model,tokenizer = tiny
    with Service(model, tokenizer, 'tiny', most=2) as service:
        app,engine = make_app(service),service.engine
        engine.elastic = Fatal(['bw8'])
        assert asyncio.run(get(app, '/health'))[0]==200
        answers = [engine.submit(Request([5], 200, 'bw8')) for _ in range(2)]
        next(iter(answers[0]))
        answers += [engine.submit(Request([5], 200)) for _ in range(3)]
        for a in answers[2:]:
            with pytest.raises(Failed, match='the engine has stopped: SystemExit'): a.wait(20)
        assert all(a.done.wait(20) for a in answers)
        with pytest.raises(Refused, match='has stopped') as e: engine.submit(Request([5], 1, 'bw8'))
        assert not e.value.retry and not e.value.full
        status,said = asyncio.run(get(app, '/health'))
        assert status==503 and said['status']=='broken'
        assert engine.close() and engine.pages.nbytes==0
