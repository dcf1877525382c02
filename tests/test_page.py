"The explorer's server over real HTTP: who may open a page, how many, and how long their kernels live."
import asyncio, importlib.util, json, os, re, signal, socket, subprocess, sys, time, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
import pytest
from conftest import heed_ctrl_c

lacking = [m for m in ('voila','ipykernel') if not importlib.util.find_spec(m)]
if lacking: pytest.skip(f"{', '.join(lacking)} is not installed", allow_module_level=True)
import psutil
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

SERVE = """
import os, sys, tempfile
from switchable_llm.explorer.page import serve_page, write_page
with tempfile.TemporaryDirectory() as tmp:
    os.environ['JUPYTER_PATH'] = tmp
    def tell(address): print(address, flush=True)
    settings = eval(sys.argv[2])
    page = write_page(tmp, settings.pop('cell', '6*7'))
    serve_page(page, int(sys.argv[1]), browser=False, tell=tell, **settings)
"""

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

class Served:
    "A page of a number, served by a process of its own."
    def __init__(self, env, **settings):
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, '-c', SERVE, str(self.port), repr(settings)], env=env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            preexec_fn=heed_ctrl_c)
        self.address,begins = self.process.stdout.readline().strip(),f'http://127.0.0.1:{self.port}/?token='
        assert self.address.startswith(begins), self.address+self.process.stdout.read()
        self.token = self.address.partition('token=')[2]
    def kernels(self):
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in children if p.is_running() and p.status()!='zombie']
    def get(self, path='/', method='GET', data=None, **headers):
        "Status, headers, text; redirections are followed."
        headers = {k.replace('_','-'):v for k,v in headers.items()}
        r = urllib.request.Request(f'http://127.0.0.1:{self.port}{path}', data, headers, method=method)
        try: answer = urllib.request.urlopen(r, timeout=300)
        except urllib.error.HTTPError as e: answer = e
        with answer: return answer.status, answer.headers, answer.read().decode()
    def page(self, **headers): return self.get(f'/?token={self.token}', **headers)
    def opened(self):
        "A page, its kernel, and what its browser would send along."
        status,headers,text = self.page()
        assert status==200, text
        cookie = '; '.join(c.partition(';')[0] for c in headers.get_all('Set-Cookie'))
        return re.search(r'"kernelId": "([\w-]+)"', text)[1], cookie
    def wait(self, test, what):
        deadline = time.time()+300
        while not test():
            assert time.time()<deadline, f'waited for {what}'
            time.sleep(.1)
    def end(self, sign=signal.SIGTERM):
        family = [psutil.Process(self.process.pid), *self.kernels()] if self.process.poll() is None else []
        if family: os.kill(self.process.pid, sign)
        text,_ = self.process.communicate(timeout=300)
        for p in psutil.wait_procs(family[1:], 60)[1]: p.kill(); raise AssertionError('a kernel was left')
        return self.process.returncode, text

@pytest.fixture
def served(child_env):
    started = []
    def serve(**settings):
        started.append(Served(child_env, **settings))
        return started[-1]
    yield serve
    for s in started: s.end()

@pytest.fixture(scope='module')
def one(child_env):
    "A server that no test fills."
    s = Served(child_env, max_sessions=50)
    yield s
    s.end()

def ws(one, kernel, **headers):
    "Open a page's connection to its kernel; the HTTP status where that is refused."
    async def connect():
        r = HTTPRequest(f'ws://127.0.0.1:{one.port}/api/kernels/{kernel}/channels',
                        headers={k.replace('_','-'):v for k,v in headers.items()})
        try: (await websocket_connect(r)).close()
        except HTTPClientError as e: return e.code
    return asyncio.run(connect())

# --- who may ask --------------------------------------------------------------------------------------------------

def test_without_the_token_there_is_no_page_and_no_kernel(one):
    for path in ('/', '/?token=', '/?token=guess', f'/?token={one.token[:-1]}', '/?Token='+one.token, '/login',
                 '/index.ipynb'):
        status,_,text = one.get(path)
        assert status==403 and 'kernelId' not in text, path
    assert 'the command printed it' in one.get('/')[2]
    for method in ('POST','PUT','DELETE','PATCH'): assert one.get('/', method, b'')[0] in (403, 405)
    assert not one.kernels()
    assert one.page()[0]==200 and len(one.kernels())==1

