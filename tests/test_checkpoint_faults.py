"A damaged checkpoint is an error that says so; never a model that is silently another."
import copy, hashlib, json, random, shutil
from dataclasses import asdict
import pytest, torch
from safetensors.torch import load_file, save as save_tensors
from torch import nn
from switchable_llm.models.loading import load_model
from switchable_llm.lora_routing import adapter_params, add_adapters_
from switchable_llm.models.checkpoints import _sealed, load_switchable, read_switchable, save_switchable
from switchable_llm.quantizers import QuantConfig
from switchable_llm.core.layers import ADDED, GATE_TYPES
from switchable_llm.core.profiles import PROFILES, save_profiles
from switchable_llm.core.switching import added_params, base_params, make_switchable_
from switchable_llm.core.calibration import calibrate_, learn_ranges_

FILES = ('adapters.safetensors','switchable.json')
ALL = [('small', f) for f in FILES] + [('large', f) for f in (*FILES, 'trained.safetensors')]

class ToyGate(nn.Module):
    "The least that a gate is for a checkpoint."
    def __init__(self, n):
        super().__init__()
        self.n,self.w = n,nn.Parameter(torch.zeros(n))
        self.register_buffer('offset', torch.zeros(()))
    def spec(self): return dict(n=self.n)

@pytest.fixture(autouse=True)
def toy_gate(monkeypatch): monkeypatch.setitem(GATE_TYPES, 'ToyGate', ToyGate)

def content(model):
    "All that a checkpoint holds, as one comparable value."
    s,tensors = model.switch,{}
    for l,site in zip(s.layers, s.sites):
        for part in ADDED: tensors |= getattr(l, part).state_dict(prefix=f'{site.name}.{part}.')
    tensors = {n:t.detach().numpy().tobytes() for n,t in (tensors | base_params(model)).items()}
    grads = {n:p.requires_grad for n,p in [*added_params(model).items(), *base_params(model).items()]}
    rows = zip(s.layers, s.sites)
    loras = [(site.name, k, m.r, m.alpha, m.dropout.p) for l,site in rows for k,m in l.adapters.items()]
    profiles = {n:p.to_dict() for n,p in s.profiles.items()}
    return tensors, grads, loras, asdict(s.cfg), s.route_name, s.sites, profiles, s.bound

@pytest.fixture(scope='module')
def base(toy_folder): return load_model(toy_folder)[0]

@pytest.fixture(scope='module')
def checkpoints(base, tmp_path_factory):
    """Name -> a checkpoint with static ranges, two adapters and a mixed profile, and what it holds.
    The large one also has learned ranges, a gate, and a trained part of the base."""
    found = {}
    for name in ('small','large'):
        model = copy.deepcopy(base)
        make_switchable_(model, ['bw4','bw8','mixed8648'], QuantConfig(act='per_tensor'))
        calibrate_(model, [dict(input_ids=torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0)))])
        torch.manual_seed(0); add_adapters_(model, r=4)
        if name=='large':
            learn_ranges_(model); model.switch.layers[1].gates['bits'] = ToyGate(3)
            model.transformer.ln_f.requires_grad_(True)
            model.switch.layers[2].observers['8'].requires_grad_(False)
            with torch.no_grad():
                for n,p in added_params(model).items(): p.add_(.1*torch.randn_like(p))
                model.transformer.ln_f.weight.mul_(1.5)
        for p in adapter_params(model).values(): nn.init.normal_(p, std=.1)
        found[name] = save_switchable(model, tmp_path_factory.mktemp('good')/name), content(model)
    return found

@pytest.fixture(scope='module')
def checkpoint(checkpoints): return checkpoints['small']

