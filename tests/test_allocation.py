"Bits per layer: random oracles, faults of the measuring log, tied ends, families with several matrices per site."
import random
from dataclasses import replace
import numpy as np
import pytest, torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from switchable_llm.search.allocation import Choices, allocate, search
from switchable_llm.study.searches import random_choice, run_allocation
from switchable_llm.study.records import PRESETS
from switchable_llm.data.encoding import Encoded
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.models.checkpoints import save_switchable
from switchable_llm.search.costs import profile_cost, total
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.search.sensitivity import (
    Meter, Sensitivity, bit_options, dropped, highest, outliers, sensitivity, tolerance)
from switchable_llm.search.groups import find_groups
from switchable_llm.study.runs import calibration_batches, fit, study_data, study_model
from switchable_llm.core.profiles import Profile, Rule, as_profile
from switchable_llm.core.calibration import calibrate_
from switchable_llm.core.switching import make_switchable_, use_profile
from switchable_llm.profiles_eval import perplexity

def toy(kind='gpt2', act='per_token', adapters=False, tied=False, **kw):
    torch.manual_seed(0)
    if kind=='gpt2':
        model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=64, n_embd=16, n_layer=3, n_head=2,
                                           bos_token_id=1, eos_token_id=1))
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=24,
                                             num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
                                             max_position_embeddings=64, tie_word_embeddings=tied))
    model.eval(); make_switchable_(model, ['bw4', 'bw6', 'bw8', 'mixed8648'], QuantConfig(act=act), **kw)
    rng = random.Random(0)
    items = [Encoded(tuple(rng.choices(range(3, 60), k=n)), n-3) for n in rng.choices(range(8, 30), k=12)]
    if act=='per_tensor': calibrate_(model, [dict(input_ids=torch.randint(3, 60, (4, 20)))])
    if adapters: add_adapters_(model)
    return model, items

@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
@pytest.mark.parametrize('score', ['answer', 'text'])
def test_an_anchored_meter_says_the_same(kind, score):
    model,items = toy(kind)
    plain,anchored = (Meter(model, items, score=score, tokens_per_batch=60) for _ in range(2))
    anchored.anchor('bw6')
    for block in range(3):
        p = Profile('p', Bits(6, 6), (Rule(Bits(4, 8), layers=(block,)),))
        assert anchored._same_blocks(anchored._does(p))==block
        assert anchored(p).tolist()==plain(p).tolist()
    assert anchored('bw8').tolist()==plain('bw8').tolist()          # nothing in common: from the first block
    with pytest.raises(RuntimeError), anchored_failure(model):
        anchored(Profile('q', Bits(6, 6), (Rule(Bits(8, 8), layers=(2,)),)))
    # after a failure too
    assert all('forward' not in vars(b) for b in (model.transformer.h if kind=='gpt2' else model.model.layers))

@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_a_cache_in_few_bits_is_measured(kind):
    "Profiles that differ in their cache alone are measured each for itself, as scoring sees them, from the first block that differs."
    model,items = toy(kind)
    m = Meter(model, items, score='text', tokens_per_batch=400)
    for p in map(as_profile, ('float','k2v2','w8a8','w8a8k2v2')):
        model.switch.add(p)
        with use_profile(model, p): scored = perplexity(model, Pads, items)
        np.testing.assert_allclose(m(p), scored.nll_text, rtol=1e-5)
    assert m.runs==4 and (m('k2v2')!=m('float')).all()
    last = Profile('last', Bits(8, 8), (Rule(Bits(8, 8, 2, 2), layers=(2,)),))
    m.anchor('w8a8')
    assert m._same_blocks(m._does(last))==2
    assert m(last).tolist()==Meter(model, items, score='text', tokens_per_batch=400)(last).tolist()

class Pads: pad_token_id,eos_token_id = 0,1

class anchored_failure:   # the last block fails
    def __init__(self, model):
        self.block = (model.transformer.h if hasattr(model, 'transformer') else model.model.layers)[-1]
    def __enter__(self):
        def fail(*args): raise RuntimeError('broken')
        self.hook = self.block.register_forward_pre_hook(fail)
    def __exit__(self, *args): self.hook.remove()