def test_a_cookie_alone_opens_no_page(one):
    "So that a page of another server on this machine, for which the browser sends it too, starts nothing."
    _,cookie = one.opened()
    had = len(one.kernels())
    status,_,text = one.get('/', Cookie=cookie)
    assert status==403 and 'the token' in text and len(one.kernels())==had
    set_cookie = one.page()[1].get_all('Set-Cookie')[0]
    assert 'SameSite=Strict' in set_cookie and 'HttpOnly' in set_cookie

@pytest.mark.parametrize('host', [
    'evil.example', 'evil.example:{port}', 'localhost.evil.example', '127.0.0.1.evil.example:{port}', 'xlocalhost',
    '192.168.0.1', '0.0.0.0', '[::1]:{port}'])
def test_another_name_for_this_machine_is_not_heard(one, host):
    "DNS rebinding: a stranger's name that stands for 127.0.0.1; with the token, and for what needs none."
    had,host = len(one.kernels()),host.format(port=one.port)
    for path in (f'/?token={one.token}', '/voila/static/voila.js', '/login', '/api/kernels'):
        status,_,text = one.get(path, Host=host)
        assert status==403 and 'for this machine only' in text
    assert ws(one, '0'*8+'-0-0-0-0', Host=host)==403 and len(one.kernels())==had

def test_names_of_this_machine_are_heard(one):
    for host in ('localhost', f'localhost:{one.port}', f'127.0.0.1:{one.port}', f'LOCALHOST:{one.port}'):
        assert one.page(Host=host)[0]==200

@pytest.mark.skipif(sys.platform!='linux', reason='127.0.0.2 is a Linux habit')
def test_it_listens_on_one_address(one):
    with socket.socket() as s: assert s.connect_ex(('127.0.0.2', one.port))!=0

def test_no_file_is_served(one):
    _,cookie = one.opened()
    for path in ('switchable-llm.ipynb', 'kernels/switchable-llm/kernel.json', 'open.html', 'x.png', '../x.svg',
                 '..%2f..%2fetc/passwd', '%2fetc/passwd'):
        assert one.get(f'/voila/files/{path}?token={one.token}', Cookie=cookie)[0] in (403, 404), path
    for path in ('/voila/templates/../../etc/passwd', '/voila/static/..%2f..%2fapp.py',
                 '/voila/templates/lab/static/..%2f..%2findex.html.j2', '/api/contents', '/voila/api/contents/',
                 '/voila/tree'):
        status,_,text = one.get(path, Cookie=cookie)
        assert status>=400 and 'root:' not in text and 'import' not in text, path

def test_what_a_kernel_hears_needs_the_cookie_and_the_pages_origin(one):
    kernel,cookie = one.opened()
    here = f'http://127.0.0.1:{one.port}'
    assert ws(one, kernel)==ws(one, kernel, Origin=here)==403
    assert ws(one, kernel, Cookie=cookie, Origin='http://evil.example')==403
    assert ws(one, kernel, Cookie=cookie, Origin='http://localhost:1')==403
    assert ws(one, kernel, Cookie=cookie, Origin=here) is None
    assert one.get(f'/api/kernels/{kernel}')[0]==one.get(f'/api/kernels/{kernel}', 'DELETE')[0]==403
    status,_,text = one.get(f'/api/kernels/{kernel}', Cookie=cookie)
    assert status==200 and json.loads(text)['id']==kernel
    shut = f'/voila/api/shutdown/{kernel}'
    # no word of the page's own
    assert one.get(shut, 'POST', b'')[0]==one.get(shut, 'POST', b'', Cookie=cookie)[0]==403
    # nobody starts kernels but a page
    assert one.get('/api/kernels', 'POST', b'{}', Cookie=cookie)[0] in (403, 404, 405)

# --- how many, how long -------------------------------------------------------------------------------------------

