"A damaged checkpoint is an error that says so; never a model that is silently another."
import copy, json, random, shutil
from dataclasses import asdict
import pytest, torch
from torch import nn
from switchable_llm.data import load_model
from switchable_llm.lora_routing import adapter_params, add_adapters_, load_switchable, read_switchable, save_switchable
from switchable_llm.quantizers import QuantConfig
from switchable_llm.switching import calibrate_, make_switchable_, save_profiles, PROFILES

FILES = ('adapters.safetensors','switchable.json')

def content(model):
    "All that a checkpoint holds, as one comparable value."
    s = model.switch
    tensors = {f'{site.name}.{part}.{k}':v.numpy().tobytes() for l,site in zip(s.layers, s.sites) for part in ('adapters','observers') for k,v in getattr(l, part).state_dict().items()}
    loras = [(site.name, k, m.r, m.alpha, m.dropout.p) for l,site in zip(s.layers, s.sites) for k,m in l.adapters.items()]
    return tensors, loras, asdict(s.cfg), s.route_name, s.sites, {n:p.to_dict() for n,p in s.profiles.items()}, s.bound

@pytest.fixture(scope='module')
def base(toy_folder): return load_model(toy_folder)[0]

@pytest.fixture(scope='module')
def checkpoint(base, tmp_path_factory):
    "A checkpoint with static ranges, two adapters and a mixed profile; its folder, and what it holds."
    model = copy.deepcopy(base)
    make_switchable_(model, ['bw4','bw8','mixed8648'], QuantConfig(act='per_tensor'))
    calibrate_(model, [dict(input_ids=torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(0)))])
    torch.manual_seed(0); add_adapters_(model, r=4)
    for p in adapter_params(model).values(): nn.init.normal_(p, std=.1)
    return save_switchable(model, tmp_path_factory.mktemp('good')/'model'), content(model)

def attempt(checkpoint, base, tmp_path, name, data):
    "Load the checkpoint with one file replaced; the model if that worked, after checking that it is the saved one."
    folder,want = checkpoint
    bad = tmp_path/'bad'
    if not bad.exists(): shutil.copytree(folder, bad)
    for f in FILES: (bad/f).write_bytes(data if f==name else (folder/f).read_bytes())
    model = copy.deepcopy(base)
    try: load_switchable(bad, model)
    except (ValueError, FileNotFoundError) as e:
        assert 'bad' in str(e) and len(str(e))>20, e      # it names the checkpoint
        assert not hasattr(model, 'switch'), 'the model was changed'
        return None
    assert content(model)==want, 'another model, silently'
    return model

def test_the_sound_one_loads(checkpoint, base, tmp_path): assert attempt(checkpoint, base, tmp_path, None, None) is not None

@pytest.mark.parametrize('name', FILES)
def test_changed_bytes(name, checkpoint, base, tmp_path):
    good,rng,harmless = (checkpoint[0]/name).read_bytes(),random.Random(name),0
    places = {0, 1, 7, 8, 9, len(good)-1, len(good)-2} | {rng.randrange(len(good)) for _ in range(300)} | {rng.randrange(min(len(good), 600)) for _ in range(100)}
    for at in sorted(places):
        for new in (good[at]^(1<<rng.randrange(8)), rng.randrange(256)):
            if new==good[at]: continue
            data = good[:at]+bytes([new])+good[at+1:]
            if attempt(checkpoint, base, tmp_path, name, data) is None: continue
            assert name=='switchable.json' and json.loads(data)==json.loads(good), f'byte {at}: {good[at]} became {new}'   # one kind of white space for another
            harmless += 1
    assert harmless<len(places)/4

@pytest.mark.parametrize('name', FILES)
def test_cut_off(name, checkpoint, base, tmp_path):
    good,rng = (checkpoint[0]/name).read_bytes(),random.Random(name)
    for n in [0, 1, 7, 8, 9, len(good)-1] + [rng.randrange(len(good)) for _ in range(60)]:
        assert attempt(checkpoint, base, tmp_path, name, good[:n]) is None, f'cut to {n} bytes of {len(good)}'

@pytest.mark.parametrize('name', FILES)
def test_too_long_or_foreign(name, checkpoint, base, tmp_path):
    good = (checkpoint[0]/name).read_bytes()
    for data in (good+b'x', good+b'{}', b'\0'*len(good), b'null', b'[]', b'{}', b'{"format_version": "1"}', b'{"format_version": null}', bytes(range(256)), (checkpoint[0]/FILES[name==FILES[0]]).read_bytes()):
        assert attempt(checkpoint, base, tmp_path, name, data) is None, data[:40]

def test_a_file_of_another_checkpoint(checkpoint, base, tmp_path):
    model = load_switchable(checkpoint[0], copy.deepcopy(base))
    with torch.no_grad(): next(iter(adapter_params(model).values())).view(-1)[0] += 1
    other = save_switchable(model, tmp_path/'other')
    for name in FILES: assert attempt(checkpoint, base, tmp_path, name, (other/name).read_bytes()) is None

def test_missing(checkpoint, base, tmp_path):
    for name in FILES:
        bad = tmp_path/name.split('.')[0]; shutil.copytree(checkpoint[0], bad); (bad/name).unlink()
        with pytest.raises(FileNotFoundError, match=name): load_switchable(bad, copy.deepcopy(base))
    for folder in (tmp_path/'nowhere', tmp_path/'file'):
        (tmp_path/'file').write_text('')
        with pytest.raises((FileNotFoundError, NotADirectoryError)): read_switchable(folder)

def test_a_target_that_cannot_be_written(checkpoint, base, tmp_path):
    model = load_switchable(checkpoint[0], copy.deepcopy(base))
    (tmp_path/'file').write_text('mine')
    with pytest.raises(OSError): save_switchable(model, tmp_path/'file'/'model')
    with pytest.raises(OSError): save_profiles([PROFILES['bw4']], tmp_path/'file'/'p.json')
    assert (tmp_path/'file').read_text()=='mine' and [f.name for f in tmp_path.iterdir()]==['file']
