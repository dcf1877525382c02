"The report's sentences, tables and figures follow the records: copies of the real ones, changed, taken away, and cut off."
import copy, json, shutil
from dataclasses import replace
import numpy as np, pytest
from conftest import ROOT
from switchable_llm.study.statistics import Findings, read, show_exposure
from switchable_llm.findings.cycling import cpt_faults, cpt_findings
from switchable_llm.findings.earlier import (
    plot_earlier_accuracy, plot_earlier_cpt, plot_earlier_typos, statements_table)
from switchable_llm.findings.reasons import cpt_parts
from switchable_llm.report import (
    QUESTIONS, abstract, answers, as_markdown, load_benchmarks, missing_records, open_questions, open_table,
    records_table, speed_table, study_findings)
from switchable_llm.findings import choices as choice_rooms, verdicts as verdict_rooms
from switchable_llm.findings.choices import allocation_findings
from switchable_llm.findings.verdicts import (
    PRESET_NAMES, Study, accuracy_findings, joint_exposure, load_study, profile_labels, result_table)

RESULTS = ROOT/'results'
KEEP = ('joint','allocation','objectives','cpt','robustness','range_test','calibration','spans')

@pytest.fixture(scope='module')
def real():
    study = load_study(RESULTS)
    if not all(study.joint(p) for p in PRESET_NAMES): pytest.skip('the records of the study are not here')
    return study

@pytest.fixture
def first(real):
    "The records of the first study, whose faults are known; nothing of this holds of another."
    drawn = [n for _,_,n,_ in real.joint('smollm2')[0]['training']['curve']]
    ours = drawn.count('bw8'), len(drawn), len(real.joint('smollm2'))
    if ours!=(172, 1000, 1): pytest.skip('the study has been run anew')
    return real

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

def brief(study, topic, preset):   # of one preset, in the abstract
    title = PRESET_NAMES[preset][0].upper()+PRESET_NAMES[preset][1:]
    return abstract(study)[topic].split(f'*{title}*: ', 1)[1].split('\n', 1)[0]

QS = list(QUESTIONS)
ACCURACY,BITS,OBJECTIVES,CPT,ATTACKS,DIRECTIONS = QS
ONE_MINUTE = ('One checkpoint, many precisions', 'Bits chosen per layer', 'What to train with', 'Cyclic precision',
              'Random precision at inference')

def asked(study, question, preset):   # the answer to one question for one model
    return line(answers(study)[question], preset)

def equal_steps(r):
    "As if every step had run all profiles at once: each adapter has had all of them."
    r['training']['curve'] = [[i, l, 'bw4+bw6+bw8+w4a8+mixed8648', t] for i,l,_,t in r['training']['curve']]

def trained_float(r):
    "As if the float model had known the task before."
    before = {s['profile']['name']:s for s in r['before']['scores']}
    best = max(r['after']['scores'], key=lambda s: np.mean(s['f1']))
    before['float']['f1'] = list(best['f1'])

# --- what the records cannot carry ------------------------------------------------------------------------------------

def test_no_verdict_of_the_study_disagrees_with_its_interval(real):
    for p in PRESET_NAMES:
        for topic,fs in study_findings(real, p).items():
            for f in fs:
                told = read(f.effect, f.above, f.below)
                if f.verdict not in ('confirmed','refuted','undecided') or f.verdict==told: continue
                full = read(f.effect, f.above, f.below, room=False)
                assert f.verdict==full=='refuted', (p, topic, f)

def test_profiles_of_unequal_exposure_are_not_called_better_or_worse(first):
    "The run that made `mixed8648` look as good as eight bits: the steps stand in the table, and no verdict does."
    rs = first.joint('smollm2'); steps = {n:show_exposure(e) for n,e in joint_exposure(rs).items()}
    assert steps=={'bw8':'172', 'bw6':'208–404', 'mixed8648':'404–620', 'w4a8':'424–620', 'bw4':'424–620'}
    rows = {l.split('|')[1].strip():l for l in result_table(rs).splitlines() if l.startswith('| ')}
    for n,k in steps.items(): assert f'| {k} |' in rows[n] and (n=='bw8' or rows[n].endswith('| unequal steps |'))
    said = asked(first, ACCURACY, 'smollm2').split('At equal steps')[0]
    said += brief(first, ONE_MINUTE[0], 'smollm2').split(' In a shorter run')[0]
    assert 'cannot be read from this run' in said
    assert not any(w in said for w in ('as good','worse:','raised it','confirmed','refuted'))
    assert all(k in said for k in steps.values()) and profile_labels(rs)['bw8']=='bw8\n172 steps'

