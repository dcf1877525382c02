"The report's sentences, tables and figures follow the records: copies of the real ones, changed, taken away, and cut off."
import inspect, json, re, shutil
from pathlib import Path
import numpy as np, pytest
from conftest import ROOT
import switchable_llm as sl
from switchable_llm.apps.cli import make_parser
from switchable_llm.study.statistics import read
from switchable_llm.findings.arms import DEFAULT, OUTCOMES, arm_answer, arm_findings, arm_table, outcome, plot_claims, plot_routes
from switchable_llm.findings.earlier import (
    plot_earlier_accuracy, plot_earlier_cpt, plot_earlier_typos, statements_table)
from switchable_llm.findings.answers import (
    ONE_MINUTE, QUESTIONS, answers, as_list, leads, methods, minute, missing_records, open_questions, open_table, records_table,
    study_findings)
from switchable_llm.report import load_benchmarks, speed_table
from switchable_llm.findings.verdicts import PRESET_NAMES, Study, load_study

RESULTS = ROOT/'results'
KEEP = ('joint','arms','allocation','robustness','range_test','calibration','spans')

@pytest.fixture(scope='module')
def real():
    study = load_study(RESULTS)
    if not study.of('tiny', 'arms'): pytest.skip('the records of the study are not here')
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

def part(text, preset):   # of one preset
    titles = {p:f'*{name[0].upper()}{name[1:]}.* ' for p,name in PRESET_NAMES.items()}
    own = text.split(titles[preset], 1)[1]
    return re.split('|'.join(map(re.escape, titles.values())), own)[0]

QS = list(QUESTIONS)
ACCURACY,BITS,OBJECTIVES,CPT,ATTACKS,DIRECTIONS = QS
COST,ROUTES,LAYERS,TEACHERS,CYCLES,CHANCE = ONE_MINUTE

def asked(study, question, preset):   # the answer to one question for one model
    return part(answers(study)[question], preset)

# --- what the records cannot carry ------------------------------------------------------------------------------------

def test_no_verdict_of_the_study_disagrees_with_its_interval(real):
    for p in PRESET_NAMES:
        for topic,fs in study_findings(real, p).items():
            for f in fs:
                told = read(f.effect, f.above, f.below)
                if f.verdict not in ('confirmed','refuted','too close to call') or f.verdict==told: continue
                full = read(f.effect, f.above, f.below, room=False)
                assert f.verdict==full=='refuted', (p, topic, f)

def test_nothing_is_said_twice_and_nothing_undecided_is_called_decided(real):
    text = as_list(minute(real))+''.join(answers(real).values())
    for twice in ('**Too close to call.** Too close to call', 'Not run yet. Not run yet', 'No verdict. No verdict', '..', '.**.', '::'):
        assert twice not in text, twice
    assert 'not decided' not in text.lower()

# --- how it was measured, and what is open --------------------------------------------------------------------------

def shown_in_report(heading):
    "What the report's cells below a heading, or with a mark in their source, have saved: one text."
    cells = json.loads((ROOT/'nbs/06_report.ipynb').read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells]
    at = next(i for i,s in enumerate(sources) if heading in s)
    outputs = (o for c in cells[at:at+2] for o in c.get('outputs', []))
    return ''.join(''.join(o['data'].get('text/markdown', '')) for o in outputs if 'data' in o)

def test_the_box_of_methods_names_each_model_its_seeds_and_its_questions(real):
    box = methods(real)
    for p in ('smollm2','tiny'):
        rs = real.of(p, 'arms')
        seeds,answered = len({r['seed'] for r in rs}),len(next(iter(rs[0]['scores'].values()))['f1'])
        cfg,title = rs[0]['config']['preset'],PRESET_NAMES[p][0].upper()+PRESET_NAMES[p][1:]
        said = box.split(f'{title}: ', 1)[1].split(' for F1.')[0]+' for F1'
        assert (f"read from `{Path(cfg['model']).name}`" in said)==('.' in cfg['model']) and ('rotated' in said)==cfg['rotate']
        assert ('four bits already' in said)==('Q4_' in cfg['model']) and ('nearest codes' in said)==(not cfg['chosen'])
        assert f'{seeds} seed' in said and f"{len(rs[0]['ids']):,} questions for the loss" in said and f'{answered:,} for F1' in said
    assert 'question by question' in box and '**too close to call**' in box
    assert box in shown_in_report('How it was measured')

