"The site: what notebooks become, what the check sees, how figures are saved, what a browser shows."
import base64, inspect, json, re, shutil, sys
from pathlib import Path
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'scripts'))
from docsite import apidoc, checks, pages, process, readme, site
from switchable_llm.explorer import looks
from switchable_llm.study.figures import ON_PAGE, STYLES, panels, themed
import execute_notebooks

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><text>a</text></svg>'
PNG = base64.b64encode(b'\x89PNG').decode()

WIDGET = {'application/vnd.jupyter.widget-view+json': {}, 'text/plain': 'VBox()'}

def cell(source, *outputs):
    "A code cell; an output is one, or the data of one that is displayed."
    made = [o if 'output_type' in o else new_output('display_data', data=o) for o in outputs]
    return new_code_cell(source, outputs=made)

def figure(label='fig-a', cap='What *is* drawn', alt='Two lines', data=None, more=''):
    options = [f'#| {k}: {json.dumps(v)}' for k,v in [('label', label), ('fig-cap', cap), ('fig-alt', alt)] if v]
    data = data or {'image/svg+xml': SVG, 'text/plain': '<Figure size 640x480>'}
    return cell('\n'.join(options)+f'\n{more}plot()', data)

def page(*cells, name='00_page.ipynb'):
    "A page from cells; strings are Markdown."
    head = new_raw_cell('---\ntitle: A page\ndescription: What it `finds`\n---')
    nb = new_notebook(cells=[head, *(new_markdown_cell(c) if isinstance(c, str) else c for c in cells)])
    return pages.make_page(name, nb)

def problems(*cells, name='00_page.ipynb'):
    nb = new_notebook(cells=[new_markdown_cell(c) if isinstance(c, str) else c for c in cells])
    p = pages.make_page(name, nb)
    of_page = [*checks.raw_marks(p), *checks.references(p), *checks.images(p)]
    return [*of_page, *checks.links([p]), *checks.labels([p]), *checks.cells(name, nb)]

# --- a page ---------------------------------------------------------------------------------------------------------

def test_title_and_description_come_from_the_front_matter():
    p = page('Text')
    assert p.title=='A page' and p.description=='What it <code>finds</code>' and p.name=='page.html'

def test_figures_are_numbered_captioned_and_described():
    p = page('As @fig-b shows, and @fig-a.', figure(), figure('fig-b', 'Other', 'Bars'))
    figs = p.body.find_all('figure')
    assert [f['id'] for f in figs]==['fig-a','fig-b']
    assert [f.figcaption.get_text(strip=False).strip() for f in figs]==['Figure 1. What is drawn', 'Figure 2. Other']
    assert [f.img['alt'] for f in figs]==['Two lines','Bars'] and figs[0].em.string=='is'
    links = [(a['href'], a.string) for a in p.body.p.find_all('a')]
    assert links==[('#fig-b', 'Figure\xa02'), ('#fig-a', 'Figure\xa01')]
    assert p.files=={'page_files/fig-a.svg': SVG.encode(), 'page_files/fig-b.svg': SVG.encode()}

def test_tables_and_equations_are_numbered():
    shown = {'text/markdown': '| a |\n|---|\n| 1 |', 'text/plain': 'x'}
    table = cell('#| label: tbl-x\n#| tbl-cap: "Scores"\n#| echo: false\ntable()', shown)
    written,formula = '| b |\n|--|\n| 2 |\n\n: More {#tbl-y}\n','$$ x = \\max_i y_i $$ {#eq-z}'
    p = page('See @tbl-x, @tbl-y and @eq-z.', table, written, formula)
    assert [a.string for a in p.body.p.find_all('a')]==['Table\xa01', 'Table\xa02', 'Equation\xa01']
    assert [f.figcaption.get_text().strip() for f in p.body.find_all('figure')]==['Table 1. Scores', 'Table 2. More']
    equation = p.body.find(id='eq-z')
    assert equation.math is not None and equation.find(class_='number').string=='(1)'
    assert 'table()' not in p.body.get_text() and '{#' not in p.body.get_text()

