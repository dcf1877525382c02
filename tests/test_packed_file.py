"What stands in a packed file: damage, forgeries, what comes back, copies, and where it is written."
import copy, json, os, pickle, subprocess, sys
from pathlib import Path
import pytest, torch, transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig
from switchable_llm.data.embedded import tiny_tokenizer
from switchable_llm.serving.packed import check_packed, load_packed, load_packed_tokenizer, packed_size
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.packed_file import BLANK, checksum, read_head, seal
from switchable_llm.quantizers import QuantConfig
from switchable_llm.core.profiles import FAMILIES
from switchable_llm.core.switching import make_switchable_, use_profile
from test_families import toy
from test_packed import CLASSES, inputs, layer_inputs, switchable

V1 = Path(__file__).parent/'data'/'packed_v1.safetensors'

@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('packed')/'m.safetensors'
    freeze(switchable('gpt2'), path, tokenizer=tiny_tokenizer())
    return path

@pytest.fixture(scope='module')
def llama_file(tmp_path_factory):
    path = tmp_path_factory.mktemp('packed')/'m.safetensors'
    freeze(switchable('llama', act='per_token'), path)
    return path

def forged(file, to, change):
    "The file with its description or tensors changed, and the checksums that belong to that."
    d,tensors = read_head(file).d,load_file(file)
    change(d, tensors)
    return write(to, d, tensors)

def write(to, d, tensors):
    d = d | dict(checksums={k:checksum(t) for k,t in tensors.items()}) if d.get('format_version')!=1 else d
    save_file(tensors, to, metadata=dict(format='pt', switchable_llm=json.dumps(d), head_checksum=BLANK))
    seal(to)
    return to

def refused(path, *parts):
    with pytest.raises(ValueError) as e: load_packed(path)
    for p in (path.name, *parts): assert p in str(e.value), str(e.value)

def same(one, other):
    for p in one.switch.profiles:
        with use_profile(one, p), use_profile(other, p), torch.no_grad():
            assert torch.equal(one(**inputs()).logits, other(**inputs()).logits), p

# --- damage ---

def test_any_bit_of_the_head_and_of_each_tensor(file, tmp_path):
    data,head = file.read_bytes(),read_head(file)
    at = {i:'' for i in range(0, head.start, 97)}
    at |= {head.start+e['data_offsets'][0]+(i*7919)%max(1, e['data_offsets'][1]-e['data_offsets'][0]):n
           for n,e in head.entries.items() if e['data_offsets'][0]<e['data_offsets'][1] for i in range(2)}
    path = tmp_path/'bit.safetensors'
    for i,name in at.items():
        path.write_bytes(data[:i]+bytes([data[i]^1<<i%8])+data[i+1:])
        with pytest.raises(ValueError, match='bit.safetensors') as e: check_packed(path)
        assert name in str(e.value)
    assert check_packed(file)==packed_size(file)

def test_damage_of_the_data_is_looked_for_unless_asked_not_to(file, tmp_path):
    data,path = bytearray(file.read_bytes()),tmp_path/'bit.safetensors'
    data[read_head(file).start+99] ^= 4; path.write_bytes(data)
    with pytest.raises(ValueError, match='not as they were written'): load_packed(path)
    load_packed(path, verify=False)(**inputs())

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs pipes')
def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    with pytest.raises(ValueError, match='pipe: not a file'): load_packed(tmp_path/'pipe')

# --- forgeries: checksums in order, and something else not ---

def test_every_tensor_must_be_there_with_its_type_and_shape(file, tmp_path):
    path = tmp_path/'forged.safetensors'
    for n,t in load_file(file).items():
        refused(forged(file, path, lambda d, ts: ts.update({n+'x':t.clone()})), n+'x')
        if n=='tokenizer': continue       # read when it is asked for
        refused(forged(file, path, lambda d, ts: ts.pop(n)), n)
        refused(forged(file, path, lambda d, ts: ts.update({n:t.to(torch.int64)})), n)
        if not t.numel(): continue
        refused(forged(file, path, lambda d, ts: ts.update({n:torch.cat([t, t])})), n)
        refused(forged(file, path, lambda d, ts: ts.update({n:t[:0]})), n)

