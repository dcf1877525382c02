"Every level of instructions gives the same bits: layers, prompts, single tokens, caches."
import os, shutil, subprocess
from pathlib import Path
import pytest
from switchable_llm.system.native import library

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.skipif(library() is None, reason='the compiled kernels are not built'),
              pytest.mark.skipif(shutil.which('g++') is None, reason='needs a compiler')]

def run(program, level):
    env = os.environ|dict(SWITCHABLE_LLM_MAX_ISA=level, OMP_NUM_THREADS='2')
    made = subprocess.run([program, library()._name], env=env, capture_output=True, text=True, timeout=300, check=True)
    return made.stderr.strip(), made.stdout.splitlines()

@pytest.fixture(scope='module')
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp('levels')/'same_bits'
    subprocess.run(['g++','-O1','-std=c++17',ROOT/'tests/native/same_bits.cpp','-o',out,'-ldl'], check=True, timeout=300)
    return out

@pytest.fixture(scope='module')
def best(program): return run(program, '')

def test_the_best_level_computes_everything(best):
    level,lines = best
    if level=='none': pytest.skip('this processor has no level')
    assert len(lines)==836 and all(': 0 ' in l for l in lines)
    assert len({l.split()[-1] for l in lines})==836   # no two results alike: nothing is left unwritten

@pytest.mark.parametrize('level', ['AVX2','AVX_VNNI','AVX512','DOT','I8MM'])
def test_levels_give_the_same_bits(program, best, level):
    had,lines = run(program, level)
    if had!=level: pytest.skip(f'this processor has no {level}')
    assert lines==best[1]

def test_no_level_is_a_fault_and_no_crash(program):
    level,lines = run(program, 'none')
    assert level=='none' and all(': 1 ' in l for l in lines if 'x' in l)

@pytest.mark.skipif(not (shutil.which('aarch64-linux-gnu-g++') and shutil.which('qemu-aarch64')),
                    reason='needs g++-aarch64-linux-gnu and qemu-user')
def test_arm_gives_the_same_bits(best, tmp_path):
    subprocess.run([ROOT/'scripts/arm.sh', tmp_path], check=True, timeout=600)
    for cpu in ('neoverse-n1','max'): assert (tmp_path/f'{cpu}.txt').read_text().splitlines()==best[1]
