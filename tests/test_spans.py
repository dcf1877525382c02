"Span extraction with every family that can do it, on tokenizers of other kinds, and against SQuAD's rules written out."
import random, re, string
from collections import Counter
from dataclasses import replace
import pytest, torch
from tokenizers import pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM, AutoModelForQuestionAnswering, GPT2Config, GPT2ForQuestionAnswering, GPTNeoConfig,
    GPTNeoXConfig, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config, Qwen3Config)
from switchable_llm.study.records import PRESETS, load_records
from switchable_llm.models.loading import load_model
from switchable_llm.data.embedded import tiny_squad, tiny_tokenizer
from switchable_llm.joint_training import Objective, fixed_profile, train
from switchable_llm.training.settings import TrainConfig
from switchable_llm.lora_routing import adapter_params, add_adapters_
from switchable_llm.models.checkpoints import load_switchable, save_switchable
from switchable_llm.training.objectives import Distillation, Stability
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.packed import load_packed
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.data.spans import collate_windows, encode_windows
from switchable_llm.search.extraction import evaluate_spans, extract, span_extraction, span_outputs, train_head_
from switchable_llm.study.experiments import run_spans
from switchable_llm.core.profiles import Profile, find_sites
from switchable_llm.core.switching import make_switchable_, use_profile
from test_real_models import byte_bpe, write_gguf

TOK = tiny_tokenizer()
QUESTIONS = [q for q in tiny_squad(120, 'validation', max_facts=9) if len(q['context'])>120][:12]
WINDOWS = encode_windows(QUESTIONS, TOK, max_length=48, stride=8)
_small = dict(vocab_size=len(TOK), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
              num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=1)
_grouped = _small | dict(num_key_value_heads=2)
FAMILIES = dict(
    gpt2     = GPT2Config(vocab_size=len(TOK), n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=1,
                          eos_token_id=1),
    llama    = LlamaConfig(**_grouped), mistral=MistralConfig(**_grouped), qwen2=Qwen2Config(**_grouped),
    qwen3=Qwen3Config(**_grouped, head_dim=8), gpt_neox=GPTNeoXConfig(**_small),
    gpt_neo  = GPTNeoConfig(vocab_size=len(TOK), hidden_size=32, num_layers=2, num_heads=4,
                            attention_types=[[['global','local'],1]], max_position_embeddings=128, bos_token_id=1,
                            eos_token_id=1),
    opt      = OPTConfig(vocab_size=len(TOK), hidden_size=32, ffn_dim=64, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=32,
                         pad_token_id=0, bos_token_id=1, eos_token_id=1))

@pytest.fixture(scope='module', params=FAMILIES)
def folder(request, tmp_path_factory):
    "A causal model of a family, as `save_pretrained` writes it."
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[request.param]).save_pretrained(path); TOK.save_pretrained(path)
    return path

def test_family(folder):
    causal,plain = load_model(folder)[0],load_model(folder, head='span')[0]
    assert isinstance(plain, tuple(type(m) for m in (AutoModelForQuestionAnswering.from_config(causal.config),)))
    theirs,ours = causal.base_model.state_dict(),plain.base_model.state_dict()
    # nothing of the base was left random
    assert list(theirs)==list(ours) and all(torch.equal(theirs[k], ours[k]) for k in theirs)
    b = collate_windows(WINDOWS[:4], TOK.pad_token_id); w = span_extraction.weights(b, None)
    with torch.no_grad():
        out = plain(input_ids=b['input_ids'], attention_mask=b['attention_mask'])
        reference = torch.stack((out.start_logits, out.end_logits), 1)[b['possible'][:, None].expand(-1, 2, -1)]
        mine = span_outputs(plain, b, w).logits
        assert torch.equal(mine.unflatten(0, (-1, 2))[b['possible'][:, None].expand(-1, 2, -1)], reference)
        model,_ = load_model(folder, head='span')
        make_switchable_(model, ('bw4','bw8'), QuantConfig(act='per_token'))
        add_adapters_(model, dropout=0.)
        train_head_(model)
        # the float profile is the original model
        assert torch.equal(span_outputs(model, b, w).logits, mine)
        with use_profile(model, 'bw4'): assert not torch.equal(span_outputs(model, b, w).logits, mine)
    before = {n:p.detach().clone() for n,p in model.named_parameters()}
    train(model, WINDOWS, fixed_profile('bw4'),
          TrainConfig(steps=3, batch_size=4, accumulate=1, lr=1e-2, warmup=0), TOK.pad_token_id, span_extraction,
          progress=False)
    assert ({n for n,p in model.named_parameters() if not torch.equal(p, before[n])}
            ==set(adapter_params(model, '4'))|{'qa_outputs.weight','qa_outputs.bias'})
    save_switchable(model, folder/'saved')
    back = load_switchable(folder/'saved', load_model(folder, head='span')[0])
    for p in ('bw4','bw8'):
        with use_profile(model, p), use_profile(back, p), torch.no_grad():
            assert torch.equal(span_outputs(model, b, w).logits, span_outputs(back, b, w).logits)