def keys_of(v, at=()):
    "Places of all keys in nested lists and mappings."
    for k,x in (v.items() if isinstance(v, dict) else enumerate(v) if isinstance(v, list) else ()):
        if isinstance(v, dict): yield at,k
        yield from keys_of(x, at+(k,))

def test_every_key_of_the_description_counts(file, tmp_path):
    path = tmp_path/'forged.safetensors'
    others = {'config','generation','tokenizer','checksums'}
    places = [(at, k) for at,k in keys_of(read_head(file).d) if not others & {*at}]
    assert len(places)>100
    def at_place(at, change):
        def inner(d, ts):
            for k in at: d = d[k]
            change(d)
        return inner
    for at,k in places[::2]:
        if k not in ('rules','site','layers','glob') and (at, k)!=((), 'checksums'):
            refused(forged(file, path, at_place(at, lambda x: x.pop(k))), k)
        refused(forged(file, path, at_place(at, lambda x: x.update(sesame=1))), 'sesame')
        if (at, k) not in (((), 'route'), ((), 'generation'), ((), 'checksums')):
            refused(forged(file, path, at_place(at, lambda x: x.update({k:{}}))))

@pytest.mark.parametrize('change,part', [
    (dict(n_layer=10**6), 'n_layer=1000000'), (dict(n_layer=10**12), 'n_layer'),
    (dict(num_hidden_layers=999), 'num_hidden_layers'), (dict(vocab_size=10**9), 'vocab_size'),
    (dict(vocab_size=98), '[98, 48]'),
    (dict(n_positions=10**6), '[1000000, 48]'), (dict(n_positions=10**30), 'm.safetensors'),
    (dict(n_embd=10**9), 'n_embd'), (dict(n_head=0), '0 attention heads'), (dict(n_head=5), ''),
    (dict(n_inner=7), 'asks for'),
    (dict(n_layer='2'), ''), (dict(n_layer=1), 'the model has no such layer'), (dict(model_type='llama'), ''),
    (dict(model_type='nothing'), 'nothing'), (dict(activation_function='nothing'), ''),
    (dict(num_labels=10**9), 'num_labels'),
    (dict(attn_implementation='someone/kernel'), 'which code runs'),
    (dict(_attn_implementation='someone/kernel'), 'which code runs'), (dict(add_cross_attention=True), '')], ids=str)
def test_a_configuration_that_asks_for_something_else(change, part, file, tmp_path):
    refused(forged(file, tmp_path/'m.safetensors', lambda d, ts: d['config'].update(change)), part)

@pytest.mark.parametrize('change,part', [
    (dict(num_key_value_heads=3), ''), (dict(num_attention_heads=8), ''), (dict(head_dim=10**9), 'head_dim'),
    (dict(head_dim=24), 'asks for'), (dict(num_key_value_heads=4), 'asks for')], ids=str)
def test_heads_that_do_not_fit(change, part, llama_file, tmp_path):
    refused(forged(llama_file, tmp_path/'m.safetensors', lambda d, ts: d['config'].update(change)), part)

def test_a_long_context_costs_nothing(llama_file, tmp_path):
    def longer(d, ts): d['config'].update(max_position_embeddings=10**9)
    load_packed(forged(llama_file, tmp_path/'m.safetensors', longer))(**inputs())

def first(d, site='mlp_in'): return next(l for l in d['layers'] if l['site']==site)

