"Models and files of the real shapes: GPT-2 of 124M parameters, a Llama, a GGUF file, official SQuAD."
import json
from dataclasses import replace
from pathlib import Path
import pytest, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from switchable_llm.study.records import PRESETS, load_records
from switchable_llm.data.encoding import encode
from switchable_llm.models.loading import load_model
from switchable_llm.data.squad import load_squad
from switchable_llm.data.embedded import tiny_squad
from switchable_llm.lora_routing import adapter_params, add_adapters_
from switchable_llm.models.checkpoints import load_switchable
from switchable_llm.profiles_eval import answer, perplexity
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.study.runs import evaluations, run_joint
from switchable_llm.core.profiles import PROFILES, Profile
from switchable_llm.core.calibration import calibrate_
from switchable_llm.core.switching import make_switchable_, use_profile

SQUAD = Path(__file__).resolve().parents[2]/'shared/data/squad'

# --- GPT-2, the whole path of the preset ----------------------------------------------------------------------------

def official(questions):
    "Questions in SQuAD's nested format."
    def qa(q):
        answers = [dict(text=t, answer_start=s) for t,s in zip(q['answers']['text'], q['answers']['answer_start'])]
        return dict(id=q['id'], question=q['question'], answers=answers)
    paragraphs = [dict(context=q['context'], qas=[qa(q)]) for q in questions]
    return dict(version='1.1', data=[dict(title='T', paragraphs=paragraphs)])

def byte_bpe(texts, size):
    "A byte-level BPE like GPT-2's, trained on a few texts and filled to `size` tokens."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer,tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False),decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(texts, trainer)
    model = json.loads(tok.to_str())['model']
    vocab = model['vocab'] | {f'<filler{i}>': i for i in range(len(model['vocab']), size-1)} | {'<|endoftext|>': size-1}
    full = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m) for m in model['merges']]))
    full.pre_tokenizer,full.decoder = tok.pre_tokenizer,tok.decoder
    special = dict.fromkeys(('eos_token','bos_token','unk_token'), '<|endoftext|>')
    return PreTrainedTokenizerFast(tokenizer_object=full, **special)

@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
    "A folder with GPT-2 as its configuration says (124M parameters, random), and one with SQuAD files."
    root = tmp_path_factory.mktemp('gpt2')
    train,val = tiny_squad(40),tiny_squad(8, 'validation')
    for split,qs in (('train',train), ('validation',val)): (root/f'{split}.json').write_text(json.dumps(official(qs)))
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(root/'model')
    byte_bpe([q['context']+q['question'] for q in train], GPT2Config().vocab_size).save_pretrained(root/'model')
    return root

def test_preset_gpt2(gpt2):
    preset = replace(PRESETS['gpt2'], model=str(gpt2/'model'), data=str(gpt2), profiles=('bw4','mixed8648'),
                     steps=2, eval_n=2, calibration=1, batch_size=2)
    record = run_joint(preset, gpt2/'runs', progress=False)
    before,after = evaluations(record)
    assert [s.profile.name for s in before]==['float','bw4','mixed8648']
    assert [s.profile.name for s in after]==['bw4','mixed8648']
    assert before['float'].cost.bytes==2*124_439_808                                # 124M parameters at two bytes
    assert before['bw4'].cost.bytes < before['mixed8648'].cost.bytes < before['float'].cost.bytes
    assert 10_000 < before['float'].summary['ppl_text'].value < 500_000   # about its vocabulary's size: it knows nothing
    assert len(record['training']['curve'])==2 and all(c[1]>0 for c in record['training']['curve'])
    saved, = load_records(gpt2/'runs'); assert saved['after']==record['after']
    work, = (gpt2/'runs/progress/gpt2').iterdir()
    model,tok = load_model(gpt2/'model')
    load_switchable(work/'model', model)
    assert any(p.abs().max()>0 for n,p in adapter_params(model).items() if n.endswith('.b')), 'nothing was trained'
    asked = load_squad(str(gpt2), 'validation', 2)
    with use_profile(model, 'bw4'): ppl = perplexity(model, tok, asked, preset.max_length)
    assert ppl.nll_text==after['bw4'].nll_text

def test_tokens_of_gpt2_come_back(gpt2):
    _,tok = load_model(gpt2/'model')
    for q in load_squad(str(gpt2), 'validation'):
        e,said = encode(q, tok),q['answers']['text'][0]
        assert tok.decode(e.ids)==f"question: {q['question']}\ncontext: {q['context']}\nanswer: {said}\n"
        assert tok.decode(e.ids[e.prompt:])==f" {said}\n"

