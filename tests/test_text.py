"Own text: read from everything people have, packed without loss, scored as WikiText is, larger than memory, by API and command."
import json, math, random
import pytest, torch
import datasets
import switchable_llm as sl
from switchable_llm.apps.cli import main
from switchable_llm.apps.front_door import training_data
from switchable_llm.data.embedded import tiny_tokenizer
from switchable_llm.data.text import text
from switchable_llm.joint_training import batch_rows
from switchable_llm.profiles_eval import perplexity

DOCUMENTS = list(dict.fromkeys(q['context'] for q in sl.squad('tiny', n=400)))

@pytest.fixture(scope='module')
def tok(): return tiny_tokenizer()

@pytest.fixture()
def model():
    torch.manual_seed(0)
    return sl.load('tiny')[0]

@pytest.fixture()
def corpus(tmp_path):
    (tmp_path/'corpus.txt').write_text('\n\n'.join(DOCUMENTS))
    return tmp_path/'corpus.txt'

def documents(tokens, tok): return tok.decode(tokens[:]).split('<eos>')[:-1]

# --- sources --------------------------------------------------------------------------------------------------------

def written(kind, folder):
    "The documents in a file, a folder or memory of this kind."
    rows,path = [dict(text=d, k=i) for i,d in enumerate(DOCUMENTS)],folder/f'corpus.{kind}'
    table = datasets.Dataset.from_list(rows)
    if kind=='txt': path.write_text('\n\n'.join(DOCUMENTS))
    if kind=='jsonl': path.write_text('\n'.join(map(json.dumps, rows)))
    if kind=='json': path.write_text(json.dumps(rows))
    if kind=='csv': table.to_csv(path)
    if kind=='parquet': table.to_parquet(path)
    if kind=='saved': table.save_to_disk(path)
    if kind=='Dataset': return table
    if kind=='stream': return table.to_iterable_dataset()
    if kind=='generator': return (r for r in rows)
    return DOCUMENTS if kind=='list' else path

KINDS = 'txt jsonl json csv parquet saved Dataset stream generator list'.split()

@pytest.mark.parametrize('kind', KINDS)
def test_every_source_has_the_same_documents(kind, tmp_path, tok):
    n = len(DOCUMENTS) if kind in ('stream','generator') else None
    where = written(kind, tmp_path)
    found = documents(text(where, 'all', n=n).training(tok, 64).tokens, tok)
    assert found==DOCUMENTS

@pytest.mark.parametrize('kind', ['txt', 'jsonl', 'list', 'saved'])
def test_what_is_held_out_does_not_depend_on_the_kind(kind, tmp_path, tok):
    where = written(kind, tmp_path)
    learnt,scored = (documents(d.tokens, tok) for d in (text(where).training(tok, 64), text(where).scoring(tok, 64)))
    assert scored==documents(text(DOCUMENTS).scoring(tok, 32).tokens, tok)
    assert not {*learnt} & {*scored} and sorted(learnt+scored)==sorted(DOCUMENTS)

def test_a_file_that_changes_is_read_again(corpus, tok):
    before = len(text(corpus, 'all').training(tok, 64).tokens)
    corpus.write_text(corpus.read_text()+'\n\nOne more.')
    assert len(text(corpus, 'all').training(tok, 64).tokens)>before

def test_lines_and_whole_files(tmp_path, tok):
    (tmp_path/'a.txt').write_text('One.\nTwo.\n\nThree.\n')
    def found(by): return documents(text(tmp_path/'a.txt', 'all', by=by).training(tok, 64).tokens, tok)
    assert found('line')==['One.', 'Two.', 'Three.'] and found('document')==['One.\nTwo.\n\nThree.\n']

