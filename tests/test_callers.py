"One model, many callers: each gets its own profile, a pass ends as it began, and no weight is stale."
import asyncio, copy, os, pickle, random
import pytest, torch
from concurrent.futures import ThreadPoolExecutor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from switchable_llm.core.gates import add_gates_, use_gates
from switchable_llm.lora_routing import add_adapters_, use_adapter
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.packed import load_packed
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.search.strategies import strategy, use_strategy
from switchable_llm.core.profiles import Profile, Rule
from switchable_llm.core.calibration import learn_ranges_, calibrate_
from switchable_llm.core.switching import make_switchable_, use_profile

REQUESTS = int(os.environ.get('SWITCHABLE_LLM_REQUESTS', 2000))   # 100,000 by hand
SIZES = dict(vocab_size=97, bos_token_id=0, eos_token_id=0)
IDS = torch.arange(1, 21).view(1, -1)
MIXED = Profile('mixed', Bits(8, 8), (Rule(Bits(4, 8), site=('mlp_in',)), Rule(Bits(6, 6), layers=(0,))))
PROFILES = ['bw4', 'bw6', 'bw8']

def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **SIZES)).eval()
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, **SIZES)).eval()

def switchable(make=llama, act='per_token', adapters=True):
    m = make()
    make_switchable_(m, PROFILES, QuantConfig(act=act))
    if adapters:
        add_adapters_(m, dropout=0.)
        torch.manual_seed(1)
        for n,p in m.named_parameters():
            if '.adapters.' in n: p.data += torch.randn_like(p)*.1
    return m.eval()

@torch.no_grad()
def logits(m, shift=0): return m((IDS+shift) % 97, use_cache=False).logits

def at_each(m, *profiles):
    found = {}
    for p in profiles:
        with use_profile(m, p): found[p] = logits(m)
    assert len({t.numpy().tobytes() for t in found.values()})==len(profiles), 'profiles that agree would test nothing'
    return found

# --- threads, tasks ---

def wrong_answers(ask, wanted, requests, threads=8):
    "Number of wrong answers of `ask(key)` among requests from many threads, each with keys in an order of its own."
    def caller(seed):
        rng,wrong = random.Random(seed),0
        for _ in range(requests//threads):
            key = rng.choice(list(wanted))
            wrong += not torch.equal(ask(key), wanted[key])
        return wrong
    with ThreadPoolExecutor(threads) as pool: return sum(pool.map(caller, range(threads)))

@pytest.mark.parametrize('make', [gpt2, llama])
def test_each_thread_gets_the_profile_that_it_asked_for(make):
    m = switchable(make)
    wanted = at_each(m, *PROFILES, MIXED, 'float')
    def ask(p):
        with use_profile(m, p): return logits(m)
    assert wrong_answers(ask, wanted, REQUESTS)==0
    assert m.switch.profile.name=='float'

def test_packed_generation_in_threads(tmp_path):
    freeze(switchable(), tmp_path/'m.safetensors')
    m = load_packed(tmp_path/'m.safetensors')
    keys = [(p, s) for p in (*PROFILES, MIXED) for s in (0, 7)]
    kw = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    def ask(key):
        with use_profile(m, key[0]): return m.generate((IDS+key[1]) % 97, attention_mask=torch.ones_like(IDS), **kw)
    wanted = {k:ask(k) for k in keys}
    assert wrong_answers(ask, wanted, REQUESTS)==0

def test_the_default_is_for_those_who_chose_nothing():
    m = switchable()
    wanted = at_each(m, 'bw4', 'bw8')
    m.switch.profile = 'bw8'
    with use_profile(m, 'bw4'):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: m.switch.profile.name).result()=='bw8'
            assert torch.equal(pool.submit(logits, m).result(), wanted['bw8'])
            carried = m.switch.carry(logits)
            assert torch.equal(pool.submit(carried, m).result(), wanted['bw4'])   # carried along on purpose
        assert torch.equal(logits(m), wanted['bw4'])
    assert m.switch.profile.name=='bw8'

