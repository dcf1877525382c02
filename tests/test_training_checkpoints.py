"Checkpoints of training: no damage goes unseen, nothing in them is run, nothing foreign is touched, one run at a time."
import ctypes, errno, json, multiprocessing as mp, os, pickle, random, shutil, sys, tempfile, time
from pathlib import Path
import numpy as np, pytest, torch
import train_worker as worker
from safetensors.torch import load_file, save_file
from switchable_llm.system.files import LOCK
from switchable_llm.joint_training import Objective, all_profiles, random_profile, train
from switchable_llm.lora_routing import adapter_params
from switchable_llm.training.objectives import Distillation
from switchable_llm.quantizers import Bits
from switchable_llm.training.resuming import STATE, TENSORS, checkpoints, read_checkpoint, write_checkpoint
from switchable_llm.core.profiles import Profile

FILES = (STATE, TENSORS)
forks = pytest.mark.skipif('fork' not in mp.get_all_start_methods(), reason='this system has no fork')

@pytest.fixture(scope='module')
def whole(toy_folder):
    "Adapters of a run that nobody disturbed."
    return worker.run(toy_folder, 'random_profile', 6, dropout=.1)['params']

@pytest.fixture(scope='module')
def stopped(toy_folder, tmp_path_factory):
    "The folder of the same run, stopped after step 4."
    out = tmp_path_factory.mktemp('stopped')/'run'
    worker.run(toy_folder, 'random_profile', 6, dropout=.1, checkpoint=out, stop_at=4)
    assert [p.name for p in checkpoints(out)]==['step-000004']
    return out

@pytest.fixture
def run(stopped, tmp_path):
    "A copy of that folder, to do things to."
    return Path(shutil.copytree(stopped, tmp_path/'run'))

def go_on(toy_folder, folder): return worker.run(toy_folder, 'random_profile', 6, dropout=.1, checkpoint=folder)
def go_on_with(model, data, folder, pad_id=0):
    "The loop that all runs here use, with a model or data of one's own."
    policy,cfg = worker.POLICIES['random_profile'](model),worker.settings(6)
    return train(model, data, policy, cfg, pad_id, checkpoint=folder, every=2, **worker.QUIET)
def content(folder):
    files = [p for p in sorted(folder.rglob('*')) if p.is_file() and p.name!=LOCK]
    return {str(p.relative_to(folder)):p.read_bytes() for p in files}

def ends_well(toy_folder, folder, whole):
    again = go_on(toy_folder, folder)
    assert len(again['seen'])==2, 'it began from the beginning'
    for n,p in whole.items(): assert torch.equal(again['params'][n], p), n

def test_what_it_is_made_of(stopped, toy_folder, run, whole):
    "Data alone: text that any JSON reader reads, and tensors; readable to others like any file."
    step = stopped/'step-000004'
    assert sorted(p.name for p in step.iterdir())==sorted(FILES)
    about,tensors = json.loads((step/STATE).read_text()),load_file(step/TENSORS)
    assert about['step']==4 and len(about['curve'])==4 and about['settings']['train']['lr']==1e-2
    assert {k.split('/')[0] for k in tensors}=={'params','optimizer','random'}
    (run/'probe').touch()
    assert {p.stat().st_mode & 0o777 for p in step.iterdir()}=={(run/'probe').stat().st_mode & 0o777}
    (run/'probe').unlink(); ends_well(toy_folder, run, whole)

# --- damage ---------------------------------------------------------------------------------------------------------

def damaged(run, name):
    "A checkpoint with one changed file is refused, and the error names the file."
    with pytest.raises((ValueError, FileNotFoundError), match=name): read_checkpoint(run/'step-000004')

@pytest.mark.parametrize('name', FILES)
def test_every_bit_counts(name, run):
    path,rng = run/'step-000004'/name,random.Random(name)
    good = path.read_bytes()
    header = 8+int.from_bytes(good[:8], 'little') if name==TENSORS else 0
    ends = {*range(min(len(good), 300)), *range(len(good)-100, len(good))}
    anywhere = {rng.randrange(len(good)) for _ in range(300)} | {rng.randrange(header or 1) for _ in range(100)}
    for at in sorted(ends | anywhere):
        path.write_bytes(good[:at]+bytes([good[at]^(1<<rng.randrange(8))])+good[at+1:])
        damaged(run, name)

