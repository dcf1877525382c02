"Exports, loaded where they are to run: plain transformers, torchao, GGUF through transformers' own reader."
import io, os, sys
import pytest, torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from switchable_llm.models.loading import gguf_overrides, load_model
from switchable_llm.data.embedded import tiny_tokenizer
from switchable_llm.data.squad import load_squad
from switchable_llm.formats.torchao import LinearWithLoRA, export_torchao, logit_gap, use_weights_only
from switchable_llm.formats.gguf_blocks import block_type, gguf_blocks, nearest_q8
from switchable_llm.formats.gguf_file import GGUF_DTYPES, adapter_file, export_gguf
from switchable_llm.serving.exports import export_float, merge, merged_weight
from switchable_llm.lora_routing import LoRA, adapter_params, add_adapters_
from switchable_llm.models.checkpoints import base_hash
from switchable_llm.quantizers import Bits, QuantConfig, dequantize_weight, quantize_weight
from switchable_llm.core.profiles import PROFILES, Profile, Rule, load_profiles
from switchable_llm.core.layers import QuantLayer, Setting
from switchable_llm.core.calibration import calibrate_
from switchable_llm.core.switching import make_switchable_, use_profile
from switchable_llm.profiles_eval import answer

IDS = torch.randint(2, 200, (3, 12), generator=torch.Generator().manual_seed(2))
BATCH = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS))
common = dict(vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=1)

def base(kind, dtype=torch.float32, tied=True, **kw):
    "A random model of a family, with biases and norms that are not those of a new one."
    torch.manual_seed(1)
    if kind=='gpt2':
        sizes = dict(vocab_size=200, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
        m = GPT2LMHeadModel(GPT2Config(**sizes | dict(tie_word_embeddings=tied) | kw))
    else:
        own = dict(mistral=dict(sliding_window=None), qwen3=dict(head_dim=24), gemma=dict(head_dim=24),
                   gemma3_text=dict(head_dim=24, query_pre_attn_scalar=24, sliding_window=5, num_hidden_layers=7),
                   **dict.fromkeys(('phi3','olmo2','smollm3'), dict(num_hidden_layers=5)))
        settings = common | dict(pad_token_id=0, tie_word_embeddings=tied) | own.get(kind, {}) | kw
        m = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for p in m.parameters(): p.add_(.05*torch.randn_like(p))
    return m.to(dtype).eval()

def switchable(kind, profiles=('bw4','bw8','mixed8648'), cfg=QuantConfig(), dtype=torch.float32, tied=True,
               adapters=True, ends=False, route='bits', **kw):
    m = base(kind, dtype, tied, **kw)
    make_switchable_(m, profiles, cfg, embedding=ends, lm_head=ends)
    m.switch.kernel = 'float'                                                       # the reference
    calibrate_(m, [BATCH])
    if adapters:
        add_adapters_(m, r=4, route=route)
        for n,p in adapter_params(m).items(): torch.nn.init.normal_(p, std=.05)
    return m

def largest(a, b): return (a-b).abs().max().item()

# --- merged ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('codes', ['independent','nested'])
@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('kind', ['gpt2','llama','mistral','qwen2'])
def test_merge_round_trip(kind, tied, codes, tmp_path):
    m = switchable(kind, tied=tied, cfg=QuantConfig(codes=codes))
    before,hashed,names = {k:v.clone() for k,v in m.state_dict().items()},base_hash(m),set(base(kind).state_dict())
    for p in ('float','bw4','bw8','mixed8648'):
        plain = merge(m, p)
        assert type(plain) is type(m) and not hasattr(plain, 'switch') and set(plain.state_dict())==names
        assert not [n for n,x in plain.named_modules() if isinstance(x, (QuantLayer, LoRA))]
        assert all(q.requires_grad for q in plain.parameters()) and not plain.training
        assert logit_gap(m, p, plain, [BATCH]).largest<2e-5                       # float32: sums in another order
        assert (plain.get_input_embeddings().weight is plain.get_output_embeddings().weight)==tied
        folder = export_float(m, p, tmp_path/p)
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert (again.get_input_embeddings().weight is again.get_output_embeddings().weight)==tied
        assert torch.equal(again(**BATCH).logits, plain(**BATCH).logits)
        assert load_profiles(folder/'profile.json')==[PROFILES[p]]
    assert base_hash(m)==hashed
    assert m.switch.profile.name=='float'
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())
    own = {id(q) for q in m.parameters()}
    assert not [1 for q in plain.parameters() if id(q) in own]
    assert not {q.data_ptr() for q in plain.parameters()} & {q.data_ptr() for q in m.parameters()}

