"Training that is killed, for real and often, ends like training that is not."
import multiprocessing as mp, os, random, resource, signal, time
import pytest, torch
from safetensors.torch import load_file
import train_worker as worker
from switchable_llm.models.loading import load_model
from switchable_llm.system.files import LOCK
from switchable_llm.lora_routing import adapter_params
from switchable_llm.models.checkpoints import load_switchable, save_switchable
from switchable_llm.training.resuming import checkpoints, read_checkpoint

STEPS = 40
pytestmark = pytest.mark.skipif('forkserver' not in mp.get_all_start_methods(), reason='this system has no fork')

@pytest.fixture(scope='module')
def spawn(child_env):
    "Start a function in a new process; everything is imported there already, so that a start takes no time."
    ctx,started = mp.get_context('forkserver'),[]
    ctx.set_forkserver_preload(['train_worker', 'test_resume'])
    monkeypatch = pytest.MonkeyPatch()
    paths = [child_env['PYTHONPATH'], os.path.dirname(__file__)]   # for the preload
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(paths))
    def start(f, *args):
        started.append(p := ctx.Process(target=f, args=args))
        p.start()
        return p
    yield start
    monkeypatch.undo()
    for p in started:
        if p.is_alive(): p.kill()
        p.join()

def training(folder, out):
    "In a child: train with checkpoints, then write the adapters; `mark` grows by a byte in each step."
    torch.set_num_threads(1)
    def pause(step):
        with open(out/'mark', 'ab') as f: f.write(b'.')
    r = worker.run(folder, 'random_profile', STEPS, dropout=.1, checkpoint=out/'checkpoints', every=2, pause=pause)
    torch.save(r['params'], out/'done.pt')

@pytest.fixture(scope='module')
def whole(toy_folder, spawn, tmp_path_factory):
    "Adapters of a run that nobody disturbed."
    out = tmp_path_factory.mktemp('whole')
    p = spawn(training, toy_folder, out); p.join()
    assert p.exitcode==0
    return torch.load(out/'done.pt')

def whole_files(folder):
    "Check that the newest checkpoint can be read. (An older one may be half deleted.) Returns how many there are."
    done = checkpoints(folder) if folder.exists() else []
    for d in done[-1:]: read_checkpoint(d)
    return len(done)

def names(folder):
    "What lies in a folder of checkpoints, beside the file that locks it."
    return sorted(f.name for f in folder.iterdir() if f.name!=LOCK)

@pytest.mark.parametrize('seed', [0, 1])
def test_killed_at_random_moments(seed, toy_folder, spawn, whole, tmp_path):
    rng,kills,mark = random.Random(seed),0,tmp_path/'mark'
    mark.touch()
    for attempt in range(100):
        p,until = spawn(training, toy_folder, tmp_path),mark.stat().st_size+rng.randint(1, 8)
        while p.exitcode is None and mark.stat().st_size<until: time.sleep(.0005)
        p.join(rng.uniform(0, .02))   # between two steps, or while a checkpoint is written
        p.kill(); p.join()
        kills += p.exitcode==-signal.SIGKILL
        whole_files(tmp_path/'checkpoints')
        if p.exitcode==0: break
    assert p.exitcode==0 and kills>=3, f'killed {kills} times: the test shows little'
    again = torch.load(tmp_path/'done.pt')
    for n,x in whole.items(): assert torch.equal(again[n], x), n
    assert names(tmp_path/'checkpoints')==[f'step-{STEPS:06d}']

# --- killed in the middle of writing --------------------------------------------------------------------------------

class CountDown:
    "Kills this very process at the n-th call of one of some functions of the operating system."
    def __init__(self, n, calls=('replace','rename','mkdir','rmdir','unlink','fsync','chmod')):
        self.n = n
        for k in calls: setattr(os, k, self.wrap(getattr(os, k)))
    def wrap(self, f):
        def call(*a, **kw):
            self.n -= 1
            if self.n<0: os.kill(os.getpid(), signal.SIGKILL)
            return f(*a, **kw)
        return call

def saving_checkpoints(folder, out, n):
    "In a child: train three steps with a checkpoint after each, and be killed at the n-th file operation."
    torch.set_num_threads(1)
    def pause(step):
        if step==0: CountDown(n)                # the first checkpoint is there
    worker.run(folder, 'random_profile', 3, checkpoint=out, every=1, pause=pause)

