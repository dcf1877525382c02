"""How many times as fast the compiled kernels are as PyTorch's float32, at each level of instructions.

    python benchmarks/ratios.py --out results/benchmarks    # a record: which ratios this processor had
    python benchmarks/ratios.py --check                     # fails where a kernel lost its speed

One thread; each turn measures both, and the median over turns of their ratio counts. `--check` fails below two thirds
of what was recorded on a processor of the same name, family and model, and elsewhere below a quarter of the least that was
recorded on any. What fails is measured again, twice: a neighbour on the machine may have been in the way.
"""
import argparse, json, os, statistics, subprocess, sys, time
from pathlib import Path
import torch
from common import instructions, machine, processor, write, table
from switchable_llm.core.integer import pick_kernel, int_linear, signed_codes
from switchable_llm.quantizers import QuantConfig
from switchable_llm.serving.kernels import ActQuant, LinearPlan, group_steps, pack_planes, plan_report
from switchable_llm.system.native import native_level

RECORDS = Path(__file__).parent.parent/'results/benchmarks'
LEVELS = 'AVX2','AVX_VNNI','AVX512','AMX','DOT','I8MM'

def products():
    "name -> (ours, the same in float32)."
    gen = torch.Generator().manual_seed(0)
    n,k = 1536,1024
    planes,steps = pack_planes(torch.randint(240, (n, k), generator=gen, dtype=torch.uint8)),torch.rand(n, generator=gen)/100
    groups,w = group_steps(torch.rand(n, k//32, generator=gen).half().float()/100, 32),torch.randn(n, k, generator=gen)
    out = {}
    for tokens in (1, 64):
        x = torch.randn(tokens, k, generator=gen)
        for name,bits,act,scale in (('w8a8', 8, 8, steps), ('w4a8', 4, 8, steps), ('w8', 8, None, steps),
                                    ('w4', 4, None, steps), ('w4a8 in groups', 4, 8, groups)):
            plan = LinearPlan(planes, bits, scale, act=None if act is None else ActQuant(act, False))
            if not plan_report(plan, tokens).startswith('native'): raise SystemExit(f'{name}: {plan_report(plan, tokens)}')
            out[f'{name}, {tokens} tokens'] = (lambda p=plan, x=x: p(x)), (lambda x=x: x@w.T)
    kernel,why = pick_kernel()
    if kernel is None or kernel.name!='native': raise SystemExit(f'training: {why}')
    x,g = torch.randn(512, k, generator=gen),torch.randn(512, n, generator=gen)
    prepared = kernel.prepare(signed_codes(w, 8, QuantConfig()), None)
    out['training forward'] = (lambda: int_linear(x, prepared, kernel, 8, False)),(lambda: x@w.T)
    out['training backward'] = (lambda: kernel.backward(g, prepared, None, torch.float32)),(lambda: g@w)
    return out

def seconds(f):
    t = time.perf_counter(); f()
    return time.perf_counter()-t

@torch.no_grad()
def measure(turns=25, only=None):
    "name -> ratio, at the level of this process."
    torch.set_num_threads(1)
    out = {}
    for name,(ours,theirs) in products().items():
        if only is not None and name not in only: continue
        ours(); theirs()
        out[name] = round(statistics.median(seconds(theirs)/seconds(ours) for _ in range(turns)), 2)
    return out

def at_level(level, only=None):
    "The ratios at a level; `None` where this processor does not have it. In a process of its own, since a level stays."
    args = [sys.executable, __file__, '--this-level', *(only or [])]
    ran = subprocess.run(args, env=os.environ|dict(SWITCHABLE_LLM_MAX_ISA=level, OMP_NUM_THREADS='1'), capture_output=True, text=True)
    if ran.returncode: raise SystemExit(f'{level}: {ran.stderr.strip().splitlines()[-1] if ran.stderr else ran.stdout}')
    found,ratios = json.loads(ran.stdout.splitlines()[-1])
    return ratios if found==level else None

def fallen(ratios, known, share):
    "Names whose ratio is too low."
    return [n for n,r in ratios.items() if r<known.get(n, 0)*share]

def of_this_kind(path, record):
    """Whether a record is of a processor like this one: of its name, family and model, which stand in the name of its file. Older
    records lack the last two, and are told by their instructions: AMD EPYC is the name of several generations."""
    if path.stem==f'ratios-{machine()}': return True
    alike = record['results']['processor']==processor() and set(record['environment']['flags'])==set(instructions())
    return alike and 'family' not in path.stem

def expected(folder=RECORDS):
    "Level -> name -> the least ratio recorded on this kind of processor, or else on any; the share of it that must be reached."
    records = {p:json.loads(p.read_text()) for p in sorted(folder.glob('ratios-*.json'))}
    same = [r for p,r in records.items() if of_this_kind(p, r)]
    out = {}
    for r in same or records.values():
        for level,ratios in r['results']['levels'].items():
            known = out.setdefault(level, {})
            for n,ratio in ratios.items(): known[n] = min(ratio, known.get(n, ratio))
    return out,(2/3 if same else 1/4)

def check():
    (known,share),bad = expected(),[]
    for level in levels():
        if level not in known: continue
        ratios = at_level(level)
        low = fallen(ratios, known[level], share)
        for _ in range(2):
            if low: low = fallen(at_level(level, low), known[level], share)
        bad += [f'{level}: {n} is {ratios[n]} times as fast as float32, and was {known[level][n]}' for n in low]
    print('\n'.join(bad) or 'no kernel lost its speed', f"({processor()}; at least {share:.0%} of what was recorded on",
          'this kind of processor)' if share>1/2 else 'others)')
    return bool(bad)

def levels():
    "Levels that this processor has, by asking each."
    there = []
    for level in LEVELS:
        code = 'from switchable_llm.system.native import native_level; print(native_level())'
        ran = subprocess.run([sys.executable,'-c',code], env=os.environ|dict(SWITCHABLE_LLM_MAX_ISA=level), capture_output=True, text=True)
        if ran.returncode==0 and ran.stdout.split()[-1]==level: there.append(level)
    return there

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', help='folder for the record')
    p.add_argument('--check', action='store_true', help='compare with the record instead')
    p.add_argument('--this-level', nargs='*', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.this_level is not None:
        print(json.dumps([native_level(), measure(only=args.this_level or None)]))
        return 0
    if args.check: return check()
    found = {l:at_level(l) for l in levels()}
    names = next(iter(found.values()))
    table(['times as fast as float32', *found], [(n, *(f'{found[l][n]:.1f}' for l in found)) for n in names])
    write(args.out, 'ratios', args, dict(processor=processor(), levels=found))

if __name__=='__main__': sys.exit(main())
