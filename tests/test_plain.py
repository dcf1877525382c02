"Only a plain model becomes switchable; a changed one is copied whole, and is not saved by halves."
import copy, io, pickle, subprocess, sys
import pytest, torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear
from transformers import AutoModelForCausalLM
from switchable_llm.serving.exports import export_float, merge
from switchable_llm.formats.torchao import export_torchao
from switchable_llm.core.gates import add_gates_
from switchable_llm.lora_routing import adapter_params, add_adapters_
from switchable_llm.models.checkpoints import load_switchable, save_switchable
from switchable_llm.quantizers import Bits
from switchable_llm.core.profiles import Profile
from switchable_llm.core.layers import QuantLayer
from switchable_llm.core.calibration import calibrate_, learn_ranges_
from switchable_llm.core.switching import make_switchable_, use_profile
from test_peft import IDS, gpt2, llama

def injected(): return inject_adapter_in_model(LoraConfig(target_modules=['q_proj']), llama())

def dynamic():
    m = llama(); m.model.layers[1].mlp.up_proj = DynamicLinear(32, 64)
    return m

def with_torchao():
    ao = pytest.importorskip('torchao.quantization', reason='the extra `torchao` is not installed')
    m = llama()
    ao.quantize_(m, ao.Int8WeightOnlyConfig(), filter_fn=lambda layer, name: name.endswith('layers.1.self_attn.o_proj'))
    return m

def eighth():
    m = llama(); layer = m.model.layers[0].mlp.gate_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e5m2), requires_grad=False)
    return m

def ints():
    m = llama(); m.lm_head.weight = nn.Parameter(torch.ones(97, 32, dtype=torch.int8), requires_grad=False)
    return m


@pytest.mark.parametrize('make,match', [
    (lambda: get_peft_model(llama(), LoraConfig(target_modules=['q_proj'])),
     r'the model is of PEFT \(PeftModel\): take the plain model out'),
    (injected, r'layer model\.layers\.0\.self_attn\.q_proj is of PEFT'),
    (lambda: get_peft_model(llama(), LoraConfig(target_modules=['q_proj'], modules_to_save=['lm_head'])), 'of PEFT'),
    (dynamic, r'layer model\.layers\.1\.mlp\.up_proj is of torch.ao, quantized'),
    (with_torchao, r'model\.layers\.1\.self_attn\.o_proj\.weight is a \w*Tensor, not plain numbers: this library'),
    (eighth, r'model\.layers\.0\.mlp\.gate_proj\.weight is torch.float8_e5m2'),
    (ints, r'lm_head\.weight is torch.int8'),
    (lambda: torch.compile(llama()), 'the model is of torch.compile'),
    (lambda: nn.DataParallel(llama()), 'its `module`')])
def test_what_is_not_plain_is_named_and_left_alone(make, match, tmp_path):
    m = make(); before,names = dict(m.named_parameters()),[(n, type(x)) for n,x in m.named_modules()]
    with pytest.raises(ValueError, match=match): make_switchable_(m)
    plain = llama(); make_switchable_(plain, ['bw8'])
    with pytest.raises(ValueError): load_switchable(save_switchable(plain, tmp_path/'c', base='x'), m)
    assert not hasattr(m, 'switch') and [(n, type(x)) for n,x in m.named_modules()]==names
    assert all(p is before[n] for n,p in m.named_parameters())

def test_what_was_taken_out_of_peft_is_plain():
    for take in ('unload','merge_and_unload'):
        m = getattr(get_peft_model(llama(), LoraConfig(target_modules=['q_proj'])), take)()
        make_switchable_(m, ['bw8'])

# --- copies ---------------------------------------------------------------------------------------------------------

def full(make):
    "A model with all that this library adds."
    m = make(); make_switchable_(m, ['bw4','bw8', Profile('half', Bits(6, 6))])
    calibrate_(m, [dict(input_ids=IDS)]); learn_ranges_(m)
    torch.manual_seed(0); add_adapters_(m, r=2); add_adapters_(m, ['float'], r=2); add_gates_(m, ['w4a4','w8a8'])
    with torch.no_grad():
        for p in adapter_params(m).values(): p.normal_(std=.1)
    return m.eval()

def pickled(m): return pickle.loads(pickle.dumps(m))

def torch_saved(m):
    file = io.BytesIO(); torch.save(m, file); file.seek(0)
    return torch.load(file, weights_only=False)

