"Own conversations: the template's form, the assistant's turns alone, tools kept, nothing cut; by API and command."
import json, re
import pytest, torch
import datasets
from transformers import AutoTokenizer
import switchable_llm as sl
from switchable_llm.apps.cli import main
from switchable_llm.data.chat import CHATML, chat, encode_chat, find_template
from switchable_llm.data.embedded import tiny_squad, tiny_tokenizer
from switchable_llm.data.tasks import chatting
from switchable_llm.profiles_eval import perplexity

def turn(role, content, **more): return dict(role=role, content=content, **more)
def asked(q): return [turn('user', f"{q['context']} {q['question']}"), turn('assistant', q['answers']['text'][0])]

ROWS = [dict(messages=asked(a)+asked(b)) for a,b in zip(tiny_squad(40, max_facts=3), tiny_squad(40, seed=1, max_facts=3))]
TALK = [turn('system', 'Be short.'), turn('user', 'Who?'), turn('assistant', 'A poet.'), turn('user', 'Where?'), turn('assistant', 'Here.')]
TOOL = dict(type='function', function=dict(name='find', parameters=dict(type='object', properties=dict(what=dict(type='string')))))
CALL = dict(type='function', function=dict(name='find', arguments=dict(what='Roka')))
CALLED = [turn('user', 'Find Roka.'), turn('assistant', None, tool_calls=[CALL]), turn('tool', 'a place'), turn('assistant', 'A place.')]

# Three forms that are in use: without marks, with `[INST]`, and with marks.
TEMPLATES = dict(
    chatml=CHATML, unmarked=re.sub(r'\{%-? *(end)?generation *-?%\}', '', CHATML),
    inst="{% for m in messages %}{% if m.role=='assistant' %}{{ ' ' + m.content + eos_token }}"
         "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}")

@pytest.fixture(scope='module')
def tok(): return tiny_tokenizer()

@pytest.fixture()
def model():
    torch.manual_seed(0)
    return sl.load('tiny')[0]

def said(ids, learnt, tok): return tok.decode([i for i,l in zip(ids, learnt) if l])

