"Questions from files of every kind, and SQuAD v2 by its own rules written out."
import json, random, re, string, subprocess, sys, warnings
from collections import Counter
import datasets, pytest, torch
from transformers import GPT2Config, GPT2ForQuestionAnswering, GPT2LMHeadModel
from switchable_llm.data.encoding import encode
from switchable_llm.data.squad import load_squad
from switchable_llm.data.embedded import tiny_squad, tiny_tokenizer
from switchable_llm.training.settings import TrainConfig
from switchable_llm.joint_training import fixed_profile, train
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.profiles_eval import Evaluation, evaluate
from switchable_llm.data.squad_scores import em_f1
from switchable_llm.quantizers import QuantConfig
from switchable_llm.data.spans import encode_windows
from switchable_llm.search.extraction import evaluate_spans, extract, span_extraction, train_head_
from switchable_llm.search.strategies import score_strategy, strategy
from switchable_llm.core.switching import make_switchable_

TOK = tiny_tokenizer()
QUESTIONS = tiny_squad(24, 'validation')
NONE = dict(text=[], answer_start=[])
V2 = [q | dict(answers=NONE) if i%3==0 else q for i,q in enumerate(QUESTIONS)]

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "What `datasets` keeps of the tables goes with the test."
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path/'cache')

def official(questions, marked=True):
    "Questions in SQuAD's nested format; with `marked`, as version 2 writes them."
    def qa(q):
        answers = [dict(text=t, answer_start=s) for t,s in zip(q['answers']['text'], q['answers']['answer_start'])]
        mark = dict(is_impossible=not answers, plausible_answers=[dict(text='x', answer_start=0)]) if marked else {}
        return dict(id=q['id'], question=q['question'], answers=answers) | mark
    articles = [dict(title=q['title'], paragraphs=[dict(context=q['context'], qas=[qa(q)])]) for q in questions]
    return dict(version='v2.0', data=articles)

def write(path, data, encoding='utf-8'):
    path.write_bytes(json.dumps(data, ensure_ascii=False).encode(encoding))
    return path

# --- official files -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('encoding', ['utf-8','utf-8-sig','utf-16','utf-16-le','utf-16-be','utf-32'])
def test_unicode_in_any_encoding(tmp_path, encoding):
    q = dict(QUESTIONS[0], context='Zoë naît à 北京 🙂.', answers=dict(text=['北京'], answer_start=[11]))
    assert load_squad(write(tmp_path/'q.json', official([q]), encoding))==[q]

@pytest.mark.parametrize('encoding', ['latin-1','cp1252','mac-roman'])
def test_another_encoding_is_named(tmp_path, encoding):
    file = write(tmp_path/'q.json', official([dict(QUESTIONS[0], context='Zoë vit à Rome.', answers=NONE)]), encoding)
    with pytest.raises(ValueError, match=rf'{re.escape(str(file))}: byte \d+ is not utf-8'): load_squad(file)

def test_version_2(tmp_path):
    "Both ways of writing that there is no answer; what is marked and what is there must agree."
    file = write(tmp_path/'q.json', official(V2))
    assert load_squad(file)==V2 and [bool(q['answers']['text']) for q in V2].count(False)==8
    without = official(V2)
    for a in without['data']:
        for q in a['paragraphs'][0]['qas']:
            if q['is_impossible']: del q['answers']
    assert load_squad(write(tmp_path/'w.json', without))==V2
    assert load_squad(write(tmp_path/'u.json', official(V2, marked=False)))==V2
    for i,says in ((0, False), (1, True)):
        wrong = official(V2[:3]); wrong['data'][i]['paragraphs'][0]['qas'][0]['is_impossible'] = says
        file = write(tmp_path/'x.json', wrong)
        with pytest.raises(ValueError, match=f"{V2[i]['id']}': is_impossible is {says}"): load_squad(file)

