"The report's sentences, tables and figures follow the records: copies of the real ones, changed, taken away, and cut off."
import copy, json, shutil
import numpy as np, pytest
from conftest import ROOT
from switchable_llm.earlier import plot_earlier_accuracy, plot_earlier_cpt, plot_earlier_typos, statements_table
from switchable_llm.reasons import cpt_parts, robustness_parts, transfer_share
from switchable_llm.report import QUESTIONS, abstract, answers, load_benchmarks, missing_records, open_questions, open_table, records_table, speed_table
from switchable_llm.verdicts import PRESET_NAMES, Study, load_study, result_table

RESULTS = ROOT/'results'
KEEP = ('joint','allocation','objectives','cpt','robustness','range_test','calibration','spans')

@pytest.fixture(scope='module')
def real():
    study = load_study(RESULTS)
    if not all(study.joint(p) for p in PRESET_NAMES): pytest.skip('the records of the study are not here')
    return study

@pytest.fixture
def folder(tmp_path):
    "A copy of the records that may be changed."
    for p in PRESET_NAMES:
        for e in KEEP:
            if (RESULTS/p/e).exists(): shutil.copytree(RESULTS/p/e, tmp_path/p/e)
    if not any(tmp_path.iterdir()): pytest.skip('the records of the study are not here')
    return tmp_path

def change(folder, preset, experiment, edit, name='*'):
    "Edit records in place; how many."
    files = sorted((folder/preset/experiment).glob(f'{name}.json'))
    for f in files:
        r = json.loads(f.read_text()); edit(r); f.write_text(json.dumps(r))
    return len(files)

def line(text, preset):   # of one preset, with its sub-items
    title = PRESET_NAMES[preset][0].upper()+PRESET_NAMES[preset][1:]
    return text.split(f'- **{title}.**', 1)[1].split('\n- **', 1)[0]

QS = list(QUESTIONS)
ACCURACY,BITS,OBJECTIVES,CPT,ATTACKS,DIRECTIONS = QS

# --- changed records ------------------------------------------------------------------------------------------------

def test_a_better_profile_changes_sentence_table_abstract_and_figure(real, folder):
    def perfect(r):
        for s in r['after']['scores']:
            if s['profile']['name']=='bw4': s['f1'] = [1.]*len(s['f1'])
    assert change(folder, 'smollm2', 'joint', perfect)
    new = load_study(folder)
    before,after = (line(answers(s)[ACCURACY], 'smollm2') for s in (real, new))
    assert '**refuted** for `bw4`' in before and '`bw4` 100.0 [100.0, 100.0]' in after and '**refuted** for `bw4`' not in after
    topic = 'One checkpoint, many precisions'
    assert 'worse: `bw4`' in abstract(real)[topic] and 'worse: `bw4`' not in abstract(new)[topic]
    row = lambda s: next(l for l in result_table(s.joint('smollm2')).splitlines() if l.startswith('| bw4 |')).replace('\xa0', ' ')
    assert '| 100 [100, 100] |' in row(new) and row(new).endswith('| confirmed | confirmed |') and row(real).endswith('| refuted |')
    at_four = lambda s: next(l for l in plot_earlier_accuracy(s).axes[0].lines if len(l.get_xdata()) and 'SmolLM2' in str(l.get_gid() or l.get_label())).get_ydata()[0]
    assert at_four(new)==100 and at_four(real)<50
    assert line(answers(new)[BITS], 'smollm2')==line(answers(real)[BITS], 'smollm2')   # nothing else moves

def test_cheaper_bits_that_win_are_said_to_win(real, folder):
    def win(r):
        for p in r['front']['points']:
            if p['kind']=='searched': p['nll'] = [x*.5 for x in p['nll']]
    assert change(folder, 'smollm2', 'allocation', win)
    topic,new = 'Bits chosen per layer',load_study(folder)
    n = len([k for k in real.of('smollm2', 'allocation')[0]['config']['budgets'].values() for _ in k])
    assert f'at {n} of {n} budgets' in abstract(new)[topic] and f'at {n} of {n} budgets' not in abstract(real)[topic].split(';')[0]
    assert '**refuted**' not in line(answers(new)[BITS], 'smollm2').split('\n')[1]

