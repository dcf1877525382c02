"Adapters from PEFT and to it: its own logits, or an error that names the setting."
import json, math, shutil
from dataclasses import fields
import pytest, torch
from peft import (AdaLoraConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftModel,
                  PromptTuningConfig, VeraConfig, get_peft_model)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from switchable_llm.lora_routing import (
    PEFT_HARMLESS, adapter_keys, add_adapters_, export_peft, import_peft, use_adapter)
from switchable_llm.models.checkpoints import load_switchable, save_switchable
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.packed import load_packed
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import make_switchable_, use_profile

IDS = torch.arange(20).view(1, -1)
SIZES = dict(vocab_size=97, bos_token_id=0, eos_token_id=0)

def llama(**kw):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64)
    return LlamaForCausalLM(LlamaConfig(**SIZES | sizes | kw)).eval()

def gpt2(**kw):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SIZES | dict(n_positions=64, n_embd=32, n_layer=2, n_head=4) | kw)).eval()

def biased(): return llama(attention_bias=True, mlp_bias=True)

def trained(model, std=.2):
    "All that PEFT added does something."
    torch.manual_seed(1)
    for n,p in model.named_parameters():
        if 'lora_' in n: p.data += torch.randn_like(p)*std
    return model.eval()

def saved(folder, make, config, **kw):
    "A trained adapter as PEFT writes it; the logits of what PEFT loads of it."
    trained(get_peft_model(make(), config)).save_pretrained(folder, **kw)
    with torch.no_grad(): return PeftModel.from_pretrained(make(), folder).eval()(IDS).logits

def imported(folder, make, profiles=('bw8',), key='8', **kw):
    m = make(); make_switchable_(m, profiles, QuantConfig(act='per_token'), **kw)
    return m, import_peft(m, key, folder)

@torch.no_grad()
def ours(m, key='8'):
    with use_adapter(m, key): return m(IDS).logits

LLAMA = dict(r=4, lora_alpha=8, target_modules=['q_proj','v_proj','down_proj'])
GPT2 = dict(r=4, lora_alpha=8, target_modules=['c_attn','c_fc'], fan_in_fan_out=True)

@pytest.mark.parametrize('make,settings', [
    (llama, {}), (gpt2, {}), (biased, {}), (llama, dict(use_rslora=True)), (gpt2, dict(use_rslora=True)),
    (llama, dict(rank_pattern=dict(q_proj=2, down_proj=6))),
    (llama, dict(alpha_pattern=dict(v_proj=3.5), rank_pattern=dict(v_proj=1))),
    (llama, dict(rank_pattern={r'^model\.layers\.0\.self_attn\.q_proj':1, r'layers\.1\..*q_proj':2, 'q_proj':3})),
    (llama, dict(rank_pattern={'model.layers.1.mlp.down_proj':5}, use_rslora=True)),
    (llama, dict(rank_pattern={'q_pro':2, 'nowhere':7}, alpha_pattern={'(q|v)_proj':1})),
    (llama, dict(init_lora_weights=False)),
    (llama, dict(init_lora_weights='gaussian')),
    (llama, dict(init_lora_weights='orthogonal')),
    (llama, dict(init_lora_weights='mica')),
    (llama, dict(layers_to_transform=[1])),
    (llama, dict(target_modules=r'.*layers\.0\..*(up|gate)_proj')),
    (llama, dict(target_modules='all-linear')),
    (llama, dict(target_modules='all-linear', exclude_modules=['o_proj'])),
    (llama, dict(lora_dropout=.3)),
    (llama, dict(task_type='CAUSAL_LM', revision='main', bias='none')),
    (lambda: llama(dtype='bfloat16').to(torch.bfloat16), {}),
    (llama, dict(r=32, lora_alpha=.25)),
    (llama, dict(alpha_pattern=dict(q_proj=1e-3)))], ids=str)
def test_logits_of_peft(make, settings, tmp_path):
    want = saved(tmp_path, make, LoraConfig(**(GPT2 if make is gpt2 else LLAMA)|settings))
    m,names = imported(tmp_path, make)
    with torch.no_grad(): bare = make()(IDS).logits
    assert not torch.allclose(want.float(), bare.float(), atol=1e-4), 'the adapter does nothing'
    near = 5e-2 if m.dtype==torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours(m), want, rtol=near, atol=near)
    assert names==[s.name for l,s in zip(m.switch.layers, m.switch.sites) if '8' in l.adapters]
    trains = {n:p.requires_grad for n,p in m.named_parameters()}
    assert trains=={n:'.adapters.' in n for n in trains}

