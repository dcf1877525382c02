"""Plain pages: a processed notebook becomes Markdown, Pandoc makes it HTML, and what only Quarto knows is done here:
numbers of figures, tables and equations, references to them, callouts, tabs and folded code."""
import base64, html, posixpath, re, subprocess
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from docsite.process import html_name
from project import SITE

import pypandoc, yaml
from bs4 import BeautifulSoup, NavigableString

KINDS = dict(fig='Figure', tbl='Table', eq='Equation', sec='Section', lst='Listing')
IMAGES = {'image/svg+xml': 'svg', 'image/png': 'png', 'image/jpeg': 'jpg'}   # the first that an output has is shown
_label = re.compile(rf'({"|".join(KINDS)})-[\w-]+$')

# --- a notebook as Markdown -----------------------------------------------------------------------------------------

def options(source):
    "Quarto's cell options, as a dictionary, and the source without them."
    lines = re.findall(r'^#\|.*\n?', source, flags=re.M)
    said = [l[2:].strip()+'\n' for l in lines if re.match(r'#\|\s*[\w-]+:(\s|$)', l)]
    try: found = yaml.safe_load(''.join(said)) or {}
    except yaml.YAMLError as e: raise ValueError(f'cell options are no YAML: {"".join(lines)}') from e
    return found, re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()

def fence(text, attrs=''):
    "A code block, fenced with more backticks than there are in it."
    ticks = max(map(len, re.findall(r'`+', text)), default=0)
    mark = '`'*max(3, ticks+1)
    return f'{mark} {attrs}\n{text}\n{mark}'

def div(text, cls, id=None):
    return f":::::: {{.{cls}{f' #{id}' if id else ''}}}\n\n{text}\n\n::::::"

def raw(text): return fence(text.strip(), '{=html}')

def joined(x): return ''.join(x) if isinstance(x, list) else x

def file_bytes(data, mime):
    return joined(data).encode() if mime=='image/svg+xml' else base64.b64decode(joined(data))

def size(data, mime):
    "Attributes for the size of a figure, in CSS pixels: the page keeps its place, and knows how small it may become."
    found = re.search(rb'<svg[^>]*?\swidth="([\d.]+)pt"[^>]*?\sheight="([\d.]+)pt"', data)
    if mime!='image/svg+xml' or not found: return ''
    w,h = (round(float(n)*96/72) for n in found.groups())
    return f' width="{w}" height="{h}" style="--w: {w}px"'

def printed(text):
    "A box of what was printed; words may be broken where there is little room, columns may not."
    return div(fence(text, '{.text}'), 'cell-output' if re.search(r'\S {2,}\S', text) else 'cell-output .words')

def output(o, stem, alt, files):
    "Markdown of one output; an image goes to `files`."
    if o.output_type=='stream':
        text = joined(o.text).rstrip()
        return printed(text) if text.strip() else ''
    if o.output_type=='error': return div(fence('\n'.join(o.traceback), '{.text}'), 'cell-error')
    data = o.data
    if mime := next((m for m in IMAGES if m in data), None):
        path = f'{stem}.{IMAGES[mime]}'
        files[path] = file_bytes(data[mime], mime)
        return raw(f'<img src="{path}" alt="{html.escape(alt)}"{size(files[path], mime)} loading="lazy">')
    if 'text/html' in data: return div(raw(joined(data['text/html'])), 'cell-output')
    if 'text/markdown' in data: return joined(data['text/markdown']).strip()
    if any('widget-view' in m for m in data) or 'text/plain' not in data: return ''
    return printed(joined(data['text/plain']))

def code_cell(cell, i, page, files):
    "Markdown of a code cell: its source unless hidden, its outputs, a caption if it has one."
    opts,source = options(cell.source)
    if opts.get('include') is False: return ''
    parts = []
    if source and opts.get('echo', True):
        code = fence(source, '{.python}')
        folds = opts.get('code-fold') in (True, 'true', 'show')
        opened = ' open' if opts.get('code-fold')=='show' else ''
        summary = html.escape(opts.get('code-summary', 'Code'))
        head = raw(f'<details class="code-fold"{opened}><summary>{summary}</summary>')
        parts.append(f"{head}\n\n{code}\n\n{raw('</details>')}" if folds else code)
    stem = f"{Path(page).stem}_files/{opts.get('label', f'cell-{i}')}"
    shown = cell.get('outputs', []) if opts.get('output', True) is not False else []
    outs = [output(o, stem if k==0 else f'{stem}-{k+1}', opts.get('fig-alt', ''), files) for k,o in enumerate(shown)]
    outs = '\n\n'.join(filter(None, outs))
    if outs:
        for kind in ('fig','tbl'):
            label = opts.get('label', '')
            if cap := opts.get(f'{kind}-cap'):
                own = label if label.startswith(kind) else None
                outs = div(f'{outs}\n\n{div(str(cap), "caption")}', f'cell-{kind}', own)
        parts.append(outs)
    return '\n\n'.join(parts)

