"Files made by somebody who means harm, with their checksums in order: refused by name, soon, and without taking memory."
import json, os, resource, time
import pytest, torch
from transformers import AutoConfig, DynamicCache
from fuzz_packed import joined, make_healthy, parts
from switchable_llm.apps.cli import main
from switchable_llm.serving.parts import native_calls
from switchable_llm.serving.generating import LeanCache
from switchable_llm.serving.kept import Cache
from switchable_llm.serving.lean import live_of
from switchable_llm.serving.packed import load_packed, load_packed_tokenizer

@pytest.fixture(scope='module')
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp('healthy')
    make_healthy(folder)
    return {p.stem: p.read_bytes() for p in folder.iterdir()}

def forged(path, data, change):
    "A healthy file with another description or other tensors, sealed anew."
    d,tensors = parts(bytearray(data))
    change(d, tensors)
    joined(path, d, tensors)
    return path

BOMBS = dict(   # model type -> its class, and what it makes a million of
    prophetnet=('ProphetNetForCausalLM', dict(num_decoder_layers=2**20, hidden_size=4, num_decoder_attention_heads=1, decoder_ffn_dim=4)),
    stablelm=('StableLmForCausalLM', dict(num_hidden_layers=1, num_attention_heads=2**20, num_key_value_heads=2**20,
                                          hidden_size=2**20, qk_layernorm=True, intermediate_size=1)),
    albert=('AlbertForQuestionAnswering', dict(num_hidden_groups=2**20, inner_group_num=2**20, num_hidden_layers=1)))

@pytest.mark.parametrize('kind', BOMBS)
def test_a_file_makes_no_more_modules_than_it_holds(kind, healthy, tmp_path):
    cls,settings = BOMBS[kind]
    config = json.loads(AutoConfig.for_model(kind).to_json_string(use_diff=False)) | settings
    path = forged(tmp_path/'bomb.safetensors', healthy['llama'], lambda d, t: d.update(config=config, model_class=cls))
    before,start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,time.process_time()
    with pytest.raises(ValueError, match='bomb.safetensors'): load_packed(path)
    assert time.process_time()-start<30 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before<200*1024

def tokenizer_with(**changes):
    def change(d, tensors):
        j = json.loads(bytes(tensors['tokenizer'].numpy())) | changes
        tensors['tokenizer'] = torch.frombuffer(bytearray(json.dumps(j).encode()), dtype=torch.uint8)
    return change

BROKEN = dict(   # what a tokenizer says -> how the package of tokenizers takes it
    panics_when_read=dict(normalizer=dict(type='Precompiled', precompiled_charsmap='')),
    panics_when_used=dict(post_processor=dict(
        type='TemplateProcessing', special_tokens={}, single=[dict(SpecialToken=dict(id='[X]', type_id=0))],
        pair=[dict(Sequence=dict(id='A', type_id=0))])),
    no_length=dict(pre_tokenizer=dict(type='FixedLength', length=0)),
    far=dict(model=dict(type='WordLevel', vocab={'<unk>':0, 'x':2**31}, unk_token='<unk>')))

@pytest.mark.parametrize('how', BROKEN)
def test_a_tokenizer_that_cannot_be_used_is_told_by_the_name_of_its_file(how, healthy, tmp_path, capfd):
    path = forged(tmp_path/'words.safetensors', healthy['gpt2'], tokenizer_with(**BROKEN[how]))
    with pytest.raises(ValueError, match='words.safetensors'): load_packed_tokenizer(path)
    assert main(['check', str(path)])==1

def test_another_file_in_its_place_is_seen(healthy, tmp_path, monkeypatch):
    "A `freeze` beside a server that starts: never one file's description with the tensors of another."
    import switchable_llm.serving.packed as packed
    path,other = tmp_path/'m.safetensors',tmp_path/'other.safetensors'
    path.write_bytes(healthy['llama'])
    def change(d, tensors):
        for l in d['layers']:
            for a in l['adapters']: a['alpha'] = 4*a['alpha']
    forged(other, healthy['llama'], change)
    read = packed.read_head
    def slow(p):
        head = read(p)
        os.replace(other, path)
        return head
    monkeypatch.setattr(packed, 'read_head', slow)
    with pytest.raises(ValueError, match='changed while it was read'): load_packed(path, verify=False)

def ids(n=5): return torch.arange(1, n+1)[None]
G = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)

@pytest.fixture
def model(healthy, tmp_path):
    (tmp_path/'m.safetensors').write_bytes(healthy['llama'])
    return load_packed(tmp_path/'m.safetensors')

@pytest.mark.skipif(native_calls() is None, reason='the cache of native steps needs the kernels')
def test_a_layer_that_is_held_keeps_its_buffer(model):
    out = model.generate(ids(), return_dict_in_generate=True, **G)
    layer = next(getattr(out, n) for n in ('cache','past_key_values') if getattr(out, n, None) is not None).layers[0]
    before = layer.keys
    del out
    model.generate(ids(9)+3, **G)
    assert torch.equal(layer.keys, before)

def test_a_text_of_the_callers_own_stays_his(model):
    model.generate(ids(), **G)
    mine = live_of(model).cache()
    mine.reserve(5); pages = list(mine.pages)
    cache = LeanCache(model, store=mine)
    del cache
    assert mine.pages==pages and mine.pool.nbytes==mine.nbytes

def test_idle_pages_take_little(model):
    live = live_of(model)
    caches = [live.cache() for _ in range(6)]
    for c in caches: c.reserve(60)
    live.pool.SPARE = 3*live.pool.page_bytes()
    for c in caches: c.begin()
    assert live.pool.nbytes==0 and live.pool.free==3*live.pool.page_bytes()

def test_pages_of_another_model_are_refused(model, healthy, tmp_path):
    (tmp_path/'other.safetensors').write_bytes(healthy['gpt2'])
    other = load_packed(tmp_path/'other.safetensors')
    with pytest.raises(ValueError, match=r'pages for \(blocks, heads, channels\)'):
        Cache(live_of(other).tables.parts, pages=live_of(model).cache().pool)

def test_a_model_that_moves_computes_its_angles_anew(healthy, tmp_path):
    (tmp_path/'m.safetensors').write_bytes(healthy['llama'])
    one,two = (load_packed(tmp_path/'m.safetensors') for _ in range(2))
    one.generate(ids(), **G)
    for m in (one, two): m.to(torch.bfloat16)
    with torch.no_grad(): a,b = (m.generate(ids(), output_logits=True, return_dict_in_generate=True, **G).logits for m in (one, two))
    assert all(torch.equal(x, y) for x,y in zip(a, b, strict=True))

def test_numbers_beyond_the_native_ones_run_by_modules(healthy, tmp_path):
    def change(d, tensors): d['config']['max_position_embeddings'] = 2**40
    path = forged(tmp_path/'long.safetensors', healthy['llama'], change)
    assert load_packed(path).generate(ids(), **G).shape==(1, 9)

def test_positions_in_another_order_are_not_run_as_if_they_were_in_order(model):
    odd = torch.tensor([[0, 3, 1, 2, 4]])
    kw = dict(position_ids=odd, attention_mask=torch.ones_like(odd), use_cache=True, logits_to_keep=1)
    with torch.no_grad():
        whole = model(ids(), past_key_values=DynamicCache(), **kw).logits[:, -1]
        cached = model(ids(), past_key_values=LeanCache(model), **kw).logits[:, -1]
    torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)