def test_killed_while_a_training_checkpoint_is_written(toy_folder, spawn, tmp_path):
    want,ended = worker.run(toy_folder, 'random_profile', 3)['params'],False
    for n in range(0, 60, 4):
        out = tmp_path/str(n)
        p = spawn(saving_checkpoints, toy_folder, out, n); p.join()
        ended = p.exitcode==0
        assert ended or p.exitcode==-signal.SIGKILL
        assert whole_files(out), f'killed at operation {n}: no checkpoint is left'
        again = worker.run(toy_folder, 'random_profile', 3, checkpoint=out, every=1)
        assert len(again['seen'])<3, 'it began from the beginning'
        for k,x in want.items(): assert torch.equal(again['params'][k], x), k
        assert names(out)==['step-000003'], f'killed at operation {n}: something was left behind'
        if ended: break
    assert ended, 'more file operations than expected: raise the range'

def saved_model(folder, value):
    "A switchable model whose adapters hold `value`."
    model = worker.toy(folder)[0]
    with torch.no_grad():
        for p in adapter_params(model).values(): p.fill_(value)
    return model

def saving_model(folder, out, n):
    "In a child: replace a switchable checkpoint, and be killed at the n-th file operation."
    torch.set_num_threads(1)
    model = saved_model(folder, 2.)
    CountDown(n)
    save_switchable(model, out)

def test_killed_while_a_switchable_checkpoint_is_replaced(toy_folder, spawn, tmp_path):
    old = saved_model(toy_folder, 1.)
    for n in range(40):
        out = tmp_path/str(n)/'model'
        save_switchable(old, out)
        p = spawn(saving_model, toy_folder, out, n); p.join()
        assert p.exitcode in (0, -signal.SIGKILL)
        model = load_switchable(out, load_model(toy_folder)[0])          # the old one or the new one, whole
        values = {x for q in adapter_params(model).values() for x in q.flatten().tolist()}
        assert values in ({1.}, {2.}), f'killed at operation {n}'
        save_switchable(saved_model(toy_folder, 3.), out)                # and it can be replaced again
        if p.exitcode==0: break
    assert p.exitcode==0 and values=={2.}, 'more file operations than expected: raise the range'
    assert [f.name for f in out.parent.iterdir()]==['model'], 'something was left behind'

# --- no room to write -----------------------------------------------------------------------------------------------

def limited(f, *args):
    "In a child: call `f` where no file may grow beyond 20,000 bytes; status 7 if that was an `OSError`."
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try: f(*args)
    except (OSError, RuntimeError): os._exit(7)
    os._exit(0)

def save_large(folder, out): save_switchable(saved_model(folder, 2.), out)

def test_a_full_disk_leaves_the_old_model(toy_folder, spawn, tmp_path):
    out = tmp_path/'model'
    save_switchable(saved_model(toy_folder, 1.), out)
    assert (out/'adapters.safetensors').stat().st_size>20_000
    p = spawn(limited, save_large, toy_folder, out); p.join()
    assert p.exitcode==7
    name = next(iter(adapter_params(worker.toy(toy_folder)[0])))
    assert set(load_file(out/'adapters.safetensors')[name].flatten().tolist())=={1.}
    load_switchable(out, load_model(toy_folder)[0])

def train_on(folder, out): worker.run(folder, 'random_profile', 4, checkpoint=out, every=2)

def test_a_full_disk_leaves_the_last_training_checkpoint(toy_folder, spawn, tmp_path):
    worker.run(toy_folder, 'random_profile', 4, checkpoint=tmp_path/'c', every=2, stop_at=2)
    p = spawn(limited, train_on, toy_folder, tmp_path/'c'); p.join()
    assert p.exitcode==7
    assert names(tmp_path/'c')==['step-000002']
    again = worker.run(toy_folder, 'random_profile', 4, checkpoint=tmp_path/'c', every=2)
    want = worker.run(toy_folder, 'random_profile', 4)
    for k,x in want['params'].items(): assert torch.equal(again['params'][k], x), k
    assert names(tmp_path/'c')==['step-000004']
