"Random profiles survive every way of writing them; random nonsense is a `ValueError` and nothing else."
import json, random
import pytest, torch
from switchable_llm.models.loading import load_model
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.core.profiles import PROFILES, SITES, Profile, Rule, load_profiles, save_profiles
from switchable_llm.core.switching import make_switchable_, use_profile

def random_bits(rng): return Bits(rng.choice([None, 2, 3, 4, 5, 6, 8, 12, 16]), rng.choice([None, 2, 4, 8, 16]))

def random_rule(rng, sites):
    some = rng.choice(sites)
    parts = dict(
        site=tuple(rng.sample(SITES[:4], rng.randint(1, 4))),
        layers=tuple(sorted(rng.sample(range(2), rng.randint(1, 2)))),
        glob=rng.choice([some.name, '*', f'*.{some.layer}.*', '*.'+some.name.rpartition('.')[2]]))
    keep = rng.sample(list(parts), rng.randint(1, 3))
    return Rule(random_bits(rng), **{k:v for k,v in parts.items() if k in keep})

def random_one(rng, sites, name):
    default = random_bits(rng)
    return Profile(name, default, tuple(random_rule(rng, sites) for _ in range(rng.randint(0, 5))))

def through_json(p): return Profile.from_dict(json.loads(json.dumps(p.to_dict())))

@pytest.fixture(scope='module')
def model(toy_folder):
    m = load_model(toy_folder)[0]
    make_switchable_(m, [], QuantConfig(act='per_token'))
    return m

@pytest.mark.parametrize('seed', range(8))
def test_round_trips(seed, model, tmp_path):
    rng,sites = random.Random(seed),model.switch.sites
    profiles = [random_one(rng, sites, f'p-{seed}_{i}') for i in range(12)]
    for p in profiles: assert Profile.from_dict(p.to_dict())==p==through_json(p)
    for suffix in ('json','yaml','yml'):
        save_profiles(profiles, tmp_path/f'p.{suffix}')
        assert load_profiles(tmp_path/f'p.{suffix}')==profiles

@pytest.mark.parametrize('seed', range(8))
def test_bits_of_each_layer(seed, model):
    "Binding is what the rules say when they are read aloud: the last that matches, else the default."
    rng,sites = random.Random(100+seed),model.switch.sites
    for i in range(12):
        p = random_one(rng, sites, f'q{seed}-{i}')
        try: got = p.bits(sites)
        except ValueError as e:
            assert 'matches no layer' in str(e) and any(not any(r.matches(s) for s in sites) for r in p.rules)
            continue
        for s in sites:
            want = next((r.bits for r in reversed(p.rules) if r.matches(s)), p.default)
            assert got[s.name]==want
        assert Profile.from_bits(p.name, got).bits(sites)==got
        model.switch.add(p)
        assert [x.bits for x in model.switch.bound[p.name]]==[got[s.name] for s in sites]

def test_switching_at_random_leaves_no_trace(model):
    "After a hundred random switches each profile still gives its first logits, bit for bit."
    rng,ids = random.Random(7),torch.arange(16).view(1, 16)
    names = [n for n in model.switch.profiles if n in PROFILES]
    for n in ('bw4','bw8','mixed8648'): names.append(n); model.switch.add(n)
    for i in range(6):
        p = Profile(f'r{i}', random_bits(rng), (Rule(random_bits(rng), layers=(i%2,)),))
        model.switch.add(p); names.append(p.name)
    first = {}
    with torch.no_grad():
        for _ in range(100):
            n = rng.choice(names)
            with use_profile(model, n): y = model(ids).logits
            assert torch.equal(first.setdefault(n, y), y), n
    assert len(first)>6

NONSENSE = (None, True, 0, -1, 3.5, 4, '', 'w', 'w99', 'w4a8x', [], [1], {}, {'a': 1}, 'ä', [None], ['attn_qkv', 3],
            'mlp_in', '5-2', '0-', 'x-y', [-1], [True])

def nonsense(rng):
    "A profile's dictionary with one or two values replaced, dropped or added."
    rules = [dict(site='mlp_in', bits='w4'), dict(layers='0-1', bits='float'), dict(glob='*', bits='a8')]
    d = dict(name='p', default='w4a8', rules=rules)
    for _ in range(rng.randint(1, 2)):
        rules = d.get('rules') or []
        at = rng.choice([d, d, *(r for r in rules if isinstance(r, dict))] if isinstance(rules, list) else [d])
        k = rng.choice([*at, 'extra'])
        if rng.random()<.15: at.pop(k, None)
        else: at[k] = rng.choice(NONSENSE)
    return d

@pytest.mark.parametrize('seed', range(20))
def test_nonsense_is_a_value_error(seed, model, tmp_path):
    rng,refused = random.Random(1000+seed),0
    for _ in range(100):
        d = nonsense(rng)
        try:
            p = Profile.from_dict(d)
            assert through_json(p).bits(model.switch.sites)==p.bits(model.switch.sites), d
        except ValueError as e: refused += bool(str(e))
    assert refused>20

TWO = '[{"name": "a", "default": "w4"}, {"name": "a", "default": "w8"}]'   # of one name
@pytest.mark.parametrize('text', ['', '{', '[]', '[1]', 'null', '"x"', '{"profiles": []}', '{"profiles": 3}',
                                  '{"profiles": {}}', '{"name": "a"}', TWO, '\x00'])
@pytest.mark.parametrize('suffix', ['json','yaml'])
def test_files_of_nonsense(text, suffix, tmp_path):
    f = tmp_path/f'p.{suffix}'; f.write_text(text)
    with pytest.raises(ValueError, match=f.name): load_profiles(f)

def test_a_file_that_is_not_text(tmp_path):
    f = tmp_path/'p.yaml'; f.write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError): load_profiles(f)