def attempt(checkpoint, base, tmp_path, name, data):
    "Load the checkpoint with one file replaced; the model if that worked, after checking that it is the saved one."
    folder,want = checkpoint
    bad = tmp_path/'bad'
    if not bad.exists(): shutil.copytree(folder, bad)
    for f in folder.iterdir(): (bad/f.name).write_bytes(data if f.name==name else f.read_bytes())
    model = copy.deepcopy(base)
    try: load_switchable(bad, model)
    except (ValueError, FileNotFoundError) as e:
        assert 'bad' in str(e) and len(str(e))>20, e      # it names the checkpoint
        assert not hasattr(model, 'switch'), 'the model was changed'
        return None
    assert content(model)==want, 'another model, silently'
    return model

@pytest.mark.parametrize('kind', ('small','large'))
def test_the_sound_one_loads(kind, checkpoints, base, tmp_path):
    assert attempt(checkpoints[kind], base, tmp_path, None, None) is not None

@pytest.mark.parametrize('kind,name', ALL)
def test_changed_bytes(kind, name, checkpoints, base, tmp_path):
    checkpoint,many = checkpoints[kind],4 if kind=='small' else 1
    good,rng,harmless = (checkpoint[0]/name).read_bytes(),random.Random(name),0
    places = {0, 1, 7, 8, 9, len(good)-1, len(good)-2}
    places |= {rng.randrange(len(good)) for _ in range(75*many)}
    places |= {rng.randrange(min(len(good), 600)) for _ in range(25*many)}
    for at in sorted(places):
        for new in (good[at]^(1<<rng.randrange(8)), rng.randrange(256)):
            if new==good[at]: continue
            data = good[:at]+bytes([new])+good[at+1:]
            if attempt(checkpoint, base, tmp_path, name, data) is None: continue
            # what loads has one kind of white space for another
            changed = f'byte {at}: {good[at]} became {new}'
            assert name=='switchable.json' and json.loads(data)==json.loads(good), changed
            harmless += 1
    assert harmless<len(places)/4

@pytest.mark.parametrize('kind,name', ALL)
def test_cut_off(kind, name, checkpoints, base, tmp_path):
    checkpoint = checkpoints[kind]
    good,rng = (checkpoint[0]/name).read_bytes(),random.Random(name)
    for n in [0, 1, 7, 8, 9, len(good)-1] + [rng.randrange(len(good)) for _ in range(60 if kind=='small' else 15)]:
        assert attempt(checkpoint, base, tmp_path, name, good[:n]) is None, f'cut to {n} bytes of {len(good)}'

@pytest.mark.parametrize('kind,name', ALL)
def test_too_long_or_foreign(kind, name, checkpoints, base, tmp_path):
    checkpoint = checkpoints[kind]
    good = (checkpoint[0]/name).read_bytes()
    other = (checkpoint[0]/FILES[name==FILES[0]]).read_bytes()
    for data in (good+b'x', good+b'{}', b'\0'*len(good), b'null', b'[]', b'{}', b'{"format_version": "1"}',
                 b'{"format_version": null}', bytes(range(256)), other):
        assert attempt(checkpoint, base, tmp_path, name, data) is None, data[:40]

@pytest.mark.parametrize('kind', ('small','large'))
def test_a_file_of_another_checkpoint(kind, checkpoints, base, tmp_path):
    checkpoint = checkpoints[kind]
    model = load_switchable(checkpoint[0], copy.deepcopy(base))
    with torch.no_grad():
        next(iter(adapter_params(model).values())).view(-1)[0] += 1
        if kind=='large': model.transformer.ln_f.bias[0] += 1
    other = save_switchable(model, tmp_path/'other')
    for f in other.iterdir(): assert attempt(checkpoint, base, tmp_path, f.name, f.read_bytes()) is None

@pytest.mark.parametrize('kind,name', ALL)
def test_missing(kind, name, checkpoints, base, tmp_path):
    bad = tmp_path/'bad'; shutil.copytree(checkpoints[kind][0], bad); (bad/name).unlink()
    with pytest.raises(FileNotFoundError, match=name): load_switchable(bad, copy.deepcopy(base))

def test_no_checkpoint(tmp_path):
    for folder in (tmp_path/'nowhere', tmp_path/'file'):
        (tmp_path/'file').write_text('')
        with pytest.raises((FileNotFoundError, NotADirectoryError)): read_switchable(folder)

