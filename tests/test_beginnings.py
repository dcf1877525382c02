"A prompt begins as its tokenizer begins a text: for tokenizers of every kind, in training, scoring, answers and spans."
import pytest, torch
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, GemmaConfig, GemmaForCausalLM, GemmaTokenizer, GPT2Config, GPT2LMHeadModel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, OPTConfig, OPTForCausalLM
from transformers import BatchEncoding, PreTrainedTokenizerFast
from switchable_llm.data.encoding import collate, encode, prompt_texts, start_ids
from switchable_llm.models.loading import span_model
from switchable_llm.data.embedded import tiny_squad, tiny_tokenizer
from switchable_llm.training.settings import TrainConfig
from switchable_llm.joint_training import fixed_profile, train
from switchable_llm.data.tasks import token_weights
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.profiles_eval import answer, perplexity
from switchable_llm.quantizers import QuantConfig
from switchable_llm.data.spans import encode_windows
from switchable_llm.search.extraction import extract
from switchable_llm.core.switching import make_switchable_
from test_real_models import byte_bpe

QUESTIONS = tiny_squad(8, 'validation')

def around(tokenizer, single):
    "The tokenizer with these special tokens around each text, such as '<bos> $A'."
    names = [t for t in single.split() if t!='$A']
    tokenizer.add_special_tokens(dict(extra_special_tokens=[t for t in names if t not in tokenizer.get_vocab()]))
    special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in dict.fromkeys(names)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer

def spm(cls, special, **kw):
    "A tokenizer of Llama's or Gemma's kind over a vocabulary of letters, with bytes for the rest."
    letters = sorted({c for q in QUESTIONS for t in prompt_texts(q) for c in t}-{' ','\n'})
    tokens = [*special, *(f'<0x{i:02X}>' for i in range(256)), '\u2581', *letters, *(f'\u2581{c}' for c in letters)]
    return cls(vocab={t:i for i,t in enumerate(dict.fromkeys(tokens))}, merges=[('\u2581', c) for c in letters], **kw)

def byte_level(): return byte_bpe([q['context'] for q in QUESTIONS], 600)

KINDS = dict(   # kind -> tokenizer, and what it puts first
    tiny      = (tiny_tokenizer, []),
    gpt2      = (byte_level, []),
    end_only  = (lambda: around(tiny_tokenizer(), '$A <eos>'), []),
    bos       = (lambda: around(tiny_tokenizer(), '<bos> $A'), ['<bos>']),
    both      = (lambda: around(tiny_tokenizer(), '<bos> $A <eos>'), ['<bos>']),
    two       = (lambda: around(tiny_tokenizer(), '[gMASK] <sop> $A'), ['[gMASK]','<sop>']),
    same_ends = (lambda: around(byte_level(), '<|endoftext|> $A <|endoftext|>'), ['<|endoftext|>']),
    llama     = (lambda: spm(LlamaTokenizer, ['<unk>','<s>','</s>'], add_bos_token=True), ['<s>']),
    llama_end = (lambda: spm(LlamaTokenizer, ['<unk>','<s>','</s>'], add_bos_token=True, add_eos_token=True), ['<s>']),
    llama_off = (lambda: spm(LlamaTokenizer, ['<unk>','<s>','</s>'], add_bos_token=False), []),
    gemma     = (lambda: spm(GemmaTokenizer, ['<pad>','<eos>','<bos>','<unk>'], add_bos_token=True), ['<bos>']))

@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    "A tokenizer as it comes back from a folder, and the names of what it puts first."
    make,first = KINDS[request.param]
    make().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    if tokenizer.pad_token is None: tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, first

def test_first_ids(kind):
    tokenizer,first = kind
    ids = tokenizer.convert_tokens_to_ids(first)
    assert start_ids(tokenizer)==ids
    for q in QUESTIONS:
        e,itself = encode(q, tokenizer),tokenizer(''.join(prompt_texts(q))).input_ids
        assert list(e.ids[:len(ids)+1])==itself[:len(ids)+1]                        # and one of the text
        bare = {k:v for k,v in q.items() if k!='answers'}
        assert encode(bare, tokenizer).ids==e.ids[:e.prompt]                         # no end of text behind what asks
        assert tokenizer.decode(e.ids[:e.prompt], skip_special_tokens=True).endswith('answer:')
        assert sum(t in ids for t in e.ids)==len(ids) or tokenizer.eos_token_id in ids
        for room in (0, 1, 5): assert len(encode(q, tokenizer, len(e.ids)-room).ids)==len(e.ids)-room
    context = tokenizer(prompt_texts(q)[1], add_special_tokens=False).input_ids
    with pytest.raises(ValueError, match=f'needs {len(e.ids)-len(context)+1} or more'): encode(q, tokenizer, 8)

