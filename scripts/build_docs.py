"""Build the documentation site into `_docs`, with Quarto if it is installed, else as plain pages; and the live page in it,
for which the embedded model is trained: a minute or two.

`--plain` always makes plain pages; `--pages` too, with a live page that has no model. `--check` reports what is wrong with the
pages instead (dead links, raw references, figures without a caption, names without documentation, an old README) and writes
nothing outside `_proc`; `--check --pages` does both. `--readme` writes README.md and its figures from nbs/index.ipynb. All first
run nbdev's own processing."""
import shutil, subprocess, sys
from docsite import checks, live, readme, site
from docsite.pages import make_page
from docsite.process import PROC, process, read_pages
from project import ROOT

DOCS = ROOT/'_docs'

def check(write=False):
    process()
    notebooks = read_pages()
    pages = [make_page(n, nb) for n,nb in notebooks.items()]
    if write: write_pages(pages)
    for p in pages: print(f'{p.notebook} -> {p.name}: {len(str(p.body))//1024} KB, {len(p.files)} figures')
    bad = [*checks.problems(pages, notebooks), *readme.stale(notebooks['index.ipynb'])]
    print('\n'.join(bad))
    sys.exit(f'{len(bad)} problems' if bad else 0)

def write_readme():
    process()
    files = readme.make(read_pages()['index.ipynb'])
    shutil.rmtree(ROOT/readme.FOLDER, ignore_errors=True)
    for p,b in files.items():
        (ROOT/p).parent.mkdir(exist_ok=True)
        (ROOT/p).write_bytes(b)

def write_pages(pages):
    shutil.rmtree(DOCS, ignore_errors=True)
    site.write(pages, DOCS)
    shutil.copytree(live.FOLDER, DOCS/live.NAME)   # its pictures are on other pages too

def build(plain=False):
    process()
    if shutil.which('quarto') and not plain:
        shutil.rmtree(DOCS, ignore_errors=True)
        subprocess.run(['quarto', 'render', '--no-cache'], cwd=PROC, check=True)
        shutil.move(PROC/'_docs', DOCS)
    else:
        if not plain: print('Quarto is not installed (https://quarto.org): writing plain pages')
        write_pages([make_page(n, nb) for n,nb in read_pages().items()])
    shutil.rmtree(DOCS/live.NAME, ignore_errors=True)   # Quarto copies what pages link to
    print('training the adapters of the live page')
    live.write(DOCS/live.NAME)
    print(f'the site is in {DOCS.name}/: open {DOCS.name}/index.html')

def build_pages():
    process()
    write_pages([make_page(n, nb) for n,nb in read_pages().items()])

if __name__=='__main__':
    commands = {'': build, '--plain': lambda: build(plain=True), '--pages': build_pages, '--check': check,
                '--check --pages': lambda: check(write=True), '--readme': write_readme, '--help': lambda: print(__doc__)}
    arg = ' '.join(sys.argv[1:])
    if arg not in commands: sys.exit(f"{arg}: needs one of {', '.join(filter(None, commands))}, or nothing")
    commands[arg]()
