"Two processes train like one: the same profiles at every step, the same adapters, and a run that stopped goes on."
import subprocess, sys
import pytest, torch
import train_worker as worker

pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason='this build of PyTorch has no gloo')

def launch(env, *args):
    # `--multi_gpu` is what makes accelerate start several processes on this machine; with `train(cpu=True)` they meet over gloo. `--cpu` alone starts one.
    cmd = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision', 'no',
           '--dynamo_backend', 'no', '--main_process_port', '0', worker.__file__, *map(str, args)]
    p = subprocess.run(cmd, env={**env, 'CUDA_VISIBLE_DEVICES': ''}, capture_output=True, text=True, timeout=300)
    assert p.returncode==0, p.stderr[-3000:]

@pytest.fixture(scope='module')
def two(toy_folder, child_env, tmp_path_factory):
    "What both processes of both phases returned: phase -> [rank 0, rank 1]."
    out = tmp_path_factory.mktemp('two')
    for phase in ('whole','resume'): launch(child_env, toy_folder, out, phase)
    return {p:[torch.load(out/f'{p}-{r}.pt') for r in (0, 1)] for p in ('whole','resume')} | dict(out=out)

@pytest.mark.parametrize('policy', worker.POLICIES)
def test_two_processes_equal_one(policy, two, toy_folder):
    a,b = (r[policy] for r in two['whole'])
    one = worker.run(toy_folder, policy, 4)
    assert a['processes']==b['processes']==2 and one['processes']==1
    assert a['seen']==b['seen']==one['seen'] and len(one['seen'])==4
    start = worker.toy(toy_folder)[0]
    moved = 0
    for n,p in one['params'].items():
        assert torch.equal(a['params'][n], b['params'][n]), f'{n}: the processes differ'
        torch.testing.assert_close(a['params'][n], p, rtol=1e-3, atol=2e-5)
        moved += not torch.equal(p, start.get_parameter(n))
    assert moved
    for x,y in zip(a['curve'], one['curve']):
        assert x[0]==y[0] and x[2:]==y[2:] and abs(x[1]-y[1])<1e-4

def test_resume_in_two_processes_is_exact(two):
    whole,again = two['whole'][0]['dropout'],two['resume'][0]['dropout']
    assert len(again['seen'])==4, 'the run went on after step 2, not from the beginning'
    assert again['curve']==whole['curve']
    for r in (0, 1):
        for n,p in whole['params'].items(): assert torch.equal(two['resume'][r]['dropout']['params'][n], p), n

def test_only_one_checkpoint_is_kept(two):
    for run in ('whole','stopped'): assert [f.name for f in (two['out']/run).iterdir()]==['step-000006']

def test_a_batch_that_cannot_be_shared_is_an_error(toy_folder, monkeypatch):
    model,tok,data = worker.toy(toy_folder)
    monkeypatch.setattr('accelerate.Accelerator.num_processes', 2)   # the check comes before any exchange
    with pytest.raises(ValueError, match='batch_size=3: not divisible by 2 processes'):
        worker.train(model, data, worker.POLICIES['random_profile'](model), worker.settings(1, batch_size=3), tok.pad_token_id, progress=False, cpu=True)