def nested(**kw):
    q = dict(id='q1', question='What?', answers=[]) | kw
    return dict(data=[dict(title='T', paragraphs=[dict(context='Rome lies.', qas=[q])])])
def answered(**kw): return nested(answers=[kw])
@pytest.mark.parametrize('data, why', [
    *((t, 'not valid JSON') for t in ('', '{"data":', '['*100_000)),
    *((d, 'official format') for d in ([], 3, {}, dict(data=None), dict(data=[3]), QUESTIONS[:2])),
    (dict(data=QUESTIONS[:2]), 'official format'),
    (dict(data=[dict(title='T', paragraphs=dict(context='c', qas=[]))]), 'official format'),
    *((dict(data=d), 'holds no questions') for d in ([], {}, [dict(title='T', paragraphs=[])])),
    (nested(question=None), "question 'q1' has no question"), (nested(id=None), 'question None has no id'),
    (nested(question=['What?']), r"\['What\?'\] is not a text"), (nested(question='half \ud83d'), 'is not a text'),
    (nested(id=[1]), r'\[1\] is not a text'), (answered(text=3, answer_start=0), '3 is not a text'),
    (nested(answers=None), 'has no answers'), (nested(answers='Rome'), "its answers, 'Rome', are not texts"),
    (nested(answers=['Rome']), 'are not texts'), (answered(text='Rome'), 'are not texts, each with its answer_start'),
    (answered(text='Rome', answer_start='0'), "answer_start='0'"),
    (answered(text='Rome', answer_start=True), 'answer_start=True')])
def test_faults_of_a_file(tmp_path, data, why):
    (file := tmp_path/'q.json').write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(ValueError, match=why) as e: load_squad(file)
    assert str(file) in str(e.value)

def test_answers_elsewhere_are_counted(tmp_path):
    "They are kept, since writing an answer needs no place; where a place is needed they are refused."
    starts = -1, 0, 10**6, QUESTIONS[3]['answers']['answer_start'][0]
    moved = [q | dict(answers=q['answers'] | dict(answer_start=[s])) for q,s in zip(QUESTIONS, starts)]
    file,first = write(tmp_path/'q.json', official(moved)),moved[0]['id']
    with pytest.warns(UserWarning, match=f"3 of 4 questions have an answer that is not where .*, such as '{first}'"):
        read = load_squad(file)
    assert read==moved and encode(read[0], TOK).ids==encode(QUESTIONS[0], TOK).ids
    with pytest.raises(ValueError, match=moved[0]['id']): encode_windows(read, TOK)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_squad(write(tmp_path/'sound.json', official(V2)))

def test_ids_are_of_one_question(tmp_path):
    twice = [*QUESTIONS[:3], dict(QUESTIONS[4], id=QUESTIONS[1]['id'])]
    file = write(tmp_path/'q.json', official(twice))
    why = f"1 ids occur more than once, such as '{twice[1]['id']}', 2 times"
    with pytest.raises(ValueError, match=why): load_squad(file)
    numbers = [q | dict(id=i) for i,q in enumerate(QUESTIONS[:3])]
    assert [q['id'] for q in load_squad(write(tmp_path/'n.json', official(numbers)))]==['0','1','2']

def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path/'d.json').mkdir()
    with pytest.raises(ValueError, match='train.json: no such file'): load_squad(tmp_path/'d.json')
    (tmp_path/'q.txt').write_text('x')
    with pytest.raises(ValueError, match='not a .txt file'): load_squad(tmp_path/'q.txt')

# --- tables of `datasets` -------------------------------------------------------------------------------------------

SPLITS = dict(train=V2[:9], validation=V2[9:])
def table(questions=V2): return datasets.Dataset.from_list(questions)

