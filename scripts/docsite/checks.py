"What is wrong with the pages, as `page: problem` lines."
import posixpath, re
from collections import Counter
from urllib.parse import unquote
from xml.etree import ElementTree
from bs4 import BeautifulSoup
from matplotlib.colors import to_hex
from docsite import apidoc
from docsite.pages import IMAGES, options
from docsite.process import PROC
from docsite.site import ASSETS
from project import NBS, module_of
from switchable_llm.explorer.looks import contrast

import yaml

# --- on the page ----------------------------------------------------------------------------------------------------

_raw = re.compile(r':::.*|\{[#.][\w-]+[^}]*\}|\$\$|#\|\s*[\w-]+:.*|\]\([^)\s]+\)|attachment:\S+', flags=re.M)
_widget = (r'(?:[HV]Box|GridBox|Accordion|Tab|Output|HTML|Label|Text|Textarea|Button|Dropdown|Checkbox|Toggle\w+|'
           r'(?:Bounded)?(?:Int|Float)\w*(?:Text|Slider|Progress)|Select\w*)')
_box = re.compile(r'^(?:Traceback \(most recent call last\)|<Figure size .*|'
                  rf'{_widget}\((?:children|value|description|layout|outputs)=.*|<IPython\.\S+ object>|Output\(\)$)', flags=re.M)

def prose(page):
    "Text of a page outside code and formulas."
    other = ['pre', 'code', 'math', 'script', 'style']
    body = ''.join(s for s in page.body.find_all(string=True) if not s.find_parent(other))
    return body+re.sub('<[^>]+>', '', page.description)

def raw_marks(page):
    "Markdown that was not understood, and outputs that are no more than a name in angle brackets."
    for m in sorted(set(_raw.findall(prose(page)))): yield f'{page.name}: printed raw: {m}'
    for pre in page.body.select('.cell-output pre, .cell-error pre'):
        for m in _box.findall(pre.get_text()): yield f'{page.name}: an output shows nothing to a reader: {m[:60]}'
    if page.body.select('.cell-error'): yield f'{page.name}: an output is an error'
    if page.body.find('h1'): yield f'{page.name}: a second title: {page.body.h1.get_text()}; use ##'

def references(page):
    "References that lead nowhere on their page, which is where Quarto looks for them."
    for c in page.body.select('span.citation'):
        yield f"{page.name}: no label {', '.join(c['data-cites'].split())}"

def images(page):
    "Images without a description or a file."
    for i in page.body.find_all('img'):
        if not i.get('alt', '').strip(): yield f"{page.name}: no fig-alt: {i['src']}"
        src = unquote(i['src'])
        if re.match('data:|https?:', src) or src in page.files: continue
        if not (PROC/page.name).parent.joinpath(src).is_file(): yield f"{page.name}: no file {i['src']}"

# --- in figures -----------------------------------------------------------------------------------------------------

PAGES = dict(light=['#ffffff'], dark=['#14171c','#222222'])   # the dark of the plain site, and of Quarto's
NEEDS = dict(words=(4.5, 'fill'), line=(3, 'stroke'), area=(3, 'fill'))   # contrast (WCAG 2), and the attribute that colours it
_rule = re.compile(r':is\(\[(\w+)="(#\w+)"\][^{]*\{\w+:(#\w+)!important\}')

def blend(color, back, share):
    "A colour that covers a part of the page behind it."
    both = ([int(c[i:i+2], 16) for i in (1, 3, 5)] for c in (color, back))
    return '#'+''.join(f'{round(share*a+(1-share)*b):02x}' for a,b in zip(*both))

def elements(e, above):
    "Elements of an SVG, `(tag, attributes)`, with what they inherit from those above."
    own = above | e.attrib
    yield e.tag.rpartition('}')[2],own
    for child in e: yield from elements(child, {k: v for k,v in own.items() if k in ('fill','stroke')})

def drawn(svg):
    "What is drawn on the page itself, `(what, colour, how much it covers)`: no words on areas, no faint ground, no shades of a scale."
    all_,scale = list(elements(ElementTree.fromstring(svg), {})),bool(re.search('QuadMesh|<image', svg))   # with its bar of colours
    on_areas = any(t=='text' and a.get('fill')=='#ffffff' for t,a in all_)
    out = set()
    for tag,a in all_:
        for what in ['words'] if tag=='text' else ['line','area'] if tag in ('path','use') else []:
            by = NEEDS[what][1]
            color,share = a.get(by, '#000000' if what=='words' else 'none'),float(a.get(f'{by}-opacity', a.get('opacity', 1)))
            if color!='none' and not color.startswith('url(') and share>=.5: out.add((what, to_hex(color), share))
    return {(what, color, share) for what,color,share in out if not (what=='words' and on_areas and color in ('#ffffff','#000000'))
            and not (what=='area' and (on_areas or scale))}

