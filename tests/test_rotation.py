"Rotated layers: the same function at float, one basis for weight, input, range and codes, and the same served as trained."
import copy, json
import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from switchable_llm.core.calibration import calibrate_, learn_ranges_
from switchable_llm.core import rotation
from switchable_llm.core.integer import ReferenceKernel
from switchable_llm.system.native import native_features
from switchable_llm.core.layers import Setting, fake_quant_product
from switchable_llm.core.profiles import Profile, Rule, load_profiles, save_profiles
from switchable_llm.core.rotation import rotate, rotate_plain, rotation_of
from switchable_llm.core.switching import make_switchable_, use_profile
from switchable_llm.formats.gguf_blocks import block_fault
from switchable_llm.formats.torchao import export_torchao
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.models.checkpoints import load_switchable, read_switchable, save_switchable
from switchable_llm.quantizers import Bits, QuantConfig, dequantize_weight, fake_quant, quantize_weight, token_qparams
from switchable_llm.search.gptq import quantize_
from switchable_llm.serving.exports import freeze, merge
from switchable_llm.serving.kernels import ActQuant, LinearPlan, pack_planes, plane_linear, plane_linear_reference
from switchable_llm.serving.lean import LiveStep
from switchable_llm.serving.packed import load_packed

BITS = 'w4','w8a8','w6a6','w4a8','w4a4'
IDS = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
BATCH = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS))
native = pytest.mark.skipif('decode' not in native_features(), reason='the compiled kernels do not run here')

def llama(**kw):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**dict(vocab_size=97, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=.15)|kw)).eval()
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4, initializer_range=.15)).eval()
def mixtral():
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, num_local_experts=3, max_position_embeddings=64, pad_token_id=0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model('mixtral', **sizes)).eval()
MAKES = dict(llama=llama, gpt2=gpt2, mixtral=mixtral)

def rotated(make=llama, rotate=True, profiles=BITS, act='per_token', adapters=False, **kw):
    model = make()
    ps = [p if isinstance(p, Profile) else Profile(p, p) for p in profiles]
    make_switchable_(model, ps, QuantConfig(act=act, rotate=rotate, **kw))
    calibrate_(model, [BATCH])
    if adapters:
        add_adapters_(model, r=4, dropout=0.)
        for l in model.switch.layers:
            for m in l.adapters.values(): torch.nn.init.normal_(m.b, std=.05)
    return model

def logits(model, profile, ids=IDS):
    with torch.no_grad(), use_profile(model, profile): return model(ids).logits

def dense(n): return rotate_plain(torch.eye(n))

# --- the transform ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [4, 8, 12, 16, 20, 24, 36, 44, 48, 60, 76, 92, 128, 140, 288, 576, 896, 1536])
def test_it_is_the_dense_product(n):
    x,r = torch.randn(3, 5, n),dense(n)
    assert (r.double()@r.double().T-torch.eye(n)).abs().max()<1e-6
    for f in (rotate, rotate_plain):
        assert torch.allclose(f(x), x@r, atol=2e-5)
        assert torch.allclose(f(x, back=True), x@r.T, atol=2e-5)
        assert torch.allclose(f(f(x), back=True), x, atol=2e-5)

@pytest.mark.parametrize('n', [4864, 8960, 11008, 18944])
def test_wide_ones_are_orthogonal(n):
    x,y = torch.randn(2, n, dtype=torch.float64),torch.randn(2, n, dtype=torch.float64)
    assert torch.allclose(rotate(x)@rotate(y).T, x@y.T, atol=1e-9)
    assert torch.allclose(rotate(x.float()), rotate(x).float(), atol=1e-4)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    x = torch.randn(9, 576).mul(torch.logspace(-6, 2, 9)[:, None]).to(dtype)
    x[0, 3] = 0
    for back in (False, True):
        assert torch.equal(rotate(x, back), rotate(x.float(), back).to(dtype))
    assert (rotate(x).float()-rotate_plain(x).float()).abs().max()<=x.abs().max()*.01

KEPT = [dict(), dict(weight='per_tensor', codes='independent'), dict(weight='per_group', group_size=16, weight_range='mse')]

