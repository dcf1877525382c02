"Two processes train like one: the same profiles at every step, the same gradients, and a run that stopped goes on."
import subprocess, sys
import pytest, torch
import train_worker as worker, trainer_worker
from switchable_llm.joint_training import batch_rows
from switchable_llm.training.resuming import checkpoints, read_checkpoint

pytestmark = pytest.mark.skipif(not worker.HAS_GLOO, reason='this build of PyTorch has no gloo')

def launch(env, *args, script=worker.__file__):
    cmd,hour = [sys.executable, *worker.LAUNCH, script, *map(str, args)],3600   # a machine may be busy
    p = subprocess.run(cmd, env={**env, 'CUDA_VISIBLE_DEVICES': ''}, capture_output=True, text=True, timeout=hour)
    assert p.returncode==0, p.stderr[-3000:]

@pytest.fixture(scope='module')
def two(toy_folder, child_env, tmp_path_factory):
    "What both processes of both phases returned: phase -> [rank 0, rank 1]."
    out = tmp_path_factory.mktemp('two')
    for phase in ('whole','resume'): launch(child_env, toy_folder, out, phase)
    return {p:[torch.load(out/f'{p}-{r}.pt') for r in (0, 1)] for p in ('whole','resume')} | dict(out=out)

def same_gradients(a, b, one):
    "The processes have the same gradients to the bit, and a single process has them up to the rounding of sums."
    assert len(a)==len(b)==len(one)>0
    for x,y,z in zip(a, b, one):
        assert x.keys()==y.keys()==z.keys() and all(torch.equal(x[n], y[n]) for n in x), 'the processes differ'
        flat = lambda g: torch.cat([g[n].flatten() for n in z])
        assert (flat(x)-flat(z)).norm()<1e-4*flat(z).norm()

@pytest.mark.parametrize('policy', worker.POLICIES)
def test_two_processes_equal_one(policy, two, toy_folder):
    a,b = (r[policy] for r in two['whole'])
    one = worker.smooth(toy_folder, policy)
    assert a['processes']==b['processes']==2 and one['processes']==1
    assert a['seen']==b['seen']==one['seen'] and len(one['seen'])==4
    same_gradients(a['gradients'], b['gradients'], one['gradients'])
    for x,y in zip(a['curve'], one['curve']):
        assert x[0]==y[0] and x[2:]==y[2:] and x[1]==pytest.approx(y[1], rel=1e-4)

def test_processes_agree_where_one_has_no_target(two, toy_folder):
    "Also where all of a step's rows with an answer are another process's, and where none has one."
    a,b = (r['sparse'] for r in two['whole'])
    one = worker.smooth(toy_folder, **worker.SPARSE)
    data,without = worker.toy(toy_folder)[2],worker.SPARSE['without']
    lengths = tuple(e.prompt if i in without else len(e.ids) for i,e in enumerate(data))
    answered = [tuple(r not in without for r in batch_rows(lengths, 2, s)) for s in range(16)]
    assert set(answered)=={(False,False), (True,False), (False,True), (True,True)}, 'the test shows little'
    assert a['skipped']==b['skipped']==one['skipped']==answered.count((False,False))>0
    assert [c[0] for c in a['curve']]==[c[0] for c in b['curve']]==[c[0] for c in one['curve']]
    same_gradients(a['gradients'], b['gradients'], one['gradients'])
    assert a['tokens']==one['tokens']

def test_what_both_have_learnt_is_the_same(two, toy_folder):
    a,b = (r['dropout'] for r in two['whole'])
    start = worker.learnt(worker.toy(toy_folder)[0])
    assert all(torch.equal(a['params'][n], b['params'][n]) for n in start)
    assert any(not torch.equal(a['params'][n], start[n]) for n in start)

def test_resume_in_two_processes_is_exact(two):
    whole,again = two['whole'][0]['dropout'],two['resume'][0]['dropout']
    assert len(again['seen'])==4, 'the run went on after step 2, not from the beginning'
    assert again['curve']==whole['curve']
    for r in (0, 1):
        for n,p in whole['params'].items(): assert torch.equal(two['resume'][r]['dropout']['params'][n], p), n

def test_each_process_has_its_own_chance(two):
    "Its dropout is not the other's: both states are in the checkpoint, and they differ."
    states = read_checkpoint(two['out']/'whole'/'step-000006')[1]['random/torch']
    assert len(states)==2 and not torch.equal(*states)

def test_only_one_checkpoint_is_kept(two):
    for run in ('whole','stopped'): assert [f.name for f in checkpoints(two['out']/run)]==['step-000006']

def test_another_number_of_processes_is_an_error(two, toy_folder):
    with pytest.raises(ValueError, match='processes is 2 there and 1 here'):
        worker.run(toy_folder, 'random_profile', 6, dropout=.1, checkpoint=two['out']/'whole')

def test_a_batch_that_cannot_be_shared_is_an_error(toy_folder, monkeypatch):
    model,tok,data = worker.toy(toy_folder)
    monkeypatch.setattr('accelerate.Accelerator.num_processes', 2)   # the check comes before any exchange
    policy,cfg = worker.POLICIES['random_profile'](model),worker.settings(1, batch_size=3)
    with pytest.raises(ValueError, match='batch_size=3: not divisible by 2 processes'):
        worker.train(model, data, policy, cfg, tok.pad_token_id, **worker.QUIET)

# --- other tools ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def others(toy_folder, child_env, tmp_path_factory):
    out = tmp_path_factory.mktemp('others')
    launch(child_env, toy_folder, out, script=trainer_worker.__file__)
    return [torch.load(out/f'{r}.pt') for r in (0, 1)]

def same_run(a, b, one, rel=1e-4):
    assert a['losses']==b['losses']==pytest.approx(one['losses'], rel=rel) and len(set(one['losses']))==6
    for n,p in one['learnt'].items():
        assert torch.equal(a['learnt'][n], b['learnt'][n])
        assert (a['learnt'][n]-p).norm()<100*rel*p.norm(), n

@pytest.mark.parametrize('how', ['plain','checkpointing'])
def test_trainer_in_two_processes_equals_one(how, others, toy_folder, tmp_path):
    "Under DDP, where each step leaves most adapters without a gradient."
    a,b = (o[how] for o in others)
    one = trainer_worker.trained(toy_folder, tmp_path)
    same_run(a, b, one)
    assert a['profiles']==one['profiles'] and a['norms']==pytest.approx(one['norms'], rel=1e-3)

def test_a_model_in_parts_equals_a_whole_one(others, toy_folder):
    "FSDP2 over gloo: base and adapters are sharded."
    same_run(*(o['sharded'] for o in others), trainer_worker.sharded(toy_folder))

def test_integer_products_of_a_model_in_parts(others, toy_folder):
    "A code that flips where sums are added in another order moves a loss a little."
    a,b = (o['int8'] for o in others)
    assert a['losses']==b['losses']==pytest.approx(trainer_worker.sharded(toy_folder, ('bw8','bw4'))['losses'], rel=.01)
