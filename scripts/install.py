"""Install the package into this environment with the exact versions of a lock: `install.py run|dev|bench`.

Each package must have the hash that the lock names; then PyTorch as requirements/torch.txt says, of the build for this
machine; then the package itself, built with what is installed by now. Nothing is resolved, so that nothing can move."""
import json, subprocess, sys
from pathlib import Path
from lock import LOCKS, TORCH
from project import ROOT

DRIVERS = (Path('/proc/driver/nvidia/version'), Path('/dev/nvidiactl'), Path('/dev/dxg'))   # the last one under WSL

def pip(*args, **kw): return subprocess.run([sys.executable, '-m', 'pip', *args], cwd=ROOT, check=True, text=True, **kw)

def install(*args): pip('install', '--quiet', '--no-deps', *args)

def brings_cuda(report):
    "Whether pip would install CUDA packages, by its own report."
    return any(x['metadata']['name'].lower().startswith(('nvidia-', 'cuda-')) for x in report['install'])

def needs_cpu_build():
    "Whether pip's choice of PyTorch is a build for GPUs, gigabytes large, on a Linux machine without one."
    if sys.platform!='linux' or any(p.exists() for p in DRIVERS): return False
    asked = pip('install', '--quiet', '--dry-run', '--report', '-', '-r', str(TORCH), stdout=subprocess.PIPE)
    return brings_cuda(json.loads(asked.stdout))

def install_torch():
    "PyTorch for this machine. pip knows one address only; uv knows where PyTorch keeps its builds."
    if not needs_cpu_build(): return pip('install', '--quiet', '-r', str(TORCH))
    pip('install', '--quiet', 'uv')
    cmd = [sys.executable, '-m', 'uv', 'pip', 'install', '--quiet', '--python', sys.executable, '--torch-backend', 'cpu']
    subprocess.run([*cmd, '-r', str(TORCH)], cwd=ROOT, check=True)

def main(name):
    lock = LOCKS/f'{name}.lock'
    if not lock.exists(): sys.exit(f"{name}: needs one of {', '.join(sorted(p.stem for p in LOCKS.glob('*.lock')))}")
    install('--only-binary', ':all:', '--require-hashes', '-r', str(lock))
    install_torch()
    install('--no-build-isolation', '--editable', '.')

if __name__=='__main__': main(*sys.argv[1:] or ['run'])