def test_a_gain_against_an_untrained_float_model_is_no_merit_of_the_method(first, folder):
    said = asked(first, ACCURACY, 'smollm2')
    assert all(w in said for w in ('no measure of the method', 'none was trained alike', 'words'))
    assert 'none was trained alike' in brief(first, ONE_MINUTE[0], 'smollm2')
    assert {f.verdict for f in accuracy_findings(first.joint('smollm2')) if 'gains' in f.claim}=={'no verdict'}
    change(folder, 'smollm2', 'joint', trained_float)
    said = asked(load_study(folder), ACCURACY, 'smollm2')
    assert 'raised it: `bw8`' in said.split('What training did to F1')[1] and 'no measure of the method' not in said

def test_where_there_was_no_room_nothing_is_confirmed(first):
    rs = first.joint('tiny'); found = accuracy_findings(rs)
    def f1(name): return np.mean([s['f1'] for r in rs for s in r['after']['scores'] if s['profile']['name']==name])
    full = {n for n in ('bw6','mixed8648','w4a8') if f1(n)>.98}
    assert full and {f.verdict for f in found if any(f'`{n}`' in f.claim for n in full)}=={'no room'}
    assert brief(first, ONE_MINUTE[1], 'tiny').startswith('**No room')
    assert 'No room to tell at' in brief(first, ONE_MINUTE[0], 'tiny') and '| no room |' in result_table(rs)

def test_one_arm_is_said_to_be_one_arm(first):
    said = brief(first, ONE_MINUTE[2], 'smollm2')
    if len({r['name'] for r in first.of('smollm2', 'objectives')})!=2: pytest.skip('there are other arms now')
    assert 'Only one other arm was tried' in said and 'stays' not in said and 'nothing of other seeds' in said

def test_cyclic_precision_without_a_range_test_has_no_verdict(first):
    said,faults = asked(first, CPT, 'smollm2'),cpt_faults(first.of('smollm2', 'cpt'), first.of('smollm2', 'range_test'))
    for w in ('no range test','44 % of the cycle','the last 4 began another'): assert any(w in f for f in faults)
    assert all(f in said for f in faults) and said.lstrip().startswith('**No verdict')
    assert 'help' not in said.split('Why these runs')[0]
    assert 'No verdict' in statements_table(first).split('four of five')[1].split('\n')[0]
    assert not cpt_faults(first.of('tiny', 'cpt'), first.of('tiny', 'range_test'))

def test_a_search_that_lost_in_its_own_space_says_so(first):
    said = brief(first, ONE_MINUTE[1], 'smollm2')
    assert 'At 5 of 6 budgets the search chose bits that lose more than a simple profile' in said
    assert 'against `w6a8`' in said and '48 questions chose them' in said and 'beat the best' not in said

def test_nothing_is_said_twice_and_nothing_undecided_is_called_decided(real):
    text = as_markdown(abstract(real), True)+''.join(answers(real).values())
    for twice in ('Not decided. **undecided**', 'Open. open', '**Open.** Open', 'No verdict. No verdict', '..', '.**.'):
        assert twice not in text, twice
    assert 'not decided' not in text.lower()

def test_every_sentence_about_one_seed_says_so(first):
    for q in (ACCURACY, OBJECTIVES, CPT): assert 'says nothing of other seeds' in asked(first, q, 'smollm2'), q
    assert 'say nothing of other runs' in abstract(first)['What it rests on']
    assert 'nothing is known of other runs' in result_table(first.joint('smollm2'))
    assert 'other runs' not in result_table(first.joint('tiny'))

# --- changed records ------------------------------------------------------------------------------------------------