# --- which tokens -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', TEMPLATES)
@pytest.mark.parametrize('messages', [TALK, *(r['messages'] for r in ROWS[:5])])
def test_what_is_learnt_is_what_the_assistant_said(name, messages, tok):
    "The oracle changes one turn of the assistant at a time, and looks which tokens of the whole change."
    template = TEMPLATES[name]
    ids,learnt = encode_chat(messages, tok, template)
    whole = tok.apply_chat_template(messages, tokenize=False, chat_template=template)
    assert tok.decode(ids)==whole
    for j,m in enumerate(messages):
        changed = [*messages[:j], m | dict(content='~~~'), *messages[j+1:]]
        other = tok.apply_chat_template(changed, tokenize=False, chat_template=template)
        same = next(i for i,(a,b) in enumerate(zip(whole, other)) if a!=b)
        behind = next(i for i,(a,b) in enumerate(zip(whole[::-1], other[::-1])) if a!=b)
        offsets = tok(whole, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        inside = [l for l,(a,b) in zip(learnt, offsets) if b>same and a<len(whole)-behind]
        assert inside and set(inside)=={m['role']=='assistant'}

def test_marks_and_differences_agree_but_for_what_follows_a_turn(tok):
    (ids,marked),(same,found) = (encode_chat(TALK, tok, TEMPLATES[n]) for n in ('chatml', 'unmarked'))
    assert ids==same and all(f for m,f in zip(marked, found) if m)
    assert said(ids, [f and not m for m,f in zip(marked, found)], tok)=='\n\n'

def test_tools_and_their_calls_are_kept(tok, tmp_path):
    rows = [dict(messages=CALLED, tools=[TOOL]), dict(messages=TALK), dict(messages=TALK, tools=[])]
    expected = [encode_chat([dict(content='') | {k:v for k,v in m.items() if v is not None} for m in r['messages']],
                            tok, CHATML, r.get('tools')) for r in rows]
    (tmp_path/'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path/'rows.parquet')
    texts = [r | dict(tools=json.dumps(r.get('tools'))) for r in rows]
    for where in (rows, tmp_path/'rows.jsonl', tmp_path/'rows.parquet', texts):
        found = chat(where, 'all', chat_template='chatml').training(tok, 2000)
        assert [(list(e.ids), list(e.learnt)) for e in found]==expected
    assert '"name": "find", "arguments": {"what": "Roka"}' in said(*expected[0], tok)

def test_prompts_and_completions(tok):
    messages = chat([dict(prompt=TALK[:4], completion=TALK[4:])], 'all', chat_template='chatml').training(tok, 500)[0]
    assert said(messages.ids, messages.learnt, tok)=='Here.<|im_end|>\n'
    text = chat([dict(prompt='Who?', completion=' A poet.')], 'all').training(tok, 500)[0]
    assert said(text.ids, text.learnt, tok)==' A poet.<eos>' and tok.decode(text.ids)=='Who? A poet.<eos>'

def test_the_template_of_the_tokenizer_comes_first(tok, tmp_path):
    own = tiny_tokenizer(); own.chat_template = TEMPLATES['inst']
    own.save_pretrained(tmp_path/'own'); again = AutoTokenizer.from_pretrained(tmp_path/'own')
    assert find_template(again)==TEMPLATES['inst'] and find_template(again, 'chatml')==CHATML
    (tmp_path/'t.jinja').write_text(TEMPLATES['inst'])
    assert find_template(tok, tmp_path/'t.jinja')==TEMPLATES['inst']==find_template(tok, TEMPLATES['inst'])

def test_no_answer_is_cut(tok):
    everything = chat(ROWS, 'all', chat_template='chatml').training(tok, 10**6)
    for size in sorted(everything.lengths)[::9]:
        found = chat(ROWS, 'all', chat_template='chatml').training(tok, size)
        assert [e.ids for e in found]==[e.ids for e in everything if len(e.ids)<=size]
        assert f'{len(ROWS)-len(found)} left out (longer than {size} tokens' in found.said

# --- train, evaluate --------------------------------------------------------------------------------------------------

def test_the_loss_counts_the_assistant_alone(tok, model):
    data = chat(ROWS, 'all', chat_template='chatml').training(tok, 256)
    items = [data[i] for i in range(4)]
    scored = perplexity(model, tok, items)
    for i,e in enumerate(items):
        ids = torch.tensor([e.ids]); labels = torch.where(torch.tensor([e.learnt]), ids, -100)
        with torch.no_grad(): loss = model(input_ids=ids, labels=labels).loss.item()
        assert scored.n_answer[i]==sum(e.learnt) and scored.nll_answer[i]/scored.n_answer[i]==pytest.approx(loss, rel=1e-4)
    batch = chatting.collate(items, tok.pad_token_id)
    assert [(row>=0).sum().item() for row in batch['labels']]==[sum(e.learnt) for e in items]

def test_training_teaches_the_assistants_words(tok, model):
    talks = sl.chat(ROWS, chat_template='chatml')
    sl.make_switchable(model, ['bw8'])
    before = sl.evaluate(model, tok, talks, 'bw8')
    sl.train(model, tok, talks, steps=15, progress=False)
    after = sl.evaluate(model, tok, talks, 'bw8')
    change = sl.compare(after['bw8'], before['bw8'])
    assert change['log_ppl_answer'].high<0 and set(change)=={'log_ppl_text', 'log_ppl_answer'}
    assert 'conversations' in after.caption and 'by the assistant' in after.caption and 'PPL answer' in str(after)

@pytest.mark.parametrize('rows,kw,says', [
    (ROWS, {}, "has no chat template: give a file, the text of a template, or 'chatml'"),
    ([dict(text='a')], {}, 'its columns are text.*sl.text'),
    ([dict(messages=TALK[:2])], dict(chat_template='chatml'), 'no turn of the assistant to learn; its roles are system, user'),
    ([dict(messages=TALK[2:])], dict(chat_template='chatml'), 'begins with the assistant'),
    ([dict(messages='hello')], dict(chat_template='chatml'), "messages is 'hello'"),
    ([dict(messages=TALK)], dict(chat_template="{{ messages[-1].content }}"), 'writes the beginning of a conversation otherwise'),
    ([dict(messages=[turn('user', 'word '*600), TALK[2]])], dict(chat_template='chatml'), 'all 1 conversations are longer than 256 tokens'),
    ([dict(prompt='a', completion=3)], {}, 'needs two texts, or two lists of messages')])
def test_what_cannot_be_learnt_is_said(rows, kw, says, tok, model):
    sl.make_switchable(model, ['bw8'])
    with pytest.raises(ValueError, match=says): sl.train(model, tok, sl.chat(rows, 'all', **kw), steps=1, progress=False)

def test_the_command_trains_and_scores_conversations(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'talks.jsonl').write_text('\n'.join(map(json.dumps, ROWS)))
    own = ['--data', 'talks.jsonl', '--task', 'chat']
    def run(*argv):
        status = main([*argv, '--quiet']); out = capsys.readouterr()
        return status, out.out, out.err
    train = ['train', *own, '--profiles', 'bw8', '--act', 'per_token', '--steps', '2', '--batch-size', '4', '--out', 'mine']
    assert run(*train)[0]==1
    status,_,err = run(*train, '--chat-template', 'chatml')
    assert status==0, err
    status,out,err = run('evaluate', 'mine', *own, '--chat-template', 'chatml')
    assert status==0 and 'PPL answer' in out and 'EM' not in out and 'talks.jsonl, split validation' in out, err
    status,out,err = run('evaluate', 'mine', '--data', 'talks.jsonl')
    assert status==1 and 'take the task chat' in err.splitlines()[-1]
    status,out,err = run('evaluate', 'mine', *own, '--stride', '5')
    assert status==1 and '--stride: is not for --task chat' in err
