"Every dense family of the table, the real transformers class at toy size, the same list for each; and other kinds."
from collections import Counter
import pytest, torch
import switchable_llm as sl
from torch import nn
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, CodeGenForCausalLM, MptForCausalLM)
from transformers.pytorch_utils import Conv1D
from switchable_llm.apps.cli import main
from switchable_llm.data.encoding import Encoded
from switchable_llm.training.settings import TrainConfig
from switchable_llm.joint_training import fixed_profile, train
from switchable_llm.lora_routing import adapter_params, add_adapters_
from switchable_llm.models.checkpoints import load_switchable, save_switchable
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.packed import load_packed
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.core.profiles import FAMILIES, Profile, Rule
from switchable_llm.core.calibration import calibrate_
from switchable_llm.core.switching import make_switchable_, use_profile

COMMON = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
DENSE = [k for k,t in FAMILIES.items() if '*.experts.down_proj' not in t['mlp_out']]   # the others: test_experts.py
LIKE_GPT2 = dict(n_positions=64, n_embd=32, n_layer=2, n_head=4)
OWN = dict(   # what a family's configuration calls otherwise, or needs beside
    **dict.fromkeys('gemma gemma2 gemma3_text qwen3 helium glm glm4 seed_oss hunyuan_v1_dense ministral3'.split(),
                    dict(head_dim=8)),
    **dict.fromkeys(('gpt2','gpt_bigcode'), LIKE_GPT2),
    **dict.fromkeys(('gptj','codegen'), LIKE_GPT2|dict(rotary_dim=4)),
    opt=dict(ffn_dim=48, word_embed_proj_dim=32),
    gpt_neo=dict(num_layers=2, num_heads=4, attention_types=[[['global','local'], 1]], window_size=4),
    mpt=dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    bloom=dict(n_layer=2, n_head=4))
COUNTS = dict(attn_qkv=3, attn_out=1, mlp_in=2, mlp_out=1)     # layers of a block, in most families
OTHER = dict(
    **dict.fromkeys(('gpt2','gpt_bigcode','gpt_neox','bloom','falcon','phi3'), dict(attn_qkv=1, mlp_in=1)),
    **dict.fromkeys('gpt_neo gptj opt phi starcoder2 glm glm4 arcee nemotron apertus'.split(), dict(mlp_in=1)))
MIXED = Profile('mixed', Bits(8, 8), (
    Rule(Bits(4, 8), site=('mlp_in',)),
    Rule(Bits(6, 6), site=('attn_qkv',), layers=(1,)),
    Rule(Bits(4, 4), site=('mlp_out',), layers=(0,))))
IDS = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS); MASK[0, :4] = 0

def toy(kind):
    "A small model of random weights, of the real class."
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON|OWN.get(kind, {}))).eval()
    for n,p in model.named_parameters():
        if p.ndim==2: nn.init.normal_(p, std=.15)      # large enough for every layer to count
    return model

def adapted(kind, act='per_tensor', profiles=('bw4','bw8',MIXED), **kw):
    model = toy(kind); names = make_switchable_(model, profiles, QuantConfig(act=act), **kw)
    calibrate_(model, [dict(input_ids=IDS, attention_mask=MASK)])
    torch.manual_seed(1); add_adapters_(model, r=4, dropout=0.)
    for p in adapter_params(model).values(): nn.init.normal_(p, std=.05)
    return model, names

@torch.no_grad()
def plain_logits(model): return model(IDS, attention_mask=MASK).logits[MASK.bool()]

def logits(model, profile):
    with use_profile(model, profile): return plain_logits(model)

@torch.no_grad()
def by_hand(kind, model, bits):
    "The plain model with the quantized weights of these layers put in."
    plain = toy(kind)
    for l,s,b in zip(model.switch.layers, model.switch.sites, bits):
        plain.get_submodule(s.name).weight.copy_(l.weight_at(b))
    return plain