def test_a_better_profile_changes_sentence_table_abstract_and_figure(real, folder):
    def perfect(r):
        for s in r['after']['scores']:
            if s['profile']['name']=='bw4': s['f1'] = [1.]*len(s['f1'])
    change(folder, 'smollm2', 'joint', equal_steps); fair = load_study(folder)
    assert change(folder, 'smollm2', 'joint', perfect)
    new = load_study(folder)
    before,after = (asked(s, ACCURACY, 'smollm2') for s in (fair, new))
    assert 'worse: `bw4`' in before and 'worse: `bw4`' not in after.split('At equal steps')[0]
    assert '`bw4` 100.0 [100.0, 100.0]' in after and 'as good:' in after
    lead = brief(new, ONE_MINUTE[0], 'smollm2').split('**')[1]
    assert '`bw4` are as good as `bw8` (within 2 points)' in lead
    assert '`bw4` is not' in brief(fair, ONE_MINUTE[0], 'smollm2').split('**')[1]
    def row(s):
        lines = result_table(s.joint('smollm2')).splitlines()
        return next(l for l in lines if l.startswith('| bw4 |')).replace('\xa0', ' ')
    assert '| 100 [100, 100] |' in row(new)
    for s,word in ((new, 'as good'), (fair, 'worse'), (real, 'unequal steps')): assert row(s).endswith(f'| {word} |')
    def at_four(s):
        lines = [l for l in plot_earlier_accuracy(s).axes[0].lines if len(l.get_xdata())]
        return next(l for l in lines if 'SmolLM2' in str(l.get_gid() or l.get_label())).get_ydata()[0]
    assert at_four(new)==100 and at_four(real)<50
    assert asked(new, BITS, 'smollm2')==asked(fair, BITS, 'smollm2')   # nothing else moves

def test_steps_that_are_made_unequal_take_the_verdict_away(folder):
    def drawn(i): return 'bw8' if i%9==0 else 'bw6' if i%9<4 else 'mixed8648+bw4+w4a8'
    def skewed(r): r['training']['curve'] = [[i, l, drawn(i), t] for i,l,_,t in r['training']['curve']]
    change(folder, 'smollm2', 'joint', equal_steps); fair = load_study(folder)
    assert not any(f.fault for f in accuracy_findings(fair.joint('smollm2')) if 'loses' in f.claim)
    change(folder, 'smollm2', 'joint', skewed); new = load_study(folder)
    assert {f.verdict for f in accuracy_findings(new.joint('smollm2')) if 'loses' in f.claim}=={'no verdict'}
    assert '`bw8` 112' in asked(new, ACCURACY, 'smollm2')

def test_only_what_can_be_compared_is_compared(folder):
    "Eight and six bits had equal steps, the others had not: the sentence names those that it speaks of."
    def some(r):
        r['training']['curve'] = [[i, l, 'bw8+bw6' if i%2 else 'mixed8648+bw4+w4a8+bw6+bw8'*(i%4==0) or 'bw8+bw6', t]
                                  for i,l,_,t in r['training']['curve']]
    change(folder, 'smollm2', 'joint', some); study = load_study(folder)
    kept = {f.claim.split('`')[1]:f.verdict for f in accuracy_findings(study.joint('smollm2')) if 'loses' in f.claim}
    assert kept.pop('bw6')!='no verdict' and set(kept.values())=={'no verdict'}
    for said in (asked(study, ACCURACY, 'smollm2'), brief(study, ONE_MINUTE[0], 'smollm2')):
        lead = said.split('**')[1]
        assert 'Every profile' not in lead and 'No profile' not in lead and '`bw6`' in lead
        assert '`mixed8648`, `w4a8` and `bw4` cannot be compared with it' in lead

@pytest.mark.parametrize('verdicts,says', [
    (('confirmed','confirmed'), 'Every profile is as good as `bw8`.'),
    (('confirmed','no verdict'), '`a` is as good as `bw8` (within 2 points); `b` cannot be compared with it.'),
    (('refuted','refuted'), 'No profile is as good as `bw8`.'),
    (('refuted','no verdict'), '`a` is not as good as `bw8`; `b` cannot be compared with it.'),
    (('confirmed','refuted'), '`a` is as good as `bw8` (within 2 points); `b` is not.'),
    (('undecided','no verdict'), 'Whether `a` is as good as `bw8` is open; `b` cannot be compared with it.'),
    (('no verdict','no verdict'), 'Which width is better cannot be read from this run.')])
