"Saved by `save_pretrained`, opened by `from_pretrained`: all that a model has, in the tools of transformers."
import copy, json, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering, GPT2ForQuestionAnswering
import switchable_llm as sl
from switchable_llm.core.calibration import calibrate_, learn_ranges_
from switchable_llm.core.gates import add_gates_
from switchable_llm.core.switching import make_switchable_
from switchable_llm.lora_routing import adapter_params, add_adapters_, export_peft
from switchable_llm.models.checkpoints import save_switchable
from switchable_llm.quantizers import QuantConfig
from switchable_llm.serving.packed import load_packed
from test_families import toy as toy_model
from test_peft import IDS, gpt2, llama

CALIBRATED = QuantConfig(act='per_tensor')

def full(make, profiles=('bw8','w4a8','mixed8648'), cfg=CALIBRATED, **kw):
    m = make(); make_switchable_(m, profiles, cfg, **kw)
    calibrate_(m, [dict(input_ids=IDS)]); add_adapters_(m)
    torch.manual_seed(1)
    for p in adapter_params(m).values(): torch.nn.init.normal_(p, std=.05)
    return m

def learned():
    m = full(llama); learn_ranges_(m)
    return m

def gated():
    m = full(llama); add_gates_(m, ['w4a8','w8a8'])
    return m

def base_too():
    m = llama(); make_switchable_(m, ['bw8'], CALIBRATED); calibrate_(m, [dict(input_ids=IDS)])
    add_adapters_(m, freeze=False)
    with torch.no_grad():
        for p in m.parameters(): p.add_(.01)
    return m

def frozen_in_part():
    m = full(llama); m.switch.layers[0].adapters['4'].requires_grad_(False)
    return m

def other_sites():
    m = llama(); make_switchable_(m, ['bw8'], QuantConfig(act='per_token'), dict(mlp_in=('*.up_proj',)))
    add_adapters_(m, ['8'])
    return m

def per_group(): return full(gpt2, cfg=QuantConfig(act='per_token', weight='per_group', group_size=16))
def half(): return full(lambda: gpt2().to(torch.bfloat16))   # it computes no buffers that would be cut to 16 bits
def ends(): return full(llama, embedding=True, lm_head=True)
def by_profile():
    m = llama(); make_switchable_(m, ['bw8','mixed8648'], QuantConfig(act='per_token')); add_adapters_(m, route='profile', r=3)
    return m

MODELS = dict(gpt2=lambda: full(gpt2), llama=lambda: full(llama), learned=learned, gated=gated, base_too=base_too,
              frozen_in_part=frozen_in_part, other_sites=other_sites, per_group=per_group, half=half, ends=ends,
              by_profile=by_profile, tied_ends=lambda: full(gpt2, embedding=True, lm_head=True))

@torch.no_grad()
def said(m, profile):
    with sl.use_profile(m, profile): return m(IDS).logits

def trainable(m): return {n for n,p in m.named_parameters() if p.requires_grad}

def same(a, b, close=0.):   # stacks of experts are put together anew, at other addresses: that moves the last bit
    assert type(a) is type(b) and list(a.switch.profiles)==list(b.switch.profiles)
    assert a.switch.cfg==b.switch.cfg and a.switch.sites==b.switch.sites and a.switch.route_name==b.switch.route_name
    assert trainable(a)==trainable(b)
    x,y = a.state_dict(),b.state_dict()
    assert x.keys()==y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype==y[k].dtype for k in x)
    for p in a.switch.profiles if not close else ['float']: assert (said(a, p)-said(b, p)).abs().max()<=close, p

@pytest.mark.parametrize('kind', MODELS)
def test_all_comes_back(kind, tmp_path):
    m = MODELS[kind]()
    before = copy.deepcopy(m.config.to_dict())
    m.save_pretrained(tmp_path/'m')
    assert m.config.to_dict()==before | dict(dtype=m.config.to_dict()['dtype'], architectures=[type(m).__name__])
    again = AutoModelForCausalLM.from_pretrained(tmp_path/'m')
    same(m, again)
    again.save_pretrained(tmp_path/'again')             # and once more
    same(m, AutoModelForCausalLM.from_pretrained(tmp_path/'again'))
    files = {p.name for p in (tmp_path/'m').iterdir()}
    assert files=={'config.json','generation_config.json','model.safetensors','README.md'}

