"Precision drawn per token knows each token's place: in `generate()`, with caches of every kind and name, in threads."
import inspect, threading
import pytest, torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.strategies import Strategy, strategy, use_strategy
from switchable_llm.switching import FAMILIES, Profile, make_switchable_, use_profile
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
    return next(n for n in ('cache','past_key_values') if n in inspect.signature(model.get_decoder().forward).parameters)

@torch.no_grad()
def reread(model, s, ids, mask, new=NEW):
    "The definition: each step reads all of each row again, alone, without padding or cache, each token at what was drawn for its place."
    rows = []
    for r,m,k in zip(ids, mask, KEYS):
        row = r[m.bool()].tolist()
        for _ in range(new):
            with use_strategy(model, s, [k]): row.append(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax().item())
        rows.append(row[-new:])
    return rows

@pytest.mark.parametrize('kind', FAMILIES)
def test_generate(kind):
    "A batch with padding on the left, on a cache, against the definition; a wrong place is another draw, and mostly another answer."
    model = switchable(kind)
    cfg = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, use_cache=True)
    with torch.no_grad(), use_strategy(model, PER_TOKEN, KEYS): got = model.generate(IDS, attention_mask=MASK, generation_config=cfg)[:, IDS.shape[1]:]
    assert got.tolist()==reread(model, PER_TOKEN, IDS, MASK)

def test_the_definition_is_sharp():
    "With the draws of other places the answers differ: the test above sees a strategy that takes position 0 for each step."
    model = switchable('llama')
    told = {tuple(map(tuple, reread(model, s, IDS, MASK))) for s in (PER_TOKEN, Strategy('w3', LIGHT[:1], 'run'), Strategy('w8', LIGHT[2:], 'run'))}
    assert len(told)==3

@pytest.mark.parametrize('kind', ['gpt2','llama','opt'])
@torch.no_grad()
def test_caches(kind):
    "By hand, in pieces, on caches that grow and that have a fixed size, under the name that this transformers has."
    model,row = switchable(kind),IDS[:1]
    name,n = name_of_cache(model),row.shape[1]
    with use_strategy(model, PER_TOKEN, KEYS[:1]):
        whole = model(row).logits
        for make in (lambda: DynamicCache(config=model.config), lambda: StaticCache(config=model.config, max_cache_len=32)):
            for cuts in ((0, 5, n), (0, 1, 2, 7, n), tuple(range(n+1))):
                cache = make()
                parts = [model(row[:, a:b], **{name:cache}, use_cache=True).logits for a,b in zip(cuts, cuts[1:])]
                torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('kind', ['gpt2','llama'])
def test_generate_on_a_static_cache(kind):
    model = switchable(kind)
    cfg = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, cache_implementation='static', disable_compile=True)
    with torch.no_grad(), use_strategy(model, PER_TOKEN, KEYS): got = model.generate(IDS, attention_mask=MASK, generation_config=cfg)[:, IDS.shape[1]:]
    assert got.tolist()==reread(model, PER_TOKEN, IDS, MASK)

def test_a_cache_of_the_future():
    "A name that nobody knows is an error before anything is computed, not position 0."
    model = switchable('llama'); forward = type(model.model).forward
    def renamed(self, input_ids=None, attention_mask=None, memory=None, **kwargs): return forward(self, input_ids, attention_mask=attention_mask, **kwargs)
    model.model.forward = renamed.__get__(model.model)
    with torch.no_grad(), use_strategy(model, PER_TOKEN, KEYS[:1]):
        model.model(IDS[:1])
        with pytest.raises(ValueError, match='a pass with memory, a DynamicCache'): model.model(IDS[:1], memory=DynamicCache(config=model.config))
        with pytest.raises(ValueError, match='a pass with memory, a DynamicCache'): model.model(IDS[:1], None, DynamicCache(config=model.config))

@pytest.mark.parametrize('kind', ['gpt2','opt'])
def test_threads(kind):
    "Strategies at work in threads over one model: each draws for itself, and a thread without one is not looked at."
    model = switchable(kind)
    jobs = [(PER_TOKEN, 0), (PER_TOKEN, 1), (strategy('random_profile', LIGHT), 0), (strategy('random_layer', LIGHT), 0), (Strategy('w4', LIGHT[1:2], 'run'), 0), None, 'w8']
    @torch.no_grad()
    def run(job, rows=3):
        if job is None: return model(IDS[:2]).logits                                 # another number of rows than any strategy has keys for
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

def test_hooks_go_with_the_block():
    model = switchable('opt'); decoder = model.get_decoder(); before = dict(decoder._forward_pre_hooks)
    with pytest.raises(ValueError, match='3 keys for a batch of 2 rows'), use_strategy(model, PER_TOKEN, KEYS): model(IDS[:2])
    assert dict(decoder._forward_pre_hooks)==before