@pytest.mark.parametrize('cfg', KEPT)
@pytest.mark.parametrize('kind', ['llama','gpt2','mixtral'])
@pytest.mark.parametrize('compiled', [False, True])
def test_autocast_does_not_show_in_what_is_kept(monkeypatch, compiled, kind, cfg):
    "Weights, codes and what kernels make of them are the same, whoever is the first to ask."
    if not compiled: monkeypatch.setattr(rotation, '_native', lambda: None)
    model,kernel = rotated(MAKES[kind], **cfg),ReferenceKernel()
    def made(l):
        l.forget()
        with torch.no_grad():
            q,qp = l.codes_at(4)
            out = [l.weight_at(None), l.unrotated_weight_at(4), l.weight_at(8), q, *(t for t in qp if t is not None)]
            return out+[t for t in l.prepared_at(4, kernel) if torch.is_tensor(t)] if cfg=={} else out
    for l in model.switch.layers:
        plain = made(l)
        with torch.autocast('cpu', torch.bfloat16): cast = made(l)
        assert len(plain)==len(cast) and all(a is b or a==b if isinstance(a, int) else torch.equal(a, b) for a,b in zip(plain, cast))

def test_autocast_does_not_show_in_the_gradient():
    x = torch.randn(4, 576, requires_grad=True)
    grads = []
    for cast in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=cast): y = rotate_plain(x)
        grads += torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(*grads) and rotate_plain(torch.empty(3, 48, device='meta')).shape==(3, 48)

def test_rows_with_gaps_and_none_at_all():
    x = torch.randn(6, 100)[:, 8:56]
    assert torch.allclose(rotate(x), x@dense(48), atol=1e-5) and torch.allclose(rotate(x.T[:4].T), x[:, :4]@dense(4), atol=1e-5)
    assert rotate(x[:0]).shape==(0, 48) and rotate(torch.randn(2, 0, 48)).shape==(2, 0, 48)

def test_its_gradient_is_the_transpose():
    x = torch.randn(4, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x).sin(), (x,)) and torch.autograd.gradgradcheck(lambda x: rotate(x)**2, (x,))
    x,g = torch.randn(4, 48, requires_grad=True),torch.randn(4, 48)
    rotate(x).backward(g)
    assert torch.allclose(x.grad, g@dense(48).T, atol=1e-5)

@pytest.mark.parametrize('n', [0, 1, 2, 6, 30, 101])
def test_no_rotation_fits(n):
    with pytest.raises(ValueError, match=f'{n} features'): rotation_of(n)

# --- a layer ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', MAKES)
@pytest.mark.parametrize('weight', [dict(), dict(weight='per_group', group_size=16), dict(codes='independent')])
def test_a_layer_is_its_formula(kind, weight):
    "x R on its grid, times W R on its own; float stays bit for bit."
    model,plain = rotated(MAKES[kind], **weight),MAKES[kind]()
    assert all(model.switch.rotated) and torch.equal(logits(model, 'float'), plain(IDS).logits)
    for l in model.switch.layers[:8]:
        x,r = torch.randn(7, l.in_features),dense(l.in_features)
        w = (l.weight.T if l.axis else l.weight).detach()
        for bits in map(Bits.parse, (*BITS, 'a8')):
            v = x@r
            if bits.a: v = fake_quant(rotate(x), token_qparams(rotate(x), bits.a, False), True)
            q = rotate(w) if bits.w is None else dequantize_weight(*quantize_weight(rotate(w), bits.w, l.switch.cfg), l.switch.cfg)
            want = v@q.T+(0 if l.bias is None else l.bias)
            assert torch.allclose(fake_quant_product(l, x, bits), want, atol=2e-4)
            assert torch.allclose(l.at(x, Setting(bits, None)), want, atol=2e-3)
            back = l.unrotated_weight_at(bits.w)
            if not bits.a: assert torch.allclose(x@(back.T if not l.axis else back)+(0 if l.bias is None else l.bias), want, atol=2e-4)

def test_some_sites_only():
    model = rotated(rotate=['mlp_out','attn_out'])
    for s,l in zip(model.switch.sites, model.switch.layers): assert l.rotates==(s.site in ('mlp_out','attn_out'))
    assert model.switch.cfg.rotate==('mlp_out','attn_out')     # as a tuple, whatever JSON made of it