@torch.no_grad()
def said(m, p):
    with use_profile(m, p): return m(IDS).logits

@pytest.mark.parametrize('make', [llama, gpt2])
@pytest.mark.parametrize('twin_of', [copy.deepcopy, pickled, torch_saved])
def test_a_copy_is_another_model(twin_of, make):
    m = full(make); profiles = list(m.switch.profiles)
    want = {p:said(m, p) for p in profiles}
    m.switch.profile = 'bw8'; twin = twin_of(m)
    assert twin.switch is not m.switch and all(l.switch is twin.switch for l in twin.switch.layers)
    assert twin.switch.profile.name=='bw8'
    for p in profiles: assert torch.equal(said(twin, p), want[p]), p
    assert not {p.data_ptr() for p in m.parameters()} & {p.data_ptr() for p in twin.parameters()}
    twin.switch.profile = 'bw4'
    with torch.no_grad(): assert torch.equal(m(IDS).logits, want['bw8']) and torch.equal(twin(IDS).logits, want['bw4'])
    with torch.no_grad():
        for p in twin.parameters(): p.zero_()
    for p in profiles: assert torch.equal(said(m, p), want[p]), p
    twin.switch.add('mixed8648'); add_adapters_(twin, ['3'])
    assert 'mixed8648' not in m.switch.profiles and '3' not in m.switch.layers[0].adapters

def test_a_copy_made_inside_a_with_block():
    m = full(llama); want = {p:said(m, p) for p in ('bw4','float')}
    with use_profile(m, 'bw4'): twin = copy.deepcopy(m)
    assert torch.equal(said(twin, 'bw4'), want['bw4']) and torch.equal(said(m, 'float'), want['float'])
    with torch.no_grad(): assert torch.equal(m(IDS).logits, want['float'])

CHILD = """
import sys, torch
from switchable_llm.core.switching import use_profile
m, out = torch.load(sys.argv[1], weights_only=False), {}
for p in m.switch.profiles:
    with torch.no_grad(), use_profile(m, p): out[p] = m(torch.arange(20).view(1, -1)).logits
torch.save(out, sys.argv[2])"""

def test_a_pickle_in_another_process(child_env, tmp_path):
    m = full(llama); torch.save(m, tmp_path/'m.pt')
    subprocess.run([sys.executable, '-c', CHILD, tmp_path/'m.pt', tmp_path/'out.pt'], check=True, env=child_env)
    for p,y in torch.load(tmp_path/'out.pt').items(): assert torch.equal(y, said(m, p)), p

# --- saved by halves ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('adapters', [False, True])
def test_save_pretrained_keeps_everything(adapters, tmp_path):
    m = full(llama) if adapters else llama()
    if not adapters: make_switchable_(m, ['bw8'])
    for i,x in enumerate((m, copy.deepcopy(m), pickled(m))):
        x.save_pretrained(tmp_path/str(i))
        again = AutoModelForCausalLM.from_pretrained(tmp_path/str(i))
        for p in m.switch.profiles if adapters else ['float']: assert torch.equal(said(again, p), said(m, p)), p

def hooks(m): return [len(x) for x in (m._forward_hooks, m._forward_pre_hooks)]

def test_a_merged_model_is_plain_again(tmp_path):
    m = full(llama); plain = merge(m, 'bw4')
    fresh = llama()
    assert set(vars(plain))==set(vars(fresh))
    for a,b in zip(plain.modules(), fresh.modules(), strict=True):
        assert type(a) is type(b) and hooks(a)==hooks(b)
    plain.save_pretrained(tmp_path/'plain')
    again = AutoModelForCausalLM.from_pretrained(tmp_path/'plain')
    with torch.no_grad(): assert torch.equal(again(IDS).logits, plain(IDS).logits)
    make_switchable_(plain, ['bw8'])                       # and can begin anew
    assert isinstance(plain.model.layers[0].mlp.up_proj, QuantLayer)
    export_float(m, 'bw4', tmp_path/'float')

def test_a_torchao_model_says_what_to_use(tmp_path):
    pytest.importorskip('torchao', reason='the extra `torchao` is not installed')
    ao = export_torchao(full(llama), 'bw8')
    with pytest.raises(ValueError, match='use save_torchao'): ao.save_pretrained(tmp_path/'x')
    assert not list(tmp_path.iterdir())
