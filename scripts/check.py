"""Everything that CI checks: `check.py [style] [export] [notebooks] [tests] [docs] [speed]`, by default all; or files, by path.

Each notebook and each file of tests is a task of its own, and one task runs on each core, the longest first. Where a
system can fork, a task begins in a copy of this process, which has imported all that takes time. The last line counts
notebooks and tests together; the style, the export, the pages and the speed count as one more each. The speed is measured
when all else is done, so that nothing stands in its way. The exit status is 0 only if
something ran and nothing failed."""
import faulthandler, hashlib, importlib, json, multiprocessing, os, re, resource, shutil, signal, subprocess, sys
import tempfile, time, traceback
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple
from xml.etree import ElementTree
from project import CFG, NBS, ROOT, cores, name_of, notebooks, offline_env, read_cells, skipped

DEADLINE = time.time() + 78*60   # for everything; what still runs then has hung
TASK_LIMIT = 30*60               # seconds for one task: many times what it needs, for a machine may be busy
METHOD = 'fork' if sys.platform=='linux' else 'spawn'
WARM = ('torch', 'transformers', 'transformers.models.auto.modeling_auto', 'datasets', 'accelerate', 'peft',
        'nbdev.test', 'pytest', 'switchable_llm.apps.packing', 'switchable_llm.apps.studying')
LONGEST = ('test_cli.py', 'test_explorer.py', 'apps/studying.ipynb')
WAITING = ('test_cluster.py', 'test_explorer.py', 'test_live.py', 'test_page.py', 'test_resume.py', 'test_serve_cluster.py',
           'test_writers.py')   # they wait, for a browser or for processes that they end, more than they compute
PICTURES = 'test_pictures.py'    # with the pages, which take minutes to build, where these are checked too

class Task(NamedTuple):
    "Work that runs in a process of its own."
    name:str
    work:Callable   # Called with the folder for the task's files, then `args`; returns a `Result`
    args:tuple = ()

class Result(NamedTuple):
    "What a task found."
    passed:int = 0
    failed:int = 0
    skipped:int = 0
    message:str = ''        # Shown with a failure, before what the task printed
    slow:tuple = ()         # Its slowest parts: seconds and name
    reasons:tuple = ()      # Why it skipped what it skipped
    cpu:float = 0.          # Seconds of processor time, children included

def verdict(bad): return Result(failed=1, message=bad) if bad else Result(passed=1)

# --- running tasks --------------------------------------------------------------------------------------------------

def in_child(task, folder):
    "Body of a task's process: everything that it prints goes to a file, its temporary files to its folder."
    os.setsid()
    log = os.open(folder/'log', os.O_CREAT|os.O_WRONLY)
    for fd,to in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)): os.dup2(to, fd)
    sys.stdout,sys.stderr = (open(fd, 'w', encoding='utf-8', closefd=False) for fd in (1, 2))
    os.environ['TMPDIR'] = tempfile.tempdir = str(folder)
    faulthandler.enable(log)   # a crash, or a task that hangs, says where
    faulthandler.dump_traceback_later(TASK_LIMIT, exit=True, file=log)
    try: result = task.work(folder, *task.args)
    except BaseException: result = verdict(traceback.format_exc())
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    used = sum(r.ru_utime+r.ru_stime for r in usage)
    (folder/'result').write_text(json.dumps(result._replace(cpu=used)), encoding='utf-8')
    sys.stdout.flush(); sys.stderr.flush()

class Running:
    "A task's process, with its folder."
    def __init__(self, task, folder):
        folder.mkdir()
        self.task,self.folder,self.start = task,folder,time.time()
        faulthandler.cancel_dump_traceback_later()   # a child would wait for this process's timer, which it has not
        self.process = multiprocessing.get_context(METHOD).Process(target=in_child, args=(task, folder))
        self.process.start()
    def done(self):
        "Whether it ended, or was ended because it hangs."
        if self.process.is_alive() and time.time()<min(DEADLINE, self.start+TASK_LIMIT+60): return False
        self.end()
        return True
    def end(self):
        "End it, and whatever it left running."
        try: os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        self.process.kill()
        self.process.join()
    def result(self):
        f = self.folder/'result'
        if f.exists(): return Result(*json.loads(f.read_text(encoding='utf-8')))
        took = f'{time.time()-self.start:.0f} s'
        return verdict(f'ended with status {self.process.exitcode} after {took} and no verdict')
    def log(self):
        f = self.folder/'log'
        return f.read_text(encoding='utf-8', errors='replace').strip() if f.exists() else ''

