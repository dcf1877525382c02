"What strangers send: bodies made from the server's own schema, and sockets that do not keep to HTTP."
import json, signal, socket, time
from collections import Counter
import pytest
import test_lean_families as families
import test_server
from test_server import serving

schemathesis = pytest.importorskip('schemathesis')
requests = pytest.importorskip('requests')
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

pytestmark = families.native
file = test_server.file   # a fixture
KEY = {'Authorization':'Bearer secret'}

@pytest.fixture(scope='module')
def server(file):
    with serving(file, '--seconds', '8', '--max-body', '200000', key='secret') as (at, p, said): yield at.removesuffix('/v1'), p, said

def narrow(d, models):
    "So that many requests are done: names of models that there are, few tokens, and no profile named twice."
    for name in ('CompletionAsked','ChatAsked'):
        own,one = d['components']['schemas'][name]['properties'],name=='CompletionAsked'
        mine = dict(name='mine', default='w8a8', rules=[dict(bits='w4a8', layers='0-1')])
        own |= dict(model=dict(enum=models), n=dict(type='integer', minimum=1, maximum=2),
                    profile=dict(enum=[None, 'w6a8', mine] if one else [None]),
                    **{k:dict(enum=[None] if one else [None, 'bw6']) for k in ('min_profile','max_profile')},
                    **{k:dict(type='integer', minimum=1, maximum=6) for k in ('max_tokens','max_completion_tokens') if k in own})
    text,_,ids,_ = prompt = d['components']['schemas']['CompletionAsked']['properties']['prompt']['oneOf']
    text.update(minLength=1); ids['items'].update(maximum=353)
    prompt[:] = text,ids
    return d

@pytest.fixture(scope='module')
def schemas(server):
    "What the server says of itself: narrowed for good requests, as it stands for bad ones."
    at,_,_ = server
    def told(): return requests.get(f'{at}/openapi.json', timeout=10).json()
    def made(d):
        made = schemathesis.openapi.from_dict(d, config=schemathesis.Config.from_dict(dict(headers=KEY)))
        made.config.update(base_url=at)
        return made
    models = [m['id'] for m in requests.get(f'{at}/v1/models', headers=KEY, timeout=10).json()['data']]
    return dict(positive=made(narrow(told(), models)), negative=made(told()))

@pytest.mark.parametrize('path,method,examples', [
    ('/v1/completions','POST',60), ('/v1/chat/completions','POST',60), ('/v1/models','GET',5), ('/v1/models/{model}','GET',40),
    ('/health','GET',5), ('/metrics','GET',5)])
@pytest.mark.parametrize('mode', ['positive','negative'])
def test_bodies_from_the_schema(schemas, path, method, examples, mode):
    "No answer that the schema does not have; a rule between two fields (`top_logprobs` needs `logprobs`) no schema tells."
    seen = Counter()
    @given(schemas[mode][path][method].as_strategy(generation_mode=GenerationMode(mode)))
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    def send(case): seen[case.call_and_validate(headers=KEY, timeout=30, excluded_checks=[positive_data_acceptance]).status_code] += 1
    try: send()
    except Unsatisfiable: pytest.skip('nothing to get wrong')
    print(path, mode, dict(seen))
    if mode=='positive' and method=='POST': assert seen[200]>examples//10

# ---- sockets ----

HEAD = b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n'
def request(**kw):
    body = json.dumps(dict(model='tiny:bw8', prompt='question: When', max_tokens=3, temperature=0) | kw).encode()
    return HEAD+b'Content-Length: %d\r\n\r\n' % len(body)+body

def connect(at, **options):
    host,port = at.removeprefix('http://').split(':')
    s = socket.socket(); s.settimeout(10)
    for k,v in options.items(): s.setsockopt(socket.SOL_SOCKET, getattr(socket, k), v)
    s.connect((host, int(port)))
    return s

def said_to(at, data, seconds=10):
    "All that comes until the server closes, or says nothing more for so long; whether it closed."
    with connect(at) as s:
        out,closed = b'',True
        s.settimeout(seconds)
        try:
            s.sendall(data)
            while got := s.recv(2**16): out += got
        except ConnectionError: pass     # it closed while we talked
        except TimeoutError: closed = False
    return out, closed

def answers(at): return b'200 OK' in said_to(at, request().replace(b'Host: x', b'Host: x\r\nConnection: close'))[0]

def resident(p): return int(open(f'/proc/{p.pid}/statm').read().split()[1])*4096

@pytest.mark.parametrize('sent', [
    b'\0\1\2'*100, b'GET GET GET\r\n\r\n', b'GET / HTTP/9.9\r\n\r\n',
    HEAD+b'Content-Length: -3\r\n\r\n', HEAD+b'Content-Length: 1x\r\n\r\n',
    HEAD+b'Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc', HEAD+b'Content-Length: '+b'9'*30+b'\r\n\r\n',
    HEAD+b'Transfer-Encoding: chunked\r\n\r\nzz\r\n',
    HEAD+b'Transfer-Encoding: gzip, chunked\r\n\r\n', HEAD+b'Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /health',
    HEAD+b'Content-Length: 200001\r\n\r\n{', HEAD+b'A'*70_000+b': b\r\n\r\n',
    HEAD+b'Content-Length: 0\r\nConnection: close\r\n\r\n', b'\x16\x03\x01\x02\x00\x01'],
    ids=lambda b: repr(b.removeprefix(HEAD)[:30]))
