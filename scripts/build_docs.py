"""Build the documentation site into `_docs`, with Quarto if it is installed, else as plain pages.

`--check` instead reports what is wrong with the pages (dead links, missing images, an old README) and writes nothing
outside `_proc`; `--readme` writes README.md from nbs/index.ipynb. All three first run nbdev's own processing."""
import ast, os, re, shutil, subprocess, sys
from pathlib import Path
from urllib.parse import unquote
from project import NBS, ROOT, SITE, notebooks, read_cells

import nbformat, yaml
from nbconvert import HTMLExporter, MarkdownExporter

PROC,DOCS = ROOT/'_proc',ROOT/'_docs'

# --- nbdev's processing ---------------------------------------------------------------------------------------------

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

def process():
    "Run nbdev's processors over the notebooks into `_proc`."
    from nbdev.quarto import nbdev_sidebar, proc_nbs, refresh_quarto_yml
    os.chdir(ROOT); sys.path.insert(0, str(ROOT))
    if bad := list(mixed_cells()): sys.exit('\n'.join(bad))
    shutil.rmtree(PROC, ignore_errors=True)
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__()
    proc_nbs(n_workers=0)

def read_pages():
    "Processed notebooks, by name: `{'00_quantizers.ipynb': nb}`."
    return {p.name: nbformat.read(PROC/p.name, as_version=4) for p in notebooks()}

def html_name(name): return re.sub(r'^\d+[a-zA-Z0-9]*_', '', Path(name).stem.lower()) + '.html'

# --- links ----------------------------------------------------------------------------------------------------------

_fence = re.compile(r'^(```|~~~).*?^\1', re.M|re.S)

def texts(nb):
    "Markdown and HTML pieces of a page, code blocks removed."
    for c in nb.cells:
        if c.cell_type=='markdown': yield _fence.sub('', c.source)
        for o in c.get('outputs', []):
            for mime in ('text/markdown', 'text/html'):
                if mime in o.get('data', {}): yield _fence.sub('', ''.join(o['data'][mime]))

def slug(heading):
    "Identifier that Pandoc gives a heading."
    s = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading)
    s = re.sub(r'[^\w\-. ]', '', s.lower()).strip().replace(' ', '-')
    return re.sub(r'^[^a-z]+', '', s)

def anchors(nb):
    "Every identifier that a link into the page can name."
    ids = {m for c in nb.cells for m in re.findall(r'^#\|\s*label:\s*(\S+)', c.source, flags=re.M)}
    for s in texts(nb):
        ids |= {slug(re.sub(r'\{[^}]*\}\s*$', '', h)) for h in re.findall(r'^#{1,6}\s+(.+?)\s*$', s, flags=re.M)}
        ids |= set(re.findall(r'\{[^}]*#([\w.:-]+)', s)) | set(re.findall(r'\bid="([^"]+)"', s))
    return ids

def links(nb):
    "Targets of the page's links and images."
    for s in texts(nb):
        yield from re.findall(r'\b(?:src|href)="([^"]+)"', s)
        s = re.sub(r'`[^`\n]*`', '`x`', s)
        s = re.sub(r'\$\$.*?\$\$|\$[^$\n]+\$', '', s, flags=re.S)
        yield from re.findall(r'\]\(<?([^)\s>]+)>?(?:\s+"[^"]*")?\)', s)
        yield from ('#'+r for r in re.findall(r'(?<![\w`@])@((?:fig|tbl|eq|sec|lst)-[\w-]+)', s))

def dead_links(pages):
    "Links within the site that lead nowhere, as `page: link` lines."
    ids = {html_name(n): anchors(nb) for n,nb in pages.items()}
    for name,nb in pages.items():
        attached = {a for c in nb.cells for a in c.get('attachments', {})}
        for link in sorted(set(links(nb))):
            target = unquote(link)
            if target.startswith(SITE+'/'): target = target[len(SITE)+1:] or 'index.html'
            if target.startswith('attachment:'):
                if target[11:] not in attached: yield f'{name}: no attachment {target[11:]}'
            elif re.match(r'[a-z][a-z0-9+.-]*:|//', target, flags=re.I): continue
            else:
                page,_,anchor = target.partition('#')
                page = html_name(name) if not page else html_name(page) if page.endswith('.ipynb') else page
                if page not in ids:
                    if page.startswith(('/','..')) or not (PROC/page).exists(): yield f'{name}: no page or file for {link}'
                elif anchor and anchor not in ids[page]:
                    yield f'{name}: {link}: {page} has no #{anchor}; give it a heading, or show_doc it there'