def show(running, r):
    "Print one task's result, and all that it said if it failed."
    parts = [f'{n} {k}' for k,n in r._asdict().items() if k in ('passed','failed','skipped') and n]
    print(f'{"FAILED" if r.failed else "ok":6} {running.task.name}: {", ".join(parts) or "nothing"}; '
          f'{time.time()-running.start:.0f} s, {r.cpu:.0f} s of processor time', flush=True)
    if not r.failed: return
    said = '\n'.join([r.message.strip(), running.log()]).strip()
    print('    '+said.replace('\n', '\n    '), flush=True)

def busy(running):
    "Cores that tasks take, about."
    return sum(.5 if r.task.name in WAITING else 1 for r in running)

def run_all(tasks, home):
    "Run tasks, as many at once as there are cores; their results."
    waiting,running,results = list(enumerate(tasks)),[],[]
    try:
        while waiting or running:
            while waiting and busy(running)<min(cores(), 8):
                i,task = waiting.pop(0)
                running.append(Running(task, home/str(i)))
            for r in [r for r in running if r.done()]:
                running.remove(r)
                results.append(r.result())
                show(r, results[-1])
                shutil.rmtree(r.folder, ignore_errors=True)
            time.sleep(.1)
    finally:   # interrupted
        for r in running: r.end()
    return results

def run(cmd, **kw):
    "Run a command; its exit status."
    return subprocess.run([str(c) for c in cmd], stderr=subprocess.STDOUT, **kw).returncode

def tool(name): return Path(sys.executable).with_name(name)

# --- what a linter sees ---------------------------------------------------------------------------------------------

def check_style(folder):
    "ruff over package, notebooks, scripts and tests; its settings are in pyproject.toml."
    return verdict(run([tool('ruff'), 'check', '--no-cache', ROOT]) and 'ruff has complaints')

# --- the export is fresh --------------------------------------------------------------------------------------------

def copy_tree(dest):
    "Copy what git tracks or would track, so that checks change nothing here."
    tracked = ['git', 'ls-files', '-co', '--exclude-standard', '-z']
    out = subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True)
    if out.returncode:   # no git here
        ignore = shutil.ignore_patterns('.venv', '.git', '_docs', '_proc', '__pycache__', '*.egg-info', 'runs')
        return shutil.copytree(ROOT, dest, ignore=ignore, dirs_exist_ok=True)
    for f in filter(None, out.stdout.split('\0')):
        if not (ROOT/f).is_file(): continue
        (dest/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/f, dest/f)
    return dest

def snapshot(path):
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in path.rglob('*') if p.is_file() and '__pycache__' not in p.parts}

def check_export(folder):
    "`nbdev_export` and `nbdev_clean` change nothing."
    copy = copy_tree(folder.resolve()/'copy')
    before = snapshot(copy)
    for name in ('nbdev_export', 'nbdev_clean'):
        if run([tool(name)], cwd=copy, env=os.environ|dict(PYTHONPATH=str(copy))): return verdict(f'{name} failed')
    after = snapshot(copy)
    stale = sorted(f for f in before|after if before.get(f)!=after.get(f))
    return verdict(stale and 'stale, run nbdev_export and nbdev_clean: '+', '.join(stale))

# --- the notebooks run ----------------------------------------------------------------------------------------------

def saved_outputs(path):
    "What is wrong with the saved outputs of a notebook, or nothing."
    code = [c for c in read_cells(path) if c['cell_type']=='code' and c['source'].strip()]
    if any(o['output_type']=='error' for c in code for o in c['outputs']): return 'a saved output is an error'
    runs = [c for c in code if not skipped(c['source'])]
    if runs and not any(c['outputs'] for c in runs): return 'no saved outputs: make notebooks'

def check_notebook(folder, path):
    "Run a notebook as nbdev does, in the folder of the notebooks."
    from nbdev.test import test_nb
    if any('skip_exec: true' in c['source'] for c in read_cells(path)[:2]):
        return Result(skipped=1, reasons=('skip_exec in the notebook',))
    os.chdir(path.parent)
    ok,_ = test_nb(path, skip_flags=CFG['tst_flags'].split(), basepath=ROOT)
    return verdict(saved_outputs(path) if ok else 'a cell failed')

# --- the tests pass -------------------------------------------------------------------------------------------------

def browser():
    "A browser on the path, or nothing."
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)

def needless(reason):
    "Whether a test was skipped for want of what is there, or should be: only a browser may be missing here."
    return 'installed' in reason and bool(browser() or not re.search('browser|chromium', reason, flags=re.I))

