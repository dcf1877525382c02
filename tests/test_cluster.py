"A study spread over a cluster: every record comes back, also those of a machine that is lost."
import threading, time
from dataclasses import replace
import pytest
from switchable_llm.study.arms import run_arms
from switchable_llm.study.experiments import spread_arms
from switchable_llm.study.records import PRESETS, load_records

ray = pytest.importorskip('ray')
from ray.cluster_utils import Cluster

ARMS = ['untrained','float','shared','bits']
SMALL = replace(PRESETS['tiny'], name='toy', profiles=('bw8','w4a8'), steps=12, batch_size=2, train_n=16, calibration=2, eval_n=8)

@pytest.fixture(scope='module')
def cluster(child_env):
    with pytest.MonkeyPatch.context() as m:   # what the machines inherit
        for k,v in child_env.items(): m.setenv(k, v)
        yield from two_machines()

def two_machines():
    c = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    second = c.add_node(num_cpus=1)
    c.wait_for_nodes(); ray.init(address=c.address, log_to_driver=False)
    yield c, second
    ray.shutdown(); c.shutdown()

def until(true, seconds=120):
    end = time.time()+seconds
    while not true():
        assert time.time()<end, 'waited too long'
        time.sleep(.05)

def test_no_cluster_is_said_at_once(tmp_path):
    with pytest.raises(ConnectionError, match='no Ray cluster answers there'):
        spread_arms(SMALL, 'routes', tmp_path, (0,), ['float'], 2, address='127.0.0.1:9')

def test_a_lost_machine_loses_no_record(cluster, tmp_path):
    nodes,second = cluster
    made,told = [],[]
    work = threading.Thread(target=lambda: made.extend(spread_arms(SMALL, 'routes', tmp_path/'far', (0,), ARMS, 2, say=told.append)))
    work.start()
    until(lambda: not ray.available_resources().get('CPU'))   # both machines have a task
    nodes.remove_node(second, allow_graceful=False)
    work.join(600)
    assert not work.is_alive() and [r['name'] for r in made]==ARMS
    assert sum(n['Alive'] for n in ray.nodes())==1
    near = run_arms(SMALL, 'routes', tmp_path/'near', ARMS, 2, False)
    for a,b in zip(made, near): assert (a['config'], a['exposure'])==(b['config'], b['exposure']) and a['scores'].keys()==b['scores'].keys()
    for a,b in zip(made, near):
        for p in a['scores']: assert a['scores'][p]['nll_answer']==pytest.approx(b['scores'][p]['nll_answer'], abs=.05)
    assert len(load_records(tmp_path/'far', 'toy', 'arms'))==4 and len(told)==4

def test_arms_that_fail_are_named_after_the_others(cluster, tmp_path):
    bad = replace(SMALL, data=str(tmp_path/'nothing'))
    with pytest.raises(RuntimeError, match='float, seed 3'): spread_arms(bad, 'routes', tmp_path, (3,), ['float'], 2)
    assert not load_records(tmp_path)