def test_what_would_change_our_mind_lists_what_the_records_leave_open(real):
    qs,n = open_questions(real),6
    rows = [[c.strip() for c in l.strip('|').split('|')] for l in open_table(real, n).splitlines() if l.startswith('|')][2:]
    assert len(qs)>=len(rows)==n and [q.times for q in qs]==sorted(q.times for q in qs) and qs[0].times>1
    for q,(claim,model,effect,seen,counted,_) in zip(qs, rows):
        f = q.finding
        assert claim==f'{f.claim} ({q.topic})' and model==PRESET_NAMES[q.preset] and f.unit in effect and float(seen)>0
        assert counted==f'{f.seeds} × {f.examples}' and f.seeds>0 and f.examples>0
    assert open_table(real, n) in shown_in_report('## What would change our mind')

# --- changed records ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('factor,says', [(.5, 'helps in all'), (1, None), (2, 'hurts in all')])
def test_chosen_bits_are_praised_only_where_they_won(factor, says, real, folder):
    def scale(r):
        simple = [p['nll'] for p in r['front']['points'] if p['kind'] in ('uniform','built-in')]
        for p in r['front']['points']:
            if p['kind']=='searched' and says: p['nll'] = [1+factor*x for x in simple[0]] if factor>1 else [0*x for x in simple[0]]
            elif says: p['nll'] = [1+x for x in p['nll']]
    assert change(folder, 'tiny', 'allocation', scale)
    study = load_study(folder)
    said,longer = minute(study)[LAYERS],asked(study, BITS, 'tiny')
    if says: assert says in said.split('**')[1] and ('higher mean loss' in longer)==(factor>1)
    else: assert ' in all' not in said.split('**')[1]

# --- arms: planted, so that what they should say is known ---------------------------------------------------------------

PROFILES = 'bw8','bw6','bw4'

def arm(name, seed, loss=0., f1=.6, n=120, articles=10, noise=.02, profiles=PROFILES):
    """A record of an arm whose answers cost `loss` nats per token more than those of another with the same seed; `loss` may
    say it for each profile."""
    rng,own = np.random.default_rng(seed),np.random.default_rng([seed, *name.encode()])
    base = 2+rng.gamma(2., 1., n)
    def scores(p):
        more = loss.get(p, 0.) if isinstance(loss, dict) else loss
        return dict(cost=dict(bops=int(p[2:]) if p!='float' else 16), n_answer=[2]*n, n_text=[20]*n, em=[0]*60,
                    nll_answer=list(base+2*more+noise*own.normal(size=n)),
                    nll_text=list(10*base+20*more+noise*own.normal(size=n)),
                    f1=list(np.clip(f1-more+noise*own.normal(size=60), 0, 1)))
    return dict(preset='tiny', experiment='arms', name=name, seed=seed, ids=[str(i) for i in range(n)], steps=100,
                articles=[f'article {i%articles}' for i in range(n)], exposure=dict(shared=100), parameters=9,
                config=dict(preset=dict(profiles=list(PROFILES))), scores={p:scores(p) for p in profiles})

def arms(seeds=3, **losses):
    made = [arm(n, s, x, profiles=('float',) if n=='float' else PROFILES) for n,x in losses.items() for s in range(seeds)]
    return Study(dict(tiny=dict(arms=made)))

@pytest.mark.parametrize('loss,says', [(-.1, 'helps'), (0., 'no'), (.1, 'hurts'), (-.02, 'open')])
def test_each_of_the_four_outcomes_is_said_in_its_own_words(loss, says):
    study = arms(static_high=0., cyclic=loss)
    f, = arm_findings(study.of('tiny', 'arms'), 'cycles')
    assert outcome(f)==says and f.examples==10
    for said in (asked(study, CPT, 'tiny'), minute(study)[CYCLES]):
        lead = said.split('**')[1]
        assert OUTCOMES[says] in lead
        assert not any(w in lead for k,w in OUTCOMES.items() if k!=says and w not in OUTCOMES[says]), lead

def test_what_precision_costs_is_read_against_float_trained_alike():
    study = arms(shared=dict(bw8=.0, bw6=.1, bw4=.02), float=0.)
    lead = asked(study, ACCURACY, 'tiny').split('**')[1]
    assert lead==('Against the float model trained alike: stays within the margin at `bw8`, '
                    'loses more than the margin at `bw6` and is too close to call at `bw4`.')
    assert [f.verdict for f in arm_findings(study.of('tiny', 'arms'), 'price')]==['confirmed','refuted','too close to call']
    assert 'price' in study_findings(study, 'tiny') and [q.finding.claim for q in open_questions(study)]==['`bw4`']

def test_what_training_gave_is_read_against_the_same_profile_untrained():
    told = asked(arms(shared=dict(bw8=.1, bw6=0., bw4=0.), untrained=dict(bw8=0., bw6=0., bw4=1.)), ACCURACY, 'tiny')
    assert 'Training, against the same profile untrained: helps in 1, does not help by more than the margin in 1, hurts in 1 of 3' in told
    assert '| against untrained | answer, nats per token |' in told