@pytest.mark.parametrize('kind', ['gpt2','llama'])
@pytest.mark.parametrize('dtype,u', [(torch.float32, 2**-24), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@torch.no_grad()
def test_merged_weight_is_rounded_once(kind, dtype, u):
    m = switchable(kind, dtype=dtype)
    for l in m.switch.layers:
        lora = l.adapters['4']
        delta = (lora.b.double() @ lora.a.double())*lora.scaling
        exact = l.weight_at(4).double() + (delta.T if l.axis==1 else delta)
        w = merged_weight(l, Setting(Bits(4), '4'))
        assert w.dtype==dtype and ((w.double()-exact).abs() <= u*exact.abs()*(1+2**-10) + 1e-7).all()
        # without an adapter nothing is rounded
        assert torch.equal(merged_weight(l, Setting(Bits(4), None)), l.weight_at(4))
    gap = logit_gap(m, 'bw4', merge(m, 'bw4'), [BATCH])
    assert gap.relative < {torch.float32:1e-6, torch.bfloat16:.03, torch.float16:.004}[dtype]
    assert merge(m, 'bw4').dtype==dtype

@pytest.mark.parametrize('kind', ['gpt2','llama'])
def test_without_adapters_bit_for_bit(kind):
    for dtype in (torch.float32, torch.bfloat16):
        m = switchable(kind, adapters=False, dtype=dtype)
        for p in ('float','bw4','bw8','mixed8648'): assert logit_gap(m, p, merge(m, p), [BATCH]).largest==0

@pytest.mark.parametrize('kind', ['gpt2','llama'])
def test_the_fastest_kernels_are_equal_within_rounding(kind):
    pytest.importorskip('torchao', reason='the extra `torchao` is not installed')
    m = switchable(kind)
    m.switch.kernel = 'auto'
    for p in ('bw4','bw8','mixed8648'):
        for other in (merge(m, p), export_torchao(m, p)): assert logit_gap(m, p, other, [BATCH]).largest<5e-5

@torch.no_grad()
def test_activation_bits_are_what_is_lost():
    m = switchable('gpt2')
    plain = merge(m, 'bw4')
    assert logit_gap(m, 'bw4', plain, [BATCH]).largest<2e-5
    assert logit_gap(m, 'bw4', plain, [BATCH], weights_only=False).largest>.01
    m.switch.add(Profile('w4', Bits(4)))
    # a profile of weights alone loses nothing
    assert logit_gap(m, 'w4', plain, [BATCH], weights_only=False).largest<2e-5
    with use_weights_only(m, 'bw4'): x = m(**BATCH).logits
    with use_profile(m, 'w4'): assert torch.equal(m(**BATCH).logits, x)
    with pytest.raises(RuntimeError):
        with use_weights_only(m, 'bw4'): raise RuntimeError
    assert m.switch.profile.name=='float' and all(s.bits.is_float for s in m.switch.settings)

def test_adapters_by_profile_name():
    pytest.importorskip('torchao', reason='the extra `torchao` is not installed')
    m = switchable('llama', route='profile')
    for p in ('bw4','mixed8648'):
        assert logit_gap(m, p, merge(m, p), [BATCH]).largest<2e-5
        assert logit_gap(m, p, export_torchao(m, p), [BATCH]).largest<2e-5

@pytest.mark.parametrize('kind', ['gpt2','llama'])
def test_quantized_ends(kind, tmp_path):
    "Embedding and head: one tensor while they are equal, two and said so where bits or an adapter part them."
    pytest.importorskip('torchao', reason='the extra `torchao` is not installed')
    pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    same,parts = Profile('same', Bits(8)),Profile('parts', Bits(8), (Rule(Bits(4), site=('lm_head',)),))
    for adapters in (False, True):
        m = switchable(kind, [same, parts], adapters=adapters, ends=True)
        for p in ('same','parts','float'):
            plain,one = merge(m, p),p=='float' or p=='same' and not adapters
            a,b = plain.get_input_embeddings().weight,plain.get_output_embeddings().weight
            assert (a is b)==one==plain.config.tie_word_embeddings
            again = AutoModelForCausalLM.from_pretrained(export_float(m, p, tmp_path/f'{p}{adapters}'))
            assert torch.equal(again(**BATCH).logits, plain(**BATCH).logits)
            assert logit_gap(m, p, again, [BATCH]).largest<1e-4
            assert m.config.tie_word_embeddings
            assert logit_gap(m, p, export_torchao(m, p), [BATCH]).largest<1e-4
            path = export_gguf(m, p, tmp_path/f'{p}{adapters}.gguf', 'F32')
            assert torch.equal(read(path)(**BATCH).logits, plain(**BATCH).logits)

def test_gap_in_training_mode_and_of_a_padded_batch():
    m = switchable('gpt2'); plain = merge(m, 'bw8'); m.train()
    for q in m.parameters(): q.grad = torch.ones_like(q)
    again = merge(m, 'bw8')
    assert all(q.grad is None for q in again.parameters()) and not again.training
    mask = torch.ones_like(IDS); mask[0, :5] = 0
    padded = dict(input_ids=IDS.clone(), attention_mask=mask)
    assert logit_gap(m, 'bw8', plain, [padded, BATCH]).largest<2e-5
    assert m.training
    assert all(x.training for x in m.modules())
    assert not plain.training
    junk = dict(padded, input_ids=torch.where(mask.bool(), IDS, 7), labels=IDS)
    assert logit_gap(m, 'bw8', plain, [padded])==logit_gap(m, 'bw8', plain, [junk])

def test_a_merged_model_generates():
    m = switchable('gpt2', [Profile('w8', Bits(8))])
    plain = merge(m, 'w8')
    with use_profile(m, 'w8'): a = m.generate(**BATCH, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(a, plain.generate(**BATCH, max_new_tokens=6, do_sample=False, pad_token_id=0))

# --- folders and files, whole or not at all -------------------------------------------------------------------------

def fails_at(n):
    "`os.replace` that fails at its n-th call."
    real,calls = os.replace,iter(range(n+1))
    def replace(a, b):
        if next(calls, None)==n: raise OSError('gone')
        real(a, b)
    return replace

def test_folder_is_whole_or_not_at_all(tmp_path, monkeypatch):
    m = switchable('gpt2'); tok = tiny_tokenizer()
    folder = export_float(m, 'bw8', tmp_path/'a'/'b', tok)
    assert AutoTokenizer.from_pretrained(folder)('Where?').input_ids==tok('Where?').input_ids
    with pytest.raises(FileExistsError, match='overwrite=True'): export_float(m, 'bw4', folder)
    with pytest.raises(FileExistsError, match='holds a and is not an export'):
        export_float(m, 'bw4', tmp_path, overwrite=True)
    was = {f.name:f.read_bytes() for f in folder.iterdir()}
    def broken(*a, **k): raise OSError('disk full')
    with monkeypatch.context() as mp:
        mp.setattr('switchable_llm.serving.exports.save_profiles', broken)
        with pytest.raises(OSError, match='disk full'): export_float(m, 'bw4', folder, overwrite=True)
        with pytest.raises(OSError, match='disk full'): export_float(m, 'bw4', tmp_path/'a'/'c')
    # profile.json, the old one aside, the new one into place
    for n in range(20):
        with monkeypatch.context() as mp:
            mp.setattr('os.replace', fails_at(n))
            try: export_float(m, 'bw4', folder, overwrite=True)
            except OSError: pass
            else: break
        assert {f.name:f.read_bytes() for f in folder.iterdir()}==was
        assert [f.name for f in folder.parent.iterdir()]==['b']
    assert n>=3 and load_profiles(folder/'profile.json')==[PROFILES['bw4']]
    assert [f.name for f in folder.parent.iterdir()]==['b']

def test_bad_input(tmp_path):
    pytest.importorskip('torchao', reason='the extra `torchao` is not installed')
    pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    m = switchable('gpt2')
    for f in (merge, export_torchao): 
        with pytest.raises(ValueError, match="profile 'bw5'"): f(m, 'bw5')
        with pytest.raises(ValueError, match='make_switchable_'): f(base('gpt2'), 'bw4')
    for p,model,why in (('bw5', m, "profile 'bw5'"), ('bw4', base('gpt2'), 'make_switchable_')):
        with pytest.raises(ValueError, match=why): export_float(model, p, tmp_path/'x')
        with pytest.raises(ValueError, match=why): export_gguf(model, p, tmp_path/'x.gguf')
        with pytest.raises(ValueError, match=why): logit_gap(model, p, m, [BATCH])
    for dtype in ('Q4_0','f32','float32',None,torch.float32):
        with pytest.raises(ValueError, match='choose one of auto, F32'): export_gguf(m, 'bw4', tmp_path/'x.gguf', dtype)
    with pytest.raises(ValueError, match='ends in .gguf'): export_gguf(m, 'bw4', tmp_path)
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError): export_float(m, 'bw4', tmp_path/'file'/'x')
    with pytest.raises(OSError): export_gguf(m, 'bw4', tmp_path/'file'/'x.gguf')
    assert [f.name for f in tmp_path.iterdir()]==['file']
    with pytest.raises(ValueError, match='batches is empty'): logit_gap(m, 'bw4', m, [])

@pytest.mark.parametrize('name', ['torchao','gguf'])
def test_a_missing_package_names_its_extra(name, monkeypatch, tmp_path):
    m = switchable('gpt2')
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"pip install 'switchable-llm\[{name}\]'"):
        export_torchao(m, 'bw4') if name=='torchao' else export_gguf(m, 'bw4', tmp_path/'x.gguf')
    assert not list(tmp_path.iterdir())

# --- torchao --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('cfg', [
    QuantConfig(codes='independent'), QuantConfig(), QuantConfig(codes='independent', weight_symmetric=False),
    QuantConfig(weight='per_tensor'), QuantConfig(weight='per_group', group_size=32),
    QuantConfig(weight='per_group', group_size=16, codes='nested')], ids=str)
