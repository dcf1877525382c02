"Models that accelerate has spread by `device_map`: layers whose weights are on disk switch as the others do."
import pytest, torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel
from transformers import LlamaConfig, LlamaForCausalLM
import switchable_llm as sl
from switchable_llm.core.switching import added_params, kernel_report, make_switchable_, numbers_of, use_profile
from switchable_llm.data.encoding import Encoded
from switchable_llm.joint_training import random_profile, train
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.models.checkpoints import load_switchable, save_switchable
from switchable_llm.training.settings import TrainConfig

NAMES = ('bw8','w4a8','bw4')
IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
MODELS = dict(
    llama=lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    gpt2=lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4)),
    gemma3=lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8)))
BLOCKS = dict(llama='model.layers', gpt2='transformer.h', gemma3='model.layers')

@pytest.fixture(scope='module', params=MODELS)
def folder(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0); MODELS[request.param]().save_pretrained(out)
    return request.param, out

def load(folder, tmp_path=None):
    "The model; with a path, its second and third block are on disk."
    kind,path = folder
    if tmp_path is None: return AutoModelForCausalLM.from_pretrained(path)
    ends = dict(gpt2=('transformer.wte','transformer.wpe','transformer.ln_f','lm_head')).get(kind,
                ('model.embed_tokens','model.norm','model.rotary_emb','lm_head'))
    where = {n:'cpu' for n in ends} | {f'{BLOCKS[kind]}.{i}':'disk' if i else 'cpu' for i in range(3)}
    return AutoModelForCausalLM.from_pretrained(path, device_map=where, offload_folder=tmp_path/'offload')

def switchable(model, act='per_token', **kw):
    make_switchable_(model, NAMES, sl.QuantConfig(act=act), **kw)
    torch.manual_seed(0); add_adapters_(model, r=4, dropout=0.)
    for p in added_params(model).values(): torch.nn.init.normal_(p, std=.05)
    sl.calibrate_(model, [dict(input_ids=IDS)])
    return model.eval()

def away(model): return [l for l in model.switch.layers if l.weight.is_meta]

@pytest.mark.parametrize('act', ['per_token','per_tensor'])
def test_every_profile_is_as_without_offloading(folder, act, tmp_path):
    a,b = switchable(load(folder), act, embedding=True),switchable(load(folder, tmp_path), act, embedding=True)
    assert len(away(b))==2*len([s for s in b.switch.sites if s.layer==1])>0 and not away(a)
    assert not any(p.is_meta for p in added_params(b).values())
    for p in ('float', *NAMES, 'float', 'bw4'):
        with torch.no_grad(), use_profile(a, p), use_profile(b, p):
            assert torch.equal(b(IDS).logits, a(IDS).logits), p
            assert kernel_report(b).keys()==kernel_report(a).keys()
        assert all(not l._weights for l in away(b)), 'what was made of a weight takes the room that is not there'
    assert len(away(b))>0, 'the weights are away again'

def test_generation(folder, tmp_path):
    a,b = (switchable(m) for m in (load(folder), load(folder, tmp_path)))
    how = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(IDS))
    with use_profile(a, 'bw4'), use_profile(b, 'bw4'): assert torch.equal(b.generate(IDS, **how), a.generate(IDS, **how))

def test_training_and_what_is_saved(folder, tmp_path):
    "Adapters are trained beside weights on disk, in float arithmetic; what is saved fits a base that is all there."
    a,b = (switchable(m) for m in (load(folder), load(folder, tmp_path)))
    a.switch.kernel = b.switch.kernel = 'float'
    data = [Encoded(tuple(row.roll(i).tolist()), 4) for i in range(4) for row in IDS]
    cfg = TrainConfig(steps=4, batch_size=2, accumulate=1, lr=1e-2)
    curves = [train(m, data, random_profile(NAMES), cfg, progress=False, cpu=True)['curve'] for m in (a, b)]
    assert [c[1] for c in curves[0]]==pytest.approx([c[1] for c in curves[1]], rel=1e-4)
    save_switchable(b, tmp_path/'saved', base=str(folder[1]))
    again = load_switchable(tmp_path/'saved', load(folder))
    for n,p in added_params(again).items(): assert torch.equal(p, added_params(b)[n])

def test_the_integer_kernels_step_back_where_a_gradient_would_need_the_weight_again(tmp_path, folder):
    b = switchable(load(folder, tmp_path))
    with use_profile(b, 'bw8'):
        b(IDS, labels=IDS).loss.backward()
        assert all('weight may be away' in l.kernel_for(l.switch.settings[l.index].bits, torch.float32, 'cpu')[1]
                   for l in away(b))

def test_numbers_are_there_or_it_is_said(folder, tmp_path):
    a,b = load(folder),load(folder, tmp_path)
    pairs = zip(a.named_parameters(), b.named_parameters())
    for (n,p),(m,q) in pairs: assert n==m and torch.equal(numbers_of(b, m, q), p)
    with torch.device('meta'): empty = MODELS[folder[0]]()
    n,p = next(empty.named_parameters())
    with pytest.raises(ValueError, match='holds no numbers'): numbers_of(empty, n, p)

def test_saved_and_opened_over_devices(folder, tmp_path):
    "A model made switchable while it is loaded over devices; saved from there; opened over devices again."
    kind,path = folder
    table = load(folder, tmp_path/'first').hf_device_map
    def spread(where, **kw):
        return AutoModelForCausalLM.from_pretrained(where, device_map=table, offload_folder=str(tmp_path/'disk'), **kw)
    here = load(folder); make_switchable_(here, NAMES, sl.QuantConfig(act='per_token')); add_adapters_(here)
    away = spread(path, quantization_config=sl.SwitchableConfig(NAMES))
    for m in (here, away):
        torch.manual_seed(1)
        for n,p in added_params(m).items(): torch.nn.init.normal_(p, std=.05)
    assert any(p.is_meta for p in away.parameters())
    away.save_pretrained(tmp_path/'m')
    for m in (away, AutoModelForCausalLM.from_pretrained(tmp_path/'m'), spread(tmp_path/'m')):
        for p in here.switch.profiles:
            with torch.no_grad(), use_profile(m, p), use_profile(here, p):
                assert torch.equal(m(IDS).logits, here(IDS).logits), p
