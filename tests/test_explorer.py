"The explorer as a person meets it: the command, its server, and its page in a real browser, without a network."
import importlib.util, json, os, re, shutil, signal, socket, subprocess, sys, time
from pathlib import Path
import psutil, pytest
from conftest import heed_ctrl_c
from switchable_llm.study.figures import profile_style
from switchable_llm.study.records import PRESETS
from switchable_llm.apps.cli import main
from switchable_llm.apps.commands import page_code

def browser_path():
    "A Chromium or Chrome of this machine: `BROWSER_PATH`, or the first on the path."
    names = 'chromium chromium-browser google-chrome google-chrome-stable chrome'.split()
    return os.environ.get('BROWSER_PATH') or next(filter(None, map(shutil.which, names)), None)

def missing():
    "What keeps a browser from being driven here, or nothing."
    lacking = [m for m in ('voila','ipykernel','playwright') if not importlib.util.find_spec(m)]
    if lacking: return f"{', '.join(lacking)} is not installed: pip install -e '.[dev]'"
    return '' if browser_path() else 'no browser is installed: apt-get install chromium'

CODE = 'import sys\nfrom switchable_llm.apps.cli import main\nsys.exit(main(sys.argv[1:]))'

def number(text): return float(text.split()[0].replace(',', '').replace('<', ''))   # of '2,030 %' or '<0.001 nats'

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

class Server:
    "`switchable-llm explore` on a port of its own, ended with what it started."
    def __init__(self, folder, env, *argv):
        self.port,self.log = free_port(),folder/'server.log'
        line = [sys.executable, '-c', CODE, 'explore', *map(str, argv), '--port', str(self.port), '--no-browser']
        with open(self.log, 'w') as f:
            streams = dict(stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT)
            self.process = subprocess.Popen(line, cwd=folder, env=env, start_new_session=True, preexec_fn=heed_ctrl_c, **streams)
    def __enter__(self):
        deadline = time.time()+300
        while time.time()<deadline and self.process.poll() is None:
            if 'token=' in self.text() and self.text().endswith('\n'): return self
            time.sleep(.2)
        self.__exit__()
        raise AssertionError(f'the server did not start:\n{self.text()}')
    def text(self): return self.log.read_text()
    def address(self): return re.search(r'^http://127.0.0.1:\d+/\?token=\S+$', self.text(), flags=re.M)[0]
    def kernels(self): return psutil.Process(self.process.pid).children(recursive=True)
    def interrupt(self):
        "Ctrl-C; the exit status."
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(300)
    def __exit__(self, *_):
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try: os.killpg(self.process.pid, sign)   # the kernel too
            except ProcessLookupError: break
            try: self.process.wait(30)
            except subprocess.TimeoutExpired: pass

def test_without_voila_the_command_says_what_to_install(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name=='voila' else find(name, *a))
    assert main(['explore'])==1
    err = capsys.readouterr().err
    assert "pip install 'switchable-llm[explore]'" in err and err.count('\n')==1

def test_a_missing_checkpoint_ends_before_a_server_starts(capsys):
    assert main(['explore', 'nowhere'])==1
    err = capsys.readouterr().err
    assert err.startswith('error: nowhere: missing') and err.count('\n')==1
    assert main(['explore', '--preset', 'huge'])==2

@pytest.mark.parametrize('option,wrong', [
    ('--port','0'), ('--port','99999'), ('--port','http'), ('--max-sessions','0'), ('--max-sessions','-1'),
    ('--idle','0'), ('--idle','nan'), ('--theme','blue')])
def test_wrong_options_are_refused_by_their_names(option, wrong, capsys):
    assert main(['explore', option, wrong])==2
    err = capsys.readouterr().err
    assert option in err and repr(wrong) in err

VOILA = all(map(importlib.util.find_spec, ('voila','ipykernel')))
needs_voila = pytest.mark.skipif(not VOILA, reason='voila or ipykernel is not installed')

@needs_voila
def test_a_port_that_is_taken(capsys, monkeypatch):
    monkeypatch.setenv('JUPYTER_PATH', '')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen()
        port = s.getsockname()[1]
        assert main(['explore', '--no-browser', '--port', str(port)])==1
    out,err = capsys.readouterr()
    assert out=='' and f'--port {port}: another program answers there' in err and err.count('\n')==1

