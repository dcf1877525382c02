"GGUF files where they are to run: in llama.cpp itself, where `xllamacpp` is installed."
import json, urllib.request
import numpy as np
import pytest, torch
from switchable_llm.formats.gguf_file import adapter_file, export_gguf
from switchable_llm.serving.exports import merge
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import make_switchable_, use_profile
from switchable_llm.data.embedded import tiny_squad
from switchable_llm.models.loading import load_model
from switchable_llm.quantizers import Bits
from test_exports import NEWER, TEXTS, around, bpe, switchable

llama_cpp = pytest.importorskip('xllamacpp', reason='the package `xllamacpp` (llama.cpp) is not installed')
pytest.importorskip('gguf', reason='the extra `gguf` is not installed')

def served(path, what=None, adapter=None, ctx=64):
    "A running server with the file, and a function that asks it for tokens, or for all that it says of one thing."
    p = llama_cpp.CommonParams()
    p.model.path,p.n_ctx,p.n_parallel,p.warmup,p.cpuparams.n_threads = str(path),ctx,1,False,1
    if adapter is not None: p.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(adapter), 1.)]
    server = llama_cpp.Server(p)
    def ask(what, **fields):
        data,head = json.dumps(fields).encode(),{'Content-Type':'application/json'}
        request = urllib.request.Request(f'{server.listening_address}/{what}', data, head)
        return json.load(urllib.request.urlopen(request))['tokens']
    def ask_all(**fields):
        data,head = json.dumps(fields).encode(),{'Content-Type':'application/json'}
        return json.load(urllib.request.urlopen(urllib.request.Request(f'{server.listening_address}/{what}', data, head)))
    return server, ask_all if what else ask

def same_words(plain, ask, ids, end):
    "The four most likely tokens that follow, one after the other; llama.cpp never takes the one that ends a text."
    kw = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, suppress_tokens=[end])
    want = plain.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **kw)[0, len(ids):].tolist()
    assert ask('completion', prompt=ids, n_predict=4, temperature=0, top_k=1, return_tokens=True,
               ignore_eos=True)==want

@pytest.mark.parametrize('template', ['$A','<|im_start|> $A','<|im_start|> $A <|endoftext|>'])
@pytest.mark.parametrize('split', ['gpt2','smollm','qwen2'])
@pytest.mark.parametrize('kind', ['llama','gpt2','mistral','qwen2'])
def test_llama_cpp_reads_and_says_the_same(kind, split, template, tmp_path):
    tok = around(bpe(split), template); tok.bos_token = '<|im_start|>'
    m = switchable(kind, ('bw8',), vocab_size=len(tok))
    server,ask = served(export_gguf(m, 'bw8', tmp_path/'m.gguf', 'F32', tokenizer=tok))
    plain = merge(m, 'bw8')
    for text in [*TEXTS, '', ' lead', 'x\n\n\ny ', "I'll 3.14 AB", '<|im_start|>user\nHi<|endoftext|> x <tool>']:
        for special in (True, False):
            said = ask('tokenize', content=text, add_special=special, parse_special=True)
            assert said==tok(text, add_special_tokens=special).input_ids, text
        if ids := tok(text).input_ids: same_words(plain, ask, ids, tok.eos_token_id)
    del server

def scores(ask_all, ids, tok):
    "llama.cpp's log-probabilities of all words that may follow; it is made to say 'a', as it is silent within a letter."
    found = ask_all(prompt=ids, n_predict=1, n_probs=len(tok), temperature=-1, ignore_eos=True, cache_prompt=False,
                    logit_bias=[[tok.convert_tokens_to_ids('a'), 1000.]])
    return {w['id']:w['logprob'] for w in found['completion_probabilities'][0]['top_logprobs']}

MORE = [('smollm3', {}), ('smollm3', dict(tied=False)), ('olmo2', {}), ('olmo2', dict(tied=False)), ('gemma', {})]

@pytest.mark.parametrize('kind,kw', [*NEWER, *MORE])
@torch.no_grad()
def test_newer_families(kind, kw, tmp_path):
    "Beyond every window, all words' probabilities are those of transformers."
    tok = bpe('gpt2')
    m = switchable(kind, ('bw8',), vocab_size=len(tok), **kw)
    server,ask = served(export_gguf(m, 'bw8', tmp_path/'m.gguf', 'F32', tokenizer=tok), 'completion')
    ids = torch.randint(2, len(tok), (3, 40), generator=torch.Generator().manual_seed(3))
    right = merge(m, 'bw8')(ids).logits[:, -1].log_softmax(-1)
    for row,want in zip(ids.tolist(), right):
        got = scores(ask, row, tok)
        assert len(got)==len(tok) and max(abs(p-float(want[i])) for i,p in got.items())<=.01, kind
    del server

def as_floats(gguf, path):
    "The file with its matrices dequantized to F32 by gguf: llama.cpp then leaves activations float."
    r,new = gguf.GGUFReader(str(path)),path.with_name(f'floats-{path.name}')
    w = gguf.GGUFWriter(None, r.fields['general.architecture'].contents())
    for k,f in r.fields.items():
        if k.startswith('GGUF.') or k=='general.architecture': continue
        w.add_key_value(k, f.contents(), f.types[0], f.types[1] if len(f.types)>1 else None)
    for t in r.tensors: w.add_tensor(t.name, gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32))
    w.write_header_to_file(new); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return new

@pytest.mark.parametrize('kind', ['gpt2','llama','qwen2','qwen3'])
@torch.no_grad()
def test_codes_and_adapters_say_what_was_trained(kind, tmp_path):
    "50 positions a profile, 200 in all, and all words: 1e-2 nats with float activations; llama.cpp's own, of 8 bits, a little more."
    import gguf
    tok = bpe('gpt2')
    m = switchable(kind, [Profile(f'w{b}', Bits(b)) for b in (4, 5, 6, 8)], vocab_size=len(tok))
    ids = torch.randint(2, len(tok), (1, 51), generator=torch.Generator().manual_seed(3))
    for p in ('w4','w5','w6','w8'):
        with use_profile(m, p): want = m(ids).logits[0].log_softmax(-1)
        path = export_gguf(m, p, tmp_path/f'{p}.gguf', tokenizer=tok)
        for file,most in ((as_floats(gguf, path), .03 if p=='w8' else .01), (path, .06)):
            server,ask = served(file, 'completion', adapter_file(path))
            for i in range(1, 51):
                got = scores(ask, ids[0, :i].tolist(), tok)
                assert len(got)==len(tok) and max(abs(v-float(want[i-1, k])) for k,v in got.items())<=most, (p, i, most)
            del server,ask

def test_the_embedded_model_with_its_words(tmp_path):
    "Its list of words cuts the invented stories as its tokenizer does, and answers come back as text."
    m,tok = load_model('tiny')
    make_switchable_(m, ['bw8'])
    path = export_gguf(m, 'bw8', tmp_path/'m.gguf', tokenizer=tok)
    (server,ask),(other,ask_words) = served(path, 'completion', ctx=256),served(path)
    questions = tiny_squad(60)
    for q in questions:
        text = f"context: {q['context']} question: {q['question']} answer:"
        assert ask_words('tokenize', content=text, add_special=True, parse_special=True)==tok(text).input_ids
    said = ask(prompt=text, n_predict=4, temperature=0, return_tokens=True)
    assert said['content']==tok.decode(said['tokens']) and len(said['tokens'])
    del server,other