def test_a_route_that_serves_better_is_said_to_help():
    study = arms(5, shared=0., bits=dict(bw8=.1, bw6=0., bw4=-.1))
    told = asked(study, ACCURACY, 'tiny')
    assert 'helps in 1, does not help by more than the margin in 1, hurts in 1 of 3 comparisons' in told
    rows = {r.split(' | ')[0]: r for r in told.splitlines() if r.startswith('| `bits`')}
    assert re.match(r'\| `bits` at `bw4` \| -0\.\d+ \[-0\.\d+, -0\.\d+\] \| helps \| ', rows['| `bits` at `bw4`'])
    assert re.match(r'\| `bits` at `bw8` \| 0\.\d+ \[0\.\d+, 0\.\d+\] \| hurts \| -\d.* \| hurts \|', rows['| `bits` at `bw8`'])
    assert len(rows)==3 and '*5 seeds, 10 articles.*' in told

def test_the_default_route_follows_the_answer(real):
    found = arm_findings(real.of('smollm2', 'arms'), 'routes')
    assert found and not any(outcome(f)=='helps' for f in found)
    assert inspect.signature(sl.make_switchable).parameters['route'].default==DEFAULT
    assert make_parser().parse_args(['train', '--out', 'x']).route==DEFAULT

def test_one_seed_is_called_one_seed_and_few_articles_are_no_sample():
    assert 'one seed' in asked(arms(1, static_high=0., cyclic=.1), CPT, 'tiny').lower()
    rs = [arm(n, 0, x, articles=3) for n,x in (('static_high', 0.), ('cyclic', .1))]
    assert arm_findings(rs, 'cycles')[0].examples==120

def test_arms_of_other_settings_are_not_compared():
    study = arms(shared=0., float=0.)
    for r in study.records['tiny']['arms']: r['config'] = dict(preset=r['config']['preset'] | dict(steps=6 if r['name']=='float' else 30))
    assert "'shared' and 'float' were run with steps=30 and 6" in asked(study, ACCURACY, 'tiny')

def test_random_precision_is_asked_beside_the_cyclic_one():
    study = arms(static_high=0., cyclic=0., random=-.1, static_low=.5)
    found = arm_findings(study.of('tiny', 'arms'), 'cycles')
    assert [f.claim for f in found]==['`cyclic` against `static_high`','`cyclic` against `random`']
    assert 'Random precision in training, against a static one: helps.' in asked(study, CPT, 'tiny')

def test_arms_on_other_questions_are_not_paired():
    study = arms(shared=0., float=0.)
    for r in study.records['tiny']['arms']:
        if r['name']=='float': r['ids'] = ['x'+i for i in r['ids']]
    assert 'scored on other examples' in asked(study, ACCURACY, 'tiny')
    assert 'scored on other examples' in minute(study)[COST]

def test_table_and_picture_hold_what_was_scored():
    study = arms(shared=0., bits=.1, float=0., untrained=1.)
    rs = study.of('tiny', 'arms')
    rows = [l.split('|')[1:3] for l in arm_table(rs).splitlines() if l.startswith('| `')]
    assert sorted(a.strip()+p.strip() for a,p in rows)==sorted(
        f'`{a}``{p}`' for a in ('shared','bits','float','untrained') for p in (('float',) if a=='float' else PROFILES))
    drawn = {l.get_gid() for ax in plot_routes(rs).axes for l in ax.lines}
    assert {'f1-shared-bw8','answer-bits-bw4','f1-float','answer-untrained-bw6'}<=drawn
    assert arm_answer(Study({}), 'tiny', 'cycles').startswith('Not run yet: ')

def test_panels_share_an_axis_unless_one_would_vanish():
    def effects(loss): return arm_findings(arms(5, shared=0., bits=loss).of('tiny', 'arms'), 'routes')
    for far,shared in ((.15, True), (1., False)):
        a,b = (ax.get_xlim() for ax in plot_claims(dict(near=effects(.1), far=effects(far))).axes)
        assert (a==b)==shared

def test_one_minute_is_six_sentences_with_a_number_each_of_the_real_model_where_it_has_records(real):
    said = minute(real)
    assert len(said)==6
    for topic,text in said.items():
        assert text.startswith('**') and text.count('**')==2 and len(re.findall(r'\[[-\d., ]+\]', text))==1, text
        assert len(text.split())<=45 and text.count(' comparisons')<=1, text
    assert said[COST].endswith('(SmolLM2-135M).') if real.of('smollm2', 'arms') else said[COST].endswith('(embedded model).')

