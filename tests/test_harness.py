"EleutherAI's harness: its numbers at a profile are those of the model at that profile, computed here in another way."
import json, math
import pytest, torch
pytest.importorskip('lm_eval')
import switchable_llm as sl
from switchable_llm.apps.cli import main
from switchable_llm.data.encoding import Encoded
from switchable_llm.profiles_eval import perplexity

PROFILES = 'bw8','w4a8','bw4'
N = 8
HEAD = 'context: {text}\nquestion: {question}\nanswer:'

@pytest.fixture(scope='module')
def docs():
    def doc(q): return dict(text=q['context'], question=q['question'], answer=q['answers']['text'][0])
    return [doc(q) for q in sl.squad('tiny', 'validation', N)]

@pytest.fixture(scope='module')
def tasks(tmp_path_factory, docs):
    "Tasks of each kind on invented questions, from a file on this machine."
    folder = tmp_path_factory.mktemp('tasks')
    rows = [d | dict(choices=[d['answer'], docs[(i+1)%N]['answer']+'s', 'nobody']) for i,d in enumerate(docs)]
    (folder/'docs.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    head = HEAD.replace('{', '{{').replace('}', '}}')
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder/'docs.jsonl'}}}}}
test_split: test
"""
    asked = f'doc_to_text: {json.dumps(head)}\n'
    def task(name, text): (folder/f'{name}.yaml').write_text(f'task: {name}'+common+text)
    task('likely', asked+"""output_type: loglikelihood
doc_to_target: " {{answer}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false},
              {metric: acc, aggregation: mean, higher_is_better: true}]
""")
    task('choice', asked+"""output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""")
    task('rolling', """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""")
    task('written', asked+"""output_type: generate_until
doc_to_target: " {{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""")
    return folder

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The embedded model with adapters of noise, as a checkpoint and packed."
    folder = tmp_path_factory.mktemp('made')
    model,tokenizer = sl.load('tiny')
    torch.manual_seed(0)   # before the adapters: one half of each is random at the start
    sl.make_switchable(model, PROFILES)
    for l in model.switch.layers:
        for a in l.adapters.values(): torch.nn.init.normal_(a.b, std=.02)
    sl.save_switchable(model, folder/'mine', 'tiny')
    sl.freeze(model, folder/'mine.safetensors', tokenizer=tokenizer, embedding=8, lm_head=8)
    return folder

def nats(model, tokenizer, before, after):
    "Negative log-likelihood of a text after another, by `perplexity`."
    ids = tokenizer(before+after).input_ids
    return perplexity(model, tokenizer, [Encoded(ids, len(tokenizer(before).input_ids))]).nll_answer[0]

@pytest.mark.parametrize('name', ['mine','mine.safetensors'])
def test_the_numbers_are_those_of_the_profile(name, made, tasks, docs):
    model,tokenizer = sl.load(made/name)
    state = {k:v.clone() for k,v in model.state_dict().items()}
    live = model.switch.profile
    model.train()
    found = sl.lm_eval(model, tokenizer, ['likely','choice','rolling','written'], PROFILES, batch_size=1, include_path=tasks)
    assert model.training and model.switch.profile==live and state.keys()==model.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k,v in model.state_dict().items() if v.device.type!='meta')
    model.eval()
    batched = sl.lm_eval(model, tokenizer, 'likely', PROFILES, batch_size=5, include_path=tasks)
    for p in PROFILES:   # in a batch sums are added in another order, and a number at the border of two codes may get the other
        assert batched[p]['likely']['perplexity,none']==pytest.approx(found[p]['likely']['perplexity,none'], rel=.1)
    for p in PROFILES:
        with sl.use_profile(model, p), torch.no_grad():
            ours = [nats(model, tokenizer, HEAD.format(**d), f" {d['answer']}") for d in docs]
            near = pytest.approx(math.exp(sum(ours)/N), rel=1e-4)
            assert found[p]['likely']['perplexity,none']==near
            def best(d, i):
                choices = [d['answer'], docs[(i+1)%N]['answer']+'s', 'nobody']
                return min(range(3), key=lambda c: nats(model, tokenizer, HEAD.format(**d), ' '+choices[c]))==0
            assert found[p]['choice']['acc,none']==pytest.approx(sum(best(d, i) for i,d in enumerate(docs))/N, abs=1.5/N)
            start = tokenizer.decode([tokenizer.eos_token_id])          # what the harness puts before a text
            bits = sum(nats(model, tokenizer, start, d['text']) for d in docs)/sum(len(d['text'].encode()) for d in docs)
            assert found[p]['rolling']['byte_perplexity,none']==pytest.approx(math.exp(bits), rel=2e-3)
            right = 0
            for d in docs:
                ids = tokenizer(HEAD.format(**d), return_tensors='pt')
                out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1]:]
                right += tokenizer.decode(out, skip_special_tokens=True).partition('\n')[0]==f" {d['answer']}"
            assert found[p]['written']['exact_match,none']==pytest.approx(right/N, abs=1.5/N)
    assert len({found[p]['likely']['perplexity,none'] for p in PROFILES})==3     # a wrong profile would be seen