@pytest.mark.parametrize('option,shown', [
    ('echo: false', False), ('echo: true', True), ('code-fold: true', True), ('include: false', False)])
def test_cell_options(option, shown):
    p = page(cell(f'#| {option}\ncompute()', new_output('stream', text='done')))
    assert ('compute()' in p.body.get_text())==shown
    assert ('done' in p.body.get_text())==(option!='include: false')
    assert (p.body.details is not None)==(option=='code-fold: true') and '#|' not in p.body.get_text()

def test_tabs_and_callouts():
    tabset = '::: {.panel-tabset}\n\n### bw4\n\nfour\n\n### bw8\n\neight\n\n:::'
    p = page(f'{tabset}\n\n::: {{.callout-note}}\n## Heed\n\nthis\n:::')
    found = [(t.h3.get_text(strip=True), t.p.string) for t in p.body.select('.panel-tabset > .tab')]
    assert found==[('bw4','four'), ('bw8','eight')]
    assert p.body.aside.find(class_='callout-title').string=='Heed'
    assert ':::' not in p.body.get_text() and not list(p.toc)

def test_links_between_notebooks_and_to_the_site_are_local():
    p = page(f'[a](00_quantizers.ipynb#bits) [b]({pages.SITE}/plots.html) [c](https://example.org/x.ipynb)')
    assert [a['href'] for a in p.body.find_all('a')]==['quantizers.html#bits', 'plots.html', 'https://example.org/x.ipynb']

def test_links_are_seen_from_the_folder_of_the_page():
    links = f'[a](../00_quantizers.ipynb#bits) [b]({pages.SITE}/study/figures.html) [c](gates.ipynb)'
    p = page(links, name='core/widths.ipynb')
    assert p.name=='core/widths.html'
    assert [a['href'] for a in p.body.find_all('a')]==['../quantizers.html#bits', '../study/figures.html', 'gates.html']
    there = page('## Bits', name='00_quantizers.ipynb')
    assert [f for f in checks.links([p, there]) if 'quantizers' in f]==[]
    assert any('no page or file' in f for f in checks.links([p]))

def test_an_output_may_hold_backticks_and_markup():
    p = page(cell('f()', new_output('stream', text='```\n<b> *x* {#y} :::')))
    assert p.body.select_one('.cell-output pre').get_text().strip()=='```\n<b> *x* {#y} :::'
    assert not problems(cell('f()', new_output('stream', text='@fig-x {#y} :::')))

def test_no_formula_is_silently_dropped():
    with pytest.raises(RuntimeError): page('$\\nosuchmacro{x}$ and $\\frac{1$')

def test_search_knows_sections_without_code():
    p = page('First\n\n## Bits: how many\n\nWidths count.\n\n```python\nsecret\n```', '### Other\n\n$$ a_b $$')
    found = list(site.sections(p))
    assert [s['href'] for s in found]==['page.html', 'page.html#bits-how-many', 'page.html#other']
    assert found[1]['text']=='Widths count.' and found[1]['title']=='Bits: how many' and 'a_b' not in found[2]['text']

def test_start_how_report_and_live_come_first_and_chapters_have_numbers():
    (top,front),(book,chapters),*parts = process.contents()
    assert not top and [n for n,_ in front]==['index.ipynb','how.ipynb','06_report.ipynb','live/index.html']
    assert [label.split()[0] for _,label in chapters]==list('012345') and book=='The book'
    assert max(len(label) for _,rooms in parts for _,label in rooms)<=32
    head = process.numbered("---\ntitle: 'A: b'\ndescription: c\n---\n", '3 ')
    assert pages.split_front_matter(new_notebook(cells=[new_raw_cell(head)]))[0]==dict(title='3 A: b', description='c')

# --- what the check sees --------------------------------------------------------------------------------------------

def test_a_good_page_has_no_problem():
    assert not problems('See @fig-a and [below](#more), `@fig-x`, `{#id}`.', figure(), '## More\n\n[API](https://example.org)')

