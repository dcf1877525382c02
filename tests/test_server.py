"The server as its users meet it: a process of its own, OpenAI's client, curl, Prometheus."
import json, os, random, re, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
import psutil, pytest, requests, torch
import test_lean_families as families
import switchable_llm as sl
from switchable_llm.core.switching import use_profile
from switchable_llm.serving.lean import LiveStep, lean_tokens
from switchable_llm.serving.packed import load_packed

openai = pytest.importorskip('openai')
pytest.importorskip('fastapi')
pytestmark = families.native
PROFILES = 'bw8','bw6','w4a8'
CHAT = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"

def written(path, route='shared'):
    "The embedded model in one file, with a chat template."
    model,tokenizer = sl.load('tiny')
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    sl.make_switchable(model, PROFILES, route=route)
    sl.freeze(model, path, tokenizer=tokenizer)
    return path

@pytest.fixture(scope='module')
def file(tmp_path_factory): return written(tmp_path_factory.mktemp('server')/'tiny.safetensors')

@contextmanager
def serving(file, *options, key=None, **env):
    "A server in a process of its own; its address, the process, and what it has said."
    env = os.environ | dict(OMP_NUM_THREADS='1') | ({'SWITCHABLE_LLM_API_KEY':key} if key else {}) | env
    command = [sys.executable, '-c', 'import sys; from switchable_llm.apps.cli import main; sys.exit(main(sys.argv[1:]))']
    command += ['serve', str(file), '--port', '0', '--log', 'json', *options]
    p = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    said,ready = [],threading.Event()
    def read():
        for line in p.stderr:
            said.append(line)
            if 'listening at' in line: ready.set()
        ready.set()
    reader = threading.Thread(target=read, daemon=True); reader.start()
    try:
        assert ready.wait(120) and p.poll() is None, ''.join(said)
        yield re.search(r'listening at ([^\s"]+)', ''.join(said))[1], p, said
    finally:
        if p.poll() is None: p.send_signal(signal.SIGTERM)
        assert p.wait(60)==0, ''.join(said[-20:])
        reader.join(10)

@pytest.fixture(scope='module')
def server(file):
    with serving(file, key='secret') as (at, p, said): yield at, said

@pytest.fixture
def client(server): return openai.OpenAI(base_url=server[0], api_key='secret', max_retries=0, timeout=60)

def offline(file, prompt, profile, n, temperature=0., seed=0):
    model = offline.__dict__.setdefault(str(file), load_packed(file))
    tokenizer = sl.load(file)[1] if not hasattr(offline, 'tokenizer') else offline.tokenizer
    offline.tokenizer = tokenizer
    ids = tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
    with torch.no_grad(), use_profile(model, profile):
        chance = torch.Generator().manual_seed(seed)
        tokens = list(lean_tokens(LiveStep(model), ids, n, {tokenizer.eos_token_id}, temperature, generator=chance))
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

def test_models_are_the_profiles(client):
    ids = [m.id for m in client.models.list()]
    assert ids==['tiny', 'tiny:auto', *(f'tiny:{p}' for p in PROFILES)]
    assert client.models.retrieve('tiny:bw6').id=='tiny:bw6'
    with pytest.raises(openai.NotFoundError, match='tiny:bw8'): client.models.retrieve('gpt-4')

def test_each_request_at_its_own_profile(client, file):
    prompt = 'question: When was Bemola born?\ncontext: Bemola was born in 1834.\nanswer:'
    for p in PROFILES:
        got = client.completions.create(model=f'tiny:{p}', prompt=prompt, max_tokens=8, temperature=0)
        assert got.choices[0].text==offline(file, prompt, p, 8) and got.model==f'tiny:{p}'
        assert got.usage.completion_tokens<=8 and got.usage.prompt_tokens>8 and got.choices[0].finish_reason in ('stop','length')
    kw = dict(model='tiny:bw8', prompt=prompt, max_tokens=8, temperature=1, seed=5)
    drawn = [client.completions.create(**kw).choices[0].text for _ in range(2)]
    assert drawn==[offline(file, prompt, 'bw8', 8, 1., 5)]*2
    own = client.completions.create(model='tiny', prompt=prompt, max_tokens=8, temperature=0, extra_body=dict(profile='w6a8'))
    assert own.model=='tiny:w6a8'