def test_the_page_works_elsewhere(tmp_path, monkeypatch):
    "So what lies here is named in full, and names that are no paths stay as they are."
    monkeypatch.chdir(tmp_path)
    Path('mine.safetensors').touch(); Path('tiny').mkdir()
    code = page_code('mine.safetensors', 'some/model', ['tiny', './tiny'])
    full,folder = (str(tmp_path/n) for n in ('mine.safetensors','tiny'))
    assert f"explorer({full!r}, 'some/model', ['tiny', {folder!r}])" in code
    assert "explorer('tiny', None, [])" in page_code()
    compile(page_code("it's"), 'page', 'exec')

@needs_voila
def test_a_port_that_is_taken_is_told_before_anything_else(capsys):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen()
        start = time.time()
        assert main(['explore', '--no-browser', '--port', str(s.getsockname()[1])])==1
    assert 'starts' not in capsys.readouterr().err and time.time()-start<5

@needs_voila
def test_the_page_is_a_notebook_of_this_python(tmp_path):
    from switchable_llm.explorer.page import write_page
    page = json.loads(write_page(tmp_path, 'x = 1').read_text())
    assert ''.join(page['cells'][0]['source'])=='x = 1'
    kernel, = (tmp_path/'kernels').glob('*/kernel.json')
    assert json.loads(kernel.read_text())['argv'][0]==sys.executable
    assert page['metadata']['kernelspec']['name']==kernel.parent.name

needs_browser = pytest.mark.skipif(bool(missing()), reason=missing())

@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=browser_path(), args=['--no-sandbox'])
        yield b
        b.close()

class Page:
    "The explorer's page, by what a person sees."
    def __init__(self, browser, address, ready='.sl-table'):
        self.page,self.asked = browser.new_page(viewport=dict(width=1280, height=1400)),[]
        here = (address.partition('?')[0], 'data:', 'blob:')
        def route(r):
            if r.request.url.startswith(here): return r.continue_()
            self.asked.append(r.request.url)
            r.abort()
        self.page.route('**/*', route)
        self.page.set_default_timeout(300_000)
        self.page.goto(address)
        self.page.wait_for_selector(ready)
    def wait(self, test, what):
        "Until `test()`; the time that took."
        start = time.time()
        while not test():
            assert time.time()-start<300, f'waited for {what}; the page says: {self.message()}'
            self.page.wait_for_timeout(20)
        return time.time()-start
    def leave(self, server):
        "For another page: the browser reports it, and the kernel ends long before the server finds it without a page."
        start = time.time()
        self.page.unroute_all()   # a report that is held up is lost
        self.page.goto('about:blank')
        while server.kernels():
            assert time.time()-start<60, 'the kernel lives, its page has gone'
            time.sleep(.1)
        self.page.close()
    def message(self): return self.page.locator('.sl-done, .sl-error, .sl-wait').first.inner_text()
    def table(self):
        "Profile -> the other cells of its row, by their heads; those that are folded too."
        cells = 'ts => ts.slice(0, 2).map(t => [...t.rows].map(r => [...r.cells].map(c => c.textContent.trim())))'
        (heads,*rows),(more_heads,*more) = self.page.locator('.sl-table').evaluate_all(cells)
        assert [r[0] for r in rows]==[r[0] for r in more]
        return {r[0]:dict(zip([*heads[1:], *more_heads[1:]], [*r[1:], *m[1:]])) for r,m in zip(rows, more)}
    def button(self, name): return self.page.locator('.sl-on', has_text=re.compile(f'^{name}$'))
    def toggle(self, name): self.button(name).click()
    def unfold(self, title): self.page.locator('.sl-fold', has_text=title).click()
    def outside(self):
        "Elements that reach beyond the window, but for what scrolls inside of itself."
        return self.page.evaluate('''() => {
          const scrolls = e => { for (e = e.parentElement; e && e!==document.body; e = e.parentElement)
            if (['auto','scroll'].includes(getComputedStyle(e).overflowX)) return true; return false; };
          const wide = [...document.querySelectorAll('.sl-app *')].filter(
            e => { const r = e.getBoundingClientRect(); return r.width && r.right>innerWidth+1 && !scrolls(e); });
          return [...wide.map(e => e.outerHTML.slice(0, 80)),
                  ...(document.scrollingElement.scrollWidth>innerWidth ? ['the page itself'] : [])]; }''')
    def field(self, label): return self.page.get_by_label(label, exact=True)
    def write(self, label, text): self.field(label).fill(text); self.field(label).press('Tab')