@pytest.mark.parametrize('bad,word', [
    (['@fig-none'], 'no label fig-none'), (['[x](#nowhere)'], '#nowhere'), (['[x](no_such.ipynb)'], 'no page or file'),
    (['![](missing.png)'], 'fig-alt'), (['![A](missing.png)'], 'no file'), (['text {#sec-x}'], 'printed raw: {#sec-x}'),
    (['a\n:::'], 'printed raw: :::'), (['# Two titles'], 'second title'), ([figure(alt='')], 'fig-alt'),
    ([figure(cap='')], 'fig-cap'), ([figure(label='')], 'label'), ([figure(label='plot')], 'label'),
    ([figure(), figure()], 'identifier fig-a'), ([cell('w', WIDGET)], 'widget'),
    ([cell('w', {'text/plain': "VBox(children=(Text(value=''),))"})], 'shows nothing'),
    ([cell('f', {'text/plain': '<Figure size 640x480 with 1 Axes>'})], 'shows nothing'),
    ([cell('f', new_output('stream', text='Traceback (most recent call last):\n…'))], 'shows nothing'),
    ([cell('f', new_output('error', ename='E', evalue='v', traceback=['Traceback (most recent call last)']))], 'is an error')])
def test_the_check_sees(bad, word): assert any(word in p for p in problems(*bad)), problems(*bad)

def test_an_unclosed_box_is_seen():
    with pytest.raises(RuntimeError, match='(?is)00_page.*unclosed'): page('::: {.callout-note}\nopen')

def test_labels_are_unique_over_the_site():
    a,b = page(figure(), name='00_a.ipynb'),page(figure(), name='01_b.ipynb')
    assert any('share the label fig-a' in p for p in checks.labels([a, b]))

def test_dead_anchors_between_pages_are_seen():
    a = page('[x](01_b.ipynb#there) [y](01_b.ipynb#gone)', name='00_a.ipynb')
    b = page('## There', name='01_b.ipynb')
    said = 'a.html: b.html#gone: b.html has no #gone; give it a heading, or show_doc it there'
    assert [*checks.links([a, b])]==[said]

# --- API documentation ----------------------------------------------------------------------------------------------

LIB = ROOT/'switchable_llm'
MODULES = sorted('.'.join(p.relative_to(LIB).with_suffix('').parts) for p in LIB.rglob('[!_]*.py'))

@pytest.mark.parametrize('module', MODULES)
def test_every_exported_name_has_an_entry_with_its_parameters(module):
    values = apidoc.assignments(module)
    for name,o in apidoc.exported(module).items():
        if name in values: assert f'### {name} ' in apidoc.constants(module); continue
        text = apidoc.document(name, o)
        assert text.startswith(f'### {name} ') and inspect.getdoc(o).splitlines()[0] in text, name
        empty = [n for n,_,_,note in apidoc.rows_of(o) if not note and n!='**Returns**']
        assert not empty, f'{name}: no comment on {empty}'
        assert all(f'| `{n}` |' in text for n in apidoc.documented(o)), name

def test_the_check_sees_a_name_or_a_parameter_without_documentation():
    o = apidoc.exported('quantizers')
    def written(names):
        texts = [*(apidoc.document(n, o[n]) for n in names), apidoc.constants('quantizers')]
        return pages.make_page('00_quantizers.ipynb', new_notebook(cells=[*map(new_markdown_cell, texts)]))
    names = [n for n in o if n not in apidoc.assignments('quantizers')]
    assert not list(checks.api([written(names)]))
    without = written([n for n in names if n!='quantize'])
    assert any('quantize is not documented' in p for p in checks.api([without]))
    p = written(names)
    next(td for td in p.body.find_all('td') if td.get_text()=='qp').string = ''
    assert any('no word on qp' in x for x in checks.api([p]))

def test_entries_of_the_three_kinds_of_values():
    from switchable_llm.quantizers import Bits
    assert 'Weight bits' in apidoc.document('Bits', Bits) and '#### Bits.parse' in apidoc.document('Bits', Bits)
    assert "| `how` | `str` | `'a|b'` | a \\| b |" in apidoc.table([('how', 'str', "'a|b'", 'a | b')])
    long = pages.pandoc(apidoc.table([('how', 'int | None', '1', 'a | b'), ('x', 'int', '2', 'words '*40)]))
    assert [td.get_text() for td in long.find_all('td')][:4]==['how', 'int | None', '1', 'a | b']