def test_tables(tmp_path):
    "The same questions from a file, a folder of files, and what `save_to_disk` wrote."
    features = table().features
    table().to_parquet(tmp_path/'q.parquet')
    (tmp_path/'q.jsonl').write_text('\n'.join(map(json.dumps, V2)))
    for f in ('q.parquet','q.jsonl'): assert load_squad(tmp_path/f)==V2
    (tmp_path/'hub/data').mkdir(parents=True)
    both = datasets.DatasetDict({s:datasets.Dataset.from_list(qs, features) for s,qs in SPLITS.items()})
    for split,t in both.items(): t.to_parquet(tmp_path/f'hub/data/{split}-00000-of-00001.parquet')
    both.save_to_disk(tmp_path/'disk')
    for split,qs in SPLITS.items(): assert load_squad(tmp_path/'hub', split)==qs==load_squad(tmp_path/'disk', split)
    datasets.Dataset.from_list(V2[:9], features, split=datasets.Split.TRAIN).save_to_disk(tmp_path/'one')
    assert load_squad(tmp_path/'one', 'train')==V2[:9]
    with pytest.raises(ValueError, match='it is the split train'): load_squad(tmp_path/'one', 'validation')

@pytest.mark.parametrize('named', ['train[:5]', 'train[50%:]', 'train', 'test', 'train[:2]+validation[:2]', None])
def test_a_part_that_was_saved(tmp_path, named):
    "A part is of the split that it was taken from, and no other may be had from it."
    split = named and datasets.NamedSplit(named)
    datasets.Dataset.from_list(V2[:9], table().features, split=split).save_to_disk(tmp_path/'part')
    for asked in ('train','validation'):
        if named is None or named.partition('[')[0]==asked: assert load_squad(tmp_path/'part', asked)==V2[:9]
        else:
            said = rf"it is the split {re.escape(named)}, and split='{asked}' is asked for"
            with pytest.raises(ValueError, match=said): load_squad(tmp_path/'part', asked)

def test_parts_of_a_real_split(tmp_path):
    table(V2[:8]).to_parquet(tmp_path/'q.parquet')
    part = datasets.load_dataset('parquet', data_files=dict(train=str(tmp_path/'q.parquet')), split='train[:6]')
    part.save_to_disk(tmp_path/'part')
    assert load_squad(tmp_path/'part')==V2[:6]
    halves = part.train_test_split(.5, shuffle=False)
    for half,qs in (('train', V2[:3]), ('test', V2[3:6])):
        halves[half].save_to_disk(tmp_path/half)
        assert load_squad(tmp_path/half)==qs

WITHOUT = """
import json, sys
import switchable_llm.data.squad as squad
assert squad.load_squad('tiny', n=3) and squad.load_squad(sys.argv[1])
print([m for m in sys.modules if m=='datasets'])
sys.modules['datasets'] = None        # as if it were not installed
assert squad.load_squad('tiny', n=3) and squad.load_squad(sys.argv[1])
for source in ('rajpurkar/squad', sys.argv[2]):
    try: squad.load_squad(source)
    except ImportError as e: print(e)
"""

def test_datasets_is_imported_for_tables_only(tmp_path, child_env):
    file = write(tmp_path/'q.json', official(QUESTIONS[:3]))
    table(QUESTIONS[:3]).to_parquet(tmp_path/'q.parquet')
    args = [sys.executable, '-c', WITHOUT, str(file), str(tmp_path/'q.parquet')]
    out = subprocess.run(args, env=child_env, capture_output=True, text=True)
    assert out.returncode==0, out.stderr
    loaded,hub,parquet = out.stdout.splitlines()
    assert loaded=='[]'
    for line,source in ((hub, 'rajpurkar/squad'), (parquet, 'q.parquet')):
        assert f"{source}' needs the package datasets" in line and "pip install 'switchable-llm[study]'" in line

