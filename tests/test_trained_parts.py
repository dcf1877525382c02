"What can be trained beside adapters, through the loop and through files: the base, activation ranges, a head."
import copy, json
from dataclasses import replace
import pytest, torch
from transformers import GPT2Config, GPT2ForQuestionAnswering, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from switchable_llm.data.encoding import Encoded
from switchable_llm.serving.exports import merge, freeze
from switchable_llm.training.settings import TrainConfig
from switchable_llm.joint_training import fixed_profile, random_layers, random_profile, train
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.models.checkpoints import base_hash, load_switchable, save_switchable
from switchable_llm.serving.packed import load_packed
from switchable_llm.quantizers import Bits, LearnedRange, QuantConfig, quantize_weight
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import (
    added_params, base_params, kernel_report, make_switchable_, use_profile)
from switchable_llm.search.costs import held_bytes
from switchable_llm.core.calibration import calibrate_, learn_ranges_

IDS = torch.randint(3, 97, (8, 20), generator=torch.Generator().manual_seed(0))
BATCH,DATA = dict(input_ids=IDS),[Encoded(tuple(row.tolist()), 10) for row in IDS]
CFG = TrainConfig(steps=4, batch_size=4, accumulate=1, lr=1e-2, warmup=0)

def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2,
                                        max_position_embeddings=64)).eval()
BASES = dict(gpt2=gpt2, llama=llama)
# with float activations no code can flip at a tie: through any kernel, on any machine
SMOOTH = [Profile('w4', Bits(4)), Profile('w8', Bits(8))]

def model_of(kind='gpt2', act='per_tensor', learned=False, adapters=True, **kw):
    m = BASES[kind](); make_switchable_(m, ['bw4','bw8',*SMOOTH], QuantConfig(act=act)); calibrate_(m, [BATCH])
    if adapters: torch.manual_seed(1); add_adapters_(m, r=4, dropout=0., **kw)
    if learned: learn_ranges_(m)
    return m

def run(m, policy=fixed_profile('bw4'), cfg=CFG, **kw):
    return train(m, DATA, policy, cfg, progress=False, cpu=True, **kw)
def values(m): return {n:p.detach().clone() for n,p in m.named_parameters()}
def moved(m, start): return {n for n,p in m.named_parameters() if not torch.equal(p, start[n])}
@torch.no_grad()
def logits(m, profile):
    m.eval()
    with use_profile(m, profile): return m(IDS).logits