@pytest.mark.parametrize('how', ['pissa','pissa_niter_4','olora'])
def test_one_that_was_converted(how, tmp_path):
    "PiSSA and OLoRA take from the base; PEFT itself writes them as plain LoRA if it is given where they began."
    model = get_peft_model(llama(), LoraConfig(**LLAMA, init_lora_weights=how))
    config = model.peft_config['default']
    config.init_lora_weights = True; model.save_pretrained(tmp_path/'start'); config.init_lora_weights = how
    trained(model)
    with torch.no_grad(): want = model(IDS).logits
    model.save_pretrained(tmp_path/'plain', path_initial_model_for_weight_conversion=tmp_path/'start')
    assert json.loads((tmp_path/'plain'/'adapter_config.json').read_text())['r']==2*LLAMA['r']
    m,_ = imported(tmp_path/'plain', llama)
    torch.testing.assert_close(ours(m), want, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('make,settings,named', [
    (llama, dict(init_lora_weights='pissa'), "init_lora_weights='pissa'"),
    (llama, dict(init_lora_weights='pissa_niter_4'), "init_lora_weights='pissa_niter_4'"),
    (llama, dict(init_lora_weights='olora'), "init_lora_weights='olora'"),
    (llama, dict(alora_invocation_tokens=[5, 6], task_type='CAUSAL_LM'), 'alora_invocation_tokens'),
    (llama, dict(use_dora=True), 'use_dora=True'),
    (biased, dict(lora_bias=True), 'lora_bias=True'),
    (biased, dict(bias='all'), "bias='all'"),
    (biased, dict(bias='lora_only'), "bias='lora_only'"),
    (llama, dict(modules_to_save=['norm']), 'modules_to_save'),
    (llama, dict(modules_to_save=['lm_head']), 'modules_to_save'),
    (llama, dict(trainable_token_indices=[3, 4]), 'trainable_token_indices'),
    (llama, dict(layer_replication=[[0, 2], [0, 2]]), 'layer_replication'),
    (llama, dict(target_modules=['q_proj','embed_tokens']), 'embed_tokens'),
    (llama, dict(target_modules=['lm_head']), 'lm_head')], ids=str)
def test_what_peft_computes_otherwise_is_named(make, settings, named, tmp_path):
    trained(get_peft_model(make(), LoraConfig(**LLAMA|settings))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=named.replace('[', r'\[')): imported(tmp_path, make)

@pytest.mark.parametrize('kind,config', [
    ('VERA', VeraConfig(r=4, target_modules=['q_proj'])),
    ('IA3', IA3Config(target_modules=['q_proj'], feedforward_modules=[])),
    ('LOHA', LoHaConfig(r=4, target_modules=['q_proj'])),
    ('LOKR', LoKrConfig(r=4, target_modules=['q_proj'])),
    ('OFT', OFTConfig(oft_block_size=8, target_modules=['q_proj'])),
    ('ADALORA', AdaLoraConfig(total_step=10, target_modules=['q_proj'])),
    ('PROMPT_TUNING', PromptTuningConfig(num_virtual_tokens=2, task_type='CAUSAL_LM'))])
def test_other_methods(kind, config, tmp_path):
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"peft_type='{kind}': only LoRA"): imported(tmp_path, llama)

@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp('plain')/'adapter'
    saved(folder, llama, LoraConfig(**LLAMA))
    return folder

def edited(plain, to, change=lambda cfg: None, tensors=lambda t: None):
    "A copy with another configuration or other tensors."
    shutil.copytree(plain, to)
    cfg,state = json.loads((to/'adapter_config.json').read_text()),load_file(to/'adapter_model.safetensors')
    change(cfg); tensors(state)
    (to/'adapter_config.json').write_text(json.dumps(cfg))
    save_file({k:t.contiguous() for k,t in state.items()}, to/'adapter_model.safetensors')
    return to

