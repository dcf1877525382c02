"Learned gates in the real loop, in files, at other precisions, on other classes, under faults, and in two processes."
import copy, random, subprocess, sys
import pytest, torch
import gates_worker as worker
from train_worker import HAS_GLOO, LAUNCH, QUIET, settings
from torch import nn
from transformers import GPT2Config, GPT2ForQuestionAnswering, OPTConfig, OPTForCausalLM
from switchable_llm.core import layers
from switchable_llm.core.integer import pick_kernel
from switchable_llm.models.loading import load_model
from switchable_llm.data.embedded import tiny_squad
from switchable_llm.core.gates import (
    BitBudget, add_gates_, calibrate_gates_, expected_bits, gate_params, gate_profile, mean_bits, realised_bits,
    remove_gates_, use_gates)
from switchable_llm.joint_training import Objective, random_profile, train
from switchable_llm.data.tasks import answering, token_weights
from switchable_llm.lora_routing import adapter_params, add_adapters_
from switchable_llm.models.checkpoints import base_hash, load_switchable, save_switchable
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.packed import load_packed
from switchable_llm.profiles_eval import evaluate
from switchable_llm.search.costs import profile_cost
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.core.profiles import Profile
from switchable_llm.core.calibration import calibrate_
from switchable_llm.core.switching import make_switchable_, use_profile

IDS = torch.randint(2, 90, (3, 12), generator=torch.Generator().manual_seed(0))

def shuffle(m, seed=0):
    "Gates and adapters that decide and do something."
    torch.manual_seed(seed)
    def spread(p):
        if p.dim()==1: return 1.
        return 5. if p.shape[0]==3 else .1     # of a gate per token; of an adapter
    for p in (gate_params(m)|adapter_params(m)).values(): nn.init.normal_(p, std=spread(p))
    return m

def finite_gradients(m): return all(p.grad is not None and p.grad.isfinite().all() for p in gate_params(m).values())

def logits(m):
    with torch.no_grad(): return m(input_ids=IDS).logits

@pytest.mark.parametrize('per', ['layer','token'])
def test_a_killed_run_ends_like_a_whole_one(per, toy_folder, tmp_path):
    "To the bit, with gates that draw at random and dropout on."
    whole,r = worker.run(toy_folder, per, 6, dropout=.1)
    def die(step, curve):
        if step==4: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        worker.run(toy_folder, per, 6, dropout=.1, checkpoint=tmp_path, callback=die)
    again,r2 = worker.run(toy_folder, per, 6, dropout=.1, checkpoint=tmp_path)
    want,got = worker.learnt(whole),worker.learnt(again)
    assert all(torch.equal(want[n], got[n]) for n in want)
    assert [c[:3] for c in r['curve']]==[c[:3] for c in r2['curve']]
    switch = again.switch
    assert switch.gate is None and switch.profile.name=='float' and 'gates' not in switch.profiles

def test_what_moves(toy_folder):
    "Gates alone where adapters are frozen; adapters alone, at the gates' own profile, where gates are frozen."
    for frozen in (adapter_params, gate_params):
        m = shuffle(worker.toy(toy_folder)[0])
        for p in frozen(m).values(): p.requires_grad_(False)
        chosen = gate_profile(m)
        live = {f'{s.name}.adapters.{x.adapter}' for s,x in zip(m.switch.sites, m.switch.bind(chosen))}
        old = {n:p.detach().clone() for n,p in m.named_parameters()}
        worker.run(toy_folder, model=m, steps=2)
        moved = {n for n,p in m.named_parameters() if not torch.equal(p, old[n])}
        if frozen is adapter_params: assert moved==set(gate_params(m))
        else: assert {n.rpartition('.')[0] for n in moved}==live

@pytest.mark.skipif(pick_kernel()[0] is None, reason='no kernel for integers on this processor')
@pytest.mark.parametrize('per', ['layer','token'])
def test_integers_multiply_under_gates_too(per, toy_folder, monkeypatch):
    "Whatever a gate drew, the layer's own kernel multiplies, and never float arithmetic."
    used = []
    for name in ('int_linear','fake_quant_product'):
        def counted(*args, name=name, f=getattr(layers, name)): used.append(name); return f(*args)
        monkeypatch.setattr(layers, name, counted)
    worker.run(toy_folder, per, model=shuffle(worker.toy(toy_folder, per)[0]), steps=1)
    assert set(used)=={'int_linear'}

