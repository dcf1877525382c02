"Scores and answers of three families, against transformers' own loss and against one question at a time."
import threading
import pytest, torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from switchable_llm.data.encoding import Encoded, encode
from switchable_llm.data.embedded import tiny_squad, tiny_tokenizer
from switchable_llm.profiles_eval import answer, perplexity, stop_ids, scoring_mode

TOK = tiny_tokenizer()
QUESTIONS = [q for n in (2, 5, 9) for q in tiny_squad(8, 'validation', max_facts=n)]   # of quite different lengths
QUESTIONS = [q | dict(id=str(i)) for i,q in enumerate(QUESTIONS)]
ITEMS = [encode(q, TOK) for q in QUESTIONS]

def model_of(family):
    "A small random model whose answers differ from question to question."
    torch.manual_seed(0)
    ends = dict(vocab_size=len(TOK), bos_token_id=1, eos_token_id=1, pad_token_id=0)
    small = ends | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
    if family=='gpt2': m = GPT2LMHeadModel(GPT2Config(n_positions=256, n_embd=32, n_layer=2, n_head=4, **ends))
    if family=='llama': m = LlamaForCausalLM(LlamaConfig(**small, intermediate_size=48, num_key_value_heads=2))
    if family=='opt': m = OPTForCausalLM(OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32))
    with torch.no_grad():
        for p in m.parameters():
            if p.ndim==2: p.normal_(std=.3)
    return m.eval()

@pytest.fixture(params=['gpt2','llama','opt'])
def model(request): return model_of(request.param)

@torch.no_grad()
def test_perplexity_is_transformers_loss(model):
    "Of the text, of the answer, and of a text without a prompt, in batches of rows of different lengths."
    free = [Encoded(i.ids, 0) for i in ITEMS]
    scores,alone = perplexity(model, TOK, ITEMS),perplexity(model, TOK, free)
    assert (alone.nll_answer, alone.n_answer)==(alone.nll_text, alone.n_text)==(scores.nll_text, scores.n_text)
    for k,i in enumerate(ITEMS):
        ids = torch.tensor([i.ids]); labels = ids.clone(); labels[:, :i.prompt] = -100
        assert alone.n_answer[k]==len(i.ids)-1
        assert alone.nll_answer[k]/(len(i.ids)-1)==pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-4)
        assert scores.nll_answer[k]/scores.n_answer[k]==pytest.approx(model(ids, labels=labels).loss.item(), rel=1e-4)
    assert alone.text==alone.answer==scores.text

@pytest.mark.parametrize('prompt', [0, 1, 2])
def test_the_shortest_texts(prompt):
    "Each token that something predicts counts once: of n tokens n-1, less what the prompt holds."
    m = model_of('gpt2')
    for n in range(max(1, prompt), 5):
        s = perplexity(m, TOK, [Encoded(ITEMS[0].ids[:n], prompt)])
        assert (s.n_text, s.n_answer)==((n-1,), (n-max(prompt, 1),)) and (s.nll_answer[0]>0)==(s.n_answer[0]>0)

@pytest.mark.parametrize('score, item, why', [
    (perplexity, Encoded((), 0), 'has no tokens to score'),
    (answer, Encoded((5, 6), 0), 'has no tokens to continue'),
    (perplexity, Encoded((5, 6), 3), 'prompt=3, of 2 tokens'),
    (perplexity, Encoded((5, 6), -1), 'prompt=-1, of 2 tokens'),
    (perplexity, Encoded((5,)*257, 3), '257 tokens, and the model has 256 positions'),
    (answer, Encoded((5,)*250, 250), '274 tokens, and the model has 256 positions')])
def test_what_cannot_be_scored(score, item, why):
    with pytest.raises(ValueError, match=f'example 1: {why}'): score(model_of('gpt2'), TOK, [ITEMS[0], item])

def test_answers_do_not_depend_on_company(model):
    "Rows padded on the left, in batches of any size and in any order, say what each says alone."
    alone = [answer(model, TOK, [q], max_new_tokens=8)[0] for q in QUESTIONS]
    assert len(set(alone))>len(alone)//2
    for budget in (200, 700, 10**6):
        assert answer(model, TOK, QUESTIONS, max_new_tokens=8, tokens_per_batch=budget)==alone
    assert answer(model, TOK, QUESTIONS[::-1], max_new_tokens=8)==alone[::-1]

def test_answers_in_threads():
    "A model whose own settings punish repeating: threads that score it at once do not hear of them, and it keeps them."
    m = model_of('llama')
    m.generation_config.update(repetition_penalty=5., do_sample=True)
    own,alone,wrong = m.generation_config,answer(m, TOK, QUESTIONS[:6], max_new_tokens=4),[]
    m.train()
    def work(k):
        for _ in range(6):
            if answer(m, TOK, QUESTIONS[:k], max_new_tokens=4)!=alone[:k]: wrong.append(k)
    threads = [threading.Thread(target=work, args=(k,)) for k in (1, 2, 4, 6)]
    for t in threads: t.start()
    for t in threads: t.join(300)
    assert not wrong
    assert m.generation_config is own
    assert own.repetition_penalty==5.
    assert all(x.training for x in m.modules())

def test_its_own_ends_of_text_hold_while_it_is_scored():
    "Also for a thread that begins while another one scores."
    m = model_of('llama')
    m.generation_config.eos_token_id = [1, 7, 9]
    want = stop_ids(m, TOK)
    with scoring_mode(m): assert stop_ids(m, TOK)==want and {7, 9}<=set(want)
    assert stop_ids(m, TOK)==want

@torch.no_grad()
def test_answers_are_the_likeliest_tokens(model):
    "By the definition: append the likeliest token, without padding and without a cache."
    said,stops = answer(model, TOK, QUESTIONS, max_new_tokens=6),stop_ids(model, TOK)
    for i,text in zip(ITEMS, said):
        ids = list(i.ids[:i.prompt])
        while len(ids)<i.prompt+6 and (len(ids)==i.prompt or ids[-1] not in stops):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert TOK.decode(ids[i.prompt:], skip_special_tokens=True).partition('\n')[0].strip()==text
