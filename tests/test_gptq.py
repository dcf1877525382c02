"Codes that were chosen: one pass equals a plain GPTQ, every width is served, and all that reads a weight reads them."
import copy
import pytest, torch
import switchable_llm as sl
from switchable_llm.search import gptq
from switchable_llm.core.profiles import Rule
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from switchable_llm.core.integer import ReferenceKernel, signed_codes
from switchable_llm.core.switching import make_switchable_, switch_of, use_profile
from switchable_llm.models.checkpoints import load_switchable, save_switchable
from switchable_llm.quantizers import QuantConfig, nested_codes
from switchable_llm.search.gptq import compensated_codes, drop_codes_, fitted_step, quantize_, read_at, settled_codes, weights_of
from switchable_llm.serving.packed import load_packed

PROFILES = [sl.Profile(f'p{b}', f'w{b}') for b in (4, 6, 8)]
GRAINS = [dict(), dict(weight='per_group', group_size=32), dict(weight='per_tensor')]

def batches(vocabulary, n=8, length=80, seed=0):
    made = torch.Generator().manual_seed(seed)
    return [dict(input_ids=torch.randint(5, vocabulary, (1, length), generator=made)) for _ in range(n)]

def llama(**kw):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, **kw)).eval()

def logits(model, profile):
    with torch.no_grad(), use_profile(model, profile): return model(batches(200, 1, 20, 9)[0]['input_ids']).logits

@pytest.fixture(scope='module')
def chosen():
    "A model whose codes were chosen, per group; and what was found."
    model = llama()
    sl.make_switchable(model, PROFILES, QuantConfig(act='per_token', weight='per_group', group_size=32))
    return model, quantize_(model, batches(200))

# --- the method ------------------------------------------------------------------------------------------------------

