"nbdev's processing of the notebooks into `_proc`: what Quarto and the plain pages are both made from."
import ast, os, re, shutil, sys
from docsite import apidoc
from project import NBS, ROOT, notebooks, read_cells

import nbformat, yaml

PROC = ROOT/'_proc'

# The parts of the sidebar, and how the names of their notebooks begin.
PARTS = [('Quantized layers', ('00',)), ('Adapters, data, figures', ('01',)), ('Training', ('02',)), ('Evaluation and allocation', ('03',)),
         ('Cyclic precision', ('04',)), ('Robustness', ('05_','05a','05b')), ('The report', ('05c','05d','05e','06_')), ('Serving', ('06a','06b','07')), ('Tools', ('08','09'))]

def html_name(name):
    "File of a notebook's page, as nbdev names it."
    return re.sub(r'^\d+[a-zA-Z0-9]*_', '', name.removesuffix('.ipynb').lower()) + '.html'

def heading(path):
    "The title of a notebook."
    return next(m[1] for c in read_cells(path) if (m := re.match(r'#\s+(.+)', c['source'])))

def label(path):
    "The title without what it finds: what a sidebar has room for."
    return heading(path).partition(':')[0]

def contents():
    "Chapters by part: `[(part, [(notebook, label)])]`; one that fits no part comes last."
    paths = [p for p in notebooks() if p.stem!='index']
    parts = [(title, [p for p in paths if p.name.startswith(begin)]) for title,begin in PARTS]
    rest = [p for p in paths if not any(p in ps for _,ps in parts)]
    return [(title, [(p.name, label(p)) for p in ps]) for title,ps in [*parts, ('More', rest)] if ps]

def write_sidebar():
    "The sidebar for Quarto."
    sections = [dict(section=part, contents=[dict(text=text, href=name) for name,text in chapters]) for part,chapters in contents()]
    sidebar = dict(website=dict(sidebar=dict(contents=[dict(text='Start here', href='index.ipynb'), *sections])))
    (NBS/'sidebar.yml').write_text(yaml.safe_dump(sidebar, sort_keys=False, allow_unicode=True), encoding='utf-8')

def mixed_cells():
    "Cells that import and do something else too: nbdev runs every cell that imports, on its own, to make the pages."
    for p in notebooks():
        for c in read_cells(p):
            flags = re.findall(r'^#\s*\|\s*(.*)', c['source'], flags=re.M)
            if c['cell_type']!='code' or any(f.startswith('export') or re.match(r'eval:\s*false', f) for f in flags): continue
            try: tree = ast.parse(c['source'])
            except SyntaxError: continue   # a magic
            is_import = lambda o: isinstance(o, (ast.Import, ast.ImportFrom))
            if any(map(is_import, ast.walk(tree))) and not all(map(is_import, tree.body)):
                yield f"{p.name}: a cell that imports must do nothing else: {c['source'].strip().splitlines()[0]} …"

def read_pages():
    "Processed notebooks, by name: `{'00_quantizers.ipynb': nb}`."
    return {p.name: nbformat.read(PROC/p.name, as_version=4) for p in notebooks()}

_link_in_link = re.compile(r'\[\[(`[^`]+`)\]\([^)]+\)\]\(([^)]+)\)')

def finish():
    "What nbdev leaves to do: exported values that are no function or class, and names that it linked inside a link."
    for name,nb in read_pages().items():
        module = apidoc.module_name(NBS/name)
        if module and (text := apidoc.constants(module)): nb.cells.append(nbformat.v4.new_markdown_cell(text, id='constants'))
        for c in nb.cells:
            if c.cell_type=='markdown': c.source = _link_in_link.sub(r'[\1](\2)', c.source)
        nbformat.write(nb, PROC/name)

def process():
    "Run nbdev's processors over the notebooks into `_proc`."
    from nbdev.config import get_config
    from nbdev.quarto import proc_nbs, refresh_quarto_yml
    os.chdir(ROOT); sys.path.insert(0, str(ROOT))
    if bad := list(mixed_cells()): sys.exit('\n'.join(bad))
    shutil.rmtree(PROC, ignore_errors=True)
    refresh_quarto_yml()
    write_sidebar()
    get_config().d['renderer'] = 'docsite.apidoc.ApiDoc'
    proc_nbs(n_workers=0)
    finish()