def test_the_lead_claims_no_more_than_its_findings(verdicts, says, real):
    records = real.joint('smollm2'); f = accuracy_findings(records)[0]
    kept = Findings(replace(f, claim=f'`{n}` loses less', verdict=v) for n,v in zip('ab', verdicts))
    assert verdict_rooms._lead(records, kept)==f'**{says}**'

@pytest.mark.parametrize('verdicts,says', [
    (('confirmed',)*3, 'Bits chosen per layer beat the best simple profile.'),
    (('confirmed','no room','no room'), 'Bits chosen per layer beat the best simple profile at 1 of 3 budgets; '
                                        'at 2 there was nothing left to gain.'),
    (('refuted','no room','no room'), 'Bits chosen per layer do not beat the best simple profile at 1 of 3 budgets; '
                                      'at 2 there was nothing left to gain.'),
    (('confirmed','no verdict','no verdict'), 'Bits chosen per layer beat the best simple profile at 1 of 3 budgets; '
                                              '2 cannot be compared, as the profiles differ in steps too.'),
    (('refuted',)*3, 'Bits chosen per layer do not beat the best simple profile.')])
def test_the_choice_of_bits_is_praised_only_where_it_won(verdicts, says, real):
    f = allocation_findings(real.of('smollm2', 'allocation'))[0]
    assert choice_rooms._found(Findings(replace(f, verdict=v) for v in verdicts))==says

def test_cheaper_bits_that_win_are_said_to_win(real, folder):
    def win(r):
        for p in r['front']['points']:
            if p['kind']=='searched': p['nll'] = [x*.5 for x in p['nll']]
    change(folder, 'smollm2', 'joint', equal_steps)
    assert change(folder, 'smollm2', 'allocation', win)
    new = load_study(folder); said = brief(new, ONE_MINUTE[1], 'smollm2')
    assert said.startswith('**Bits chosen per layer beat the best simple profile.**') and 'lose more' not in said
    first_line = asked(new, BITS, 'smollm2').split('\n')[0]
    assert not any(w in first_line for w in ('refuted','not better','no verdict','not comparable'))

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
    for said in (asked(new, CPT, 'tiny'), brief(new, ONE_MINUTE[3], 'tiny')): assert said.lstrip().startswith('**It helps here')
    now,then = (cpt_parts(s.of('tiny', 'cpt'))['bw4']['both'].value for s in (new, real))
    assert now<then-1
    shutil.rmtree(folder/'tiny'/'range_test')
    blind = load_study(folder)
    assert 'no range test' in asked(blind, CPT, 'tiny') and brief(blind, ONE_MINUTE[3], 'tiny').startswith('**No verdict')

def test_a_benefit_too_small_to_matter_is_no_help(folder):
    def slight(r):
        if r['config']['arm']['schedule']=='cyclic':
            for n,s in r['scores'].items(): s['nll_answer'] = list(copied[r['seed']][n])
    copied = {}
    for f in (folder/'tiny'/'cpt').glob('static_low-s*.json'):
        r = json.loads(f.read_text())
        copied[r['seed']] = {n:[x-.001 for x in s['nll_answer']] for n,s in r['scores'].items()}
    if not copied: pytest.skip('no record of cyclic precision')
    change(folder, 'tiny', 'cpt', slight, 'cyclic-s*')
    study = load_study(folder)
    found = cpt_findings(study.of('tiny', 'cpt'), ranges=study.of('tiny', 'range_test'))
    f = found['cyclic at bw4 better than static_low']
    assert f.effect.low<=f.effect.value<0 and f.effect.high<0 and f.verdict=='refuted'
    assert 'It helps' not in asked(study, CPT, 'tiny')

# --- missing, mixed up and damaged records -----------------------------------------------------------------------------

