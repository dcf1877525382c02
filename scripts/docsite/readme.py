"README.md and its figures, from the processed index: GitHub's Markdown, without what only a site can show."
import html, posixpath, re
from docsite.pages import IMAGES, file_bytes, joined, options, split_front_matter
from project import NBS, ROOT

FOLDER = 'index_files'

def plain(text, names):
    "Markdown without divs, attributes and references, and without what is for the site alone."
    text = re.sub(r'<!-- readme-only: (.*?) -->', r'\1', text, flags=re.S)
    text = re.sub(r'\[(`[^`]+`)\]\(/[^)]*\)', r'\1', text)   # nbdev's links to the site's entries
    text = re.sub(r'^::: \{\.site-only\}\n.*?^:::$\n?', '', text, flags=re.M|re.S)
    text = re.sub(r'^:::.*\n?', '', text, flags=re.M)
    text = re.sub(r'(?<=[\])$])[ ]?\{[#.][^}]*\}|[ ]\{[#.][^}]*\}$', '', text, flags=re.M)
    return re.sub(r'\[?@((?:fig|tbl|eq)-[\w-]+)\]?', lambda m: names.get(m[1], m[0]), text)

def outputs(cell, i, opts, files):
    "What a cell showed."
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        if mime := next((m for m in IMAGES if m in data), None):
            path = f"{FOLDER}/{opts.get('label', f'cell-{i}')}.{IMAGES[mime]}"
            files[path] = file_bytes(data[mime], mime)
            yield f"![{html.escape(str(opts.get('fig-alt', '')), quote=False)}]({path})"
        elif 'text/markdown' in data: yield joined(data['text/markdown']).strip()
        elif text := joined(o.get('text', '') or data.get('text/plain', '')).rstrip(): yield f'```\n{text}\n```'
    cap = opts.get('fig-cap') or opts.get('tbl-cap')
    if cap and cell.get('outputs'): yield f'*{cap}*'

def labelled(cells):
    "Numbers of figures and tables: `{'fig-x': 'Figure 1'}`."
    found = [options(c.source)[0].get('label', '') for c in cells if c.cell_type=='code']
    kinds = dict(fig='Figure', tbl='Table')
    own = {kind: [l for l in found if l.startswith(k+'-')] for k,kind in kinds.items()}
    return {l: f'{kind} {n}' for kind,ls in own.items() for n,l in enumerate(ls, 1)}

def make(nb):
    "`{path: bytes}` of the README and its figures."
    meta,cells = split_front_matter(nb)
    names,files = labelled(cells),{}
    parts = [f"# {meta.get('title', '')}", str(meta.get('description') or '')]
    for i,c in enumerate(cells):
        opts,source = options(c.source) if c.cell_type=='code' else ({}, c.source)
        if c.cell_type=='markdown': parts.append(plain(source, names))
        elif c.cell_type=='code' and opts.get('include') is not False:
            if source and opts.get('echo', True): parts.append(f'```python\n{source}\n```')
            parts += [plain(o, names) for o in outputs(c, i, opts, files)]
    text = re.sub(r'<!--.*?-->', '', '\n\n'.join(p.strip() for p in parts if p.strip()), flags=re.S)
    local = lambda m: m[1]+(posixpath.normpath('nbs/'+m[2]) if (NBS/m[2].partition('#')[0]).is_file() else m[2])
    text = re.sub(r'(\]\(|(?:src|href)=")([\w./-]+)', local, text)
    return {'README.md': (re.sub(r'\n{3,}', '\n\n', text).strip()+'\n').encode(), **files}

def stale(nb):
    "Files of the README that are not what the index gives, or that it no longer has."
    files = make(nb)
    extra = {p.relative_to(ROOT).as_posix() for p in (ROOT/FOLDER).glob('*')} - set(files)
    changed = [p for p,b in files.items() if not (ROOT/p).is_file() or (ROOT/p).read_bytes()!=b]
    return [f'{p} is not what nbs/index.ipynb gives: make readme' for p in sorted({*changed, *extra})]
