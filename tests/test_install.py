"What gets installed: locks, ranges, builds of PyTorch, the wheel, and what the workflows may do."
import ast, re, shutil, subprocess, sys, zipfile
from importlib import metadata
import pytest, torch, yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from conftest import ROOT
sys.path.insert(0, str(ROOT/'scripts'))
import install, lock

LOCKS = sorted(p.stem for p in lock.LOCKS.glob('*.lock'))

def pins(name):
    "Each package of a lock: `{(name, marker): version}`."
    found = {}
    for e in lock.entries((lock.LOCKS/f'{name}.lock').read_text(encoding='utf-8').partition('\n')[2]):
        r = Requirement(e.splitlines()[0].removesuffix(' \\'))
        version, = r.specifier
        assert version.operator=='==' and '--hash=sha256:' in e, e
        found[r.name,str(r.marker or '')] = version.version
    return found

@pytest.mark.parametrize('name', LOCKS)
def test_a_lock_is_exact_and_holds_no_build_of_pytorch(name):
    names = {n for n,_ in pins(name)}
    assert {'transformers','numpy','filelock'}<=names
    assert not [n for n in names if n in ('torch','triton') or n.startswith(('nvidia-','cuda-'))]

def test_what_users_get_is_what_was_tested():
    versions = lambda pins: {(n,v) for (n,_),v in pins.items()}
    assert versions(pins('run'))<=versions(pins('dev'))

@pytest.mark.parametrize('name', [*LOCKS,'torch'])
def test_locked_versions_are_in_the_range(name):
    locked = {n:v for (n,_),v in pins(name).items()} if name!='torch' else {}
    if name=='torch': locked['torch'] = Requirement(lock.TORCH.read_text().splitlines()[-1]).specifier
    for r in map(Requirement, lock.requirements('study', 'gguf', 'torchao')):
        if name=='torch' and r.name=='torch': assert r.specifier.contains(next(iter(locked['torch'])).version)
        elif r.name in locked: assert r.specifier.contains(locked[r.name]), r

def test_the_lowest_versions_are_those_of_the_range():
    assert lock.LOWEST.read_text(encoding='utf-8')==lock.HEADER+'\n'.join(lock.lowest())+'\n'
    asked = map(Requirement, lock.requirements('study', 'gguf', 'torchao'))
    for low,r in zip(map(Requirement, lock.lowest()), asked, strict=True):
        assert r.specifier.contains(next(iter(low.specifier)).version) and low.name==r.name

def test_every_import_is_a_dependency():
    "Of the library's modules, by the distributions that hold what they import."
    def names_of(*extras): return {canonicalize_name(Requirement(r).name) for r in lock.requirements(*extras)}
    holders,base,study,page = metadata.packages_distributions(),names_of(),names_of('study', 'ray'),names_of('study', 'explore')
    server,cluster = names_of('serve'),names_of('serve', 'ray')
    serves = 'core','serving','training','quantizers.py','lora_routing.py','joint_training.py','__init__.py'
    for path in (ROOT/'switchable_llm').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            names = []
            if isinstance(node, ast.Import): names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
            for top in {n.partition('.')[0] for n in names}-{'switchable_llm'}-set(sys.stdlib_module_names):
                at = path.relative_to(ROOT/'switchable_llm').parts[0]
                have = page if at=='explorer' else base if at in serves else study
                if at=='server': have = cluster if path.name=='cluster.py' else server
                assert {canonicalize_name(h) for h in holders[top]}&have, f'{path.name} imports {top}'

# --- PyTorch --------------------------------------------------------------------------------------------------------

def test_no_cuda_packages_beside_a_build_for_processors():
    found = [d.name for d in metadata.distributions() if (d.name or '').lower().startswith(('nvidia-','cuda-'))]
    assert torch.version.cuda or not found

def test_cuda_is_seen_in_what_pip_would_install():
    report = lambda *names: dict(install=[dict(metadata=dict(name=n)) for n in names])
    assert install.brings_cuda(report('torch', 'nvidia-cublas')) and install.brings_cuda(report('cuda-toolkit'))
    assert not install.brings_cuda(report('torch', 'sympy')) and not install.brings_cuda(report())