def plain_gptq(w, h, step, damping=.01, levels=15):
    "Frantar et al. 2023, algorithm 1, a weight at a time, with the inverse found anew for the columns that are left."
    h = h.clone(); h.diagonal().add_(damping*h.diagonal().mean())
    order,w,out = h.diagonal().argsort(descending=True, stable=True).tolist(),w.clone(),torch.zeros_like(w)
    for k,j in enumerate(order):
        left = order[k:]
        inverse = torch.linalg.inv(h[left][:, left])
        for r in range(len(w)):
            q = min(max(round(float(w[r, j]/(16*step[r, j])))+levels//2, 0), levels-1)
            out[r, j] = q
            error = w[r, j]-(q-levels//2)*16*step[r, j]
            w[r, left] -= error/inverse[0, 0]*inverse[0]
    return out

@pytest.mark.parametrize('seed', range(3))
def test_at_one_width_it_is_gptq(seed):
    torch.manual_seed(seed)
    x = torch.randn(300, 24, dtype=torch.float64)@torch.randn(24, 24, dtype=torch.float64)
    w,h = torch.randn(5, 24, dtype=torch.float64),x.T@x
    step = (w.abs().amax(1, keepdim=True)/112).expand_as(w)
    for block in (5, 64): assert torch.equal(compensated_codes(w, h, step, (4,), block=block)>>4, plain_gptq(w, h, step).byte())

@pytest.mark.parametrize('widths', [(4, 6, 8), (2, 3, 4), (8,), (3, 8)])
def test_no_row_ends_worse_than_rounding(widths):
    torch.manual_seed(1)
    x = torch.randn(400, 10, dtype=torch.float64)@torch.randn(10, 40, dtype=torch.float64)   # of low rank
    w,h = torch.randn(30, 40, dtype=torch.float64),x.T@x
    step = fitted_step(w, h, QuantConfig(weight='per_group', group_size=10), widths)[..., 0].repeat_interleave(10, 1).double()
    damped = h.clone(); damped.diagonal().add_(.01*h.diagonal().mean())
    def cost(codes):
        gaps = [read_at(codes.double(), b)*step-w for b in widths]
        return sum(k*((g@damped)*g).sum(1) for k,g in zip(weights_of(widths), gaps))
    rounded = (torch.floor(w/step)+120).clamp(0, 239)
    once = compensated_codes(w, h, step, widths)
    start,one,two = (cost(settled_codes(w, h, step, once, widths, passes=n)) for n in range(3))
    for a,b in ((cost(rounded), start), (cost(once), start), (start, one), (one, two)): assert (b<=a*(1+1e-9)).all()
    assert two.sum()<.7*cost(rounded).sum()

def test_an_input_that_is_always_zero_and_one_that_no_text_has():
    w,h = torch.randn(4, 8),torch.eye(8)
    h[3] = 0
    step = nested_codes(w[:, None])[1][..., 0].expand_as(w)
    codes = settled_codes(w, h, step, compensated_codes(w, h, step, (8,)), (8,))
    assert torch.equal(codes, nested_codes(w[:, None])[0][:, 0])   # nothing goes together: rounding is best

# --- a model ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('grain', GRAINS)
def test_every_width_is_closer_at_the_output_and_float_is_untouched(grain):
    model = llama()
    before = model(batches(200, 1, 20, 9)[0]['input_ids']).logits
    make_switchable_(model, PROFILES, QuantConfig(act='per_token', **grain))
    rounded = {p.name:logits(model, p.name) for p in PROFILES}
    found = quantize_(model, batches(200))
    assert len(found)==14
    for b in (4, 6):
        assert sum(c.chosen[b] for c in found.values()) < .8*sum(c.rounded[b] for c in found.values())
    assert torch.equal(logits(model, 'float'), before)
    first = {p.name:logits(model, p.name) for p in PROFILES}
    for n in ('p8','p4','float','p6','p8','p4'): assert n=='float' or torch.equal(logits(model, n), first[n])
    assert not any(torch.equal(first[n], rounded[n]) for n in first)
    assert drop_codes_(model)==14 and all(torch.equal(logits(model, n), rounded[n]) for n in rounded)

def test_the_top_bits_of_one_code_are_every_width(chosen):
    for l in switch_of(chosen[0]).layers:
        held = l.codes['nested']
        for b in range(2, 9):
            q,qp = l.codes_at(b)
            assert torch.equal(q, held.codes>>8-b) and q.max()<=239>>8-b

def test_the_integer_product_takes_the_codes():
    model = llama()
    make_switchable_(model, PROFILES, QuantConfig(act='per_token'))
    quantize_(model, batches(200))
    switch = switch_of(model)
    l,x = switch.layers[0],torch.randn(3, 64)
    with torch.no_grad():
        switch.kernel = 'reference'
        fast = l.at(x, l.switch.find('p4')['settings'][0])
        switch.kernel = 'float'
        assert torch.allclose(fast, l.at(x, l.switch.find('p4')['settings'][0]), atol=1e-4)
        plain,held = signed_codes(l.weight, 4, switch.cfg),l.prepared_at(4, ReferenceKernel())[0]
    assert plain.codes.shape==held.shape and not torch.equal(plain.codes, held)

# --- files -----------------------------------------------------------------------------------------------------------

def same(a, b): return all(torch.equal(logits(a, n), logits(b, n)) for n in ('p4','p6','p8','float'))

def test_a_saved_model_comes_back_with_its_codes(chosen, tmp_path):
    model,_ = chosen
    model.save_pretrained(tmp_path/'whole')
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path/'whole').eval(), model)
    save_switchable(model, tmp_path/'small', base='llama')
    assert same(load_switchable(tmp_path/'small', llama()), model)

def test_copies_and_other_types_keep_them(chosen):
    model,_ = chosen
    assert same(copy.deepcopy(model), model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    for a,b in zip(switch_of(half).layers, switch_of(model).layers):
        assert torch.equal(a.codes['nested'].step, b.codes['nested'].step) and a.codes['nested'].step.dtype==torch.float32
    empty = llama(); sl.make_switchable(empty, PROFILES, switch_of(model).cfg)
    empty.load_state_dict(model.state_dict())
    assert same(empty, model)

def test_a_packed_file_and_exports_hold_them(chosen, tmp_path):
    model,_ = chosen
    sl.freeze(model, tmp_path/'all.safetensors')
    packed = load_packed(tmp_path/'all.safetensors')
    for n in ('p4','p6','p8'): assert torch.allclose(logits(packed, n), logits(model, n), atol=1e-4)
    sl.export_float(model, 'p4', tmp_path/'float')
    plain = AutoModelForCausalLM.from_pretrained(tmp_path/'float')
    l = switch_of(model).layers[0]
    assert torch.equal(plain.get_submodule(switch_of(model).sites[0].name).weight, l.weight_at(4))
    new = sl.export_torchao(model, 'p4')
    assert torch.allclose(new(batches(200, 1, 20, 9)[0]['input_ids']).logits, logits(model, 'p4'), atol=1e-4)

# --- weights that change ---------------------------------------------------------------------------------------------

def test_codes_of_another_weight_are_refused(chosen):
    model = copy.deepcopy(chosen[0])
    logits(model, 'p4')
    l = switch_of(model).layers[0]
    with torch.no_grad(): l.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match='q_proj: its weight was changed.*drop_codes_'): logits(model, 'p4')
    drop_codes_(model); logits(model, 'p4')

def test_a_trained_base_is_refused(chosen):
    model = copy.deepcopy(chosen[0])
    switch_of(model).layers[0].weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match='is trained'), use_profile(model, 'p4'): model(torch.tensor([[7, 8]]))

