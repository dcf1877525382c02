"Attacks that know the defence, the worst of all of them, and what is said of a defence: planted, and one real run."
import copy, json
from dataclasses import replace
import numpy as np, pytest, torch
from switchable_llm.adversarial import ATTACKS, adaptive, expected_loss, perturbation, row_scores, white_box
from switchable_llm.core.switching import use_profile
from switchable_llm.findings.arms import by_arm
from switchable_llm.findings.defences import (
    WORDS, attack_faults, best_fixed, by_radius, defence_findings, defence_scores, defence_table, fixed_of, kept_by, radii_of,
    robustness_verdicts, sanity_checks, training_findings, transfer_share, word_of)
from switchable_llm.findings.earlier import plot_earlier_typos
from switchable_llm.findings.plots import plot_radius, plot_transfer, plot_typos
from switchable_llm.findings.answers import answers, minute, robustness_answer, robustness_brief, study_findings
from switchable_llm.findings.verdicts import Study
from switchable_llm.study.statistics import Findings
from switchable_llm.search.strategies import strategy, use_strategy
from switchable_llm.study.records import PRESETS
from switchable_llm.study.robustness import DEFENCES, PLANS, TRAININGS, Plan, attackers, run_robustness
from test_attacks import batch_of, small_model

PROFILES = 'bw4','bw8'
SHORT = Plan(questions=5, profiles=PROFILES, rates=(.2,), radii=(.05, .5), steps=3, draws=2, repeats=2, train_steps=1,
             tokens_per_batch=300)

@pytest.fixture(scope='module')
def model(): return small_model()

# --- attackers --------------------------------------------------------------------------------------------------------

def losses(m, b, delta, at):
    with torch.no_grad(), use_profile(m, at): return row_scores(m, b, delta)[0]

@pytest.mark.parametrize('profiles', [('bw4','bw8'), ('bw8','bw4'), ('bw4','bw4','bw8')])
def test_who_knows_a_random_profile_raises_the_mean_of_its_losses(model, profiles):
    b,keys,where = batch_of()
    knows,delta = adaptive(strategy('random_profile', profiles)),perturbation(model, b, .2, keys=keys, where=where)
    with torch.no_grad(): expected = expected_loss(model, b, delta, knows, keys)
    torch.testing.assert_close(expected, torch.stack([losses(model, b, delta, p) for p in profiles]).mean(0))
    d = torch.zeros_like(delta, requires_grad=True)
    g, = torch.autograd.grad(expected_loss(model, b, d, knows, keys).sum(), d)
    each = []
    for p in profiles:
        d = torch.zeros_like(delta, requires_grad=True)
        with use_profile(model, p): each += torch.autograd.grad(row_scores(model, b, d)[0].sum(), d)
    torch.testing.assert_close(g, torch.stack(each).mean(0))

def test_one_step_of_who_knows_goes_along_the_mean_gradient(model):
    b,keys,where = batch_of()
    delta = perturbation(model, b, .1, ATTACKS['fgsm'], adaptive(strategy('random_profile', PROFILES)), keys, where)
    g = 0
    for p in PROFILES:
        d = torch.zeros_like(delta, requires_grad=True)
        with use_profile(model, p): g = g+torch.autograd.grad(row_scores(model, b, d)[0].sum(), d)[0]
    assert torch.equal(delta.sign(), g.sign()*where[..., None])

def test_random_layers_are_attacked_by_draws_that_do_not_depend_on_other_rows(model):
    b,keys,where = batch_of()
    who = adaptive(strategy('random_layer', PROFILES), 2)
    assert (who.exact, who.draws, who.fresh)==(False, 2, True)
    two = replace(ATTACKS['pgd'], steps=2)
    def make(rows): return perturbation(model, {k:v[rows] for k,v in b.items()}, .1, two, who, keys[rows], where[rows])
    whole,part = make(slice(None)),make(slice(2, 4))
    assert (whole[2:4]-part).abs().mean()<.1*part.abs().mean()