def rewritten(folder, to, change):
    "A copy whose description was changed and sealed anew, as a writer would."
    shutil.copytree(folder, to)
    d = json.loads((to/'switchable.json').read_text()); d.pop('checksum'); change(d)
    (to/'switchable.json').write_text(json.dumps(d|dict(checksum=_sealed(d))))
    return to

def test_one_of_the_first_format(checkpoint, base, tmp_path):
    "Without the keys that the first format did not have."
    old = rewritten(checkpoint[0], tmp_path/'old', lambda d: [d.pop(k) for k in ('gates','frozen')])
    assert read_switchable(old)['format_version']==1
    assert content(load_switchable(old, copy.deepcopy(base)))==checkpoint[1]

# --- from a stranger: sealed, and wrong ------------------------------------------------------------------------------

def places(x, path=()):
    "Paths to everything in a nest of mappings and lists."
    for k,v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield (*path, k)
        yield from places(v, (*path, k))

ODD = [None, True, False, -1, 0, 1, 3.5, 10**12, 10**30, 1e308, float('nan'), float('inf'), '', 'x', '*', '../x',
       'a'*5000, [], {}, [[]], ['x'], [['x', 'y']], dict(x=1), [None]*3]

def change_at(d, path, value):
    "Put a value there, or take out what is there."
    for k in path[:-1]: d = d[k]
    if value is KeyError: del d[path[-1]]
    else: d[path[-1]] = copy.deepcopy(value)

def state_of(model):
    params = {n:(id(p), p.requires_grad, p._version) for n,p in model.named_parameters()}
    return [(n, type(m)) for n,m in model.named_modules()], params

@pytest.mark.parametrize('kind,many', [('small', 400), ('large', 400)])
def test_a_description_with_anything_anywhere(kind, many, checkpoints, base, tmp_path):
    "Refused with the model as it was, or loaded whole; and nothing else, whatever a description says."
    good,rng,loaded = checkpoints[kind][0],random.Random(kind),0
    everywhere = list(places(json.loads((good/'switchable.json').read_text())))
    top = [p for p in everywhere if len(p)<3]
    model,bad = copy.deepcopy(base),shutil.copytree(good, tmp_path/'bad')
    before = state_of(model)
    for _ in range(many):
        path,value = rng.choice(rng.choice((everywhere, top))),rng.choice([*ODD, KeyError])
        rewritten(good, shutil.rmtree(bad) or bad, lambda d: change_at(d, path, value) if path[0]!='checksum' else None)
        try: load_switchable(bad, model)
        except ValueError as e: assert 'bad' in str(e) and state_of(model)==before, (path, value)
        else:
            loaded += 1
            model = copy.deepcopy(base); before = state_of(model)
    assert 0<loaded<many/2      # names, scalings and the like are free

@pytest.mark.parametrize('change,match', [
    (lambda d: d.update(format_version=0), 'format version is 0'),
    (lambda d: d.update(format_version=-1), 'format version is -1'),
    (lambda d: d.update(format_version=True), 'format version is True'),
    (lambda d: d.update(format_version=1.), r'format version is 1\.0'),
    (lambda d: d.update(route='layer'), "route is 'layer'"),
    (lambda d: d.update(route=None), 'route is None'),
    (lambda d: d['adapters'][0].update(r=10**9), r'tensor .*\.adapters\.4\.a is \[4, 32\].*\[1000000000, 32\]'),
    (lambda d: d['adapters'][0].update(r=True), 'adapters, 0, r is True'),
    (lambda d: d['adapters'][0].update(alpha=0), 'alpha=0'),
    (lambda d: d['adapters'][0].update(dropout=1), 'dropout=1'),
    (lambda d: d['adapters'][0].update(key='a.b'), "'a.b'"),
    (lambda d: d['adapters'].append(d['adapters'][0]), 'twice'),
    (lambda d: d['adapters'].pop(), 'has no place'),
    (lambda d: d['quantizer'].update(weight='per_row'), 'per_row'),
    (lambda d: d['quantizer'].update(speed=9), 'speed'),
    (lambda d: d['sites'].append(['transformer.h.7.attn.c_attn', 'attn_qkv']), 'other layers'),
    (lambda d: d['sites'].append(d['sites'][0]), 'each layer once'),
    (lambda d: d['profiles'].append(dict(name='bw4', default='w5')), "called 'bw4'"),
    (lambda d: d['profiles'][1].update(default='w40'), 'w=40'),
    (lambda d: d.update(frozen=['x.adapters.4.a']), 'x.adapters.4.a'),
    (lambda d: d.pop('base'), 'base'),
    (lambda d: d['base'].pop('sha256'), 'sha256')], ids=range(22))