@pytest.mark.parametrize('name', FILES)
def test_cut_longer_foreign_or_missing(name, run, tmp_path):
    path,rng = run/'step-000004'/name,random.Random(name)
    good,other = path.read_bytes(),(run/'step-000004'/FILES[name==FILES[0]]).read_bytes()
    cuts = [good[:n] for n in (0, 1, 7, 8, 9, len(good)-1, *(rng.randrange(len(good)) for _ in range(40)))]
    foreign = [b'\0'*len(good), b'null', b'[]', b'{}', b'['*10**6, b'{"a":'*10**5, other]
    for bad in [*cuts, good+b'x', good+b'\n', good*2, *foreign]:
        path.write_bytes(bad); damaged(run, name)
    path.unlink(); damaged(run, name)

def test_files_of_two_checkpoints(run, toy_folder, tmp_path):
    worker.run(toy_folder, 'random_profile', 6, dropout=.1, checkpoint=tmp_path/'other', every=1, stop_at=2)
    shutil.copy(tmp_path/'other'/'step-000003'/TENSORS, run/'step-000004'/TENSORS)
    damaged(run, TENSORS)

@pytest.mark.parametrize('name', FILES)
def test_training_stops_at_a_damaged_one(name, run, toy_folder, whole):
    "Before its first step, and without changing anything; the sound file back in its place, all is well."
    path = run/'step-000004'/name; good = path.read_bytes()
    for bad in (good[:-1], good[:len(good)//2]+bytes([good[len(good)//2]^1])+good[len(good)//2+1:], None):
        path.write_bytes(bad) if bad is not None else path.unlink()
        before,model = content(run),worker.toy(toy_folder, .1)[0]
        start = worker.learnt(model)
        with pytest.raises((ValueError, FileNotFoundError), match=f'{name}.*delete'):
            go_on_with(model, worker.toy(toy_folder)[2], run)
        assert content(run)==before and all(torch.equal(p, start[n]) for n,p in adapter_params(model).items())
    path.write_bytes(good); ends_well(toy_folder, run, whole)

@pytest.mark.parametrize('part', ['random/torch','random/python','random/numpy','optimizer/','params/'])
def test_no_part_can_be_exchanged(part, run, toy_folder):
    "Another random state, other moments or adapters, in a tensors file that is sound in itself."
    path = run/'step-000004'/TENSORS; tensors = load_file(path)
    name = next(k for k in tensors if k.startswith(part))
    tensors[name].view(-1)[-1] += 1; save_file(tensors, path)
    with pytest.raises(ValueError, match=TENSORS): go_on(toy_folder, run)

NAME = 'transformer.h.0.attn.c_attn.adapters.4.a'
@pytest.mark.parametrize('change', [
    lambda t: t.pop('params/'+NAME),
    lambda t: t.update({'params/'+NAME: torch.zeros(1)}),
    lambda t: t.update({'optimizer/exp_avg/'+NAME: torch.zeros(1, 3)}),
    lambda t: t.update({'optimizer/exp_avg/nothing': torch.zeros(1)}),
    lambda t: t.pop('random/torch'),
    lambda t: t.update({'random/torch': torch.zeros(1, 9, dtype=torch.uint8)}),
    lambda t: t.update({'random/torch': torch.zeros_like(t['random/torch'])}),
    lambda t: t['random/numpy'].view(-1)[-2].fill_(10**6),
    lambda t: t['random/python'].fill_(2**40)])
def test_a_forged_one_is_refused(change, run, toy_folder):
    "Sealed by somebody who knows how: still an error that names the file, and no crash."
    about,tensors = read_checkpoint(run/'step-000004')
    change(tensors); shutil.rmtree(run/'step-000004'); write_checkpoint(run/'step-000004', about, tensors)
    with pytest.raises(ValueError, match=TENSORS): go_on(toy_folder, run)

# --- nothing in it is run -------------------------------------------------------------------------------------------

found_classes,watching = [],[]
def audit(event, args):
    if watching and event=='pickle.find_class': found_classes.append(args)

class Evil:
    "What a pickle can do: call anything."
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.mkdir, (str(self.mark),)

def test_resuming_unpickles_nothing(run, toy_folder, whole):
    sys.addaudithook(audit); watching.append(1)
    try:
        ends_well(toy_folder, run, whole)
        assert not found_classes
        pickle.loads(pickle.dumps(Path('x'))); assert found_classes      # the watch works
    finally: watching.clear()

@pytest.mark.parametrize('name', ['custom_checkpoint_0.pkl','optimizer.bin','random_states_0.pkl'])
def test_checkpoints_with_pickles_are_refused(name, toy_folder, tmp_path):
    step = tmp_path/'run'/'step-000002'; step.mkdir(parents=True)
    (step/'settings.json').write_text('{}')
    torch.save(Evil(tmp_path/'ran'), step/name)
    before = content(tmp_path/'run')
    with pytest.raises(ValueError, match='step-000002: .*pickles.*another folder'): go_on(toy_folder, tmp_path/'run')
    assert content(tmp_path/'run')==before and not (tmp_path/'ran').exists()
    with pytest.raises(pickle.UnpicklingError, match='eights'): torch.load(step/name)      # it is what it is said to be
    torch.load(step/name, weights_only=False); assert (tmp_path/'ran').exists()

# --- what lies in the folder ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('foreign', [
    'notes.txt','photos/a.jpg','step-000002/photo.jpg','step-000099/model.safetensors','step-5/x','step-000006'])