def refused(folder, match, kind=ValueError):
    "The import fails, and the model is as it was."
    m = llama(); make_switchable_(m, ['bw8'], QuantConfig(act='per_token'))
    before = {n:p.clone() for n,p in m.named_parameters()}
    with pytest.raises(kind, match=match): import_peft(m, '8', folder)
    assert not adapter_keys(m) and all(p.requires_grad for p in m.parameters()) and m.switch.route is None
    after = dict(m.named_parameters())
    assert set(after)==set(before) and all(torch.equal(p, before[n]) for n,p in after.items())
    with use_profile(m, 'bw8'), torch.no_grad(): m(IDS)

@pytest.mark.parametrize('name', sorted({f.name for f in fields(LoraConfig)}-PEFT_HARMLESS) + ['not_invented_yet'])
def test_every_setting_that_is_not_known_to_be_harmless(name, plain, tmp_path):
    for i,value in enumerate((True, 1, 'yes', ['x'], dict(x=1))):
        refused(edited(plain, tmp_path/str(i), lambda cfg: cfg.update({name:value})), f'adapter_config.json: {name}=')

def test_a_known_setting_at_its_default_does_no_harm(plain, tmp_path):
    "All that the installed PEFT writes, and what an older or a newer one leaves out or adds."
    def least(c): [c.pop(k) for k in list(c) if k not in ('peft_type','r','lora_alpha')]
    unset = [lambda c, v=v: c.update(not_invented_yet=v) for v in (None, False, [], {}, '')]
    for i,change in enumerate((*unset, least)):
        m,_ = imported(edited(plain, tmp_path/str(i), change), llama); want,_ = imported(plain, llama)
        assert torch.equal(ours(m), ours(want))

@pytest.mark.parametrize('change,match', [
    (dict(r=0), 'r=0'), (dict(r='4'), "r='4'"), (dict(r=None), 'r=None'), (dict(r=True), 'r=True'),
    (dict(r=5), r'lora_A is \[4, 32\].*\[5, 32\] is needed'),
    (dict(r=10**12), 'is needed'),
    (dict(lora_alpha=0), 'alpha=0'),
    (dict(lora_alpha=-8), 'alpha=-8'),
    (dict(lora_alpha=math.nan), 'alpha=nan'),
    (dict(lora_alpha='8'), "alpha='8'"),
    (dict(lora_dropout=1.), r'dropout=1\.0'),
    (dict(lora_dropout=None), 'dropout=None'),
    (dict(rank_pattern=dict(q_proj=0)), r'q_proj: r=0'),
    (dict(alpha_pattern=dict(q_proj=0)), 'q_proj: alpha=0'),
    (dict(rank_pattern={'(':2}), 'no pattern'),
    (dict(rank_pattern={'(a+)+':2}), 'write the layers'),
    (dict(alpha_pattern={'.*.*.*.*q_proj':2}), 'write the layers'),
    (dict(rank_pattern=[1]), 'needs a mapping'), (dict(peft_type=None), 'peft_type=None')])
def test_wrong_numbers(change, match, plain, tmp_path):
    refused(edited(plain, tmp_path/'bad', lambda cfg: cfg.update(change)), match)

Q = 'base_model.model.model.layers.1.self_attn.q_proj.lora_'
@pytest.mark.parametrize('change,match', [
    (lambda t: t.pop(f'{Q}B.weight'), r'layer model\.layers\.1\.self_attn\.q_proj has no lora_B'),
    (lambda t: t.update({f'{Q}A.weight':t[f'{Q}A.weight'].T}), r'q_proj: lora_A is \[32, 4\]'),
    (lambda t: t.update({f'{Q}A.weight':t[f'{Q}A.weight'].int()}), 'q_proj: lora_A is .* torch.int32'),
    (lambda t: t.update({f'{Q}B.weight':t[f'{Q}B.weight']*math.nan}), 'q_proj: lora_B holds NaN'),
    (lambda t: t.update({f'{Q}B.bias':torch.zeros(32)}), 'lora_B.bias is no part of a plain LoRA'),
    (lambda t: t.update({'base_model.model.model.norm.weight':torch.zeros(32)}), 'model.norm.weight is no part'),
    (lambda t: t.update({f'{Q}A.weight'.replace('q_proj', 'x_proj'):torch.zeros(4, 32)}),
     "'model.layers.1.self_attn.x_proj', which is not a switchable layer"),
    (lambda t: t.clear(), 'holds no adapter')])
def test_wrong_tensors(change, match, plain, tmp_path): refused(edited(plain, tmp_path/'bad', tensors=change), match)