@needs_browser
def test_the_page_in_a_browser(browser, child_env, tmp_path):
    "Toggles, questions, the grid, mistakes, training: every step reads the numbers that changed."
    with Server(tmp_path, child_env) as server:
        p = Page(browser, server.address())
        assert list(p.table())==['float','bw4','bw8','w2a8'] and p.table()['float']['KL to float, prompt']=='0 nats'
        # a toggle adds a row; another takes one away
        p.toggle('bw6')
        p.wait(lambda: 'bw6' in p.table(), 'bw6')
        kl = {n:number(r['KL to float, prompt']) for n,r in p.table().items()}
        assert kl['float']==0<kl['bw8']<kl['bw6']<kl['bw4']<kl['w2a8']
        assert [p.table()[n]['weight bits'] for n in ('float','bw8','bw6','bw4','w2a8')]==['16','8','6','4','2']
        p.toggle('bw4')
        p.wait(lambda: 'bw4' not in p.table(), 'bw4 to go')
        # another question: other numbers
        before = p.table()
        p.write('Question', 'What is the job of Dufe?')
        p.wait(lambda: p.table()!=before, 'the new question')
        assert list(p.table())==list(before) and p.table()['float']['answer']!=before['float']['answer']
        # units that people read
        units = {'memory':'MB', 'speed':'tokens/s', 'time of a token':'ms', 'sure of the first token':'%', 'largest drift':'%'}
        for row in p.table().values(): assert {h:row[h].split()[-1] for h in units if row[h]!='–'}.items()<=units.items()
        # a cell of the grid: a profile by hand; settings are folded until then
        assert not p.field('mlp_out, layers 0').is_visible()
        p.unfold('Bits by hand')
        p.field('mlp_out, layers 0').select_option('w8a8')
        p.wait(lambda: 'custom' in p.table(), 'the grid')
        assert 2<float(p.table()['custom']['weight bits'])<8
        p.write('Set all cells to', 'w5a7')
        p.wait(lambda: p.table()['custom']['weight bits']=='5', 'five bits')
        assert p.table()['custom']['activation bits']=='7'
        # mistakes are messages, and what was shown stays
        before = p.table()
        for label,wrong,word in (
                ('Question', '', 'question is empty'), ('Context', '   ', 'context is empty'),
                ('Set all cells to', 'w99', 'w=99'), ('Layer ranges', '0-9', 'blocks 0 to 3')):
            old = p.field(label).input_value()
            p.write(label, wrong)
            p.wait(lambda: word in p.message(), word)
            assert p.page.locator('.sl-error').count()==1 and p.table()==before
            p.write(label, old or 'w5a7')
            p.wait(lambda: p.page.locator('.sl-error').count()==0 or old==wrong, 'the message to go')
        # odd texts
        p.write('Context', 'Žofie — 索菲 — <img src=x onerror=alert(1)> lives in Tarito. $x$ '*200)
        p.wait(lambda: 'left out' in p.message() and 'unknown' in p.message(), 'the notes')
        assert list(p.table())==list(before)
        # what was offered is all that there is
        p.unfold('Another model')
        offered = p.field('Model').evaluate('s => [...s.options].map(o => o.text)')
        assert offered==list(PRESETS)
        # adapters, trained while the page is open
        p.field('Example').select_option(index=2)
        p.write('Steps', '5')
        p.page.get_by_role('button', name='Train adapters', exact=True).click()
        p.page.get_by_text('adapters trained for 5 steps').wait_for()
        p.wait(lambda: 'took' in p.message(), 'the trained model')
        # every control has a name, every picture a text; nothing of Python's shows; no network
        def count(what, lacks): return p.page.evaluate(f'[...document.querySelectorAll("{what}")].filter(e => {lacks}).length')
        controls = '.sl-app input, .sl-app select, .sl-app textarea'
        assert count(controls, '!(e.labels?.length && e.labels[0].innerText.trim())')==0
        assert count('.sl-app img', '!e.alt || !e.naturalWidth')==0
        body = p.page.locator('body').inner_text().replace('Error of the layers', '')
        assert not any(w in body for w in ('Traceback', 'Error', 'Loading weights'))
        assert p.asked==[]
        p.leave(server)
        assert 'Traceback' not in server.text(), server.text()
        assert server.interrupt()==0 and 'Traceback' not in server.text(), server.text()

CONTRAST = '''e => {
  const parts = c => c.match(/[\\d.]+/g).slice(0, 3).map(x => x/255).map(x => x<=.04045 ? x/12.92 : ((x+.055)/1.055)**2.4);
  const bright = c => { const [r, g, b] = parts(c); return .2126*r+.7152*g+.0722*b; }, s = getComputedStyle(e);
  const [low, high] = [bright(s.color), bright(s.backgroundColor)].sort((a, b) => a-b);
  return [s.backgroundColor, (high+.05)/(low+.05)]; }'''