def test_adapters_are_trained_beside_codes(chosen):
    model = copy.deepcopy(chosen[0])
    codes = [l.codes['nested'].codes.clone() for l in switch_of(model).layers]
    with use_profile(model, 'p4'):
        out = model(**(b := batches(200, 1)[0]), labels=b['input_ids'])
        out.loss.backward()
    got = [p for n,p in model.named_parameters() if '.adapters.' in n and p.grad is not None]
    assert got and all(torch.equal(c, l.codes['nested'].codes) for c,l in zip(codes, switch_of(model).layers))

# --- what cannot be --------------------------------------------------------------------------------------------------

def test_bad_input_is_named():
    model = llama()
    make_switchable_(model, PROFILES, QuantConfig(act='per_token'))
    for kw,said in ((dict(widths=(4, 9)), 'widths=9'), (dict(widths=()), 'widths is empty'), (dict(widths=(1,)), 'widths=1')):
        with pytest.raises(ValueError, match=said): quantize_(model, batches(200), **kw)
    with pytest.raises(ValueError, match='have 80 tokens: give 512'): quantize_(model, batches(200, 1))
    with pytest.raises(ValueError, match='have 0 tokens'): quantize_(model, [])
    other = llama()
    make_switchable_(other, PROFILES, QuantConfig(act='per_token', codes='independent'))
    with pytest.raises(ValueError, match="codes='independent'.*nested"): quantize_(other, batches(200))
    with torch.no_grad(): switch_of(model).layers[6].weight[0, 0] = float('nan')
    with pytest.raises(ValueError, match='down_proj: its weight holds NaN'): quantize_(model, batches(200))

def test_what_can_be_known_is_refused_before_a_pass():
    off = sl.Profile('off', 'w4', (Rule('w4', layers=(1,), rotate=False),))
    model = llama()
    make_switchable_(model, [*PROFILES, off], QuantConfig(act='per_token', rotate=('mlp_in',)))
    begun = []
    model.register_forward_pre_hook(lambda m, a: begun.append(m))
    with pytest.raises(ValueError, match="profile 'off'.*layers.1.mlp.gate_proj off .rotate: no."): quantize_(model, batches(200))
    other = sl.Profile('off', 'w4', (Rule('w4', site=('attn_out',), rotate=False), Rule('float', site=('mlp_in',), rotate=False)))
    plain = llama()
    make_switchable_(plain, [*PROFILES, other], QuantConfig(act='per_token', rotate=('mlp_in',)))
    assert len(quantize_(plain, batches(200)))==14 and torch.isfinite(logits(plain, 'off')).all()   # it leaves nothing off in codes
    with pytest.raises(ValueError, match='80 tokens'): quantize_(model, batches(200, 1))
    assert not begun