@pytest.mark.parametrize('name', ['adapter_config.json','adapter_model.safetensors'])
def test_damaged_files(name, plain, tmp_path):
    good = (plain/name).read_bytes()
    cuts = [good[:n] for n in (0, 7, 8, 50, -5)]
    for i,data in enumerate((*cuts, good+b'x', b'\xff'*len(good), b'['*100_000, b'null', b'{}', b'[1]')):
        bad = shutil.copytree(plain, tmp_path/str(i)); (bad/name).write_bytes(data)
        refused(bad, name)
    bad = shutil.copytree(plain, tmp_path/'gone'); (bad/name).unlink()
    refused(bad, f'{name}: missing', FileNotFoundError)
    refused(tmp_path/'nowhere', 'missing', FileNotFoundError)

def test_a_pickle_is_not_read(plain, tmp_path):
    bad = shutil.copytree(plain, tmp_path/'bad')
    torch.save(load_file(bad/'adapter_model.safetensors'), bad/'adapter_model.bin')
    (bad/'adapter_model.safetensors').unlink()
    refused(bad, 'adapter_model.bin: a pickle, which can run code')

# --- into the bank --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('order', [('4','6','8'), ('8','6','4'), ('6','8','4')])
def test_several_widths_in_any_order(order, tmp_path):
    want = {k:saved(tmp_path/k, llama, LoraConfig(**LLAMA|dict(r=r))) for k,r in (('4', 2), ('6', 3), ('8', 4))}
    m = llama(); make_switchable_(m, ['bw4','bw6','bw8'], QuantConfig(act='per_token'))
    for i,k in enumerate(order):
        import_peft(m, k, tmp_path/k)
        for j,other in enumerate(order):
            if j<=i:
                with use_profile(m, f'bw{other}'), torch.no_grad(): m(IDS)
                torch.testing.assert_close(ours(m, other), want[other], rtol=1e-5, atol=1e-5)
            else:
                with pytest.raises(ValueError, match=f"needs adapter '{other}'.*import_peft"):
                    m.switch.profile = f'bw{other}'
    back = load_switchable(save_switchable(m, tmp_path/'all', base='x'), llama())
    for k in order: assert torch.equal(ours(back, k), ours(m, k))

def test_one_beside_new_ones(plain, tmp_path):
    for first in (True, False):
        m = llama(); make_switchable_(m, ['bw6','bw8'], QuantConfig(act='per_token'))
        steps = [lambda: import_peft(m, '8', plain), lambda: add_adapters_(m, ['6'])]
        for s in steps if first else steps[::-1]: s()
        assert set(adapter_keys(m))=={'6','8'}
        with torch.no_grad(), use_profile(m, 'bw6'): m(IDS)
    with pytest.raises(ValueError, match="'8' is in the bank already"): import_peft(m, '8', plain)

def test_an_unfinished_bank_is_saved_as_it_is(plain, tmp_path):
    m = llama(); make_switchable_(m, ['bw6','bw8'], QuantConfig(act='per_token')); import_peft(m, '8', plain)
    back = load_switchable(save_switchable(m, tmp_path/'half', base='x'), llama())
    assert torch.equal(ours(back), ours(m))
    with pytest.raises(ValueError, match="needs adapter '6'"): back.switch.profile = 'bw6'

def test_a_live_profile_that_would_be_left_without(plain):
    m = llama(); make_switchable_(m, ['bw6','bw8'], QuantConfig(act='per_token')); m.switch.profile = 'bw6'
    with torch.no_grad(): want = m(IDS).logits
    with pytest.raises(ValueError, match="profile 'bw6'.* needs adapter '6'"): import_peft(m, '8', plain)
    with torch.no_grad(): assert torch.equal(m(IDS).logits, want)
    assert not adapter_keys(m) and all(p.requires_grad for p in m.parameters())

def test_what_lacks_an_adapter_says_so_wherever_it_is_asked_for(plain):
    m = llama(); make_switchable_(m, ['bw6','bw8'], QuantConfig(act='per_token')); import_peft(m, '8', plain)
    bw6 = m.switch.profiles['bw6']
    for f in (lambda: m.switch.bound['bw6'], lambda: m.switch.find('bw6'), lambda: m.switch.find(bw6),
              lambda: m.switch.bind(bw6), lambda: m.switch.add('bw6'), lambda: use_profile(m, 'bw6').__enter__(),
              lambda: setattr(m.switch, 'profile', bw6)):
        with pytest.raises(ValueError, match="profile 'bw6'.* needs adapter '6'"): f()
    with pytest.raises(ValueError, match="profile 'bw5': not on this model"): m.switch.bound['bw5']
    assert m.switch.profile.name=='float'