def test_other_profiles_in_the_same_run(toy_folder):
    "Inside use_gates a float teacher is float, and a step at bw8 is bw8; the budget presses at gated steps only."
    m,tok,data = worker.toy(toy_folder)
    batch = answering.collate(data[:4], tok.pad_token_id); w = token_weights(batch)
    with torch.no_grad(): plain = answering.predict(m, batch, w).logits
    heard = []
    class Spy:
        weight,teacher = 0.,'float'
        def __call__(self, model, out, teachers):
            teacher_is_float,is_at8 = torch.equal(teachers[0].logits, plain),torch.equal(out.logits.detach(), at8)
            heard.append((model.switch.profile.name, teacher_is_float, is_at8))
            return out.logits.sum()
    class Budget:
        weight = 0.
        def __call__(self, model, out, teachers):
            heard.append((model.switch.profile.name, BitBudget(4.)(model).item()>0))
            return out.logits.sum()
    with torch.no_grad(), use_profile(m, 'bw8'): at8 = answering.predict(m, batch, w).logits
    objective = Objective((Spy(), Budget()))
    with use_gates(m): list(objective.losses(m, answering, batch, w, ('bw8', 'gates')))
    assert heard==[('bw8', True, True), ('bw8', False), ('gates', True, False), ('gates', True)]
    policy,objective = random_profile(['bw8', 'gates']),Objective((BitBudget(5.),))
    with use_gates(m): r = train(m, data, policy, settings(6), tok.pad_token_id, objective=objective, **QUIET)
    assert {c[2] for c in r['curve']}=={'bw8', 'gates'}

@pytest.mark.parametrize('per', ['layer','token'])
def test_checkpoint(per, toy_folder, tmp_path):
    "Gates, their offsets and whether they are trained come back; the base's hash knows nothing of them."
    m = shuffle(worker.toy(toy_folder, per)[0])
    calibrate_gates_(m, [dict(input_ids=IDS)], 5.)
    if per=='layer':
        for p in gate_params(m).values(): p.requires_grad_(False)
    save_switchable(m, tmp_path/'c')
    assert base_hash(m)==base_hash(load_model(toy_folder)[0])
    back = load_switchable(tmp_path/'c', load_model(toy_folder)[0])
    def trained(m): return {n:p.requires_grad for n,p in gate_params(m).items()}
    assert trained(back)==trained(m)
    with use_gates(m), use_gates(back): assert torch.equal(logits(m), logits(back))
    assert realised_bits(back, [dict(input_ids=IDS)])==realised_bits(m, [dict(input_ids=IDS)])<=5
    if per=='layer': assert gate_profile(back)==gate_profile(m)
    # a copy, and the plain state dict
    twin = shuffle(worker.toy(toy_folder, per)[0], seed=9); twin.load_state_dict(m.state_dict())
    with use_gates(m) as _:
        for other in (copy.deepcopy(back), twin):
            with use_gates(other): assert torch.equal(logits(m), logits(other))

def test_gates_before_adapters(toy_folder):
    "The order of adding does not matter: gates stay trainable, and route to adapters that came later."
    m,_ = load_model(toy_folder)
    make_switchable_(m, cfg=QuantConfig(act='per_token')); add_gates_(m); add_adapters_(m, r=4)
    assert all(p.requires_grad for p in gate_params(m).values())
    shuffle(m)
    with use_profile(m, gate_profile(m)): want = logits(m)
    with use_gates(m): assert torch.equal(logits(m), want)

def test_evaluate_at_gates(toy_folder):
    "`gates` is a profile to be evaluated, with the scores and the cost of the profile that the gates are."
    m,tok,_ = worker.toy(toy_folder); shuffle(m)
    m.switch.add(gate_profile(m, 'chosen'))
    kw = dict(max_new_tokens=4, n_resamples=20)
    with use_gates(m) as gates:
        e = evaluate(m, tok, tiny_squad(6), profiles=['gates', 'chosen', 'bw8'], **kw)
    own,chosen = e['gates'],e['chosen']
    assert own.nll_text==chosen.nll_text and own.prediction==chosen.prediction and own.nll_text!=e['bw8'].nll_text
    assert own.cost==chosen.cost
    assert gates.mean_bits()==pytest.approx(chosen.cost.w_bits)
    assert mean_bits(m, 'chosen', 'activation')==pytest.approx(chosen.cost.a_bits)
    with_gates = profile_cost(m, 'bw8'); remove_gates_(m)
    assert profile_cost(m, 'bw8')==with_gates               # gates are not counted as part of the base