def figures(page):
    "Figures with words, lines or areas that cannot be seen on the light or on the dark page."
    for path in sorted(p for p in page.files if p.endswith('.svg')):
        svg = page.files[path].decode()
        light,_,dark = svg.partition('</style>')[0].partition('@media')
        for theme,sheet in dict(light=light, dark=dark).items():
            known = {(by, saved): shown for by,saved,shown in _rule.findall(sheet)}
            for what,color,share in sorted(drawn(svg)):
                need,by = NEEDS[what]
                shown = known.get((by, color), color)
                worst = min(contrast(blend(shown, b, share), b) for b in PAGES[theme])
                if worst<need: yield f'{page.name}: {path}: contrast {worst:.1f} on the {theme} page: {what} in {color}'

# --- between pages --------------------------------------------------------------------------------------------------

def ids(page): return [e['id'] for e in page.body.find_all(id=True)]

def links(pages):
    "Links within the site that lead nowhere."
    there = {p.name: {*ids(p), ''} for p in pages}
    for p in pages:
        parts = p.body, BeautifulSoup(p.description, 'html.parser')
        for href in sorted({a['href'] for part in parts for a in part.find_all('a', href=True)}):
            page,_,anchor = unquote(href).partition('#')
            page = posixpath.normpath(posixpath.join(posixpath.dirname(p.name), page)) if page else p.name
            if re.match(r'[a-z][a-z0-9+.-]*:|//', href, flags=re.I): continue
            if page in there:
                if anchor in there[page]: continue
                yield f'{p.name}: {href}: {page} has no #{anchor}; give it a heading, or show_doc it there'
            elif page.startswith(('/','..')) or not (PROC/page).is_file():
                yield f'{p.name}: no page or file for {href}'

def labels(pages):
    "Labels that two pages share, and identifiers that one page, with the frame around it, has twice."
    where,frame = {},re.findall(r' id="([\w-]+)"', (ASSETS/'page.html').read_text())
    for p in pages:
        for i,n in Counter([*ids(p), *frame]).items():
            if n>1: yield f'{p.name}: {n} times the identifier {i}'
            if re.match('(fig|tbl|eq|lst)-', i): where.setdefault(i, []).append(p.name)
    yield from (f"{', '.join(ps)}: share the label {i}" for i,ps in where.items() if len(ps)>1)

# --- in the notebook ------------------------------------------------------------------------------------------------

def cells(name, nb):
    "Figures without label, caption or alt text; widgets without a static counterpart."
    for c in nb.cells:
        if c.cell_type!='code': continue
        opts,source = options(c.source)
        if opts.get('include') is False: continue
        mimes = [set(o.get('data', {})) for o in c.get('outputs', [])]
        first = next(iter(source.splitlines()), '')
        if any(m & set(IMAGES) for m in mimes):
            for k in ('label','fig-cap','fig-alt'):
                said,label = str(opts.get(k, '')).strip(),k=='label'
                if said and (not label or said.startswith('fig-')): continue
                yield f'{name}: a figure needs #| {k}:{" fig-…"*label}: {first}'
        if any('widget-view' in t for m in mimes for t in m):
            yield f'{name}: a widget has no static counterpart; drop its output: {first}'

# --- API documentation ----------------------------------------------------------------------------------------------

def api_entry(page, name):
    "Elements of a name's entry: from its heading to the next of its level or above."
    h = next((h for h in page.body.find_all(['h2','h3','h4']) if h.get_text().strip()==name and h.get('id')), None)
    if h is None: return None
    found = [h]
    for e in h.find_next_siblings():
        if re.match('^h[1-6]$', e.name) and e.name<=h.name: break
        found.append(e)
    return found

def api(pages):
    "Exported names without documentation on their chapter's page, or with a parameter or field that it leaves out."
    for p in pages:
        module = module_of(NBS/p.notebook)
        entries = Counter(h.get_text().strip() for h in p.body.select('.api'))
        yield from (f'{p.name}: {n} is documented {k} times' for n,k in entries.items() if k>1)
        for name,o in apidoc.exported(module).items() if module else []:
            entry = api_entry(p, name)
            if entry is None: yield f'{p.name}: {name} is not documented; show_doc it'; continue
            cells = {td.get_text().strip() for e in entry for td in e.select('td:first-child')}
            missing = [n for n in apidoc.documented(o) if n not in cells]
            if missing: yield f"{p.name}: {name}: no word on {', '.join(missing)}"

# --- all ------------------------------------------------------------------------------------------------------------

def config(path):
    "Settings of the site that its own words rely on."
    fmt = yaml.safe_load(path.read_text(encoding='utf-8'))['format']['html']
    themes = fmt.get('theme', {})
    if not {'light','dark'} <= set(themes): yield f'{path.name}: needs a light and a dark theme'
    if not fmt.get('respect-user-color-scheme'): yield f'{path.name}: the theme does not follow the system'
    if any('fonts.scss' not in t for t in themes.values()): yield f'{path.name}: a theme without fonts.scss fetches fonts'

def problems(pages, notebooks):
    "Everything that is wrong, for pages and the processed notebooks that they were made from."
    for p in pages:
        for f in (raw_marks, references, images, figures): yield from f(p)
    for f in (links, labels, api): yield from f(pages)
    for name,nb in notebooks.items(): yield from cells(name, nb)
    yield from config(NBS.parent/'_quarto.yml')
