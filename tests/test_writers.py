"Every writer: what is not ours stays, what cannot be written is said before work, a file is whole or not there."
import errno, json, multiprocessing as mp, os, resource, shutil, signal
import pytest, torch
from safetensors import SafetensorError
from switchable_llm.models.loading import load_model
from switchable_llm.data.embedded import tiny_tokenizer
from switchable_llm.serving.exports import export_float, merge, freeze
from switchable_llm.formats.gguf_file import export_gguf
from switchable_llm.formats.torchao import export_torchao, save_torchao
from switchable_llm.system.files import named_errors
from switchable_llm.lora_routing import adapter_params, add_adapters_, export_peft
from switchable_llm.models.checkpoints import check_save_target, save_switchable
from switchable_llm.serving.packed import load_packed
from switchable_llm.quantizers import QuantConfig
from switchable_llm.core.profiles import Profile, load_profiles, save_profiles
from switchable_llm.core.switching import make_switchable_
from switchable_llm.study.records import load_records, save_record
import test_resume

pytestmark = pytest.mark.skipif('forkserver' not in mp.get_all_start_methods(), reason='this system has no fork')

WRITERS = dict(   # name -> (write a model to a path, an older one there is replaced)
    save_switchable=lambda m, path: save_switchable(m, path, base='x'),
    export_peft=lambda m, path: export_peft(m, '8', path),
    export_float=lambda m, path: export_float(m, 'bw8', path, tiny_tokenizer(), overwrite=True),
    export_gguf=lambda m, path: export_gguf(m, 'bw8', path, overwrite=True),
    save_torchao=lambda m, path: save_torchao(m, 'bw8', path, overwrite=True),
    freeze=lambda m, path: freeze(m, path),
    save_profiles=lambda m, path: save_profiles(many_profiles(m), path),
    save_record=lambda m, path: save_record(long_record(m, path), path.parents[2]))
BESIDE = {'model.lora.gguf'}   # the second file of an export to GGUF
NAMES = dict(export_gguf='model.gguf', save_torchao='model.pt', freeze='model.safetensors', save_profiles='model.json',
             save_record='model-s0.json')   # of those that write a file, and not a folder
FOLDERS = [w for w in WRITERS if w not in NAMES]

def value(model): return next(iter(adapter_params(model).values())).flatten()[0].item()

def many_profiles(model): return [Profile(f'number_{value(model):.0f}_{i}', 'w4a8') for i in range(400)]

def long_record(model, path):
    "One that says the same whenever it is written; its folders are its names."
    names = dict(preset=path.parents[1].name, experiment=path.parent.name, name='model', seed=0)
    return names | dict(time='then', numbers=[value(model)]*6000)

def needs(writer):
    "Skip where what the writer writes with is not installed."
    for w,package in dict(export_gguf='gguf', save_torchao='torchao').items():
        if w==writer: pytest.importorskip(package, reason=f'the extra `{package}` is not installed')

def made(folder, value=1.):
    "A switchable model whose adapters hold one number."
    m = load_model(folder)[0]; make_switchable_(m, ['bw8'], QuantConfig(act='per_token')); add_adapters_(m, r=8)
    with torch.no_grad():
        for p in adapter_params(m).values(): p.fill_(value)
    return m

@pytest.fixture(scope='module')
def model(toy_folder): return made(toy_folder)

def place(writer, folder): return folder/NAMES.get(writer, 'model')

def content(folder):
    "Every file below, hidden ones too, and the folders."
    return {str(p.relative_to(folder)):p.read_bytes() if p.is_file() else None for p in folder.rglob('*')}

def said(folder):
    "The same, without what differs from one writing to the next: the order of a header, and where a record lies."
    def read(name, data):
        if name.endswith('.json') and data.startswith(b'{"versions"'):
            return {k:v for k,v in json.loads(data).items() if k not in ('preset','experiment')}
        if not name.endswith('.safetensors'): return data
        end = 8+int.from_bytes(data[:8], 'little')
        head = json.loads(data[8:end])
        head['__metadata__'].pop('head_checksum', None)   # of its bytes, and so of its order
        return head, data[end:]
    return {k:read(k, v) for k,v in content(folder).items()}