def test_a_stream_is_the_whole(client):
    kw = dict(model='tiny:bw8', prompt='question: When', max_tokens=20, temperature=0)
    whole = client.completions.create(**kw)
    pieces = list(client.completions.create(**kw, stream=True, stream_options=dict(include_usage=True)))
    assert ''.join(c.text for p in pieces for c in p.choices)==whole.choices[0].text
    assert pieces[-1].usage==whole.usage.model_copy(update=dict(prompt_tokens_details=pieces[-1].usage.prompt_tokens_details))
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1]==whole.choices[0].finish_reason
    said = [dict(role='user', content='question: When')]
    chat = client.chat.completions.create(model='tiny:bw8', messages=said, max_tokens=20, temperature=0)
    parts = list(client.chat.completions.create(model='tiny:bw8', messages=said, max_completion_tokens=20, temperature=0, stream=True))
    assert ''.join(p.choices[0].delta.content or '' for p in parts)==chat.choices[0].message.content
    assert parts[0].choices[0].delta.role=='assistant'

def test_stop_n_and_logprobs(client, file):
    prompt = 'question: When'
    whole = offline(file, prompt, 'bw8', 30)
    stop = whole[9:12]
    got = client.completions.create(model='tiny:bw8', prompt=prompt, max_tokens=30, temperature=0, stop=[stop, 'never'])
    assert got.choices[0].text==whole[:whole.index(stop)] and got.choices[0].finish_reason=='stop'
    streamed = client.completions.create(model='tiny:bw8', prompt=prompt, max_tokens=30, temperature=0, stop=stop, stream=True)
    assert ''.join(p.choices[0].text for p in streamed)==whole[:whole.index(stop)]
    several = client.completions.create(model='tiny:bw8', prompt=[prompt, 'context: The'], n=2, max_tokens=6, seed=3, logprobs=3)
    assert [c.index for c in several.choices]==[0, 1, 2, 3]
    for c in several.choices:
        assert ''.join(c.logprobs.tokens)==c.text and len(c.logprobs.top_logprobs)==len(c.logprobs.tokens)
        assert all(-50<p<=0 for p in c.logprobs.token_logprobs) and all(len(t)==3 for t in c.logprobs.top_logprobs)
    chat = client.chat.completions.create(model='tiny:bw8', messages=[dict(role='user', content=prompt)], max_tokens=4, temperature=0,
                                          logprobs=True, top_logprobs=2)
    for t in chat.choices[0].logprobs.content: assert t.top_logprobs[0].token==t.token and t.logprob==t.top_logprobs[0].logprob

@pytest.mark.parametrize('wrong,named', [
    (dict(temperature=3), 'temperature'), (dict(prompt=''), 'prompt is empty'), (dict(max_tokens=9999), 'room for 256'),
    (dict(prompt=[9999]), '9999'), (dict(presence_penalty=1), 'presence_penalty'),
    (dict(extra_body=dict(colour='red')), 'colour'), (dict(model='tiny', extra_body=dict(profile='wide')), 'wide'),
    (dict(model='tiny', extra_body=dict(min_profile='bw8', max_profile='w4a8')), 'nothing is left'),
    (dict(extra_body=dict(min_profile='bw6')), 'auto')])
def test_what_is_wrong_is_named(client, wrong, named):
    with pytest.raises(openai.BadRequestError, match=named): client.completions.create(**dict(model='tiny:bw8', prompt='a') | wrong)

def curl(*args, body=None):
    out = subprocess.run(['curl', '-sS', '-i', '--max-time', '30', *args], input=body, capture_output=True, text=True, check=True).stdout
    head,_,body = out.replace('\r', '').replace('HTTP/1.1 100 Continue\n\n', '').partition('\n\n')
    return int(head.split()[1]), head, body

def test_curl_key_bodies_and_pages(server):
    at,_ = server
    root,key = at.removesuffix('/v1'),('-H','Authorization: Bearer secret')
    assert curl(f'{root}/health')[0]==200
    for given in ((), ('-H','Authorization: Bearer other')):
        status,head,body = curl(*given, f'{at}/models')
        assert status==401 and 'www-authenticate: Bearer' in head and json.loads(body)['error']['code']=='invalid_api_key'
    assert curl(*key, f'{at}/nothing')[0]==404 and curl(*key, f'{at}/completions')[0]==405
    def post(body): return curl(*key, '-H','Content-Type: application/json', '--data-binary', '@-', f'{at}/completions', body=body)
    for body in ('{', '[1]', '{"model":3}', '\0', '{"model":"tiny:bw8","prompt":"a","max_tokens":true}',
                 json.dumps(dict(model='tiny', prompt='a', n=10**30))):
        status,_,said = post(body)
        assert status==400 and json.loads(said)['error']['type']=='invalid_request_error', (body, status, said)
    assert post(json.dumps(dict(model='tiny:bw8', prompt='x'*1_100_000)))[0]==413
    status,head,body = post(json.dumps(dict(model='tiny:bw8', prompt='question:', max_tokens=3, stream=True)))
    assert status==200 and 'text/event-stream' in head and body.rstrip().endswith('data: [DONE]')

