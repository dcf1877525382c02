"""Execute notebooks and save their outputs in place: `execute_notebooks.py [NAME ...]`, by default all, in order.

A name is `core/switching`. Cells that tests skip (`#| slow`, `#| gpu`, `#| eval: false`) are not run and keep the
outputs they have. What a cell writes to stderr (progress bars, warnings with paths of this machine) is shown here and
not saved, nor are widgets, which are empty boxes on a page. Figures are saved as SVG, with the same bytes each time; a
large one as PNG. A notebook that fails is left as it was."""
import os, re, subprocess, sys, tempfile, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from project import ROOT, name_of, notebooks, offline_env, skipped

CELL_TIMEOUT = 900      # seconds
LARGEST_SVG = 90_000    # bytes
# A figure is laid out in the first of these fonts; a reader's machine has one of them.
FONTS = ['DejaVu Sans', 'Verdana', 'Arial', 'Helvetica', 'sans-serif']

# How kernels draw: both formats, of which one is kept; text as text; identifiers and metadata without randomness or
# date; on no background and in a grey that can be read on a light page and on a dark one.
IPYTHON_CONFIG = """
c.InlineBackend.figure_formats = {'svg', 'retina'}
c.InlineBackend.print_figure_kwargs = dict(bbox_inches='tight', metadata=dict(Date=None, Creator=None))
"""
INK = ('text.color', 'axes.labelcolor', 'axes.titlecolor', 'axes.edgecolor', 'xtick.color', 'ytick.color',
       'legend.edgecolor')
MATPLOTLIB_CONFIG = '\n'.join(f'{k}: 7f7f7f' for k in INK) + f"""
figure.facecolor: none
axes.facecolor: none
savefig.facecolor: none
legend.framealpha: 0
svg.fonttype: none
svg.hashsalt: switchable_llm
font.family: sans-serif
font.sans-serif: {', '.join(FONTS)}
"""

def kernel_env(folder):
    "Environment in which kernels have these settings, and none of this machine's user."
    config,style = Path(folder)/'profile_default'/'ipython_kernel_config.py',Path(folder)/'matplotlibrc'
    config.parent.mkdir(parents=True)
    config.write_text(IPYTHON_CONFIG, encoding='utf-8')
    style.write_text(MATPLOTLIB_CONFIG, encoding='utf-8')
    return offline_env(IPYTHONDIR=str(folder), MATPLOTLIBRC=str(style))

class Client(NotebookClient):
    "Runs the cells that tests run."
    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if cell.cell_type!='code' or skipped(cell.source): return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)

def is_widget(output): return any('widget-view' in mime for mime in output.get('data', {}))

def drop_unsaved(nb):
    "Take stderr, shown here instead, and widgets out of the saved outputs."
    for c in nb.cells:
        for o in [o for o in c.get('outputs', []) if o.get('name')=='stderr' or is_widget(o)]:
            if not is_widget(o): print(o.text.strip(), file=sys.stderr)
            c.outputs.remove(o)
    nb.metadata.pop('widgets', None)

def plain_svg(svg):
    "A figure without metadata, to a hundredth of a point, and styles as attributes: GitHub leaves out what a `style` says."
    def attributes(m):
        pairs = (part.partition(':') for part in m[1].split(';') if part.strip())
        return ' '.join(f'{k.strip()}="{v.strip()}"' for k,_,v in pairs)
    def short(m): return re.sub(r'\d+\.\d{3,}', lambda n: f'{float(n[0]):.2f}', ' '.join(m[0].split()))
    svg = re.sub(r'\s*<metadata>.*?</metadata>', '', svg, flags=re.S)
    svg = re.sub(r'\bstyle="([^"]*)"', attributes, svg)
    svg = re.sub(r'\b(?:d|points|transform|x|y|width|height|viewBox)="[^"]*"', short, svg)
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', '', svg)   # matplotlib's counters, to which nothing refers
    svg,n = re.subn(r'<defs>\s*<style[^>]*>\*\{[^}]*\}</style>\s*</defs>', '', svg)   # a rule for all would beat attributes
    if n: svg = svg.replace('<svg', '<svg stroke-linejoin="round" stroke-linecap="butt"', 1)
    fonts = re.findall(r' font-family="[^"]*"', svg)
    if len(set(fonts))==1: svg = svg.replace(fonts[0], '').replace('<svg', f'<svg{fonts[0]}', 1)
    return re.sub(r'>\n\s*<', '><', svg)

def one_format(nb):
    "Of each figure keep the SVG, or the PNG where the SVG is large."
    for o in (o for c in nb.cells for o in c.get('outputs', []) if 'image/svg+xml' in o.get('data', {})):
        o.data['image/svg+xml'] = plain_svg(o.data['image/svg+xml'])
        large = len(o.data['image/svg+xml'].encode())>LARGEST_SVG and 'image/png' in o.data
        gone = 'image/svg+xml' if large else 'image/png'
        o.data.pop(gone, None); o.metadata.pop(gone, None)

def execute(path):
    "Run one notebook in its folder, then save it whole, cleaned as `nbdev_clean` does."
    nb = nbformat.read(path, as_version=4)
    Client(nb, timeout=CELL_TIMEOUT, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}},
           extra_arguments=['--log-level=ERROR']).execute()
    drop_unsaved(nb); one_format(nb)
    tmp = path.with_name(f'.{path.stem}.tmp.ipynb')
    try:
        nbformat.write(nb, tmp)
        subprocess.run([Path(sys.executable).with_name('nbdev_clean'), '--fname', tmp], cwd=ROOT, check=True)
        os.replace(tmp, path)
    finally: tmp.unlink(missing_ok=True)

def main(names):
    home = tempfile.TemporaryDirectory()
    os.environ.update(kernel_env(home.name))
    there = {name_of(p).removesuffix('.ipynb'): p for p in notebooks()}
    unknown = [n for n in names if n not in there]
    if unknown: sys.exit(f"{', '.join(unknown)}: choose from {', '.join(there)}")
    paths = [there[n] for n in names] or [*there.values()]
    failed = []
    for p in paths:
        t = time.time()
        try: execute(p)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
            failed.append(name_of(p))
            print(e, file=sys.stderr)
        print(f'{"FAIL" if name_of(p) in failed else "ok":4} {name_of(p)} {time.time()-t:.0f} s', flush=True)
    sys.exit(f'not saved: {", ".join(failed)}' if failed else 0)

if __name__=='__main__': main(sys.argv[1:])
