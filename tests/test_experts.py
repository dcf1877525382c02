"Mixtures of experts: what dense families pass, with real classes at toy size; and what is refused, in words."
import copy, re
from collections import Counter
import pytest, torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
import switchable_llm as sl
from switchable_llm.core.calibration import calibrate_, learn_ranges_
from switchable_llm.core.experts import Experts, QuantExpert, expert_stacks
from switchable_llm.core.gates import add_gates_
from switchable_llm.core.layers import Setting
from switchable_llm.core.profiles import FAMILIES, Profile, Rule
from switchable_llm.core.switching import base_params, kernel_report, make_switchable_, use_profile
from switchable_llm.search.costs import held_bytes
from switchable_llm.data.encoding import Encoded
from switchable_llm.joint_training import fixed_profile, high_to_low, train
from switchable_llm.lora_routing import adapter_params, add_adapters_, export_peft
from switchable_llm.models.checkpoints import base_hash, load_switchable, save_switchable
from switchable_llm.quantizers import Bits, QuantConfig, fake_quant, fake_quant_weight, token_qparams
from switchable_llm.search.costs import profile_cost
from switchable_llm.search.groups import find_groups
from switchable_llm.search.strategies import Strategy, use_strategy
from switchable_llm.serving.exports import export_float, freeze, merge
from switchable_llm.formats.torchao import export_torchao
from switchable_llm.formats.gguf_file import export_gguf
from switchable_llm.serving.packed import check_packed, load_packed
from switchable_llm.training.settings import TrainConfig

MIXTURES = [k for k,t in FAMILIES.items() if '*.experts.down_proj' in t['mlp_out']]
SOME = ['mixtral','qwen3_moe','gpt_oss']    # the usual form twice; transposed, with biases and a gate of its own
COMMON = dict(
    vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    num_experts_per_tok=2, **dict.fromkeys(('num_local_experts','num_experts','n_routed_experts','moe_num_experts'), 4),
    moe_intermediate_size=24, shared_expert_intermediate_size=24, mlp_only_layers=[], moe_k=2)
OWN = dict(gpt_oss=dict(rope_parameters=dict(rope_type='default', rope_theta=1e4)))
MIXED = Profile('mixed', Bits(8, 8), (
    Rule(Bits(4, 8), site=('mlp_in',)), Rule(Bits(6, 6), site=('attn_qkv',), layers=(1,)),
    Rule(Bits(4, 4), glob='*.experts.2.down_proj'), Rule(Bits(), glob='*.layers.1.*.experts.3.*')))
IDS = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS); MASK[0, :4] = 0
PER_TOKEN = QuantConfig(act='per_token')

def toy(kind, **kw):
    "A small mixture of random weights, of the real class."
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON|OWN.get(kind, {})|kw)).eval()
    for p in model.parameters():
        if p.ndim>1: nn.init.normal_(p, std=.15)
    return model

def adapted(kind, cfg=PER_TOKEN, profiles=('bw4','bw8',MIXED), **kw):
    model = toy(kind); make_switchable_(model, profiles, cfg, **kw)
    calibrate_(model, [dict(input_ids=IDS, attention_mask=MASK)])
    torch.manual_seed(1); add_adapters_(model, r=4, dropout=0.)
    for p in adapter_params(model).values(): nn.init.normal_(p, std=.05)
    return model

@torch.no_grad()
def plain_logits(model): return model(IDS, attention_mask=MASK).logits[MASK.bool()]
def logits(model, profile):
    with use_profile(model, profile): return plain_logits(model)

@torch.no_grad()
def by_hand(kind, model, profile):
    "The plain model with the quantized weights put in, through its own way of running experts."
    plain = toy(kind)
    for l,s,setting in zip(model.switch.layers, model.switch.sites, model.switch.bound[profile]):
        w = l.weight_at(setting.bits.w)
        if isinstance(l, QuantExpert):
            stack,e,matrix = s.name.rsplit('.', 2)
            plain.get_submodule(stack)._parameters[matrix][int(e)] = w
        else: plain.get_submodule(s.name).weight.copy_(w)
    return plain