@pytest.mark.parametrize('change,part', [
    (lambda d: first(d).update(shape=[480, 48]), 'c_fc.high'),
    (lambda d: first(d).update(codes='transformer.h.1.mlp.c_fc'), ''),
    (lambda d: first(d).update(stored=4), 'up to 8'), (lambda d: first(d).update(site='attn_qkv'), None),
    (lambda d: first(d).update(site='lm_head'), 'no lm_head'),
    (lambda d: first(d, 'embedding').update(site='mlp_in'), ''),
    (lambda d: first(d)['adapters'][0].update(r=10**9), 'adapters'),
    (lambda d: first(d)['adapters'][0].update(key='a.b'), 'key'),
    (lambda d: first(d)['adapters'].append(first(d)['adapters'][0]), 'twice'),
    (lambda d: first(d).update(name='transformer.h.0'), ''),
    (lambda d: d['layers'].append(first(d)), 'one name'), (lambda d: d['layers'].pop(), ''),
    (lambda d: d.update(model_class='GPT2Model'), 'GPT2Model'),
    (lambda d: d.update(model_class='Trainer'), 'Trainer'),
    (lambda d: d.update(model_class='LlamaForCausalLM'), ''), (lambda d: d.update(dtype='os'), 'dtype'),
    (lambda d: d.update(route='nowhere'), 'route'),
    (lambda d: d['profiles'][0].update(default='w4a99'), '99'),
    (lambda d: d['profiles'].append(d['profiles'][0]), 'called'), (lambda d: d.update(profiles=[]), 'profiles'),
    (lambda d: d['quantizer'].update(codes='independent'), 'nested'),
    (lambda d: d['quantizer'].update(weight='per_group', group_size=16), 'step'),
    (lambda d: d['generation'].update(num_beams=10**6), 'num_beams'),
    (lambda d: d['generation'].update(watermarking_config=dict(no=1)), ''),
    (lambda d: d['profiles'][0].update(rules=[dict(bits='w4', layers='0-1000000000')]), 'layers')], ids=range(25))
def test_a_description_that_does_not_fit(change, part, file, tmp_path):
    path = forged(file, tmp_path/'m.safetensors', lambda d, ts: change(d))
    if part is None: load_packed(path)      # what a layer is called is a matter of profiles
    else: refused(path, part)

@pytest.mark.parametrize('leaf,value', [
    ('step', torch.nan), ('step', -1.), ('step', torch.inf), ('sums8', -1), ('sums8', 2**31-1),
    ('range8', torch.nan), ('range8', torch.inf)])
def test_numbers_that_cannot_be(leaf, value, file, tmp_path):
    n = f'transformer.h.0.mlp.c_fc.{leaf}'
    def change(d, ts): ts[n].view(-1)[-1] = value
    refused(forged(file, tmp_path/'m.safetensors', change), n)

def test_more_rows_in_all_places_at_once(file, tmp_path):
    "The description and the tensors agree; the model has fewer. This wrote out of bounds once."
    def change(d, ts):
        l = first(d); l['shape'][0] *= 10
        for k in list(ts):
            if not k.startswith(f"{l['name']}.") or '.range' in k or k.endswith('.a'): continue
            ts[k] = ts[k].repeat(10, *[1]*(ts[k].dim()-1))
    refused(forged(file, tmp_path/'m.safetensors', change), 'the configuration asks for')

# --- version 1 ---

def test_a_file_of_version_1_opens():
    m,t = load_packed(V1),load_packed_tokenizer(V1)
    assert set(m.switch.profiles)=={'bw4','bw8','mixed8648','w5'}
    assert t.decode(t('ba be')['input_ids'])=='ba be'
    assert t.model_max_length==32
    assert t.apply_chat_template([dict(role='user', content='ba')], tokenize=False)=='ba '
    raw = load_file(V1)
    for s,l in zip(m.switch.sites, m.switch.layers):
        assert torch.equal(l.step, raw['transformer.wte.step' if s.site=='lm_head' else f'{s.name}.step']), s
    for p in m.switch.profiles:
        with use_profile(m, p):
            assert m.generate(**t('ba be', return_tensors='pt'), do_sample=False, eos_token_id=None).shape==(1, 5)
    with pytest.raises(ValueError, match='no checksums'): check_packed(V1)

