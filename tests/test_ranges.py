"`weight_range='mse'`: the least error there is, and remembered wherever a model goes."
import json
import pytest, torch
import switchable_llm as sl
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import make_switchable_
from switchable_llm.quantizers import Bits, QuantConfig, blocks, nested_codes, quantize_weight, whole_step
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.packed import load_packed
from fuzz_packed import joined, parts
from test_packed import CLASSES, check_same, inputs, switchable

GRAINS = [dict(), dict(weight='per_group', group_size=32), dict(weight='per_tensor')]
PROFILES = [Profile(f'w{b}a8', Bits(b, 8)) for b in (4, 8)]

def nested_error(row, step):   # in float64, as the formula has it
    code = (torch.floor(row.double()/step)+120).clamp(0, 239)
    read = {b:((torch.floor(code/2**(8-b))+.5)*2**(8-b)-120)*step for b in (4, 6, 8)}
    return sum(k*float(((read[b]-row.double())**2).sum()) for b,k in zip((4, 6, 8), (1, 8, 64)))

@pytest.mark.parametrize('kw', GRAINS, ids=str)
def test_no_step_of_the_grid_is_better(kw):
    torch.manual_seed(0)
    b = blocks(torch.randn(8, 96)**3, QuantConfig(**kw))
    codes,step = nested_codes(b, 'mse')
    whole = nested_codes(b)[1]
    assert (step<=whole).all() and (step<whole).any()
    for r in range(b.shape[0]):
        for g in range(b.shape[1]):
            top = b[r, g].abs().max()/112
            grid = [whole_step((top*(1-i/40)).expand(1, b.shape[1], 1))[0, 0, 0].double() for i in range(20)]
            assert nested_error(b[r, g], step[r, g, 0].double()) <= min(nested_error(b[r, g], s) for s in grid)*(1+1e-6)

@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_independent_codes_choose_at_each_width(bits, symmetric):
    torch.manual_seed(0)
    w,errors = torch.randn(8, 96)**3,{}
    for r in ('minmax','mse'):
        cfg = QuantConfig(codes='independent', weight_symmetric=symmetric, weight_range=r)
        q,qp = quantize_weight(w, bits, cfg)
        errors[r] = (((q.double()-qp.zero_point[:, 0])*qp.scale[:, 0].double()-w.double())**2).sum(1)
    lo,hi = w.amin(1, keepdim=True).clamp(max=0).double(),w.amax(1, keepdim=True).clamp(min=0).double()
    best = torch.full((8,), torch.inf, dtype=torch.float64)
    for i in range(20):   # the same grid in float64
        a,z = lo*(1-i/40),hi*(1-i/40)
        top = 2**(bits-1)-1 if symmetric else 2**bits-1
        s = torch.maximum(-a, z)/top if symmetric else (z-a)/top
        zero = torch.zeros_like(s) if symmetric else (-a/s).round().clamp(0, top)
        q = ((w.double()/s).round()+zero).clamp(-top if symmetric else 0, top)
        best = torch.minimum(best, (((q-zero)*s-w.double())**2).sum(1))
    assert (errors['mse']<=best*(1+1e-4)).all() and (errors['mse']<=errors['minmax']*(1+1e-6)).all()

@pytest.mark.parametrize('kw', GRAINS, ids=str)
def test_a_packed_file_remembers(kw, tmp_path):
    model = switchable('llama_tied', act='per_token', weight_range='mse', **kw)
    freeze(model, tmp_path/'m.safetensors')
    packed = load_packed(tmp_path/'m.safetensors')
    assert packed.switch.cfg==model.switch.cfg
    check_same(model, packed)

def test_a_file_that_does_not_say_is_of_the_whole_range(tmp_path):
    path = tmp_path/'m.safetensors'
    freeze(switchable('llama', profiles=PROFILES), path)
    d,tensors = parts(bytearray(path.read_bytes()))
    assert 'weight_range' not in d['quantizer']   # so that earlier versions read it
    before = load_packed(path)(**inputs()).logits
    d['quantizer']['weight_range'] = 'minmax'
    joined(path, d, tensors)
    assert torch.equal(load_packed(path)(**inputs()).logits, before)
    d['quantizer']['weight_range'] = 'best'
    joined(path, d, tensors)
    with pytest.raises(ValueError, match="m.safetensors: weight_range='best'"): load_packed(path)

@pytest.mark.parametrize('kw', GRAINS[:2], ids=str)
def test_a_folder_remembers(kw, tmp_path):
    model,tokenizer = sl.load('tiny')
    sl.make_switchable(model, PROFILES, QuantConfig(act='per_token', weight_range='mse', **kw))
    model.save_pretrained(tmp_path/'m'); tokenizer.save_pretrained(tmp_path/'m')
    assert json.loads((tmp_path/'m'/'config.json').read_text())['quantization_config']['quantizer']['weight_range']=='mse'
    back,_ = sl.load(tmp_path/'m')
    ids = tokenizer('One, two.', return_tensors='pt').input_ids
    with torch.no_grad():
        for p in PROFILES:
            with sl.use_profile(model, p.name), sl.use_profile(back, p.name):
                assert torch.equal(back.eval()(ids).logits, model.eval()(ids).logits)

@pytest.mark.parametrize('kw', GRAINS, ids=str)
def test_a_base_that_is_trained_has_a_gradient(kw):
    torch.manual_seed(0)
    model = CLASSES['llama']()
    make_switchable_(model, PROFILES, QuantConfig(act='per_token', weight_range='mse', **kw))
    model.requires_grad_(True)
    model.switch.profile = 'w4a8'
    batch = inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=.3)
    losses = []
    for _ in range(5):
        loss = model(**batch, labels=batch['input_ids']).loss
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        losses.append(float(loss))
    assert all(l.weight.grad.abs().sum()>0 for l in model.switch.layers) and losses[-1]<losses[0]
