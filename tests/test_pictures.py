"""Every page of the site as a reader sees it: on a wide screen and on a phone, light and dark. A page that is wider than the
screen, code that is read sideways, words that are cut off, pale or on top of each other, captions and notes that stand askew,
an image that is missing, and the same in figures."""
import os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from PIL import Image
from conftest import ROOT

sys.path.insert(0, str(ROOT/'scripts'))
from check import copy_tree

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='no Chromium is installed')
LOOK = (Path(__file__).parent/'data/pictures.js').read_text(encoding='utf-8')
WIDE,PHONE = dict(width=1400, height=900),dict(width=390, height=844)

@pytest.fixture(scope='module')
def site(tmp_path_factory, child_env):
    "The pages, built from a copy of the project; or a site that is there already, in the folder that SITE names."
    if built := os.environ.get('SITE'): return Path(built)
    copy = copy_tree(tmp_path_factory.mktemp('site')/'copy')
    command = [sys.executable, 'scripts/build_docs.py', '--pages']
    p = subprocess.run(command, cwd=copy, env=child_env|dict(PYTHONPATH=str(copy)), capture_output=True, text=True, timeout=1500)
    assert p.returncode==0, p.stderr[-2000:]
    return copy/'_docs'

@pytest.fixture(scope='module')
def tab():
    sync = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        context = b.new_context(offline=True)
        context.add_init_script(LOOK)
        yield context.new_page()
        b.close()

def faults(tab, address):
    "What is wrong with a page: the layout at two widths, which the themes share, and the contrast in each theme."
    tab.set_viewport_size(WIDE); tab.emulate_media(color_scheme='light')
    tab.goto(address)
    found = [('wide', f) for f in tab.evaluate('look.layout()')]
    for theme in ('light','dark'):
        tab.emulate_media(color_scheme=theme)
        found += [(theme, f) for f in tab.evaluate('look.pale()')]
    tab.set_viewport_size(PHONE)
    return [f'{where}: {f}' for where,f in found+[('phone', f) for f in tab.evaluate('look.layout()')]]

def figure_faults(tab, figures):
    "The same of figures, `{name: SVG}`."
    inline = [re.sub(r'^.*?<svg', f'<svg data-name="{n}" ', svg, count=1, flags=re.S) for n,svg in figures.items()]
    tab.set_viewport_size(WIDE); tab.goto('about:blank')
    tab.set_content('<body>'+'\n'.join(f'<div>{re.sub("<style.*?</style>", "", s, flags=re.S)}</div>' for s in inline)); tab.evaluate(LOOK)
    return tab.evaluate('look.figures()')

def pages(site): return sorted(p for p in site.rglob('*.html') if 'live' not in p.relative_to(site).parts)

def test_pages_are_whole_on_a_screen_and_on_a_phone_in_both_themes(site, tab):
    found = {p.relative_to(site).as_posix(): faults(tab, p.as_uri()) for p in pages(site)}
    assert len(found)>100 and not {n: f for n,f in found.items() if f}

def test_words_in_figures_are_whole(site, tab):
    all_ = {p.relative_to(site).as_posix(): p.read_text(encoding='utf-8') for p in sorted(site.rglob('*.svg'))}
    names,found = list(all_),{}
    for i in range(0, len(names), 20): found |= figure_faults(tab, {n: all_[n] for n in names[i:i+20]})
    assert len(names)>50 and not found

@pytest.mark.parametrize('words', ['load', 'own data', 'serve', 'export', 'own model', 'family', 'fewest bits', 'llama.cpp', 'profile'])
def test_search_finds_how_things_are_done(site, tab, words):
    tab.set_viewport_size(WIDE); tab.goto((site/'study/arms.html').as_uri())
    tab.fill('#page-search', words)
    tab.wait_for_selector('#found a')
    assert any('/how.html#' in a for a in tab.evaluate("[...document.querySelectorAll('#found a')].slice(0, 6).map(a => a.href)"))

# --- that it can fail -------------------------------------------------------------------------------------------------