def check_tests(folder, path):
    "pytest over one file, counted from its own report."
    import pytest
    os.chdir(ROOT)
    rc = pytest.main([str(path), '-p', 'no:cacheprovider', '-rs', f'--junitxml={folder}/report.xml'])
    suites = list(ElementTree.parse(folder/'report.xml').iter('testsuite'))
    cases = [c for s in suites for c in s.iter('testcase')]
    reasons = [x.get('message') or '' for c in cases for x in c.iter('skipped')]
    n = {k: sum(int(s.get(k, 0)) for s in suites) for k in ('tests','failures','errors')}
    all_skipped = rc==5 and reasons   # 5: nothing ran
    bad = n['failures']+n['errors'] or int(rc!=0 and not all_skipped)
    wrong = [r for r in reasons if needless(r)]
    message = '\n'.join([f'pytest ended with {rc!r}', *(f'skipped, although nothing should be missing: {r}' for r in wrong)])
    slow = sorted(((float(c.get('time')), f"{path.name}: {c.get('name')}") for c in cases), reverse=True)
    passed,skips = n['tests']-n['failures']-n['errors']-len(reasons),len(reasons)-len(wrong)
    return Result(passed, bad+len(wrong), skips, message, slow[:10], reasons)

# --- the pages build ------------------------------------------------------------------------------------------------

def check_docs(folder):
    "nbdev's processing, links and a plain rendering of every page, as text and as pictures."
    copy = copy_tree(folder.resolve()/'copy')
    env = os.environ|dict(PYTHONPATH=str(copy))
    failed = run([sys.executable, copy/'scripts/build_docs.py', '--check', '--pages'], cwd=copy, env=env)
    if failed: return verdict('the pages have problems')
    os.environ['SITE'] = str(copy/'_docs')
    seen = check_tests(folder, ROOT/'tests'/PICTURES)
    return seen._replace(passed=seen.passed+1)

# --- kernels are as fast as they were ---------------------------------------------------------------------------------

def check_speed(folder):
    "Ratios to float32, against those that were recorded."
    return verdict(run([sys.executable, ROOT/'benchmarks/ratios.py', '--check']) and 'a kernel lost its speed')

# --- all ------------------------------------------------------------------------------------------------------------

def tasks_of(section):
    "The tasks of a part of the checks."
    if section=='style': return [Task('style', check_style)]
    if section=='export': return [Task('export', check_export)]
    if section=='speed': return [Task('speed', check_speed)]
    if section=='docs': return [Task(f'pages of {len(notebooks())} notebooks', check_docs)]
    sections = dict(notebooks=notebooks(), tests=sorted((ROOT/'tests').glob('test_*.py')))
    files = sections.get(section, [Path(section).resolve()])
    if not all(p.is_file() for p in files):
        sys.exit(f'{section}: needs some of style, export, notebooks, tests, docs, speed, files, or nothing')
    name = lambda p: name_of(p) if p.is_relative_to(NBS) else p.name
    return [Task(name(p), check_notebook if p.suffix=='.ipynb' else check_tests, (p,)) for p in files]

def without_twice(tasks):
    "Pictures are looked at with the pages, where these are checked."
    docs = any(t.work is check_docs for t in tasks)
    return [t for t in tasks if not (docs and t.name==PICTURES)]

def longest_first(task): return LONGEST.index(task.name) if task.name in LONGEST else len(LONGEST)

def warm_up():
    "Import what tasks import; one that cannot be imported fails in the tasks that want it, and says there why."
    if METHOD!='fork': return
    for m in WARM:
        try: importlib.import_module(m)
        except Exception as e: print(f'{m}: {e!r}', flush=True)

def main(sections):
    start,sections = time.time(),sections or ('style','export','docs','notebooks','tests','speed')
    tasks,last = ([t for s in sections if (s=='speed')==at_end for t in tasks_of(s)] for at_end in (False, True))
    os.environ.update(offline_env(OMP_NUM_THREADS='1', MPLBACKEND='agg'))
    sys.path.insert(0, str(ROOT))
    warm_up()
    with tempfile.TemporaryDirectory() as home:
        results = [*run_all(sorted(without_twice(tasks), key=longest_first), Path(home)), *run_all(last, Path(home))]
    slow = sorted((tuple(s) for r in results for s in r.slow), reverse=True)[:10]
    if slow: print('\nslowest tests:\n'+'\n'.join(f'{s:6.0f} s  {n}' for s,n in slow))
    passed,failed,skips = (sum(r[i] for r in results) for i in range(3))
    why = Counter(w for r in results for w in r.reasons)
    if why: print('\nskipped:\n'+'\n'.join(f'{n:6}  {w}' for w,n in why.most_common()))
    print(f'\n{time.time()-start:.0f} s in all, {sum(r.cpu for r in results):.0f} s of processor time')
    print(f'{passed} passed, {failed} failed' + (f', {skips} skipped' if skips else ''))
    sys.exit(bool(failed or not passed))

if __name__=='__main__': main(sys.argv[1:])
