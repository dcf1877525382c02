"Who wrote what: leftovers of killed writers are told from hidden files of a person, and from what a living writer works on."
import os, shutil, socket, stat, subprocess, sys, threading, time
import pytest
from switchable_llm.system import files
from switchable_llm.system.files import check_target, whole_folder, write_whole, writing_folder

def is_model(folder): return (folder/'model.txt').is_file()

def save(folder, text, meanwhile=lambda: None):
    with writing_folder(folder, 'a model', is_model) as tmp:
        (tmp/'model.txt').write_text(text)
        meanwhile()

def text(folder): return (whole_folder(folder)/'model.txt').read_text()

def folder_with(path, text, name='model.txt'):
    path.mkdir(parents=True)
    (path/name).write_text(text)
    return path

def names(folder): return sorted(p.name for p in folder.iterdir())

@pytest.fixture(scope='module')
def gone():
    "The number of a process that has ended."
    p = subprocess.Popen([sys.executable, '-c', '']); p.wait()
    return p.pid

def begun(path, kind, pid, place=None, token='abcdef'):
    "The name under which a process would write `path`."
    own = files._temporary(path, kind).name.split('-')[-1].removesuffix(f'.{kind}')
    return path.with_name(f'.{path.name}.{pid}-{token}-{place or own}.{kind}')

# --- hidden files of a person ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['.model.2020.old', '.model.1-2-3.old', '.model.old', '.model.4194304-abcdef-vm.old',
                                  '.model.2020.new', '.model.4194304-ABCDEF-0123456789ab.old'])
def test_a_hidden_backup_is_no_leftover(tmp_path, name):
    backup = folder_with(tmp_path/name, 'mine')
    assert whole_folder(tmp_path/'model')==tmp_path/'model'
    for i in '12': save(tmp_path/'model', i)
    assert text(tmp_path/'model')=='2' and text(backup)=='mine' and names(tmp_path)==sorted([name, 'model'])

def test_a_foreign_hidden_folder_stays_where_it_is(tmp_path):
    foreign = folder_with(tmp_path/'.model3.2020.old', 'mine', 'notes.txt')
    save(tmp_path/'model3', 'new')
    assert (foreign/'notes.txt').read_text()=='mine' and text(tmp_path/'model3')=='new'

@pytest.mark.parametrize('name', ['.n.txt.2020.tmp', '.n.txt.tmp', '.n.txt.1-a-b.tmp'])
def test_a_hidden_file_is_no_leftover(tmp_path, name):
    (tmp_path/name).write_text('mine')
    write_whole(tmp_path/'n.txt', b'1')
    assert (tmp_path/name).read_text()=='mine'

# --- killed between the renames, or later ---------------------------------------------------------------------------

def aside(path, pid, text='old', name='model.txt'):
    "As a writer leaves it that is killed between its two renames."
    folder_with(begun(path, 'new', pid), 'new')
    return folder_with(begun(path, 'old', pid), text, name)

def test_what_stands_aside_comes_back(tmp_path, gone):
    aside(tmp_path/'model', gone)
    assert text(tmp_path/'model')=='old'
    def look(): assert text(tmp_path/'model')=='old' and (tmp_path/'model').exists()
    save(tmp_path/'model', 'newer', look)
    assert text(tmp_path/'model')=='newer' and names(tmp_path)==['model']

def test_what_is_being_deleted_never_comes_back(tmp_path, gone):
    "The writer was killed while it deleted the older one; then the new one was moved away."
    folder_with(begun(tmp_path/'model', 'old', gone), 'half')
    assert whole_folder(tmp_path/'model')==tmp_path/'model'
    def look(): assert not (tmp_path/'model').exists()
    save(tmp_path/'model', 'new', look)
    assert text(tmp_path/'model')=='new' and names(tmp_path)==['model']

@pytest.mark.parametrize('there', [False, True])
def test_what_another_kind_of_writer_left_aside_stays(tmp_path, gone, there):
    foreign = aside(tmp_path/'model', gone, 'theirs', 'adapter.txt')
    if there: folder_with(tmp_path/'model', 'first')
    for i in '12': save(tmp_path/'model', i)
    assert (foreign/'adapter.txt').read_text()=='theirs' and text(tmp_path/'model')=='2'

def test_a_living_writer_between_its_renames(tmp_path, monkeypatch):
    "A second writer leaves the older folder to the first; both succeed, and the last one's folder stands."
    save(tmp_path/'model', 'old')
    replace,seen = os.replace,[]
    def slow(a, b):
        replace(a, b)
        if str(b).endswith('.old') and not seen:
            seen.append(text(tmp_path/'model'))
            save(tmp_path/'model', 'second')
            seen.append(text(tmp_path/'model'))
    monkeypatch.setattr(os, 'replace', slow)
    save(tmp_path/'model', 'first')
    assert seen==['old','second'] and text(tmp_path/'model')=='first' and names(tmp_path)==['model']