def test_tables_of_another_shape(tmp_path):
    def one_by_one(answers): return [dict(text=t, answer_start=s) for t,s in zip(*answers.values())]
    rows = [dict(q, answers=one_by_one(q['answers'])) for q in QUESTIONS[:4]]
    (tmp_path/'list.jsonl').write_text('\n'.join(map(json.dumps, rows)))            # the same
    assert load_squad(tmp_path/'list.jsonl')==QUESTIONS[:4]
    table([dict(text='a', label=0)]).to_parquet(tmp_path/'other.parquet')
    table([dict(QUESTIONS[0], answers='Rome')]).to_parquet(tmp_path/'text.parquet')
    hidden = QUESTIONS[0], QUESTIONS[1] | dict(answers=None)
    (tmp_path/'null.jsonl').write_text('\n'.join(map(json.dumps, hidden)))
    (tmp_path/'broken.parquet').write_bytes(b'PAR1'+bytes(40))
    (tmp_path/'some').mkdir(); table().to_parquet(tmp_path/'some/train.parquet')
    columns = 'id, context, question, answers'
    for name,split,why in (('other.parquet', 'train', f'no column {columns}; found text, label, needed {columns}'),
                           ('text.parquet', 'train', "its answers, 'Rome', are not texts"),
                           ('null.jsonl', 'train', f"question '{hidden[1]['id']}' has no answers"),
                           ('broken.parquet', 'train', 'split train: cannot be read'),
                           ('some', 'validation', 'split validation: cannot be read')):
        with pytest.raises(ValueError, match=why) as e: load_squad(tmp_path/name, split)
        assert str(tmp_path/name) in str(e.value)

# --- version 2's rules ----------------------------------------------------------------------------------------------

def words(s):
    bare = ''.join(c for c in s.lower() if c not in string.punctuation)
    return re.sub(r'\b(a|an|the)\b', ' ', bare).split()

def rules_v2(said, references):
    "Exact match and F1 of a question by SQuAD v2's rules, written out."
    p = words(said); known = [w for w in map(words, references) if w] or [[]]
    def f1(r):
        if not p or not r: return float(p==r)
        same = sum((Counter(p)&Counter(r)).values())
        return 2*same/(len(p)+len(r))
    return float(p in known), max(map(f1, known))

def test_rules_of_version_2():
    rng = random.Random(0)
    some = ['', '.', 'the', 'A', 'Rome', 'in Rome', 'the red house', 'red, red house', 'house', '1834', '  ',
            '"an"', 'Zoë']
    for _ in range(1500):
        said,references = rng.choice(some),rng.sample(some, rng.randint(0, 3))
        em,f1 = em_f1(said, references, 'squad_v2')
        assert (em, pytest.approx(f1, abs=1e-5))==rules_v2(said, references), (said, references)
        if references and all(map(words, [said, *references])): assert (em, f1)==em_f1(said, references)   # as ever

