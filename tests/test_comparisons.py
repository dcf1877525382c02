"A verdict is the one that a reader of its interval would give; exposure is what a count of the steps gives."
import math
import numpy as np, pytest
from scipy import stats
from switchable_llm.search.intervals import MARGIN, Interval, crossed_mean, side
from switchable_llm.study.statistics import (
    VERDICTS, Claim, as_good, better, decide, exposure, read, same_exposure, show_exposure)
from switchable_llm.core.profiles import PROFILES, Profile

def by_eye(low, high, above, below):
    "What an interval shows, told by the numbers in it and nothing else."
    if low>above and high<below: return 'confirmed'
    return 'refuted' if high<=above or low>=below else 'too close to call'

def random_family(rng):
    "One to twelve claims of any kind, on one to five seeds and two to forty examples, with and without ties."
    out = []
    for k in range(rng.integers(1, 13)):
        d = rng.normal(rng.normal(0, .05), rng.choice([0, 1e-3, .05, 1.]), (rng.integers(1, 6), rng.integers(2, 41)))
        sizes = rng.integers(1, 6, d.shape[1]) if rng.random()<.3 else None
        edge = float(rng.choice([0., MARGIN, -MARGIN, .95]))
        edges = [(edge, math.inf), (-math.inf, edge), (-.03, .03)][rng.integers(3)]
        one_sided = math.isinf(edges[0]) or math.isinf(edges[1])
        out.append(Claim(str(k), d if sizes is None else d*sizes, *edges, sizes,
                         room=not one_sided or rng.random()<.7, fault='weak'*(rng.random()<.1)))
    return out

def test_verdict_and_interval_never_disagree():
    rng,seen = np.random.default_rng(0),{v:0 for v in VERDICTS}
    for _ in range(600):
        claims = random_family(rng)
        for c,f in zip(claims, decide(claims)):
            seen[f.verdict] += 1
            m = crossed_mean(c.differences, c.sizes); level = 1-.05/len(claims)
            half = stats.t.ppf((1+level)/2, m.freedom)*m.error
            if m.error: np.testing.assert_allclose(f.effect[1:], [m.value-half, m.value+half], rtol=1e-9)
            plain = by_eye(f.effect.low, f.effect.high, c.above, c.below)
            if c.room and not c.fault: assert f.verdict==plain
            elif c.fault: assert f.verdict in ('no verdict','no room') and (f.verdict=='no verdict' or not c.room)
            else: assert f.verdict==plain or f.verdict=='no room' or plain!='confirmed' and f.verdict=='refuted'
            if f.verdict=='confirmed':
                assert not (f.effect.low<=c.above<=f.effect.high) and not (f.effect.low<=c.below<=f.effect.high)
    assert sum(seen.values())>3000 and min(seen.values())>50, seen

def test_a_gain_that_does_not_matter_is_no_win():
    "However many examples make it certain: 1.5e-4 nats are not a gain, and are as good."
    d = np.full((5, 4000), -1.5e-4)+np.random.default_rng(0).normal(0, 1e-4, (5, 4000))
    won,kept = decide([better('wins', d, less=True), as_good('holds', d, less=True)])
    assert won.effect.high<0
    assert (won.verdict, kept.verdict)==('refuted','confirmed')
    assert side(won.effect, less=True)=='alike'

def test_no_room_hides_a_gain_but_no_harm():
    rng = np.random.default_rng(1)
    for _ in range(2000):
        low,width = rng.normal(0, .05),abs(rng.normal(0, .05)); i = Interval(low+width/2, low, low+width)
        for above,below in ((MARGIN, math.inf), (-MARGIN, math.inf), (-math.inf, -MARGIN), (-math.inf, MARGIN)):
            told = read(i, above, below, room=False)
            harmed = i.high<=-MARGIN if math.isinf(below) else i.low>=MARGIN
            assert (told=='refuted')==harmed and told!='confirmed'

def test_refuted_and_undecided_are_told_apart():
    d = np.random.default_rng(2).normal(0, 1, (4, 50))
    words = {k:f'<{k}>' for k in ('yes','in part','no','no or open','open','no room','no verdict')}
    both = decide([better('clear', d-9), better('vague', d)])
    assert both.answer=='no or open'
    assert 'refuted 1 of 2: clear' in both.say(words)
    assert 'too close to call 1 of 2: vague' in both.say(words)
    # said once
    assert both.of('refuted').say(words).startswith('**<no>** clear (')
    assert both.of('too close to call').say(words).startswith('**<open>** vague (')
    assert both.count()=='1 refuted, 1 too close to call'