@pytest.mark.parametrize('held', [False, True])
def test_all_layers_get_codes_or_none(held):
    "What shows only in the last share of the layers leaves the first as they were, and so does an interrupt."
    model = llama()
    make_switchable_(model, PROFILES, QuantConfig(act='per_token'))
    switch = switch_of(model)
    with torch.no_grad(): switch.layers[12].weight.mul_(1e22)   # the input of the last one: its square is too large
    if held:
        for l in switch.layers: l.hold_codes_(*(t.clone() for t in l.nested_parts()))
    switch.layers[3].weight.requires_grad_(False)
    before = [(len(l.codes) and l.codes['nested'], l.weight.requires_grad, l.codes_at(4)[0].clone()) for l in switch.layers]
    for wrong in (ValueError, KeyboardInterrupt):
        said = 'down_proj: the sums over its inputs' if wrong is ValueError else None
        with pytest.raises(wrong, match=said), pytest.MonkeyPatch.context() as m:
            if wrong is KeyboardInterrupt: m.setattr(gptq, '_tasks', stops_after(5, gptq._tasks))
            quantize_(model, batches(200), memory=1)
        for l,(codes,trained,at) in zip(switch.layers, before):
            assert (len(l.codes) and l.codes['nested']) is codes and l.weight.requires_grad==trained
            assert torch.equal(l.codes_at(4)[0], at)

def stops_after(n, function):
    left = iter(range(n))
    def f(*args):
        if next(left, None) is None: raise KeyboardInterrupt
        return function(*args)
    return f

def test_infinite_inputs_of_the_last_share_are_seen_in_the_first_pass():
    model = llama()
    make_switchable_(model, PROFILES, QuantConfig(act='per_token'))
    begun = []
    model.register_forward_pre_hook(lambda m, a: begun.append(m))
    with torch.no_grad():
        for i in (11, 12): switch_of(model).layers[i].weight.mul_(1e30)   # their product is the input of the last one
    with pytest.raises(ValueError, match='1.mlp.down_proj: its inputs hold'): quantize_(model, batches(200), memory=1)
    assert len(begun)==1

@pytest.mark.parametrize('live', ['w4a4k4v2','k2v2'])
def test_what_is_live_does_not_show(live):
    "Neither its bits nor its cache, nor autocast: layers are fitted to what they see at float."
    one,two = llama(),llama()
    for m in (one, two): make_switchable_(m, [*PROFILES, live], QuantConfig(act='per_token'))
    a = quantize_(one, batches(200))
    with use_profile(two, live), torch.autocast('cpu', torch.bfloat16): b = quantize_(two, batches(200))
    assert a==b and all(torch.equal(k.codes['nested'].codes, l.codes['nested'].codes)
                        for k,l in zip(switch_of(one).layers, switch_of(two).layers))

def test_memory_for_the_sums_is_kept_and_changes_nothing():
    one,two = llama(),llama()
    for m,memory in ((one, 2**31), (two, 1)):
        make_switchable_(m, PROFILES, QuantConfig(act='per_token'))
        quantize_(m, batches(200), memory=memory)
    for a,b in zip(switch_of(one).layers, switch_of(two).layers):
        assert (a.codes['nested'].codes!=b.codes['nested'].codes).float().mean()<.01   # sums of fewer rows at a time

def test_experts_get_codes():
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=1, max_position_embeddings=128)).eval()
    make_switchable_(model, PROFILES, QuantConfig(act='per_token'))
    found = quantize_(model, batches(200))
    inside = {n:c for n,c in found.items() if 'experts' in n}
    assert len(inside)==6 and sum(c.chosen[4] for c in inside.values())<.9*sum(c.rounded[4] for c in inside.values())
    assert torch.isfinite(logits(model, 'p4')).all()