def test_batches_limits_and_a_model_without_profiles(made, tasks):
    model,tokenizer = sl.load('tiny')
    one,five = (sl.lm_eval(model, tokenizer, 'likely', limit=7, batch_size=b, include_path=tasks) for b in (1, 5))
    assert list(one.results)==['float'] and one.n==dict(likely=7)
    a,b = (x['float']['likely']['perplexity,none'] for x in (one, five))
    assert a==pytest.approx(b, rel=1e-4)
    with pytest.raises(ValueError, match='make_switchable'): sl.lm_eval(model, tokenizer, 'likely', 'bw4', include_path=tasks)
    with pytest.raises(KeyError, match="'bw9': not scored"): one['bw9']
    assert '| task | metric | float |' in one._repr_markdown_()

@pytest.mark.parametrize('what', ['mine','mine.safetensors','tiny'])
def test_one_command_and_a_table_of_three_profiles(what, made, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = what if what=='tiny' else str(made/what)
    line = ['lm-eval', source, '--tasks', 'likely', 'written', '--include-path', str(tasks), '--profiles', *PROFILES,
            '--limit', '4', '--batch-size', '4', '--out', 'scores.json']
    assert main(line)==0
    out,err = capsys.readouterr()
    head,*rows,caption = out.splitlines()
    assert head.split()==['task','metric',*PROFILES] and [r.split()[:3] for r in rows]==[
        ['likely','perplexity','↓'], ['likely','acc','↑'], ['written','exact_match','↑']]
    assert all(r.count('±')==3 for r in rows) and 'likely 4' in caption and '\r' not in err
    assert main([*line, '--quiet'])==1 and 'scores.json: exists already' in capsys.readouterr().err
    assert main([*line, '--json', '--quiet', '--overwrite'])==0
    out,err = capsys.readouterr()
    assert json.loads(out)==json.loads((tmp_path/'scores.json').read_text())
    assert all(l.startswith('note: ') for l in err.splitlines()), err      # such as that a batch takes no native steps
    assert list(json.loads(out)['results'])==list(PROFILES)

def test_what_cannot_be_is_told_before_a_model_is_loaded(made, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('switchable_llm.apps.harness.open_model', lambda *a: pytest.fail('a model was loaded'))
    (tmp_path/'letter.json').write_text('{"dear": "diary"}')
    known = ['--tasks', 'likely', '--include-path', str(tasks)]
    for argv,says in (
            (['--tasks', 'likley', '--include-path', str(tasks)], "'likley': not known to lm-eval (likely"),
            (['--tasks', 'likely', '--include-path', 'nowhere'], '--include-path nowhere: no such folder'),
            ([*known, '--out', 'letter.json'], 'letter.json'), ([*known, '--device', 'gpu'], '--device gpu')):
        assert main(['lm-eval', str(made/'mine'), *argv])==1
        out,err = capsys.readouterr()
        assert out=='' and says in err and err.count('\n')==1, err
    assert (tmp_path/'letter.json').read_text()=='{"dear": "diary"}'