def test_settings_are_short_for_a_known_family(tmp_path):
    full(llama).save_pretrained(tmp_path/'m')
    q = json.loads((tmp_path/'m'/'config.json').read_text())['quantization_config']
    assert q['quant_method']=='switchable_llm' and q['sites'] is None and len(q['saved']['adapters'])==1
    assert q['saved']['adapters'][0]['keys']==['4','6','8'] and 'layers' not in q['saved']['adapters'][0]
    assert [p['name'] for p in q['profiles']]==['bw8','w4a8','mixed8648']

def test_a_new_process_says_the_same(tmp_path, child_env):
    m = full(llama); m.save_pretrained(tmp_path/'m')
    child = '''
import sys, torch, switchable_llm as sl
from transformers import AutoModelForCausalLM
ids,folder,out = torch.load(sys.argv[1]),*sys.argv[2:]
m = AutoModelForCausalLM.from_pretrained(folder)
found = {}
for p in m.switch.profiles:
    with sl.use_profile(m, p), torch.no_grad(): found[p] = m(ids).logits
torch.save(found, out)'''
    torch.save(IDS, tmp_path/'ids.pt')
    subprocess.run([sys.executable, '-c', child, tmp_path/'ids.pt', tmp_path/'m', tmp_path/'out.pt'], check=True, env=child_env)
    for p,y in torch.load(tmp_path/'out.pt').items(): assert torch.equal(y, said(m, p)), p

def test_a_base_becomes_switchable_while_it_is_loaded(tmp_path):
    base = llama(); base.save_pretrained(tmp_path/'base')
    as_dict = dict(quant_method='switchable_llm', profiles=['bw8'], r=4)
    m = AutoModelForCausalLM.from_pretrained(tmp_path/'base', quantization_config=as_dict)
    assert m.switch.layers[0].adapters['8'].r==4 and torch.equal(said(m, 'float'), base(IDS).logits)
    mine = sl.Profile.from_dict(dict(name='mine', default='w8a8', rules=[dict(site='attn_out', bits='w4a8')]))
    cfg = sl.SwitchableConfig(['bw8', mine], sl.QuantConfig(act='per_token'), lm_head=True, profile='mine')
    m = AutoModelForCausalLM.from_pretrained(tmp_path/'base', quantization_config=cfg, dtype=torch.bfloat16)
    assert m.switch.profile==mine and m.dtype==torch.bfloat16 and any(s.site=='lm_head' for s in m.switch.sites)
    assert not hasattr(m.config, 'quantization_config') and not m.is_quantized

def test_a_span_head_is_kept(tmp_path):
    torch.manual_seed(0)
    m = GPT2ForQuestionAnswering(gpt2().config).eval()
    make_switchable_(m, ['bw8'], QuantConfig(act='per_token')); add_adapters_(m)
    m.save_pretrained(tmp_path/'m')
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path/'m')
    with sl.use_profile(m, 'bw8'), sl.use_profile(again, 'bw8'):
        assert torch.equal(m(IDS).start_logits, again(IDS).start_logits)

# --- other ways in --------------------------------------------------------------------------------------------------

def in_cache(folder, cache, name):   # as huggingface_hub keeps what it has fetched
    root,commit = cache/f"models--{name.replace('/', '--')}",'a'*40
    (root/'refs').mkdir(parents=True); (root/'refs'/'main').write_text(commit)
    shutil.copytree(folder, root/'snapshots'/commit)

