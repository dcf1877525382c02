"""Install the package into this environment.

`install.py run|dev|bench` takes the exact versions of a lock, `install.py newest|lowest` those at the ends of the range
that pyproject.toml allows. With a lock, each package must have the hash that stands there. Then comes PyTorch as
requirements/torch.txt says, of the build for this machine; then the package itself, built with what is installed by
now. Nothing is resolved, so nothing can move."""
import json, subprocess, sys
from pathlib import Path
from lock import LOCKS, LOWEST, TORCH, UV, requirements
from project import ROOT

SOURCE_ONLY = 'rouge-score','sqlitedict','word2number'   # lm-eval needs them; nobody has built them
DRIVERS = (Path('/proc/driver/nvidia/version'), Path('/dev/nvidiactl'), Path('/dev/dxg'))   # the last one under WSL

def pip(*args, **kw):
    return subprocess.run([sys.executable, '-m', 'pip', *args], cwd=ROOT, check=True, text=True, **kw)

def install(*args): pip('install', '--quiet', *args)

def brings_cuda(report):
    "Whether pip would install CUDA packages, by its own report."
    return any(x['metadata']['name'].lower().startswith(('nvidia-', 'cuda-')) for x in report['install'])

def needs_cpu_build(which):
    "Whether pip's choice of PyTorch is a build for GPUs, gigabytes large, on a Linux machine without one."
    if sys.platform!='linux' or any(p.exists() for p in DRIVERS): return False
    asked = pip('install', '--quiet', '--dry-run', '--report', '-', *which, stdout=subprocess.PIPE)
    return brings_cuda(json.loads(asked.stdout))

def install_torch(
    *which:str, # What to ask for, as arguments of pip and uv
):
    "PyTorch for this machine. pip knows one address only; uv knows where PyTorch keeps its builds."
    if not needs_cpu_build(which): return install(*which)
    install('--no-deps', '--only-binary', ':all:', '--require-hashes', '--requirement', str(UV))
    cmd = [sys.executable, '-m', 'uv', 'pip', 'install', '--quiet', '--python', sys.executable]
    subprocess.run([*cmd, '--torch-backend', 'cpu', *which], cwd=ROOT, check=True)

def from_lock(lock):
    source = [a for n in SOURCE_ONLY for a in ('--no-binary', n)]
    install('--no-deps', '--only-binary', ':all:', *source, '--require-hashes', '--requirement', str(lock))
    install_torch('--requirement', str(TORCH))
    install('--no-deps', '--no-build-isolation', '--editable', '.')

def from_range(*constraints):
    torch, = (r for r in requirements() if r.startswith('torch>'))
    install_torch(torch, *constraints)
    install('--upgrade', '--editable', '.[dev]', *constraints)

def main(name='run'):
    locks = {p.stem:p for p in LOCKS.glob('*.lock')}
    if name in locks: from_lock(locks[name])
    elif name=='newest': from_range()
    elif name=='lowest': from_range('--constraint', str(LOWEST))
    else: sys.exit(f"{name}: needs one of {', '.join([*sorted(locks), 'newest', 'lowest'])}")

if __name__=='__main__': main(*sys.argv[1:])