def test_metrics_and_log(server, client):
    at,said = server
    client.completions.create(model='tiny:w4a8', prompt='question:', max_tokens=3, temperature=0)
    body = curl('-H', 'Authorization: Bearer secret', at.removesuffix('/v1')+'/metrics')[2]
    from prometheus_client.parser import text_string_to_metric_families
    samples = [s for f in text_string_to_metric_families(body) for s in f.samples]
    found = {(s.name, s.labels.get('profile'), s.labels.get('kind')):s.value for s in samples}
    assert found['switchable_llm_tokens_total','w4a8','new']>=3 and found['switchable_llm_first_token_seconds_count','w4a8',None]>=1
    assert found['switchable_llm_waiting',None,None]==0
    time.sleep(.2)
    lines = [json.loads(l) for l in said if l.startswith('{')]
    last = [l for l in lines if l['event']=='request'][-1]
    assert last['status']==200 and last['profiles']==['w4a8'] and last['new_tokens']==[3] and 'secret' not in ''.join(said)

def counts(at, name):
    "Samples of a metric by its labels."
    from prometheus_client.parser import text_string_to_metric_families
    body = curl('-H', 'Authorization: Bearer secret', at.removesuffix('/v1')+'/metrics')[2]
    return {tuple(s.labels.values()):s.value for f in text_string_to_metric_families(body) for s in f.samples if s.name==name}

def test_texts_count_however_they_end(server, client):
    "At a stop text, at the time limit of a caller who hangs up, and at their end."
    at,_ = server
    name,before = 'switchable_llm_tokens_total',counts(server[0], 'switchable_llm_tokens_total')
    whole = client.completions.create(model='tiny:bw6', prompt='question:', max_tokens=40, temperature=0).choices[0].text
    for _ in range(3): client.completions.create(model='tiny:bw6', prompt='question:', max_tokens=40, temperature=0, stop=whole[1:3])
    with pytest.raises(openai.APITimeoutError):
        long = dict(model='tiny:bw6', prompt='context:', max_tokens=250, n=16, extra_body=dict(ignore_eos=True))
        client.with_options(timeout=.2).completions.create(**long)
    for _ in range(100):
        if not json.loads(curl(at.removesuffix('/v1')+'/health')[2])['running']: break
        time.sleep(.05)
    more = {k:v-before.get(k, 0) for k,v in counts(at, name).items()}   # by kind and profile
    ids = len(sl.load('tiny')[1]('question:').input_ids)
    assert more['prompt','bw6']>=4*ids+16 and more['new','bw6']>=43

BODIES = {   # what one caller may send; beside it the others are served
    'rules':dict(prompt='a', profile=dict(name='x', default='w8a8', rules=[dict(bits='w8', layers='0-9999')]*20_000)),
    'layers':dict(prompt='a', profile=dict(name='x', default='w8a8', rules=[dict(bits='w8', layers='0-9999')]*200)),
    'many rules':dict(prompt=['a']*60, profile=dict(name='x', default='w8a8', rules=[dict(bits='w8', glob='*'*150)]*250)),
    'glob':dict(prompt='a', profile=dict(name='x', default='w8a8', rules=[dict(bits='w8', glob='*a'*200_000)])),
    'strings':dict(prompt=['a']*150_000), 'nulls':dict(prompt=[None]*160_000), 'numbers':dict(prompt=[-1]*190_000),
    'parts':dict(messages=[dict(role='user', content=[{}]*240_000)]),
    'stops':dict(prompt=['a']*30, max_tokens=200, stop=[str(i)+'a '*99 for i in range(16)], ignore_eos=True),
    'logprobs':dict(prompt=['a']*60, max_tokens=200, logprobs=20, ignore_eos=True)}

