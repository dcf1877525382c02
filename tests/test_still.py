"Weights are compared once where the caller changes none, and again as soon as that may not hold."
import copy, pickle
import pytest, torch
from switchable_llm.core.switching import make_switchable_, use_profile
from switchable_llm.data.embedded import tiny_squad
from switchable_llm.data.encoding import collate, encode
from switchable_llm.joint_training import equal_exposure, fixed_profile, train
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.models.loading import load_model
from switchable_llm.profiles_eval import perplexity, room_in_batch, scoring_mode
from switchable_llm.quantizers import QuantConfig
from switchable_llm.search.gptq import quantize_
from switchable_llm.study.runs import POLICIES
from switchable_llm.training.settings import TrainConfig

@pytest.fixture
def made():
    model,tokenizer = load_model('tiny')
    make_switchable_(model, ['bw8','w4a8','mixed8648'], QuantConfig(act='per_token'))
    add_adapters_(model, r=4, dropout=0.)
    return model, tokenizer, [encode(q, tokenizer) for q in tiny_squad(16)]

def logits(model, data):
    with torch.no_grad(), use_profile(model, 'w4a8'): return model(torch.tensor([data[0].ids])).logits

def change(model): model.switch.layers[0].base.weight.data.mul_(1.5)   # torch counts no change

def test_compared_once_in_the_block_and_again_after_it(made, monkeypatch):
    model,_,data = made
    logits(model, data)
    calls,verify = [],type(model.switch).verify
    monkeypatch.setattr(type(model.switch), 'verify', lambda self: (calls.append(1), verify(self)))
    with model.switch.still():
        for _ in range(3): before = logits(model, data)
    assert len(calls)==1
    change(model)
    assert not torch.equal(logits(model, data), before) and len(calls)==2

def test_a_callback_sees_what_it_changes(made):
    model,tokenizer,data = made
    seen = []
    def callback(step, curve):
        before = logits(model, data)
        change(model)
        seen.append(torch.equal(before, logits(model, data)))
    train(model, data, fixed_profile('bw8'), TrainConfig(steps=2, batch_size=2, accumulate=1), tokenizer.pad_token_id,
          callback=callback, progress=False)
    assert seen==[False, False]

def test_a_change_between_two_scorings_is_noticed(made):
    model,tokenizer,data = made
    with use_profile(model, 'w4a8'):
        first = perplexity(model, tokenizer, data).text
        change(model)
        assert perplexity(model, tokenizer, data).text!=first

def test_a_profile_chosen_inside_stays(made):
    model,*_ = made
    with scoring_mode(model): model.switch.profile = 'bw8'
    assert model.switch.profile.name=='bw8'

def test_how_much_is_scored_at_a_time(made):
    assert room_in_batch(made[0])==2048 and room_in_batch(made[0], 100)==100

def test_equal_exposure_wants_profiles_of_one_width(made):
    model,*_ = made
    assert POLICIES['equal_exposure'](model, ['bw8','w4a8'], 0).settings==equal_exposure(['bw8','w4a8'], [8, 4], 0).settings
    with pytest.raises(ValueError, match="profile 'mixed8648' has widths 6, 4"): POLICIES['equal_exposure'](model, ['bw8','mixed8648'], 0)

def test_codes_are_the_same_in_lots_of_any_size():
    found = []
    for memory in (1, 2**31):
        model,tokenizer = load_model('tiny')
        make_switchable_(model, ['w4'], QuantConfig(act='per_token'))
        batches = [collate([encode(q, tokenizer) for q in tiny_squad(16)], tokenizer.pad_token_id)]
        quantize_(model, batches, passes=1, memory=memory)
        found.append([l.codes['nested'].codes for l in model.switch.layers])
    different = sum((a!=b).sum().item() for a,b in zip(*found))
    assert different<=1e-3*sum(c.numel() for c in found[0])   # products of many at once round otherwise on some machines

def test_settings_of_adapters_stay_as_they_were_given(made):
    assert repr(made[0].switch.layers[0].adapters['4']).startswith('LoRA(\n  r=4, alpha=16\n')
    model,_ = load_model('tiny'); make_switchable_(model, ['bw8'])
    for alpha in ('x', None, True):
        with pytest.raises(ValueError, match='alpha='): add_adapters_(model, alpha=alpha)

def test_joint_adapters_are_copied_with_their_bank(made):
    model,_,data = made
    model,_ = load_model('tiny'); make_switchable_(model, ['bw8','w4a8'], QuantConfig(act='per_token'))
    add_adapters_(model, route='shared+bits', r=6)
    for l in model.switch.layers: torch.nn.init.normal_(l.adapters['shared'].b, std=.05)
    before = logits(model, data)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, data), before)
        for l in twin.switch.layers: torch.nn.init.zeros_(l.adapters['shared'].b)
        assert not torch.equal(logits(twin, data), before) and torch.equal(logits(model, data), before)