def test_packed(toy_folder, tmp_path):
    "Gates per layer go into a packed file as a profile; gates per token do not, and say so."
    m = shuffle(worker.toy(toy_folder)[0]); remove_gates_(m); add_gates_(m, sites=['mlp_in','mlp_out']); shuffle(m)
    with use_profile(m, 'bw8'): m.switch.add(gate_profile(m, 'chosen'))
    assert {s.bits.w for s,x in zip(m.switch.bound['chosen'], m.switch.sites) if x.site.startswith('attn')}=={8}
    freeze(m, tmp_path/'p', profiles=['chosen'])
    packed = load_packed(tmp_path/'p')
    plain = worker.toy(toy_folder)[0]; remove_gates_(plain)
    plain.load_state_dict({k:v for k,v in m.state_dict().items() if '.gates.' not in k})
    plain.switch.add(m.switch.profiles['chosen'])
    freeze(plain, tmp_path/'plain', profiles=['chosen'])
    assert torch.equal(logits(packed), logits(load_packed(tmp_path/'plain')))    # the gates left no trace
    assert not any('gates' in n for n in packed.state_dict())
    with pytest.raises(ValueError, match='frozen'): add_gates_(packed)
    with pytest.raises(ValueError, match='frozen'), use_gates(packed): pass
    with use_gates(m), pytest.raises(ValueError, match='leave use_gates'): freeze(m, tmp_path/'q')
    assert not (tmp_path/'q').exists()

@pytest.mark.parametrize('per', ['layer','token'])
def test_other_precisions(per, toy_folder):
    "A bfloat16 model and autocast run in all modes; a token's choice is the same under autocast."
    m = shuffle(worker.toy(toy_folder, per)[0])
    layer = m.switch.layers[2]; gate = layer.gates[per]; x = torch.randn(4, 7, layer.in_features)
    with torch.autocast('cpu', torch.bfloat16): cast = gate(x)
    assert cast.dtype==torch.float32 and torch.equal(cast, gate(x))
    half = copy.deepcopy(m).to(torch.bfloat16)
    for model,cast in ((m, True), (half, False)):
        for sample in ('hard','soft','mean'):
            for training in (True, False):
                model.train(training); model.zero_grad(set_to_none=True)
                with use_gates(model, sample), torch.autocast('cpu', torch.bfloat16, enabled=cast):
                    loss = model(input_ids=IDS, labels=IDS).loss
                assert loss.isfinite()
                if not training: continue
                loss.backward()
                assert finite_gradients(model)

def test_classes_without_the_usual_shapes():
    "Padding is not counted, also where a layer sees all tokens on one axis, or the model has another head."
    torch.manual_seed(0)
    opt = OPTConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
                    max_position_embeddings=64, word_embed_proj_dim=32)
    gpt2 = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    models = [OPTForCausalLM(opt), GPT2ForQuestionAnswering(gpt2)]
    mask = torch.ones_like(IDS); mask[0, 8:] = 0; mask[2, 5:] = 0
    for m in models:
        make_switchable_(m.eval(), cfg=QuantConfig(act='per_token')); add_gates_(m, per='token')
        with torch.no_grad(), use_gates(m) as gates: m(input_ids=IDS, attention_mask=mask)
        assert {int(c.sum()) for c in gates.counts.values()}=={int(mask.sum())}
        assert len(gates.counts)==len(m.switch.layers)
        m.train()
        with use_gates(m): m(input_ids=IDS, attention_mask=mask); assert expected_bits(m).item()==pytest.approx(6)

def test_static_ranges_and_empty_batches(toy_folder):
    "Options with calibrated ranges; a batch without rows; rows that are all padding."
    m,_ = load_model(toy_folder)
    make_switchable_(m); calibrate_(m, [dict(input_ids=IDS)])
    add_gates_(m, per='token'); shuffle(m)
    layer = m.switch.layers[0]
    with torch.no_grad(), use_gates(m) as gates:
        assert layer(torch.zeros(0, 5, layer.in_features)).shape==(0, 5, layer.out_features)
        assert int(gates.counts[0].sum())==0
    remove_gates_(m)
    with pytest.raises(RuntimeError, match='never calibrated for 5-bit'): add_gates_(m, ['w4a5', 'w8a8'])
    assert not gate_params(m)