def test_version_1_is_version_2_without_what_is_new(file, tmp_path):
    def older(d, ts):
        d['format_version'] = 1; del d['checksums'], d['tokenizer'], ts['tokenizer']
        for l in d['layers']: del l['ranges']
    same(load_packed(file), load_packed(forged(file, tmp_path/'old.safetensors', older)))

@pytest.mark.parametrize('version', [0, -1, 3, 10**30, 1.5, True, None, '2', []], ids=str)
def test_versions_that_are_none_of_ours(version, file, tmp_path):
    d,ts = read_head(file).d,load_file(file)
    said = json.dumps(d | dict(format_version=version))
    save_file(ts, tmp_path/'m.safetensors', metadata=dict(format='pt', switchable_llm=said))
    refused(tmp_path/'m.safetensors', 'version')

# --- all comes back ---

PIECES = ['<unk>','<s>','</s>','<pad>','[PAD]','[UNK]','[CLS]','[SEP]','[MASK]','<mask>','<|endoftext|>',
          '<bos>','<eos>','Ġ','▁',' ','.','h','e','l','o','a','he','ll','hell','hello']
VOCAB,MERGES = {p:i for i,p in enumerate(PIECES)},[('h','e'),('l','l'),('he','ll'),('hell','o')]
SCORES = [(p, -float(i)) for i,p in enumerate(PIECES)]
BPE = ('GPT2Tokenizer','LlamaTokenizer','GemmaTokenizer','Qwen2Tokenizer','CodeLlamaTokenizer','CohereTokenizer',
       'GPTNeoXTokenizer')
TOKENIZERS = dict.fromkeys(BPE, dict(vocab=VOCAB, merges=MERGES)) | dict(
    BertTokenizer=dict(vocab=VOCAB), T5Tokenizer=dict(vocab=SCORES), XLMRobertaTokenizer=dict(vocab=SCORES))

def real_tokenizer(kind):
    if kind=='PreTrainedTokenizerFast':
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=real_tokenizer('GPT2Tokenizer').backend_tokenizer, bos_token='<s>', eos_token='</s>')
    return getattr(transformers, kind)(**TOKENIZERS[kind])

@pytest.mark.parametrize('changed', [False, True])
@pytest.mark.parametrize('kind', [*TOKENIZERS, 'PreTrainedTokenizerFast'])
def test_a_tokenizer_with_all_that_it_carries(kind, changed, tmp_path):
    t = real_tokenizer(kind)
    if changed:
        t.padding_side,t.truncation_side = ('left' if t.padding_side=='right' else 'right'),'left'
        t.clean_up_tokenization_spaces = not t.clean_up_tokenization_spaces
        t.split_special_tokens,t.model_max_length = False,123
        t.add_tokens(['<new>', AddedToken('<strip>', lstrip=True)])
        t.add_special_tokens(dict(pad_token='<pad>', additional_special_tokens=['<x1>','<x2>']))
        t.chat_template = dict(default='{% for m in messages %}{{ m.content }}{% endfor %}',
                               tools='{{ tools }}', **{'../odd name':'x'})
        t.model_input_names = ['input_ids']
        if t.bos_token is not None: t.add_bos_token = not t.add_bos_token
        if t.eos_token is not None: t.add_eos_token = not t.add_eos_token
    freeze(switchable('gpt2', adapters=False), tmp_path/'m.safetensors', tokenizer=t)
    back = load_packed_tokenizer(tmp_path/'m.safetensors')
    assert type(back) is type(t) and len(back)==len(t)
    assert json.loads(back.backend_tokenizer.to_str())==json.loads(t.backend_tokenizer.to_str())
    for k in ('padding_side','truncation_side','clean_up_tokenization_spaces','split_special_tokens',
              'model_max_length','model_input_names','chat_template','add_bos_token','add_eos_token',
              'special_tokens_map','all_special_tokens','all_special_ids','bos_token_id','pad_token_id',
              'added_tokens_decoder'):
        assert getattr(back, k, None)==getattr(t, k, None), k
    for text in ('hello  hello .', 'a <new> hello<strip><x1>', ' <s>hello</s>'):
        assert back(text)==t(text) and back.decode(back(text)['input_ids'])==t.decode(t(text)['input_ids'])
    if t.pad_token: assert back(['hello', 'a'], padding=True)==t(['hello', 'a'], padding=True)
    assert back('hello hello', truncation=True, max_length=3)==t('hello hello', truncation=True, max_length=3)
    if changed:
        assert back.apply_chat_template([dict(role='user', content='hello')], tokenize=False)=='hello'
        assert back.get_chat_template('../odd name')=='x'