@pytest.mark.parametrize('kind', ['gpt2','llama'])
def test_torchao_holds_the_same_weights(kind, cfg, dtype):
    pytest.importorskip('torchao', reason='the extra `torchao` is not installed')
    from torchao.quantization import IntxUnpackedToInt8Tensor
    m = switchable(kind, [Profile(f'w{b}', Bits(b)) for b in range(2, 9)], cfg, dtype)
    before = {k:v.clone() for k,v in m.state_dict().items()}
    for b in range(2, 9):
        ao = export_torchao(m, f'w{b}')
        for s,l in zip(m.switch.sites, m.switch.layers):
            new = ao.get_submodule(s.name)
            assert isinstance(new, LinearWithLoRA)
            assert isinstance(new.weight, IntxUnpackedToInt8Tensor)
            assert type(new.base) is torch.nn.Linear
            assert -2**(b-1)<=int(new.weight.qdata.min())
            assert int(new.weight.qdata.max())<2**(b-1)
            assert new.weight.target_dtype==getattr(torch, f'int{b}')
            assert torch.equal(new.weight.dequantize(), l.weight_at(b).T if l.axis==1 else l.weight_at(b))
        gap = logit_gap(m, f'w{b}', ao, [BATCH])
        assert gap.largest<2e-5 if dtype==torch.float32 else gap.relative<.02
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())

@pytest.mark.parametrize('kind', ['gpt2','llama'])
def test_torchao_activations_per_token(kind):
    pytest.importorskip('torchao', reason='the extra `torchao` is not installed')
    m = switchable(kind, ['uniform8','w4a8','bw6'], QuantConfig(act='per_token'))
    for p in ('uniform8','w4a8'):
        gap = logit_gap(m, p, export_torchao(m, p, activations=True), [BATCH], weights_only=False)
        assert gap.relative<.2*logit_gap(m, p, export_torchao(m, p), [BATCH], weights_only=False).relative
    with pytest.raises(ValueError, match=r'layer .*0\.(attn\.c_attn|self_attn\.q_proj): torchao cannot express w6a6'):
        export_torchao(m, 'bw6', activations=True)
    a8 = Profile('a8', Bits(None, 8))
    with pytest.raises(ValueError, match='cannot express a8'): export_torchao(m, a8, activations=True)
    assert logit_gap(m, a8, export_torchao(m, a8), [BATCH]).largest==0
    for cfg in (QuantConfig(), QuantConfig(act='per_token', act_symmetric=True)):
        with pytest.raises(ValueError, match='pass activations=False'):
            export_torchao(switchable(kind, ['uniform8'], cfg), 'uniform8', activations=True)

def test_torchao_says_what_it_cannot():
    pytest.importorskip('torchao', reason='the extra `torchao` is not installed')
    m = switchable('llama', [Profile('wide', Bits(8), (Rule(Bits(12), site=('mlp_out',), layers=(1,)),))])
    with pytest.raises(ValueError, match=r'layer model\.layers\.1\.mlp\.down_proj: .*not w12.*use merge'):
        export_torchao(m, 'wide')
    m = switchable('llama', [Profile('w4', Bits(4))], QuantConfig(weight='per_group', group_size=48))
    with pytest.raises(ValueError, match=r'q_proj: its 64 inputs are no multiple of group_size=48.*use merge'):
        export_torchao(m, 'w4')
    assert logit_gap(m, 'w4', merge(m, 'w4'), [BATCH]).largest<2e-5

def test_torchao_state_dict_and_ends():
    pytest.importorskip('torchao', reason='the extra `torchao` is not installed')
    m = switchable('gpt2', [Profile('w4', Bits(4)), Profile('w8', Bits(8))], QuantConfig(codes='nested'),
                   ends=True, adapters=False)
    a,b = export_torchao(m, 'w4'),export_torchao(m, 'w8')
    assert a.lm_head.weight is a.transformer.wte.weight and logit_gap(m, 'w4', a, [BATCH]).largest<1e-4
    file = io.BytesIO(); torch.save(a.state_dict(), file); file.seek(0)
    b.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(a(**BATCH).logits, b(**BATCH).logits)