def no_work(monkeypatch):
    "Anything that costs time is an error."
    def spent(*a, **k): raise AssertionError('work was spent')
    for name in ('serving.exports.merge', 'formats.gguf_file.merge', 'formats.torchao.export_torchao',
                 'models.checkpoints.base_hash', 'lora_routing.save_tensors', 'serving.exports._pack_layer',
                 'study.records.environment', 'core.profiles.yaml.safe_dump'):
        monkeypatch.setattr(f'switchable_llm.{name}', spent)

def stays(writer, model, folder, monkeypatch, match, path=None):
    before = content(folder)
    with monkeypatch.context() as mp:
        no_work(mp)
        with pytest.raises(OSError, match=match): WRITERS[writer](model, path or place(writer, folder))
    assert content(folder)==before

@pytest.mark.parametrize('writer', WRITERS)
def test_what_is_not_ours_stays(writer, model, toy_folder, tmp_path, monkeypatch):
    needs(writer)
    path = place(writer, tmp_path)
    def put(make):
        for p in tmp_path.iterdir(): shutil.rmtree(p) if p.is_dir() else p.unlink()
        make()
    def both(f):
        path.mkdir(); f(path)
    for make in (lambda: shutil.copytree(toy_folder, path), lambda: both(lambda p: (p/'notes.txt').write_text('mine')),
                 lambda: both(lambda p: (p/'sub').mkdir()),
                 lambda: both(lambda p: (p/'switchable.json').write_text('{}')), lambda: path.write_text('mine')):
        put(make)
        stays(writer, model, tmp_path, monkeypatch, f'{path.name}.*(stays as it is|choose another name)')

@pytest.mark.parametrize('writer', WRITERS)
def test_what_is_ours_stays_if_something_else_is_beside_it(writer, model, tmp_path, monkeypatch):
    needs(writer)
    path = place(writer, tmp_path)
    WRITERS[writer](model, path); WRITERS[writer](model, path)                       # an older one is replaced
    if writer in FOLDERS:
        (path/'notes.txt').write_text('mine')
        stays(writer, model, tmp_path, monkeypatch, 'stays as it is')
        (path/'notes.txt').unlink(); (path/'more').mkdir(); (path/'more'/'notes.txt').write_text('mine')
        stays(writer, model, tmp_path, monkeypatch, 'stays as it is')

@pytest.mark.parametrize('writer', WRITERS)
def test_an_empty_folder_is_as_good_as_none(writer, model, tmp_path):
    needs(writer)
    path = place(writer, tmp_path)
    if writer in FOLDERS: path.mkdir()
    WRITERS[writer](model, path)
    assert path.exists() and {p.name for p in tmp_path.iterdir()}-BESIDE=={path.name}

@pytest.mark.parametrize('writer', WRITERS)
def test_one_does_not_replace_what_another_wrote(writer, model, tmp_path, monkeypatch):
    for other in WRITERS:
        if other==writer: continue
        needs(writer); needs(other)
        folder = tmp_path/other; folder.mkdir()
        WRITERS[other](model, place(other, folder))
        if place(other, folder)!=place(writer, folder): os.replace(place(other, folder), place(writer, folder))
        stays(writer, model, folder, monkeypatch, 'stays as it is|is a folder|is a file')

@pytest.mark.parametrize('writer', WRITERS)
def test_where_nothing_can_be_written(writer, model, tmp_path, monkeypatch):
    needs(writer)
    (tmp_path/'file').write_text('mine')
    stays(writer, model, tmp_path, monkeypatch, 'is a file, not a folder', tmp_path/'file'/place(writer, tmp_path).name)
    if os.geteuid()==0: return
    (tmp_path/'shut').mkdir(mode=0o555)
    stays(writer, model, tmp_path, monkeypatch, 'no permission', tmp_path/'shut'/place(writer, tmp_path).name)

@pytest.mark.parametrize('writer', WRITERS)
def test_a_disk_that_is_full_already(writer, model, tmp_path, monkeypatch):
    needs(writer)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: full)
    stays(writer, model, tmp_path, monkeypatch, '1,000 bytes are free')

