"Adapters that are shared and own at once: kept, opened, packed, merged and exported like one of their joint rank."
import pytest, torch
import switchable_llm as sl
from switchable_llm.core.switching import use_profile
from switchable_llm.data.embedded import tiny_squad
from switchable_llm.data.encoding import encode
from switchable_llm.lora_routing import add_adapters_, adapter_params
from switchable_llm.models.checkpoints import load_switchable, save_switchable
from switchable_llm.models.loading import load_model
from switchable_llm.quantizers import QuantConfig
from switchable_llm.core.switching import make_switchable_
from switchable_llm.search.costs import profile_cost
from switchable_llm.serving.exports import freeze, merge
from switchable_llm.serving.packed import load_packed

PROFILES = 'bw8','w4a8'

@pytest.fixture(scope='module')
def made():
    model,tokenizer = load_model('tiny')
    make_switchable_(model, PROFILES, QuantConfig(act='per_token'))
    add_adapters_(model, route='shared+bits', r=6, dropout=0.)
    gen = torch.Generator().manual_seed(0)
    for p in adapter_params(model).values(): torch.nn.init.normal_(p, std=.03, generator=gen)
    return model, tokenizer, torch.tensor([encode(tiny_squad(1)[0], tokenizer).ids])

def logits(model, ids, profile):
    with torch.no_grad(), use_profile(model, profile): return model(ids).logits

def test_a_checkpoint(made, tmp_path):
    model,_,ids = made
    save_switchable(model, tmp_path/'m', base='tiny')
    again = load_switchable(tmp_path/'m', load_model('tiny')[0])
    for p in ('float', *PROFILES): assert torch.equal(logits(again, ids, p), logits(model, ids, p))
    assert again.switch.route_name=='shared+bits'

def test_what_transformers_opens(made, tmp_path):
    model,tokenizer,ids = made
    model.save_pretrained(tmp_path/'m'); tokenizer.save_pretrained(tmp_path/'m')
    again,_ = sl.load(tmp_path/'m')
    for p in PROFILES: assert torch.equal(logits(again, ids, p), logits(model, ids, p))

def test_a_packed_file(made, tmp_path):
    model,_,ids = made
    freeze(model, tmp_path/'m.safetensors')
    packed = load_packed(tmp_path/'m.safetensors')
    for p in PROFILES:
        a,b = logits(packed, ids, p),logits(model, ids, p)
        assert (a-b).norm()<.05*b.norm()
    assert packed.switch.bound['w4a8'][0].adapter=='4+shared'

def test_merged(made):
    model,_,ids = made
    with use_profile(model, 'w4a8'): whole = merge(model, 'w4a8')
    layer = model.switch.layers[0]
    lora = layer.adapters['4+shared']
    delta = (lora.b@lora.a*lora.scaling).T
    got = dict(whole.named_parameters())[f'{model.switch.sites[0].name}.weight']
    torch.testing.assert_close(got, layer.weight_at(4)+delta, rtol=1e-5, atol=1e-6)

def test_for_peft(made, tmp_path):
    "The joint adapter of a width leaves as one; so does a part of it."
    model,_,_ = made
    for key,r in {'4+shared':8, 'shared':6, '8':2}.items():
        sl.export_peft(model, key, tmp_path/key)
        plain,_ = load_model('tiny')
        make_switchable_(plain, ['w4a8'], QuantConfig(act='per_token'))
        assert sl.import_peft(plain, '4', tmp_path/key)
        assert plain.switch.layers[0].adapters['4'].r==r
    with pytest.raises(ValueError, match="adapter '5\\+shared': the bank has 4, 8, shared"):
        sl.export_peft(model, '5+shared', tmp_path/'no')

def test_a_joint_adapter_is_imported_by_parts(made, tmp_path):
    model,*_ = made
    with pytest.raises(ValueError, match="import each under its own, like '4'"): sl.import_peft(model, '4+shared', tmp_path)

def test_its_cost(made):
    model,*_ = made
    sizes = sum(l.in_features+l.out_features for l in model.switch.layers)
    assert profile_cost(model, 'bw8').adapter_bytes==2*8*sizes

def test_from_the_front_door(tmp_path):
    "Six lines as in the README, with both kinds of adapters; what was trained is what is opened."
    model,tokenizer = sl.load('tiny')
    sl.make_switchable(model, PROFILES, route='shared+bits', r=6)
    sl.train(model, tokenizer, sl.squad('tiny', n=32), steps=4, batch_size=8, progress=False)
    moved = {n.split('.')[-2] for n,p in adapter_params(model).items() if n.endswith('.b') and p.any()}
    assert 'shared' in moved and moved<={'shared','4','8'}
    model.save_pretrained(tmp_path/'m'); tokenizer.save_pretrained(tmp_path/'m')
    again,_ = sl.load(tmp_path/'m')
    assert again.switch.bound['bw8'][0].adapter=='8+shared'
    for a,b in zip(adapter_params(model).values(), adapter_params(again).values(), strict=True): assert torch.equal(a, b)