@pytest.mark.parametrize('kind', BASES)
@pytest.mark.parametrize('adapters', (True, False))
def test_full_fine_tuning(kind, adapters, tmp_path):
    "The base learns, quantized with gradient in each step; what is saved, merged and frozen is what was trained."
    m = model_of(kind, 'per_token', adapters=adapters, freeze=False); start = values(m); hashed = base_hash(m)
    curve = run(m, cfg=replace(CFG, steps=12))['curve']
    assert curve[-1][1]<curve[0][1]
    hit = moved(m, start)
    assert not any('.adapters.8.' in n for n in hit) and len(hit)>len(start)/2 and base_hash(m)!=hashed
    if adapters: assert {n for n in start if '.adapters.4.' in n}<=hit
    back = load_switchable(save_switchable(m, tmp_path/'model'), BASES[kind]())
    for p in m.switch.profiles: assert torch.equal(logits(m, p), logits(back, p))
    assert ({n for n,p in back.named_parameters() if p.requires_grad}
            =={n for n,p in m.named_parameters() if p.requires_grad})
    freeze(m, tmp_path/'model.safetensors'); packed = load_packed(tmp_path/'model.safetensors')
    for p in SMOOTH: torch.testing.assert_close(logits(packed, p.name), logits(m, p.name), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(merge(m, 'float')(IDS).logits, logits(m, 'float'))
        assert not torch.equal(logits(m, 'float'), BASES[kind]()(IDS).logits)

def test_a_trained_weight_is_quantized_from_what_it_is_now():
    m = model_of(act='per_token', freeze=False); layer = m.switch.layers[0]
    logits(m, 'bw4'); before = layer.weight_at(4)       # kept
    run(m)
    with torch.no_grad(): assert not torch.equal(layer.weight_at(4), before)
    q,_ = quantize_weight(layer.weight, 4, m.switch.cfg, layer.axis)
    with torch.no_grad():
        assert layer.weight_at(4).unique().numel()<=15*layer.out_features and q.shape==layer.weight.shape

@pytest.mark.parametrize('order', ('before','after'))
def test_ranges_stay_trainable_whenever_adapters_come(order):
    m = model_of(learned=True) if order=='after' else model_of(learned=True, adapters=False)
    if order=='before': add_adapters_(m, r=4, dropout=0.)
    assert {n for n,p in m.named_parameters() if p.requires_grad}==set(added_params(m))
    assert not any(p.requires_grad for p in base_params(m).values())
    start = values(m); run(m)
    assert moved(m, start)=={n for n in start if '.adapters.4.' in n or '.observers.4.' in n}

@pytest.mark.parametrize('kind', BASES)
def test_learned_ranges_go_through_files(kind, tmp_path):
    m = model_of(kind, learned=True); run(m, random_profile(('bw4','bw8')))
    assert any(p.abs().max()>1e-3 for n,p in m.named_parameters() if n.endswith('log_ratio'))
    back = load_switchable(save_switchable(m, tmp_path/'model'), BASES[kind]())
    assert all(isinstance(o, LearnedRange) for l in back.switch.layers for o in l.observers.values())
    freeze(m, tmp_path/'model.safetensors'); packed = load_packed(tmp_path/'model.safetensors')
    for p in SMOOTH: torch.testing.assert_close(logits(packed, p.name), logits(m, p.name), rtol=1e-3, atol=1e-3)
    for p in ('bw4','bw8'):
        assert torch.equal(logits(m, p), logits(back, p))
        for a,b in zip(packed.switch.layers, m.switch.layers):
            bits = Bits.parse(f'w{p[2]}a{p[2]}').a
            assert (q := a.act_quant(bits)).scale==b.act_qparams(bits).scale.item()
            assert q.zero==b.act_qparams(bits).zero_point.item()

@pytest.mark.parametrize('what', ('base','ranges'))
def test_an_interrupted_run_ends_with_the_same_bits(what, tmp_path):
    make = lambda: model_of(act='per_tensor', learned=what=='ranges', freeze=what!='base')
    policy = random_profile(('bw4','bw8'))
    whole = make(); run(whole, policy)
    def stop(step, curve):
        if step==1: raise KeyboardInterrupt
    part = make()
    with pytest.raises(KeyboardInterrupt): run(part, policy, checkpoint=tmp_path/'run', every=1, callback=stop)
    again = make(); run(again, policy, checkpoint=tmp_path/'run', every=1)
    assert all(torch.equal(p, q) for p,q in zip(whole.parameters(), again.parameters()))
    assert moved(again, values(make()))

def test_a_head_is_kept(tmp_path):
    torch.manual_seed(0)
    base = GPT2ForQuestionAnswering(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    m = copy.deepcopy(base)
    make_switchable_(m, ['bw8'], QuantConfig(act='per_token'))
    add_adapters_(m, r=4)
    m.qa_outputs.requires_grad_(True)
    with torch.no_grad(): m.qa_outputs.weight.normal_()
    save_switchable(m, tmp_path/'model')
    assert (json.loads((tmp_path/'model'/'switchable.json').read_text())['trained']
            ==['qa_outputs.weight','qa_outputs.bias'])
    with torch.no_grad(): base.qa_outputs.weight.normal_()               # a fresh head is another one each time
    back = load_switchable(tmp_path/'model', base)
    with torch.no_grad(), use_profile(m, 'bw8'), use_profile(back, 'bw8'):
        assert torch.equal(m(IDS).start_logits, back(IDS).start_logits)

def test_calibration_under_random_layers():
    "A policy of the loop calibrates too: then every mixture can run, and the ranges are those of the mixtures."
    m = BASES['llama'](); make_switchable_(m, ['bw4','bw6','bw8'])
    assert calibrate_(m, [BATCH]*24, random_layers(m, ['w4a4','w6a6','w8a8'], seed=3))==24
    assert all(sum(int(o.seen) for o in l.observers.values())==24 and set(l.observers)=={'4','6','8'}
               for l in m.switch.layers)
    for step in range(5): assert logits(m, random_layers(m, ['w4a4','w6a6','w8a8'], seed=9)(step)[0]).isfinite().all()
    other = BASES['llama'](); make_switchable_(other, ['bw4','bw6','bw8']); calibrate_(other, [BATCH]*24)
    assert any(not torch.equal(a.observers['8'].hi, b.observers['8'].hi)
               for a,b in zip(m.switch.layers, other.switch.layers))

def test_ranges_on_a_bfloat16_model():
    m = model_of(learned=True).to(torch.bfloat16)
    assert all(p.dtype==torch.float32 for n,p in m.named_parameters() if n.endswith('log_ratio'))
    with use_profile(m, 'bw4'): m(IDS, labels=IDS).loss.backward()
    assert all(p.grad.dtype==torch.float32 for n,p in m.named_parameters() if n.endswith('4.log_ratio'))

def test_what_is_reported():
    m = model_of(learned=True); live = {k for k in kernel_report(m, 'bw8')}
    assert not any('trained' in k for k in live)                          # nobody wants a gradient in a report
    assert held_bytes(m)['base']==sum(4*p.numel() for p in gpt2().parameters())

def test_calibration_passes_learned_ranges_by():
    m = model_of(learned=True); run(m); before = {n:p.detach().clone() for n,p in added_params(m).items()}
    calibrate_(m, [dict(input_ids=IDS.flip(1))])
    assert all(torch.equal(p, before[n]) for n,p in added_params(m).items())

# --- checkpointing of activations -----------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', BASES)
def test_activations_are_computed_again(kind):
    "With a frozen base, which stays in evaluation mode: the same adapters, and each block runs twice a step."
    def trained(again):
        m,runs = model_of(kind),[]
        block = (m.transformer.h if kind=='gpt2' else m.model.layers)[0]
        m.switch.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
        if again: m.gradient_checkpointing_enable()
        train(m, DATA, fixed_profile('w8'), CFG, progress=False)
        assert not any(type(c).__name__=='Dropout' and c.training for n,c in block.named_modules() if '.adapters.' not in n)
        return len(runs), {n:p.detach().clone() for n,p in added_params(m).items()}   # of forward and backward
    (once,plain),(twice,again) = trained(False),trained(True)
    assert (once, twice)==(4, 8)
    assert all(torch.equal(plain[n], again[n]) for n in plain)
