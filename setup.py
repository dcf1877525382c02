"Builds the optional compiled kernels; where that fails, the package installs without them and uses PyTorch's operators."
import sys
from glob import glob
from setuptools import Extension, setup

flags = ['-O3', '-std=c++17', '-fopenmp', '-fno-math-errno', '-ffp-contract=off', '-fvisibility=hidden']
kernels = Extension(
    'switchable_llm._native', sorted(glob('csrc/*.cpp')), depends=sorted(glob('csrc/*.h')), language='c++',
    extra_compile_args=flags, extra_link_args=['-fopenmp'], optional=True)
setup(ext_modules=[kernels] if sys.platform=='linux' else [])
