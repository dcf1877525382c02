"A step for each group of inputs: products, the packed file, the lean loop, and the command line."
import itertools
import pytest, torch
from switchable_llm.system.native import native_features
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import use_profile
from switchable_llm.quantizers import (
    Bits, QuantConfig, blocks, dequantize_weight, fake_quant, nested_codes, quantize_weight, token_qparams, unblocks)
from switchable_llm.serving import kernels
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.kernels import (
    ActQuant, GroupSteps, LinearPlan, group_steps, pack_planes, plane_linear_reference, plan_report)
from switchable_llm.serving.lean import LiveStep, lean_tokens, torch_step
from switchable_llm.serving.packed import load_packed
from test_packed import CLASSES, check_same, switchable

native = pytest.mark.skipif('decode' not in native_features(), reason='no compiled kernels here')
ACTS = [None, ActQuant(8, False), ActQuant(8, False, .031, 117), ActQuant(8, True), ActQuant(4, False), ActQuant(12, False),
        ActQuant(16, True)]
SHAPES = [(50, 100, 32), (64, 192, 64), (33, 130, 64), (17, 300, 128), (1, 20, 16), (48, 200, 48)]   # outputs, inputs, group

def numbers(*shape, seed=1): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def plan(n, k, size, bits, act=None, lora=True):
    w = numbers(n, k, seed=0)*torch.linspace(.1, 3, k)
    codes,step = nested_codes(blocks(w, QuantConfig(weight='per_group', group_size=size)))
    adapter = (numbers(3, k, seed=2)*.1, numbers(n, 3, seed=3)*.1, 2.) if lora else None
    planes,steps = pack_planes(unblocks(codes, w.shape)),group_steps(step[..., 0], size)
    return LinearPlan(planes, bits, steps, None, numbers(n, seed=4), act, adapter)

def slack(x, p):   # sums of float32 numbers, one for each group, may err by so much; float activations by theirs too
    w = ((kernels.unpack_planes(p.planes, p.bits).double()-p.zero)*kernels._spread(p).T).abs().sum(1)
    if p.act is None: return 2**-22*(4+p.planes.k/p.scale.size)*x.abs().amax(-1, keepdim=True).double()*w
    qp = p.act.qparams(x)
    return 2**-23*(4+p.planes.k/p.scale.size)*qp.scale.double()*2**p.act.bits*w

@pytest.mark.parametrize('n,k,size', SHAPES)
def test_every_path_is_near_the_formula(n, k, size):
    for bits,act in itertools.product(range(2, 9), ACTS):
        p,x = plan(n, k, size, bits, act, lora=False),numbers(19, k)
        exact = plane_linear_reference(x, p)
        for y in (p(x), kernels._torch_linear(x, p)):
            assert ((y-exact).abs() <= exact.abs()*2**-22 + slack(x, p)).all(), (bits, act)

@pytest.mark.parametrize('n,k,size', SHAPES)
def test_formula_is_that_of_the_float_weight(n, k, size):
    p,x = plan(n, k, size, 4, ActQuant(8, False), lora=False),numbers(5, k)
    w = numbers(n, k, seed=0)*torch.linspace(.1, 3, k)
    cfg = QuantConfig(weight='per_group', group_size=size)
    y = fake_quant(x, token_qparams(x, 8, False)).double()@dequantize_weight(*quantize_weight(w, 4, cfg), cfg).double().T
    torch.testing.assert_close(plane_linear_reference(x, p), y+p.bias, rtol=1e-5, atol=1e-5)

@native
@pytest.mark.parametrize('n,k,size', SHAPES)
def test_a_row_does_not_depend_on_the_rows_beside_it(n, k, size):
    for bits,act in itertools.product((8, 6, 4), ACTS):
        p,x = plan(n, k, size, bits, act),numbers(21, k)
        assert torch.equal(p(x), torch.cat([p(r[None]) for r in x]))

@native
def test_numbers_that_are_not_finite_stay_in_their_row():
    p,x = plan(50, 100, 32, 8, ActQuant(8, False)),numbers(3, 100)
    right = p(x)
    x[1, 5] = float('inf')
    assert torch.equal(p(x)[[0, 2]], right[[0, 2]]) and p(x)[1].isnan().all()

def test_what_does_not_fit_is_refused():
    p = plan(50, 100, 32, 4)
    with pytest.raises(ValueError, match='groups of 24 inputs: the kernels take multiples of 16'):
        group_steps(torch.ones(50, 5), 24)
    for steps,size in ((p.scale.steps, 16), (p.scale.steps[:3], 32), (p.scale.steps.double(), 32)):
        with pytest.raises(ValueError, match='steps of groups of'): LinearPlan(p.planes, 4, GroupSteps(steps, size))
    assert 'group of 32 inputs' in plan_report(p) or 'decode' not in native_features()

@native
@pytest.mark.parametrize('wrong', [dict(group=48), dict(group=24), dict(group=-16), dict(group=0), dict(step_type=1), dict(scale=100),
                                   dict(totals=49)], ids=str)
def test_native_code_refuses_what_does_not_fit(wrong):
    p = plan(50, 100, 32, 8, ActQuant(8, False))
    for name,value in wrong.items():
        if name in ('group','step_type'): setattr(p.linear, name, value)
        else: p.linear.len[kernels._BUFFERS.index(name)] = value
    with pytest.raises(ValueError, match='a product of'): p(torch.ones(1, 100))