def test_a_tokenizer_that_needs_code_or_is_none_of_tokenizers(tmp_path):
    class Mine(transformers.PreTrainedTokenizerFast): pass
    mine = Mine(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    for t,part in ((mine, 'no code'), (transformers.ByT5Tokenizer(), 'save this one beside it')):
        with pytest.raises(ValueError, match=part):
            freeze(switchable('gpt2', adapters=False), tmp_path/'m.safetensors', tokenizer=t)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('change', [
    lambda d: d['tokenizer'].update(name='AutoModel'),
    lambda d: d['tokenizer']['config'].update(vocab_file='/etc/passwd'),
    lambda d: d['tokenizer']['config'].update(auto_map=dict(AutoTokenizer=['x--y.Z', None])),
    lambda d: d['tokenizer']['carried'].update(padding_side='up'),
    lambda d: d['tokenizer']['carried'].update(__class__='x'), lambda d: d['tokenizer'].update(config=None),
    lambda d: d['tokenizer'].update(carried=[])], ids=range(7))
def test_a_damaged_tokenizer_is_named(change, file, tmp_path):
    path = forged(file, tmp_path/'m.safetensors', lambda d, ts: change(d))
    with pytest.raises(ValueError, match='m.safetensors'): load_packed_tokenizer(path)

def test_damaged_bytes_of_a_tokenizer(file, tmp_path):
    def change(d, ts): ts['tokenizer'][::50] = 120
    with pytest.raises(ValueError, match='m.safetensors'):
        load_packed_tokenizer(forged(file, tmp_path/'m.safetensors', change))
    def without(d, ts):
        d.update(tokenizer=None)
        ts.pop('tokenizer')
    with pytest.raises(ValueError, match='m.safetensors: has no tokenizer'):
        load_packed_tokenizer(forged(file, tmp_path/'m.safetensors', without))

def test_generation_and_configuration_come_back(tmp_path):
    m = switchable('gpt2')
    m.generation_config = GenerationConfig(
        max_new_tokens=5, eos_token_id=[3, 4], pad_token_id=0, do_sample=False, stop_strings=['a'],
        repetition_penalty=1.3, bad_words_ids=[[5, 6]], sequence_bias={(7,):-9., (8, 9):2.},
        watermarking_config=dict(bias=2.5), suppress_tokens=[2])
    m.config.id2label = {0:'no', 1:'yes'}; m.config.problem_type = 'single_label_classification'
    freeze(m, tmp_path/'m.safetensors')
    back = load_packed(tmp_path/'m.safetensors')
    ours,theirs = back.generation_config.to_dict(),m.generation_config.to_dict()
    assert ours.pop('sequence_bias')==[[[7], -9.], [[8, 9], 2.]] and theirs.pop('sequence_bias')
    for d in (ours, theirs): d.pop('transformers_version', None)
    assert ours==theirs
    assert back.config.to_dict()==m.config.to_dict()
    for g in (m.generation_config, back.generation_config): g.watermarking_config = g.stop_strings = None
    with use_profile(m, 'bw8'), use_profile(back, 'bw8'):
        assert torch.equal(m.generate(**inputs()), back.generate(**inputs()))

def test_a_generation_configuration_that_no_file_can_hold(tmp_path):
    m = switchable('gpt2', adapters=False); m.generation_config.mine = object()
    with pytest.raises(ValueError, match='generation configuration'): freeze(m, tmp_path/'m.safetensors')
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('kind', FAMILIES)
def test_what_a_model_computes_for_itself(kind, tmp_path):
    "Rotary angles, masks and scales that no file has are those of a model made in the ordinary way."
    plain,m = toy(kind),toy(kind)
    make_switchable_(m, ['bw8'], QuantConfig(act='per_token'))
    freeze(m, tmp_path/'m.safetensors')
    found = dict(load_packed(tmp_path/'m.safetensors').named_buffers())
    for n,b in plain.named_buffers(): assert torch.equal(found[n], b) and found[n].dtype==b.dtype, n

def test_weights_tied_or_untied_by_hand(tmp_path):
    for kind,tie in (('llama_tied', False), ('llama', True)):
        m = CLASSES[kind]().eval()
        if tie: m.lm_head.weight = m.get_input_embeddings().weight
        else: m.lm_head.weight = nn.Parameter(torch.randn_like(m.lm_head.weight))
        make_switchable_(m, ['bw8'], QuantConfig(act='per_token'))
        freeze(m, tmp_path/'m.safetensors')
        back = load_packed(tmp_path/'m.safetensors')
        assert torch.equal(back.lm_head.weight, m.lm_head.weight)
        assert torch.equal(back.get_input_embeddings().weight, m.get_input_embeddings().weight)

def test_loading_leaves_the_random_stream_alone(file):
    torch.manual_seed(3); before = torch.get_rng_state()
    load_packed(file)
    assert torch.equal(torch.get_rng_state(), before)

# --- copies, types, saving ---

READ = """
import pickle, sys, torch
from test_packed import inputs
m = pickle.load(open(sys.argv[1], 'rb'))
print(m.switch.profile.name, torch.equal(m(**inputs()).logits, torch.load(sys.argv[2])))
"""
@pytest.mark.parametrize('kind', ['gpt2','llama_tied'])
def test_copies_are_whole_and_on_their_own(kind, tmp_path, child_env):
    path = tmp_path/'m.safetensors'; freeze(switchable(kind), path)
    one = load_packed(path)
    one.switch.profile = 'bw4'
    two,three = copy.deepcopy(one),pickle.loads(pickle.dumps(one))
    (tmp_path/'p').write_bytes(pickle.dumps(one))
    path.unlink()                                       # a copy needs no file
    for m in (two, three):
        assert type(m) is type(one) and m.switch is not one.switch and m.switch.profile.name=='bw4'
        assert all(l.switch is m.switch for l in m.switch.layers)
        assert all(m.get_submodule(s.name) is l for s,l in zip(m.switch.sites, m.switch.layers))
    two.switch.profile = 'bw8'
    assert [m.switch.profile.name for m in (one, two, three)]==['bw4','bw8','bw4']
    for m in (two, three): same(one, m)
    with use_profile(three, 'bw8'): assert one.switch.profile.name=='bw4'
    kw = dict(**{k:v[1:2] for k,v in inputs().items()}, max_new_tokens=4, do_sample=False, pad_token_id=0)
    two.switch.profile = 'bw4'
    assert torch.equal(one.generate(**kw), two.generate(**kw))
    assert torch.equal(one.generate(**kw), three.generate(**kw))
    with torch.no_grad(): torch.save(one(**inputs()).logits, tmp_path/'logits')
    path_of_tests = os.pathsep.join([child_env['PYTHONPATH'], str(Path(__file__).parent)])
    p = subprocess.run([sys.executable, '-c', READ, str(tmp_path/'p'), str(tmp_path/'logits')],
                       env=child_env | dict(PYTHONPATH=path_of_tests), capture_output=True, text=True)
    assert p.stdout.split()==['bw4','True'], p.stderr[-2000:]

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize('kind', ['gpt2','llama'])
def test_moved_to_another_type(kind, dtype, tmp_path):
    freeze(switchable(kind, act='per_token'), tmp_path/'m.safetensors')
    packed,moved = load_packed(tmp_path/'m.safetensors'),load_packed(tmp_path/'m.safetensors').to(dtype)
    assert moved.dtype==dtype and all(l.step.dtype==torch.float32 for l in moved.switch.layers)
    for p in packed.switch.profiles:
        with use_profile(packed, p), use_profile(moved, p), torch.no_grad():
            seen,logits = layer_inputs(moved)
            assert logits.dtype==dtype
            assert moved.generate(**inputs(), max_new_tokens=2, do_sample=False, pad_token_id=0).shape==(3, 13)
            for x,one,other in zip(seen, packed.switch.layers, moved.switch.layers):
                y,z = one(x.float() if x.is_floating_point() else x),other(x)
                assert z.dtype==dtype and (y-z).abs().max()<=2**-6*y.abs().max(), (p, one)

def test_half_is_to_float16(file):
    assert load_packed(file).half()(**inputs()).logits.dtype==torch.float16

def test_saving_as_transformers_does_copies_the_file(file, tmp_path):
    m = load_packed(file)
    m.save_pretrained(tmp_path/'out')
    again = AutoModelForCausalLM.from_pretrained(tmp_path/'out')
    assert type(again).__name__==type(m).__name__ and torch.equal(again(**inputs()).logits, m(**inputs()).logits)
    assert (tmp_path/'out'/'model.safetensors').read_bytes()==Path(file).read_bytes()

# --- writing ---

@pytest.mark.skipif(os.name!='posix', reason='needs permissions')
@pytest.mark.parametrize('umask', [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(umask, tmp_path):
    before = os.umask(umask)
    try:
        freeze(switchable('gpt2', adapters=False), tmp_path/'m.safetensors'); (tmp_path/'other').touch()
    finally: os.umask(before)
    assert (tmp_path/'m.safetensors').stat().st_mode==(tmp_path/'other').stat().st_mode

def test_only_an_older_packed_file_is_replaced(file, tmp_path):
    model = switchable('gpt2', adapters=False)
    CLASSES['gpt2']().save_pretrained(tmp_path/'plain')
    (tmp_path/'notes').write_text('mine'); (tmp_path/'empty').touch()
    (tmp_path/'cut').write_bytes(file.read_bytes()[:999])
    for target in (tmp_path/'plain', tmp_path/'plain'/'model.safetensors', tmp_path/'notes', tmp_path/'empty',
                   tmp_path/'cut', tmp_path/'notes'/'m.safetensors'):
        before = {p:p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
        with pytest.raises(OSError, match=target.name): freeze(model, target, profiles=['not there'])     # said first
        assert before=={p:p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    for older in (file.read_bytes(), V1.read_bytes()):
        (tmp_path/'m.safetensors').write_bytes(older)
        freeze(model, tmp_path/'m.safetensors')
        assert check_packed(tmp_path/'m.safetensors')['adapters']==0

FULL = """
import resource, signal, sys
from test_packed import freeze, switchable
model = switchable()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))    # as if the disk were full
try: freeze(model, sys.argv[1])
except OSError as e: print(e)
"""
@pytest.mark.skipif(sys.platform!='linux', reason='needs limits of a process')
@pytest.mark.parametrize('older', [False, True])
def test_no_room(older, file, tmp_path, child_env):
    path = tmp_path/'m.safetensors'
    if older: path.write_bytes(file.read_bytes())
    path_of_tests = os.pathsep.join([child_env['PYTHONPATH'], str(Path(__file__).parent)])
    p = subprocess.run([sys.executable, '-c', FULL, str(path)], env=child_env | dict(PYTHONPATH=path_of_tests),
                       capture_output=True, text=True)
    assert str(path) in p.stdout, p.stderr[-2000:]
    assert [q.name for q in tmp_path.iterdir()]==['m.safetensors']*older
    assert not older or path.read_bytes()==file.read_bytes()
