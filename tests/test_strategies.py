"Precision drawn per token knows each token's place: in `generate()`, with caches of every kind and name, in threads."
import inspect, threading
import pytest, torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.search.strategies import Strategy, strategy, use_strategy
from switchable_llm.core.profiles import FAMILIES, Profile
from switchable_llm.core.switching import make_switchable_, use_profile
from test_families import IDS, MASK, toy

LIGHT = tuple(Profile(f'w{b}', Bits(b)) for b in (3, 4, 8))   # float activations: rounding of sums cannot move a code
PER_TOKEN = strategy('random_token', LIGHT)
KEYS = ['a','b','c']
NEW = 5

def switchable(kind):
    model = toy(kind); make_switchable_(model, LIGHT, QuantConfig(act='per_token'))
    model.generation_config.eos_token_id = None    # answers of one length
    return model

def name_of_cache(model):
    "What this transformers calls it."
    known = inspect.signature(model.get_decoder().forward).parameters
    return next(n for n in ('cache','past_key_values') if n in known)

@torch.no_grad()
def reread(model, s, ids, mask, new=NEW):
    "The definition: each step reads a row again, alone, without a cache, each token at what was drawn for its place."
    rows = []
    for r,m,k in zip(ids, mask, KEYS):
        row = r[m.bool()].tolist()
        for _ in range(new):
            with use_strategy(model, s, [k]): logits = model(torch.tensor([row]), use_cache=False).logits
            row.append(logits[0, -1].argmax().item())
        rows.append(row[-new:])
    return rows

@torch.no_grad()
def generated(model, s, **kw):
    "What `generate()` adds to a batch that is filled on the left, with a cache."
    cfg = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, use_cache=True, **kw)
    with use_strategy(model, s, KEYS): out = model.generate(IDS, attention_mask=MASK, generation_config=cfg)
    return out[:, IDS.shape[1]:].tolist()

DENSE = [k for k,t in FAMILIES.items() if '*.experts.down_proj' not in t['mlp_out']]   # experts refuse: test_experts.py

@pytest.mark.parametrize('kind', DENSE)
def test_generate(kind):
    model = switchable(kind)
    assert generated(model, PER_TOKEN)==reread(model, PER_TOKEN, IDS, MASK)

def test_the_definition_is_sharp():
    "With the draws of other places the answers differ: a strategy that takes position 0 for each step would be seen."
    model = switchable('llama')
    other = Strategy('w3', LIGHT[:1], 'run'), Strategy('w8', LIGHT[2:], 'run')
    assert len({str(reread(model, s, IDS, MASK)) for s in (PER_TOKEN, *other)})==3

@pytest.mark.parametrize('kind', ['gpt2','llama','opt'])
@torch.no_grad()
def test_caches(kind):
    "By hand, in pieces, on caches that grow and that have a fixed size, under the name that this transformers has."
    model,row = switchable(kind),IDS[:1]
    name,n = name_of_cache(model),row.shape[1]
    with use_strategy(model, PER_TOKEN, KEYS[:1]):
        whole = model(row).logits
        for make in (lambda: DynamicCache(config=model.config),
                     lambda: StaticCache(config=model.config, max_cache_len=32)):
            for cuts in ((0, 5, n), (0, 1, 2, 7, n), tuple(range(n+1))):
                cache = make()
                kw = {name:cache, 'use_cache':True}
                parts = [model(row[:, a:b], **kw).logits for a,b in zip(cuts, cuts[1:])]
                torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('kind', ['gpt2','llama'])
def test_generate_on_a_static_cache(kind):
    model = switchable(kind)
    static = dict(cache_implementation='static', disable_compile=True)
    assert generated(model, PER_TOKEN, **static)==reread(model, PER_TOKEN, IDS, MASK)

def test_a_cache_of_the_future():
    "A name that nobody knows is an error before anything is computed, not position 0."
    model = switchable('llama'); forward = type(model.model).forward
    def renamed(self, input_ids=None, attention_mask=None, memory=None, **kwargs):
        return forward(self, input_ids, attention_mask=attention_mask, **kwargs)
    model.model.forward,memory = renamed.__get__(model.model),DynamicCache(config=model.config)
    with torch.no_grad(), use_strategy(model, PER_TOKEN, KEYS[:1]):
        model.model(IDS[:1])
        for args,kw in (((), dict(memory=memory)), ((None, memory), {})):
            with pytest.raises(ValueError, match='a pass with memory, a DynamicCache'):
                model.model(IDS[:1], *args, **kw)

