"torch.compile: the same results at every profile, few graph breaks, and no compilation when the profile changes."
import subprocess, sys, threading
import pytest, torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
import switchable_llm as sl
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import make_switchable_, use_profile
from switchable_llm.data.embedded import tiny_squad
from switchable_llm.data.encoding import collate, encode
from switchable_llm.joint_training import fixed_profile
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.models.loading import load_model
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.packed import load_packed

NAMES = ('bw8','w4a8','bw4')
# Backends that rewrite operators add in another order. With float activations no code flips where they do.
SMOOTH = [Profile(f'w{w}', sl.Bits(w)) for w in (8, 4)]

@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset(); counters.clear()
    yield
    torch.compiler.reset()

def compiled(act='per_token', base=None, names=NAMES, **kw):
    "The model, calibrated, with adapters that do something; and a batch."
    model,tok = load_model('tiny')
    batch = collate([encode(q, tok) for q in tiny_squad(4)], tok.pad_token_id)
    model = base or model
    make_switchable_(model, names, sl.QuantConfig(act=act), **kw)
    torch.manual_seed(0); add_adapters_(model, r=4, dropout=0.)
    for l in model.switch.layers:
        for a in l.adapters.values(): torch.nn.init.normal_(a.b, std=.05)
    sl.calibrate_(model, [batch])
    return model.eval(), batch

def logits(call, model, batch, profile):
    with torch.no_grad(), use_profile(model, profile):
        return call(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'], use_cache=False).logits

def breaks(): return sum(counters['graph_break'].values())

def equal_at_all(model, batch, backend, most=0.):
    "Compare at every profile, and back, up to a share of the logits' norm; what is compiled is compiled once."
    profiles = list(model.switch.profiles)
    c = torch.compile(model, backend=backend)
    logits(c, model, batch, profiles[0])
    graphs = counters['stats']['unique_graphs']
    for p in (*profiles, profiles[0]):
        a,b = logits(c, model, batch, p),logits(model, model, batch, p)
        assert (a-b).norm()<=most*b.norm(), p
    assert counters['stats']['unique_graphs']==graphs, 'a switch of profile compiled again'
    return c

@pytest.mark.parametrize('act', ['per_token','per_tensor'])
def test_one_compiled_model_serves_every_profile(act):
    model,batch = compiled(act, embedding=True, lm_head=True)
    c = equal_at_all(model, batch, 'eager')
    assert breaks()<=len(model.transformer.h), 'more than one graph break in a block'
    assert counters['stats']['unique_graphs']<=breaks()+1
    with torch.no_grad(): model.switch.layers[1].base.weight.mul_(-1.5)   # a weight that changes is seen
    assert torch.equal(logits(c, model, batch, 'bw4'), logits(model, model, batch, 'bw4'))

def test_another_family_and_backend():
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256))
    model,batch = compiled(base=base, names=SMOOTH)
    equal_at_all(model, batch, 'aot_eager', 1e-4)
    assert breaks()<=len(model.model.layers)

def test_inductor():
    "The compiler that is used: on a model of one block, since two cores compile slowly."
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                        num_attention_heads=2, max_position_embeddings=256))
    model,batch = compiled('per_tensor', base=base, names=['bw8', *SMOOTH])
    c = equal_at_all(model, batch, 'inductor', .05)   # a code of 8 bits may flip
    for p in ('w8','w4'):
        a,b = logits(c, model, batch, p),logits(model, model, batch, p)
        assert (a-b).norm()<1e-4*b.norm(), p

def test_a_packed_model(tmp_path):
    model,batch = compiled()
    freeze(model, tmp_path/'m.safetensors', embedding=8, lm_head=8)
    packed = load_packed(tmp_path/'m.safetensors')
    equal_at_all(packed, batch, 'eager')
    assert breaks()<=len(packed.transformer.h)+2

def test_threads_have_their_own_profile():
    model,batch = compiled()
    c,found = torch.compile(model, backend='eager'),{}
    logits(c, model, batch, 'float')
    def run(p): found[p] = logits(c, model, batch, p)
    threads = [threading.Thread(target=run, args=(p,)) for p in NAMES]
    for t in threads: t.start()
    for t in threads: t.join()
    for p in NAMES: assert torch.equal(found[p], logits(model, model, batch, p)), p

def gradients(call, model, batch, profile):
    model.zero_grad()
    with use_profile(model, profile): loss = call(**batch, use_cache=False).loss
    loss.backward()
    return loss, {n:p.grad.clone() for n,p in model.named_parameters() if p.grad is not None}

@pytest.mark.parametrize('checkpointing', [False, True])
def test_training_has_the_same_gradients(checkpointing):
    "Of the adapters that the profile uses, and of no others."
    model,batch = compiled(names=SMOOTH)
    if checkpointing: model.gradient_checkpointing_enable()
    c = torch.compile(model.train(), backend='aot_eager')
    for p in ('w8','w4','w8'):
        (a,wanted),(b,found) = (gradients(f, model, batch, p) for f in (model, c))
        assert found.keys()==wanted.keys()
        torch.testing.assert_close(b, a)
        for n,g in wanted.items(): torch.testing.assert_close(found[n], g, rtol=1e-3, atol=1e-5)

def test_the_trainer_compiles(tmp_path):
    model,batch = compiled(names=SMOOTH)
    wanted = gradients(model.train(), model, batch, 'w4')[0].item()
    rows = [{k:v[i] for k,v in batch.items()} for i in range(4)]
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, max_steps=2, torch_compile=True, use_cpu=True,
                             torch_compile_backend='aot_eager', report_to=[], logging_steps=1, save_strategy='no',
                             disable_tqdm=True, learning_rate=0.)
    t = Trainer(model, args, train_dataset=rows, callbacks=[sl.SwitchCallback(fixed_profile('w4'))])
    t.train()
    assert [h['loss'] for h in t.state.log_history if 'loss' in h]==pytest.approx([wanted]*2, rel=1e-3)

@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability()!='AVX512', reason='needs two sets of instructions to choose from')
def test_code_made_for_other_instructions_is_not_read_back(tmp_path, child_env):
    "torch keeps what it compiled on disk; a process with fewer instructions must not take it."
    child = ("import torch; from switchable_llm.quantizers import fake_quant, fused_fake_quant, qparams\n"
             "torch.manual_seed(0); x = torch.randn(9, 65); qp = qparams(x.min(), x.max(), 8, True)\n"
             "assert torch.equal(fused_fake_quant(x, qp, 8, True), fake_quant(x, qp))")
    for more in ({}, dict(ATEN_CPU_CAPABILITY='avx2')):
        env = child_env | dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path)) | more
        subprocess.run([sys.executable, '-c', child], env=env, check=True, timeout=300)
