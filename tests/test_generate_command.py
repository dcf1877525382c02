"`generate`: any model, each profile, streamed or not; the text is what `model.generate` writes."
import io, json, sys
from threading import Thread
import pytest, torch
from transformers import TextIteratorStreamer, TextStreamer
import switchable_llm as sl
from switchable_llm.apps.cli import main
from switchable_llm.system.native import native_features

PROMPT = 'context: Bemola was born in'
CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
PROFILES = 'bw8','w4a8','bw4'

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The embedded model with untrained adapters that say something: in memory, as a checkpoint, and packed; one base can talk."
    folder = tmp_path_factory.mktemp('made')
    model,tokenizer = sl.load('tiny')
    model.save_pretrained(folder/'base'); tokenizer.save_pretrained(folder/'base')
    tokenizer.chat_template = CHAT
    model.save_pretrained(folder/'talker'); tokenizer.save_pretrained(folder/'talker')
    tokenizer.chat_template = None
    sl.make_switchable(model, PROFILES)
    torch.manual_seed(0)
    for l in model.switch.layers:
        for a in l.adapters.values(): torch.nn.init.normal_(a.b, std=.02)
    sl.save_switchable(model, folder/'mine', str(folder/'base'))
    sl.freeze(model, folder/'mine.safetensors', tokenizer=tokenizer)
    return folder, model, tokenizer

@pytest.fixture
def cli(monkeypatch, capsys):
    "Run the command; status, stdout, stderr."
    def run(*argv, stdin=''):
        monkeypatch.setattr(sys, 'stdin', io.StringIO(stdin))
        capsys.readouterr()
        return main([str(a) for a in argv]), *capsys.readouterr()
    return run

def expected(model, tokenizer, profile, n=10, prompt=PROMPT):
    ids = tokenizer(prompt, return_tensors='pt', add_special_tokens=False)
    with sl.use_profile(model, profile): out = model.generate(**ids, max_new_tokens=n, do_sample=False)
    return tokenizer.decode(out[0, ids.input_ids.shape[1]:], skip_special_tokens=True, clean_up_tokenization_spaces=False)

@pytest.mark.parametrize('name', ['mine','mine.safetensors'])
def test_each_profile_writes_what_generate_writes(name, made, cli):
    folder,_,tokenizer = made
    model,_ = sl.load(folder/name)
    wanted = {p:expected(model, tokenizer, p) for p in PROFILES}
    assert len(set(wanted.values()))>1                  # they differ, so a wrong profile would be seen
    asked = ['generate', folder/name, '--prompt', PROMPT, '--max-new-tokens', 10, '--profiles', *PROFILES]
    status,out,err = cli(*asked, '--json')
    found = json.loads(out)
    assert status==0 and {t['profile']:t['text'] for t in found['texts']}==wanted and not found['chat_template'], err
    assert found['prompt_tokens']==len(tokenizer(PROMPT).input_ids) and 'no chat template' in err
    text = ''.join(f'# {p}\n{t}\n' for p,t in wanted.items())
    def quiet(*args, **kw):   # says nothing; but that the slow path is taken, where that is so
        status,out,err = cli(*args, '--quiet', **kw)
        slow = name=='mine.safetensors' and 'decode' not in native_features()
        assert status==0
        assert err.startswith('note: generate() runs through the modules') if slow else not err
        return out
    assert quiet(*asked)==quiet(*asked, '--stream')==text
    said = quiet('generate', folder/name, '--prompt', '-', '--max-new-tokens', 10, '--profile', 'bw4', stdin=PROMPT+'\n')
    assert said==wanted['bw4']+'\n'

def test_the_profile_without_being_asked(made, cli):
    folder,model,tokenizer = made
    for name,p in (('mine','float'), ('mine.safetensors','bw8'), ('base','float')):
        status,out,err = cli('generate', folder/name, '--prompt', PROMPT, '--max-new-tokens', 10)
        assert status==0 and f'\n{p}: ' in err, err
        if name!='mine.safetensors': assert out==expected(model, tokenizer, 'float')+'\n'

def test_a_base_model_is_made_switchable_for_what_is_asked(made, cli):
    folder,_,tokenizer = made
    model,_ = sl.load(folder/'base')
    from switchable_llm.core.switching import make_switchable_
    make_switchable_(model, ['bw4'], sl.QuantConfig(act='per_token'))
    wanted = [expected(model, tokenizer, p) for p in ('float','bw4')]
    out = cli('generate', folder/'base', '--prompt', PROMPT, '--max-new-tokens', 10, '--profiles', 'float', 'bw4', '--json')[1]
    assert [t['text'] for t in json.loads(out)['texts']]==wanted

def test_the_chat_template_is_used_where_there_is_one(made, cli):
    folder,model,tokenizer = made
    ask = ['generate', folder/'talker', '--prompt', 'Who?', '--max-new-tokens', 8]
    for more,prompt,said in (
            ([], '<user> Who?\n<assistant>', 'by the chat template'), (['--raw'], 'Who?', 'as it stands (--raw)'),
            (['--system', 'Be brief.'], '<system> Be brief.\n<user> Who?\n<assistant>', 'by the chat template')):
        status,out,err = cli(*ask, *more)
        assert (status, out)==(0, expected(model, tokenizer, 'float', 8, prompt)+'\n') and said in err, err
    for more,says in ((['--raw','--system','x'], '--raw leaves it out'), (['--stream','--json'], 'choose one'),
                      (['--max-new-tokens','9999'], '9999 is too many'), (['--prompt',' '], '--prompt is empty')):
        status,out,err = cli(*ask, *more)
        assert (status, out)==(1, '') and says in err, err
    assert 'this tokenizer has none' in cli('generate', folder/'base', '--prompt', 'x', '--system', 'y')[2]
    for option,value in (('--temperature','-1'), ('--top-p','0'), ('--top-p','1.1'), ('--max-new-tokens','0')):
        assert cli(*ask, option, value)[0]==2

def test_draws_follow_the_seed(made, cli):
    ask = ['generate', made[0]/'mine.safetensors', '--prompt', PROMPT, '--max-new-tokens', 10, '--quiet', '--temperature']
    hot = [cli(*ask, 3, '--seed', s)[1] for s in (1, 1, 2)]
    assert hot[0]==hot[1]!=hot[2]
    assert cli(*ask, 0)[1]==cli(*ask[:-1])[1]==cli(*ask, 3, '--top-p', 1e-9)[1]   # the likeliest token each time

@pytest.mark.parametrize('name', ['mine','mine.safetensors'])
def test_streamers_of_transformers(name, made, capsys):
    "Word by word the same text, from another thread too; a packed model's native steps feed them."
    folder,_,tokenizer = made
    model,_ = sl.load(folder/name)
    ids = tokenizer(PROMPT, return_tensors='pt')
    for p in PROFILES:
        wanted = expected(model, tokenizer, p)
        kw = dict(**ids, max_new_tokens=10, do_sample=False)
        plain = dict(skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        capsys.readouterr()
        with sl.use_profile(model, p): model.generate(**kw, streamer=TextStreamer(tokenizer, **plain))
        assert capsys.readouterr().out==wanted+'\n'
        streamer = TextIteratorStreamer(tokenizer, **plain, timeout=300)
        def work():
            with sl.use_profile(model, p): model.generate(**kw, streamer=streamer)
        thread = Thread(target=work); thread.start()
        pieces = list(streamer)
        thread.join()
        assert ''.join(pieces)==wanted and len([x for x in pieces if x])>1
        if name=='mine.safetensors' and model.native_status.obstacle is None:
            assert model.native_status.native>0 and model.native_status.modules==0