@pytest.mark.skipif(sys.platform!='linux', reason='the choice is made on Linux')
@pytest.mark.parametrize('gpu', [False, True])
def test_the_build_is_chosen_by_what_the_machine_has(gpu, tmp_path, monkeypatch):
    "pip would bring CUDA: fine with a GPU; without one uv is asked for the build for processors."
    driver,ran = tmp_path/'driver',[]
    if gpu: driver.touch()
    class Answer: stdout = '{"install": [{"metadata": {"name": "nvidia-cublas"}}]}'
    monkeypatch.setattr(install, 'DRIVERS', [driver])
    monkeypatch.setattr(install.subprocess, 'run', lambda cmd, **kw: ran.append(cmd[2:]) or Answer)
    install.install_torch('torch==1')
    if gpu: assert ran==[['pip', 'install', '--quiet', 'torch==1']]
    else: assert [c[0] for c in ran]==['pip', 'pip', 'uv'] and ran[-1][-3:]==['--torch-backend', 'cpu', 'torch==1']

def test_an_unknown_name_says_which_there_are():
    with pytest.raises(SystemExit, match='fast: needs one of .*dev.*run.*lowest'): install.main('fast')

# --- the wheel ------------------------------------------------------------------------------------------------------

def test_a_wheel_is_built_also_without_a_compiler(tmp_path):
    "From a tree without kernels' sources, so that their compilation fails at once."
    src = tmp_path/'src'
    src.mkdir()
    for f in ('pyproject.toml','setup.py','README.md','LICENSE'): shutil.copy(ROOT/f, src)
    shutil.copytree(ROOT/'switchable_llm', src/'switchable_llm', ignore=shutil.ignore_patterns('*.so', '__pycache__'))
    quiet = ['--quiet', '--no-deps', '--no-build-isolation']
    cmd = [sys.executable, '-m', 'pip', 'wheel', *quiet, '--wheel-dir', tmp_path, src]
    p = subprocess.run(cmd, capture_output=True, text=True)
    assert p.returncode==0, p.stderr
    wheel, = tmp_path.glob('switchable_llm-*.whl')
    with zipfile.ZipFile(wheel) as z:
        assert z.testzip() is None
        names = set(z.namelist())
        points = z.read(next(n for n in names if n.endswith('entry_points.txt'))).decode()
        assert 'switchable-llm = switchable_llm.apps.cli:main' in points
    files = [p for p in (ROOT/'switchable_llm').rglob('*') if p.is_file() and '__pycache__' not in p.parts]
    package = {p.relative_to(ROOT).as_posix() for p in files if p.suffix!='.so'}
    assert package<=names and any(n.startswith('switchable_llm/tiny/') for n in names)

# --- workflows ------------------------------------------------------------------------------------------------------

WORKFLOWS = sorted((ROOT/'.github/workflows').glob('*.yml'))

@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda p: p.name)
def test_actions_are_pinned_and_may_do_little(path):
    "An action is a commit, with its version in a comment; only the job that deploys may write or have a token."
    used = re.findall(r'uses: *(.+)', path.read_text(encoding='utf-8'))
    assert used and all(re.fullmatch(r'[\w-]+/[\w./-]+@[0-9a-f]{40} # v\d[\d.]*', u) for u in used), used
    flow = yaml.safe_load(path.read_text(encoding='utf-8'))
    assert flow['permissions']==dict(contents='read')
    for job in flow['jobs'].values():
        steps = ' '.join(s.get('uses', '') for s in job['steps'])
        assert ('permissions' in job)==('deploy-pages' in steps)
        if 'permissions' not in job: continue
        assert job['permissions']=={'pages': 'write', 'id-token': 'write'} and 'checkout' not in steps

def test_both_ends_of_the_range_are_run_each_week():
    text = (ROOT/'.github/workflows/range.yml').read_text(encoding='utf-8')
    matrix = yaml.safe_load(text)['jobs']['range']['strategy']['matrix']
    assert {x['versions'] for x in matrix['include']}=={'newest','lowest'}
    assert 'schedule' in text and 'workflow_dispatch' in text