def test_signs_in_comments_are_no_markdown():
    said = apidoc.table([('n', 'int', '', '2**bits or 3**bits, ~4, `a*b*c`, <x> and $y$')])
    assert pages.pandoc(said).find_all('td')[2].get_text()=='2**bits or 3**bits, ~4, a*b*c, <x> and $y$'
    assert pages.pandoc(said).select('strong, em, sub, math')==[]

def test_a_type_alone_has_no_table():
    def f(a) -> int: "Doc."
    class C:
        "Doc."
        @property
        def size(self) -> int: "How **many**."
    assert apidoc.entry('f', lambda: 0, False).count('|')==0
    text = apidoc.entry('C.size', C.size.fget, True)
    assert text=='```python\nC.size -> int\n```\n\n*How \\*\\*many\\*\\*.*'

LINKED = '[`text`](/x/data/text.html#text)'

@pytest.mark.parametrize('text,known,kept', [
    (LINKED, set(), False), (LINKED, {'text'}, True),
    ('[`use_profile`](/x/core/switching.html#use_profile)', set(), True),
    (f'### f {{.api}}\n\n| {LINKED} | `str` | What {LINKED} says |', {'text'}, False),
    ('[`text`](data/text.ipynb#text)', set(), True)])
def test_plain_words_and_parameters_are_no_links_to_something_else(text, known, kept):
    honest = process.honest_links(text, known)
    assert honest==(text if kept else text.replace(LINKED, '`text`'))

def test_a_method_with_an_entry_of_its_own_is_not_in_its_class_too():
    whole,own = '### C {.api}\n\na\n\n#### C.f {.api}\n\nb\n\n#### C.g {.api}\n\nc\n','#### C.f {.api}\n\nb\n'
    assert process.once([whole, own, 'prose'])==[whole.replace('#### C.f {.api}\n\nb\n\n', ''), own, 'prose']
    twice = pages.make_page('00_quantizers.ipynb', new_notebook(cells=[new_markdown_cell(own+'\n'+own)]))
    assert any('C.f is documented 2 times' in p for p in checks.api([twice]))

def test_a_link_inside_a_link_is_undone():
    twice = '[[`Task`](https://e.org/#task)](a.html#task)'
    assert process._link_in_link.sub(r'[\1](\2)', twice)=='[`Task`](a.html#task)'

# --- README ---------------------------------------------------------------------------------------------------------

def test_readme_is_plain_markdown_with_its_pictures():
    nb = new_notebook(cells=[
        new_raw_cell('---\ntitle: T\ndescription: D\n---'), new_markdown_cell('<!-- W -->'),
        new_markdown_cell('See @fig-a. [ch](00_quantizers.ipynb)'), figure(more='#| echo: false\n'),
        new_markdown_cell('::: {.callout-note}\n## Head {.x}\n:::'), cell('1+1', {'text/plain': '2'})])
    files = readme.make(nb)
    text = files['README.md'].decode()
    start = '# T\n\nD\n\nSee Figure 1. [ch](nbs/00_quantizers.ipynb)\n\n![Two lines](index_files/fig-a.svg)\n\n*What '
    assert text.startswith(start) and '## Head\n' in text and '```\n2\n```' in text
    assert ':::' not in text and 'plot()' not in text and files['index_files/fig-a.svg']==SVG.encode()

def test_what_is_for_the_site_alone_is_a_comment_in_the_notebook():
    text = process.for_site('before\n\n<!-- site-only: **[Try](live/index.html)** now. -->\n\nafter <!-- map -->')
    assert text=='before\n\n::: {.site-only}\n**[Try](live/index.html)** now.\n:::\n\nafter <!-- map -->'
    assert page(text).body.select_one('.site-only a')['href']=='live/index.html'

