"""Everything that CI checks: `check.py [export] [notebooks] [tests] [docs]`, by default all four.

The last line counts notebooks and tests together, the export and the pages as one more each; the exit status is 0 only if something ran and nothing failed."""
import hashlib, os, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
from xml.etree import ElementTree
from project import ROOT, notebooks, offline_env, read_cells, skipped

DEADLINE = time.time() + 75*60   # for everything
NOTEBOOK_LIMIT = 15*60           # for one notebook

# --- running and counting -------------------------------------------------------------------------------------------

counts = dict(passed=0, failed=0, skipped=0)

def record(name, status, seconds, message=''):
    "Count and print one result; a failure with its message, indented."
    counts[status] += 1
    print(f'{status.upper() if status=="failed" else status:8}{name}  {seconds:.0f} s', flush=True)
    if status=='failed': print('    '+message.strip().replace('\n','\n    '), flush=True)

def run(cmd, limit, cwd=ROOT, **env):
    "Run `cmd` with its children in a group of their own, ended after `limit` seconds; exit status and output."
    limit = max(1, min(limit, DEADLINE-time.time()))
    p = subprocess.Popen([str(c) for c in cmd], cwd=cwd, env=offline_env(MPLBACKEND='agg', **env), text=True, errors='replace',
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        out,_ = p.communicate(timeout=limit)
        return p.returncode, out
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, signal.SIGKILL)
        return 124, p.communicate()[0] + f'\nstopped after {limit:.0f} s'

def tool(name): return Path(sys.executable).with_name(name)

# --- the export is fresh --------------------------------------------------------------------------------------------

def copy_tree(dest):
    "Copy what git tracks or would track, so that checks change nothing here."
    out = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT, capture_output=True, text=True)
    if out.returncode:   # no git here
        ignore = shutil.ignore_patterns('.venv', '.git', '_docs', '_proc', '__pycache__', '*.egg-info', 'runs')
        return shutil.copytree(ROOT, dest, ignore=ignore, dirs_exist_ok=True)
    for f in filter(None, out.stdout.split('\0')):
        if not (ROOT/f).is_file(): continue
        (dest/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/f, dest/f)

def snapshot(path):
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in path.rglob('*') if p.is_file() and '__pycache__' not in p.parts}

def check_export(copy):
    "`nbdev_export` and `nbdev_clean` change nothing."
    t,before = time.time(),snapshot(copy)
    for name in ('nbdev_export', 'nbdev_clean'):
        rc,out = run([tool(name)], 300, cwd=copy, PYTHONPATH=str(copy))
        if rc: return record(name, 'failed', time.time()-t, out)
    after = snapshot(copy)
    stale = sorted(f for f in before|after if before.get(f)!=after.get(f))
    message = 'stale, run nbdev_export and nbdev_clean: ' + ', '.join(stale)
    record('export', 'failed' if stale else 'passed', time.time()-t, message)

# --- the notebooks run ----------------------------------------------------------------------------------------------

def saved_outputs(path):
    "What is wrong with the saved outputs of a notebook, or nothing."
    code = [c for c in read_cells(path) if c['cell_type']=='code' and c['source'].strip()]
    if any(o['output_type']=='error' for c in code for o in c['outputs']): return 'a saved output is an error'
    runs = [c for c in code if not skipped(c['source'])]
    if runs and not any(c['outputs'] for c in runs): return 'no saved outputs: make notebooks'

def check_notebook(path):
    t = time.time()
    if any('skip_exec: true' in c['source'] for c in read_cells(path)[:2]): return record(path.name, 'skipped', 0)
    rc,out = run([tool('nbdev_test'), '--path', path], NOTEBOOK_LIMIT)
    bad = saved_outputs(path)
    ok = not rc and 'Success.' in out and not bad    # nbdev_test exits with 0 when it found nothing to run
    record(path.name, 'passed' if ok else 'failed', time.time()-t, bad if bad and not rc else out.strip() or f'ended with status {rc} and no verdict')

# --- the tests pass -------------------------------------------------------------------------------------------------

def check_tests():
    "pytest over tests/, counted from its own report."
    t = time.time()
    with tempfile.TemporaryDirectory() as tmp:
        xml = Path(tmp)/'report.xml'
        rc,out = run([sys.executable, '-m', 'pytest', 'tests', '--durations=5', f'--junitxml={xml}'], 40*60)
        suites = list(ElementTree.parse(xml).iter('testsuite')) if xml.exists() else []
    n = {k: sum(int(s.get(k, 0)) for s in suites) for k in ('tests','failures','errors','skipped')}
    bad = n['failures']+n['errors']
    counts['failed'] += bad; counts['skipped'] += n['skipped']; counts['passed'] += n['tests']-bad-n['skipped']
    print(out.strip(), flush=True)
    if rc and not bad: record('pytest', 'failed', time.time()-t, f'exit status {rc}')
    elif not n['tests']: record('pytest', 'failed', time.time()-t, 'no test was run')

# --- the pages build ------------------------------------------------------------------------------------------------

def check_docs(copy):
    "nbdev's processing, links and a plain rendering of every page."
    t = time.time()
    rc,out = run([sys.executable, copy/'scripts/build_docs.py', '--check'], 900, cwd=copy, PYTHONPATH=str(copy))
    record(f'pages of {len(notebooks())} notebooks', 'failed' if rc else 'passed', time.time()-t, out)

# --- all ------------------------------------------------------------------------------------------------------------

def main(sections):
    def title(s):
        wanted = not sections or s in sections
        if wanted: print(f'\n== {s} ==', flush=True)
        return wanted
    start = time.time()
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp).resolve()/'copy'
        copy_tree(copy)
        if title('export'): check_export(copy)
        if title('notebooks'):
            for p in notebooks(): check_notebook(p)
            if not notebooks(): record('notebooks', 'failed', 0, 'there is no notebook in nbs/')
        if title('tests'): check_tests()
        if title('docs'): check_docs(copy)
    print(f'\n{time.time()-start:.0f} s in all')
    print(f"{counts['passed']} passed, {counts['failed']} failed" + (f", {counts['skipped']} skipped" if counts['skipped'] else ''))
    sys.exit(bool(counts['failed'] or not counts['passed']))

if __name__=='__main__': main(sys.argv[1:])