def test_torchao_layers_can_be_exported():
    "What the tensors are made for: a program of plain operators, for other run times."
    pytest.importorskip('torchao', reason='the extra `torchao` is not installed')
    m,x = switchable('gpt2', cfg=QuantConfig(codes='nested')),torch.randn(2, 5, 64)
    for p in ('bw4','bw8'):
        layer = export_torchao(m, p).transformer.h[0].mlp.c_fc
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))

def test_torchao_zero_rows():
    "A row of zeros has a scale of almost nothing and comes out as zeros."
    pytest.importorskip('torchao', reason='the extra `torchao` is not installed')
    for codes in ('independent','nested'):
        m = base('llama')
        with torch.no_grad(): m.model.layers[0].mlp.up_proj.weight[3] = 0
        make_switchable_(m, [Profile('w8', Bits(8))], QuantConfig(codes=codes))
        assert logit_gap(m, 'w8', export_torchao(m, 'w8'), [BATCH]).largest<2e-5

# --- GGUF -----------------------------------------------------------------------------------------------------------

def read(path, **kw):
    "With transformers' own reader."
    pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    kw = dict(gguf_file=path.name, dtype='float32', **gguf_overrides(path), **kw)
    return AutoModelForCausalLM.from_pretrained(path.parent, **kw).eval()

families = [('gpt2', {}), ('gpt2', dict(n_inner=96)), ('llama', {}), ('llama', dict(head_dim=32)),
            ('llama', dict(attention_bias=True, mlp_bias=True)), ('llama', dict(num_key_value_heads=4)),
            ('mistral', {}), ('mistral', dict(sliding_window=64)), ('qwen2', {})]

@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('kind,kw', families)
@torch.no_grad()
def test_gguf_f32_is_exact(kind, kw, tied, tmp_path):
    pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    m = switchable(kind, tied=tied, **kw)
    plain,path = merge(m, 'bw4'),export_gguf(m, 'bw4', tmp_path/'sub'/'m.gguf', 'F32')
    back = read(path)
    assert back.config.model_type==('llama' if kind=='mistral' else kind)
    assert (back.get_input_embeddings().weight is back.get_output_embeddings().weight)==tied
    assert all(torch.equal(v, back.state_dict()[k]) for k,v in plain.state_dict().items())
    assert torch.equal(back(**BATCH).logits, plain(**BATCH).logits)
    for k in ('max_position_embeddings','num_key_value_heads','rms_norm_eps','layer_norm_epsilon',
              'rope_parameters','vocab_size'): 
        if hasattr(plain.config, k): assert getattr(back.config, k)==pytest.approx(getattr(plain.config, k)), k
    assert [f.name for f in path.parent.iterdir()]==['m.gguf']

HALF_TURNED = dict(rope_type='default', rope_theta=1e4, partial_rotary_factor=.5)
STRETCHED = dict(full_attention=dict(rope_type='linear', rope_theta=1e6, factor=4.),
                 sliding_attention=dict(rope_type='default', rope_theta=1e4))
NEWER = [('qwen3', {}), ('qwen3', dict(tied=False)), ('phi3', {}), ('phi3', dict(rope_parameters=HALF_TURNED)),
         ('gemma3_text', {}), ('gemma3_text', dict(rope_parameters=STRETCHED))]