def test_cells_between_two_comments_are_folded_on_the_site():
    text = process.for_site('**More** <!-- folded -->\n\nin **it**\n\n<!-- end of folded -->\n\nafter')
    body = page(text).body
    assert body.details.summary.get_text().strip()=='More' and 'in it' in body.details.get_text() and 'after' not in body.details.get_text()

@pytest.mark.parametrize('source,said', [
    ('See [b](b.ipynb).', None), ('### search\n\n#### page-search {#page-search}', 'times the identifier page-search')])
def test_ids_of_the_frame_are_not_those_of_a_page(source, said):
    found = [*checks.labels([page(source)])]
    assert any(said in f for f in found) if said else not found

def test_links_of_the_line_under_the_title_lead_to_pages():
    head = new_raw_cell('---\ntitle: A page\ndescription: See [b](01_b.ipynb).\n---')
    p = pages.make_page('00_page.ipynb', new_notebook(cells=[head, new_markdown_cell('x')]))
    assert 'href="b.html"' in p.description
    assert [*checks.links([p])]==['page.html: no page or file for b.html']

# --- code and outputs -----------------------------------------------------------------------------------------------

def test_a_line_of_code_goes_on_below_where_it_begins_and_columns_are_known():
    p = page(cell('if x:\n    f()', new_output('stream', text='a  b\n1  2\n')), cell('g', {'text/plain': "Profile(name='a', bits=4)"}))
    assert [l.get('style') for l in p.body.select('code.sourceCode > span')]==[None, '--in: 4ch', None]
    assert [b['class'] for b in p.body.select('.cell-output')]==[['cell-output'], ['cell-output','words']]

# --- colours --------------------------------------------------------------------------------------------------------

def luminance(color):
    c = [int(color[i:i+2], 16)/255 for i in (1, 3, 5)]
    return sum(w*(x/12.92 if x<=.04045 else ((x+.055)/1.055)**2.4) for w,x in zip((.2126, .7152, .0722), c))

def contrast(a, b):
    low,high = sorted(luminance(c)+.05 for c in (a, b))
    return high/low

def test_every_colour_is_text_on_both_pages_and_profiles_differ_in_grey():
    "4.5 for text (so 3 for marks), on the pages of the plain site and of Quarto's cosmo and darkly."
    css = (site.ASSETS/'site.css').read_text()
    backs = dict(light=['#ffffff'], dark=['#222222', *re.findall(r'dark; --back: (#\w+)', css)])
    assert len(backs['dark'])==3 and '--back: #fff;' in css
    for k,theme in enumerate(backs):
        pale = {c: contrast(c[k], b) for c in ON_PAGE.values() for b in backs[theme] if contrast(c[k], b)<4.5}
        assert not pale
        greys = [116*luminance(ON_PAGE[STYLES[p].color][k])**(1/3)-16 for p in ('bw8','bw6','mixed8648','w4a8','bw4')]
        assert all(b-a>5 for a,b in zip(greys, greys[1:]))
    assert len({STYLES[p].marker for p in STYLES})==len(STYLES)-1   # uniform8 is bw8

def test_a_saved_figure_takes_the_colours_of_its_page():
    svg = '<svg><style>*{}</style><text fill="#7f7f7f">a</text><path stroke="#365e89"/></svg>'
    light,dark = themed(svg).split('@media (prefers-color-scheme:dark)')
    assert '[fill="#7f7f7f"],[style*="fill: #7f7f7f"]){fill:#5f6672!' in light and '){stroke:#068efd!' in dark
    cells = themed(svg.replace('</svg>', '<text fill="#ffffff">8</text></svg>'))   # white words stand on coloured areas
    assert 'text:is([fill="#365e89"]' in cells and '}:is([fill="#365e89"]' not in cells and ':is([stroke="#365e89"]' in cells

