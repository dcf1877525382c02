"The shape of the project: who imports whom, what is documented, what is in the repository."
import ast, importlib, inspect, re, subprocess, sys
from graphlib import TopologicalSorter
from pathlib import Path
import pytest
from fastcore.docments import docments

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'scripts'))
import project

LIB = ROOT/'switchable_llm'
GENERATED = {'__init__', '_modidx'}
def file_of(module): return LIB/f"{module.replace('.', '/')}.py"
FILES = [p for p in LIB.rglob('*.py') if p.stem not in GENERATED]
MODULES = sorted('.'.join(p.relative_to(LIB).with_suffix('').parts) for p in FILES)

# What stands before what. A module may import its own group, as long as nothing goes in a circle, and what is before it.
ORDER = [{'system'}, {'quantizers'}, {'attention'}, {'core'}, {'lora_routing'}, {'models'}, {'data'},
         {'joint_training','training'}, {'profiles_eval','search'}, {'cpt','adversarial'}, {'serving'}, {'server'}, {'formats'},
         {'study'}, {'findings'}, {'report'}, {'apps'}, {'explorer'}]
SERVING = {'system','quantizers','attention','core','lora_routing','models','data','serving','server'}   # all that a server imports

def group(module): return next(i for i,g in enumerate(ORDER) if module.split('.')[0] in g)

def package(path): return ['switchable_llm', *path.relative_to(LIB).parts[:-1]] if path.is_relative_to(LIB) else []

def imports(path):
    "Full names of the modules that a file imports anywhere, functions included: `[(line, name, imported names)]`."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            for a in node.names: yield node.lineno, a.name, []
        if isinstance(node, ast.ImportFrom):
            here = package(path)
            above = here[:len(here)+1-node.level]*bool(node.level)
            base = '.'.join(filter(None, [*above, node.module]))
            names = [a.name for a in node.names]
            inner = [n for n in names if f'{base}.{n}'.removeprefix('switchable_llm.') in MODULES]
            if inner:
                for n in inner: yield node.lineno, f'{base}.{n}', []
            else: yield node.lineno, base, names

def uses(path):
    "Modules of this package that a file imports."
    return {name.removeprefix('switchable_llm.') for _,name,_ in imports(path) if name.startswith('switchable_llm.')}

STORIES = {'index.ipynb', 'how.ipynb', 'apps/tools.ipynb', 'server/many.ipynb'}   # they show, and export nothing

def test_notebooks_and_modules_belong_together():
    names = {project.module_of(nb): nb for nb in project.notebooks() if project.name_of(nb) not in STORIES}
    assert set(names)==set(MODULES)
    for module,nb in names.items():
        assert re.sub(r'(^|/)\d+_', r'\1', project.name_of(nb)).removesuffix('.ipynb').replace('/', '.')==module

def test_a_part_is_small(): assert {p.title: len(p.rooms) for p in project.PARTS if len(p.rooms)>9}=={}

@pytest.mark.parametrize('module', MODULES)
def test_a_room_is_one_sitting(module):
    "At most 400 exported lines; empty ones, and those that say which cell a line is from, are not read."
    lines = [l for l in file_of(module).read_text(encoding='utf-8').splitlines() if l.strip() and not l.startswith('# %%')]
    assert len(lines)<=400

@pytest.mark.parametrize('module', MODULES)
def test_no_private_name_leaves_its_room(module):
    private = [f'{name}.{n}' for _,name,names in imports(file_of(module)) for n in names if n.startswith('_')]
    assert not [p for p in private if p.startswith('switchable_llm.')]

# --- lines ----------------------------------------------------------------------------------------------------------

def code_lines():
    "`(file, line)` of code: notebooks' cells, scripts, tests, benchmarks and C++."
    for nb in project.notebooks():
        for c in project.read_cells(nb):
            if c['cell_type']=='code': yield from ((nb, l) for l in c['source'].splitlines())
    for pattern in ('scripts/**/*.py', 'benchmarks/*.py', 'tests/*.py', 'csrc/*.[ch]*', 'setup.py'):
        for p in ROOT.glob(pattern): yield from ((p, l) for l in p.read_text(encoding='utf-8').splitlines())

def may_be_long(line): return '://' in line or line.lstrip().startswith('|')   # an address, an entry of a table

def test_lines_are_short():
    "At most 3 % of lines are longer than 120 characters, and none is longer than 140 but an address or a table's entry."
    lines = list(code_lines())
    assert not [f'{p.name}: {l[:60]}…' for p,l in lines if len(l)>140 and not may_be_long(l)]
    assert sum(len(l)>120 for _,l in lines)<=.03*len(lines)

def upward(module, used):
    "What `module` imports and may not."
    def allowed(u): return module.split('.')[0] not in ('serving','server') or u.split('.')[0] in SERVING
    return {u for u in used if group(u)>group(module) or not allowed(u)}

@pytest.mark.parametrize('module', MODULES)
def test_imports_point_down(module): assert not upward(module, uses(file_of(module)))

def test_imports_go_in_no_circle():
    graph = {m: uses(file_of(m)) for m in MODULES}
    TopologicalSorter(graph).prepare()