def test_a_worse_default_objective_is_no_longer_recommended(real, folder):
    if not real.of('tiny', 'objectives'): pytest.skip('no record of objectives')
    def worse(r):
        if r['config']['arm']['name']!='random_profile':
            for s in r['scores'].values(): s['nll_answer'] = [x+9 for x in s['nll_answer']]
    change(folder, 'tiny', 'objectives', worse)
    said = line(answers(load_study(folder))[OBJECTIVES], 'tiny')
    assert '**`random_profile`** stays' in said and said!=line(answers(real)[OBJECTIVES], 'tiny')

def test_cyclic_precision_that_helps_is_said_to_help(real, folder):
    runs = {r['config']['arm']['name'] for r in real.of('tiny', 'cpt')}
    if not {'cyclic','static_low','random'}<=runs: pytest.skip('no record of cyclic precision')
    def low(r):   # the static arm at four bits, and random precision, lose ground
        if r['config']['arm']['schedule'] in ('static_low','random'):
            for s in r['scores'].values(): s['nll_answer'] = [x+5 for x in s['nll_answer']]
    change(folder, 'tiny', 'cpt', low)
    new = load_study(folder)
    assert 'It helps here' in line(answers(new)[CPT], 'tiny') and line(answers(new)[CPT], 'tiny')!=line(answers(real)[CPT], 'tiny')
    assert cpt_parts(new.of('tiny', 'cpt'))['bw4']['both'].value<cpt_parts(real.of('tiny', 'cpt'))['bw4']['both'].value-1
    assert 'it helps here' in abstract(new)['Cyclic precision']

# --- robustness: planted, so that what it should say is known ----------------------------------------------------------

def attacked(seed, own=.6, foreign=.2, guess=.3, n=50):
    "A record of two profiles: harm of the own attack, of one from the other precision, and of one that has to guess."
    rng = np.random.default_rng(seed); base,ps = 2+rng.normal(size=n),['bw4','bw8']
    def scores(harm): return {s:dict(nll=list(base+2*harm(s)+.02*rng.normal(size=n)), right=[0.]*n) for s in (*(f'fixed_{p}' for p in ps), 'random_profile')}
    white = lambda p: lambda s: own if s==f'fixed_{p}' else guess if s=='random_profile' else foreign
    made = [(f'white_{p}', white(p)) for p in ps]+[('adaptive_random_profile', lambda s: guess)]
    typos = [dict(rate=r, distortion=r, scores={s:dict(nll_answer=v['nll'], f1=[.5]*n) for s,v in scores(lambda s: 3*r).items()}) for r in (0., .1)]
    return dict(preset='tiny', experiment='robustness', name='joint', seed=seed, config=dict(plan=dict(questions=n, profiles=ps, strategies=['random_profile'], attacks=['pgd'], radii=[.1], unbounded=None)), highest='bw8',
                ids=list(range(n)), n_answer=[2]*n, clean=scores(lambda s: 0), typos=typos, attacks=[dict(attack='pgd', radius=.1, attacker=a, scores=scores(h)) for a,h in made], flips=[])

def attacks(**kw): return Study(dict(tiny=dict(robustness=[attacked(s, **kw) for s in range(4)])))

@pytest.mark.parametrize('kw,says', [(dict(), 'It helps here as Double-Win Quant says'), (dict(guess=.9), 'It does not help here')])
def test_a_defence_is_judged_by_who_knows_it(kw, says):
    study = attacks(**kw)
    assert says in line(answers(study)[ATTACKS], 'tiny') and says[0].lower()+says[1:] in abstract(study)['Random precision at inference']

def test_transfer_and_parts_are_those_that_were_planted():
    joint = attacks().of('tiny', 'robustness')
    assert transfer_share(joint)==pytest.approx(1/3, abs=.03)
    assert [robustness_parts(joint)[k].value for k in ('the mix of profiles','not knowing which','both')]==pytest.approx([0, -.3, -.3], abs=.02)
    assert 'does 33 % of the harm' in line(answers(attacks())[ATTACKS], 'tiny') and 'does 100 % of the harm' in line(answers(attacks(foreign=.6))[ATTACKS], 'tiny')

