"What the benchmarks share: who takes part, whose turn it is, and the record of it."
import argparse, importlib.util, json, platform, re, statistics, sys, time
from importlib import metadata
from pathlib import Path
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D
from switchable_llm.core.integer import KERNELS, try_kernel
from switchable_llm.system.native import native_level, native_report
from switchable_llm.study.records import environment
from switchable_llm.system.files import write_whole

def missing(*packages):
    "Packages that are not installed, in words, or nothing."
    lost = [p for p in packages if importlib.util.find_spec(p) is None]
    return f"not installed: {', '.join(lost)}; pip install -e '.[bench]'" if lost else None

def gpt2(layers=12, dtype=torch.float32, **kw):
    "GPT-2's shape with random weights, always the same, no dropout."
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, embd_pdrop=0., attn_pdrop=0., resid_pdrop=0., **kw)
    return GPT2LMHeadModel(config).to(dtype).eval()

def swap_linears(model, make=torch.nn.Linear):
    "Every `Conv1D` becomes the linear layer that `make(in, out)` gives: other libraries know no `Conv1D`."
    for name,c in [(n, m) for n,m in model.named_modules() if isinstance(m, Conv1D)]:
        linear = make(*c.weight.shape).to(c.weight.dtype)
        with torch.no_grad(): linear.weight.copy_(c.weight.T); linear.bias.copy_(c.bias)
        model.set_submodule(name, linear)
    return model

def take_turns(runs, rounds, warmup=1):
    "Seconds of each run, `rounds` times; they alternate, so that a busy moment slows all alike."
    times,order = {k:[] for k in runs},list(runs)
    for i in range(-warmup, rounds):
        for k in order[i%len(order):]+order[:i%len(order)]:
            if sys.stderr.isatty():
                print(f'\r{max(i, 0)+1}/{rounds} {k:40}', end='', file=sys.stderr, flush=True)
            start = time.perf_counter()
            runs[k]()
            if i>=0: times[k].append(time.perf_counter()-start)
    if sys.stderr.isatty(): print('\r'+' '*60, end='\r', file=sys.stderr)
    return times

def ratio(times, k, base):
    "Median of the ratios of turns that were next to each other."
    return statistics.median(a/b for a,b in zip(times[k], times[base]))

PEERS = {'peft':'peft', 'torchao':'torchao', 'optimum-quanto':'optimum', 'brevitas':'brevitas'}   # package -> module

def cpuinfo(field):
    "A field of the first processor, as Linux gives it; elsewhere and where it is missing, nothing."
    if not (info := Path('/proc/cpuinfo')).exists(): return ''
    found = [v.strip() for k,_,v in (l.partition(':') for l in info.read_text().splitlines()) if k.strip()==field]
    return found[0] if found else ''

def processor():
    "The processor's name, as the system gives it."
    return cpuinfo('model name') or platform.processor()

def instructions():
    "The vector and matrix instructions that this processor has."
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, 'get_capabilities') else {}
    return [k for k,v in able.items() if v is True and k.startswith(('avx','amx'))]

def where():
    "Where this was measured: what every record has, and what bears on speed."
    threads = torch.get_num_threads()
    cpu = f'{processor() or platform.machine()}, {threads} threads'
    out = environment(None if torch.cuda.is_available() else cpu)
    out['versions'] |= {p:metadata.version(p) for p,module in PEERS.items() if not missing(module)}
    kernels = {n:try_kernel(n, 'cpu')[1] for n in KERNELS}
    return out | dict(flags=instructions(), threads=threads, native=native_report(), kernels=kernels)

def machine():
    """What this machine's records are called by: its processor's name and generation (one name, as AMD EPYC, may stand for
    several that differ in speed), and the best instructions that our kernels use on it."""
    family,model = cpuinfo('cpu family'),cpuinfo('model')
    generation = f'family {family} model {model}' if family and model else ''
    name = f'{processor() or platform.machine()} {generation} {native_level()}'.lower()
    name = re.sub(r'\((r|tm)\)|processor|cpu', '', name)
    return re.sub(r'[^a-z0-9_]+', '-', name).strip('-')

def write(out, name, settings, results):
    "The record of a benchmark: `<out>/<name>-<machine>.json`."
    if out is None: return
    path = Path(out)/f'{name}-{machine()}.json'
    settings = {k:v for k,v in vars(settings).items() if k!='out'}
    record = dict(benchmark=name, settings=settings, environment=where(), results=results)
    write_whole(path, json.dumps(record, indent=1).encode())
    print(f'\nrecord  {path}')

def options(doc):
    "A parser of arguments, described by the first line of a module's documentation."
    shown = argparse.ArgumentDefaultsHelpFormatter
    return argparse.ArgumentParser(description=doc.split('\n\n')[0], formatter_class=shown)

def table(heads, rows):
    "A Markdown table."
    print('| '+' | '.join(heads)+' |\n|:--'+'|--:'*(len(heads)-1)+'|')
    for r in rows: print('| '+' | '.join(map(str, r))+' |')