@pytest.mark.parametrize('fresh', [True, False])
def test_what_is_not_ours_is_named_and_stays(foreign, fresh, run, toy_folder, whole):
    if fresh: shutil.rmtree(run/'step-000004')
    path = run/foreign; path.parent.mkdir(exist_ok=True); path.write_text('mine')
    before = content(run)
    with pytest.raises(OSError, match=foreign.split('/')[0]) as e: go_on(toy_folder, run)
    assert content(run)==before and 'stays as it is' in str(e.value)
    path.rename(run.parent/'elsewhere')
    if path.parent!=run: path.parent.rmdir()
    if not fresh: ends_well(toy_folder, run, whole)

def test_what_comes_while_it_runs_stays_too(run, toy_folder, whole):
    "A note in an old checkpoint, a file beside it, a hidden one: training goes on, and removes none of them."
    (run/'.hidden').write_text('mine'); (run/'step-000004'/'note.txt').write_text('mine')
    def pause(step): (run/'beside.txt').write_text('mine')
    again = worker.run(toy_folder, 'random_profile', 6, dropout=.1, checkpoint=run, pause=pause)
    for n,p in whole.items(): assert torch.equal(again['params'][n], p), n
    assert {'.hidden','beside.txt','step-000004/note.txt'}<=set(content(run))
    read_checkpoint(run/'step-000006')

def test_what_killed_writers_left_is_cleared(run, toy_folder, whole):
    left = run/'.step-000002.4194304-abcdef-elsewhere.new'
    shutil.copytree(run/'step-000004', left)
    (left/f'.{STATE}.1-a-b.tmp').write_text('half'); (run/'step-000002').mkdir()
    ends_well(toy_folder, run, whole)
    assert sorted(p.name for p in run.iterdir() if p.name!=LOCK)==['step-000006']

def test_places_that_cannot_be(toy_folder, tmp_path):
    (tmp_path/'file').write_text('mine')
    seen = []
    def begins(folder):
        try: worker.run(toy_folder, 'random_profile', 2, checkpoint=folder, pause=seen.append)
        finally: assert not seen, 'it was trained before'
    for folder in (tmp_path/'file', tmp_path/'file'/'run', tmp_path/('x'*300), f'{tmp_path}/a\0b'):
        with pytest.raises((OSError, ValueError)) as e: begins(folder)
        assert len(str(e.value))>20
    assert [p.name for p in tmp_path.iterdir()]==['file'] and (tmp_path/'file').read_text()=='mine'

# --- in a process of its own ----------------------------------------------------------------------------------------

SKIP = 77

def child(f, *args):
    "Call `f` in a copy of this process; a `Process` that has begun."
    def body():
        try: f(*args)
        except BaseException as e: print(f'{type(e).__name__}: {e}', file=sys.stderr, flush=True); os._exit(1)
        os._exit(0)
    p = mp.get_context('fork').Process(target=body); p.start()
    return p

@forks
def test_a_second_process_is_told(toy_folder, tmp_path, whole):
    "At once and by the first one's number; the first ends as if nothing had been, and then the folder is free."
    out,go = tmp_path/'run',tmp_path/'go'
    def first():
        def pause(step):
            if step==2: (tmp_path/'ready').touch()
            while step==2 and not go.exists(): time.sleep(.01)
        done = worker.run(toy_folder, 'random_profile', 6, dropout=.1, checkpoint=out, pause=pause)
        torch.save(done['params'], tmp_path/'done.pt')
    p = child(first)
    try:
        while not (tmp_path/'ready').exists(): assert p.is_alive(); time.sleep(.01)
        before = content(out)
        with pytest.raises(BlockingIOError, match=f'process {p.pid} .*another folder'): go_on(toy_folder, out)
        assert content(out)==before
        go.touch(); p.join(); assert p.exitcode==0
    finally: p.kill()
    for n,x in torch.load(tmp_path/'done.pt').items(): assert torch.equal(whole[n], x), n
    go_on(toy_folder, out)