def test_tied_ends_are_one_group():
    model,items = toy('llama', tied=True, embedding=True, lm_head=True)
    groups = {g.name:g for g in find_groups(model)}
    assert 'embedding+lm_head' in groups and 'lm_head' not in groups
    s = sensitivity(Meter(model, items), w_bits=(4,), a_bits=(4,))
    choices = Choices(model, s)
    for seed in range(5):
        c = np.random.default_rng(seed).integers(len(choices.options), size=len(groups))
        for of in ('bytes', 'bops'): assert choices.cost(c, of)==choices.fixed[of]+choices.pick(choices.costs[of], c)
    untied,_ = toy('llama', embedding=True, lm_head=True)
    assert {'embedding', 'lm_head'}<={g.name for g in find_groups(untied)}

def test_an_embedding_has_no_activation_bits_to_drop():
    model,items = toy('llama', embedding=True)
    s = sensitivity(Meter(model, items), w_bits=(4,), a_bits=(4,))
    assert ('embedding', 'w', 4) in s.rises and ('embedding', 'a', 4) not in s.rises
    assert Choices(model, s).rises.shape[0]==13

def test_all_choices_have_the_cache_of_the_reference():
    "What was measured beside a cache in few bits is predicted, made and found again beside it."
    model,items = toy('llama')
    reference = as_profile('w8a8k4v2')
    model.switch.add(reference)
    meter = Meter(model, items, score='text')
    s = sensitivity(meter, reference, w_bits=(4,), a_bits=(4,))
    for g in s.groups:
        low = dropped(model, reference, g, w=4)
        assert low.cache_bits(model.switch.sites)==reference.cache_bits(model.switch.sites)
        assert dropped(model, reference, g, w=8) is None
    choices = Choices(model, s)
    top = choices.choice_of(reference)
    assert top is not None and choices.profile(top).bits(model.switch.sites)==reference.bits(model.switch.sites)
    assert abs(choices.predicted(top)-meter.loss(choices.profile(top)))<1e-9
    one = (choices.options.index(Bits(4, 8)), *top[1:])
    assert abs(choices.predicted(one)-meter.loss(choices.profile(one)))<1e-6 and choices.choice_of(choices.profile(one))==one
    assert choices.choice_of(as_profile('bw8')) is None and meter.loss('bw8')!=meter.loss(reference)
    with pytest.raises(ValueError, match='option w4a4k8v8.*here w4a4'): Choices(model, s, ['w4a4k8v8'])

@pytest.mark.parametrize('seed', range(5))
def test_allocations_never_exceed_their_budget_and_never_get_worse(seed):
    model,items = toy('llama', adapters=True)
    meter,rng = Meter(model, items),np.random.default_rng(seed)
    groups,ref = tuple(find_groups(model)),highest(model)
    rises = {(g.name, k, b):tuple(rng.normal(b==4, 1, 12)*10.**rng.integers(-4, 1)) for g in groups for k in 'wa'
             for b in (4, 6)}
    choices = Choices(model, Sensitivity(ref, groups, meter.n, (1.,)*12, rises))
    for of in ('bytes', 'bops'):
        lo,hi = choices.smallest(of),total(profile_cost(model, ref), of)
        got = [allocate(choices, b, of) for b in np.linspace(lo, hi*1.1, 6)]
        assert all(a.cost<=a.budget and a.cost==total(profile_cost(model, choices.profile(a.choice)), of) for a in got)
        assert (np.diff([a.predicted for a in got])<=1e-9).all()
        for i in range(20):                                         # nothing random beats the optimum
            c = random_choice(choices, got[2].budget, of, i)
            assert choices.cost(c, of)<=got[2].budget and choices.predicted(c)>=got[2].predicted-1e-9

def test_a_bank_limits_the_choice():
    model,items = toy(adapters=True)
    assert bit_options(model)==([4, 6, 8], [4, 6, 8])
    with pytest.raises(ValueError, match="adapter '5'"): sensitivity(Meter(model, items), w_bits=(5,), a_bits=())
    model,items = toy(); add_adapters_(model, route='profile')
    with pytest.raises(ValueError, match='route'): bit_options(model)