@pytest.mark.skipif(not (SQUAD/'validation.json').exists(), reason='no SQuAD beside the repository')
def test_real_squad():
    for split,least in (('train',500), ('validation',500)):
        qs = load_squad(SQUAD, split)
        assert len(qs)>=least and len({q['id'] for q in qs})==len(qs)
        for q in qs:
            for t,s in zip(q['answers']['text'], q['answers']['answer_start']): assert q['context'][s:s+len(t)]==t
    assert not {q['context'] for q in load_squad(SQUAD, 'train')} & {q['context'] for q in qs}
    def some(**kw): return load_squad(SQUAD, 'validation', 20, **kw)
    assert some(seed=1)==some(seed=1)!=some()

# --- the float profile is the original model ------------------------------------------------------------------------

LLAMA = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             tie_word_embeddings=True)

def small(kind, dtype=torch.float32, attention='sdpa'):
    torch.manual_seed(1)
    kw = dict(vocab_size=200, bos_token_id=1, eos_token_id=1, attn_implementation=attention)
    if kind=='gpt2': m = GPT2LMHeadModel(GPT2Config(**kw, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    else: m = LlamaForCausalLM(LlamaConfig(**kw, **LLAMA, hidden_size=32, intermediate_size=48))
    return m.to(dtype).eval()

@pytest.mark.parametrize('attention', ['sdpa','eager'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('kind', ['gpt2','llama'])
@torch.no_grad()
def test_float_is_the_original(kind, dtype, attention):
    plain,model = small(kind, dtype, attention),small(kind, dtype, attention)
    make_switchable_(model, list(PROFILES), QuantConfig(act='per_tensor'), embedding=True, lm_head=True)
    ids = torch.randint(2, 200, (3, 12), generator=torch.Generator().manual_seed(2))
    calibrate_(model, [dict(input_ids=ids)]); add_adapters_(model)
    for p in adapter_params(model).values(): p.normal_(std=.1)
    with use_profile(model, 'bw4'): assert not torch.equal(model(ids).logits, plain(ids).logits)
    mask = torch.ones_like(ids); mask[0, :5] = mask[1, :1] = 0                       # padding on the left
    assert torch.equal(model(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)
    caches = [m(ids[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values for m in (model, plain)]
    for t in range(8, 12):                                                          # token by token, on the cache
        def step(m, c): return m(ids[:, t:t+1], attention_mask=mask[:, :t+1], past_key_values=c, use_cache=True).logits
        assert torch.equal(step(model, caches[0]), step(plain, caches[1]))
    for how in (dict(do_sample=False), dict(do_sample=False, num_beams=3),
                dict(do_sample=True, temperature=.8, top_k=20)):
        cfg = GenerationConfig(max_new_tokens=8, pad_token_id=0, eos_token_id=1, **how)
        def written(m):
            torch.manual_seed(3)
            return m.generate(input_ids=ids, attention_mask=mask, generation_config=cfg)
        assert torch.equal(written(model), written(plain)), how
    state,want = model.state_dict(),plain.state_dict()
    for k,v in want.items(): assert torch.equal(state[k], v), k

@pytest.mark.parametrize('kind', ['gpt2','llama'])
@torch.no_grad()
def test_quantized_generation_uses_its_cache_rightly(kind):
    "Weights of 8 bits are weights like others: a cache, a batch or padding change only the rounding of sums."
    model,w8 = small(kind),Profile('w8', Bits(8))
    make_switchable_(model, [w8], QuantConfig(act='per_token'))
    ids = torch.randint(2, 200, (2, 12), generator=torch.Generator().manual_seed(2))
    with use_profile(model, 'w8'):
        full,out = model(ids).logits,model(ids[:, :8], use_cache=True)
        cache,steps = out.past_key_values,[out.logits]
        steps += [model(ids[:, t:t+1], past_key_values=cache, use_cache=True).logits for t in range(8, 12)]
        torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(ids[:1]).logits, full[:1], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('kind', ['gpt2','llama'])
@torch.no_grad()
def test_a_token_is_quantized_by_itself(kind):
    "With a range per token, a token's output is the same alone, in a part of the batch, or in all of it."
    model,seen = small(kind),[]
    make_switchable_(model, ['bw8','bw4'], QuantConfig(act='per_token'))
    for l in model.switch.layers: l.register_forward_hook(lambda l, args, y: seen.append((l, args[0], y)))
    ids = torch.randint(2, 200, (2, 12), generator=torch.Generator().manual_seed(2))
    for p in ('bw8','bw4'):
        seen.clear()
        with use_profile(model, p): model(ids)
        assert len(seen)==len(model.switch.layers)
        for l,x,y in [*seen]:   # the same input, so the same codes: only the order of sums may differ
            setting = model.switch.bound[p][l.index]
            alone = torch.cat([l.at(x[:, t:t+1], setting) for t in range(12)], 1)
            torch.testing.assert_close(alone, y, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(l.at(x[1:, 3:9], setting), y[1:, 3:9], rtol=1e-5, atol=1e-6)

# --- GGUF -----------------------------------------------------------------------------------------------------------

def write_gguf(path, model, tokens):
    "A Llama in llama.cpp's format: matrices in 8-bit blocks, the rest in float32. Returns the dequantized weights."
    gguf = pytest.importorskip('gguf', reason='the extra `gguf` is not installed')
    c,w = model.config,gguf.GGUFWriter(str(path), 'llama')
    w.add_block_count(c.num_hidden_layers); w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size); w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads); w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps); w.add_rope_freq_base(c.rope_parameters['rope_theta'])
    w.add_rope_dimension_count(c.hidden_size//c.num_attention_heads)
    w.add_vocab_size(len(tokens)); w.add_tokenizer_model('gpt2'); w.add_tokenizer_pre('default')
    w.add_token_list(tokens); w.add_token_types([3]+[1]*(len(tokens)-1)); w.add_token_merges(['a b'])
    for add in (w.add_bos_token_id, w.add_eos_token_id, w.add_unk_token_id): add(0)
    names = dict(input_layernorm='attn_norm', post_attention_layernorm='ffn_norm',
                 q_proj='attn_q', k_proj='attn_k', v_proj='attn_v', o_proj='attn_output',
                 gate_proj='ffn_gate', up_proj='ffn_up', down_proj='ffn_down')
    tensors = {'model.embed_tokens.weight':'token_embd.weight', 'model.norm.weight':'output_norm.weight'}
    for k in model.state_dict():
        if '.layers.' in k: tensors[k] = f"blk.{k.split('.')[2]}.{names[k.split('.')[-2]]}.weight"
    def paired(x, heads, *pair):   # llama.cpp pairs the rotated dimensions differently
        return x.reshape(heads, *pair, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
    back = {}
    for k,name in tensors.items():
        x,rotated = model.state_dict()[k].numpy(),k.endswith(('q_proj.weight','k_proj.weight'))
        heads = c.num_attention_heads if 'q_proj' in k else c.num_key_value_heads
        half = x.shape[0]//heads//2
        if rotated: x = paired(x, heads, 2, half)
        if x.ndim==1: w.add_tensor(name, x); continue
        q = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
        w.add_tensor(name, q, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        d = gguf.quants.dequantize(q, gguf.GGMLQuantizationType.Q8_0)
        back[k] = torch.tensor(paired(d, heads, half, 2) if rotated else d)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return back

def test_gguf(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ['<|endoftext|>', *alphabet, 'ab']
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokens), hidden_size=64, intermediate_size=96, bos_token_id=0, eos_token_id=0,
                         **LLAMA)
    llama = LlamaForCausalLM(config).eval()
    back = write_gguf(tmp_path/'m.gguf', llama, tokens)
    llama.load_state_dict(back, strict=False)
    model,tok = load_model(tmp_path/'m.gguf')
    ids = tok('Where is ab?\n').input_ids
    assert tok.decode(ids)=='Where is ab?\n' and tok.pad_token is not None
    with torch.no_grad(): ours,theirs = (m(torch.tensor([ids])).logits for m in (model, llama))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    make_switchable_(model, ['bw4','bw8'], QuantConfig(act='per_token'))
    add_adapters_(model)
    asked = [dict(id='1', question='Where?', context='ab')]
    with use_profile(model, 'bw4'): said = answer(model, tok, asked, max_length=64, max_new_tokens=4)
    assert len(said)==1
    plain = load_model(tmp_path/'m.gguf', 'bfloat16')[0]
    plain.save_pretrained(tmp_path/'saved')                       # the marker of the quantized file is gone
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path/'saved').config, 'quantization_config')

def test_a_gguf_that_is_none(tmp_path):
    (tmp_path/'m.gguf').write_bytes(b'GGUF'+bytes(100))
    with pytest.raises(ValueError, match='m.gguf'): load_model(tmp_path/'m.gguf')