def in_blocks(model):
    "Names of the layers that multiply inside the blocks."
    multiply = {n for n,m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    return {n for n in multiply if any(p.isdigit() for p in n.split('.'))}

@pytest.mark.parametrize('kind', DENSE)
def test_sites(kind):
    model = toy(kind); blocks = in_blocks(model)
    names = make_switchable_(model, [MIXED], QuantConfig(act='per_token'))
    assert set(names)==blocks, 'a layer forgotten, or one too many'
    wanted = COUNTS|OTHER.get(kind, {})
    found = Counter((s.site, s.layer) for s in model.switch.sites)
    assert found=={(site, layer):n for site,n in wanted.items() for layer in (0, 1)}

@pytest.mark.parametrize('kind', DENSE)
def test_float_profile_and_generate(kind):
    plain = toy(kind); model,_ = adapted(kind)
    low,want = logits(model, 'bw4'),plain_logits(plain)
    assert torch.equal(logits(model, 'float'), want) and not torch.allclose(low, want, atol=1e-3)
    kw = dict(attention_mask=MASK[1:], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(plain.generate(IDS[1:], **kw), model.generate(IDS[1:], **kw))

@pytest.mark.parametrize('kind', DENSE)
def test_bits_of_every_layer_matter(kind):
    "The oracle for a mixed profile: the plain model with quantized weights put in by hand."
    mixed = Profile('w', Bits(8), (Rule(Bits(4), site=('mlp_in',)), Rule(Bits(3), site=('attn_out',), layers=(1,))))
    model,_ = adapted(kind, 'per_token', [mixed])
    for p in adapter_params(model).values(): nn.init.zeros_(p)
    byhand = by_hand(kind, model, [s.bits.w for s in model.switch.bound['w']])
    torch.testing.assert_close(logits(model, 'w'), plain_logits(byhand), rtol=1e-3, atol=1e-3)
    for s in model.switch.sites:       # each layer's own bits reach the output
        one = Profile('one', rules=(Rule(Bits(8), glob=s.name),))
        assert not torch.equal(logits(model, one), logits(model, 'float')), s.name

@pytest.mark.parametrize('kind', ['gpt2','opt','bloom','phi','gpt_neox','qwen3','gemma','gemma3_text','granite'])
def test_embedding_and_head(kind, tmp_path):
    "Ends in the profile too, scaled embeddings included; tied or not."
    model = toy(kind)
    make_switchable_(model, [Profile('w', Bits(5))], QuantConfig(act='per_token'), embedding=True, lm_head=True)
    want = plain_logits(by_hand(kind, model, [5]*len(model.switch.layers)))
    torch.testing.assert_close(logits(model, 'w'), want, rtol=1e-3, atol=1e-3)
    assert {'embedding','lm_head'}<={s.site for s in model.switch.sites}
    if type(model.get_input_embeddings().base) is nn.Embedding:
        freeze(model, tmp_path/'model.safetensors')
        packed = load_packed(tmp_path/'model.safetensors')
        torch.testing.assert_close(logits(packed, 'w'), want, rtol=1e-2, atol=1e-2)
    else:
        with pytest.raises(ValueError, match='leave it float'): freeze(model, tmp_path/'model.safetensors')

@pytest.mark.parametrize('kind', DENSE)
def test_a_step_moves_the_routed_adapters(kind):
    model,_ = adapted(kind); start = {n:p.detach().clone() for n,p in model.named_parameters()}
    data = [Encoded(tuple(row.tolist()), 8) for row in IDS]
    cfg = TrainConfig(steps=1, batch_size=3, accumulate=1, lr=1e-2, warmup=0)
    run = train(model, data, fixed_profile('mixed'), cfg, progress=False, cpu=True)
    assert run['curve'][0][1]>0
    live = zip(model.switch.sites, model.switch.bound['mixed'])
    routed = {f'{s.name}.adapters.{setting.adapter}.{ab}' for s,setting in live for ab in 'ab'}
    assert {n for n,p in model.named_parameters() if not torch.equal(p, start[n])}==routed

@pytest.mark.parametrize('kind', DENSE)
def test_save_and_load(kind, tmp_path):
    model,_ = adapted(kind)
    back = load_switchable(save_switchable(model, tmp_path/'model'), toy(kind))
    for p in model.switch.profiles: assert torch.equal(logits(model, p), logits(back, p)), p

@torch.no_grad()
def shortfall(model, profile, new, start):
    "By how much each generated token misses the best one of its place, in standard deviations of the logits."
    with use_profile(model, profile): y = model(new[:, :-1], use_cache=False).logits[:, start-1:].float()
    return (y.amax(-1)-y.gather(-1, new[:, start:, None])[..., 0])/y.std()

def greedy(model, profile, many):
    kw = dict(max_new_tokens=many, do_sample=False, pad_token_id=0, eos_token_id=None)
    with use_profile(model, profile): return model.generate(IDS[1:2], attention_mask=MASK[1:2], **kw)

@pytest.mark.parametrize('kind', DENSE)
def test_generate_with_a_cache(kind):
    "Greedy, with the KV cache: each token is the best one without a cache, or as good: a flipped code moves logits."
    model,_ = adapted(kind)
    new = greedy(model, 'mixed', 6)
    assert new.shape==(1, 18) and shortfall(model, 'mixed', new, 12).max()<.1
    other = torch.cat([new[:, :12], (new[:, 12:]+1)%97], 1)
    assert shortfall(model, 'mixed', other, 12).max()>.1

def layer_inputs(model, profile):
    "What each switchable layer gets and gives in one pass."
    seen = []
    def look(m, args, y): seen.append((m.index, args[0].clone(), y.clone()))
    hooks = [l.register_forward_hook(look) for l in model.switch.layers]
    try: logits(model, profile)
    finally: [h.remove() for h in hooks]
    return seen

@torch.no_grad()
def rows_that_agree(layer, x, want):
    "Share of the rows (tokens) with the same output, within float rounding."
    off = (layer(x)-want).abs().flatten(0, -2).amax(-1)
    return (off<=1e-4*want.abs().amax()).float().mean()

@pytest.mark.parametrize('kind', DENSE)
def test_packed(kind, tmp_path):
    "Layer by layer, in other kernels. A value between two codes may fall to either side, and moves its whole row."
    model,_ = adapted(kind)
    freeze(model, tmp_path/'model.safetensors')
    packed = load_packed(tmp_path/'model.safetensors')
    for p in ('bw4','bw8','mixed'):
        rows = layer_inputs(model, p)
        assert {i for i,*_ in rows}==set(range(len(packed.switch.layers)))
        with use_profile(packed, p):
            for i,x,y in rows:
                assert rows_that_agree(packed.switch.layers[i], x, y)>=.8, (p, packed.switch.sites[i].name)
    assert shortfall(model, 'bw8', greedy(packed, 'bw8', 4), 12).max()<.2

# --- families that are not in the table -----------------------------------------------------------------------------

def globs(*patterns): return {site:(p,) for site,p in zip(COUNTS, patterns)}
GLOBS = dict(
    codegen=globs('*.attn.qkv_proj', '*.attn.out_proj', '*.mlp.fc_in', '*.mlp.fc_out'),
    mpt=globs('*.attn.Wqkv', '*.attn.out_proj', '*.ffn.up_proj', '*.ffn.down_proj'))

@pytest.mark.parametrize('kind,cls,inner', [
    ('codegen', CodeGenForCausalLM, 'mlp.fc_in'),
    ('mpt', MptForCausalLM, 'ffn.up_proj')])
def test_a_family_that_is_not_in_the_table(kind, cls, inner, tmp_path):
    model = toy(kind); assert type(model) is cls
    with pytest.raises(ValueError, match=rf"FAMILIES\['{kind}'\] = dict\(attn_qkv=.*sites.*{inner}"):
        make_switchable_(model)
    assert not hasattr(model, 'switch')
    model,names = adapted(kind, sites=GLOBS[kind])
    assert set(names)==in_blocks(toy(kind)) and {s.site for s in model.switch.sites}==set(COUNTS)
    plain = logits(model, 'float')
    assert torch.equal(plain, plain_logits(toy(kind)))
    back = load_switchable(save_switchable(model, tmp_path/'model'), toy(kind))
    for p in ('bw4','mixed'):
        assert torch.equal(logits(model, p), logits(back, p)) and not torch.equal(logits(model, p), plain)

def test_padding_is_left_out_where_tokens_are_on_one_axis():
    "OPT's MLP sees (batch x length, features): the ranges must not see padding there either."
    ranges = []
    for filler in (0, 50):
        model = toy('opt'); make_switchable_(model, ['bw8'])
        ids = IDS.masked_fill(MASK==0, filler)
        calibrate_(model, [dict(input_ids=ids, attention_mask=MASK)])
        observers = [l.observers['8'] for l in model.switch.layers]
        ranges.append(torch.stack([torch.stack([o.lo, o.hi]) for o in observers]))
    torch.testing.assert_close(*ranges, rtol=1e-5, atol=1e-6)

# --- other kinds of models ------------------------------------------------------------------------------------------

KINDS = dict(
    t5='t5 is an encoder-decoder model; switchable_llm works with causal (decoder-only) language models',
    bart='bart is an encoder-decoder model; switchable_llm works with causal (decoder-only) language models',
    whisper='whisper is an encoder-decoder model',
    bert='bert is an encoder, which fills in masked words; switchable_llm works with causal (decoder-only)',
    modernbert='modernbert is an encoder',
    llava='llava is a multimodal model (vision_config); switchable_llm works with causal (decoder-only)',
    gemma3='its text model, gemma3_text, is one',
    qwen2_vl='multimodal model (vision_config)',
    vit='its type, vit, is not that of a causal language model')

@pytest.mark.parametrize('kind', KINDS)
def test_another_kind_of_model_is_refused_before_weights_are_read(kind, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)      # a folder without weights
    with pytest.raises(ValueError) as e: sl.load(str(tmp_path))
    assert str(e.value).startswith(f"model '{tmp_path}': ") and KINDS[kind] in str(e.value)

def test_another_kind_of_model_in_memory():
    small = dict(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model('t5', **small))
    with pytest.raises(ValueError, match='^t5 is an encoder-decoder model; '): make_switchable_(model)
    with pytest.raises(ValueError, match='^t5 is an encoder-decoder model; '): sl.make_switchable(model)
    bert = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model('bert', **bert))
    with pytest.raises(ValueError, match='^bert is an encoder'):
        make_switchable_(model, sites=dict(mlp_in=('*.dense',)))
    assert not hasattr(model, 'switch')

def test_the_command_line_says_it_too(tmp_path, capsys):
    AutoConfig.for_model('t5').save_pretrained(tmp_path/'base')
    assert main(['train', '--model', str(tmp_path/'base'), '--out', str(tmp_path/'out')])!=0
    said = capsys.readouterr().err
    assert 't5 is an encoder-decoder model' in said and 'Traceback' not in said and not (tmp_path/'out').exists()