def test_what_is_no_request_is_refused_at_once(server, sent):
    at,_,_ = server
    out,closed = said_to(at, sent, 1)
    assert (out==b'' and closed) or b' 4' in out[:14], out[:200]
    assert answers(at)

KINDS = ('text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data; boundary=x', 'application/xml',
         'application/json; charset=utf-16', '')
def body(**kw): return json.dumps(dict(model='tiny', prompt='a', max_tokens=3) | kw)
BAD = ('{"model":"tiny","prompt":"a\\ud800b"}', '{"model":"tiny","prompt":["\\udfff"]}', '{"model":"tiny","prompt":"a","\\ud800":1}',
       '['*100_000, '{"a":'*20_000, '{"n":'+'9'*5000+'}', '\ufeff', b'\xff{}', '""', 'null',
       body(**{'top-p':1}), body(temperature=float('nan')), body(prompt=[[5]]*500), body(stop=['x']*17),
       body(profile=dict(name='bw8', default='w4a8')), body(profile=dict(name='x'*200, default='w8')))
ODD = dict(temperature=5e-324), dict(temperature=1e-40), dict(top_p=0), dict(top_p=5e-324), dict(top_k=10**6), dict(seed=-2**63)

def test_bodies_of_the_wrong_kind(server):
    at,_,_ = server
    def post(data, kind='application/json'):
        return requests.post(f'{at}/v1/completions', data=data, headers=KEY|{'Content-Type':kind}, timeout=10)
    for kind in KINDS:
        r = post(body(), kind)
        assert r.status_code==(200 if 'json' in kind else 400) and r.headers['content-type']=='application/json', (kind, r.text)
    for bad in BAD:
        start = time.monotonic()
        r = post(bad)
        error = r.json()['error']
        assert r.status_code==400 and error['type']=='invalid_request_error' and 'None:' not in error['message'], (bad[:80], r.text)
        assert time.monotonic()-start<3
    for odd in ODD: assert (r := post(body(**odd))).status_code==200, (odd, r.text)

def test_a_body_without_end_is_cut_off(server):
    at,p,_ = server
    before = resident(p)
    with connect(at) as s:
        s.sendall(HEAD+b'Transfer-Encoding: chunked\r\n\r\n')
        sent,out = 0,b''
        try:
            while sent<2**27: s.sendall(b'10000\r\n'+b'a'*65536+b'\r\n'); sent += 65536
        except ConnectionError: pass
        try: out = s.recv(2**16)
        except ConnectionError: pass
    assert sent<2**26 and (not out or b' 413 ' in out[:30] and b'body_too_long' in out)
    assert resident(p)-before<2**25 and answers(at)

def test_headers_without_end_are_cut_off(server):
    at,p,_ = server
    before = resident(p)
    for line in (b'a'*1000, b'x-%d: b\r\n'*100):
        with connect(at) as s:
            sent = 0
            try:
                s.sendall(b'GET /health HTTP/1.1\r\n'+(b'X: ' if b':' not in line else b''))
                while sent<2**27: s.sendall(line.replace(b'%d', b'%d' % sent)); sent += len(line)
            except ConnectionError: pass
        assert sent<2**24
    assert resident(p)-before<2**25 and answers(at)

def test_requests_behind_requests(server):
    at,_,_ = server
    out,_ = said_to(at, b'GET /health HTTP/1.1\r\nHost: x\r\n\r\n'*50+b'nonsense\r\n\r\n', 5)
    assert out.count(b'HTTP/1.1 200')>=1 or b' 400 ' in out
    out,_ = said_to(at, request(stream=True, max_tokens=30)+b'\0nonsense'*100, 5)
    assert out.startswith(b'HTTP/1.1 200') or b' 400 ' in out
    out,closed = said_to(at, request()*20+request().replace(b'Host: x', b'Host: x\r\nConnection: close'), 10)
    assert closed and out.count(b'HTTP/1.1 200')==21
    assert answers(at)

def idle(at, seconds):
    for _ in range(int(seconds*10)):
        h = requests.get(f'{at}/health', timeout=10).json()
        if h['running']==h['waiting']==0: return
        time.sleep(.1)
    raise AssertionError(h)

def test_who_never_reads_is_not_written_for_longer_than_the_limit(server):
    at,p,said = server
    long = request(stream=True, max_tokens=250, n=16, logprobs=20, temperature=1)
    with connect(at, SO_RCVBUF=2048) as deaf:
        deaf.sendall(long)
        time.sleep(.5)
        assert answers(at)
        idle(at, 8+10)
        for _ in range(100):
            if any('did not read' in l for l in said): break
            time.sleep(.2)
        assert any('did not read' in l for l in said)

def test_silence_is_not_waited_for_when_it_ends(file):
    "Half a header, half a body, nothing at all, and a stream that is read: at SIGTERM the stream is finished and the others are let go."
    with serving(file, key='secret') as (at, p, said):
        at = at.removesuffix('/v1')
        silent = [connect(at) for _ in range(3)]
        silent[0].sendall(b'GET / HTTP/1.1\r\nHost:')
        silent[1].sendall(HEAD+b'Content-Length: 100\r\n\r\n{"model"')
        with connect(at) as s:
            s.sendall(request(stream=True, max_tokens=200))
            out = s.recv(100)
            start = time.monotonic()
            p.send_signal(signal.SIGTERM)
            while got := s.recv(2**16): out += got
        assert out.rstrip().endswith(b'0') and b'[DONE]' in out
        assert p.wait(30)==0 and time.monotonic()-start<10 and json.loads(said[-1])['event']=='stopped'
