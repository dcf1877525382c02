"nbdev's processing of the notebooks into `_proc`: what Quarto and the plain pages are both made from."
import ast, importlib, os, re, shutil, sys
from collections import Counter
from docsite import apidoc
from project import CFG, NBS, PARTS, ROOT, module_of, name_of, notebooks, read_cells
from switchable_llm.study.figures import themed

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

def rooms(part): return [NBS/part.folder/f'{r}.ipynb' for r in part.rooms]

def number(path):
    "`0 ` before the title of a chapter of the book, else nothing."
    return f"{int(path.stem[:2])} " if path in rooms(PARTS[1]) else ''

def label(path):
    "The number, and the title without what it finds, or the room's name if that is a sentence: a sidebar has little room."
    if path==NBS/'index.ipynb': return 'Start here'
    short = heading(path).partition(':')[0].replace('`', '')
    return number(path)+(short if len(short)<=32 else path.stem.replace('_', ' ').capitalize())

def contents():
    "Pages by part, `[(part, [(address, label)])]`; what comes before the book has no part, and the live page is there."
    front,*parts = [(p.title, [(name_of(f), label(f)) for f in rooms(p)]) for p in PARTS]
    return [(front[0], [*front[1], LIVE]), *parts]

def write_sidebar():
    "The sidebar for Quarto."
    def links(pages): return [dict(text=text, href=name) for name,text in pages]
    (_,front),*parts = contents()
    sections = [dict(section=part, contents=links(pages)) for part,pages in parts]
    sidebar = dict(website=dict(sidebar=dict(contents=[*links(front), *sections])))
    (NBS/'sidebar.yml').write_text(yaml.safe_dump(sidebar, sort_keys=False, allow_unicode=True), encoding='utf-8')

def only_known_addresses():
    "Take settings of nbdev's that lead nowhere out of its file for Quarto, where settings.ini has no address."
    path = NBS/'nbdev.yml'
    d = yaml.safe_load(path.read_text(encoding='utf-8'))
    known = {'repo-url': CFG['git_url'], 'repo-branch': CFG['git_url'], 'site-url': CFG['doc_host']}
    d['website'] = {k: v for k,v in d['website'].items() if known.get(k, v)}
    path.write_text(yaml.safe_dump(d, sort_keys=False, allow_unicode=True), encoding='utf-8')

def numbered(head, before):
    "nbdev's front matter with a number before the title."
    meta = yaml.safe_load(head.strip().strip('-'))
    meta['title'] = before+meta['title']
    return f'---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)}---\n'

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
_link_of_nbdev = re.compile(r'\[(`([^`]+)`)\]\(([^)\s]+\.html#[^)\s]+)\)')   # nbdev links every word in backticks that is a name
_entry = re.compile(r'^(?=#+ \S+ \{\.api\}$)', flags=re.M)

def known_names(name):
    "Names that a notebook has: those of its module, and what its cells import."
    module,found = module_of(NBS/name),set()
    if module: found |= set(vars(importlib.import_module(f"{CFG['lib_name']}.{module}")))
    for c in read_cells(NBS/name):
        if c['cell_type']!='code' or 'import' not in c['source']: continue
        try: tree = ast.parse(c['source'])
        except SyntaxError: continue   # a magic
        imports = (n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)))
        found |= {a.asname or a.name for n in imports for a in n.names}
    if 'sl' in found: found |= set(importlib.import_module(CFG['lib_name']).WHERE)
    return found

def honest_links(text, known):
    """Take nbdev's links off words that are no names where they stand: a parameter or field in its own entry, and plain
    words, like `text`, unless the notebook has something of that name."""
    own = set(re.findall(r'^\| \[?`(\w+)`', text, flags=re.M)) if _entry.search(text) else set()
    def kept(m):
        word = m[2].removesuffix('()')
        plain = re.fullmatch('[a-z]+', word) and word not in known
        return m[1] if plain or word in own else m[0]
    return _link_of_nbdev.sub(kept, text)

def once(texts):
    "Entries of methods that have one of their own elsewhere on the page leave the entry of their class."
    def name(e): return e.split(maxsplit=2)[1] if _entry.match(e) else ''
    entries = [_entry.split(t) for t in texts]
    count = Counter(name(e) for es in entries for e in es)
    def twice(e, k): return k and count[name(e)]>1 and e.startswith('####')
    return [''.join(e for k,e in enumerate(filter(None, es)) if not twice(e, k)) for es in entries]

def map_of_chapters():
    "Markdown: the chapters with what they find."
    front,book,*_ = PARTS
    rows = [f'| [{label(p)}]({name_of(p)}) | {heading(p).partition(": ")[2]} |' for p in [*rooms(book), rooms(front)[-1]]]
    return '\n'.join(['| chapter | what it shows |', '|:--|:--|', *rows])

def for_site(text):
    "What stands in a comment, unseen where a notebook is read as it is, becomes a box of the site; marked cells are folded."
    text = re.sub(r'<!-- site-only: (.*?) -->', r'::: {.site-only}\n\1\n:::', text, flags=re.S)
    text = re.sub(r'^\*\*(.+)\*\* <!-- folded -->$', r'<details><summary>\1</summary>', text, flags=re.M)
    return text.replace('<!-- end of folded -->', '</details>')

def finish():
    """What nbdev leaves to do: numbers in titles, the map of the chapters, what is for the site alone, exported values that
    are no function or class, words that it linked inside a link or to something else of that name, and figures that follow
    the theme."""
    for name,nb in read_pages().items():
        known,module = known_names(name),module_of(NBS/name)
        if module and (text := apidoc.constants(module)):
            nb.cells.append(nbformat.v4.new_markdown_cell(text, id='constants'))
        if before := number(NBS/name): nb.cells[0].source = numbered(nb.cells[0].source, before)
        for c in nb.cells:
            if c.cell_type=='markdown':
                c.source = for_site(honest_links(_link_in_link.sub(r'[\1](\2)', c.source), known))
                if '<!-- map -->' in c.source: c.source = c.source.replace('<!-- map -->', map_of_chapters())
            if c.cell_type=='code': c.outputs = [o for o in c.outputs if o.get('name')!='stderr']
        shown = [o.data for c in nb.cells for o in c.get('outputs', []) if 'data' in o]
        written = [d for d in shown if 'text/markdown' in d]
        for d,text in zip(written, once([''.join(d['text/markdown']) for d in written])):
            d['text/markdown'] = honest_links(text, known)
        for d in shown:
            if svg := d.get('image/svg+xml'): d['image/svg+xml'] = themed(''.join(svg))
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