@pytest.mark.parametrize('packed', [False, True])
def test_a_name_on_the_hub(packed, tmp_path, child_env):
    model,tokenizer = sl.load('tiny'); sl.make_switchable(model, ['bw8'])
    if packed:
        sl.freeze(model, tmp_path/'m.safetensors', tokenizer=tokenizer); model,_ = sl.load(tmp_path/'m.safetensors')
    model.save_pretrained(tmp_path/'m'); tokenizer.save_pretrained(tmp_path/'m')
    in_cache(tmp_path/'m', tmp_path/'cache', 'me/mine')
    child = '''
import torch, switchable_llm as sl
from transformers import AutoModelForCausalLM
a,_ = sl.load('me/mine')
b = AutoModelForCausalLM.from_pretrained('me/mine')
ids = torch.arange(1, 9)[None]
with sl.use_profile(a, 'bw8'), sl.use_profile(b, 'bw8'), torch.no_grad(): assert torch.equal(a(ids).logits, b(ids).logits)
print(type(a.switch).__name__, a.dtype)'''
    done = subprocess.run([sys.executable, '-c', child], check=True, text=True, capture_output=True,
                          env=child_env | dict(HF_HUB_CACHE=str(tmp_path/'cache'), HF_HUB_OFFLINE='1'))
    assert done.stdout.split()==['PackedSwitch' if packed else 'Switch', 'torch.float32']

def test_the_front_door_opens_it_too(tmp_path):
    model,tokenizer = sl.load('tiny'); model.to(torch.bfloat16); sl.make_switchable(model, ['bw8'])
    model.save_pretrained(tmp_path/'m'); tokenizer.save_pretrained(tmp_path/'m')
    again,tok = sl.load(tmp_path/'m')
    assert again.dtype==torch.bfloat16 and len(tok)==len(tokenizer)          # as it was saved
    assert sl.load(tmp_path/'m', dtype='float32')[0].dtype==torch.float32
    with pytest.raises(ValueError, match='leave base out'): sl.load(tmp_path/'m', base='tiny')

def test_a_checkpoint_of_an_older_version_becomes_whole(tmp_path):
    model,tokenizer = sl.load('tiny'); sl.make_switchable(model, ['bw8'])
    save_switchable(model, tmp_path/'m', 'tiny')
    older,_ = sl.load(tmp_path/'m')
    older.save_pretrained(tmp_path/'m')                    # in its place
    assert not (tmp_path/'m'/'switchable.json').exists() and not (tmp_path/'m'/'adapters.safetensors').exists()
    same(older, AutoModelForCausalLM.from_pretrained(tmp_path/'m'))

# --- what stays ---------------------------------------------------------------------------------------------------

def contents(folder): return {p.name:p.read_bytes() for p in Path(folder).iterdir()}

@pytest.mark.parametrize('there', ['base','gguf','other method','broken config'])
def test_another_model_is_not_replaced(there, tmp_path):
    folder = tmp_path/'there'; folder.mkdir()
    if there=='base': llama().save_pretrained(folder)
    if there=='gguf': (folder/'m.gguf').write_bytes(b'GGUF')
    if there=='other method': (folder/'config.json').write_text('{"quantization_config": {"quant_method": "gptq"}}')
    if there=='broken config': (folder/'config.json').write_text('{')
    before = contents(folder)
    with pytest.raises(FileExistsError, match='is not a switchable model: it stays as it is'): full(llama).save_pretrained(folder)
    assert contents(folder)==before and [p.name for p in tmp_path.iterdir()]==['there']

def test_what_stands_beside_stays(tmp_path):
    folder = tmp_path/'m'; folder.mkdir()
    for n in ('notes.txt','tokenizer.json','optimizer.pt','README.md'): (folder/n).write_text(n)
    for _ in range(2): full(llama).save_pretrained(folder)
    assert all((folder/n).read_text()==n for n in ('notes.txt','tokenizer.json','optimizer.pt','README.md'))

def test_a_file_in_the_way(tmp_path):
    (tmp_path/'f').write_text('x')
    with pytest.raises(OSError, match='is a file'): full(llama).save_pretrained(tmp_path/'f')
    with pytest.raises(OSError, match='is a file, not a folder'): full(llama).save_pretrained(tmp_path/'f'/'m')