def test_a_head_that_is_the_embedding_stays():
    tied,own = llama(tie_word_embeddings=True),llama(tie_word_embeddings=False)
    for model,want in ((tied, False), (own, True)):
        make_switchable_(model, ['bw8'], QuantConfig(act='per_token', rotate=True), embedding=True, lm_head=True)
        by_site = {s.site:r for s,r in zip(model.switch.sites, model.switch.rotated)}
        assert by_site['lm_head']==want and not by_site['embedding'] and by_site['mlp_in']

@pytest.mark.parametrize('rotate,why', [(('mlp_oot',), 'mlp_oot'), (('lm_head',), "'lm_head'"), (('embedding',), 'embedding')])
def test_a_site_that_is_not_there(rotate, why):
    model = llama()
    with pytest.raises(ValueError, match=why): make_switchable_(model, ['bw8'], QuantConfig(rotate=rotate))
    assert not hasattr(model, 'switch')

@pytest.mark.parametrize('rotate', [(), 'mlp_out', 1, None, ('mlp_out', 3)])
def test_settings_are_checked(rotate):
    with pytest.raises(ValueError, match='rotate='): QuantConfig(rotate=rotate)

def test_a_width_that_no_rotation_fits_names_the_layer():
    model = llama(intermediate_size=90)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj: 90 features.*attn_qkv"):
        make_switchable_(model, ['bw8'], QuantConfig(rotate=True))
    make_switchable_(model, ['bw8'], QuantConfig(act='per_token', rotate=('attn_qkv','attn_out','mlp_in')))
    assert logits(model, 'bw8').isfinite().all()

def test_outliers_are_spread():
    "With a few large inputs, four bits lose less."
    model = llama()
    for b in model.model.layers:
        with torch.no_grad(): b.mlp.up_proj.weight[5] *= 60
    ref,gaps = model(IDS).logits.detach(),{}
    for r in (False, ('mlp_out',)):
        m = copy.deepcopy(model); make_switchable_(m, ['bw4'], QuantConfig(act='per_token', rotate=r))
        p = Profile('p', 'float', (Rule('w8a4', site=('mlp_out',)),))
        gaps[bool(r)] = (logits(m, p)-ref).square().mean()
    assert gaps[True]<gaps[False]*.7

# --- training and ranges ---------------------------------------------------------------------------------------------

def test_the_base_is_trained_through_the_rotation():
    "Straight through: the gradient of the product with the fake-quantized weight, turned back."
    for make in (llama, gpt2):
        l = rotated(make).switch.layers[0]
        l.weight.requires_grad_(True)
        x = torch.randn(5, l.in_features, requires_grad=True)
        g = torch.randn(5, l.out_features)
        l.at(x, Setting(Bits(4), None)).backward(g)
        want = g.T@x.detach()
        assert torch.allclose(l.weight.grad, want.T if l.axis else want, atol=1e-4)
        w = l.unrotated_weight_at(4).detach()
        assert torch.allclose(x.grad, g@(w.T if l.axis else w), atol=1e-4)

@pytest.mark.parametrize('kernel', ['auto', 'float'])
def test_the_gradient_of_the_input(kernel):
    model = rotated()
    model.requires_grad_(False); model.switch.kernel = kernel
    l = model.switch.layers[0]
    x,g = torch.randn(40, l.in_features, requires_grad=True),torch.randn(40, l.out_features)
    l.at(x, Setting(Bits(8, 8), None)).backward(g)
    assert torch.allclose(x.grad, g@l.unrotated_weight_at(8), atol=2e-2*float(g.abs().max()))