@pytest.mark.parametrize('who', [white_box('bw4'), adaptive(strategy('random_profile', PROFILES))], ids=lambda w: w.name)
def test_restarts_never_weaken(model, who):
    b,keys,where = batch_of()
    pgd,found = replace(ATTACKS['pgd'], steps=3),[]
    for n in (1, 2, 3):
        delta = perturbation(model, b, .2, replace(pgd, restarts=n), who, keys, where)
        with torch.no_grad(): found.append(expected_loss(model, b, delta, who, keys))
    for few,many in zip(found, found[1:]): assert (many>=few-1e-4).all()
    each = [perturbation(model, b, .2, replace(pgd, restarts=3), who, keys, where, restart=r) for r in range(3)]
    assert len({d.sum().item() for d in each})==3

# --- a real run --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def runs(toy_folder, tmp_path_factory):
    few = replace(PRESETS['tiny'], model=str(toy_folder), steps=4, batch_size=4, train_n=40, calibration=2, eval_n=8, max_new_tokens=3)
    out = tmp_path_factory.mktemp('runs')
    return run_robustness(few, out, SHORT, TRAININGS, progress=False), out

def test_a_real_run_is_told_from_end_to_end(runs):
    records,out = runs
    assert [r['name'] for r in records]==list(TRAININGS) and all(r['steps']==dict(bw4=2, bw8=2) for r in records)
    assert all(f.stat().st_size<400_000 for f in out.glob('*/robustness/*.json')) and len(list(out.glob('*/robustness/*.json')))==3
    assert len({json.dumps(r['config']['plan']) for r in records})==1     # one plan for all
    told,table = robustness_verdicts(records),defence_table(records)
    assert table.count('| random profile |')==3 and '3 steps, where 20' in ' '.join(told.values())
    for draw,rs in ((plot_radius, records), (plot_transfer, records[:1]), (plot_typos, records[:1])): draw(rs).draw_without_rendering()
    study = Study(dict(tiny=dict(robustness=records)))
    assert robustness_answer(study, 'tiny').startswith('**No') and robustness_brief(study, 'tiny').startswith('**No')

def test_a_random_profile_is_scored_by_the_mean_of_its_fixed_ones(runs):
    for r in runs[0]:
        for x in radii_of([r]):
            for w in {a['attacker'] for a in r['attacks'] if (a['attack'], a['radius'])==('pgd', x)}:
                rows = [s for a in r['attacks'] if (a['attack'], a['radius'], a['attacker'])==('pgd', x, w) for s in a['scores']]
                for s in rows:
                    for k in ('nll','right'):
                        want = np.mean([s[n][k] for n in fixed_of(r)], axis=0)
                        assert s['random_profile'][k]==pytest.approx(want, abs=1e-3)

def test_the_mean_is_what_draws_come_to(model):
    b,keys,_ = batch_of(); s = strategy('random_profile', PROFILES); fixed = {p:losses(model, b, None, p) for p in PROFILES}
    total = 0
    with torch.no_grad():
        for number in range(60):
            with use_strategy(model, s, keys, 0, number): got = row_scores(model, b)[0]
            drawn = [PROFILES[s.draw(k, number=number).item()] for k in keys]
            torch.testing.assert_close(got, torch.stack([fixed[p][i] for i,p in enumerate(drawn)]), atol=1e-3, rtol=1e-3)
            total = total+got/60
    mean,gap = (fixed['bw4']+fixed['bw8'])/2,(fixed['bw4']-fixed['bw8']).abs()
    assert ((total-mean).abs()<=.25*gap+1e-3).all()