@pytest.mark.parametrize('what', BODIES)
def test_no_body_stops_the_others(server, what):
    "Whatever one sends, the server's health is told in time, and memory stays."
    at,_ = server
    root,key = at.removesuffix('/v1'),{'Authorization':'Bearer secret'}
    def megabytes(): return sum(p.memory_info().rss for p in [psutil.Process(server_of(at))])>>20
    late,over,start = [],threading.Event(),megabytes()
    def watch():
        with requests.Session() as web:
            while not over.is_set():
                began = time.monotonic(); web.get(f'{root}/health', timeout=100); late.append((time.monotonic()-began, megabytes()))
                time.sleep(.02)
    watcher = threading.Thread(target=watch); watcher.start()
    body = dict(model='tiny:bw8', max_tokens=2) | BODIES[what]
    if 'profile' in body: body['model'] = 'tiny'
    page = 'chat/completions' if 'messages' in body else 'completions'
    try: got = requests.post(f'{at}/{page}', json=body, headers=key, timeout=100)
    finally: over.set(); watcher.join()
    assert got.status_code==(200 if what in ('stops','logprobs','many rules') else 400), got.text[:300]
    assert max(t for t,_ in late)<1.5 and max(m for _,m in late)<start+300, (max(late), start)

def server_of(at):
    "The process that listens there."
    port = int(re.search(r':(\d+)/', at)[1])
    return next(c.pid for c in psutil.net_connections('tcp') if c.status=='LISTEN' and c.laddr.port==port)

def test_what_clients_send_without_meaning_it(client):
    "Values that ask for nothing, and the answer of an earlier turn as OpenAI's client has it."
    said = client.chat.completions.create(model='tiny:bw8', messages=[dict(role='user', content='Hi')], max_tokens=3).choices[0].message
    talk = [dict(role='user', content='Hi'), said.model_dump(), dict(role='user', content='And?')]
    neutral = dict(n=None, stream=None, tool_choice='auto', parallel_tool_calls=False, modalities=['text'], store=False,
                   metadata={}, service_tier='auto', safety_identifier='me', prompt_cache_key='k')
    client.chat.completions.create(model='tiny:bw8', messages=talk, max_tokens=3, **neutral)

def test_the_refused_are_counted_and_logged(server):
    "Each once, whether it was read or not, and no path that a caller made up becomes a label."
    at,said = server
    key,to = ('-H','Authorization: Bearer secret'),('-H','Content-Type: application/json','--data-binary','@-',f'{at}/completions')
    def counted(): return {(endpoint, status):n for (endpoint, _, status),n in counts(at, 'switchable_llm_requests_total').items()}
    before,lines = counted(),len(said)
    for n in (2, 2_000_000): assert curl(*key, *to, body='{'*n)[0]==(400 if n==2 else 413)
    assert curl(*to, body='{}')[0]==401 and curl(*key, *to, body='{"model":"x","prompt":"a"}')[0]==404
    assert curl(*key, f'{at}/made-up-1')[0]==curl(*key, f'{at}/made-up-2')[0]==404
    after = counted()
    more = {k:v-before.get(k, 0) for k,v in after.items() if v!=before.get(k, 0)}
    assert more=={**{('/v1/completions', str(s)):1 for s in (400, 413, 401, 404)}, ('no such page', '404'):2}
    time.sleep(.2)
    logged = [json.loads(l) for l in said[lines:] if l.startswith('{')]
    assert [l['status'] for l in logged]==[400, 413, 401, 404, 404, 404] and all(l['error'] for l in logged)

def test_many_callers_and_none_waits_for_ever(client, file):
    rng,prompts = random.Random(0),['question: When', 'context: The home of Bemola is', 'question: Who was born in 1834?\ncontext:']
    jobs = [(rng.choice(prompts), rng.choice(PROFILES), rng.randint(1, 12)) for _ in range(40)]
    def ask(j): return client.completions.create(model=f'tiny:{j[1]}', prompt=j[0], max_tokens=j[2], temperature=0).choices[0].text
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(ask, jobs))
    assert got==[offline(file, *j) for j in jobs]

def test_who_goes_away_is_not_written_for(server, client, file):
    root = server[0].removesuffix('/v1')
    stream = client.completions.create(model='tiny:bw8', prompt='question:', max_tokens=250, temperature=1, stream=True)
    next(iter(stream)); stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=.05).completions.create(model='tiny:bw8', prompt='question:', max_tokens=250, n=16)
    for _ in range(100):
        if (h := json.loads(curl(f'{root}/health')[2]))['running']==h['waiting']==0: return
        time.sleep(.1)
    raise AssertionError(h)