def test_adapters_that_come_inside_a_with_block(plain):
    "They are there at the profile of the block, and at the one that is live after it."
    m = llama(); make_switchable_(m, ['bw6','bw8'], QuantConfig(act='per_token')); m.switch.profile = 'bw8'
    with use_profile(m, 'float'): import_peft(m, '8', plain)
    with torch.no_grad(): live = m(IDS).logits
    assert torch.equal(live, ours(m)) and m.switch.settings==m.switch.bound['bw8']

def test_routes_and_names(plain):
    half = Profile('half', Bits(8, 8))
    m = llama(); make_switchable_(m, [half], QuantConfig(act='per_token'))
    import_peft(m, 'half', plain, route='profile')
    with pytest.raises(ValueError, match="route='bits': the adapters that the model has are found by 'profile'"):
        import_peft(m, '8', plain, route='bits')
    import_peft(m, 'float', plain)
    assert m.switch.route_name=='profile' and m.switch.bound['float'][0].adapter=='float'
    assert [s.adapter for s in m.switch.bound['half']][:3]==['half', None, 'half']
    with pytest.raises(ValueError, match="'a.b': needs text without a dot"): import_peft(m, 'a.b', plain)
    assert adapter_keys(m)==['half','float']

def test_freeze_is_a_choice(plain):
    m = llama(); make_switchable_(m, ['bw8']); import_peft(m, '8', plain, freeze=False)
    assert all(p.requires_grad for p in m.parameters())

def test_a_packed_model_refuses(plain, tmp_path):
    m = llama(); make_switchable_(m, ['bw8'], QuantConfig(act='per_token')); freeze(m, tmp_path/'m.safetensors')
    packed = load_packed(tmp_path/'m.safetensors')
    with torch.no_grad(): want = packed(IDS).logits
    for f in (lambda: import_peft(packed, '8', plain), lambda: add_adapters_(packed),
              lambda: export_peft(packed, '8', tmp_path/'x'), lambda: save_switchable(packed, tmp_path/'x')):
        with pytest.raises(ValueError, match='packed file'): f()
    with torch.no_grad(): assert torch.equal(packed(IDS).logits, want)
    assert not (tmp_path/'x').exists()

# --- out of it ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('make', [llama, gpt2])
def test_ranks_and_scalings_by_layer_come_back(make, tmp_path):
    targets = ['q_proj','down_proj'] if make is llama else ['c_attn','c_fc']
    ranks = {targets[0]:2, rf'.*\.1\..*{targets[1]}':3}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_rslora=True, rank_pattern=ranks,
                        alpha_pattern={targets[1]:5}, fan_in_fan_out=make is gpt2)
    saved(tmp_path/'in', make, config)
    m,_ = imported(tmp_path/'in', make)
    export_peft(m, '8', tmp_path/'out')
    with torch.no_grad(): theirs = PeftModel.from_pretrained(make(), tmp_path/'out').eval()(IDS).logits
    torch.testing.assert_close(theirs, ours(m), rtol=1e-5, atol=1e-5)
    again,_ = imported(tmp_path/'out', make)
    assert torch.equal(ours(again), ours(m))
    assert [(n, p.shape) for n,p in again.named_parameters()]==[(n, p.shape) for n,p in m.named_parameters()]

def test_the_head_and_a_bfloat16_bank(tmp_path):
    m = llama(); make_switchable_(m, ['bw8'], QuantConfig(act='per_token'), lm_head=True); add_adapters_(m, r=2)
    for l in m.switch.layers:
        nn.init.normal_(l.adapters['8'].b, std=.1); l.adapters.to(torch.bfloat16)
    export_peft(m, '8', tmp_path)
    with torch.no_grad(): theirs = PeftModel.from_pretrained(llama(), tmp_path).eval()(IDS).logits
    torch.testing.assert_close(theirs, ours(m), rtol=2e-2, atol=2e-2)
    back,_ = imported(tmp_path, llama, lm_head=True)
    torch.testing.assert_close(ours(back), ours(m), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'lm_head', which is not a switchable layer"): imported(tmp_path, llama)