@pytest.mark.parametrize('experiment,question', [
    ('joint',ACCURACY), ('allocation',BITS), ('objectives',OBJECTIVES), ('cpt',CPT), ('robustness',ATTACKS)])
def test_a_missing_record_is_missed_where_it_is_needed(folder, experiment, question):
    for p in PRESET_NAMES: shutil.rmtree(folder/p/experiment, ignore_errors=True)
    study = load_study(folder); said = answers(study)
    for p in PRESET_NAMES: assert 'Open: there is no record; `switchable-llm' in line(said[question], p).split('\n')[0]
    verb = 'run' if experiment=='joint' else experiment
    assert len([c for c in missing_records(study) if c.split(' --preset')[0].endswith(verb)])==len(PRESET_NAMES)
    abstract(study); open_table(study); statements_table(study)

def test_an_empty_folder_says_so_everywhere(tmp_path):
    study = load_study(tmp_path)
    for text in answers(study).values(): assert text.count('there is no record')==len(PRESET_NAMES)
    said = abstract(study)
    assert said['What it rests on']=='There is no record yet.' and said['Open']=='Nothing was tested yet.'
    for t in ONE_MINUTE: assert said[t].count('No record yet')==len(PRESET_NAMES)
    tables = [records_table(study), speed_table(load_benchmarks(tmp_path)), open_table(study), result_table([])]
    assert open_questions(study)==[] and tables==['*No record yet.*']*4
    for draw in (plot_earlier_accuracy, plot_earlier_cpt, plot_earlier_typos):
        assert not any('Embedded' in t.get_text() for t in draw(study).axes[0].get_yticklabels())

def test_a_cut_file_is_named(folder):
    f = next((folder/'tiny').glob('*/*.json'))
    f.write_text(f.read_text()[:99])
    with pytest.raises(ValueError, match=f.name.replace('.', r'\.')): load_study(folder)
    (folder/'benchmarks'/'m').mkdir(parents=True); (folder/'benchmarks'/'m'/'store.json').write_text('{')
    with pytest.raises(ValueError, match=r'store\.json'): load_benchmarks(folder)

def test_seeds_on_other_questions_are_not_averaged(folder):
    def other(r): r['after']['ids'] = ['x'+i for i in r['after']['ids']]
    assert change(folder, 'tiny', 'joint', other, '*-s0')
    study = load_study(folder)
    assert 'scored on other examples' in asked(study, ACCURACY, 'tiny')
    assert 'F1 after joint training' in asked(study, ACCURACY, 'smollm2')
    assert 'scored on other examples' in brief(study, ONE_MINUTE[0], 'tiny')
    assert not [q for q in open_questions(study) if (q.preset, q.topic)==('tiny','accuracy')]

@pytest.mark.parametrize('key', ['after','training'])
def test_a_record_without_a_part_is_told_from_a_missing_one(folder, key):
    change(folder, 'smollm2', 'joint', lambda r: r.pop(key))
    assert f"a record lacks '{key}'" in line(answers(load_study(folder))[ACCURACY], 'smollm2')

# --- undecided claims ---------------------------------------------------------------------------------------------------

def test_more_of_the_same_questions_decides_what_was_undecided(real):
    "What the report promises: so many times as many seeds and questions, and the nearest undecided claim is decided."
    fair = copy.deepcopy(real.joint('smollm2')[0]); equal_steps(fair); trained_float(fair)
    study = Study(dict(smollm2=dict(joint=[fair])))
    qs = [q for q in open_questions(study) if q.topic=='accuracy' and q.finding.seeds==1 and q.times<20]
    if not qs: pytest.skip('nothing of this kind is undecided')
    q = qs[0]; k = int(np.ceil(q.times))+1; r = copy.deepcopy(fair)
    for when in ('before','after'):
        r[when]['ids'] = [f'{i}-{j}' for j in range(k) for i in r[when]['ids']]
        for s in r[when]['scores']:
            for key in ('em','f1','nll_answer','n_answer'): s[key] = s[key]*k
    assert q.finding.claim not in [o.finding.claim for o in open_questions(Study({q.preset:dict(joint=[r])}))]