def test_a_write_that_fails_leaves_the_older_one(tmp_path, monkeypatch):
    folder,m = tmp_path/'m',full(llama)
    m.save_pretrained(folder); before = contents(folder)
    def broken(*a, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('transformers.modeling_utils.safe_save_file', broken)
    with pytest.raises(OSError, match='no space left on the disk'): m.save_pretrained(folder)
    assert contents(folder)==before and [p.name for p in tmp_path.iterdir()]==['m']
    assert not hasattr(m.config, 'quantization_config')

def test_files_of_two_models_are_told(tmp_path):
    a,b = full(llama),full(llama)
    with torch.no_grad(): b.switch.layers[0].adapters['8'].b.add_(1)
    a.save_pretrained(tmp_path/'a'); b.save_pretrained(tmp_path/'b')
    shutil.copy(tmp_path/'b'/'model.safetensors', tmp_path/'a')
    with pytest.raises(ValueError, match='damaged, or files of two models'): AutoModelForCausalLM.from_pretrained(tmp_path/'a')

def test_pushing_is_a_step_of_its_own(tmp_path):
    with pytest.raises(ValueError, match='push_to_hub'): full(llama).save_pretrained(tmp_path/'m', push_to_hub=True)
    assert not (tmp_path/'m').exists()

def test_a_gathered_state_is_what_is_saved(tmp_path):   # as trainers of several processes give it
    m = full(llama)
    state = {k:v+1 if '.adapters.' in k else v for k,v in m.state_dict().items()}
    m.save_pretrained(tmp_path/'m', state_dict=state)
    m.load_state_dict(state)
    same(m, AutoModelForCausalLM.from_pretrained(tmp_path/'m'))
    m.save_pretrained(tmp_path/'n', is_main_process=False); assert not (tmp_path/'n').exists()

# --- strangers ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('change,match', [
    (lambda q: q['saved'].update(gates=[dict(layer='x', key='y', type='z', spec={})]), "gates: 'x' is none of its layers"),
    (lambda q: q['saved'].update(frozen=['no.such']), 'no.such'),
    (lambda q: q['saved'].update(trained=['no.such']), 'no.such'),
    (lambda q: q['saved']['adapters'][0].update(layers=['lm_heat']), "'lm_heat' is none of its layers"),
    (lambda q: q['saved']['adapters'][0].update(r='many'), 'adapters'),
    (lambda q: q['saved']['adapters'][0].update(keys=3), 'adapters'),
    (lambda q: q.update(sites={'mlp_in': ['*.nothing']}), 'no layer matches'),
    (lambda q: q.update(sites=5), 'sites'),
    (lambda q: q.update(quantizer=dict(nothing=1)), 'quantizer'),
    (lambda q: q.update(saved=[1]), 'saved'),
    (lambda q: q.update(more='x'), 'more')])
def test_a_configuration_from_a_stranger(change, match, tmp_path):
    full(llama).save_pretrained(tmp_path/'m')
    config = tmp_path/'m'/'config.json'
    d = json.loads(config.read_text()); change(d['quantization_config']); config.write_text(json.dumps(d))
    with pytest.raises((ValueError, TypeError), match=match): AutoModelForCausalLM.from_pretrained(tmp_path/'m')

def test_a_pickle_is_not_opened(tmp_path):
    full(llama).save_pretrained(tmp_path/'m')
    state = load_file(tmp_path/'m'/'model.safetensors'); (tmp_path/'m'/'model.safetensors').unlink()
    torch.save(state, tmp_path/'m'/'pytorch_model.bin')
    with pytest.raises(ValueError, match='a pickle'): AutoModelForCausalLM.from_pretrained(tmp_path/'m')

@pytest.mark.parametrize('device_map', [{'':'cpu'}, 'cpu'])
def test_a_packed_folder_on_a_device(device_map, tmp_path):
    model,tokenizer = sl.load('tiny'); sl.make_switchable(model, ['bw8'])
    sl.freeze(model, tmp_path/'m.safetensors'); packed = load_packed(tmp_path/'m.safetensors')
    packed.save_pretrained(tmp_path/'m')
    again = AutoModelForCausalLM.from_pretrained(tmp_path/'m', device_map=device_map)
    assert torch.equal(again(IDS).logits, packed(IDS).logits)
    assert AutoModelForCausalLM.from_pretrained(tmp_path/'m', dtype=torch.bfloat16).dtype==torch.bfloat16