@pytest.mark.parametrize('drawn,said', [
    ('<text fill="#7f7f7f">a</text><path stroke="#365e89"/><path stroke="#999999" stroke-opacity=".2"/>', []),
    ('<text>a</text>', ['1.2 on the dark page: words in #000000']),
    ('<g fill="#7f7f7f"><text>a</text></g>', []),
    ('<text fill="#ffffff">8</text><text>4</text>', []),   # on areas that were coloured for them
    ('<g stroke="#444444"><path/></g>', ['1.6 on the dark page: line in #444444']),
    ('<path stroke="#ff7f0e"/>', ['2.5 on the light page: line in #ff7f0e']),
    ('<path stroke="#7f7f7f" opacity="0.6"/>', ['2.5 on the light page: line in #7f7f7f']),
    ('<path stroke="black"/>', ['1.2 on the dark page: line in #000000']),
    ('<path fill="#bab206"/><path fill="#999999" fill-opacity=".2"/>', []),
    ('<path fill="#ff7f0e"/>', ['2.5 on the light page: area in #ff7f0e']),
    ('<path fill="#ff7f0e"/><text fill="#ffffff">8</text>', []),
    ('<path fill="#ff7f0e"/><g id="QuadMesh_1"/>', []),   # shades of a scale
    ('<path fill="url(#hatch)"/>', [])])
def test_words_lines_and_areas_in_figures_can_be_seen_in_both_themes(drawn, said):
    svg = themed(f'<svg xmlns="http://www.w3.org/2000/svg">{drawn}</svg>')
    p = page(figure(data={'image/svg+xml': svg}))
    assert [f.removeprefix('page.html: page_files/fig-a.svg: contrast ') for f in checks.figures(p)]==said

@pytest.mark.parametrize('follows', [True, False])
def test_pictures_of_the_explorer_can_be_seen_in_both_themes(follows, monkeypatch):
    if not follows: monkeypatch.setattr(looks, 'themed', lambda svg: svg)   # and a picture that does not is found out
    with panels(1, 1, 3, 2) as (fig,(ax,)):
        for name,(color,marker) in STYLES.items(): ax.plot([0, 1], c=color, marker=marker, label=name)
        ax.set(xlabel='words')
    data = looks.svg_picture(fig, 'Lines').partition('base64,')[2].partition('"')[0]
    svg = execute_notebooks.plain_svg(base64.b64decode(data).decode())   # colours as the check reads them
    faults = list(checks.figures(page(figure(data={'image/svg+xml': svg}))))
    assert (not faults)==follows and (follows or any('words' in f for f in faults) and any(': line' in f for f in faults))

def test_the_check_of_figures_knows_the_colours_of_the_pages():
    css = (site.ASSETS/'site.css').read_text()
    assert {'#ffffff', *re.findall(r'dark; --back: (#\w+)', css), '#222222'}=={b for bs in checks.PAGES.values() for b in bs}

def test_no_page_asks_anybody_for_a_font():
    assert not re.search(r'@import|url\(', (site.ASSETS/'site.css').read_text()+(ROOT/'nbs/styles.css').read_text())
    assert '$web-font-path: false' in (ROOT/'nbs/fonts.scss').read_text() and not list(checks.config(ROOT/'_quarto.yml'))

# --- figures in notebooks -------------------------------------------------------------------------------------------

def test_a_saved_svg_has_its_colours_in_attributes_and_its_words_untouched():
    import execute_notebooks
    svg = ('<svg width="9.12345pt"><metadata>\n x</metadata>\n <g id="text_1">\n  <path id="m1" d="M 1.23456 2 \nL 3 4.9999" '
           'style="fill: none; stroke: #365e89"/>\n  <text style="font-family: \'A\', serif" x="1">0.12345 and  two</text>\n </g>\n</svg>')
    said = execute_notebooks.plain_svg(svg)
    assert 'style=' not in said and 'metadata' not in said and 'fill="none" stroke="#365e89"' in said
    assert 'd="M 1.23 2 L 3 5.00"' in said and '>0.12345 and  two<' in said and said.startswith("<svg font-family=\"'A', serif\"")
    assert 'id="m1"' in said and 'text_1' not in said and execute_notebooks.plain_svg(said)==said