def test_bfloat16(folder):
    model,_ = load_model(folder, 'bfloat16', head='span')
    assert model.dtype==torch.bfloat16 and model.qa_outputs.weight.dtype==torch.float32
    make_switchable_(model, ('bw8',), QuantConfig(act='per_token'))
    add_adapters_(model, dropout=0.)
    train_head_(model)
    out = train(model, WINDOWS, fixed_profile('bw8'), TrainConfig(steps=2, batch_size=4, accumulate=1),
                TOK.pad_token_id, span_extraction, progress=False)
    assert all(c[1]>0 for c in out['curve']) and model.qa_outputs.weight.dtype==torch.float32
    assert len(extract(model, TOK, QUESTIONS, 48, 8))==len(QUESTIONS)

def test_a_head_of_its_own(folder, tmp_path):
    "A model that was saved with a span head comes back with it, and is not mistaken for a causal one."
    model,_ = load_model(folder, head='span', seed=5)
    model.save_pretrained(tmp_path); TOK.save_pretrained(tmp_path)
    back,_ = load_model(tmp_path, head='span')
    assert all(torch.equal(a, b) for a,b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="head='span'"): load_model(tmp_path)
    with pytest.raises(ValueError, match='lm_head'): find_sites(model, lm_head=True)

def test_gguf(tmp_path):
    tokens = ['<|endoftext|>', *sorted(pre_tokenizers.ByteLevel.alphabet()), 'ab']
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tokens), hidden_size=64, intermediate_size=96, max_position_embeddings=512)
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**_grouped | sizes, tie_word_embeddings=True))
    write_gguf(tmp_path/'m.gguf', llama, tokens)
    causal,_ = load_model(tmp_path/'m.gguf', 'bfloat16')
    model,tok = load_model(tmp_path/'m.gguf', 'bfloat16', head='span')
    theirs,ours = (m.base_model.state_dict().values() for m in (causal, model))
    assert all(torch.equal(a, b) for a,b in zip(theirs, ours, strict=True))
    assert all(f.text in q['context'] for f,q in zip(extract(model, tok, QUESTIONS[:2], 400, 8), QUESTIONS))
    model.save_pretrained(tmp_path/'saved'); tok.save_pretrained(tmp_path/'saved')
    assert torch.equal(load_model(tmp_path/'saved', 'bfloat16', head='span')[0].qa_outputs.weight,
                       model.qa_outputs.weight)

# --- windows --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('trim', (False, True))
def test_windows_on_bytes(trim):
    "Random texts, bytes as tokens, spaces within tokens: the answer comes back exactly, and no token is in no window."
    tok = byte_bpe([q['context'] for q in QUESTIONS], 600)
    tok.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    rng = random.Random(0)
    words = ['the','Größe','naïve','北京','🙂','x','1834','Zürich','a','longer','words','here']
    for i in range(60):
        context = [rng.choice(words) for _ in range(rng.randint(1, 80))]
        a = rng.randrange(len(context)); b = rng.randint(a, min(a+2, len(context)-1))
        text,start = ' '.join(context[a:b+1]),len(' '.join(context[:a]))+(a>0)
        q = dict(id=str(i), question='what?', context=' '.join(context),
                 answers=dict(text=[text], answer_start=[start]))
        stride,size = 60,rng.randint(100, 160)
        windows = encode_windows([q], tok, size, stride)
        assert ({o for w in windows for o in w.offsets}
                =={o for w in encode_windows([q], tok, 10**6, 0) for o in w.offsets})
        assert all(len(w.ids)<=size for w in windows)
        assert len(windows)==1 or all(len(w.offsets)>stride for w in windows)
        held = [w for w in windows if w.holds]
        assert held
        for w in held:
            assert q['context'][w.offsets[w.target[0]-w.first][0]:w.offsets[w.target[1]-w.first][1]].strip()==text