def test_repair_always_meets_the_budget(toy_folder):
    "Whatever the logits and the measure; and a larger budget never lowers a choice that a smaller one left alone."
    rng,m = random.Random(0),worker.toy(toy_folder)[0]
    ends = dict(weight=(4, 8), activation=(4, 8), operations=(16, 64))
    for i in range(30):
        shuffle(m, i)
        if i%5==0:
            for p in gate_params(m).values(): p.data.zero_()           # ties
        measure = rng.choice(list(ends)); low,high = ends[measure]
        budgets = sorted(rng.uniform(low, high) for _ in range(4))
        def served(budget, **kw): return gate_profile(m, budget=budget, measure=measure, **kw)
        def cost(profile): return mean_bits(m, profile, measure)
        def score(profile):                                            # sum of the logits of what is chosen
            pairs = [(l.gates['layer'], s.bits) for l,s in zip(m.switch.layers, m.switch.bind(profile))]
            return sum(g.logits[g.bits.index(b)].item() for g,b in pairs)
        for b in (low, *budgets, high): assert cost(served(b))<=b*(1+1e-9)
        assert served(high, fill=False)==gate_profile(m) and cost(served(high))==high
        full = served(budgets[0]).bits(m.switch.sites)
        for n,b in full.items():                                       # nothing more would fit
            for up in map(Bits.parse, ('w6a6','w8a8')):
                if up.w>b.w: assert cost(Profile.from_bits('up', full|{n:up}))>budgets[0]
        kept = [score(served(b, fill=False)) for b in budgets]
        assert kept==sorted(kept)

def test_faults_leave_the_model_as_it_was(toy_folder):
    "An exception in the middle of counting, calibrating or training."
    m = shuffle(worker.toy(toy_folder, 'token')[0]); m.train(); m.switch.profile = 'bw6'
    def modes(): return [(n, x.training) for n,x in m.named_modules()]
    def hooks(): return [list(x._forward_pre_hooks) for x in (m, m.base_model)]
    was = modes(),hooks()
    bad = dict(input_ids=torch.full((1, 3), 10**6))
    with pytest.raises(IndexError): realised_bits(m, [bad])
    assert (modes(), hooks())==was and m.switch.profile.name=='bw6' and m.switch.gate is None
    with pytest.raises(IndexError): calibrate_gates_(m, [bad], 5.)
    calibrate_gates_(m, [dict(input_ids=IDS)], 5.)
    old = [l.gates['token'].offset.clone() for l in m.switch.layers]
    with pytest.raises(IndexError): calibrate_gates_(m, [dict(input_ids=IDS), bad], 4.5)
    assert all(torch.equal(l.gates['token'].offset, o) for l,o in zip(m.switch.layers, old))
    broken = copy.deepcopy(m); next(iter(gate_params(broken).values())).data.fill_(float('nan'))
    with pytest.raises(ValueError, match='NaN'): calibrate_gates_(broken, [dict(input_ids=IDS)], 5.)
    with use_gates(m) as outer:                                        # counting inside a context does not disturb it
        realised_bits(m, [dict(input_ids=IDS)])
        assert m.switch.gate is outer and m.switch.profile.name=='gates' and not outer.counts
    m.switch.add(Profile('gates', m.switch.profiles['bw4'].default))   # somebody's own profile of that name
    with use_gates(m): pass
    assert m.switch.profiles['gates'].default==m.switch.profiles['bw4'].default and 'gates' in m.switch.bound

def test_two_processes(toy_folder, child_env, tmp_path):
    "Each draws its own options, so other adapters get a gradient in each; they end with the same gates and adapters."
    if not HAS_GLOO: pytest.skip('this build of PyTorch has no gloo')
    cmd = [sys.executable, *LAUNCH, worker.__file__, str(toy_folder), str(tmp_path)]
    p = subprocess.run(cmd, env={**child_env, 'CUDA_VISIBLE_DEVICES': ''}, capture_output=True, text=True, timeout=300)
    assert p.returncode==0, p.stderr[-3000:]
    a,b = (torch.load(tmp_path/f'{r}.pt') for r in (0, 1))
    start = worker.learnt(worker.toy(toy_folder)[0])
    assert a['processes']==2 and all(torch.equal(a['params'][n], b['params'][n]) for n in start)
    assert sum(not torch.equal(a['params'][n], start[n]) for n in start)>len(start)/2