# --- every family of the table --------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', MIXTURES)
def test_all_that_multiplies_but_routers(kind):
    plain,model = toy(kind),toy(kind)
    names = make_switchable_(model, [MIXED], PER_TOKEN)
    dense = {n for n,m in plain.named_modules() if isinstance(m, nn.Linear) and '.layers.' in n}
    routers = {n for n in dense if re.search(r'\.(router|gate|shared_expert_gate)$', n)}
    inside = {l for layers in expert_stacks(plain).values() for l in layers}
    assert set(names)==(dense-routers)|inside and len(inside) in (8, 16)   # some begin with a dense block
    assert list(base_params(model))==list(base_params(plain)) and base_hash(model)==base_hash(plain)
    sites = Counter(s.site for s in model.switch.sites if s.name in inside)
    assert sites==dict(mlp_in=len(inside)//2, mlp_out=len(inside)//2)
    assert all(s.layer in (0, 1) for s in model.switch.sites)

@pytest.mark.parametrize('kind', MIXTURES)
def test_float_is_the_original_and_widths_are_what_they_say(kind):
    plain,model = toy(kind),toy(kind)
    wide = Profile('w', Bits(8), (Rule(Bits(4), site=('mlp_in',)), Rule(Bits(3), site=('mlp_out',), layers=(1,))))
    make_switchable_(model, [wide,'bw4'], PER_TOKEN)
    low,want = logits(model, 'bw4'),plain_logits(plain)
    for how in ('eager','batched_mm','grouped_mm'):
        for m in (plain, model): m.set_experts_implementation(how)
        assert torch.equal(logits(model, 'float'), plain_logits(plain)), how
    assert not torch.allclose(low, want, atol=1e-3)
    torch.testing.assert_close(logits(model, 'w'), plain_logits(by_hand(kind, model, 'w')), rtol=1e-3, atol=1e-3)

@pytest.mark.parametrize('kind', MIXTURES)
def test_a_plain_checkpoint_loads(kind):
    model,plain = toy(kind),toy(kind)
    make_switchable_(model, ['bw8'], PER_TOKEN)
    before = logits(model, 'bw8')
    with torch.no_grad():
        for p in plain.parameters(): p.mul_(1.5)
    assert model.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(logits(model, 'float'), plain_logits(plain)) and not torch.equal(logits(model, 'bw8'), before)

# --- the rest of what a dense family passes -------------------------------------------------------------------------

@pytest.mark.parametrize('kind', SOME)
def test_one_expert_by_its_formula(kind):
    "Both activations per token, each weight per output channel; the router's weights, and the sum over experts."
    model = toy(kind); make_switchable_(model, ['bw4'], PER_TOKEN)
    model.switch.kernel = 'float'
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    old,x = experts.base,torch.randn(7, 32)
    index,share = torch.rand(7, 4).topk(2).indices,torch.rand(7, 2)
    def one(x, e, name):
        w = getattr(old, name)[e]; axis = int(old.is_transposed)
        w = fake_quant_weight(w, 4, PER_TOKEN, axis)
        b = getattr(old, f'{name}_bias')[e] if old.has_bias else None
        return F.linear(fake_quant(x, token_qparams(x, 4, PER_TOKEN.act_symmetric), True), w.T if axis else w, b)
    with torch.no_grad(), use_profile(model, 'bw4'):
        want = torch.zeros(7, 32)
        for t in range(7):
            for e,s in zip(index[t].tolist(), share[t]):
                want[t] += s*one(old._apply_gate(one(x[t:t+1], e, 'gate_up_proj')), e, 'down_proj')[0]
        torch.testing.assert_close(experts(x, index, share), want, rtol=1e-5, atol=1e-5)
        shuffled = torch.randperm(7)
        again = experts(x[shuffled], index[shuffled], share[shuffled])
        torch.testing.assert_close(again, experts(x, index, share)[shuffled], rtol=1e-5, atol=1e-5)
        assert experts(x[:0], index[:0], share[:0]).shape==(0, 32)

@pytest.mark.parametrize('kind', SOME)
def test_integer_kernels(kind):
    "What multiplies on integers here gives what float arithmetic gives, expert by expert."
    model = toy(kind); make_switchable_(model, ['bw4','bw8'], PER_TOKEN)
    model.requires_grad_(False)
    for p in ('bw4','bw8'):
        at = Bits(int(p[2]), int(p[2]))
        for l in model.switch.layers:
            if not isinstance(l, QuantExpert): continue
            x = torch.randn(5, l.in_features); both = []
            for kernel in ('auto','float'):
                model.switch.kernel = kernel; both.append(l.at(x, Setting(at, None)))
            torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)
    kinds = [k for k in kernel_report(model, 'bw8')]
    assert len(kinds)==1, kinds     # experts run as the dense layers beside them do