def test_ranges_are_of_the_rotated_input_and_kept_apart():
    off = Profile('off', 'w8a8', (Rule('w8a8', site=('mlp_out',), rotate=False),))
    model = rotated(profiles=('w8a8', off), act='per_tensor')
    l = next(l for l,s in zip(model.switch.layers, model.switch.sites) if s.site=='mlp_out')
    seen = []
    hook = l.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    for p in ('w8a8', 'off'): logits(model, p)
    hook.remove()
    assert set(l.observers)=={'8','8p'}
    for key,x in (('8', rotate(seen[0])), ('8p', seen[1])):
        assert abs(float(l.observers[key].hi)-float(x.max()))<.2*float(x.max())
    assert len(learn_ranges_(model))==len(model.switch.layers)+2
    state = {k:v.clone() for k,v in model.state_dict().items()}
    other = rotated(profiles=('w8a8', off), act='per_tensor'); other.load_state_dict(state)
    assert torch.equal(logits(other, 'off'), logits(model, 'off'))

def test_an_adapter_sees_the_input_as_it_comes():
    model = rotated(adapters=True)
    l = model.switch.layers[0]
    x,s = torch.randn(4, l.in_features),model.switch.bound['w4'][0]
    lora = l.adapters[s.adapter]
    assert torch.allclose(l.at(x, s)-l.at(x, s._replace(adapter=None)), x@lora.a.T@lora.b.T*lora.scaling, atol=1e-5)

# --- rules -----------------------------------------------------------------------------------------------------------

def test_a_rule_leaves_it_off(tmp_path):
    rule = dict(site='mlp_in', bits='w4a8', rotate=False)
    off = Profile.from_dict(dict(name='off', default='w4a8', rules=[rule]))
    assert Profile.from_dict(off.to_dict())==off and off.to_dict()['rules'][0]['rotate'] is False
    save_profiles([off], tmp_path/'p.yaml'); assert load_profiles(tmp_path/'p.yaml')==[off]
    (tmp_path/'q.yaml').write_text('name: "off"\ndefault: w4a8\nrules:\n- {site: mlp_in, bits: w4a8, rotate: no}\n')
    assert load_profiles(tmp_path/'q.yaml')==[off]
    assert 'rotate' not in Profile('p', 'w4', (Rule('w8', site=('mlp_in',)),)).to_dict()['rules'][0]
    model,plain = rotated(profiles=('w4a8', off)),rotated(rotate=('attn_qkv','attn_out','mlp_out'), profiles=('w4a8',))
    for s,t in zip(model.switch.sites, model.switch.bound['off']): assert t.plain==(s.site=='mlp_in')
    assert torch.equal(logits(model, 'off'), logits(plain, 'w4a8'))
    assert not torch.equal(logits(model, 'off'), logits(model, 'w4a8'))
    assert not any(s.plain for s in rotated(rotate=False, profiles=(off,)).switch.bound['off'])
    with pytest.raises(ValueError, match='rotate=3'): Rule.from_dict(dict(site='mlp_in', bits='w4', rotate=3))
    with pytest.raises(ValueError, match="'site', 'layers' or 'glob'"): Rule.from_dict(dict(bits='w4', rotate=False))

def test_codes_that_are_held_have_one_basis():
    off = Profile('off', 'w4', (Rule('w4', site=('mlp_in',), rotate=False),))
    model = rotated(profiles=('w4','w8'))
    batches = [dict(input_ids=torch.randint(3, 97, (2, 60), generator=torch.Generator().manual_seed(i))) for i in range(6)]
    found = quantize_(model, batches, widths=(4, 8))
    assert all(c.chosen[4]<=c.rounded[4]*1.001 for c in found.values())
    assert sum(c.chosen[4] for c in found.values())<sum(c.rounded[4] for c in found.values())*.95
    l,x = model.switch.layers[0],[]
    hook = l.register_forward_pre_hook(lambda m, a: x.append(a[0]))
    for b in batches:
        with torch.no_grad(): model(**b)
    hook.remove()
    x = torch.cat(x).flatten(0, 1)
    def gap(): return (l.at(x, Setting(Bits(4), None))-l.base(x)).square().sum()/l.base(x).square().sum()
    name = model.switch.sites[0].name
    assert abs(gap()/found[name].chosen[4]-1)<.02        # the sums were of rotated inputs
    l.codes.clear(); l.forget()
    assert abs(gap()/found[name].rounded[4]-1)<.02
    model.switch.add(off)
    with pytest.raises(ValueError, match='rotate: no'): quantize_(model, batches)
    l.hold_codes_(*l.nested_parts())
    model.switch.layers[4].hold_codes_(*model.switch.layers[4].nested_parts())
    with pytest.raises(ValueError, match='rotate: no'): logits(model, 'off')