def test_an_upward_import_is_seen(tmp_path):
    f = tmp_path/'m.py'
    for line in ('from switchable_llm.apps.cli import main', 'import switchable_llm.apps.cli',
                 'from switchable_llm.apps import cli', 'def f():\n    from switchable_llm.apps.cli import main'):
        f.write_text(line)
        assert uses(f)=={'apps.cli'} and upward('core.switching', uses(f)), line
    assert upward('serving.lean', {'training.settings'}) and not upward('serving.lean', {'serving.kernels','system.files'})

@pytest.mark.parametrize('module', MODULES)
def test_no_star_imports_and_no_nbdev(module):
    for line,name,names in imports(file_of(module)):
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
    for name,f in list(vars(cls).items()):   # a copy: pydantic's models keep notes there while they are looked at
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

# --- notebooks as GitHub shows them ---------------------------------------------------------------------------------

_marked = re.compile(r'```.*?```|`[^`\n]*`', flags=re.S)   # code, which stands as it is

def texts_of(cell):
    "Markdown and HTML that a cell shows, without the code in it."
    shown = [cell['source']] if cell['cell_type']=='markdown' else []
    data = [o.get('data', {}) for o in cell.get('outputs', [])]
    shown += [''.join(d[k]) for d in data for k in ('text/markdown','text/html') if k in d]
    return [_marked.sub('', t) for t in shown]

def unreadable(cells, size=0):
    "What a reader of the notebook itself stumbles over: GitHub shows each cell alone, and knows nothing of Quarto's marks."
    if cells[0]['cell_type']!='markdown' or not cells[0]['source'].startswith('# '): yield 'does not begin with a title'
    if size>=400_000: yield f'{size:,} bytes: GitHub may not show it'
    text = '\n'.join(c['source'] for c in cells if c['cell_type']=='markdown')
    titled = len(re.findall(r'^\*\*.+\*\* <!-- folded -->$', text, flags=re.M))
    folds = titled,text.count('<!-- folded -->'),text.count('<!-- end of folded -->')
    if len({*folds})>1: yield f'{folds}: folded parts that begin with a bold title, begin, and end'
    for i,c in enumerate(cells):
        for t in texts_of(c):
            yield from (f'cell {i}: {m}: only the site knows it' for m in re.findall(r'@(?:fig|tbl|eq|sec|lst)-[\w-]+|:::.*', t))
            if len(re.findall(r'<details\b', t))!=t.count('</details>'): yield f'cell {i}: <details> begins or ends in another cell'

def test_notebooks_can_be_read_on_github():
    found = {project.name_of(nb): [*unreadable(project.read_cells(nb), nb.stat().st_size)] for nb in project.notebooks()}
    assert len(found)>100 and not {n: f for n,f in found.items() if f}

def of(source, kind='markdown', **more): return dict(cell_type=kind, source=source, **more)

@pytest.mark.parametrize('cells,said', [
    ([of('# T'), of('See `@fig-a` and\n```\n:::\n```\n<details><summary>a</summary>b</details>'), of('@fig-x', 'code')], None),
    ([of('#| default_exp x', 'code'), of('# T')], 'title'), ([of('Words')], 'title'), ([of('# T'), of('See @fig-a.')], '@fig-a'),
    ([of('# T'), of('::: {.callout-note}\na\n:::')], ':::'), ([of('# T'), of('<details><summary>a'), of('</details>')], 'another cell'),
    ([of('# T'), of('**A** <!-- folded -->'), of('b')], 'folded'), ([of('# T'), of('A <!-- folded -->\n<!-- end of folded -->')], 'folded'),
    ([of('# T'), of('f()', 'code', outputs=[dict(data={'text/markdown': ['see ', '@tbl-b']})])], '@tbl-b')])
def test_what_github_does_not_show_is_seen(cells, said):
    found = [*unreadable(cells)]
    assert any(said in f for f in found) if said else not found
    assert any('bytes' in f for f in unreadable(cells, 400_000))

# --- the repository -------------------------------------------------------------------------------------------------

def tracked():
    "Files that git has, or would have; without git, every file outside hidden folders."
    ours = ['git', 'ls-files', '-co', '--exclude-standard', '-z']
    out = subprocess.run(ours, cwd=ROOT, capture_output=True, text=True)
    def hidden(p): return any(s.startswith('.') for s in p.relative_to(ROOT).parts[:-1])
    if out.returncode==0: files = [ROOT/f for f in out.stdout.split('\0') if f]
    else: files = [p for p in ROOT.rglob('*') if not hidden(p)]
    return [p for p in files if p.is_file()]

def test_no_large_files(): assert not [p.name for p in tracked() if p.stat().st_size>4_000_000]

# A home, a mount, a temporary file, an environment's packages: none of them is there on another machine.
machine_path = re.compile(r'(?<![\w.:/~-])/(?:work|root|home|Users|mnt|opt|srv)/\w|'
                          r'/tmp/(?:tmp|ipykernel|pytest)\w|/site-packages/\w')

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
