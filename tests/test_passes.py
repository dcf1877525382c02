"Passes of a model: one that is cut short, one that is run again, one that is carried away, and copies made in the middle."
import copy
import pytest, torch
from torch.utils.checkpoint import checkpoint
from switchable_llm.core import layers
from switchable_llm.system import digests
from switchable_llm.system.digests import content_of
from switchable_llm.core.switching import make_switchable_, use_profile
from switchable_llm.data.embedded import tiny_squad
from switchable_llm.data.encoding import encode
from switchable_llm.models.loading import load_model
from switchable_llm.training.settings import TrainConfig
from switchable_llm.joint_training import random_profile, train
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.quantizers import QuantConfig
from switchable_llm.search.strategies import Strategy, use_strategy
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.packed import load_packed
from test_callers import IDS, at_each, logits, switchable

def interrupted(m):
    "A pass that Ctrl-C ends in its middle: torch calls no hooks then."
    def interrupt(*args): raise KeyboardInterrupt
    hook = m.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt): m(IDS)
    hook.remove()

@pytest.mark.parametrize('packed', [False, True])
def test_an_interrupted_pass_leaves_no_profile_behind(packed, tmp_path):
    m = switchable()
    if packed:
        freeze(m, tmp_path/'m.safetensors')
        m = load_packed(tmp_path/'m.safetensors')
    wanted = at_each(m, 'bw4', 'bw8')
    m.switch.profile = 'bw4'
    interrupted(m)
    assert m.switch.profile.name=='bw4'
    m.switch.profile = 'bw8'
    assert m.switch.profile.name=='bw8' and torch.equal(logits(m), wanted['bw8'])
    with use_profile(m, 'bw4'): interrupted(m); assert torch.equal(logits(m), wanted['bw4'])
    assert torch.equal(logits(m), wanted['bw8'])

def gradients(m, run):
    "Of a loss at two profiles, with one backward pass behind both."
    total = 0
    for p in ('bw4','bw8'):
        with use_profile(m, p): total = total+run(IDS)
    m.zero_grad(); total.backward()
    return {n:p.grad.clone() for n,p in m.named_parameters() if p.grad is not None}

@pytest.mark.parametrize('reentrant', [False, True])
def test_a_checkpoint_around_the_whole_model_is_carried_or_refused(reentrant):
    m = switchable()
    embed = m.get_input_embeddings()
    def loss(e): return m(inputs_embeds=e, labels=IDS, use_cache=False).loss
    def run(around): return lambda ids: checkpoint(around(loss), embed(ids).detach().requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match='switch.carry'): gradients(m, run(lambda f: f))
    plain = gradients(m, lambda ids: loss(embed(ids)))
    carried = gradients(m, run(m.switch.carry))
    for n,g in plain.items(): torch.testing.assert_close(carried[n], g)

@pytest.mark.parametrize('change', [lambda w: w.data.mul_(-1.7), lambda w: w.detach().numpy().__imul__(-1.7)])
def test_what_is_carried_sees_weights_that_change(change):
    m = switchable(adapters=False)
    m.switch.profile = 'bw4'
    f = m.switch.carry(lambda: logits(m))
    before = f()
    for l in m.switch.layers: change(l.base.weight)
    assert torch.equal(f(), logits(m)) and not torch.equal(f(), before)

def test_a_step_that_goes_on_with_a_text_reads_no_weight_again(monkeypatch):
    m,read = switchable(),[]
    def counted(w): read.append(1); return content_of(w)
    monkeypatch.setattr(layers, 'content_of', counted)
    with torch.no_grad(), use_profile(m, 'bw8'):
        out = m(IDS, use_cache=True); read.clear()
        out = m(IDS[:, :1], past_key_values=out.past_key_values, use_cache=True)
        assert not read
        m(IDS, use_cache=False)
        assert len(read)==len(m.switch.layers)

def test_a_copy_made_among_strategies_is_an_ordinary_one():
    m = switchable()
    wanted = at_each(m, 'bw4', 'bw8')
    m.switch.profile = 'bw4'
    with use_strategy(m, Strategy('x', ('bw4','bw8'), 'token'), ['q']): c = copy.deepcopy(m)
    assert torch.equal(logits(c), wanted['bw4'])
    c.switch.profile = 'bw8'
    assert torch.equal(logits(c), wanted['bw8'])

def test_tokens_drawn_in_one_pass_are_drawn_again_in_its_recomputation():
    def run(checkpointing):
        m = switchable().train()
        if checkpointing: m.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        mask = torch.ones_like(IDS); mask[:, :4] = 0
        with use_strategy(m, Strategy('x', ('bw4','bw8'), 'token'), ['q']):
            a,b = (m(IDS, labels=IDS, use_cache=False, attention_mask=k).loss for k in (torch.ones_like(IDS), mask))
            (a+b).backward()
        return {n:p.grad for n,p in m.named_parameters() if p.grad is not None}
    plain,again = run(False),run(True)
    for n,g in plain.items(): torch.testing.assert_close(again[n], g)

class Stopped(Exception): pass

def stop(step, curve):
    if step==2: raise Stopped

@pytest.mark.parametrize('kind', ['adapters','all, switchable','all, plain'])
def test_a_run_goes_on_with_the_model_that_was_stopped(kind, tmp_path):
    "As in a notebook: nothing is loaded anew; tied weights and those of switchable layers have several names."
    def fresh():
        model,tok = load_model('tiny')
        if kind!='all, plain': make_switchable_(model, ['bw4','bw8'], QuantConfig(act='per_token'))
        if kind=='adapters': torch.manual_seed(3); add_adapters_(model)
        return model,tok
    (model,tok),policy = fresh(),None if kind=='all, plain' else random_profile(('bw4','bw8'))
    data,cfg = [encode(q, tok) for q in tiny_squad(20)],TrainConfig(steps=6, batch_size=2, accumulate=1, lr=1e-3)
    how = dict(cfg=cfg, progress=False, cpu=True, every=2, pad_id=tok.pad_token_id)
    with pytest.raises(Stopped): train(model, data, policy, checkpoint=tmp_path, callback=stop, **how)
    train(model, data, policy, checkpoint=tmp_path, **how)
    whole,_ = fresh()
    train(whole, data, policy, **how)
    assert all(torch.equal(a, b) for a,b in zip(model.parameters(), whole.parameters(), strict=True))

@pytest.mark.parametrize('change', [lambda w: w.T.clone(), lambda w: w.roll(1, 0), lambda w: w.flip(1), lambda w: w+1])
def test_the_digest_of_other_devices_sees_where_numbers_stand(change):
    torch.manual_seed(0)
    w = torch.randint(-2**31, 2**31, (16, 16)).int()
    assert digests._sum_of_places(w)!=digests._sum_of_places(change(w)) and digests._sum_of_places(w)==digests._sum_of_places(w.clone())
