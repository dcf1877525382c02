"The shape of the project: who imports whom, what is documented, what is in the repository."
import ast, importlib, inspect, re, subprocess
from pathlib import Path
import pytest
from fastcore.docments import docments

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT/'switchable_llm'
GENERATED = {'__init__', '_modidx'}
MODULES = sorted(p.stem for p in LIB.glob('*.py') if p.stem not in GENERATED)

def chapters():
    "Exported modules in the order of their notebooks."
    found = []
    for nb in sorted((ROOT/'nbs').glob('[!_.]*.ipynb')):
        found += re.findall(r'"#\s*\|\s*default_exp\s+(\w+)', nb.read_text(encoding='utf-8'))
    return found

def imports(path):
    "Full names of the modules that a file imports anywhere, functions included: `[(line, name, imported names)]`."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            for a in node.names: yield node.lineno, a.name, []
        if isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['switchable_llm' if node.level else '', node.module or '']))
            names = [a.name for a in node.names]
            if base=='switchable_llm':
                for n in names: yield node.lineno, f'{base}.{n}' if n in MODULES else base, []
            else: yield node.lineno, base, names

def uses(path):
    "Chapters that a file imports."
    return {name.split('.')[1] for _,name,_ in imports(path) if name.startswith('switchable_llm.')}

def test_there_are_modules(): assert MODULES and set(MODULES)<=set(chapters()), 'a module without a notebook'

@pytest.mark.parametrize('module', MODULES)
def test_imports_only_chapters_above(module):
    order = chapters()
    below = set(order[order.index(module):])
    assert not uses(LIB/f'{module}.py') & below

def test_an_upward_import_is_seen(tmp_path):
    f = tmp_path/'m.py'
    for line in ('from switchable_llm.cli import main', 'import switchable_llm.cli', 'from .cli import main', 'def f():\n    from switchable_llm.cli import main'):
        f.write_text(line)
        assert uses(f)=={'cli'}, line

@pytest.mark.parametrize('module', MODULES)
def test_no_star_imports_and_no_nbdev(module):
    for line,name,names in imports(LIB/f'{module}.py'):
        assert '*' not in names, f'{module}.py:{line}: star import'
        assert name.split('.')[0] not in ('nbdev','execnb','ghapi'), f'{module}.py:{line}: {name} at run time'

# --- documentation --------------------------------------------------------------------------------------------------

def undocumented(name, f):
    "What a function's documentation lacks."
    if not inspect.getdoc(f): yield f'{name} has no docstring'
    doc = docments(f, full=True, returns=False)
    for p,q in inspect.signature(f).parameters.items():
        if q.kind in (q.VAR_POSITIONAL, q.VAR_KEYWORD): continue   # docments passes over the comments of * and **
        if p not in ('self','cls') and not (p in doc and doc[p].docment): yield f'{name}: parameter {p} has no docment'

def own_methods(cls):
    "Public methods that a class adds; an override is documented by what it overrides."
    for name,f in vars(cls).items():
        f = getattr(f, '__func__', f)
        overrides = any(hasattr(b, name) for b in cls.__mro__[1:])
        if inspect.isfunction(f) and not name.startswith('_') and not overrides: yield name,f

def own_init(cls):
    "The `__init__` written in the class; one that a decorator made has its parameters on the fields."
    f = vars(cls).get('__init__')
    return f if inspect.isfunction(f) and not hasattr(cls, '__dataclass_fields__') else None

def problems(mod):
    "What the documentation of a module's exported names lacks."
    for name in mod.__all__:
        o = getattr(mod, name)
        if inspect.isfunction(o): yield from undocumented(name, inspect.unwrap(o))
        if not inspect.isclass(o): continue
        if not (o.__doc__ or '').strip(): yield f'{name} has no docstring'
        for m,f in own_methods(o): yield from undocumented(f'{name}.{m}', inspect.unwrap(f))
        if own_init(o): yield from (p for p in undocumented(name, own_init(o)) if 'docstring' not in p)

@pytest.mark.parametrize('module', MODULES)
def test_exported_names_are_documented(module):
    assert not list(problems(importlib.import_module(f'switchable_llm.{module}')))

# --- the repository -------------------------------------------------------------------------------------------------

def tracked():
    "Files that git has, or would have; without git, every file outside hidden folders."
    out = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, capture_output=True, text=True)
    if out.returncode==0: files = [ROOT/f for f in out.stdout.split('\0') if f]
    else: files = [p for p in ROOT.rglob('*') if not any(s.startswith('.') for s in p.relative_to(ROOT).parts[:-1])]
    return [p for p in files if p.is_file()]

def test_no_large_files(): assert not [p.name for p in tracked() if p.stat().st_size>4_000_000]

# A home, a mount, a temporary file, an environment's packages: none of them is there on another machine.
machine_path = re.compile(r'(?<![\w.:/~-])/(?:work|root|home|Users|mnt|opt|srv)/\w|/tmp/(?:tmp|ipykernel|pytest)\w|/site-packages/\w')

def machine_paths(text): return machine_path.findall(text) + ([str(ROOT)] if len(ROOT.parts)>2 and str(ROOT) in text else [])

def test_no_machine_paths():
    found = []
    for p in tracked():
        try: text = p.read_text(encoding='utf-8')
        except UnicodeDecodeError: continue
        found += [f'{p.relative_to(ROOT)}: {m}' for m in machine_paths(text)]
    assert not found

@pytest.mark.parametrize('top', ['root', 'home', 'Users'])
def test_a_machine_path_is_seen(top):
    assert machine_paths(f'open("/{top}/someone/data.json")')
    assert not machine_paths(f'https://example.org/{top}/page and 1/{top}/2')

def test_version_is_one():
    import switchable_llm
    ini = re.search(r'^version\s*=\s*(\S+)', (ROOT/'settings.ini').read_text(), flags=re.M)[1]
    cff = re.search(r'^version:\s*(\S+)', (ROOT/'CITATION.cff').read_text(), flags=re.M)[1]
    assert switchable_llm.__version__==ini==cff