@needs_browser
@pytest.mark.parametrize('theme', ['light','dark'])
def test_how_the_page_looks(browser, child_env, tmp_path, theme):
    "Words while it loads; colours of the figures; differing words underlined; nothing cut, on a wide screen or a phone."
    with Server(tmp_path, child_env, '--theme', theme) as server:
        text = server.text()
        assert text.index('starts the server')<text.index('token=')<text.index('listens there')
        p = Page(browser, server.address(), ready='.sl-wait')
        seen = []
        def done():
            seen.append(p.page.locator('body').inner_text())
            return p.page.locator('.sl-table').count()>0
        p.wait(done, 'the first answers')
        said = '\n'.join(seen)
        assert 'Step 1 of 3: starts torch' in said and re.search(r'\b\d+ s\b', said)
        p.wait(lambda: 'took' in p.message(), 'the end')
        # each button that is on has the colour of the figures, and can be read
        for n in ('float','bw4','bw8','w2a8'):
            c = profile_style(n).color
            color,contrast = p.button(n).evaluate(CONTRAST)
            assert color==f'rgb({int(c[1:3], 16)}, {int(c[3:5], 16)}, {int(c[5:], 16)})' and contrast>=4.5
            assert p.page.locator('.sl-chip', has_text=re.compile(f'^{n}$')).evaluate(CONTRAST)==[color, contrast]
        # words that differ are underlined, and told in words
        t = p.table()
        assert 'differ' in t['w2a8']['beside float'] and t['float']['beside float']=='the reference'
        marked = p.page.locator('.sl-stacked mark')
        assert marked.count()>0 and 'underline' in marked.first.evaluate('e => getComputedStyle(e).textDecorationLine')
        # answers before settings
        def top(what): return p.page.locator(what).first.bounding_box()['y']
        assert top('.sl-stacked')<top('.sl-figure')<top('.sl-fold')
        assert p.page.locator('.sl-figure').first.evaluate('e => getComputedStyle(e).colorScheme')==theme   # so they follow it
        for title in ('Another model','Bits by hand'): p.unfold(title)
        for d in p.page.locator('summary').all(): d.click()
        for width in (1400, 390):
            p.page.set_viewport_size(dict(width=width, height=900)); p.page.wait_for_timeout(500)
            assert p.outside()==[], width
        # on a phone a row is a block, whose numbers have their heads before them
        cell = p.page.locator('.sl-stacked td.sl-number').first
        assert 'sure of the first token' in cell.evaluate('e => getComputedStyle(e, "::before").content')
        p.page.close()

@needs_browser
def test_a_packed_file(browser, child_env, tmp_path, toy_folder, monkeypatch):
    "It has no float weights: the page says so, and compares with the profile of the most bits."
    monkeypatch.chdir(tmp_path)
    train = '--act per_token --steps 2 --batch-size 2 --train-n 20 --profiles bw4 bw8 --out mine'
    assert main(['train', '--quiet', '--model', str(toy_folder), *train.split()])==0
    assert main(['freeze', 'mine', '--out', 'mine.safetensors'])==0
    with Server(tmp_path, child_env, 'mine.safetensors', 'mine', '--max-sessions', 1) as server:
        p = Page(browser, server.address())
        assert set(p.table())=={'bw8','bw4'} and p.table()['bw8']['largest layer error']=='–'
        p.page.get_by_text('native steps, as a server has it').wait_for()
        p.field('Show').select_option(index=0)
        p.page.get_by_text('no float weights, so the error').wait_for()
        # a checkpoint, in the page that is open
        p.unfold('Another model')
        p.field('Model').select_option(label=str(tmp_path/'mine'))
        p.page.get_by_role('button', name='Load', exact=True).click()
        p.wait(lambda: 'float' in p.table(), 'the checkpoint')
        # the page loaded again: its place is free for it; a second one is told, and nothing of the first is lost
        p.page.unroute_all()   # the report that the old one goes must not be held up
        p.page.reload(); p.page.wait_for_selector('.sl-table')
        other = browser.new_page()
        answer = other.goto(server.address())
        assert answer.status==503 and '1 of 1 pages are open' in other.locator('body').inner_text()
        other.goto(server.address().partition('?')[0])
        assert 'with the token' in other.locator('body').inner_text()
        other.close()
        p.toggle('bw4'); p.wait(lambda: set(p.table())=={'bw8'}, 'bw4 to go')
        p.leave(server)
        assert 'Traceback' not in server.text()