# --- plain pages and the README -------------------------------------------------------------------------------------

def plain(nb):
    "A copy of a processed page that needs no Quarto: front matter as a title, no directives, no hidden inputs."
    nb = nbformat.from_dict(nb)
    nb.metadata['language_info'] = {'name': 'python'}
    for c in nb.cells:
        if c.cell_type=='raw' and c.source.startswith('---'):
            fm = yaml.safe_load(c.source.strip().strip('-'))
            c.cell_type,c.source = 'markdown', f"# {fm.get('title','')}\n\n{fm.get('description','')}\n"
        if c.cell_type!='code': continue
        if re.search(r'^#\|\s*(echo|include):\s*false', c.source, flags=re.M): c.metadata['transient'] = {'remove_source': True}
        if alt := re.search(r'^#\|\s*fig-alt:\s*["\']?(.+?)["\']?\s*$', c.source, flags=re.M):
            for o in c.outputs: o.setdefault('metadata', {})['image/png'] = {'alt': alt[1]}
        c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip()
    return nb

def render(name, nb):
    "HTML of one page, links between pages made local."
    html,_ = HTMLExporter(template_name='lab').from_notebook_node(plain(nb), {'metadata': {'name': name}})
    html = html.replace(f'href="{SITE}/', 'href="')
    return re.sub(r'href="([\w-]+\.ipynb)', lambda m: f'href="{html_name(m[1])}', html)

def readme(nb):
    "README.md and its figures, `{path: bytes}`, from the processed index."
    nb = plain(nb)
    md,res = MarkdownExporter().from_notebook_node(nb, {'unique_key': 'output', 'output_files_dir': 'index_files'})
    for i,c in enumerate(nb.cells):
        for o in c.get('outputs', []):
            if alt := o.get('metadata', {}).get('image/png', {}).get('alt'): md = md.replace(f'![png](index_files/output_{i}_', f'![{alt}](index_files/output_{i}_')
    local = lambda m: m[1]+('nbs/' if (NBS/m[2].partition('#')[0]).is_file() else '')+m[2]
    md = re.sub(r'(\]\(|(?:src|href)=")([\w./-]+)', local, md)
    md = re.sub(r'\n{3,}', '\n\n', md).strip()+'\n'
    return {'README.md': md.encode(), **{k.replace(os.sep,'/'): v for k,v in res.get('outputs', {}).items()}}

def stale_readme(pages):
    "Files of the README that are not what the index gives."
    if 'index.ipynb' not in pages: return []
    return [f'{p} is not what nbs/index.ipynb gives: make readme' for p,b in readme(pages['index.ipynb']).items()
            if not (ROOT/p).is_file() or (ROOT/p).read_bytes()!=b]

# --- the three commands ---------------------------------------------------------------------------------------------

def check():
    process()
    pages = read_pages()
    for name,nb in pages.items(): print(f'{name} -> {html_name(name)}: {len(render(name, nb))//1024} KB')
    bad = list(dead_links(pages)) + stale_readme(pages)
    print('\n'.join(bad))
    sys.exit(f'{len(bad)} problems' if bad else 0)

def write_readme():
    process()
    shutil.rmtree(ROOT/'index_files', ignore_errors=True)
    for p,b in readme(read_pages()['index.ipynb']).items():
        (ROOT/p).parent.mkdir(exist_ok=True)
        (ROOT/p).write_bytes(b)

def build():
    process()
    shutil.rmtree(DOCS, ignore_errors=True)
    if shutil.which('quarto'):
        subprocess.run(['quarto', 'render', '--no-cache'], cwd=PROC, check=True)
        shutil.move(PROC/'_docs', DOCS)
    else:
        print('Quarto is not installed (https://quarto.org): writing plain pages')
        shutil.copytree(PROC, DOCS, ignore=shutil.ignore_patterns('*.ipynb', '*.yml', '_docs'))
        for name,nb in read_pages().items(): (DOCS/html_name(name)).write_text(render(name, nb), encoding='utf-8')
    print(f'the site is in {DOCS.name}/')

if __name__=='__main__': {'--check': check, '--readme': write_readme}.get(' '.join(sys.argv[1:]), build)()
