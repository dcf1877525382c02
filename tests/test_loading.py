"A model that cannot be loaded: the error names what is wrong, nothing is drawn at random, no code of it runs."
import json, shutil
import pytest, torch
from tokenizers import pre_tokenizers
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig
from transformers import LlamaForCausalLM, LlamaModel, T5Config, T5ForConditionalGeneration
from switchable_llm.quantizers import QuantConfig
from switchable_llm.models.loading import load_model
from switchable_llm.data.embedded import tiny_tokenizer
from switchable_llm.models.checkpoints import save_switchable
from switchable_llm.serving.exports import freeze
from switchable_llm.core.switching import make_switchable_
from test_real_models import write_gguf

TOK = tiny_tokenizer()
GPT2 = GPT2Config(vocab_size=len(TOK), n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
LLAMA = LlamaConfig(vocab_size=len(TOK), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                    num_attention_heads=4)

def saved(folder, model):
    model.save_pretrained(folder); TOK.save_pretrained(folder)
    return folder

@pytest.fixture
def folder(tmp_path): return saved(tmp_path/'model', GPT2LMHeadModel(GPT2))

def config(**kw): return lambda b: json.dumps(json.loads(b) | kw).encode()
def cut(n): return lambda b: b[:n]
def put(b): return lambda _: b

@pytest.mark.parametrize('file, change, why', [
    ('config.json', None, 'a folder without config.json'),
    ('config.json', put(b''), 'its configuration cannot be read'),
    ('config.json', put(b'{'), 'its configuration cannot be read'),
    ('config.json', put(b'[]'), 'its configuration cannot be read'),
    ('config.json', put(b'\xff\xfe{}'), 'its configuration cannot be read'),
    ('config.json', config(model_type='none_such'), 'its configuration cannot be read .*none_such'),
    ('config.json', config(n_embd='wide'), 'its configuration cannot be read .*n_embd'),
    ('config.json', config(n_layer=3), '12 weights are missing, such as transformer.h.2'),
    ('config.json', config(n_embd=48), r'has the shape \(.*\), and by config.json \('),
    *(('model.safetensors', change, 'its weights cannot be read') for change in (None, put(b''), cut(-1), cut(100))),
    *(('tokenizer.json', change, 'its tokenizer cannot be read') for change in (None, cut(-9), put(b'{}'))),
    ('tokenizer_config.json', cut(-9), 'its tokenizer cannot be read')])
def test_damaged(folder, file, change, why):
    if change: (folder/file).write_bytes(change((folder/file).read_bytes()))
    else: (folder/file).unlink()
    with pytest.raises(ValueError, match=why) as e: load_model(folder)
    assert str(folder) in str(e.value) and 'hub' not in str(e.value)

def test_no_tokenizer(folder):
    "transformers makes an empty one where there is none."
    for f in folder.glob('tokenizer*'): f.unlink()
    with pytest.raises(ValueError, match='its tokenizer cannot be read .*it has no words'): load_model(folder)

T5 = T5Config(vocab_size=99, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
BART = BartConfig(vocab_size=99, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
                  encoder_attention_heads=2, decoder_attention_heads=2)
@pytest.mark.parametrize('cls, config, why', [
    (LlamaModel, LLAMA, '1 weights are missing, such as lm_head.weight'),
    (T5ForConditionalGeneration, T5, 't5 is an encoder-decoder model'),
    (BartForConditionalGeneration, BART, 'bart is an encoder-decoder model')])
def test_other_models(tmp_path, cls, config, why):
    with pytest.raises(ValueError, match=why): load_model(saved(tmp_path/'m', cls(config)))

def test_what_is_whole_is_loaded(tmp_path):
    "A base without its head is whole where the head is the embedding, and shards are one model."
    torch.manual_seed(0)
    bare,llama = GPT2Model(GPT2),LlamaForCausalLM(LLAMA)
    model,_ = load_model(saved(tmp_path/'bare', bare))
    pairs = zip(bare.state_dict().values(), model.transformer.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a,b in pairs)
    assert model.lm_head.weight is model.transformer.wte.weight
    llama.save_pretrained(tmp_path/'shards', max_shard_size='20KB'); TOK.save_pretrained(tmp_path/'shards')
    back = load_model(tmp_path/'shards')[0].state_dict()
    assert all(torch.equal(back[k], v) for k,v in llama.state_dict().items())
    sorted((tmp_path/'shards').glob('*.safetensors'))[1].unlink()
    with pytest.raises(ValueError, match='its weights cannot be read'): load_model(tmp_path/'shards')

@pytest.mark.parametrize('also', [dict(), dict(model_type='gpt2')], ids=['own type', 'known type'])
def test_no_code_is_run(folder, also, monkeypatch):
    "Not even where somebody would type yes."
    classes = 'class Cfg: pass\nclass LM: pass\nclass T: pass\n'
    (folder/'own.py').write_text(f"import pathlib\npathlib.Path({str(folder/'ran')!r}).touch()\n{classes}")
    autos = dict(AutoConfig='own.Cfg', AutoModelForCausalLM='own.LM', AutoTokenizer=['own.T', 'own.T'])
    for f,more in (('config.json', dict(model_type='own_type') | also),
                   ('tokenizer_config.json', dict(tokenizer_class='T'))):
        (folder/f).write_bytes(config(auto_map=autos, **more)((folder/f).read_bytes()))
    asked = []
    monkeypatch.setattr('builtins.input', lambda *a: asked.append(a) or 'yes')
    try: load_model(folder)
    except ValueError as e: assert str(folder) in str(e)
    assert not asked and not (folder/'ran').exists()

@pytest.mark.parametrize('source', ['', '  ', None, 7, b'tiny', ['tiny']])
def test_no_source(source):
    why = "give 'tiny', a folder, a .gguf file, or a name on the hub"
    with pytest.raises(ValueError, match=why): load_model(source)

def test_places(tmp_path, folder, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)            # no hub is waited for
    (tmp_path/'empty').mkdir()
    (tmp_path/'m.gguf').write_bytes(b''); (tmp_path/'x.gguf').write_bytes(b'GGUF'+bytes(100))
    for source,why in ((tmp_path/'empty', 'a folder without config.json'), (tmp_path/'none.gguf', 'no such file'),
                       (tmp_path/'m.gguf', 'cannot be read'), (tmp_path/'x.gguf', 'cannot be read'),
                       (folder/'model.safetensors', 'a packed file is frozen'),
                       (tmp_path/'none', 'no such file or folder'),
                       ('no/such-model', 'the hub could not give it')):
        with pytest.raises(ValueError, match=why) as e: load_model(source)
        assert str(source) in str(e.value)
    shutil.copytree(folder, tmp_path/'named.gguf')                                   # a folder whatever it is called
    assert load_model(tmp_path/'named.gguf')[0].config.n_layer==2

def test_our_own_files(tmp_path):
    "What this library wrote and this function does not open: the error says what does."
    model = GPT2LMHeadModel(GPT2).eval(); make_switchable_(model, ['bw8'], QuantConfig(act='per_token'))
    save_switchable(model, tmp_path/'switchable')
    if not (tmp_path/'switchable/config.json').exists():
        with pytest.raises(ValueError, match='`load_switchable` opens'): load_model(tmp_path/'switchable')
    freeze(model, tmp_path/'packed.safetensors')
    with pytest.raises(ValueError, match='`load_packed`'): load_model(tmp_path/'packed.safetensors')

def test_gguf_with_a_weight_less(tmp_path):
    "What a .gguf file does not hold is not drawn at random."
    tokens = ['<|endoftext|>', *sorted(pre_tokenizers.ByteLevel.alphabet()), 'ab']
    shape = dict(vocab_size=len(tokens), hidden_size=64, intermediate_size=96, max_position_embeddings=64)
    llama = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=True))
    class Less:   # the same model, told to be one layer deeper than its weights
        config = LlamaConfig.from_dict(llama.config.to_dict() | dict(num_hidden_layers=3))
        state_dict = staticmethod(llama.state_dict)
    write_gguf(tmp_path/'m.gguf', llama, tokens); load_model(tmp_path/'m.gguf')
    write_gguf(tmp_path/'less.gguf', Less, tokens)
    with pytest.raises(ValueError, match='weights are missing, such as model.layers.2'):
        load_model(tmp_path/'less.gguf')