@pytest.mark.parametrize('writer', WRITERS)
def test_others_can_read_what_is_written(writer, model, tmp_path):
    needs(writer)
    def modes(folder): return {p.stat().st_mode & 0o777 for p in folder.rglob('*') if p.is_file()}
    for mask,mode in ((0o022, 0o644), (0o027, 0o640)):
        folder = tmp_path/str(mask); folder.mkdir()
        before = os.umask(mask)
        try: WRITERS[writer](model, place(writer, folder))
        finally: os.umask(before)
        assert modes(folder)=={mode}
    for p in folder.rglob('*'): p.chmod(0o700 if p.is_dir() else 0o600)
    WRITERS[writer](model, place(writer, folder))
    assert modes(folder)=={0o600} and place(writer, folder).stat().st_mode & 0o077==0    # what is private stays so

def test_a_target_is_looked_at_before_training(model, toy_folder, tmp_path):
    save_switchable(model, tmp_path/'old', base='x')
    for path in (tmp_path/'old', tmp_path/'new', tmp_path/'a'/'b'): check_save_target(path)
    assert [p.name for p in tmp_path.iterdir()]==['old']
    with pytest.raises(FileExistsError, match='config.json.*is not a switchable checkpoint'):
        check_save_target(toy_folder)
    with pytest.raises(OSError, match='are needed'): check_save_target(tmp_path/'new', space=1<<60)

def test_a_checkpoint_of_a_newer_library_is_replaced_and_a_damaged_one_is_not(model, tmp_path):
    path = save_switchable(model, tmp_path/'model', base='x')
    d = json.loads((path/'switchable.json').read_text())
    (path/'switchable.json').write_text(json.dumps(d | dict(format_version=99))); save_switchable(model, path, base='x')
    (path/'switchable.json').write_text('{"format_version": 1'); (path/'adapters.safetensors').write_bytes(b'')
    with pytest.raises(FileExistsError, match='is not a switchable checkpoint'): save_switchable(model, path, base='x')

@pytest.mark.parametrize('name, mine', [('config.json', '{"model_type": "gpt2"}'), ('notes.yaml', 'a: text'), ('empty.json', ''),
                                        ('settings.yml', 'name: p\ndefault: w8\ncolour: red')])
def test_profiles_replace_profiles_only(name, mine, tmp_path):
    path,p = tmp_path/name,Profile('p', 'w4a8')
    path.write_text(mine)
    with pytest.raises(FileExistsError, match=f'{name}: is there already and is not a file of profiles: it stays as it is'):
        save_profiles([p], path)
    assert path.read_text()==mine
    path.write_text('{"name": "one", "default": "w8"}')          # by hand, and profiles nevertheless
    save_profiles([p], path)
    assert load_profiles(path)==[p]
    with pytest.raises(ValueError, match='larger than 1,000,000 bytes'):
        save_profiles([Profile(f'{i}_'+'x'*10_000, 'w8') for i in range(101)], path)
    assert load_profiles(path)==[p]

@pytest.mark.parametrize('mine', ['my text', '', '{"preset": "p"}', '[]'])
def test_records_replace_records_only(mine, tmp_path):
    record = dict(preset='p', experiment='e', name='n', seed=0)
    path = save_record(record, tmp_path)
    save_record(record | dict(score=1), tmp_path)
    assert [r['score'] for r in load_records(tmp_path)]==[1]
    path.write_text(mine)
    with pytest.raises(FileExistsError, match='n-s0.json: is there already and is not a record: it stays as it is'):
        save_record(record, tmp_path)
    assert path.read_text()==mine

def test_an_error_names_what_torch_and_safetensors_hide(tmp_path):
    with pytest.raises(OSError, match='x.bin: no space left on the disk'):
        with named_errors('x.bin'): raise OSError(errno.ENOSPC, 'No space left on device')
    with pytest.raises(OSError, match='x.bin: no space left'):
        with named_errors('x.bin'): raise SafetensorError('I/O error: No space left on device (os error 28)')

# --- a packed model is an export already ----------------------------------------------------------------------------

