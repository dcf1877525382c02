"`generate()` on a packed model: native steps where they can be, the modules everywhere else, the same text."
import gc
import pytest, torch
from transformers import DynamicCache
from switchable_llm.serving.generating import LeanCache
from switchable_llm.serving.lean import LiveStep, Step, lean_tokens, live_of
from switchable_llm.system.native import native_features
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.packed import load_packed
from switchable_llm.quantizers import Bits
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import use_profile
from test_packed import switchable

pytestmark = pytest.mark.skipif('decode' not in native_features(),
                                reason='the compiled kernels are not built, or do not run on this processor')
# float activations: no code flips, so texts can be compared
FLOAT = [Profile(f'w{b}', Bits(b)) for b in (8, 6, 4)]
IDS = torch.randint(1, 97, (1, 9), generator=torch.Generator().manual_seed(5))
KW = dict(do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=12)

@pytest.fixture(scope='module', params=['gpt2','llama','llama_tied','qwen2'])
def packed(request, tmp_path_factory):
    path = tmp_path_factory.mktemp('packed')/'m.safetensors'
    freeze(switchable(request.param, profiles=FLOAT+['bw8']), path)
    return load_packed(path)

@pytest.fixture
def steps(monkeypatch):
    "Counts the tokens that native steps took."
    taken,prompt = [],Step.prompt
    monkeypatch.setattr(Step, 'prompt', lambda self, ids: (taken.append(len(ids)), prompt(self, ids))[1])
    return taken

def by_modules(packed, ids=IDS, **kw):
    return packed.generate(ids, attention_mask=torch.ones_like(ids),
                           past_key_values=DynamicCache(config=packed.config), **KW|kw)
def natively(packed, ids=IDS, **kw): return packed.generate(ids, attention_mask=torch.ones_like(ids), **KW|kw)

@pytest.mark.parametrize('profile', ['w8','w6','w4','bw8'])
def test_same_text_and_logits(packed, steps, profile):
    with use_profile(packed, profile):
        right = by_modules(packed, output_logits=True, return_dict_in_generate=True)
        assert not steps
        got = natively(packed, output_logits=True, return_dict_in_generate=True)
    assert sum(steps)==IDS.shape[1]+KW['max_new_tokens']-1
    if profile!='bw8': assert torch.equal(got.sequences, right.sequences)
    n = 12 if profile!='bw8' else 1
    a,b = torch.cat(got.logits[:n]),torch.cat(right.logits[:n])
    assert (a-b).abs().max() <= (1e-5 if profile!='bw8' else .05)*b.abs().max()

def test_one_token_of_prompt_and_one_new(packed, steps):
    one = IDS[:, :1]
    assert torch.equal(natively(packed, one, max_new_tokens=1), by_modules(packed, one, max_new_tokens=1))
    assert steps==[1]

def test_sampling_with_a_seed(packed, steps):
    kw = dict(do_sample=True, temperature=.8, top_k=20)
    torch.manual_seed(1); a = natively(packed, **kw)
    torch.manual_seed(1); b = by_modules(packed, **kw)
    assert steps and torch.equal(a, b)

@pytest.mark.parametrize('kw', [
    dict(num_beams=3), dict(num_return_sequences=2, do_sample=True), dict(use_cache=False),
    dict(output_hidden_states=True, return_dict_in_generate=True), dict(cache_implementation='static')], ids=str)
def test_what_the_step_cannot_do_the_modules_do(packed, steps, kw):
    natively(packed, **kw)
    assert not steps

def test_batches_and_padding(packed, steps):
    ids = IDS.repeat(2, 1); mask = torch.ones_like(ids); mask[0, :3] = 0
    both = packed.generate(ids, attention_mask=mask, **KW)
    assert not steps and torch.equal(both[1:], by_modules(packed))
    # one row, but padded: its prompt is for the modules
    padded = packed.generate(ids[:1], attention_mask=mask[:1], **KW)
    assert torch.equal(padded, both[:1])

def test_a_cache_goes_on(packed):
    first = natively(packed, max_new_tokens=5, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, LeanCache)
    more = packed.generate(first.sequences, attention_mask=torch.ones_like(first.sequences),
                           past_key_values=first.past_key_values, **KW|dict(max_new_tokens=7))
    assert torch.equal(more, by_modules(packed))

def test_a_cache_in_use_is_not_taken(packed):
    first = natively(packed, max_new_tokens=5, return_dict_in_generate=True)
    natively(packed, IDS.flip(1))                                     # another one, meanwhile
    more = packed.generate(first.sequences, attention_mask=torch.ones_like(first.sequences),
                           past_key_values=first.past_key_values, **KW|dict(max_new_tokens=7))
    assert torch.equal(more, by_modules(packed))

def test_the_buffer_is_used_again(packed):
    natively(packed); gc.collect()
    pool = live_of(packed).pool
    before = pool.nbytes,pool.free
    natively(packed); gc.collect()
    assert (pool.nbytes, pool.free)==before and pool.free

def test_modules_and_steps_take_turns_on_one_cache(packed):
    cache = LeanCache(packed)
    with torch.no_grad():
        packed(IDS[:, :4], past_key_values=cache)                     # all logits are asked for: the modules
        native = packed(IDS[:, 4:5], past_key_values=cache).logits    # one token: a step
        packed(IDS[:, 5:8], past_key_values=cache)
        last = packed(IDS[:, 8:9], past_key_values=cache).logits
        right = packed(IDS, use_cache=False).logits
    assert (native[:, -1]-right[:, 4]).abs().max() <= 1e-5*right.abs().max()
    assert (last[:, -1]-right[:, 8]).abs().max() <= 1e-5*right.abs().max()
    cache.crop(-2)
    assert cache.get_seq_length()==7

def test_profile_changes_in_the_middle(packed):
    step = LiveStep(packed)
    packed.switch.profile = 'w8'; text = []
    for i,t in enumerate(lean_tokens(step, IDS[0], 12)):
        text.append(t)
        if i==5: packed.switch.profile = 'w4'
    assert text[:6]==by_modules_text(packed, 'w8')[:6]
    packed.switch.profile = 'w8'

def by_modules_text(packed, profile):
    with use_profile(packed, profile): return by_modules(packed)[0, IDS.shape[1]:].tolist()

def test_streaming_and_the_end_of_the_context(packed, steps):
    class Collect:
        def __init__(self): self.seen = []
        def put(self, v): self.seen += v.flatten().tolist()
        def end(self): pass
    s = Collect()
    out = natively(packed, streamer=s)
    assert s.seen==out[0].tolist() and steps
    long = natively(packed, max_new_tokens=64-IDS.shape[1])
    assert long.shape[1]==64

def test_gradients_go_through_the_modules(packed, steps):
    x = packed(IDS, labels=IDS)
    assert x.loss.isfinite() and not steps

def test_a_copy_and_a_move_have_steps_of_their_own(packed, steps):
    import copy
    right = natively(packed)
    other = copy.deepcopy(packed)
    assert torch.equal(natively(other), right) and torch.equal(natively(packed.to('cpu')), right)