def test_the_rest_is_as_without(kind):
    "What a tokenizer puts first changes the beginning and nothing else: prompt, answer, labels, windows."
    tokenizer,first = kind
    ids = lambda t: tokenizer(t, add_special_tokens=False).input_ids
    for q in QUESTIONS:
        e,n = encode(q, tokenizer),len(first)
        parts = [ids(t) for t in (*prompt_texts(q), f" {q['answers']['text'][0]}\n")]
        assert list(e.ids[n:])==sum(parts, []) and e.prompt==n+sum(map(len, parts[:3]))
        batch = collate([e, encode(QUESTIONS[0], tokenizer)], tokenizer.pad_token_id)
        assert batch['labels'][0][batch['labels'][0]>=0].tolist()==parts[3]
        assert token_weights(batch, 1., 0.)[0].sum()==len(parts[3])
        assert token_weights(batch, 1., 1.)[0].sum()==len(e.ids)-1                   # nothing predicts the first
        for w in encode_windows([q], tokenizer, 10**6, 0):
            assert list(w.ids)==list(e.ids[:e.prompt]) and w.first==n+len(parts[0])
            a,b = (w.offsets[t-w.first] for t in w.target)
            assert q['context'][a[0]:b[1]].strip()==q['answers']['text'][0]

def test_what_cannot_be_told():
    "A tokenizer whose special tokens change the text, or that knows nothing of it."
    class Odd:
        def __call__(self, text, add_special_tokens=True):
            return BatchEncoding(dict(input_ids=[9, 5, 6] if add_special_tokens else [1, 2]))
    with pytest.raises(ValueError, match='tokenizer Odd: makes .* cannot be told'): start_ids(Odd())
    letters = Tokenizer(models.BPE(vocab={'<bos>':0, 'a':1}, merges=[]))
    blind = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token='<bos>')
    assert start_ids(blind)==[]                                                     # nothing, which can be told
    around(blind, '<bos> $A')
    with pytest.raises(ValueError, match='cannot be told'): start_ids(blind)
    assert start_ids(blind, 'a')==[0]

def model_of(family, tokenizer):
    torch.manual_seed(0)
    n = dict(vocab_size=len(tokenizer))
    small = n | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512)
    if family=='gpt2': m = GPT2LMHeadModel(GPT2Config(**n, n_positions=512, n_embd=32, n_layer=2, n_head=4))
    if family=='gemma':
        m = GemmaForCausalLM(GemmaConfig(**small, intermediate_size=48, num_key_value_heads=1, head_dim=8))
    if family=='opt': m = OPTForCausalLM(OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32))
    if family=='llama': m = LlamaForCausalLM(LlamaConfig(**small, intermediate_size=48))
    return m.eval()

@pytest.mark.parametrize('name, family', [('gemma','gemma'), ('llama','llama'), ('both','gpt2'), ('same_ends','opt')])
def test_the_model_sees_it(name, family):
    "In training, scores, answers and spans, each row that the model reads begins with it, once."
    tokenizer = KINDS[name][0]()
    if tokenizer.pad_token is None: tokenizer.pad_token = tokenizer.eos_token
    first,model,rows = start_ids(tokenizer),model_of(family, tokenizer),[]
    span = span_model(model) if family!='gemma' else None
    make_switchable_(model, ['bw8'], QuantConfig(act='per_token')); add_adapters_(model, dropout=0.)
    def look(m, args, kwargs):   # the rows of the passes that begin a text
        ids,mask = (kwargs.get(k) for k in ('input_ids','attention_mask'))
        if ids.shape[1]>1: rows.extend(r[a.bool()].tolist() for r,a in zip(ids, mask))
    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    data,cfg = [encode(q, tokenizer) for q in QUESTIONS],TrainConfig(steps=2, batch_size=4, accumulate=1)
    train(model, data, fixed_profile('bw8'), cfg, tokenizer.pad_token_id, progress=False, cpu=True)
    perplexity(model, tokenizer, QUESTIONS); answer(model, tokenizer, QUESTIONS, max_new_tokens=2)
    hook.remove()
    if span is not None:
        span.base_model.register_forward_pre_hook(look, with_kwargs=True)
        extract(span, tokenizer, QUESTIONS, 512, 0)
    assert len(rows)>=3*len(QUESTIONS)
    assert all(r[:len(first)]==first and r[len(first)]!=first[0] for r in rows)