def test_a_fault_is_named(change, match, checkpoint, base, tmp_path):
    model = copy.deepcopy(base); before = state_of(model)
    bad = rewritten(checkpoint[0], tmp_path/'bad', change)
    with pytest.raises(ValueError, match=match): load_switchable(bad, model)
    assert state_of(model)==before

def test_tensors_of_another_shape(checkpoint, base, tmp_path):
    "Sealed by a stranger: the file's own checksum is right too."
    changes = ((lambda t: t.pop(next(k for k in t if k.endswith('.adapters.4.a'))), r'adapters\.4\.a is missing'),
               (lambda t: t.update(extra=torch.zeros(1)), 'tensor extra has no place'),
               (lambda t: t.update({k:v.int() for k,v in t.items()}), 'int32'),
               (lambda t: t.update({k:v[None] for k,v in t.items()}), 'is needed'))
    for i,(change,match) in enumerate(changes):
        state = load_file(checkpoint[0]/'adapters.safetensors'); change(state)
        data = save_tensors(state); digest = hashlib.sha256(data).hexdigest()
        bad = rewritten(checkpoint[0], tmp_path/str(i), lambda d: d.update(tensors_sha256=digest))
        (bad/'adapters.safetensors').write_bytes(data)
        model = copy.deepcopy(base); before = state_of(model)
        with pytest.raises(ValueError, match=match): load_switchable(bad, model)
        assert state_of(model)==before

def test_a_model_that_is_switchable_already(checkpoint, base):
    model = load_switchable(checkpoint[0], copy.deepcopy(base))
    with pytest.raises(ValueError, match='switchable already'): load_switchable(checkpoint[0], model)
    assert content(model)==checkpoint[1]

def test_a_gate_of_an_unknown_type(checkpoints, base, monkeypatch):
    monkeypatch.delitem(GATE_TYPES, 'ToyGate'); model = copy.deepcopy(base)
    with pytest.raises(ValueError, match='ToyGate.*import the module'): load_switchable(checkpoints['large'][0], model)
    assert not hasattr(model, 'switch')

def test_a_base_of_another_shape(checkpoints, base, toy_folder):
    folder = checkpoints['large'][0]
    with pytest.raises(ValueError, match='has transformer.ln_f.bias as .*bfloat16'):
        load_switchable(folder, copy.deepcopy(base).to(torch.bfloat16))
    other = copy.deepcopy(base)
    with torch.no_grad(): other.transformer.ln_f.weight.mul_(3)         # it is replaced: nothing is wrong with it
    assert content(load_switchable(folder, other))==checkpoints['large'][1]
    other = copy.deepcopy(base)
    with torch.no_grad(): other.transformer.h[0].ln_1.weight.mul_(3)
    with pytest.raises(ValueError, match='other weights'): load_switchable(folder, other)

def test_a_target_that_cannot_be_written(checkpoint, base, tmp_path):
    model = load_switchable(checkpoint[0], copy.deepcopy(base))
    (tmp_path/'file').write_text('mine')
    with pytest.raises(OSError): save_switchable(model, tmp_path/'file'/'model')
    with pytest.raises(OSError): save_profiles([PROFILES['bw4']], tmp_path/'file'/'p.json')
    assert (tmp_path/'file').read_text()=='mine' and [f.name for f in tmp_path.iterdir()]==['file']