def test_back_pressure_and_an_orderly_end(file):
    "One text at a time and two in the queue: the next is told to come again; SIGTERM finishes what is being written."
    with serving(file, '--texts', '1', '--waiting', '2') as (at, p, said):
        client = openai.OpenAI(base_url=at, api_key='none', max_retries=0, timeout=60)
        ask = dict(model='tiny:bw8', prompt='question:', max_tokens=20)
        with pytest.raises(openai.BadRequestError, match='room for 2'): client.completions.create(**ask, n=3)
        def crowd(pool):   # a text and two that wait; none where it was written before they were seen to wait
            first = client.completions.create(**ask | dict(max_tokens=200), temperature=0, stream=True)
            next(iter(first))
            two = pool.submit(client.completions.create, **ask, n=2)
            while not two.done():
                if json.loads(curl(at.removesuffix('/v1')+'/health')[2])['waiting']==2: return first, two
            list(first)
        def refused(**kw):   # or answered, where those before it were faster
            try: client.completions.create(**ask, **kw)
            except openai.RateLimitError as told: return told
        with ThreadPoolExecutor(1) as pool:
            for _ in range(20):
                if (there := crowd(pool)) and (told := refused()) and refused(stream=True): break   # a status, not an event
            else: raise AssertionError('nothing was refused')
            first,two = there
            assert told.response.headers['retry-after']=='1' and told.code=='queue_full'
            p.send_signal(signal.SIGTERM)
            rest = list(first)
            assert len(two.result().choices)==2
            p.wait(60)
        assert rest[-1].choices[0].finish_reason in ('stop','length')
    assert json.loads(said[-1])['event']=='stopped'

def test_bad_starts_say_so(file, tmp_path, capsys):
    from switchable_llm.apps.cli import main
    for args,named in ((('absent.safetensors',), 'no such file'), ((file, '--host', '0.0.0.0'), '--api-key'),
                       ((file, '--profiles', 'bw9'), 'bw9'), ((file, '--memory', '0'), '--memory'), ((tmp_path,), 'freeze'),
                       ((file, '--replicas', '3'), 'needs --ray'), ((file, '--memory', '.01'), 'the first tokens of one text need'),
                       ((file, '--profiles', 'bw8', 'bw8'), 'bw8'), ((file, '--api-key', ''), 'the key is empty')):
        assert main(['serve', *map(str, args), '--port', '0']), args
        assert named in capsys.readouterr().err

def test_bits_give_way_under_load_and_come_back(file):
    with serving(file, '--texts', '8', '--first-token', '.2', '--hold', '.5', '--gain', '0') as (at, p, said):
        client = openai.OpenAI(base_url=at, api_key='none', max_retries=0, timeout=100)
        def ask(n, **more):
            got = client.completions.create(model='tiny:auto', prompt='question:', max_tokens=n, temperature=1,
                                            extra_body=dict(ignore_eos=True, **more))
            return got.model.partition(':')[2]
        assert ask(2)=='bw8'
        with ThreadPoolExecutor(64) as pool:
            bounds = [{}, dict(min_profile='bw6'), dict(max_profile='bw6'), dict(min_profile='bw8')]
            spoke = list(pool.map(lambda i: (i%4, ask(150, **bounds[i%4])), range(96)))
        assert {p for _,p in spoke}=={*PROFILES} and {p for i,p in spoke if i==0}>={'bw8','w4a8'}
        assert all(p!='w4a8' for i,p in spoke if i==1)
        assert all(p!='bw8' for i,p in spoke if i==2) and all(p=='bw8' for i,p in spoke if i==3)
        end = time.time()+30
        while ask(2)!='bw8': assert time.time()<end; time.sleep(.1)

def test_auto_passes_over_what_is_not_faster(file):
    with serving(file, '--texts', '8', '--first-token', '.01', '--gain', '1000') as (at, p, said):
        client = openai.OpenAI(base_url=at, api_key='none', max_retries=0, timeout=100)
        more = dict(prompt='question:', max_tokens=60, n=16, temperature=1)
        assert [client.completions.create(model='tiny:auto', **more).model for _ in range(3)]==['tiny:bw8']*3
        assert client.completions.create(model='tiny:auto', **more, extra_body=dict(max_profile='w4a8')).model=='tiny:w4a8'
        told = next(l for l in map(json.loads, (l for l in said if l.startswith('{'))) if l['event']=='serving')
    assert told['auto']==['bw8'] and [*told['step_seconds']]==[*PROFILES] and min(told['step_seconds'].values())>0
    assert 'auto is bw8: with 8 texts bw6, w4a8 are not 1000 % faster here' in ''.join(said)
