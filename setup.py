"Builds the optional compiled kernels; where that fails, the package installs without them and uses PyTorch's operators."
import os, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

class on_all_cores(build_ext):
    def build_extension(self, ext):
        one = self.compiler.compile
        def compile(sources, **kw):
            with ThreadPoolExecutor(os.cpu_count()) as pool: made = list(pool.map(lambda s: one([s], **kw), sources))
            return sum(made, [])
        self.compiler.compile = compile
        super().build_extension(ext)

flags = ['-O3', '-std=c++17', '-fno-math-errno', '-ffp-contract=off', '-fvisibility=hidden']
threads,link = ['-fopenmp'],['-fopenmp']
if sys.platform=='darwin':   # Apple's clang has OpenMP, but not its header; the threads themselves come with torch
    try: omp = subprocess.run(['brew', '--prefix', 'libomp'], capture_output=True, text=True).stdout.strip()
    except OSError: omp = ''
    if not os.path.exists(f'{omp}/include/omp.h'): omp = ''
    threads,link = (['-Xpreprocessor', '-fopenmp', f'-I{omp}/include'], ['-undefined', 'dynamic_lookup']) if omp else ([], [])
kernels = Extension(
    'switchable_llm._native', sorted(glob('csrc/*.cpp')), depends=sorted(glob('csrc/*.h')), language='c++',
    extra_compile_args=flags+threads, extra_link_args=link, optional=True)
setup(ext_modules=[kernels] if sys.platform in ('linux','darwin') else [], cmdclass=dict(build_ext=on_all_cores))