def test_a_packed_model_is_not_exported(model, tmp_path):
    freeze(model, tmp_path/'m.safetensors')
    packed = load_packed(tmp_path/'m.safetensors')
    for f in (lambda: merge(packed, 'bw8'), lambda: export_float(packed, 'bw8', tmp_path/'x'),
              lambda: export_torchao(packed, 'bw8'), lambda: save_torchao(packed, 'bw8', tmp_path/'x'),
              lambda: export_gguf(packed, 'bw8', tmp_path/'x.gguf')):
        with pytest.raises(ValueError, match='packed file, which is an export already: export the switchable'): f()
    assert [p.name for p in tmp_path.iterdir()]==['m.safetensors']

# --- no room, and killed --------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def child(child_env):
    "Run a function in a new process, in which everything is imported already; its exit code."
    ctx = mp.get_context('forkserver')
    ctx.set_forkserver_preload(['test_writers'])
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([child_env['PYTHONPATH'], os.path.dirname(__file__)]))
    def run(f, *args):
        p = ctx.Process(target=f, args=args); p.start(); p.join()
        return p.exitcode
    yield run
    monkeypatch.undo()

def small_files(writer, folder, path):
    "In a child: write where no file may grow beyond 20,000 bytes; status 7 if that was an `OSError` that says so."
    torch.set_num_threads(1)
    m = made(folder, 2.)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try: WRITERS[writer](m, path)
    except OSError as e: os._exit(7 if 'File too large' in str(e) or path.stem in str(e) else 8)
    os._exit(0)

@pytest.mark.parametrize('writer', WRITERS)
def test_a_full_disk_leaves_the_old_one(writer, model, toy_folder, child, tmp_path):
    needs(writer)
    path = place(writer, tmp_path)
    WRITERS[writer](model, path)
    assert max(p.stat().st_size for p in tmp_path.rglob('*'))>20_000
    before = content(tmp_path)
    assert child(small_files, writer, toy_folder, path)==7
    assert content(tmp_path)==before
    path.rename(tmp_path/'aside')
    assert child(small_files, writer, toy_folder, path)==7 and {p.name for p in tmp_path.iterdir()}-BESIDE=={'aside'}

def killed(writer, folder, path, n):
    "In a child: write, and be killed at the n-th file operation."
    torch.set_num_threads(1)
    m = made(folder, 2.)
    test_resume.CountDown(n)
    WRITERS[writer](m, path)

@pytest.mark.parametrize('writer', [w for w in WRITERS if w!='save_switchable'])   # that one is killed in test_resume
def test_killed_while_an_older_one_is_replaced(writer, model, toy_folder, child, tmp_path):
    needs(writer)
    WRITERS[writer](model, place(writer, tmp_path)); old = said(tmp_path)
    WRITERS[writer](made(toy_folder, 2.), place(writer, tmp_path)); new = said(tmp_path)
    assert old!=new
    for n in range(60):
        folder = tmp_path/str(n); folder.mkdir()
        WRITERS[writer](model, place(writer, folder))
        code = child(killed, writer, toy_folder, place(writer, folder), n)
        assert code in (0, -signal.SIGKILL)
        found = {k:v for k,v in said(folder).items() if not k.startswith('.')}
        aside = any(k.endswith('.old') for k in content(folder))
        alone = writer=='export_gguf' and len(found)==1 and found.items()<=old.items()|new.items()   # adapters are to come
        assert found in (old, new) or alone or not found and aside, f'killed at operation {n}'
        WRITERS[writer](made(toy_folder, 2.), place(writer, folder))                 # and it can be replaced again
        assert said(folder)==new, 'something was left behind'
        if code==0: return
    raise AssertionError('more file operations than expected: raise the range')

def test_adapters_of_others_beside_a_merged_export_stay(model, tmp_path):
    needs('export_gguf')
    theirs = tmp_path/'model.lora.gguf'
    theirs.write_bytes(b'GGUF mine')
    export_gguf(model, 'bw8', tmp_path/'model.gguf', adapter='merged')
    assert theirs.read_bytes()==b'GGUF mine'
    with pytest.raises(FileExistsError, match='model.lora.gguf'): export_gguf(model, 'bw8', tmp_path/'model.gguf', overwrite=True)
    theirs.unlink()
    export_gguf(model, 'bw8', tmp_path/'model.gguf', overwrite=True)
    assert theirs.exists()
    export_gguf(model, 'bw8', tmp_path/'model.gguf', adapter='merged', overwrite=True)
    assert not theirs.exists()       # they were of codes that are gone