def test_windows_are_the_fewest():
    "For every length of context and stride: all tokens, and none twice more than needed."
    q = QUESTIONS[0]
    n,head = len(encode_windows([q], TOK)[0].offsets),encode_windows([q], TOK)[0]
    rest = len(head.ids)-n
    for room in range(2, n+3):
        for stride in {0, 1, room//2}-{room}:
            windows = encode_windows([{k:v for k,v in q.items() if k!='answers'}], TOK, room+rest, stride)
            assert len(windows)==max(1, -(-(n-stride)//(room-stride)))
            assert sum(len(w.offsets) for w in windows)-stride*(len(windows)-1)==n

# --- scores ---------------------------------------------------------------------------------------------------------

def official(prediction, references):
    "SQuAD v1.1's rules, written out."
    def norm(s):
        s = ''.join(c for c in s.lower() if c not in string.punctuation)
        return re.sub(r'\b(a|an|the)\b', ' ', s).split()
    def f1(p, r):
        same = sum((Counter(p)&Counter(r)).values())
        return 2*same/(len(p)+len(r)) if same else 0.
    said = norm(prediction)
    return max(float(said==norm(r)) for r in references), max(f1(said, norm(r)) for r in references)

def span_gpt2(seed=0, profiles=('bw4','bw8')):
    torch.manual_seed(seed)
    m = GPT2ForQuestionAnswering(GPT2Config(vocab_size=len(TOK), n_positions=128, n_embd=32, n_layer=2, n_head=4,
                                            initializer_range=.2)).eval()
    make_switchable_(m, profiles, QuantConfig(act='per_token')); add_adapters_(m, dropout=0.); train_head_(m)
    return m

def test_scores_are_of_questions():
    rng = random.Random(0)
    def another(q):   # the question with a second reference answer
        a = q['answers']
        more = ' '.join(rng.sample(q['context'].split(), 2))
        return q | dict(answers=dict(text=[*a['text'], more], answer_start=a['answer_start']*2))
    qs = [another(q) for q in QUESTIONS]
    scores = evaluate_spans(span_gpt2(), TOK, qs, ['bw8'], 48, 8)['bw8']
    assert len(encode_windows(qs, TOK, 48, 8))>len(qs)==len(scores.f1)                   # more windows than scores
    for said,em,f1,q in zip(scores.prediction, scores.em, scores.f1, qs):
        assert said in q['context'] and (em, pytest.approx(f1, abs=1e-5))==official(said, q['answers']['text'])
    assert scores.summary['f1'].value==pytest.approx(sum(scores.f1)/len(qs)) and any(scores.f1)

def test_broken_weights_have_a_name():
    m = span_gpt2(); m.qa_outputs.weight.data[0, 0] = float('nan')
    with pytest.raises(ValueError, match='question 0: its scores are NaN'): extract(m, TOK, QUESTIONS, 48, 8)

def test_packed(tmp_path):
    "One file for serving keeps the head, and answers alike: with float activations, of which rounding moves no code."
    m = span_gpt2(profiles=[Profile(f'w{b}', Bits(b)) for b in (4, 8)])
    freeze(m, tmp_path/'m.safetensors')
    packed = load_packed(tmp_path/'m.safetensors')
    assert torch.equal(packed.qa_outputs.weight, m.qa_outputs.weight)
    assert torch.equal(packed.qa_outputs.bias, m.qa_outputs.bias)
    for p in ('w4','w8'):
        a,b = (evaluate_spans(x, TOK, QUESTIONS, [p], 48, 8)[p] for x in (m, packed))
        assert a.prediction==b.prediction and a.nll_answer==pytest.approx(b.nll_answer, rel=1e-3)

# --- the loop's other parts -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('term', (
    Distillation(), Distillation(kind='js', temperature=2., stop_gradient=False), Distillation(teacher='float'),
    Stability()), ids=str)
def test_objectives_of_the_other_task(term):
    "Terms that compare profiles work on spans as they are; gradients are finite and reach the head."
    m,b = span_gpt2(),collate_windows(WINDOWS[:6], TOK.pad_token_id)
    for p in adapter_params(m).values(): torch.nn.init.normal_(p, std=.1)
    w = span_extraction.weights(b, None)
    def grads(objective):
        m.zero_grad()
        for l in objective.losses(m, span_extraction, b, w, ('bw8','bw4')): l.backward()
        return torch.cat([p.grad.flatten() for p in [*adapter_params(m, '4').values(), *m.qa_outputs.parameters()]])
    with_term,alone = grads(Objective((term,))),grads(Objective())
    assert with_term.isfinite().all() and not torch.equal(with_term, alone)

def test_run_with_an_objective(toy_folder, tmp_path):
    preset = replace(PRESETS['tiny'], name='toy', model=str(toy_folder), profiles=('bw4','bw8'), steps=2,
                     batch_size=2, train_n=20, calibration=1, eval_n=4, max_length=64)
    record = run_spans(preset, tmp_path, policy='with_highest', objective='kl_highest', progress=False)
    assert record['name']=='with_highest-kl_highest-per_tensor-learned-nested'
    assert record['train_windows']>=record['train_questions']==20
    saved, = load_records(tmp_path, 'toy', 'spans'); assert saved['after']==record['after']
