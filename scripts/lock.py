"""Renew the committed locks: `make lock`. Nothing else changes a version that `make run`, `test` or `bench` installs.

`requirements/dev.lock` pins what the tests need, for every Python and system that the package supports, with hashes.
`run.lock` (for users) and `bench.lock` hold the same versions: what runs is what was tested. PyTorch is in none of
them (see requirements/torch.txt), nor are the CUDA packages that some of its builds need: pip takes those with PyTorch
itself. `lowest.txt` holds the lower ends of the ranges in pyproject.toml, `uv.txt` the installer that knows PyTorch's
builds."""
import re, subprocess, sys, tempfile, tomllib
from pathlib import Path
from project import ROOT

LOCKS = ROOT/'requirements'
TORCH = LOCKS/'torch.txt'
LOWEST = LOCKS/'lowest.txt'
UV = LOCKS/'uv.txt'
HEADER = "# Exact versions, written by scripts/lock.py: `make lock` renews them.\n"
WITH_TORCH = re.compile(r'(torch|triton|nvidia-[\w-]+|cuda-[\w-]+)==')   # what comes with PyTorch, or is PyTorch

def requirements(*extras):
    "What the package needs, as pyproject.toml says, with some of its extras."
    project = tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))['project']
    return project['dependencies'] + [r for x in extras for r in project['optional-dependencies'][x]]

def lowest():
    "The lower ends of the ranges, as constraints."
    return [re.sub(r'>=([\w.]+).*', r'==\1', r) for r in requirements('study', 'gguf', 'torchao')]

def resolve(
    extra:str,         # Optional dependencies of the package; '' for none
    within:list[Path], # Files of versions to keep
)->str: # Every package with its version, its marker and its hashes
    "Ask uv for one set of versions that holds on every supported Python and system."
    options = ['--universal', '--python-version', '3.11', '--generate-hashes', '--no-annotate', '--no-header',
               '--quiet']
    if extra: options += ['--extra', extra]
    for f in within: options += ['--constraint', str(f)]
    cmd = [sys.executable, '-m', 'uv', 'pip', 'compile', 'pyproject.toml', *options]
    return subprocess.run(cmd, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE).stdout

def tool(name):
    "One version of a tool, for every system, with its hashes."
    options = ['--universal', '--python-version', '3.11', '--generate-hashes', '--no-annotate', '--no-header', '--quiet']
    cmd = [sys.executable, '-m', 'uv', 'pip', 'compile', '-', *options]
    return subprocess.run(cmd, cwd=ROOT, check=True, text=True, input=name+'\n', stdout=subprocess.PIPE).stdout

def entries(text): return re.findall(r'^\S.*(?:\n[ \t].*)*\n', text, flags=re.M)

def without_torch(text):
    "The lock's text less PyTorch and its CUDA packages."
    return ''.join(e for e in entries(text) if not WITH_TORCH.match(e))

def as_constraints(text):
    "A lock's versions as another's constraints; not setuptools, which builds the package and is no part of it."
    lines = [e.splitlines()[0].removesuffix(' \\') for e in entries(text) if not e.startswith('setuptools==')]
    return '\n'.join(lines)

def main():
    dev = resolve('dev', [TORCH])
    with tempfile.TemporaryDirectory() as tmp:
        tested = Path(tmp)/'tested.txt'
        tested.write_text(as_constraints(dev), encoding='utf-8')
        found = dict(dev=dev, run=resolve('study', [tested]), bench=resolve('bench', [tested]))
    for name,text in found.items():
        (LOCKS/f'{name}.lock').write_text(HEADER+without_torch(text), encoding='utf-8')
        print(f'{name}.lock: {len(entries(without_torch(text)))} packages')
    UV.write_text(HEADER+tool('uv'), encoding='utf-8')
    LOWEST.write_text(HEADER+'\n'.join(lowest())+'\n', encoding='utf-8')
    resolve('dev', [LOWEST])   # an error, if the lower ends do not go together

if __name__=='__main__': main()
