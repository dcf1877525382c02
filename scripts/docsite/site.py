"The plain site: pages in a frame with navigation, search and two themes, in a folder that needs no server."
import json, posixpath, re
from pathlib import Path
from docsite.process import LIVE, PROC, contents, html_name
from project import CFG

from jinja2 import Environment, FileSystemLoader

ASSETS = Path(__file__).parent/'assets'

def navigation():
    "Pages by part, as files."
    return [(part, [(html_name(n) if n.endswith('.ipynb') else n, text) for n,text in pages]) for part,pages in contents()]

def frame(page, parts):
    "The whole HTML of a page."
    order = [c for _,pages in parts for c in pages if c!=LIVE]
    at = next((i for i,(f,_) in enumerate(order) if f==page.name), None)
    before = order[at-1] if at else None
    after = order[at+1] if at is not None and at+1<len(order) else None
    site = dict(title=CFG['title'], repo=CFG['git_url'], branch=CFG['branch'], copyright=f"© {CFG['copyright']}",
                parts=parts)
    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True)
    template = environment.get_template('page.html')
    return template.render(page=page, site=site, body=str(page.body), toc=list(page.toc), before=before, after=after,
                           to=lambda path: posixpath.relpath(path, posixpath.dirname(page.name) or '.'))

def plain_text(e):
    "Text of an element as search shows it: no code blocks, no TeX, no links to sources."
    if e.name in ('pre','script','style'): return ''
    if e.select('.source-link'): return ''
    text = ' '.join(s for s in e.find_all(string=True) if not s.find_parent(['pre','annotation','summary']))
    return re.sub(r'\s+([.,;:!?)])', r'\1', re.sub(r'\s+', ' ', text)).strip()

def sections(page):
    "What search knows: `{page, title, href, text}` for the page and each of its sections; recipes are marked."
    short = page.title.partition(':')[0]
    now = dict(page=short, title=page.title, href=page.name, text=re.sub('<[^>]+>', '', page.description))
    for e in page.body.find_all(True, recursive=False):
        if e.name in ('h2','h3','h4') and e.get('id'):
            yield now
            now = dict(page=short, title=plain_text(e), href=f"{page.name}#{e['id']}", text='')
            if page.name=='how.html': now['recipe'] = 1
        else: now['text'] = f"{now['text']} {plain_text(e)}".strip()
    yield now

def write(pages, folder):
    "All pages, their figures and assets, and the search index."
    parts = navigation()
    folder.mkdir(parents=True)
    for page in pages:
        at = folder/page.name
        at.parent.mkdir(exist_ok=True)
        at.write_text(frame(page, parts), encoding='utf-8')
        for path,data in page.files.items():
            (at.parent/path).parent.mkdir(parents=True, exist_ok=True)
            (at.parent/path).write_bytes(data)
    index = json.dumps([s for p in pages for s in sections(p)], ensure_ascii=False, separators=(',',':'))
    (folder/'search.js').write_text(f'window.SEARCH={index}\n', encoding='utf-8')
    for asset in ('site.css','site.js'): (folder/asset).write_bytes((ASSETS/asset).read_bytes())
    (folder/'styles.css').write_bytes((PROC/'styles.css').read_bytes())