@pytest.mark.parametrize('seeds', [1, 2, 3])
def test_few_seeds_are_covered_or_said_to_be_few(seeds):
    "Where seeds differ: one seed's interval fails, and its finding says so; two and three hold."
    rng = np.random.default_rng(3)
    world = lambda: rng.normal(size=(seeds, 1))+.3*rng.normal(size=(1, 40))+rng.normal(size=(seeds, 40))
    inside = np.mean([i.low<=0<=i.high for i in (crossed_mean(world()).interval() for _ in range(400))])
    f, = decide(better('x', world()))
    assert (inside<.5 if seeds==1 else inside>.91) and ('says nothing of other seeds' in f.show())==(seeds==1)

# --- exposure -------------------------------------------------------------------------------------------------------

BUILT_IN = [p.to_dict() for n,p in PROFILES.items() if n!='float']

def test_exposure_is_a_count():
    "Against a count by hand, site by site, on random curves of single profiles and of several in one step."
    rng,sites = np.random.default_rng(4),('attn_qkv','attn_out','mlp_in','mlp_out')
    width = dict(bw4=(4,)*4, bw6=(6,)*4, bw8=(8,)*4, uniform8=(8,)*4, w4a8=(4,)*4, mixed8648=(6, 6, 4, 6))
    for _ in range(50):
        steps = [list(rng.choice(list(width), rng.integers(1, 4), replace=False)) for _ in range(100)]
        found = exposure([[i, 1., '+'.join(s), 9] for i,s in enumerate(steps)], BUILT_IN)
        for n,ws in width.items():
            for k,(site,w) in enumerate(zip(sites, ws)):
                assert found[n][site]==sum(any(width[m][k]==w for m in s) for s in steps)
        shared = exposure([[i, 1., '+'.join(s), 9] for i,s in enumerate(steps)], BUILT_IN, 'shared')
        assert all(v==100 for e in shared.values() for v in e.values())

def test_exposure_of_the_real_run():
    "The run of 1,000 steps that made `mixed8648` look best: its adapters had more steps than those of eight bits."
    drawn = dict(bw8=172, bw6=208, mixed8648=196, bw4=215, w4a8=209)
    e = exposure([[0, 1., n, 9] for n,k in drawn.items() for _ in range(k)], BUILT_IN)
    assert ({n:show_exposure(e[n]) for n in drawn}
            =={'bw8':'172', 'bw6':'208–404', 'mixed8648':'404–620', 'bw4':'424–620', 'w4a8':'424–620'})
    assert same_exposure(e['bw4'], e['w4a8'])
    assert not any(same_exposure(e['bw8'], e[n]) for n in ('bw6','mixed8648','bw4'))

def test_rules_by_block_have_layers_of_their_own():
    p = Profile.from_dict(dict(name='p', default='w8a8', rules=[dict(site='mlp_in', layers='0-1', bits='w4a8')]))
    e = exposure([[0, 1., 'p', 9], [1, 1., 'bw4', 9], [2, 1., 'bw4', 9]], [*BUILT_IN, p])
    assert [e['p'][k] for k in ('mlp_in 0','mlp_in 2','attn_out 0')]==[3, 1, 1]
    assert [e['bw4'][k] for k in ('mlp_in 1','mlp_in 2')]==[3, 2]

def test_what_is_not_known_is_not_guessed():
    with pytest.raises(ValueError, match='random_layers'): exposure([[0, 1., 'random_layers', 9]], BUILT_IN)
    with pytest.raises(ValueError, match='glob'):
        exposure([], [dict(name='odd', default='w8a8', rules=[dict(glob='*.c_fc', bits='w4a8')])])

def test_no_step_is_sharper_than_the_interval():
    "The second of two claims would pass Holm's steps; its interval holds the edge, and so it is undecided."
    rng = np.random.default_rng(5); clear,near = rng.normal(9, 1, 60),rng.normal(0, 1, 60); near -= near.mean()
    near += stats.t.ppf(1-.04/2, 59)*near.std(ddof=1)/math.sqrt(60)      # p = 0.04
    assert abs(stats.ttest_1samp(near, 0).pvalue-.04)<1e-9
    first,second = decide([Claim('clear', [clear], above=0), Claim('near', [near], above=0)])
    assert (first.verdict, second.verdict)==('confirmed','too close to call') and second.effect.low<0<second.effect.high
    assert decide(Claim('near', [near], above=0))[0].verdict=='confirmed'      # alone, at 95 %