def test_no_defence_is_attacked_less_than_by_who_knows_it(runs):
    for r in runs[0]:
        for x in radii_of([r]):
            for d in (*fixed_of(r), 'random_profile'):
                who = f"white_{d[6:]}" if d.startswith('fixed') else f'adaptive_{d}'
                assert (defence_scores(r, d, x, 'nll')>=defence_scores(r, d, x, 'nll', who)-1e-9).all()
                assert (defence_scores(r, d, x)<=defence_scores(r, d, x, attacker=who)).all()
            one = copy.deepcopy(r)
            for a in one['attacks']: a['scores'] = a['scores'][:1]
            for d in fixed_of(r): assert (defence_scores(r, d, x, 'nll')>=defence_scores(one, d, x, 'nll')).all()

def test_the_plans_ask_for_what_the_findings_ask_for():
    for p in PLANS.values(): assert p.steps>=20 and p.draws>=4 and p.restarts>=2 and max(p.radii)>=16*min(p.radii)
    assert [a.name for a in attackers(SHORT)]==['white_bw4','white_bw8','adaptive_random_profile','adaptive_random_layer']

# --- planted, so that what it should say is known ------------------------------------------------------------------------

RADII = [.003, .0125, .05]
LEVEL = dict(fixed_bw4=(.9, .5, 0.), fixed_bw8=(1., .6, .1), random_profile=(1., .6, .1), random_layer=(1., .6, .1))

def planted(seed, arm='joint', n=100, foreign=.4, steps=20, draws=4, luck=1., **keeps):
    """A record of two profiles. `keeps`: defence -> share of right answers at each radius, under the attacker who knows it;
    an attack from elsewhere does `foreign` of the harm; each draw of random layers has `luck`."""
    rng,keeps = np.random.default_rng([seed, len(arm)]),LEVEL | keeps
    base,rank = 1+rng.random(n),rng.permutation(n)/n
    def row(d, i, part):
        right = (rank<(1-part*(1-keeps[d][i]) if i>=0 else 1.)).astype(float)
        nll = base+.5*part*(i+1)+.01*rng.normal(size=n)
        if d!='random_layer': return dict(nll=nll.tolist(), right=right.tolist())
        return dict(nll=[nll.tolist()]*2, right=[(right*(rng.random(n)<luck)).tolist() for _ in 'ab'])
    def scores(i, who='', part=1.):
        return {d:row(d, i, part*(1. if who in ('', f'white_{d[6:]}', f'adaptive_{d}') else foreign)) for d in LEVEL}
    who = 'white_bw4','white_bw8','adaptive_random_profile','adaptive_random_layer'
    made = [('pgd', x, w, [scores(i, w), scores(i, w, .9)]) for i,x in enumerate(RADII) for w in who]
    made += [('noise', RADII[1], 'white_bw8', [scores(1, part=.1)]), ('fgsm', RADII[1], 'white_bw8', [scores(1, part=.5)]),
             ('pgd', RADII[1], 'white_float', [scores(1, 'white_float')]), ('pgd', 2., 'white_bw8', [scores(2, part=9.)])]
    misspelt = lambda x: {d:dict(nll_answer=(base+x).tolist(), f1=[1-x]*n, em=[0]*n) for d in LEVEL}
    plan = dict(profiles=list(PROFILES), radii=RADII, rates=[.1], steps=steps, restarts=2, draws=draws, unbounded=2.)
    return dict(preset='tiny', experiment='robustness', name=arm, seed=seed, config=dict(arm=arm, plan=plan), highest='bw8',
                steps=dict(bw4=9, bw8=9), ids=list(range(n)), n_answer=[2]*n, clean=scores(-1),
                typos=[dict(rate=x, distortion=x, scores=misspelt(x)) for x in (0., .1)],
                attacks=[dict(attack=a, radius=r, attacker=w, scores=s) for a,r,w,s in made])

def several(seeds=4, **kw): return [planted(s, **kw) for s in range(seeds)]
def study_of(records): return Study(dict(tiny=dict(robustness=records)))
def told(study):
    answer = answers(study)['Agreement with Double-Win Quant, and why'].split('*Embedded model.* ')[1]
    return answer, minute(study)['Random precision']