def test_the_number_of_the_minute_is_that_of_the_best_or_the_worst_comparison():
    said = minute(arms(5, shared=dict(bw8=.0, bw6=.1, bw4=.02), float=0., bits=dict(bw8=.2, bw6=.1, bw4=-.2)))
    costs = 'stays within the margin at `bw8`, loses more than the margin at `bw6` and is too close to call at `bw4`**: at worst +0.1'
    assert costs in said[COST]
    assert re.search(r'helps in 1 of 3 comparisons, and hurts in 1\*\*: at best -0\..* \(`bits` at `bw4`\)', said[ROUTES])
    assert said[CHANCE]==said[CYCLES]=='No record yet.'

def test_the_minute_says_where_it_looks_best_and_how_often_it_hurts():
    said = minute(arms(5, shared=0., bits=dict(bw8=.1, bw6=0., bw4=.1)))[ROUTES]
    assert 'hurts in 2 of 3 comparisons and does not help by more than the margin in 1**: at best ' in said
    assert '(`bits` at `bw6`)' in said

@pytest.mark.parametrize('losses,says', [
    (dict(bw8=-.03, bw6=-.002, bw4=0.), 'helps in 1 of 3 comparisons**: at best -0.03'),
    (dict(bw8=.1, bw6=.11, bw4=.12), 'hurts in all 3 comparisons**: at best +0.1')])
def test_the_number_of_the_minute_is_of_its_verdict(losses, says): assert says in minute(arms(5, shared=0., bits=losses))[ROUTES]

def test_an_unclear_comparison_that_looks_better_is_not_the_number_of_one_that_helps():
    study = arms(5, shared=0., bits=dict(bw8=-.05, bw6=0., bw4=0.))
    rng = np.random.default_rng(1)
    for r in study.of('tiny', 'arms'):   # bw6 looks better than bw8, and is noise
        if r['name']=='bits': r['scores']['bw6']['nll_answer'] = list(np.array(r['scores']['bw6']['nll_answer'])-.4+4*rng.normal())
    found = {f.claim:outcome(f) for f in arm_findings(study.of('tiny', 'arms'), 'routes')}
    assert found=={'`bits` at `bw8`':'helps', '`bits` at `bw6`':'open', '`bits` at `bw4`':'no'}
    assert re.search(r'helps in 1 of 3 comparisons\*\*: at best -0\.05.*`bw8`', minute(study)[ROUTES])

def test_the_margin_is_named_wherever_the_leads_speak_of_it():
    study = arms(5, shared=dict(bw8=.0, bw6=.1, bw4=.1), float=0.)
    told = leads(Study(dict(smollm2=study.records['tiny'])))
    assert 'stays within 0.02 nats at `bw8` and loses more than 0.02 nats at `bw6` and `bw4`' in told

# --- missing, mixed up and damaged records -----------------------------------------------------------------------------

@pytest.mark.parametrize('experiment,question', [
    ('arms',ACCURACY), ('allocation',BITS), ('arms',OBJECTIVES), ('arms',CPT), ('robustness',ATTACKS)])
def test_a_missing_record_is_missed_where_it_is_needed(folder, experiment, question):
    for p in PRESET_NAMES: shutil.rmtree(folder/p/experiment, ignore_errors=True)
    study = load_study(folder); said = answers(study)
    for p in PRESET_NAMES: assert 'Not run yet: `switchable-llm experiment' in part(said[question], p).split('\n')[0]
    verb = 'routes' if experiment=='arms' else experiment
    assert len([c for c in missing_records(study) if c.split(' --preset')[0].endswith(verb)])==len(PRESET_NAMES)
    minute(study); open_table(study); statements_table(study)

def test_an_empty_folder_says_so_everywhere(tmp_path):
    study = load_study(tmp_path)
    for text in answers(study).values(): assert text.count('Not run yet')==len(PRESET_NAMES)
    assert set(minute(study).values())=={'No record yet.'} and leads(study)=='*No record yet.*'
    assert methods(study)=='There is no record yet.'
    tables = [records_table(study), speed_table(load_benchmarks(tmp_path)), open_table(study)]
    assert open_questions(study)==[] and tables==['*No record yet.*']*3
    for draw in (plot_earlier_accuracy, plot_earlier_cpt, plot_earlier_typos):
        assert not any('Embedded' in t.get_text() for t in draw(study).axes[0].get_yticklabels())

def test_a_cut_file_is_named(folder):
    f = next((folder/'tiny').glob('*/*.json'))
    f.write_text(f.read_text()[:99])
    with pytest.raises(ValueError, match=f.name.replace('.', r'\.')): load_study(folder)
    (folder/'benchmarks').mkdir(); (folder/'benchmarks'/'store-m.json').write_text('{')
    with pytest.raises(ValueError, match=r'store-m\.json'): load_benchmarks(folder)