def test_of_two_formats_the_small_svg_or_the_png_stays():
    big = SVG+'<!-- '+'x'*execute_notebooks.LARGEST_SVG+' -->'
    both = [{'image/svg+xml': s, 'image/png': PNG, 'text/plain': 'F'} for s in (SVG, big)]
    nb = new_notebook(cells=[cell('f', data) for data in both])
    execute_notebooks.one_format(nb)
    assert [sorted(c.outputs[0].data) for c in nb.cells]==[['image/svg+xml','text/plain'], ['image/png','text/plain']]

def test_widgets_and_stderr_are_not_saved(capsys):
    outputs = WIDGET,new_output('stream', name='stderr', text='bar'),{'text/plain': '2'}
    nb = new_notebook(cells=[cell('f', *outputs)], metadata={'widgets': {}})
    execute_notebooks.drop_unsaved(nb)
    assert [o.data for o in nb.cells[0].outputs]==[{'text/plain': '2'}] and 'widgets' not in nb.metadata
    assert 'bar' in capsys.readouterr().err

def test_a_figure_is_svg_with_text_and_the_same_bytes_twice(tmp_path, monkeypatch):
    code = """
import matplotlib.pyplot as plt
with plt.rc_context({'font.size': 9}):
    fig,ax = plt.subplots()
    ax.plot([1, 2], label='words'); ax.legend(); ax.set_xlim(0, 1)"""
    kernel,folder = {'name': 'python3', 'display_name': 'p', 'language': 'python'},{'metadata': {'path': str(tmp_path)}}
    for k,v in execute_notebooks.kernel_env(tmp_path/'home').items(): monkeypatch.setenv(k, v)
    monkeypatch.delenv('MPLBACKEND', raising=False)
    def drawn():
        nb = new_notebook(cells=[cell(code)], metadata={'kernelspec': kernel})
        execute_notebooks.Client(nb, timeout=120, kernel_name='python3', resources=folder).execute()
        execute_notebooks.one_format(nb)
        pictures = [o.data for o in nb.cells[0].outputs if 'image/svg+xml' in o.get('data', {})]
        return pictures[0]['image/svg+xml']
    svg = drawn()
    assert 'words</text>' in svg and 'sans-serif' in svg and '<dc:date>' not in svg and drawn()==svg

# --- in a browser ---------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)

@pytest.fixture
def browser():
    if not CHROMIUM: pytest.skip('no Chromium is installed')
    sync = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield b
        b.close()

def test_theme_search_and_tabs_work_from_files(browser, tmp_path, monkeypatch):
    (tmp_path/'proc').mkdir(); (tmp_path/'proc/styles.css').write_text('')
    monkeypatch.setattr(site, 'PROC', tmp_path/'proc')
    tabset = '## Precision\n\nRounding words\n\n::: {.panel-tabset}\n\n### bw4\n\nfour\n\n### bw8\n\neight\n\n:::'
    site.write([page('Start', name='index.ipynb'), page(tabset, figure(), name='core/widths.ipynb')], tmp_path/'docs')
    context,errors = browser.new_context(color_scheme='dark', offline=True),[]
    tab = context.new_page()
    tab.on('pageerror', lambda e: errors.append(str(e)))
    tab.goto((tmp_path/'docs/index.html').as_uri())
    back = lambda: tab.evaluate('getComputedStyle(document.body).backgroundColor')
    dark = back(); tab.click('#theme')
    assert dark!=back()=='rgb(255, 255, 255)'
    tab.fill('#page-search', 'round'); tab.click('#found a')
    tab.wait_for_url('**/core/widths.html#precision')
    assert tab.url.endswith('core/widths.html#precision') and back()=='rgb(255, 255, 255)'   # the choice holds
    assert tab.locator('p:text-is("four")').is_visible() and not tab.locator('p:text-is("eight")').is_visible()
    tab.click('role=tab[name=bw8]')
    assert tab.locator('p:text-is("eight")').is_visible() and not tab.locator('p:text-is("four")').is_visible()
    tab.fill('#page-search', 'nothing like it'); tab.wait_for_selector('text=Nothing found')
    assert not errors