# --- out of the process and back -------------------------------------------------------------------------------------

@pytest.mark.parametrize('rotate', [True, ('mlp_out',)])
def test_a_checkpoint_remembers(tmp_path, rotate):
    model = rotated(rotate=rotate, act='per_tensor', adapters=True)
    save_switchable(model, tmp_path/'c')
    assert read_switchable(tmp_path/'c')['format_version']==4
    back = load_switchable(tmp_path/'c', llama())
    assert back.switch.cfg==model.switch.cfg and torch.equal(logits(back, 'w4a8'), logits(model, 'w4a8'))

def test_without_a_rotation_the_older_format_is_written(tmp_path):
    model = rotated(rotate=False).requires_grad_(False)
    save_switchable(model, tmp_path/'c')
    d = read_switchable(tmp_path/'c')
    assert d['format_version']==1 and 'rotate' not in d['quantizer']

def test_save_pretrained_remembers(tmp_path):
    model = rotated(adapters=True)
    model.save_pretrained(tmp_path/'m')
    settings = json.loads((tmp_path/'m'/'config.json').read_text())['quantization_config']
    assert settings['quantizer']['rotate'] is True and settings['format_version']==2
    back = AutoModelForCausalLM.from_pretrained(tmp_path/'m')
    assert all(back.switch.rotated) and torch.equal(logits(back, 'w4a8'), logits(model, 'w4a8'))

def test_merged_weights_are_turned_back():
    for make in (llama, gpt2, mixtral):
        model = rotated(make, adapters=True)
        plain = merge(model, 'w4')
        assert torch.allclose(plain(IDS).logits, logits(model, 'w4'), atol=2e-3)

def test_programs_that_turn_nothing_are_refused():
    off = Profile('off', 'w8', (Rule('w8', layers=(0, 1), rotate=False),))
    model = rotated(profiles=('w8', off))
    with pytest.raises(ValueError, match='merge or export_float'): export_torchao(model, 'w8')
    export_torchao(model, 'off')
    l = model.switch.layers[0]
    assert 'rotated weight' in (block_fault(l) or '') and 'rotated weight' not in (block_fault(l, True) or '')

# --- served ----------------------------------------------------------------------------------------------------------

ACTS = [None, ActQuant(8, False), ActQuant(4, False), ActQuant(12, True), ActQuant(8, False, .03, 120)]

@pytest.mark.parametrize('n,k', [(40, 48), (33, 576), (16, 140), (48, 92), (20, 4)])
def test_a_packed_product_is_its_formula(n, k):
    torch.manual_seed(k)
    planes = pack_planes(torch.randint(0, 240, (n, k), dtype=torch.uint8))
    lora = torch.randn(4, k)*.1,torch.randn(n, 4)*.1,.5
    for bits in (4, 6, 8):
        for act in ACTS:
            p = LinearPlan(planes, bits, torch.rand(n)*.1, None, torch.randn(n), act, lora, rotated=True)
            for m in (1, 3, 30):
                for dtype in (torch.float32, torch.bfloat16):
                    x = torch.randn(m, k).to(dtype)
                    y,want = plane_linear(x, p).float(),plane_linear_reference(x, p)
                    assert (y-want).abs().max()<=want.abs().max()*(1e-5 if dtype==torch.float32 else 1e-2)

@pytest.mark.parametrize('kind', MAKES)
@pytest.mark.parametrize('act', ['per_token', 'per_tensor'])
def test_served_as_trained(tmp_path, kind, act):
    model = rotated(MAKES[kind], act=act, adapters=True)
    freeze(model, tmp_path/'m')
    packed = load_packed(tmp_path/'m')
    assert packed.switch.rotated==model.switch.rotated
    model.switch.kernel = 'float'
    for a,b in zip(model.switch.layers, packed.switch.layers):
        for p in BITS:
            x = torch.randn(5, a.in_features)
            y,want = b.plan(*packed.switch.bound[p][b.index])(x),a.at(x, model.switch.bound[p][a.index]).detach()
            assert (y-want).abs().max()<=2e-4*want.abs().max()

