"nbdev's processing of the notebooks into `_proc`: what Quarto and the plain pages are both made from."
import ast, os, re, shutil, sys
from docsite import apidoc
from project import CFG, NBS, PARTS, ROOT, module_of, name_of, notebooks, read_cells

import nbformat, yaml

PROC = ROOT/'_proc'
LIVE = 'live/index.html','A live model'   # the page that is no notebook: its address, and what links call it

def html_name(name):
    "File of a notebook's page, as nbdev names it: `core/switching.html`."
    folder,_,file = name.removesuffix('.ipynb').lower().rpartition('/')
    return f'{folder}/'*bool(folder) + re.sub(r'^\d+[a-zA-Z0-9]*_', '', file) + '.html'

def heading(path):
    "The title of a notebook."
    return next(m[1] for c in read_cells(path) if (m := re.match(r'#\s+(.+)', c['source'])))

def label(path):
    "The title without what it finds: what a sidebar has room for."
    return heading(path).partition(':')[0]

def contents():
    "Chapters by part: `[(part, [(notebook, label)])]`."
    return [(p.title, [(name_of(f), label(f)) for r in p.rooms for f in [NBS/p.folder/f'{r}.ipynb']]) for p in PARTS]

def write_sidebar():
    "The sidebar for Quarto."
    def links(chapters): return [dict(text=text, href=name) for name,text in chapters]
    sections = [dict(section=part, contents=links(chapters)) for part,chapters in contents()]
    live = dict(text=LIVE[1], href=LIVE[0])
    sidebar = dict(website=dict(sidebar=dict(contents=[dict(text='Start here', href='index.ipynb'), live, *sections])))
    (NBS/'sidebar.yml').write_text(yaml.safe_dump(sidebar, sort_keys=False, allow_unicode=True), encoding='utf-8')

def only_known_addresses():
    "Take settings of nbdev's that lead nowhere out of its file for Quarto, where settings.ini has no address."
    path = NBS/'nbdev.yml'
    d = yaml.safe_load(path.read_text(encoding='utf-8'))
    known = {'repo-url': CFG['git_url'], 'repo-branch': CFG['git_url'], 'site-url': CFG['doc_host']}
    d['website'] = {k: v for k,v in d['website'].items() if known.get(k, v)}
    path.write_text(yaml.safe_dump(d, sort_keys=False, allow_unicode=True), encoding='utf-8')

def mixed_cells():
    "Cells that import and do something else too: nbdev runs every cell that imports, on its own, to make the pages."
    for p in notebooks():
        for c in read_cells(p):
            flags = re.findall(r'^#\s*\|\s*(.*)', c['source'], flags=re.M)
            apart = any(f.startswith('export') or re.match(r'eval:\s*false', f) for f in flags)
            if c['cell_type']!='code' or apart: continue
            try: tree = ast.parse(c['source'])
            except SyntaxError: continue   # a magic
            is_import = lambda o: isinstance(o, (ast.Import, ast.ImportFrom))
            if any(map(is_import, ast.walk(tree))) and not all(map(is_import, tree.body)):
                first = c['source'].strip().splitlines()[0]
                yield f'{name_of(p)}: a cell that imports must do nothing else: {first} …'

def read_pages():
    "Processed notebooks, by name: `{'core/switching.ipynb': nb}`."
    return {n: nbformat.read(PROC/n, as_version=4) for n in map(name_of, notebooks())}

_link_in_link = re.compile(r'\[\[(`[^`]+`)\]\([^)]+\)\]\(([^)]+)\)')

def map_of_chapters():
    "Markdown: the chapters with what they find, and the parts with what is in them."
    book,*parts = PARTS
    rows = [f'| [{label(p)}]({name_of(p)}) | {heading(p).partition(": ")[2]} |'
            for p in (NBS/f'{r}.ipynb' for r in book.rooms)]
    links = ', '.join(f'[{p.folder}]({p.folder}/{p.rooms[0]}.ipynb)' for p in parts)
    table = '\n'.join(['| chapter | what it shows |', '|:--|:--|', *rows])
    return f'{table}\n\nParts: {links}.'

def finish():
    """What nbdev leaves to do: the map of the chapters, exported values that are no function or class, and names that it
    linked inside a link."""
    for name,nb in read_pages().items():
        module = module_of(NBS/name)
        if module and (text := apidoc.constants(module)):
            nb.cells.append(nbformat.v4.new_markdown_cell(text, id='constants'))
        for c in nb.cells:
            if c.cell_type!='markdown': continue
            c.source = _link_in_link.sub(r'[\1](\2)', c.source)
            if '<!-- map -->' in c.source: c.source = c.source.replace('<!-- map -->', map_of_chapters())
        nbformat.write(nb, PROC/name)

def process():
    "Run nbdev's processors over the notebooks into `_proc`."
    from nbdev.config import get_config
    from nbdev.quarto import proc_nbs, refresh_quarto_yml
    os.chdir(ROOT); sys.path.insert(0, str(ROOT))
    if bad := list(mixed_cells()): sys.exit('\n'.join(bad))
    shutil.rmtree(PROC, ignore_errors=True)
    refresh_quarto_yml(); only_known_addresses()
    write_sidebar()
    get_config().d['renderer'] = 'docsite.apidoc.ApiDoc'
    proc_nbs(n_workers=0)
    finish()