@forks
def test_no_permission(toy_folder, whole):
    "Said before training, also to one who is not root."
    place = Path(tempfile.mkdtemp()); place.chmod(0o755)
    (place/'closed').mkdir(); (place/'closed').chmod(0o555)
    model,tok,data = worker.toy(toy_folder)
    def body():
        if os.getuid()==0: os.setuid(65534)
        for folder in (place/'closed'/'run', place/'closed'):
            try: train(model, data, random_profile(worker.NAMES), worker.settings(1), checkpoint=folder, **worker.QUIET)
            except PermissionError as e: said = str(e)
            else: raise AssertionError('it trained')
            assert 'no permission to write' in said and str(place/'closed') in said, said
        untouched = [p for n,p in adapter_params(model).items() if n.endswith('.b')]
        assert not any(p.any() for p in untouched), 'it was trained before'
    try:
        p = child(body); p.join(); assert p.exitcode==0
    finally: shutil.rmtree(place)

def own_disk(place, size):
    "In a child: mount a small disk at `place` that only this process sees; skips the test where that is forbidden."
    libc,uid = ctypes.CDLL(None, use_errno=True),os.getuid()
    user,mounts = 0x10000000,0x00020000
    if libc.unshare(mounts | (user if uid else 0)): os._exit(SKIP)
    if uid: Path('/proc/self/uid_map').write_text(f'0 {uid} 1')
    libc.mount(None, b'/', None, 0x4000|0x40000, None)                       # recursive and private
    if libc.mount(b'tmpfs', str(place).encode(), b'tmpfs', 0, f'size={size}'.encode()): os._exit(SKIP)

@forks
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='mounts a disk as Linux does')
def test_a_full_disk(toy_folder, tmp_path, whole):
    "Too little room is said before training. A disk that fills up meanwhile leaves a good checkpoint, which goes on."
    place = tmp_path/'disk'; place.mkdir()
    def body():
        own_disk(place, 4<<20)
        out,filler = place/'run',place/'filler'
        def fill(step=3):
            if step!=3: return
            with open(filler, 'wb', buffering=0) as f:
                try:
                    while f.write(b'x'*4096): pass
                except OSError as e: assert e.errno==errno.ENOSPC
        fill(); seen = []
        try: worker.run(toy_folder, 'random_profile', 6, dropout=.1, checkpoint=out, pause=seen.append)
        except OSError as e: assert 'bytes are free' in str(e) and not seen, e
        else: raise AssertionError('it trained')
        filler.unlink()
        def late(step): fill() if step==2 else None
        try: worker.run(toy_folder, 'random_profile', 6, dropout=.1, checkpoint=out, pause=late)
        except OSError as e: assert 'step-000004: 0 bytes are free' in str(e), e
        else: raise AssertionError('the disk was not full')
        assert sorted(p.name for p in out.iterdir() if p.name!=LOCK)==['step-000002']
        read_checkpoint(out/'step-000002')
        filler.unlink()
        again = go_on(toy_folder, out)
        assert len(again['seen'])==4 and all(torch.equal(again['params'][n], p) for n,p in whole.items())
    p = child(body); p.join()
    if p.exitcode==SKIP: pytest.skip('mounting is not allowed here')
    assert p.exitcode==0

# --- exact, whatever is trained and however -------------------------------------------------------------------------

class Chance:
    "A term that draws from every generator."
    weight = .1
    def __call__(self, model, out, teachers):
        drawn = random.gauss(0, 1)+np.random.randn()+random.random()+np.random.rand()+torch.rand(()).item()
        return out.logits.float().square().mean()*drawn

class Drawn(Objective):
    def to_dict(self): return dict(terms=['chance'])

KINDS = dict(
    cosine=dict(schedule='cosine'),
    constant=dict(schedule='constant_with_warmup', clip=None),
    bf16=dict(mixed_precision='bf16'),
    betas=dict(betas=(.5, .7), weight_decay=0.))

def trained(folder, kind, checkpoint=None, stop_at=None):
    "A run of six steps, dropout on; its model."
    model,tok,data = worker.toy(folder, .1)
    objective,policy = Objective(),random_profile(worker.NAMES, seed=5)
    if kind=='chance': objective = Drawn((Chance(),))
    if kind=='teacher': objective,policy = Objective((Distillation(),)),all_profiles(worker.NAMES)
    if kind=='base':
        model.to(torch.bfloat16)
        for p in adapter_params(model).values(): p.data = p.data.float()
    def callback(step, curve):
        if step==stop_at: raise worker.Stopped
    cfg = worker.settings(6, **KINDS.get(kind, {}))
    try: result = train(model, data, policy, cfg, tok.pad_token_id, objective=objective, checkpoint=checkpoint,
                        every=2, callback=callback, **worker.QUIET)
    except worker.Stopped: result = None
    return worker.learnt(model), result