GOOD = ('<p>Words that stay where they are.</p><p>And others.</p><figure><p>A table</p><figcaption>A caption</figcaption></figure>'
        f'<div class="cell-output"><pre style="overflow-x:auto">{"name  "*300}</pre></div>')
def code(n): return f'<pre class="sourceCode" style="overflow-x:auto"><code>{"x"*n}</code></pre>'
BAD = dict(
    wide=('<div style="width:1500px">broad</div>', 'wide: the page is'),
    phone=('<div style="width:500px">broad</div>', 'phone: the page is'),
    clipped=('<div style="width:90px;overflow:hidden;white-space:nowrap">Words that do not fit in there</div>', 'cut off: div Words'),
    low=('<div style="height:20px;overflow:hidden">Two<br>lines</div>', 'cut off: div Two'),
    sideways=('<div class="params"><div class="scroll" style="overflow:auto"><table style="width:700px"><td>name</table></div></div>',
              'phone: scrolls sideways: name'),
    figure=('<figure><div class="scroll" style="overflow:auto"><img width="500" alt="Lines" src="data:image/svg+xml,'
            '%3Csvg xmlns=\'http://www.w3.org/2000/svg\'/%3E"></div></figure>', 'phone: scrolls sideways: Lines'),
    code=(code(300), 'wide: scrolls sideways: xxx'),
    code_on_a_phone=(code(60), 'phone: scrolls sideways: xxx'),
    caption=('<figure><figcaption style="text-align:center">A caption</figcaption></figure>',
             'wide: does not begin at the left: A caption'),
    note=('<aside class="callout"><p>Note</p><p style="margin-left:1rem">further in</p></aside>',
          'phone: does not begin at the left: further'),
    overlap=('<p>One</p><p style="margin-top:-2.5em">Two</p>', 'overlap: '),
    image=('<img src="none.svg" alt="x">', 'no image: none.svg'),
    pale=('<p style="color:#999">pale</p>', 'light: contrast 2.8'),
    dark=('<style>@media (prefers-color-scheme:dark) { body { background: #222 } }</style><p style="color:#444">dim</p>',
          'dark: contrast 1.'))

@pytest.mark.parametrize('bad', BAD)
def test_what_is_wrong_with_a_page_is_seen(tab, tmp_path, bad):
    body,said = BAD[bad]
    def written(name, text):
        (tmp_path/name).write_text(f'<!DOCTYPE html><meta name="viewport" content="width=device-width"><main>{text}</main>')
        return (tmp_path/name).as_uri()
    assert faults(tab, written('good.html', GOOD))==[]
    assert any(said in f for f in faults(tab, written('bad.html', GOOD+body)))

@pytest.mark.parametrize('text,said', [
    ('<text x="10" y="50">one</text><text x="60" y="50">two</text>', None),
    ('<text x="170" y="50">a long label</text>', 'beyond the edge: a long label'),
    ('<text x="10" y="50">one label</text><text x="30" y="52">another</text>', 'overlap: one label / another')])
def test_what_is_wrong_with_a_figure_is_seen(tab, text, said):
    found = figure_faults(tab, {'a.svg': f'<?xml?><svg xmlns="http://www.w3.org/2000/svg" width="200" height="100">{text}</svg>'})
    assert found==({'a.svg': [said]} if said else {})

def test_a_figure_follows_the_theme_of_its_page(site, tab, tmp_path):
    "Its grey words are dark on the light page and light on the dark one, also when the button says so and not the system."
    figure = next(p for p in sorted(site.rglob('*.svg')) if 'fill="#7f7f7f"' in p.read_text())
    page = next(p for p in pages(site) if figure.name in p.read_text())
    def darkest():
        box = tab.locator(f'img[src$="{figure.name}"]').first
        png = tmp_path/'shot.png'; box.screenshot(path=png)
        grey = Image.open(png).convert('L')
        return grey.getextrema()
    tab.set_viewport_size(WIDE); tab.emulate_media(color_scheme='light'); tab.goto(page.as_uri())
    tab.evaluate('look.layout()')
    light = darkest()
    tab.click('#theme'); dark = darkest()
    tab.evaluate("localStorage.removeItem('theme')")
    assert light[0]<110 and dark[1]>150