@pytest.mark.parametrize('kind', SOME)
def test_a_step_moves_the_routed_adapters_of_the_experts_that_were_hit(kind):
    model = adapted(kind); start = {n:p.detach().clone() for n,p in model.named_parameters()}
    hit = set()
    for l,s in zip(model.switch.layers, model.switch.sites):
        l.register_forward_hook(lambda m, args, y, name=s.name: hit.add(name))
    cfg = TrainConfig(steps=1, batch_size=3, accumulate=1, lr=1e-2, warmup=0)
    data = [Encoded(tuple(row.tolist()), 8) for row in IDS]
    assert train(model, data, fixed_profile('mixed'), cfg, progress=False, cpu=True)['curve'][0][1]>0
    live = zip(model.switch.sites, model.switch.bound['mixed'])
    routed = {f'{s.name}.adapters.{b.adapter}.{ab}' for s,b in live if b.adapter and s.name in hit for ab in 'ab'}
    assert {n for n,p in model.named_parameters() if not torch.equal(p, start[n])}==routed
    assert any('.experts.' in n for n in routed)

@pytest.mark.parametrize('kind', SOME)
def test_full_training_reaches_the_stacks(kind):
    "Without adapters the stacks and the routers get gradients through the quantizers; a step makes new weights."
    model = toy(kind); make_switchable_(model, ['bw4'], PER_TOKEN)
    with use_profile(model, 'bw4'):
        before = model(IDS, labels=IDS).loss; before.backward()
        stacks = {n:p for n,p in base_params(model).items() if '.experts.' in n or 'router' in n or '.gate.weight' in n}
        assert len(stacks)>=6 and all(p.grad is not None and p.grad.abs().sum()>0 for p in stacks.values())
        torch.optim.SGD(model.parameters(), lr=.1).step()
        assert model(IDS, labels=IDS).loss<before

@pytest.mark.parametrize('kind', SOME)
def test_no_weight_is_stale(kind):
    model = toy(kind).requires_grad_(False); make_switchable_(model, ['bw8'], PER_TOKEN)
    before = logits(model, 'bw8')
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    experts.base.down_proj.data.mul_(2.)      # which torch does not count
    after = logits(model, 'bw8')
    assert not torch.equal(before, after)
    fresh = toy(kind).requires_grad_(False)
    next(m for n,m in fresh.named_modules() if n.endswith('.experts')).down_proj.data.mul_(2.)
    make_switchable_(fresh, ['bw8'], PER_TOKEN)
    assert torch.equal(logits(fresh, 'bw8'), after)

@pytest.mark.parametrize('kind', SOME)
@pytest.mark.parametrize('act', ['per_token','per_tensor'])
def test_save_and_load(kind, act, tmp_path):
    model = adapted(kind, QuantConfig(act=act))
    back = load_switchable(save_switchable(model, tmp_path/'model'), toy(kind))
    for p in model.switch.profiles: assert torch.equal(logits(model, p), logits(back, p)), p
    again = copy.deepcopy(model)
    for p in model.switch.profiles: assert torch.equal(logits(model, p), logits(again, p)), p
    with pytest.raises(ValueError, match='other weights'):
        load_switchable(tmp_path/'model', toy(kind, num_hidden_layers=1))