# --- what a second reading found -----------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['mixtral','phimoe','qwen3_moe'])
def test_experts_keep_their_adapters(kind, tmp_path):
    "transformers writes experts under the names of the hub; the adapters of ours keep the names of their layers."
    base = toy_model(kind); base.save_pretrained(tmp_path/'base')
    m = AutoModelForCausalLM.from_pretrained(tmp_path/'base', quantization_config=sl.SwitchableConfig(['bw8','w4a8']))
    torch.manual_seed(1)
    for p in adapter_params(m).values(): torch.nn.init.normal_(p, std=.05)
    m.save_pretrained(tmp_path/'m')
    same(m, AutoModelForCausalLM.from_pretrained(tmp_path/'m'), close=1e-5)

def test_threads_save_one_model(tmp_path):
    m = full(llama)
    with ThreadPoolExecutor(3) as pool: list(pool.map(lambda i: m.save_pretrained(tmp_path/str(i)), range(12)))
    for i in range(12): assert 'quantization_config' in json.loads((tmp_path/str(i)/'config.json').read_text())

def test_only_files_of_the_model_go(tmp_path):
    m = full(llama); m.save_pretrained(tmp_path, max_shard_size='20KB')
    for n in ('model-packed.safetensors','model.bw4.safetensors'): (tmp_path/n).write_text('mine')
    m.save_pretrained(tmp_path)
    assert all((tmp_path/n).read_text()=='mine' for n in ('model-packed.safetensors','model.bw4.safetensors'))
    assert not list(tmp_path.glob('model-0*')) and not (tmp_path/'model.safetensors.index.json').exists()

def test_a_base_beside_adapters_is_not_replaced(tmp_path):
    llama().save_pretrained(tmp_path/'b'); m = full(llama)
    save_switchable(m, tmp_path/'a', 'b')
    for p in (tmp_path/'a').iterdir(): shutil.copy(p, tmp_path/'b')
    before = contents(tmp_path/'b')
    with pytest.raises(FileExistsError): m.save_pretrained(tmp_path/'b')
    assert contents(tmp_path/'b')==before

def test_a_packed_folder_keeps_what_was_set(tmp_path):
    model,tokenizer = sl.load('tiny'); sl.make_switchable(model, ['bw8','w4a8'])
    sl.freeze(model, tmp_path/'m.safetensors'); packed = load_packed(tmp_path/'m.safetensors')
    packed.generation_config.max_new_tokens = 33; packed.switch.profile = 'w4a8'
    packed.save_pretrained(tmp_path/'m')
    again = AutoModelForCausalLM.from_pretrained(tmp_path/'m')
    assert again.generation_config.max_new_tokens==33 and again.switch.profile.name=='w4a8'
    assert 'w4a8' in (tmp_path/'m'/'README.md').read_text()

def test_the_class_is_named_where_it_does_not_fit(tmp_path):
    full(gpt2).save_pretrained(tmp_path/'m')
    with pytest.raises(ValueError, match='was saved as GPT2LMHeadModel, and this is a GPT2Model'): AutoModel.from_pretrained(tmp_path/'m')

@pytest.mark.parametrize('wrong', [dict(profiles=5), dict(profiles=[['x']]), dict(profile=['x']), dict(route=['bits']), dict(what=1),
                                   dict(embedding='yes'), dict(r=10**12)])
def test_settings_of_another_kind(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): sl.SwitchableConfig(**wrong)

def test_an_adapter_names_the_base_and_not_the_folder(tmp_path):
    "After reopening too: on the switchable folder, PEFT would add the adapter to what has it already."
    adapter = tmp_path/'adapter'
    llama().save_pretrained(tmp_path/'base')
    model = AutoModelForCausalLM.from_pretrained(tmp_path/'base')
    sl.make_switchable(model, ['bw8'])
    model.save_pretrained(tmp_path/'mine')
    again = AutoModelForCausalLM.from_pretrained(tmp_path/'mine')
    export_peft(again, 'shared', adapter)
    assert json.loads((adapter/'adapter_config.json').read_text())['base_model_name_or_path']==str(tmp_path/'base')