def gpt2(cls=GPT2LMHeadModel, std=.2):
    torch.manual_seed(0)
    shape = dict(vocab_size=len(TOK), n_positions=256, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    model = cls(GPT2Config(**shape, initializer_range=std)).eval()
    make_switchable_(model, ['bw8'], QuantConfig(act='per_token'))
    return model

def check_scores(scores, questions):
    for said,em,f1,q in zip(scores.prediction, scores.em, scores.f1, questions):
        assert (em, pytest.approx(f1, abs=1e-5))==rules_v2(said, q['answers']['text'])
    every = range(len(questions))
    none = [i for i in every if not questions[i]['answers']['text']]
    def mean(xs, at): return pytest.approx(sum(xs[i] for i in at)/len(at))
    assert scores.summary['f1'].value==mean(scores.f1, every)
    assert scores.summary['em_unanswerable'].value==mean(scores.em, none)
    assert scores.summary['f1_answerable'].value==mean(scores.f1, [i for i in every if i not in none])

def test_evaluation_of_version_2(tmp_path):
    "From the official file to scores, and to JSON and back; the answer's likelihood is of those that have one."
    model,questions = gpt2(),load_squad(write(tmp_path/'q.json', official(V2)))
    ev = evaluate(model, TOK, questions, n_resamples=50, max_new_tokens=4); s = ev['bw8']
    check_scores(s, questions)
    assert ev.settings['rules']=='squad_v2' and "SQuAD v2's rules" in ev.caption
    assert 'EM %, unanswerable' in ev.table()[0]
    assert [n==0 for n in s.n_answer]==[not q['answers']['text'] for q in questions]
    assert not any(x for x,n in zip(s.nll_answer, s.n_answer) if n==0)
    assert Evaluation.from_dict(json.loads(json.dumps(ev.to_dict(), allow_nan=False)))==ev
    known = [q for q in questions if q['answers']['text']]
    alone = evaluate(model, TOK, known, ['bw8'], n_resamples=50, max_new_tokens=4, rules='squad_v2')['bw8']
    assert alone.f1==tuple(f for f,n in zip(s.f1, s.n_answer) if n) and 'f1_answerable' not in alone.summary
    drawn = score_strategy(model, TOK, questions, strategy('fixed_bw8'), max_new_tokens=4)
    assert (drawn.em, drawn.f1, drawn.n_answer)==(s.em, s.f1, s.n_answer)

def test_who_says_nothing():
    "A model that always ends the line is right where there is no answer, and only there."
    model = gpt2()
    newline = TOK.convert_tokens_to_ids('\n')
    model.lm_head.register_forward_hook(lambda m, args, y: y.index_fill(-1, torch.tensor([newline]), 1e4))
    s = evaluate(model, TOK, V2, ['bw8'], n_resamples=50, max_new_tokens=4)['bw8']
    assert set(s.prediction)=={''} and s.em==tuple(float(not q['answers']['text']) for q in V2)==s.f1
    assert s.summary['em_unanswerable']==(1., 1., 1.) and s.summary['f1_answerable']==(0., 0., 0.)

def test_which_rules():
    model = gpt2(); kw = dict(n_resamples=50, max_new_tokens=4)
    assert evaluate(model, TOK, QUESTIONS[:3], ['bw8'], **kw).settings['rules']=='squad'
    none = [q | dict(answers=NONE) for q in QUESTIONS[:3]]
    assert 'ppl_answer' not in evaluate(model, TOK, none, ['bw8'], rules='squad_v2', **kw)['bw8'].summary
    hidden = [{k:v for k,v in q.items() if k!='answers'} for q in QUESTIONS]
    for qs,rules,why in ((none, None, 'no example has an answer'), (V2, 'v2', "rules='v2'"),
                         (hidden, None, 'has no reference answer'),
                         (V2, 'squad', "has no answer, which rules='squad' cannot score")):
        with pytest.raises(ValueError, match=why): evaluate(model, TOK, qs, rules=rules)
        with pytest.raises(ValueError, match=why): score_strategy(model, TOK, qs, strategy('fixed_bw8'), rules=rules)

def test_spans_learn_when_there_is_none():
    "A head that is taught that questions of one kind have no answer says so, of others it does not."
    model = gpt2(GPT2ForQuestionAnswering); add_adapters_(model, dropout=0.); train_head_(model)
    when = [q for q in tiny_squad(60, 'train') if q['question'].startswith(('When','Where'))]
    questions = [q | dict(answers=NONE) if q['question'].startswith('When') else q for q in when]
    windows = encode_windows(questions, TOK, 128, 8)
    assert not any(w.holds for w in windows if not questions[w.question]['answers']['text'])
    cfg = TrainConfig(steps=60, batch_size=8, accumulate=1, lr=1e-2, warmup=5)
    train(model, windows, fixed_profile('bw8'), cfg, TOK.pad_token_id, span_extraction, progress=False, cpu=True)
    s = evaluate_spans(model, TOK, questions, ['bw8'], 128, 8, n_resamples=50)['bw8']
    check_scores(s, questions)
    assert s.summary['em_unanswerable'].value>.9 and sum(not p for p in s.prediction)<len(s.prediction)
    assert all(x<float('inf') for x in s.nll_answer)
    forced = extract(model, TOK, questions, 128, 8)
    assert all(f.text for f in forced)              # by the rules of version 1 each question has an answer
