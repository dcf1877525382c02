"The checks themselves: what fails is seen, counted and told; what hangs or dies is no success."
import os, signal, subprocess, sys, time
from pathlib import Path
import pytest
from conftest import ROOT, heed_ctrl_c
sys.path.insert(0, str(ROOT/'scripts'))
import check
from check import Result, Task

needs_fork = pytest.mark.skipif(check.METHOD!='fork', reason='tasks are functions of this file')

def ran(folder, *tasks): return check.run_all(list(tasks), folder)

def fine(folder): return Result(passed=2)
def loud(folder): print('what it said', flush=True); return Result(failed=1, message='why')
def broken(folder): raise KeyError('missing piece')
def dying(folder): print('last words', flush=True); os.abort()
def hanging(folder): subprocess.Popen(['sleep', '300']); time.sleep(300)
def leaving(folder):
    (folder/'left').write_text(str(subprocess.Popen(['sleep', '300']).pid))
    return Result(passed=1, message=(folder/'left').read_text())

@needs_fork
def test_each_kind_of_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, 'cores', lambda: 2)
    results = ran(tmp_path, *(Task(f.__name__, f) for f in (fine, loud, broken, dying)))
    out = capsys.readouterr().out
    assert sum(r.passed for r in results)==2 and sum(r.failed for r in results)==3
    for words in ('ok     fine: 2 passed', 'FAILED loud: 1 failed', 'what it said', "KeyError: 'missing piece'",
                  'ended with status -6', 'last words', 'in dying'): assert words in out

@needs_fork
def test_what_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(check, 'DEADLINE', time.time()+.5)
    r, = ran(tmp_path, Task('hanging', hanging))
    assert r.failed==1 and 'no verdict' in r.message

@needs_fork
def test_what_a_task_left_running_is_ended(tmp_path):
    r, = ran(tmp_path, Task('leaving', leaving))
    deadline = time.time()+60
    while alive(int(r.message)): assert time.time()<deadline; time.sleep(.05)

def alive(pid):
    "Whether a process runs; one that ended and that nobody has asked after does not."
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0]!='Z'
    except FileNotFoundError: return False

TESTS = """
import pytest
def test_a(): pass
def test_b(): assert 0, 'broken on purpose'
@pytest.mark.skip(reason='not on Tuesdays')
def test_c(): pass
@pytest.mark.skip(reason='the extra `x` is not installed')
def test_d(): pass
@pytest.mark.skip(reason='no browser is installed: apt-get install chromium')
def test_e(): pass
"""

@needs_fork
@pytest.mark.parametrize('found', [None, '/usr/bin/chromium'])
def test_a_file_of_tests_is_counted(found, tmp_path, monkeypatch):
    "A skip for want of what should be there is a failure; for want of a browser, only where there is one."
    (tmp_path/'test_mine.py').write_text(TESTS)
    monkeypatch.setattr(check, 'browser', lambda: found)
    (tmp_path/'home').mkdir()
    r, = ran(tmp_path/'home', Task('t', check.check_tests, (tmp_path/'test_mine.py',)))
    assert (r.passed, r.failed, r.skipped)==(1, 2+bool(found), 2-bool(found)) and 'the extra `x`' in r.message

def test_an_unknown_part_is_an_error():
    with pytest.raises(SystemExit, match='needs some of'): check.tasks_of('everything')

def test_a_file_without_a_test_is_a_failure(tmp_path):
    (tmp_path/'test_mine.py').write_text('def tets_a(): pass')
    assert check.check_tests(tmp_path, tmp_path/'test_mine.py').failed==1

INTERRUPTED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {scripts!r})
import check
def slow(folder): time.sleep(300)
check.run_all([check.Task('slow', slow)], Path({home!r}))
"""

@needs_fork
def test_an_interrupt_ends_it_and_all_that_it_runs(tmp_path):
    code = INTERRUPTED.format(scripts=str(ROOT/'scripts'), home=str(tmp_path))
    p = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.DEVNULL, preexec_fn=heed_ctrl_c)
    while not (tmp_path/'0/log').exists(): assert p.poll() is None; time.sleep(.05)
    p.send_signal(signal.SIGINT)
    assert p.wait(timeout=60)!=0