@pytest.mark.parametrize('kind', ['gpt2','opt'])
def test_threads(kind):
    "Strategies at work in threads over one model: each draws for itself, and a thread without one is not looked at."
    model = switchable(kind)
    others = strategy('random_profile', LIGHT), strategy('random_layer', LIGHT), Strategy('w4', LIGHT[1:2], 'run')
    jobs = [(PER_TOKEN, 0), (PER_TOKEN, 1), *((s, 0) for s in others), None, 'w8']
    @torch.no_grad()
    def run(job):
        if job is None: return model(IDS[:2]).logits   # other rows than a strategy has keys for
        if isinstance(job, str):
            with use_profile(model, job): return model(IDS[:1]).logits
        with use_strategy(model, job[0], KEYS, job[1]): return model(IDS, attention_mask=MASK).logits
    want,wrong,start = [run(j) for j in jobs],[],threading.Barrier(len(jobs))
    def work(job, expected):
        try:
            start.wait(60)
            for _ in range(12):
                if not torch.equal(run(job), expected): wrong.append(job)
        except Exception as e: wrong.append((job, repr(e)))
    threads = [threading.Thread(target=work, args=a) for a in zip(jobs, want)]
    for t in threads: t.start()
    for t in threads: t.join(120)
    assert not wrong and not any(t.is_alive() for t in threads) and model.switch.gate is None

@torch.no_grad()
def cached(model, at):
    with use_profile(model, at) if isinstance(at, str) else use_strategy(model, at, KEYS): return model(IDS, attention_mask=MASK).logits

@pytest.mark.parametrize('live', ['float','w8','w8k2v2'])
def test_the_cache_is_that_of_the_draw(live):
    "A fixed strategy is its profile to the bit, cache included, whatever is live; so is one draw for a batch."
    model = switchable('llama')
    model.switch.kernel = 'float'   # a batch that draws multiplies floats: so that bits can be compared
    for b in ('w8k4v2','w8k2v2','w4k2v2'): model.switch.add(b)
    at = {n:cached(model, n) for n in ('w8','w8k4v2','w8k2v2')}
    assert not any(torch.equal(at['w8'], at[n]) for n in ('w8k4v2','w8k2v2'))
    with use_profile(model, live):
        for n in at: assert torch.equal(cached(model, strategy(f'fixed_{n}')), at[n])
        s = strategy('random_batch', tuple(at))
        drawn = set()
        for seed in range(12):
            with use_strategy(model, s, KEYS, seed): got = model(IDS, attention_mask=MASK).logits
            drawn.add(n := list(at)[s.draw('a', seed=seed).item()])
            assert torch.equal(got, at[n])
        assert len(drawn)==3
        same = cached(model, strategy('random_profile', ('w8k2v2','w4k2v2')))   # rows differ, their caches do not
        picks = [strategy('random_profile', ('w8k2v2','w4k2v2')).draw(k).item() for k in KEYS]
        for row,k in enumerate(picks):
            want = cached(model, ('w8k2v2','w4k2v2')[k])[row]
            torch.testing.assert_close(same[row][MASK[row].bool()], want[MASK[row].bool()], atol=1e-4, rtol=1e-4)
        for name in ('random_profile','random_layer','random_token'):
            s = strategy(name, ('w8','w8k4v2'))
            with pytest.raises(ValueError, match="different caches.*per 'batch' or 'run'"), use_strategy(model, s, KEYS): pass

def test_hooks_go_with_the_block():
    model = switchable('opt'); decoder = model.get_decoder(); before = dict(decoder._forward_pre_hooks)
    with pytest.raises(ValueError, match='3 keys for a batch of 2 rows'), use_strategy(model, PER_TOKEN, KEYS):
        model(IDS[:2])
    assert dict(decoder._forward_pre_hooks)==before
