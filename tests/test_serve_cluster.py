"The server over a local Ray cluster of two machines, one of which dies under load."
import asyncio, random, re, socket, threading, time
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen
import pytest
import test_lean_families as families
import test_server
from test_server import PROFILES, offline

ray = pytest.importorskip('ray')
openai = pytest.importorskip('openai')
serve = pytest.importorskip('ray.serve')
from ray.cluster_utils import Cluster
from switchable_llm.server.cluster import ClusterArgs, RemoteEngine, Replica, build
from switchable_llm.server.requests import Failed, Request

pytestmark = families.native

@pytest.fixture(scope='module')
def file(tmp_path_factory):
    "With an adapter for each width: none of 3 bits."
    return test_server.written(tmp_path_factory.mktemp('cluster')/'tiny.safetensors', 'bits')

@pytest.fixture(scope='module')
def cluster(child_env):
    with pytest.MonkeyPatch.context() as m:   # what the machines inherit
        for k,v in (child_env | dict(RAY_SERVE_PROXY_USE_GRPC='0')).items(): m.setenv(k, v)
        c = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
        second = c.add_node(num_cpus=1)
        c.wait_for_nodes(); ray.init(address=c.address, log_to_driver=False)
        yield c, second
        serve.shutdown(); ray.shutdown(); c.shutdown()

@pytest.fixture(scope='module')
def at(cluster, file):
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    serve.start(proxy_location='HeadOnly', http_options=dict(host='127.0.0.1', port=port))   # two machines here share their ports
    serve.run(build(ClusterArgs(file=str(file), profiles=list(PROFILES), replicas=2, cpus=1)), name='tiny', route_prefix='/')
    return f'http://127.0.0.1:{port}/v1'

class Stream:   # what a handle gives, of a replica in this process
    def __init__(self, replica): self.replica = replica
    def options(self, **how): return self
    @property
    def write(self): return self
    def remote(self, request): self.made = self.replica.write(request); return self
    def __aiter__(self): return self.made
    def cancel(self): pass

@pytest.fixture
def stalled(file):
    "A replica with one place whose engine's thread waits, what lets it go on, and a front's engine before it."
    goes_on = threading.Event()
    def made(waiting):
        made.replica = replica = Replica(str(file), waiting=waiting, most=1, gain=0)
        replica.service.engine.submit(Request([5], 2, 'bw8'), lambda token: goes_on.wait(60))
        while not replica.service.engine.stats()['running']: time.sleep(.01)
        return replica.service.engine, goes_on, RemoteEngine(Stream(replica), replica.facts(), waiting=9)
    yield made
    goes_on.set(); made.replica.service.engine.close(0)

@pytest.mark.parametrize('frees', [False, True])
def test_a_full_replica_is_asked_again_and_then_says_that_it_is_full(stalled, frees):
    "As `refused`, of which the front makes a 429."
    engine,goes_on,remote = stalled(1)
    engine.submit(Request([5], 2, 'bw8'))
    async def ask():
        answer = remote.submit(Request([5], 2))
        while not remote.retried: await asyncio.sleep(.01)
        if frees: goes_on.set()
        while not answer.done.is_set(): await asyncio.sleep(.01)
        return answer
    answer = asyncio.run(ask())
    if frees: assert len(answer.wait(1))==2
    else:
        assert answer.reason=='refused'
        with pytest.raises(Failed, match='wait already'): answer.wait(1)

def test_who_cancels_is_not_written_for(stalled):
    "Neither what is written nor what waits at the replica, and not only with the next token."
    engine,goes_on,remote = stalled(9)
    async def ask():
        answers = [remote.submit(Request([5], 250)) for _ in range(3)]
        while engine.stats()['waiting']<3: await asyncio.sleep(.01)
        for a in answers: a.cancel()
        while remote.open: await asyncio.sleep(.01)
        return answers
    answers = asyncio.run(asyncio.wait_for(ask(), 30))
    assert all(a.reason=='cancelled' for a in answers)
    goes_on.set()
    while (s := engine.stats())['running']+s['waiting']: time.sleep(.01)
    assert s['new_tokens']==2

def test_a_profile_that_a_request_brings_along(at):
    "The replica serves it, or says why it cannot: a 400, whole or as a stream."
    client = openai.OpenAI(base_url=at, api_key='none', max_retries=0, timeout=120)
    def ask(default, **kw):
        own = dict(name='mine', default=default, rules=[dict(bits='w4a8', layers='0-1')])
        return client.completions.create(model='tiny', prompt='question:', max_tokens=2, extra_body=dict(profile=own), **kw)
    assert ask('w8a8').model=='tiny:mine'
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="adapter '3'"): ask('w3a8', stream=stream)

def wait_for_work_on(node):
    "Until the replica of a machine is writing."
    replicas,end = serve.get_deployment_handle('Replica', 'tiny'),time.time()+60
    while True:
        assert time.time()<end, 'nothing was sent there'
        told = replicas.stats.remote().result()
        if told['node']==node.node_id and told['running']: return

def test_a_machine_dies_under_load(cluster, at, file):
    nodes,second = cluster
    client = openai.OpenAI(base_url=at, api_key='none', max_retries=0, timeout=120)
    assert [m.id for m in client.models.list()][2:]==[f'tiny:{p}' for p in PROFILES]
    rng,prompts = random.Random(0),['question: When', 'context: The home of Bemola is', 'question: Who was born in 1834?\ncontext:']
    jobs = [(rng.choice(prompts), rng.choice(PROFILES), rng.randint(20, 60), rng.choice([0., 1.]), i) for i in range(240)]
    done = []
    def ask(j):
        prompt,profile,n,t,seed = j
        kw = dict(model=f'tiny:{profile}', prompt=prompt, max_tokens=n, temperature=t, seed=seed)
        if seed%2: text = client.completions.create(**kw).choices[0].text
        else: text = ''.join(c.text for p in client.completions.create(**kw, stream=True) for c in p.choices)
        done.append(j)
        return text
    with ThreadPoolExecutor(8) as pool:
        work = [pool.submit(ask, j) for j in jobs]
        while len(done)<20: time.sleep(.01)
        wait_for_work_on(second)
        nodes.remove_node(second, allow_graceful=False)
        got = [w.result(180) for w in work]
    assert got==[offline(file, *j) for j in jobs]   # also what the other machine began
    end = time.time()+60
    while sum(n['Alive'] for n in ray.nodes())>1: assert time.time()<end; time.sleep(.2)
    told = urlopen(at.removesuffix('/v1')+'/metrics').read().decode()
    assert float(re.search(r'^switchable_llm_retried (\S+)', told, re.M)[1])>=1
