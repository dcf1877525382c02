"""Execute notebooks and save their outputs in place: `execute_notebooks.py [NAME ...]`, by default all, in order.

Cells that tests skip (`#| slow`, `#| gpu`, `#| eval: false`) are not run and keep the outputs they have. What a cell
writes to stderr (progress bars, warnings with paths of this machine) is shown here and not saved. A notebook that fails
is left as it was."""
import os, subprocess, sys, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from project import NBS, ROOT, notebooks, offline_env, skipped

CELL_TIMEOUT = 900   # seconds

class Client(NotebookClient):
    "Runs the cells that tests run."
    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type!='code' or skipped(cell.source): return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)

def drop_stderr(nb):
    "Take stderr out of the saved outputs and show it here."
    for c in nb.cells:
        for o in [o for o in c.get('outputs', []) if o.get('name')=='stderr']:
            print(o.text.strip(), file=sys.stderr)
            c.outputs.remove(o)

def execute(path):
    "Run one notebook in `nbs/`, then save it whole, cleaned as `nbdev_clean` does."
    nb = nbformat.read(path, as_version=4)
    Client(nb, timeout=CELL_TIMEOUT, kernel_name='python3', resources={'metadata': {'path': str(NBS)}},
           extra_arguments=['--log-level=ERROR']).execute()
    drop_stderr(nb)
    tmp = path.with_name(f'.{path.stem}.tmp.ipynb')
    try:
        nbformat.write(nb, tmp)
        subprocess.run([Path(sys.executable).with_name('nbdev_clean'), '--fname', tmp], cwd=ROOT, check=True)
        os.replace(tmp, path)
    finally: tmp.unlink(missing_ok=True)

def main(names):
    os.environ.update(offline_env())
    paths = [NBS/f'{Path(n).stem}.ipynb' for n in names] or notebooks()
    failed = []
    for p in paths:
        t = time.time()
        try: execute(p)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
            failed.append(p.name)
            print(e, file=sys.stderr)
        print(f'{"FAIL" if p.name in failed else "ok":4} {p.name} {time.time()-t:.0f} s', flush=True)
    sys.exit(f'not saved: {", ".join(failed)}' if failed else 0)

if __name__=='__main__': main(sys.argv[1:])