@pytest.mark.parametrize('kind,kw', NEWER)
@torch.no_grad()
def test_newer_families_are_read_by_transformers(kind, kw, tmp_path):
    m = switchable(kind, **kw)
    plain,back = merge(m, 'bw4'),read(export_gguf(m, 'bw4', tmp_path/'m.gguf', 'F32'))
    assert back.config.model_type==kind
    for k,v in plain.state_dict().items(): torch.testing.assert_close(back.state_dict()[k], v, rtol=0, atol=1e-6)
    torch.testing.assert_close(back(**BATCH).logits, plain(**BATCH).logits, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('codes', ['independent','nested'])
@pytest.mark.parametrize('base_dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('kind', ['gpt2','llama'])
@torch.no_grad()
def test_gguf_types(kind, base_dtype, codes, tmp_path):
    gguf = pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    m = switchable(kind, cfg=QuantConfig(codes=codes), dtype=base_dtype)
    plain = AutoModelForCausalLM.from_pretrained(export_float(m, 'mixed8648', tmp_path/'float'), dtype='float32')
    want = plain(**BATCH).logits
    for dtype,u,bound in (('F32', 0, 0), ('F16', 2**-11, .004), ('BF16', 2**-8, .02), ('Q8_0', None, .03)):
        path = export_gguf(m, 'mixed8648', tmp_path/f'{dtype}.gguf', dtype)
        back = read(path)
        for k,v in plain.state_dict().items():
            x = back.state_dict()[k]
            if v.ndim==1 or k.endswith('wpe.weight'): assert torch.equal(x, v); continue
            if dtype=='Q8_0':                                                # blocks of 32 inputs
                rows = lambda t: (t.T if kind=='gpt2' and '.h.' in k else t).reshape(-1, 32)
                most = rows(v).abs().amax(-1, keepdim=True)
                assert (rows(x-v).abs() <= most*(.5/127+2**-11)*1.001 + 1e-7).all(), k
            else: assert ((x-v).abs() <= u*v.abs() + (3e-8 if dtype=='F16' else 0)).all(), k
        assert (back(**BATCH).logits-want).std()/want.std() <= bound
        fields = gguf.GGUFReader(str(path)).fields
        assert fields['general.file_type'].contents()==dict(F32=0, F16=1, BF16=32, Q8_0=7)[dtype]
        assert 'mixed8648' in fields['general.description'].contents()
    # the base's own type
    if base_dtype==torch.bfloat16:
        assert torch.equal(read(tmp_path/'BF16.gguf')(**BATCH).logits, want)
    sizes = {d:(tmp_path/f'{d}.gguf').stat().st_size for d in GGUF_DTYPES[1:]}
    assert sizes['Q8_0']<sizes['F16']==sizes['BF16']<sizes['F32']

def test_gguf_odd_rows_and_large_numbers(tmp_path):
    gguf = pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    m = switchable('llama', intermediate_size=72)
    path = export_gguf(m, 'bw8', tmp_path/'m.gguf', 'Q8_0')
    kinds = {t.name:t.tensor_type.name for t in gguf.GGUFReader(str(path)).tensors}
    assert kinds['blk.0.ffn_down.weight']=='F16'
    assert kinds['blk.0.ffn_up.weight']=='Q8_0'
    assert kinds['blk.0.attn_norm.weight']=='F32'
    assert logit_gap(m, 'bw8', read(path), [BATCH]).relative<.03
    with torch.no_grad(): m.get_input_embeddings().weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="too large for F16"): export_gguf(m, 'bw8', tmp_path/'n.gguf', 'F16')
    export_gguf(m, 'bw8', tmp_path/'n.gguf', 'BF16')
    assert sorted(f.name for f in tmp_path.iterdir())==['m.gguf','n.gguf']

@pytest.mark.parametrize('kind,kw,match', [
    ('gpt2', dict(activation_function='relu'), "activation_function='relu'"),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx=True'),
    ('llama', dict(hidden_act='gelu'), "hidden_act='gelu'"),
    ('llama', dict(rope_parameters=dict(rope_type='linear', factor=2., rope_theta=1e4)), "rope_type='linear'"),
    ('mistral', dict(sliding_window=16), 'sliding_window=16'),
    ('qwen2', dict(use_sliding_window=True, sliding_window=16), 'use_sliding_window=True'),
    ('qwen3', dict(use_sliding_window=True, sliding_window=16, max_window_layers=1), "layer_types=.*'sliding_attention'"),
    ('qwen3', dict(attention_bias=True), 'attention_bias=True'),
    ('smollm3', dict(no_rope_layers=[1, 0, 1, 1, 0]), r'no_rope_layers=\[1, 0, 1, 1, 0\]'),
    ('phi3', dict(sliding_window=16), 'sliding_window=16'),
    ('phi3', dict(original_max_position_embeddings=32, rope_parameters=dict(
        rope_type='longrope', rope_theta=1e4, short_factor=[1.]*8, long_factor=[2.]*8)), "rope_type='longrope'"),
    ('phi3', dict(rope_parameters=HALF_TURNED|dict(partial_rotary_factor=.35)), 'partial_rotary_factor=0.35'),
    ('olmo2', dict(head_dim=32), 'head_dim=32'),
    ('gemma3_text', dict(query_pre_attn_scalar=16), 'query_pre_attn_scalar=16'),
    ('gemma3_text', dict(final_logit_softcapping=30.), 'final_logit_softcapping=30.0'),
    ('gemma3_text', dict(sliding_window_pattern=2), 'layer_types='),
    ('gemma3_text', dict(rope_parameters=STRETCHED|dict(
        sliding_attention=dict(rope_type='default', rope_theta=2e4))), 'sliding_rope=.*20000')])
def test_gguf_refuses_what_it_has_no_place_for(kind, kw, match, tmp_path):
    pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    with pytest.raises(ValueError, match=match+'.*export_float'):
        export_gguf(switchable(kind, **kw), 'bw4', tmp_path/'m.gguf')
    assert not list(tmp_path.iterdir())

def test_gguf_unknown_family(tmp_path):
    pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    m = switchable('llama'); m.config.model_type = 'nonesuch'
    with pytest.raises(ValueError,
                       match="'nonesuch': GGUF export knows gpt2, llama, mistral, qwen2, .*; use export_float"):
        export_gguf(m, 'bw4', tmp_path/'m.gguf')

def test_gguf_file_is_whole_or_not_at_all(tmp_path, monkeypatch):
    gguf = pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    m = switchable('gpt2'); path = export_gguf(m, 'bw8', tmp_path/'m.gguf', 'F32'); was = path.read_bytes()
    with pytest.raises(FileExistsError, match='overwrite=True'): export_gguf(m, 'bw4', path)
    def broken(*a, **k): raise OSError('disk full')
    for what in ('write_header_to_file','write_kv_data_to_file','write_tensors_to_file','add_tensor'):
        with monkeypatch.context() as mp:
            mp.setattr(gguf.GGUFWriter, what, broken)
            with pytest.raises(OSError, match='disk full'): export_gguf(m, 'bw4', path, 'F32', overwrite=True)
        assert path.read_bytes()==was and len(list(tmp_path.iterdir()))==1
    export_gguf(m, 'bw4', path, 'F32', overwrite=True)
    assert path.read_bytes()!=was and len(list(tmp_path.iterdir()))==1
    (tmp_path/'d.gguf').mkdir()
    with pytest.raises(FileExistsError, match='d.gguf: is a folder'):
        export_gguf(m, 'bw4', tmp_path/'d.gguf', overwrite=True)
    w = gguf.GGUFWriter(tmp_path/'base.gguf', 'llama'); w.add_description('a base model')
    w.write_header_to_file(); w.write_kv_data_to_file(); w.close()
    for f in ('base.gguf','notes.gguf'):
        if not (tmp_path/f).exists(): (tmp_path/f).write_text('mine')
        was = (tmp_path/f).read_bytes()
        with pytest.raises(FileExistsError, match=f'{f}: is there already and is not a file that export_gguf wrote'):
            export_gguf(m, 'bw4', tmp_path/f, overwrite=True)
        assert (tmp_path/f).read_bytes()==was

# --- its codes ------------------------------------------------------------------------------------------------------

WIDTHS = [Profile(f'w{b}', Bits(b)) for b in range(2, 9)]
CONFIGS = [QuantConfig(), QuantConfig(codes='independent'), QuantConfig(codes='independent', weight_symmetric=False),
           QuantConfig(weight='per_tensor'), QuantConfig(weight='per_group', group_size=32),
           QuantConfig(weight='per_group', group_size=64)]

def layer_values(layer, bits, cfg):
    "Code times scale, and the largest that the scale can stand for in its row or group; (out, in)."
    q,qp = quantize_weight(layer.weight, bits, cfg, layer.axis)
    w = dequantize_weight(q, qp, cfg, layer.axis)
    far = torch.maximum((qp.zero_point-qp.qmin).abs().float(), (qp.qmax-qp.zero_point).abs().float())*qp.scale
    n = cfg.group_size if cfg.weight=='per_group' else max(w.shape)
    far = far.repeat_interleave(n, 1).squeeze(-1)[:, :layer.in_features].expand(layer.out_features, -1)
    return (w.T if layer.axis==1 else w), far

@pytest.mark.parametrize('cfg', CONFIGS, ids=str)
@pytest.mark.parametrize('kind', ['gpt2','llama'])
def test_gguf_blocks_hold_code_times_scale(kind, cfg):
    "gguf's own reader gives back what was trained, up to the rounding of scale and offset to float16."
    gguf = pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    m = switchable(kind, WIDTHS, cfg)
    for layer in m.switch.layers:
        for b in range(2, 9):
            name,data = gguf_blocks(layer, b)
            got = torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name]))
            want,far = layer_values(layer, b, cfg)
            exact = block_type(quantize_weight(layer.weight, b, cfg, layer.axis)[1])
            if exact: assert ((got-want).abs()<=2**-11*far*(2 if name.endswith('1') else 1)*1.01+1e-8).all(), (b, name)
            else: assert b==8 and name=='Q8_0' and ((got-want).abs()<=far/127*.58+1e-7).all()
            if cfg.codes=='nested':
                assert name=={2:'Q4_1', 3:'Q4_1', 4:'Q4_0', 5:'Q5_1'}.get(b, 'Q8_0') and (exact is None)==(b==8)
            elif cfg.weight_symmetric: assert name=={5:'Q5_0'}.get(b, 'Q4_0' if b<5 else 'Q8_0') and exact