def test_what_is_put_there_between_the_renames_stays(tmp_path, monkeypatch):
    save(tmp_path/'model', 'old')
    replace = os.replace
    def slow(a, b):
        replace(a, b)
        if str(b).endswith('.old'): folder_with(tmp_path/'model', 'mine', 'notes.txt')
    monkeypatch.setattr(os, 'replace', slow)
    with pytest.raises(FileExistsError, match='holds notes.txt and is not a model'): save(tmp_path/'model', 'first')
    assert (tmp_path/'model/notes.txt').read_text()=='mine'

def test_interrupted_between_the_renames(tmp_path, monkeypatch):
    save(tmp_path/'model', 'old')
    replace = os.replace
    def interrupted(a, b):
        replace(a, b)
        if str(b).endswith('.old'): raise KeyboardInterrupt
    monkeypatch.setattr(os, 'replace', interrupted)
    with pytest.raises(KeyboardInterrupt): save(tmp_path/'model', 'first')
    assert text(tmp_path/'model')=='old' and names(tmp_path)==['model']

def test_many_writers_of_one_folder(tmp_path):
    "Each ends well, and one of them is what stands there."
    faults = []
    def write(i):
        try:
            for _ in range(20): save(tmp_path/'model', str(i))
        except OSError as e: faults.append(e)
    threads = [threading.Thread(target=write, args=(i,)) for i in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not [e for e in faults if 'again and again' not in str(e)]
    assert text(tmp_path/'model') in '012' and names(tmp_path)==['model']

# --- names ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['x'*200, 'ä'*100])
def test_the_longest_name_that_is_allowed_can_be_written(tmp_path, monkeypatch, name):
    monkeypatch.setattr(socket, 'gethostname', lambda: 'h'*64)
    write_whole(check_target(tmp_path/name, 'a file'), b'1')
    (tmp_path/name).unlink()
    save(tmp_path/name, '1'); save(tmp_path/name, '2')
    assert text(tmp_path/name)=='2'
    with pytest.raises(OSError, match='longer than 200 bytes'): check_target(tmp_path/('x'+name), 'a file')

# --- other machines and containers ----------------------------------------------------------------------------------

def test_a_writer_in_another_container_is_left_alone_for_a_day(tmp_path, gone, monkeypatch):
    "Its process number says nothing here, though the name of the host may be the same."
    file = begun(tmp_path/'n.txt', 'tmp', gone, '0123456789ab'); file.touch()
    folder = folder_with(begun(tmp_path/'model', 'new', gone, '0123456789ab'), 'half')
    for f in (file, folder/'model.txt', folder): os.utime(f, (0, 0))       # it may write an old date
    def write():
        write_whole(tmp_path/'n.txt', b'1')
        save(tmp_path/'model', '1')
        return file.exists(), folder.exists()
    assert write()==(True, True)
    now = time.time()
    monkeypatch.setattr(time, 'time', lambda: now+2*86_400)
    assert write()==(False, False)

@pytest.mark.skipif(not os.path.exists('/proc/self/ns/pid'), reason='this system has no containers')
def test_the_mark_knows_a_container(tmp_path, monkeypatch):
    before,read = files._place(),os.readlink
    monkeypatch.setattr(os, 'readlink', lambda p: 'pid:[1]' if str(p)=='/proc/self/ns/pid' else read(p))
    assert files._place()!=before

# --- permissions ----------------------------------------------------------------------------------------------------

def mode(path): return stat.S_IMODE(path.stat().st_mode)

@pytest.mark.parametrize('bits', [0o600, 0o640, 0o644, 0o664, 0o400])
def test_a_file_keeps_its_permissions(tmp_path, bits):
    path = write_whole(tmp_path/'n.txt', b'1'); path.chmod(bits)
    seen = []
    def write(tmp):
        seen.append(mode(tmp))
        tmp.unlink(); tmp.write_bytes(b'2')      # as safetensors does
    write_whole(path, write)
    assert (mode(path), path.read_bytes())==(bits, b'2') and seen==[bits|0o600]

def test_a_folder_keeps_its_permissions(tmp_path):
    save(tmp_path/'model', '1')
    new = mode(tmp_path/'model'), mode(tmp_path/'model/model.txt')
    (tmp_path/'model').chmod(0o700); (tmp_path/'model/model.txt').chmod(0o600)
    save(tmp_path/'model', '2')
    assert (mode(tmp_path/'model'), mode(tmp_path/'model/model.txt'), text(tmp_path/'model'))==(0o700, 0o600, '2')
    seen = []
    def look(): seen.extend(mode(p) & 0o077 for p in tmp_path.glob('.*.new'))
    shutil.rmtree(tmp_path/'model'); save(tmp_path/'model', '3', look)
    assert (mode(tmp_path/'model'), mode(tmp_path/'model/model.txt'))==new and seen==[0]