OF_EACH = [   # what is planted -> the outcome at the middle radius, how the answer begins
    (dict(random_profile=(1., .9, .4)), 'helps', '**It helps, as Double-Win Quant says.**'),
    (dict(), 'does not help by more than the margin', '**It does not help by more than the margin.**'),
    (dict(random_profile=(1., .3, 0.)), 'hurts', '**It hurts'),
    (dict(random_profile=(1., .65, .15), n=24, seeds=2), 'too close to call', '**Too close to call.**'),
    (dict(random_profile=(1., .9, .4), steps=3), 'no verdict', '**No verdict'),
    (dict(random_profile=(1., .9, .4), draws=2), 'no verdict', '**No verdict')]

@pytest.mark.parametrize('kw,word,says', OF_EACH, ids=[f'{w}-{i}' for i,(_,w,_) in enumerate(OF_EACH)])
def test_every_outcome_is_told_in_answer_abstract_and_table(kw, word, says):
    records = several(**kw); found = defence_findings(records, ['random_profile'])
    assert word_of(found[1])==word and {word_of(f) for f in found}<=set(WORDS)
    long,short = told(study_of(records))
    assert long.startswith(says), long
    assert '- Random layers, against the best fixed profile: ' in long and long.count('- By the loss instead of right answers, ')==2
    lead = says.strip('*.').split(',')[0].lower()
    assert short.startswith(f'**A precision drawn at random at inference, against the best fixed profile: {lead}'), short
    assert f'{word} at ' in next(l for l in defence_table(records).splitlines() if '| random profile |' in l)
    assert {f.family for f in found}=={3}

@pytest.mark.parametrize('kw,bold', [(dict(random_profile=(1., .9, .4)), True), (dict(random_profile=(1., .3, 0.)), True), ({}, False)])
def test_a_table_by_radius_is_bold_where_something_is_decided(kw, bold):
    found = defence_findings(several(**kw), ['random_profile'])
    rows = by_radius(dict(one=found, none=Findings()), 'Below.').splitlines()
    assert [r.split(' | ')[0] for r in rows[2:5]]==[f'| radius {r:g}' for r in sorted(float(f.claim.split()[1][:-1]) for f in found)]
    middle = next(r for r in rows if r.startswith(f"| {found[1].claim.partition(':')[0]} |"))
    assert (middle.split(' | ')[1]==f'**{found[1].effect.show(100)}**')==bold and middle.endswith('|  |') and rows[-1]=='*Below.*'

def test_where_nothing_is_lost_there_is_nothing_to_gain_but_harm_is_seen():
    found = defence_findings(several(random_profile=(1., .6, .1), random_layer=(.7, .3, 0.)))
    assert [word_of(f) for f in found if 'radius 0.003' in f.claim]==['nothing to gain','hurts']

def test_the_best_fixed_profile_is_not_chosen_by_what_it_is_scored_on():
    "Two profiles that are alike but for luck: the best of them keeps what each keeps, and no more."
    rng,gaps = np.random.default_rng(0),[]
    for _ in range(200):
        r = planted(0, n=20)
        for a in r['attacks']:
            for s in a['scores']:
                for d in fixed_of(r): s[d]['right'] = rng.integers(0, 2, 20).astype(float).tolist()
        r['attacks'] = r['attacks'][-1:]; r['attacks'][0]['radius'] = .05
        gaps.append(kept_by([r], 'best_fixed', .05).mean()-np.mean([kept_by([r], d, .05).mean() for d in fixed_of(r)]))
    assert abs(np.mean(gaps))<.03

def test_luck_in_the_draws_of_random_layers_is_no_attack():
    "Forty attacks that do nothing: the unluckiest of them would leave hardly an answer."
    r = planted(0, n=1500, luck=.5, random_layer=(1., 1., 1.))
    for x in RADII: assert kept_by([r], 'random_layer', x).mean()==pytest.approx(.5, abs=.05)
    every = np.array([s['random_layer']['right'] for a in r['attacks'] for s in a['scores']])
    assert every.mean(1).min(0).mean()<.1