def test_the_nearest_q8_is_nearer_than_the_usual():
    gguf = pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    kind,w = gguf.GGMLQuantizationType.Q8_0,torch.randn(64, 320, generator=torch.Generator().manual_seed(0))
    back = lambda d: torch.from_numpy(gguf.quants.dequantize(d, kind))
    usual,ours = back(gguf.quants.quantize(w.numpy(), kind)),back(nearest_q8(w).numpy())
    assert (ours-w).square().mean()<.99*(usual-w).square().mean()
    assert torch.equal(back(nearest_q8(torch.zeros(2, 32)).numpy()), torch.zeros(2, 32))
    with pytest.raises(ValueError, match='layer x: its scale .* is too large'): nearest_q8(torch.full((1, 32), 1e9), name='x')

@pytest.mark.parametrize('adapters', [False, True])
@pytest.mark.parametrize('kind', ['gpt2','llama','qwen2','qwen3'])
@torch.no_grad()
def test_gguf_codes_are_read_back(kind, adapters, tmp_path):
    "Through transformers' reader the file is the model; adapters stand beside it, and add up to the profile."
    gguf = pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    m = switchable(kind, [*WIDTHS[2:], 'mixed8648'], adapters=adapters)
    for p in ('w4','w5','w6','w8','mixed8648'):
        path = export_gguf(m, p, tmp_path/f'{p}.gguf')
        plain,back = merge(m, p, adapters=False),read(path)
        for k,v in plain.state_dict().items():
            far = v.abs().amax(0 if kind=='gpt2' and '.h.' in k else -1, keepdim=True) if v.ndim>1 else v.abs()
            assert ((back.state_dict()[k]-v).abs()<=far*(.006 if p in ('w8','mixed8648') else .0015)+1e-6).all(), k
        gap = (back(**BATCH).logits-plain(**BATCH).logits).std()/plain(**BATCH).logits.std()
        assert gap<(.03 if p in ('w8','mixed8648') else .008), (p, gap)
        assert adapter_file(path).exists()==adapters
        kinds = {t.name:t.tensor_type.name for t in gguf.GGUFReader(str(path)).tensors}
        if p!='mixed8648': assert kinds['blk.0.ffn_up.weight']==dict(w4='Q4_0', w5='Q5_1').get(p, 'Q8_0')
        assert kinds['token_embd.weight']=='F32'
        if adapters: assert_adds_up(gguf, m, p, path, kind)

def assert_adds_up(gguf, m, p, path, kind):
    "By hand, as llama.cpp does it: weight + alpha/r * b a is the merged weight."
    r = gguf.GGUFReader(str(adapter_file(path)))
    get = lambda k: r.fields[k].contents()
    assert (get('general.type'),get('adapter.type'),get('adapter.lora.alpha'))==('adapter','lora',16)
    assert get('general.architecture')==gguf.GGUFReader(str(path)).fields['general.architecture'].contents()
    parts = {t.name:torch.from_numpy(t.data.copy()) for t in r.tensors}
    whole = export_gguf(m, p, path.with_name('f32.gguf'), 'F32', overwrite=True)
    base = export_gguf(m, p, path.with_name('base.gguf'), 'F32', overwrite=True, adapter='file')
    w,b = ({t.name:torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(str(f)).tensors} for f in (whole, base))
    assert {k.rpartition('.')[0] for k in parts}=={k for k in w if k.startswith('blk') and w[k].ndim==2}
    for k in w:
        delta = parts[f'{k}.lora_b']@parts[f'{k}.lora_a']*16/len(parts[f'{k}.lora_a']) if f'{k}.lora_a' in parts else 0
        torch.testing.assert_close(b[k]+delta, w[k], rtol=1e-5, atol=1e-6)