def test_typos_are_drawn_beside_the_earlier_ones():
    rows = lambda study: [t.get_text() for t in plot_earlier_typos(study).axes[0].get_yticklabels()]
    assert set(rows(attacks()))-set(rows(Study({})))=={f'Embedded model, {s}' for s in ('bw4','bw8','random profile')}

# --- missing, mixed up and damaged records -----------------------------------------------------------------------------

@pytest.mark.parametrize('experiment,question', [('joint',ACCURACY), ('allocation',BITS), ('objectives',OBJECTIVES), ('cpt',CPT), ('robustness',ATTACKS)])
def test_a_missing_record_is_missed_where_it_is_needed(folder, experiment, question):
    for p in PRESET_NAMES: shutil.rmtree(folder/p/experiment, ignore_errors=True)
    study = load_study(folder); said = answers(study)
    for p in PRESET_NAMES: assert 'Not decided: there is no record; `switchable-llm' in line(said[question], p).split('\n')[0]
    assert len([c for c in missing_records(study) if c.split(' --preset')[0].endswith(dict(joint='run').get(experiment, experiment))])==len(PRESET_NAMES)
    abstract(study); open_table(study); statements_table(study)

def test_an_empty_folder_says_so_everywhere(tmp_path):
    study = load_study(tmp_path)
    for text in answers(study).values(): assert text.count('there is no record')==len(PRESET_NAMES)
    said = abstract(study)
    assert said['What it rests on']=='There is no record yet.' and all(v.count('no record yet')==len(PRESET_NAMES) for k,v in said.items() if k not in ('What it rests on','Open'))
    assert open_questions(study)==[] and records_table(study)==speed_table(load_benchmarks(tmp_path))==open_table(study)==result_table([])=='*No record yet.*'
    for draw in (plot_earlier_accuracy, plot_earlier_cpt, plot_earlier_typos): assert not any('Embedded' in t.get_text() for t in draw(study).axes[0].get_yticklabels())

def test_a_cut_file_is_named(folder):
    f = next((folder/'tiny').glob('*/*.json'))
    f.write_text(f.read_text()[:99])
    with pytest.raises(ValueError, match=f.name.replace('.', r'\.')): load_study(folder)
    (folder/'benchmarks').mkdir(); (folder/'benchmarks'/'store.json').write_text('{')
    with pytest.raises(ValueError, match=r'store\.json'): load_benchmarks(folder)

def test_seeds_on_other_questions_are_not_averaged(folder):
    def other(r): r['after']['ids'] = ['x'+i for i in r['after']['ids']]
    assert change(folder, 'tiny', 'joint', other, '*-s0')
    study = load_study(folder)
    assert 'scored on other examples' in line(answers(study)[ACCURACY], 'tiny') and 'F1 after joint training' in line(answers(study)[ACCURACY], 'smollm2')
    assert 'scored on other examples' in abstract(study)['One checkpoint, many precisions']
    assert not [q for q in open_questions(study) if (q.preset, q.topic)==('tiny','accuracy')]

def test_a_record_without_its_scores_is_told_from_a_missing_one(folder):
    change(folder, 'smollm2', 'joint', lambda r: r.pop('after'))
    assert "a record lacks 'after'" in line(answers(load_study(folder))[ACCURACY], 'smollm2')

# --- undecided claims ---------------------------------------------------------------------------------------------------

def test_more_of_the_same_questions_decides_what_was_undecided(real):
    "What the report promises: so many times as many seeds and questions, and the nearest undecided claim is decided."
    qs = [q for q in open_questions(real) if q.topic=='accuracy' and q.finding.seeds==1 and q.times<20]
    if not qs: pytest.skip('nothing of this kind is undecided')
    q = qs[0]; k = int(np.ceil(q.times))+1
    r = copy.deepcopy(real.joint(q.preset)[0])
    for when in ('before','after'):
        r[when]['ids'] = [f'{i}-{j}' for j in range(k) for i in r[when]['ids']]
        for s in r[when]['scores']:
            for key in ('em','f1','nll_answer','n_answer'): s[key] = s[key]*k
    assert q.finding.claim not in [o.finding.claim for o in open_questions(Study({q.preset:dict(joint=[r])}))]
