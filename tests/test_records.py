"Records stay in their folder, and say which commit made them only if it was one of this package."
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest
import switchable_llm
from switchable_llm.study.records import environment, known_record, load_records, save_record

PACKAGE = Path(switchable_llm.__file__).parent
RECORD = dict(preset='p', experiment='e', name='n', seed=0, config={})
NAMES = ['../x', '..', '.', '/x', '/', 'a/b', 'a\\b', 'C:x', '', ' ', 'x ', 'x.', '.x', 'a\0b', 'a\nb', 'x*',
         'x?', 'a<b',
         '"x"', 'a|b', 'x'*201, None, 3, ['x'], Path('x')]

@pytest.mark.parametrize('name', NAMES, ids=repr)
@pytest.mark.parametrize('key', ['preset','experiment','name'])
def test_names(tmp_path, key, name):
    root = tmp_path/'a/b/c/results'
    with pytest.raises(ValueError, match=f'^{key}='): save_record(RECORD | {key:name}, root)
    with pytest.raises(ValueError, match=f'^{key}='): known_record(root, **RECORD | {key:name})
    if key!='name' and name is not None:
        with pytest.raises(ValueError, match=f'^{key}='): load_records(root, **{key:name})
    assert not list(tmp_path.rglob('*'))

@pytest.mark.parametrize('seed', ['0', '../0', 0., None, True, [0]], ids=repr)
def test_seeds(tmp_path, seed):
    with pytest.raises(ValueError, match='^seed='): save_record(RECORD | dict(seed=seed), tmp_path)
    assert not list(tmp_path.rglob('*'))

def test_names_that_are_fine(tmp_path):
    "All names of the study, and those of other languages; a seed may be negative."
    fine = ('random_profile-per_tensor-learned-nested', 'static_high=cyclic', 'with_highest+js_highest', 'w4a8',
            'größe 2',
            'a.b', '[x]')
    for i,name in enumerate(fine):
        r = RECORD | dict(preset=name, experiment=name, name=name, seed=-i)
        assert save_record(r, tmp_path)==tmp_path/name/name/f'{name}-s{-i}.json'
        read, = load_records(tmp_path, name, name)
        assert read.items()>=r.items() and known_record(tmp_path, name, name, name, -i, {})==read
    for f in (Path(__file__).parents[1]/'results').glob('*/*/*.json'):
        r = json.loads(f.read_bytes())
        assert known_record(f.parents[2], r['preset'], r['experiment'], r['name'], r['seed'], r.get('config'))==r

SEEDLESS = json.dumps({k:v for k,v in RECORD.items() if k!='seed'}).encode()
@pytest.mark.parametrize('data', [
    b'', b'{', b'\xff\xfe\x00', b'[]', b'3', b'null', b'"x"', b'{}', SEEDLESS, b'['*100_000])
def test_broken_files_are_named(tmp_path, data):
    save_record(RECORD | dict(name='sound'), tmp_path)
    bad = tmp_path/'p/e/n-s0.json'; bad.write_bytes(data)
    for read in (lambda: load_records(tmp_path), lambda: known_record(tmp_path, **RECORD)):
        with pytest.raises(ValueError, match=f'{bad}: not a record'): read()

def test_a_folder_is_no_record(tmp_path):
    (tmp_path/'p/e/n-s0.json').mkdir(parents=True)
    with pytest.raises(ValueError, match='n-s0.json: not a record'): load_records(tmp_path)

def git(*args, at):
    me = 'git', '-c', 'user.name=x', '-c', 'user.email=x@y'
    return subprocess.run([*me, *args], cwd=at, capture_output=True, text=True, check=True).stdout.strip()

@pytest.mark.skipif(not shutil.which('git'), reason='git is not here')
def test_whose_commit(tmp_path, monkeypatch):
    "The package's own: not that of the current folder, of a hook, or of a project that holds the package."
    other = tmp_path/'other'; other.mkdir(); git('init', '-q', at=other)
    (other/'.gitignore').write_text('env\n'); git('add', '.', at=other); git('commit', '-qm', 'x', at=other)
    ls = subprocess.run(['git','ls-files','--error-unmatch','__init__.py'], cwd=PACKAGE, capture_output=True)
    tracked = ls.returncode==0
    own = git('rev-parse', 'HEAD', at=PACKAGE) if tracked else None
    monkeypatch.chdir(other); monkeypatch.setenv('GIT_DIR', str(other/'.git'))
    assert environment()['commit']==own!=git('rev-parse', 'HEAD', at=other)
    monkeypatch.setenv('PATH', '')
    assert environment()['commit'] is None                                          # no git, no commit
    monkeypatch.undo()
    shutil.copytree(PACKAGE, other/'env/switchable_llm', ignore=shutil.ignore_patterns('__pycache__'))
    code = "from switchable_llm.study.records import environment; print(environment()['commit'])"
    env = {**os.environ, 'PYTHONPATH': str(other/'env'), 'OMP_NUM_THREADS': '1'}
    run = subprocess.run([sys.executable, '-c', code], cwd=other, capture_output=True, text=True, check=True, env=env)
    out = run.stdout
    # installed below a project, it is not of it
    assert out.split()[-1]=='None'

def test_a_setting_that_is_told_twice_is_said_once(tmp_path):
    save_record(RECORD | dict(config=dict(preset=dict(steps=2), steps=2)), tmp_path)
    with pytest.raises(ValueError, match=r'other settings \(steps=2, now 3\)'):
        known_record(tmp_path, **RECORD | dict(config=dict(preset=dict(steps=3), steps=3)))