def test_uncalibrated_bits_are_named():
    model,items = toy(act='per_tensor')
    with pytest.raises(RuntimeError, match='never calibrated for 5-bit'):
        sensitivity(Meter(model, items), w_bits=(), a_bits=(5,))

def test_a_log_that_is_damaged_in_the_middle_is_refused(tmp_path):
    model,items = toy(); log = tmp_path/'log.jsonl'
    m = Meter(model, items, log=log); [m(n) for n in ('bw4', 'bw6', 'bw8')]
    lines = log.read_text().splitlines()
    log.write_text('\n'.join([lines[0], lines[1][:30], *lines[2:]])+'\n')
    with pytest.raises(ValueError, match='log.jsonl'): Meter(model, items, log=log)
    log.write_text('')
    assert not Meter(model, items, log=log).seen

def test_a_search_that_was_stopped_goes_on(tmp_path):
    model,items = toy('llama', adapters=True)
    def go(log, stop=None):
        meter = Meter(model, items, log=log)
        choices = Choices(model, sensitivity(meter, w_bits=(4,), a_bits=(4,)))
        if stop: meter._measure = stopping(meter, stop)
        before = meter.runs
        return search(meter, choices, allocate(choices, choices.smallest('bops')*1.5, 'bops'), 8), meter.runs-before
    whole,runs = go(tmp_path/'a')
    with pytest.raises(KeyboardInterrupt): go(tmp_path/'b', stop=4)
    assert go(tmp_path/'b')==(whole, runs-4)

def stopping(meter, n):   # measures n more, then is killed
    real,left = meter._measure,[n]
    def measure(*args, **kw):
        left[0] -= 1
        if left[0]<0: raise KeyboardInterrupt
        return real(*args, **kw)
    return measure

def test_outliers_need_an_interval_clear_of_zero():
    model,items = toy('llama')
    groups = tuple(find_groups(model))
    base = {(g.name, 'a', 8):(.01,)*12 for g in groups}
    def found(v):
        return outliers(Sensitivity(highest(model), groups, (3,)*12, (1.,)*12, base | {('mlp_out 1', 'a', 8):v}))
    assert found((1.,)*12)==['mlp_out 1']
    assert found((12.,)+(0.,)*11)==[]
    assert found((.04,)*12)==[]
    assert found((-1.,)*12)==[]

def test_tolerance_is_a_price_per_saving():
    model,_ = toy('llama')
    groups = tuple(find_groups(model, 'part'))
    s = lambda attn, mlp: Sensitivity(highest(model), groups, (3,)*12, (1.,)*12,
                                      {('attn', 'w', 4):(attn,)*12, ('mlp', 'w', 4):(mlp,)*12})
    t = tolerance(model, s(1., 1.), 'w', 4)
    assert t.saved['mlp']>t.saved['attn'] and t.rise.value==0 and t.price.value<0     # as much lost, more saved
    ratio = t.saved['mlp']/t.saved['attn']
    assert abs(tolerance(model, s(1., ratio), 'w', 4).price.value)<1e-9
    assert tolerance(model, s(1., ratio), 'w', 4).rise.value>0

def test_a_checkpoint_of_another_model_is_refused(toy_folder, tmp_path):
    preset = replace(PRESETS['tiny'], name='toy', model=str(toy_folder), profiles=('bw4', 'bw8'), steps=2,
                     batch_size=4, train_n=30, calibration=2, eval_n=8)
    run = lambda **kw: run_allocation(preset, tmp_path, n_search=4, n_score=4, evaluations=2, progress=False, **kw)
    first = run()
    assert first['search_seen']<=4 and run()['front']==first['front']     # from the logs
    other,tok = study_model(preset); data = study_data(preset, tok)[0]
    calibrate_(other, calibration_batches(preset, data, tok.pad_token_id))
    fit(replace(preset, steps=3), other, tok, data, progress=False)
    with pytest.raises(ValueError, match='other settings'): run(checkpoint=save_switchable(other, tmp_path/'other'))