def test_a_long_stream_takes_bounded_memory(tmp_path, tok):
    "Of a stream that has no end; what is trained on is mapped from disk."
    def endless():
        rng = random.Random(0)
        while True: yield dict(text=rng.choice(DOCUMENTS)*20)
    many = text(datasets.IterableDataset.from_generator(endless), n=3000).training(tok, 64)
    assert len(many)>5000 and all(p.base is not None for p in many.tokens.parts)
    assert many.tokens.table.cache_files and len(many[len(many)//2].ids)==64

# --- blocks and windows ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [2, 17, 64, 10**6])
def test_blocks_give_the_corpus_back(size, tok):
    blocks = text(DOCUMENTS, 'all').training(tok, size)
    expected = [i for d in DOCUMENTS for i in [*tok(d, add_special_tokens=False).input_ids, tok.eos_token_id]]
    assert [i for b in blocks for i in b.ids]==expected and [len(b.ids) for b in blocks]==list(blocks.lengths)

@pytest.mark.parametrize('size,stride', [(32, 1), (32, 16), (32, 31), (48, 13)])
def test_windows_score_as_a_loop_over_tokens(size, stride, tok, model):
    windows = text(DOCUMENTS[:6], 'all', stride=stride).scoring(tok, size)
    tokens,nats = windows.tokens[:],{}
    for begin in range(0, len(tokens), stride):         # transformers' page on perplexity, a token at a time
        for at in range(begin+1, min(begin+size, len(tokens))):
            if at in nats: continue
            with torch.no_grad(): logits = model(torch.tensor([tokens[begin:at]])).logits[0, -1]
            nats[at] = -logits.log_softmax(-1)[tokens[at]].item()
    assert sorted(nats)==list(range(1, len(tokens)))
    scored = perplexity(model, tok, windows)
    assert sum(scored.n_answer)==len(nats)
    assert scored.answer==pytest.approx(math.exp(sum(nats.values())/len(nats)), rel=1e-4)

def test_the_loss_of_the_loop_is_that_of_transformers(tok, model):
    corpus = text(DOCUMENTS, 'all')
    sl.make_switchable(model, ['bw8'])
    data,_ = training_data(model, tok, corpus, 64)
    first, = batch_rows(data.lengths, 1, 0, seed=0)
    block = torch.tensor([data[first].ids])
    with torch.no_grad(), sl.use_profile(model, 'bw8'): theirs = model(input_ids=block, labels=block).loss.item()
    run = sl.train(model, tok, corpus, steps=1, batch_size=1, max_length=64, progress=False)
    assert run['curve'][0][1:]==[pytest.approx(theirs, rel=1e-4), 'bw8', data.lengths[first]]

# --- train, evaluate ------------------------------------------------------------------------------------------------

def test_training_lowers_the_perplexity_of_what_is_held_out(tok, model):
    corpus = sl.text(DOCUMENTS)
    sl.make_switchable(model, ['bw8'])
    before = sl.evaluate(model, tok, corpus, 'bw8', max_length=64)
    sl.train(model, tok, corpus, steps=20, max_length=64, progress=False)
    after = sl.evaluate(model, tok, corpus, 'bw8', max_length=64)
    assert sl.compare(after['bw8'], before['bw8'])['log_ppl_text'].high<0
    assert 'split validation' in after.caption and 'windows of 64, 32 apart' in after.caption

def test_a_plain_model_is_scored_and_stays_as_it_was(tok, model):
    names,modules = dict(model.named_parameters()),[type(m) for m in model.modules()]
    quick = sl.evaluate(model, tok, sl.text(DOCUMENTS, n=10))
    assert [s.profile.name for s in quick]==['float', 'bw8', 'bw6', 'w4a8'] and 'Not trained' in quick.caption
    assert [type(m) for m in model.modules()]==modules and not hasattr(model, 'switch')
    assert all(p is names[n] and p.requires_grad for n,p in model.named_parameters())
    sl.make_switchable(model, ['bw8', 'bw6', 'w4a8'])
    adapted = sl.evaluate(model, tok, sl.text(DOCUMENTS, n=10))     # fresh adapters change nothing
    assert [s.nll_text for s in adapted]==[s.nll_text for s in quick] and 'Not trained' not in adapted.caption

def test_questions_too_are_scored_on_a_plain_model(tok, model):
    assert sl.evaluate(model, tok, sl.squad('tiny', 'validation', 4), 'bw4')['bw4'].f1

def test_another_text_is_not_compared(tok, model):
    a,b = (sl.evaluate(model, tok, sl.text(d, 'all'), 'float')['float'] for d in (DOCUMENTS[:3], DOCUMENTS[3:6]))
    with pytest.raises(ValueError, match='different questions'): sl.compare(a, b)

def test_a_run_on_text_goes_on_where_it_was_stopped(tok, model, tmp_path):
    class Stop(Exception): pass
    def run(steps, folder, m):
        torch.manual_seed(0); sl.make_switchable(m, ['bw8', 'w4a8'])
        return sl.train(m, tok, sl.text(DOCUMENTS), steps=steps, max_length=32, checkpoint=folder, progress=False)
    whole = run(10, tmp_path/'whole', model)
    again = sl.load('tiny')[0]
    run(10, tmp_path/'whole', again)          # finished already: brought to the same weights
    ours,theirs = (dict(m.named_parameters()) for m in (model, again))
    assert all(torch.equal(ours[n], theirs[n]) for n in ours) and len(whole['curve'])==10

@pytest.mark.parametrize('bad,says', [
    (dict(source='corpos.txt'), 'no such file'), (dict(source=DOCUMENTS, n=0), 'n=0'), (dict(source=DOCUMENTS, by='word'), "by='word'"),
    (dict(source=DOCUMENTS, held_out=1.), 'held_out=1.0')])
def test_a_source_that_cannot_be_is_told_at_once(bad, says):
    with pytest.raises(ValueError, match=says): sl.text(**bad)

def test_a_stride_that_would_lose_tokens(tok, model):
    with pytest.raises(ValueError, match='stride=512: needs 1 to 255'): sl.evaluate(model, tok, sl.text(DOCUMENTS, stride=512))

# --- the command ----------------------------------------------------------------------------------------------------

@pytest.fixture()
def cli(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def run(*argv):
        status = main([str(a) for a in argv]); out = capsys.readouterr()
        return status, out.out, out.err
    return run

def test_the_command_trains_and_scores_text(cli, corpus):
    own = '--data','corpus.txt','--task','text'
    status,out,err = cli('train', *own, '--profiles', 'bw8', 'w4a8', '--steps', 2, '--batch-size', 4, '--max-length', 64,
                         '--act', 'per_token', '--out', 'my-model')
    assert status==0 and 'blocks of 64 tokens' in err and 'split train; 10 % of the rows held out' in err, err
    status,out,err = cli('evaluate', 'my-model', *own, '--max-length', 64, '--stride', 48, '--n', 5, '--quiet')
    assert status==0 and 'PPL text' in out and '5 documents of corpus.txt, split validation' in out and 'EM' not in out, err
    status,out,err = cli('evaluate', 'tiny', *own, '--n', 5, '--profiles', 'bw4', '--quiet')
    assert status==0 and 'Not trained' in out and out.splitlines()[1].startswith('bw4'), err

@pytest.mark.parametrize('argv,says', [
    (['train', '--data', 'corpus.txt', '--out', 'x'], '--task text'),
    (['train', '--data', 'corpos.txt', '--task', 'text', '--out', 'x'], 'corpos.txt: no such file'),
    (['train', '--data', 'corpos.txt', '--out', 'x'], 'no such file'),
    (['train', '--task', 'text', '--out', 'x'], 'needs --data'),
    (['train', '--by', 'line', '--out', 'x'], '--by: is for --task text'),
    (['evaluate', 'tiny', '--data', 'corpus.txt', '--task', 'chat', '--chat-template', 'chatml'], '--task text'),
    (['evaluate', 'tiny', '--data', 'corpus.txt', '--task', 'text', '--seed', '1'], '--seed'),
    (['evaluate', 'tiny', '--data', 'corpus.txt', '--task', 'text', '--column', 'body'], "no column 'body'; its columns are text"),
    (['evaluate', 'tiny', '--data', 'corpus.txt', '--task', 'text', '--split', 'test'], 'there are train, validation, all')])
def test_mistakes_of_the_command(argv, says, cli, corpus):
    status,out,err = cli(*argv, '--quiet')
    assert status==1 and says in err and err.startswith('error: ') and len(err.splitlines())==1, err

def test_a_stream_is_read_once_for_both(tok):
    "Training and scoring take the two parts of the same rows, whether or not the stream had more."
    want = text(DOCUMENTS[:60])
    for more,n in ((60, 1000), (len(DOCUMENTS), 60)):
        stream = text((d for d in DOCUMENTS[:more]), n=n)
        a,b = stream.training(tok, 64),stream.scoring(tok, 64)
        assert [e.ids for e in a]==[e.ids for e in want.training(tok, 64)]
        assert [e.ids for e in b]==[e.ids for e in want.scoring(tok, 64)]