def test_asynchronous_tasks():
    m = switchable()
    wanted = at_each(m, *PROFILES)
    async def ask(p):
        with use_profile(m, p):
            for _ in range(5):
                await asyncio.sleep(0)
                assert m.switch.profile.name==p and torch.equal(logits(m), wanted[p])
                assert torch.equal(await asyncio.to_thread(logits, m), wanted[p])
    async def all_at_once(): await asyncio.gather(*(ask(p) for p in PROFILES*4))
    asyncio.run(all_at_once())
    assert m.switch.profile.name=='float'

def test_a_pass_ends_at_the_profile_it_began_with():
    m = switchable()
    wanted = at_each(m, 'bw4', 'bw8')
    m.switch.profile = 'bw4'
    hook = m.model.layers[0].register_forward_hook(lambda *a: setattr(m.switch, 'profile', 'bw8'))
    assert torch.equal(logits(m), wanted['bw4']) and m.switch.profile.name=='bw8'
    assert torch.equal(logits(m), wanted['bw8'])
    m.switch.profile = 'bw4'
    with use_profile(m, 'bw4'):
        assert torch.equal(logits(m), wanted['bw4']) and m.switch.profile.name=='bw8'
    assert m.switch.profile.name=='bw4'
    hook.remove()
    def fails(*a): raise KeyError('in the middle')
    hook = m.model.layers[1].register_forward_hook(fails)
    with pytest.raises(KeyError): logits(m)
    hook.remove()
    assert m.switch.frame is None and torch.equal(logits(m), wanted['bw4'])

def test_gates_strategies_and_adapters_are_the_callers_own():
    m = switchable()
    add_gates_(m, ('w4a4', 'w8a8'))
    wanted = at_each(m, 'bw4', 'bw8')
    m.switch.profile = 'bw8'
    with ThreadPoolExecutor(1) as other:
        def unchanged(): assert torch.equal(other.submit(logits, m).result(), wanted['bw8'])
        with use_gates(m) as gates:
            assert 'gates' in m.switch.profiles
            unchanged()
            assert not gates.counts and other.submit(lambda: 'gates' in m.switch.profiles).result() is False
        with use_strategy(m, strategy('fixed_bw4'), ['a']):
            unchanged()
            assert torch.equal(logits(m), wanted['bw4'])
        with use_adapter(m, None): unchanged(); assert not torch.equal(logits(m), wanted['bw8'])
    assert torch.equal(logits(m), wanted['bw8'])

def test_copies_have_their_own_profile():
    m = switchable()
    wanted = at_each(m, 'bw4', 'bw8')
    for c in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        c.switch.profile = 'bw4'
        assert m.switch.profile.name=='float' and c.switch is not m.switch
        assert torch.equal(logits(c), wanted['bw4'])
        with use_profile(m, 'bw8'), use_profile(c, 'bw4'):
            assert torch.equal(logits(m), wanted['bw8']) and torch.equal(logits(c), wanted['bw4'])

def test_assigning_to_the_model_is_an_error_and_not_nothing():
    m = switchable()
    m.profile = 'bw4'
    with pytest.raises(AttributeError, match='model.switch.profile'): logits(m)

# --- gradient checkpointing ---

def gradients(checkpointing, make=llama):
    m = switchable(make)
    m.train()
    if checkpointing: m.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    if checkpointing and checkpointing['use_reentrant']: m.enable_input_require_grads()
    total = 0.
    for p in ('bw4', 'bw8'):
        m.switch.profile = p
        total = total + m(IDS, labels=IDS, use_cache=False).loss
    total.backward()
    return {n:p.grad for n,p in m.named_parameters() if p.grad is not None}

@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('make', [gpt2, llama])
def test_recomputation_runs_at_the_profile_of_its_pass(make, reentrant):
    want,got = gradients(None, make),gradients(dict(use_reentrant=reentrant), make)
    assert want.keys()==got.keys() and {n.split('.adapters.')[1][0] for n in want}=={'4','8'}
    assert all(torch.equal(want[n], got[n]) for n in want)