def split_front_matter(nb):
    "Title and description that nbdev put into a raw cell, and the other cells."
    first = nb.cells[0] if nb.cells else None
    if not first or first.cell_type!='raw' or not first.source.startswith('---'): return {}, nb.cells
    return yaml.safe_load(first.source.strip().strip('-')) or {}, nb.cells[1:]

def markdown(name, nb, files):
    "One Markdown text of all cells."
    parts = []
    for i,c in enumerate(split_front_matter(nb)[1]):
        if c.cell_type=='code': parts.append(code_cell(c, i, html_name(name), files))
        elif c.cell_type=='markdown':
            text = c.source
            for a,data in c.get('attachments', {}).items():
                mime,content = next(iter(data.items()))
                files[path := f'{Path(html_name(name)).stem}_files/{a}'] = file_bytes(content, mime)
                text = text.replace(f'attachment:{a}', path)
            parts.append(text)
    return '\n\n'.join(filter(None, parts))

# --- Markdown as HTML -----------------------------------------------------------------------------------------------

@cache
def program(): return pypandoc.get_pandoc_path()

def pandoc(text):
    "HTML as a tree; Pandoc's warnings (a formula it cannot read, …) are errors."
    command = [program(), '--from=markdown', '--to=html5', '--mathml', '--wrap=none', '--fail-if-warnings']
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    if done.returncode: raise RuntimeError(done.stderr.decode())
    out = done.stdout.decode()
    soup = BeautifulSoup(out, 'html.parser')
    for box in soup.find_all('section'):   # a div that begins with a heading, whose identifier Pandoc moved here
        box.name = 'div'
        if head := box.find(re.compile('^h[1-6]$'), id=False, recursive=False): head['id'] = box.attrs.pop('id')
    return soup

def place_captions(soup):
    "Captioned cells become figures; a table's caption comes first."
    for box in soup.select('div.cell-fig, div.cell-tbl'):
        box.name,cap = 'figure',box.find('div', class_='caption', recursive=False)
        cap.name = 'figcaption'
        if 'cell-tbl' in box['class']: box.insert(0, cap.extract())
    for table in soup.find_all('table', id=True):   # `: caption {#tbl-x}`
        if table.caption and not table.find_parent('figure'):
            box = table.wrap(soup.new_tag('figure', attrs={'class': 'cell-tbl', 'id': table['id']}))
            del table['id']
            table.caption.name = 'figcaption'
            box.insert(0, table.figcaption.extract())

def mark_equations(soup):
    "A formula followed by `{#eq-x}` gets that id."
    for m in soup.find_all('math', display='block'):
        after = m.next_sibling
        if isinstance(after, NavigableString) and (found := re.match(r'\s*\{#(eq-[\w-]+)\}', after)):
            after.replace_with(after[found.end():])
            m.wrap(soup.new_tag('span', attrs={'class': 'equation', 'id': found[1]}))

def number(soup):
    "Number what has a label, in order; `{id: 'Figure 3'}`."
    names,count = {},{}
    for e in soup.find_all(id=_label):
        kind = _label.match(e['id'])[1]
        if kind=='sec': names[e['id']] = e.get_text(); continue
        n = count[kind] = count.get(kind, 0)+1
        names[e['id']] = f'{KINDS[kind]} {n}'
        if kind=='eq':
            tag = soup.new_tag('span', attrs={'class': 'number'}); tag.string = f'({n})'
            e.append(tag)
        elif cap := e.find('figcaption'):
            tag = soup.new_tag('strong'); tag.string = f'{KINDS[kind]} {n}. '
            (cap.p or cap).insert(0, tag)
    return names

def resolve(soup, names):
    "References become links; one that leads nowhere stays as it was, for the check to see."
    for c in soup.select('span.citation'):
        keys = c['data-cites'].split()
        if not all(k in names for k in keys): continue
        c.clear(); del c['data-cites']; c['class'] = 'cross-reference'
        for i,k in enumerate(keys):
            a = soup.new_tag('a', href=f'#{k}'); a.string = names[k].replace(' ', '\xa0', 1)
            c.extend([', ', a] if i else [a])