def test_gguf_merged_codes_and_ends(tmp_path):
    gguf = pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    m = switchable('llama', [Profile('w4', Bits(4)), 'bw4'], tied=False)
    path = export_gguf(m, 'w4', tmp_path/'m.gguf', adapter='merged', embedding_dtype='F16', head_dtype='Q8_0')
    kinds = {t.name:t.tensor_type.name for t in gguf.GGUFReader(str(path)).tensors}
    assert [kinds[k] for k in ('token_embd.weight','output.weight','blk.1.ffn_down.weight')]==['F16','Q8_0','Q8_0']
    assert not adapter_file(path).exists() and logit_gap(m, 'w4', read(path), [BATCH]).relative<.03
    none = switchable('llama', ['bw4'], adapters=False)
    with pytest.raises(ValueError, match="adapter='file': the profile has no adapters"):
        export_gguf(none, 'bw4', tmp_path/'n.gguf', adapter='file')
    with pytest.raises(ValueError, match="head_dtype='Q4_0': choose one of F32"):
        export_gguf(none, 'bw4', tmp_path/'n.gguf', head_dtype='Q4_0')
    with pytest.raises(ValueError, match="embedding_dtype='F16'"): export_gguf(none, 'bw4', tmp_path/'n.gguf', head_dtype='F16')
    for kw,cfg,why in ((dict(intermediate_size=72), QuantConfig(), r'layers\.0\.mlp\.down_proj: 72 inputs are no multiple of 32'),
                       ({}, QuantConfig(weight='per_group', group_size=16), r'q_proj: group_size=16 is no multiple of 32')):
        with pytest.raises(ValueError, match=why+".*choose dtype='F16'"):
            export_gguf(switchable('llama', ['bw4'], cfg, adapters=False, **kw), 'bw4', tmp_path/'n.gguf')
    assert [f.name for f in tmp_path.iterdir()]==['m.gguf']
    float_only = switchable('llama', ['bw4'], dtype=torch.bfloat16)
    kinds = {t.name:t.tensor_type.name for t in gguf.GGUFReader(str(export_gguf(float_only, 'float', tmp_path/'f.gguf'))).tensors}
    assert kinds['blk.0.ffn_up.weight']=='BF16'

def test_gguf_quantized_ends_keep_their_codes(tmp_path):
    gguf = pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    parts = Profile('parts', Bits(8), (Rule(Bits(4), site=('lm_head',)),))
    for p,kinds in ((Profile('w6', Bits(6)), {'token_embd.weight':'Q8_0'}),
                    (parts, {'token_embd.weight':'Q8_0', 'output.weight':'Q4_0'})):
        m = switchable('llama', [p], ends=True, adapters=False)
        path = export_gguf(m, p, tmp_path/f'{p.name}.gguf')
        found = {t.name:t.tensor_type.name for t in gguf.GGUFReader(str(path)).tensors}
        assert {k:v for k,v in found.items() if k in ('token_embd.weight','output.weight')}==kinds
        assert logit_gap(m, p, read(path), [BATCH]).relative<.03

# --- its tokenizer --------------------------------------------------------------------------------------------------

TEXTS = ["Where does Bodi live?", "Bodi was born in 1812.\n\n  Two  spaces, don't they?",
         "naïve café – 東京 🙂", "tab\there 12345 6"]

def bpe(split='gpt2', size=320, **special):
    t = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split!='qwen2')
    def before(step): return pre_tokenizers.Sequence([step, level])
    t.pre_tokenizer = dict(
        gpt2=level, smollm=before(pre_tokenizers.Digits(True)),
        prefix=pre_tokenizers.ByteLevel(add_prefix_space=True),
        qwen2=before(pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), 'isolated')),
        other=before(pre_tokenizers.Whitespace()))[split]
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(TEXTS*3, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=['<|endoftext|>','<|im_start|>','<|pad|>'], show_progress=False))
    tok = PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<|endoftext|>', eos_token='<|endoftext|>',
                                  pad_token='<|pad|>', additional_special_tokens=['<|im_start|>'])
    tok.add_tokens(['<tool>'])
    return tok

@pytest.mark.parametrize('split,pre', [('gpt2','gpt-2'), ('smollm','smollm'), ('qwen2','qwen2')])
@pytest.mark.parametrize('kind', ['gpt2','llama'])
def test_gguf_tokenizer(kind, split, pre, tmp_path):
    gguf = pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    tok = bpe(split); tok.chat_template = '{{ messages }}'
    # more embeddings than tokens
    m = switchable(kind, vocab_size=len(tok)+7) if kind=='llama' else None
    if m is None:
        torch.manual_seed(0)
        m = GPT2LMHeadModel(GPT2Config(vocab_size=len(tok)+7, n_positions=64, n_embd=64, n_layer=1, n_head=4)).eval()
        make_switchable_(m, ['bw4'])
    path = export_gguf(m, 'bw4', tmp_path/'m.gguf', tokenizer=tok)
    fields = gguf.GGUFReader(str(path)).fields
    get = lambda k: fields[f'tokenizer.ggml.{k}'].contents()
    assert get('pre')==pre
    assert get('model')=='gpt2'
    assert len(get('tokens'))==len(tok)+7
    assert get('tokens')[-1]==f'[PAD{len(tok)+6}]'
    types = get('token_type')
    assert [types[tok.convert_tokens_to_ids(t)] for t in ('<|im_start|>','<tool>','a')]==[3, 4, 1] and types[-1]==5
    assert get('bos_token_id')==get('eos_token_id')==tok.eos_token_id
    assert get('padding_token_id')==tok.pad_token_id
    assert not get('add_bos_token')
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file='m.gguf')
    assert back.eos_token==tok.eos_token and back.pad_token==tok.pad_token and back.chat_template==tok.chat_template
    for t in TEXTS+['<|im_start|>user <tool> x<|endoftext|>']:
        # the reader does not know that digits stand alone
        if split!='smollm' or not any(c.isdigit() for c in t):
            assert back(t).input_ids==tok(t).input_ids, t
        assert back.decode(back(t).input_ids)==tok.decode(tok(t).input_ids)
    assert read(path).config.vocab_size==len(tok)+7

def around(tok, template):
    "The tokenizer with its own template of special tokens."
    ids = [(t, tok.convert_tokens_to_ids(t)) for t in ('<|endoftext|>','<|im_start|>','<|pad|>') if t in template]
    made = processors.TemplateProcessing(single=template, pair=f'{template} $B:1', special_tokens=ids)
    tok.backend_tokenizer.post_processor = made
    return tok

@pytest.mark.parametrize('template,bos,eos', [
    ('$A', False, False), ('<|im_start|> $A', True, False), ('$A <|endoftext|>', False, True),
    ('<|im_start|> $A <|endoftext|>', True, True)])