@pytest.mark.parametrize('kind', [*KINDS, 'chance','teacher','base'])
def test_a_stopped_run_ends_with_the_same_bits(kind, toy_folder, tmp_path):
    want,result = trained(toy_folder, kind)
    trained(toy_folder, kind, tmp_path, stop_at=2)
    random.random(); np.random.rand(); torch.rand(())                    # somebody else draws meanwhile
    got,again = trained(toy_folder, kind, tmp_path)
    assert again['curve']==result['curve'] and all(torch.equal(got[n], want[n]) for n in want)

def test_skipped_steps_are_resumed_too(toy_folder, tmp_path):
    model,tok,data = worker.toy(toy_folder)
    sparse = [e._replace(ids=e.ids[:e.prompt]) if i%4 else e for i,e in enumerate(data)]
    def go(checkpoint=None, stop_at=None):
        m = worker.toy(toy_folder, .1)[0]
        def callback(step, curve):
            if step==stop_at: raise worker.Stopped
        policy,cfg = random_profile(worker.NAMES),worker.settings(12, batch_size=1, accumulate=2)
        return m, train(m, sparse, policy, cfg, tok.pad_token_id, checkpoint=checkpoint, every=1,
                        callback=callback, **worker.QUIET)
    want,result = go()
    assert 0<result['skipped']<12 and result['skipped']+len(result['curve'])==12
    for stop_at in range(0, 11, 3):
        with pytest.raises(worker.Stopped): go(tmp_path, stop_at)
    got,again = go(tmp_path)
    assert (again['skipped'], again['curve'])==(result['skipped'], result['curve'])
    for a,b in zip(want.parameters(), got.parameters()): assert torch.equal(a, b)

# --- only the same run ----------------------------------------------------------------------------------------------

def other_weights(m): m.transformer.ln_f.weight.data.mul_(1.5)
def other_alpha(m):
    for l in m.switch.layers:
        for a in l.adapters.values(): a.alpha = 99
def other_dropout(m):
    for l in m.switch.layers:
        for a in l.adapters.values(): a.dropout.p = .5
def other_kernel(m): m.switch.kernel = 'reference'
def frozen_part(m): m.switch.layers[0].adapters.requires_grad_(False)
def slower_part(m): m.switch.layers[0].adapters['4'].lr_factor = .1

@pytest.mark.parametrize('change,named', [
    (other_weights, 'model.frozen_weights'), (other_alpha, 'model.added'), (other_dropout, 'model.added'),
    (other_kernel, 'model.kernel'), (frozen_part, 'model.trained'), (slower_part, 'groups')])
def test_another_model_does_not_go_on(change, named, toy_folder, run):
    model,tok,data = worker.toy(toy_folder, .1); change(model)
    before = content(run)
    with pytest.raises(ValueError, match=f'step-000004 was made with other settings .{named}.* there and .* here'):
        go_on_with(model, data, run, tok.pad_token_id)
    assert content(run)==before

def with_first(d, **changes): return [d[0]._replace(**changes), *d[1:]]
@pytest.mark.parametrize('change,named', [
    (lambda d: d[:-1], 'data.examples'),
    (lambda d: [d[1], d[0], *d[2:]], 'data.fingerprint'),
    (lambda d: with_first(d, ids=(*d[0].ids[:-1], 7)), 'data.fingerprint'),
    (lambda d: with_first(d, prompt=d[0].prompt+1), 'data.fingerprint')])
def test_other_data_does_not_go_on(change, named, toy_folder, run):
    model,tok,data = worker.toy(toy_folder, .1)
    with pytest.raises(ValueError, match=named):
        go_on_with(model, change(data), run, tok.pad_token_id)

def test_another_profile_of_the_same_name_does_not_go_on(toy_folder, run):
    model,tok,data = worker.toy(toy_folder, .1, (Profile('bw4', Bits(4, 5)), 'bw6', 'bw8'))
    with pytest.raises(ValueError, match='model.profiles.bw4.default'):
        go_on_with(model, data, run, tok.pad_token_id)

def test_the_same_run_saved_more_often_goes_on(toy_folder, run, whole):
    again = worker.run(toy_folder, 'random_profile', 6, dropout=.1, checkpoint=run, every=5)
    assert len(again['seen'])==2 and all(torch.equal(again['params'][n], p) for n,p in whole.items())