@pytest.mark.parametrize('kind', SOME)
def test_generate(kind):
    plain,model = toy(kind),adapted(kind)
    kw = dict(attention_mask=MASK[1:2], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(plain.generate(IDS[1:2], **kw), model.generate(IDS[1:2], **kw))
    with use_profile(model, 'mixed'), torch.no_grad():
        new = model.generate(IDS[1:2], **kw)
        y = model(new[:, :-1], use_cache=False).logits[:, 11:].float()
    short = (y.amax(-1)-y.gather(-1, new[:, 12:, None])[..., 0])/y.std()
    assert new.shape==(1, 18) and short.max()<.1      # each is the best token, or as good: a flipped code moves logits

def test_gradient_checkpointing():
    "Recomputation runs at the profile of its pass, and gives the same gradients."
    grads = []
    for on in (False, True):
        model = adapted('mixtral').train()
        if on: model.gradient_checkpointing_enable()
        with use_profile(model, 'bw4'): loss = model(IDS, labels=IDS).loss
        loss.backward()
        grads.append({n:p.grad for n,p in adapter_params(model).items() if p.grad is not None})
    assert grads[0].keys()==grads[1].keys() and any('.experts.' in n for n in grads[0])
    for n in grads[0]: torch.testing.assert_close(grads[0][n], grads[1][n])

# --- static ranges --------------------------------------------------------------------------------------------------

def test_ranges_of_experts():
    "Padding is left out; an expert that no token reached takes the widest range; learned ranges train."
    ends = []
    for filler in (0, 50):
        model = toy('mixtral', num_local_experts=16, num_experts=16, num_experts_per_tok=1)
        make_switchable_(model, ['bw8'])
        reached = set()
        for l in model.switch.layers: l.register_forward_hook(lambda m, args, y: reached.add(m.index))
        one = dict(input_ids=IDS[:1].masked_fill(MASK[:1]==0, filler), attention_mask=MASK[:1])
        calibrate_(model, [one])
        seen = [l.observers['8'] for l in model.switch.layers]
        ends.append(torch.stack([torch.stack([o.lo, o.hi]) for o in seen]))
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    stack = [experts[e]['down_proj'] for e in range(16)]
    missed = [l for l in stack if l.index not in reached]
    assert missed and all(float(l.observers['8'].lo)==min(float(o.observers['8'].lo) for o in stack) for l in missed)
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
    with use_profile(model, 'bw8'): assert model(IDS).logits.isfinite().all()
    assert len(learn_ranges_(model))==len(model.switch.layers)
    add_adapters_(model)
    with use_profile(model, 'bw8'): model(IDS, labels=IDS).loss.backward()
    learned = [l.observers['8'].log_ratio.grad for l in stack]
    assert any(g is not None and g.abs().sum()>0 for g in learned)

# --- costs and choices ----------------------------------------------------------------------------------------------

def test_costs():
    "The memory of all experts; the operations of those that a token uses."
    costs = {}
    for k in (1, 2, 4):
        model = toy('mixtral', num_experts_per_tok=k); make_switchable_(model, ['bw8','w4a8'], PER_TOKEN)
        costs[k] = {p:profile_cost(model, p) for p in ('float','bw8','w4a8')}
    assert len({c['bw8'].bytes for c in costs.values()})==1
    expert = 4*2*3*32*24*8*8//4            # of four experts, two blocks, three matrices; at w8a8; by one expert
    assert costs[2]['bw8'].bops-costs[1]['bw8'].bops==expert
    assert costs[4]['bw8'].bops-costs[2]['bw8'].bops==2*expert
    params = sum(p.numel() for p in toy('mixtral').parameters())
    linear = sum(l.weight.numel() for l in model.switch.layers)
    rows = sum(l.out_features for l in model.switch.layers)
    assert costs[2]['float'].bytes==2*params
    assert costs[2]['bw8'].bytes==2*(params-linear)+linear+4*rows
    assert costs[2]['w4a8'].w_bits==4 and high_to_low(model, ['w4a8','float','bw8'])==['float','bw8','w4a8']
    assert {g.name for g in find_groups(model, 'site')}=={'attn_qkv','attn_out','mlp_in','mlp_out'}
    with use_profile(model, 'bw8'): model(IDS)
    assert held_bytes(model)['base']==4*params

# --- files ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', SOME)
def test_export_float(kind, tmp_path):
    model = adapted(kind, profiles=[Profile('w', Bits(6), (Rule(Bits(), glob='*.experts.1.*'),)),'bw8'])
    folder = export_float(model, 'w', tmp_path/'plain')
    back = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(back)is type(toy(kind)) and not any(isinstance(m, Experts) for m in back.modules())
    torch.testing.assert_close(plain_logits(back), logits(model, 'w'), rtol=1e-3, atol=1e-3)
    assert plain_logits(merge(model, 'float')).equal(logits(model, 'float'))

@pytest.mark.parametrize('kind', SOME)
def test_packed(kind, tmp_path):
    "One file for all widths, experts among them; a float expert stays float in it."
    left = Rule(Bits(), glob='*.layers.1.*.experts.3.*')
    profiles = [Profile(n, Bits.parse(b), (left,)) for n,b in (('a','w4a8'), ('b','w8a8'))]
    model = adapted(kind, profiles=profiles)
    freeze(model, tmp_path/'model.safetensors'); check_packed(tmp_path/'model.safetensors')
    packed = load_packed(tmp_path/'model.safetensors')
    assert len(packed.switch.layers)==len(model.switch.layers)-2
    for p in 'ab':
        a,b = logits(model, p),logits(packed, p)
        near = ((a-b).norm(dim=-1)/a.norm(dim=-1)<.02).float().mean()     # a flipped code moves its row
        assert near>.7, (p, near)
        assert profile_cost(packed, p).bops<=profile_cost(model, p).bops
    assert not any(n.endswith('_proj') for n in packed.state_dict())      # no stack beside the codes
    with pytest.warns(UserWarning, match='not in PARTS'): packed.generate(IDS[1:2], max_new_tokens=2, do_sample=False)

def test_what_has_no_place_elsewhere_says_so(tmp_path):
    model = adapted('mixtral')
    with pytest.raises(ValueError, match='single experts.*export_float'): export_peft(model, '8', tmp_path/'peft')
    with pytest.raises(ValueError, match='one of several experts.*export_float'): export_torchao(model, 'bw8')
    with pytest.raises(ValueError, match="'mixtral': GGUF export knows"): export_gguf(model, 'bw8', tmp_path/'x.gguf')
    with pytest.raises(ValueError, match=r"one of several experts.*sites=\['attn_qkv'"): add_gates_(model)
    assert add_gates_(model, sites=['attn_qkv'])
    each = Strategy('each', ('bw4','bw8'), per='example')
    with pytest.raises(ValueError, match='one of several experts'):
        with use_strategy(model, each, 'abc'): pass
    with use_strategy(model, Strategy('batches', ('bw4','bw8'), per='batch'), 'abc'):
        assert plain_logits(model).isfinite().all()
    only = toy('mixtral'); make_switchable_(only, ['bw8'], PER_TOKEN)
    add_adapters_(only, sites=['attn_qkv','attn_out']); export_peft(only, '8', tmp_path/'peft')

# --- what is not covered --------------------------------------------------------------------------------------------

def test_experts_left_float_knowingly(tmp_path):
    model = toy('mixtral')
    names = make_switchable_(model, ['bw8'], PER_TOKEN, experts='float')
    assert len(names)==8 and not any('.experts.' in n for n in names)
    add_adapters_(model)
    back = load_switchable(save_switchable(model, tmp_path/'model'), toy('mixtral'))
    assert torch.equal(logits(model, 'bw8'), logits(back, 'bw8'))
    freeze(model, tmp_path/'packed'); packed = load_packed(tmp_path/'packed')
    assert len(packed.switch.layers)==8
    with pytest.raises(ValueError, match="experts='int4': choose 'quantized' or 'float'"):
        make_switchable_(toy('mixtral'), experts='int4')

def test_experts_are_never_left_out_in_silence():
    attention = {s:FAMILIES['mixtral'][s] for s in ('attn_qkv','attn_out')}
    model = toy('mixtral')
    with pytest.raises(ValueError, match=r"18,432 of its .* stay float, in model.layers.0.mlp.experts.gate_up_proj "
                                         r"\(MixtralExperts, \[4, 48, 32\]\) and 3 more: give them sites"):
        make_switchable_(model, sites=attention)
    assert not hasattr(model, 'switch')
    assert len(make_switchable_(model, sites=attention, experts='float'))==8
    own = attention|dict(mlp_in=('*.experts.gate_up_proj',), mlp_out=('*.experts.down_proj',))
    assert len(make_switchable_(toy('mixtral'), sites=own))==24
    some = attention|dict(mlp_in=('*.experts.gate_up_proj',), mlp_out=('*.experts.[01].down_proj',))
    with pytest.raises(ValueError, match='experts.down_proj'): make_switchable_(toy('mixtral'), sites=some)

@pytest.mark.parametrize('kind,first', [
    ('llama4_text', 'model.layers.0.feed_forward.experts.gate_up_proj'),
    ('jetmoe', 'model.layers.0.mlp.input_linear.weight')])
def test_other_forms_of_experts(kind, first):
    model = toy(kind)
    sites = dict(attn_out=('*.o_proj','*.kv_proj'))
    said = rf"{kind}.* in {first} .*this form of experts cannot be quantized here.*experts='float'"
    with pytest.raises(ValueError, match=said): make_switchable_(model, sites=sites)
    names = make_switchable_(model, ['bw8'], PER_TOKEN, sites=sites, experts='float')
    assert len(names)==2 and not torch.equal(logits(model, 'bw8'), logits(model, 'float'))

def test_the_front_door():
    model = toy('qwen3_moe')
    names = sl.make_switchable(model, ['bw8','w4a8'], route='bits')
    assert len(names)==24 and len(adapter_params(model))==2*2*24
    assert len(sl.make_switchable(toy('qwen3_moe'), ['bw8'], experts='float'))==8

def test_bfloat16(tmp_path):
    plain,model = toy('gpt_oss').bfloat16(),toy('gpt_oss').bfloat16()
    make_switchable_(model, ['bw8'], PER_TOKEN)
    a,b = logits(model, 'float'),logits(model, 'bw8')
    assert torch.equal(a, plain_logits(plain)) and b.dtype==torch.bfloat16
    assert (a.float()-b.float()).norm()<.3*a.float().norm()
    freeze(model, tmp_path/'packed'); packed = load_packed(tmp_path/'packed')
    assert (plain_logits(packed).float()-b.float()).norm()<.1*b.float().norm()