def test_checkpointing_by_hand_is_carried_or_refused():
    m = switchable()
    m.train()
    layer,x = m.model.layers[0].mlp,torch.randn(1, 5, 32, requires_grad=True)
    def loss(function):
        out = []
        for p in ('bw4', 'bw8'):
            with use_profile(m, p): out.append(function(layer, x).sum())
        return sum(out)
    loss(lambda f, x: f(x)).backward()
    want,x.grad = x.grad,None
    hand = torch.utils.checkpoint.checkpoint
    loss(lambda f, x: hand(m.switch.carry(f), x, use_reentrant=False)).backward()
    assert torch.equal(x.grad, want)
    with pytest.raises(RuntimeError, match='gradient_checkpointing_enable'):
        loss(lambda f, x: hand(f, x, use_reentrant=False)).backward()

# --- no stale weights ---

def by_data(w): w.data[3, 5] += 1.
def by_numpy(w): w.detach().numpy()[2] *= -1
def by_swap(w): w.data[[0, 1]] = w.data[[1, 0]].clone()
def by_detached(w): w.detach().mul_(1.5)
def by_inference_mode(w):
    with torch.inference_mode(): w.mul_(1.1)
def by_new_data(w): w.data = w.data*2
CHANGES = by_data, by_numpy, by_swap, by_detached, by_inference_mode, by_new_data

@pytest.mark.parametrize('change', CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize('kernel', ['auto', 'float'])
def test_a_changed_weight_is_quantized_anew(kernel, change):
    m = switchable()
    m.switch.kernel = kernel
    before = at_each(m, 'bw4', 'bw8')
    change(m.model.layers[1].mlp.down_proj.weight)
    fresh = switchable()
    fresh.load_state_dict(m.state_dict())
    fresh.switch.kernel = kernel
    for p in before:
        with use_profile(m, p), use_profile(fresh, p):
            assert torch.equal(logits(m), logits(fresh)) and not torch.equal(logits(m), before[p])
    layer,x = m.model.layers[1].mlp.down_proj,torch.randn(3, 64)
    with use_profile(m, 'bw4'), torch.no_grad():       # also without a pass of the model
        layer(x); change(layer.weight)
        twin = copy.deepcopy(m).model.layers[1].mlp.down_proj   # a copy starts at what is live here
        assert torch.equal(layer(x), twin(x))

@pytest.mark.parametrize('fused', [False, True])
def test_training_all_weights_with_a_fused_optimizer(fused):
    m = switchable(adapters=False)
    m.requires_grad_(True)
    m.switch.profile = 'bw8'
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2, fused=fused)
    for _ in range(3):
        logits(m)
        m(IDS, labels=IDS).loss.backward()
        optimizer.step(); optimizer.zero_grad()
        fresh = switchable(adapters=False)
        fresh.load_state_dict(m.state_dict())
        fresh.switch.profile = 'bw8'
        assert torch.equal(logits(m), logits(fresh))

def test_learned_ranges_with_a_fused_optimizer():
    m = switchable(gpt2, act='per_tensor')
    calibrate_(m, [dict(input_ids=IDS)])
    learn_ranges_(m)
    ranges = [p for n,p in m.named_parameters() if '.observers.' in n]
    optimizer = torch.optim.AdamW(ranges, lr=.1, fused=True)
    m.switch.profile = 'bw4'
    seen = [logits(m)]
    for _ in range(2):
        m(IDS, labels=IDS).loss.backward()
        optimizer.step(); optimizer.zero_grad()
        seen.append(logits(m))
        assert torch.equal(seen[-1], logits(copy.deepcopy(m))) and not torch.equal(*seen[-2:])

def test_calibrated_ranges_that_are_set_by_hand():
    m = switchable(gpt2, act='per_tensor')
    calibrate_(m, [dict(input_ids=IDS)])
    m.switch.profile = 'bw8'
    before = logits(m)
    for l in m.switch.layers: l.observers['8'].hi.data.mul_(.5)
    assert torch.equal(logits(m), logits(copy.deepcopy(m))) and not torch.equal(logits(m), before)

def test_one_digest_for_equal_bytes_only():
    from switchable_llm.system.digests import content_of
    w = torch.randn(40, 30)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        a = w.to(dtype)
        assert content_of(a)==content_of(a.clone())==content_of(a.T.contiguous().T)
        for change in (by_data, by_numpy, by_swap) if dtype!=torch.bfloat16 else (by_data, by_swap):
            b = a.clone(); change(b)
            assert content_of(a)!=content_of(b)