def test_what_algebra_answers_is_not_claimed():
    for topic,fs in study_findings(study_of(several()), 'tiny').items():
        for f in fs: assert 'mean of' not in f.claim and not f.claim.startswith('without an attack: `random_profile`'), topic

@pytest.mark.parametrize('edit,says', [
    (lambda r: r['steps'].update(bw8=99), '`bw8` 99'), (lambda r: r['config']['plan'].update(steps=3), '3 steps'),
    (lambda r: [s['random_profile'].update(nll=r['clean']['random_profile']['nll']) for a in r['attacks']
                if a['attacker']=='adaptive_random_profile' for s in a['scores']], 'no less harm than one who does not'),
    (lambda r: [s['fixed_bw8'].update(right=[1.]*100) for a in r['attacks'] if a['radius']==2 for s in a['scores']], 'without a bound')])
def test_what_is_wrong_with_the_attacks_is_said(edit, says):
    records = several()
    assert not attack_faults(records) and {f.verdict for f in sanity_checks(records)}=={'confirmed'}
    for r in records: edit(r)
    assert says in '; '.join(attack_faults(records))
    for text in told(study_of(records)): assert 'no verdict' in text.split('**')[1].lower() and says in text

def test_answers_that_do_not_fall_within_the_radii_tell_nothing():
    for keeps in ((1., 1., 1.), (0., 0., 0.)): assert 'cannot tell' in '; '.join(attack_faults(several(2, **dict.fromkeys(LEVEL, keeps))))

def test_training_is_compared_at_every_radius_and_without_an_attack():
    hard = {d:(1., 1., .5) for d in LEVEL}
    records = [*several(), *several(arm='rpt', **hard), *several(arm='fixed_attack', **hard)]
    found = training_findings(records)
    assert [word_of(f) for f in found if '`joint`' in f.claim]==['nothing to gain','nothing to gain','helps','helps']
    same = [word_of(f) for f in found if '`fixed_attack`' in f.claim]   # alike, but for luck
    assert same[:3]==['nothing to gain']*3 and same[3] in ('does not help by more than the margin','too close to call')
    assert set(by_arm(records))==set(TRAININGS) and 'Random-precision training' in told(study_of(records))[0]
    assert len(plot_radius(records).legends[0].texts)==4 and len(plot_radius(several()).legends[0].texts)==3

def test_transfer_is_the_one_that_was_planted():
    for share in (.4, 1.): assert transfer_share(several(foreign=share))==pytest.approx(share, abs=.03)
    assert 'does 40 % of the harm' in told(study_of(several()))[0]

def test_seeds_on_other_questions_are_not_averaged():
    records = several(); records[0]['ids'] = [f'x{i}' for i in records[0]['ids']]
    with pytest.raises(ValueError, match='scored on other examples'): defence_findings(records)
    assert 'scored on other examples' in told(study_of(records))[0]

def test_typos_are_drawn_beside_the_earlier_ones():
    rows = lambda study: [t.get_text() for t in plot_earlier_typos(study).axes[0].get_yticklabels()]
    want = {f'Embedded model, {s}' for s in ('bw4','bw8','random profile','random layer')}
    assert set(rows(study_of(several())))-set(rows(Study({})))==want

def test_no_record_is_said_to_be_none():
    assert 'Not run yet' in told(Study({}))[0] and robustness_brief(Study({}), 'tiny')==''
    assert defence_table([])=='*No record yet.*' and not defence_findings([]) and not training_findings([])
    for draw in (plot_radius, plot_transfer, plot_typos):
        with pytest.raises(ValueError, match='records is empty'): draw([])
    assert set(best_fixed(several(2), .0125))=={'fixed_bw8'} and DEFENCES==('random_profile','random_layer')