def test_groups_are_served_rotated(tmp_path):
    model = rotated(weight='per_group', group_size=16, adapters=True)
    freeze(model, tmp_path/'m')
    packed = load_packed(tmp_path/'m')
    assert torch.allclose(logits(packed, 'w4'), logits(model, 'w4'), atol=1e-3)

def test_a_file_has_one_basis_for_a_layer(tmp_path):
    off = Profile('off', 'w4a8', (Rule('w4a8', site=('mlp_in',), rotate=False),))
    model = rotated(profiles=('w4a8','w8a8', off))
    with pytest.raises(ValueError, match=r"gate_proj: profile 'off' leaves its rotation off and 'w4a8' does not"):
        freeze(model, tmp_path/'m')
    freeze(model, tmp_path/'m', ['off'])
    packed = load_packed(tmp_path/'m')
    assert torch.allclose(logits(packed, 'off'), logits(model, 'off'), atol=1e-2)
    with pytest.raises(ValueError, match='holds its weight rotated'):
        packed.switch.add(Profile('other', 'w4', (Rule('w4', site=('mlp_out',), rotate=False),)))

def test_a_file_without_rotation_is_of_the_older_version(tmp_path):
    from switchable_llm.serving.packed_file import read_head
    for r,version in ((False, 2), (True, 3)):
        freeze(rotated(rotate=r), tmp_path/f'{r}')
        assert read_head(tmp_path/f'{r}').d['format_version']==version

@native
@pytest.mark.parametrize('kind', ['llama','gpt2'])
def test_the_lean_loop_gives_the_same(tmp_path, kind):
    model = rotated(MAKES[kind], adapters=True)
    freeze(model, tmp_path/'m', lm_head=8, embedding=8)
    packed = load_packed(tmp_path/'m')
    ids = IDS[0].tolist()
    for p in ('w4','w8a8'):
        want = logits(packed, p, IDS[:1])[0]
        with use_profile(packed, p), torch.no_grad():
            step = LiveStep(packed)
            one = [step(t).clone() for t in ids]
            again = LiveStep(packed)
            many = again.prompt(ids)
        for y,w in zip(one, want): assert (y-w).abs().max()<=(.02 if p=='w4' else .3)*w.std()
        assert torch.equal(many, one[-1]) or (many-one[-1]).abs().max()<1e-3*one[-1].std()

def test_neighbours_turn_one_input_once(monkeypatch):
    "Queries, keys and values read one input; its gradient is the sum that they have when each turns its own."
    from switchable_llm.core import layers
    calls = []
    def counting(x, back=False): calls.append(x.shape); return rotate(x, back)
    model = rotated(adapters=True)
    def run():
        model.zero_grad()
        with use_profile(model, 'w8a8'): model(**BATCH, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]
    run()                                        # weights are ready
    monkeypatch.setattr(layers, 'rotate', counting)
    shared = run()
    assert len(calls)==2*4                       # of a block's seven layers: qkv, out, gate and up, down
    monkeypatch.setattr(layers.QuantLayer, 'rotated', lambda self, x, plain=False: rotate(x) if self.rotates and not plain else x)
    for a,b in zip(run(), shared, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

def test_what_was_turned_is_not_kept_beyond_its_input():
    "Neither for one that changed in place, nor without a gradient for one that needs it, nor outside a pass."
    layer = (model := rotated()).switch.layers[0]
    x = torch.randn(3, 48)
    assert layer.rotated(x) is not layer.rotated(x)
    frame = model.switch.frame
    seen = []
    def look(module, args):
        x = args[0].detach().clone()
        first = layer.rotated(x)
        assert layer.rotated(x) is first
        x.mul_(2)
        assert torch.equal(layer.rotated(x), rotate(x))
        y = x.clone().requires_grad_()
        with torch.no_grad(): layer.rotated(y)
        seen.append(layer.rotated(y).requires_grad)
    hook = model.switch.layers[0].register_forward_pre_hook(look)
    with use_profile(model, 'w8a8'): model(**BATCH)
    hook.remove()
    assert seen==[True] and model.switch.frame is frame