FLOAT = [Profile(f'w{b}', Bits(b)) for b in (8, 6, 4)]
IDS = torch.randint(1, 97, (1, 9), generator=torch.Generator().manual_seed(5))

@pytest.mark.parametrize('size,more', [(16, {}), (32, dict(act='per_token')), (32, dict(rotate=True)), (20, dict(rotate=True))], ids=str)
@pytest.mark.parametrize('kind', CLASSES)
def test_a_packed_model_is_as_in_training(kind, size, more, tmp_path):
    model = switchable(kind, weight='per_group', group_size=size, **more)
    freeze(model, tmp_path/'m.safetensors')
    check_same(model, load_packed(tmp_path/'m.safetensors'))

@pytest.fixture(scope='module', params=[('gpt2', 16, True), ('llama', 32, False), ('llama_tied', 16, False),
                                        ('llama_tied', 32, True), ('qwen2', 32, True)], ids=str)
def packed(request, tmp_path_factory):   # 48 and 84 inputs: the last group is a short one
    path,(kind,size,rotate) = tmp_path_factory.mktemp('packed')/'m.safetensors',request.param
    freeze(switchable(kind, profiles=FLOAT+['bw8'], weight='per_group', group_size=size, rotate=rotate), path)
    return load_packed(path)

@native
@pytest.mark.parametrize('profile', ['w8','w6','w4'])
def test_the_lean_loop_writes_what_the_modules_write(packed, profile):
    from transformers import DynamicCache
    kw = dict(attention_mask=torch.ones_like(IDS), do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=12,
              output_logits=True, return_dict_in_generate=True)
    with use_profile(packed, profile):
        right = packed.generate(IDS, past_key_values=DynamicCache(config=packed.config), **kw)
        before = packed.native_status.native
        got = packed.generate(IDS, **kw)
    assert packed.native_status.native>0 and packed.native_status.obstacle is None, before
    assert torch.equal(got.sequences, right.sequences)
    a,b = torch.cat(got.logits),torch.cat(right.logits)
    assert (a-b).abs().max() <= 1e-5*b.abs().max()

@native
@pytest.mark.parametrize('profile', ['w8','w4','bw8'])
def test_a_prompt_is_as_its_tokens_one_by_one(packed, profile):
    with use_profile(packed, profile), torch.no_grad():
        one,all_ = LiveStep(packed, 32),LiveStep(packed, 32)
        whole = all_.prompt(IDS[0].tolist()).clone()
        for t in IDS[0].tolist(): last = one(t)
        # attention of a prompt adds in another order, and a code of an activation may flip for it
        assert (whole-last).abs().max() <= (1e-4 if profile!='bw8' else .05)*whole.abs().max()
        step = one.now()
        right = torch_step(step.table, step.cache, 7, one.cache.length)
        got = one(7)
        assert (got-right).abs().max() <= (1e-4 if profile!='bw8' else .05)*right.abs().max()

def test_groups_that_the_kernels_do_not_take_run_unpacked(tmp_path):
    model = switchable('llama', weight='per_group', group_size=20, profiles=FLOAT)
    freeze(model, tmp_path/'m.safetensors')
    loaded = load_packed(tmp_path/'m.safetensors')
    check_same(model, loaded)
    if 'decode' in native_features(): assert 'multiple of 16 inputs' in loaded.native_status.obstacle
    with pytest.raises(ValueError, match='group_size=32'): list(lean_tokens(LiveStep(loaded, 16), [1, 2], 2))

def test_a_group_of_all_inputs_is_a_channel(tmp_path):
    logits = []
    for kw in (dict(weight='per_group', group_size=96), dict()):
        path = tmp_path/'m.safetensors'
        freeze(switchable('llama', profiles=FLOAT, **kw), path)
        with torch.no_grad(): logits.append(load_packed(path)(IDS).logits)
    assert torch.equal(*logits)

def test_from_the_command_line(tmp_path, capsys):
    "A base model is quantized in groups, frozen, and answers from the file."
    from switchable_llm.apps.cli import main
    made,file = str(tmp_path/'m'),str(tmp_path/'m.safetensors')
    how = ['--group-size', '64', '--weight-range', 'mse', '--rotate', 'mlp_out', 'attn_out', '--profiles', 'bw8', 'bw4']
    assert main(['quantize', 'tiny', '--data', 'tiny', '--task', 'squad', '--n', '16', *how, '--out', made, '--quiet'])==0
    assert main(['freeze', made, '--out', file])==0
    cfg = load_packed(file).switch.cfg
    assert (cfg.weight, cfg.group_size, cfg.weight_range, cfg.rotate)==('per_group', 64, 'mse', ('mlp_out','attn_out'))
    assert main(['generate', file, '--prompt', 'Bemola was', '--max-new-tokens', '3'])==0
    capsys.readouterr()
    assert main(['answer', file, '--question', 'When was Bemola born?', '--context', 'Bemola was born in 1834.'])==0
    said = capsys.readouterr().out
    assert 'bw8' in said and 'bw4' in said
    assert main(['quantize', made, '--data', 'tiny', '--task', 'squad', *how[2:4], '--out', str(tmp_path/'n'), '--quiet'])==1
    assert '--weight-range mse' in capsys.readouterr().err