def test_many_pages_at_once(one, served):
    "As many kernels as the setting says; the others are told; when the pages are gone, so are the kernels."
    s = served(max_sessions=2, patience=.2, lonely_timeout=3600.)
    assert s.token!=one.token and len(s.token)>=32
    with ThreadPoolExecutor(12) as pool: answers = list(pool.map(lambda _: s.page(), range(12)))
    assert sorted(a[0] for a in answers)==[200]*2+[503]*10 and len(s.kernels())==2
    for status,headers,text in answers:
        assert headers['Content-Security-Policy'].startswith("default-src 'self'")
        if status==503: assert '2 of 2 pages are open' in text and '--max-sessions' in text
    assert s.page()[0]==503 and len(s.kernels())==2

def test_a_page_that_goes_makes_room(served):
    s = served(max_sessions=1, patience=60., lonely_timeout=3600.)
    kernel,cookie = s.opened()
    xsrf = re.search(r'_xsrf=([^;]+)', cookie)[1]
    def leave():
        time.sleep(.5)
        return s.get(f'/voila/api/shutdown/{kernel}', 'POST', f'_xsrf={xsrf}'.encode(), Cookie=cookie,
                     Origin=f'http://127.0.0.1:{s.port}')
    with ThreadPoolExecutor(1) as pool:      # as a browser does that loads the page again
        left = pool.submit(leave)
        again,_ = s.opened()
        assert left.result()[0]==204 and again!=kernel and len(s.kernels())==1

@contextmanager
def connected(s):
    "Kernel and cookie of a page with its connection open; on a slow machine a new page, if the kernel was given up."
    loop = asyncio.new_event_loop()
    def connect():
        kernel,cookie = s.opened()
        r = HTTPRequest(f'ws://127.0.0.1:{s.port}/api/kernels/{kernel}/channels',
                        headers=dict(Cookie=cookie, Origin=f'http://127.0.0.1:{s.port}'))
        async def opened(): return await websocket_connect(r)
        try: return kernel, cookie, loop.run_until_complete(opened())
        except HTTPClientError: return connect()
    kernel,cookie,connection = connect()
    try: yield kernel, cookie
    finally:
        async def close():
            connection.close()
            await asyncio.sleep(.1)
        loop.run_until_complete(close()); loop.close()

def test_a_kernel_without_a_page_ends(served):
    "A browser that was killed says nothing; a page whose connection is open keeps its kernel."
    s = served(lonely_timeout=5.)
    with connected(s) as (kernel,cookie):
        lonely,_ = s.opened()
        gone = lambda k: s.get(f'/api/kernels/{k}', Cookie=cookie)[0]==404
        s.wait(lambda: gone(lonely), 'the lonely kernel to end')
        time.sleep(11)                         # and twice as long as the server waits between two looks
        assert not gone(kernel) and len(s.kernels())==1
    s.wait(lambda: gone(kernel) and not s.kernels(), 'the other kernel to end')

def test_a_kernel_that_no_page_reaches_ends_also_when_it_is_busy(served):
    "Nobody can see what comes of its work; a page connects when its cell has returned."
    s = served(lonely_timeout=5., cell='import time; time.sleep(600)')
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(s.page)           # waits for the cell
        try:
            s.wait(s.kernels, 'the kernel')
            s.wait(lambda: not s.kernels(), 'the busy kernel to end')
        finally: s.end(signal.SIGTERM)
        opened.exception()

def test_a_page_that_nobody_uses_loses_its_kernel(served):
    s = served(idle=.1, lonely_timeout=3600.)
    with connected(s): s.wait(lambda: not s.kernels(), 'the idle kernel to end')

@pytest.mark.parametrize('sign', [signal.SIGINT, signal.SIGTERM])
def test_the_end_of_the_server_ends_the_kernels(served, sign):
    s = served()
    s.opened()
    status,text = s.end(sign)       # looks for kernels that were left
    assert status==0 and 'Traceback' not in text

def test_a_port_that_is_taken(child_env):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0)); s.listen()
        p = subprocess.run([sys.executable, '-c', SERVE, str(s.getsockname()[1]), '{}'], env=child_env,
                           capture_output=True, text=True, timeout=300)
    assert p.returncode and 'another program answers there' in p.stderr and p.stdout==''