def test_gguf_says_what_the_tokenizer_puts_around_a_text(template, bos, eos, tmp_path):
    gguf = pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    tok = around(bpe(), template); tok.bos_token = '<|im_start|>'
    path = export_gguf(switchable('llama', vocab_size=len(tok)), 'bw4', tmp_path/'m.gguf', tokenizer=tok)
    get = lambda k: gguf.GGUFReader(str(path)).fields[f'tokenizer.ggml.{k}'].contents()
    assert (get('add_bos_token'), get('add_eos_token'), get('add_space_prefix'))==(bos, eos, False)
    assert (get('bos_token_id'), get('eos_token_id'))==(tok.bos_token_id, tok.eos_token_id)
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file='m.gguf')
    for t in [*TEXTS, '', ' lead']: assert back(t).input_ids==tok(t).input_ids, t

def test_gguf_end_of_text(tmp_path):
    "llama.cpp takes token 11 for the end where a file names none."
    gguf = pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    tok = bpe(); tok.eos_token = None
    m = switchable('llama', vocab_size=len(tok))
    for eos,want in ((1, 1), ([2, 0], 2)):
        m.config.eos_token_id = eos
        path = export_gguf(m, 'bw4', tmp_path/'m.gguf', tokenizer=tok, overwrite=True)
        assert gguf.GGUFReader(str(path)).fields['tokenizer.ggml.eos_token_id'].contents()==want
    m.config.eos_token_id = None
    with pytest.raises(ValueError, match='set tokenizer.eos_token'):
        export_gguf(m, 'bw4', tmp_path/'n.gguf', tokenizer=tok)

def test_gguf_several_chat_templates(tmp_path):
    gguf = pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    tok = bpe(); tok.chat_template = dict(default='{{ messages }}', tool_use='{{ tools }}')
    path = export_gguf(switchable('llama', vocab_size=len(tok)), 'bw4', tmp_path/'m.gguf', tokenizer=tok)
    fields = gguf.GGUFReader(str(path)).fields
    said = [fields[f'tokenizer.chat_template{k}'].contents() for k in ('', '.tool_use')]
    assert said==['{{ messages }}', '{{ tools }}']

def changed(change, split='gpt2'):
    tok = bpe(split); change(tok)
    return tok

def word_list(normalizer=None):
    tok = tiny_tokenizer()
    if normalizer is not None: tok.backend_tokenizer.normalizer = normalizer
    return tok

def test_gguf_tokenizers_that_cannot_be_written(tmp_path):
    pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    m = switchable('llama', vocab_size=400)
    lower = changed(lambda t: setattr(t.backend_tokenizer, 'normalizer', normalizers.Lowercase()))
    strips = changed(lambda t: t.add_tokens([AddedToken('<mask>', lstrip=True)]))
    whole_words = changed(lambda t: setattr(t.backend_tokenizer.model, 'ignore_merges', True))
    for tok,match in ((word_list(normalizers.Lowercase()), 'WordLevel'), (bpe('prefix'), 'without prefix space'),
                      (bpe('other'), "as `pre`"), (object(), 'object'), (lower, 'Lowercase'), (strips, "'<mask>' is found with lstrip"),
                      (whole_words, 'as `pre`'), (around(bpe(), '<|pad|> $A'), r"puts '<\|pad\|>' before")):
        with pytest.raises(ValueError, match=match): export_gguf(m, 'bw4', tmp_path/'m.gguf', tokenizer=tok)
    with pytest.raises(ValueError, match='not this model'):
        export_gguf(switchable('llama'), 'bw4', tmp_path/'m.gguf', tokenizer=bpe())
    assert not list(tmp_path.iterdir())
    export_gguf(m, 'bw4', tmp_path/'m.gguf', tokenizer=bpe('other'), pre='llama-bpe')
    composed = changed(lambda t: setattr(t.backend_tokenizer, 'normalizer', normalizers.NFC()))
    export_gguf(m, 'bw4', tmp_path/'n.gguf', tokenizer=composed)

def test_a_gguf_export_is_read_by_load_model(tmp_path):
    pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    tok = bpe(); m = switchable('llama', vocab_size=len(tok))
    back,said = load_model(export_gguf(m, 'bw4', tmp_path/'m.gguf', 'F32', tokenizer=tok))
    ids = dict(input_ids=torch.tensor([tok(TEXTS[1]).input_ids]))
    assert torch.equal(back(**ids).logits, merge(m, 'bw4')(**ids).logits)
    assert said(TEXTS[0]).input_ids==tok(TEXTS[0]).input_ids

def test_the_words_of_the_embedded_model_are_read_back(tmp_path):
    "Its questions become the same tokens, and its answers stay right."
    model,tok = load_model('tiny')
    make_switchable_(model, ['w8'], QuantConfig(weight='per_group', group_size=32))
    again,words = load_model(export_gguf(model, 'w8', tmp_path/'m.gguf', tokenizer=tok))
    asked = load_squad('tiny', 'validation')
    texts = [x+e for q in asked for x in (q['question'], q['context']) for e in ('', '\n', '  ')]
    assert all(tok(x).input_ids==words(x).input_ids for x in texts)
    assert all(words.decode(words(x).input_ids)==tok.decode(tok(x).input_ids) for x in texts)
    with use_profile(model, 'w8'): said = answer(model, tok, asked[:20], 256, 8)
    assert answer(again, words, asked[:20], 256, 8)==said and len(set(said))>5

# --- scales that float16 cannot hold ---------------------------------------------------------------------------------

@pytest.mark.parametrize('grain', [dict(), dict(codes='independent')], ids=str)
@pytest.mark.parametrize('bits', [4, 5, 6, 8])
def test_rows_too_small_for_the_scales_of_gguf_are_refused(bits, grain, tmp_path):
    "Each row is compared by its own step: small ones would be off by several of them, and nobody would know."
    pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    m = switchable('llama', (f'w{bits}',), QuantConfig(act='per_token', **grain), adapters=False)
    export_gguf(m, f'w{bits}', tmp_path/'fine.gguf')
    layer = m.switch.layers[1]
    with torch.no_grad(): layer.weight[1:] *= 3e-6
    with pytest.raises(ValueError, match=f"{layer.out_features-1} of its rows|rows have steps as small as.*dtype='BF16'"):
        export_gguf(m, f'w{bits}', tmp_path/'small.gguf')
    assert not (tmp_path/'small.gguf').exists()
    with torch.no_grad(): layer.weight[1:] *= 1e-12   # nothing, as rows of words that no text had
    export_gguf(m, f'w{bits}', tmp_path/'nothing.gguf')