def callouts(soup):
    "Boxes with a title."
    for box in soup.select('div[class^=callout-]'):
        kind = box['class'][0].removeprefix('callout-')
        box.name,box['class'],head = 'aside',['callout', kind],box.find(re.compile('^h[1-6]$'))
        title = soup.new_tag('p', attrs={'class': 'callout-title'})
        own = head.extract().get_text() if head and head==box.find(True) and not box.get('title') else kind.capitalize()
        title.string = box.attrs.pop('title', None) or own
        box.insert(0, title)

def tabs(soup):
    "The panels of a tabset, each with its heading; the page's script makes tabs of them."
    for box in soup.select('div.panel-tabset'):
        head = box.find(re.compile('^h[1-6]$'), recursive=False)
        panel = None
        for e in list(box.children) if head else []:
            if e.name==head.name:
                panel = soup.new_tag('section', attrs={'class': 'tab'})
                e.insert_before(panel)
                e['class'] = 'tab-title'
            if panel: panel.append(e.extract())

def local_links(soup, name):
    "Links to this site's pages and to notebooks lead to files, seen from the page's folder."
    for a in soup.find_all('a', href=True):
        href = a['href']
        if href.startswith(SITE+'/'):
            href = posixpath.relpath(href[len(SITE)+1:] or 'index.html', posixpath.dirname(name) or '.')
        page,hash,anchor = href.partition('#')
        if page.endswith('.ipynb') and ':' not in page: href = html_name(page)+hash+anchor
        a['href'] = href

def space_functions(soup):
    "Thin space around min, log, … which MathML sets tight."
    scripts = 'munder','msub','msup','msubsup','munderover'
    def belongs(f):   # with what stands below or above it, and the invisible sign of a function
        p = f.parent
        return p.name in scripts or p.name=='mrow' and p.get_text()==f.get_text()+'\u2061'
    for f in soup.find_all('mi', string=re.compile('^[a-z]{2,}$')):
        while belongs(f): f = f.parent
        before,after = f.find_previous_sibling(True),f.find_next_sibling(True)
        if before is not None and before.name!='mo': f.insert_before(soup.new_tag('mspace', width='0.17em'))
        if after is not None and after.name!='mo': f.insert_after(soup.new_tag('mspace', width='0.17em'))

def indent(soup):
    "Each line of code says where it begins, so that what does not fit goes on below that."
    for line in soup.select('code.sourceCode > span'):
        text = line.get_text()
        if spaces := len(text)-len(text.lstrip(' ')): line['style'] = f'--in: {spaces}ch'

def tidy(soup):
    "Wide tables and figures scroll; headings link to themselves; empty anchors of code lines go."
    for c in soup.find_all('colgroup'): c.decompose()
    for t in soup.find_all('table'): t.wrap(soup.new_tag('div', attrs={'class': 'scroll'}))
    for i in soup.select('figure img'): i.wrap(soup.new_tag('div', attrs={'class': 'scroll'}))
    for a in soup.select('a[aria-hidden][href^="#cb"]'): a.decompose()
    for e in soup.select('[id^=cb]'): del e['id']
    for h in soup.find_all(re.compile('^h[2-4]$'), id=True):
        link = {'class': 'anchor', 'href': f"#{h['id']}", 'aria-label': 'Link to this section'}
        h.append(soup.new_tag('a', attrs=link))

# --- a page ---------------------------------------------------------------------------------------------------------

@dataclass
class Page:
    name: str                # Path, *.html
    notebook: str            # Path, *.ipynb
    title: str               # As in the notebook
    description: str         # HTML of the line under the title
    body: BeautifulSoup
    files: dict[str,bytes]   # Figures, by path from the page's folder

    @property
    def toc(self):
        "Headings: `(classes, id, HTML)`."
        for h in self.body.find_all(['h2','h3'], id=True):
            if h.find_parent(class_='panel-tabset'): continue
            classes = f"level-{h.name[1]}{' api' if 'api' in h.get('class', []) else ''}"
            text = [str(c) for c in h.contents if getattr(c, 'get', lambda k: None)('class')!=['anchor']]
            yield classes, h['id'], ''.join(text)

def inline(text, name):
    "HTML of a line of Markdown on a page."
    if not text: return ''
    soup = pandoc(text)
    local_links(soup, name)
    return str(soup.p.decode_contents())

def make_page(name, nb):
    "One page from a processed notebook."
    meta,files = split_front_matter(nb)[0],{}
    try: soup = pandoc(markdown(name, nb, files))
    except RuntimeError as e: raise RuntimeError(f'{name}: {e}') from None
    place_captions(soup); mark_equations(soup)
    resolve(soup, number(soup))
    for step in (callouts, tabs, partial(local_links, name=name), space_functions, indent, tidy): step(soup)
    lead = inline(str(meta.get('description', '') or ''), name)
    return Page(html_name(name), name, str(meta.get('title', name)), lead, soup, files)
