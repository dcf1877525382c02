"What the benchmarks share: who takes part, whose turn it is, and the record of it."
import importlib.util, json, platform, statistics, sys, time
from importlib import metadata
from pathlib import Path
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D
from switchable_llm.core.integer import KERNELS, try_kernel, native_report
from switchable_llm.study.records import environment
from switchable_llm.core.files import write_whole

def missing(*packages):
    "Packages that are not installed, in words, or nothing."
    lost = [p for p in packages if importlib.util.find_spec(p) is None]
    return f"not installed: {', '.join(lost)}; pip install -e '.[bench]'" if lost else None

def gpt2(layers=12, dtype=torch.float32, **kw):
    "GPT-2's shape with random weights, always the same, no dropout."
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, embd_pdrop=0., attn_pdrop=0., resid_pdrop=0., **kw)).to(dtype).eval()

def swap_linears(model, make=torch.nn.Linear):
    "Every `Conv1D` becomes what `make(in, out)` gives, an `nn.Linear` of some kind: other libraries know no `Conv1D`."
    for name,c in [(n, m) for n,m in model.named_modules() if isinstance(m, Conv1D)]:
        linear = make(*c.weight.shape).to(c.weight.dtype)
        with torch.no_grad(): linear.weight.copy_(c.weight.T); linear.bias.copy_(c.bias)
        model.set_submodule(name, linear)
    return model

def take_turns(runs, rounds, warmup=1):
    "Seconds of each run, `rounds` times; they alternate, so that what else the machine does falls on all alike."
    times,order = {k:[] for k in runs},list(runs)
    for i in range(-warmup, rounds):
        for k in order[i%len(order):]+order[:i%len(order)]:
            if sys.stderr.isatty(): print(f'\r{max(i, 0)+1}/{rounds} {k:40}', end='', file=sys.stderr, flush=True)
            start = time.perf_counter(); runs[k]()
            if i>=0: times[k].append(time.perf_counter()-start)
    if sys.stderr.isatty(): print('\r'+' '*60, end='\r', file=sys.stderr)
    return times

def ratio(times, k, base):
    "Median of the ratios of turns that were next to each other."
    return statistics.median(a/b for a,b in zip(times[k], times[base]))

def where():
    "Where this was measured: what every record has, and what bears on speed."
    name = next((l.split(':', 1)[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')), '') if Path('/proc/cpuinfo').exists() else platform.processor()
    out = environment(None if torch.cuda.is_available() else f'{name or platform.machine()}, {torch.get_num_threads()} threads')
    out['versions'] |= {p:metadata.version(p) for p in ('peft','torchao','optimum-quanto','brevitas') if not missing(p.replace('optimum-quanto', 'optimum'))}
    flags = [k for k,v in (torch.cpu.get_capabilities() if hasattr(torch.cpu, 'get_capabilities') else {}).items() if v is True and k.startswith(('avx','amx'))]
    return out | dict(flags=flags, threads=torch.get_num_threads(), native=native_report(), kernels={n:try_kernel(n, 'cpu')[1] for n in KERNELS})

def write(out, name, settings, results):
    "The record of a benchmark: `<out>/<name>.json`."
    if out is None: return
    path = Path(out)/f'{name}.json'
    write_whole(path, json.dumps(dict(benchmark=name, settings=settings, environment=where(), results=results), indent=1).encode())
    print(f'\nrecord  {path}')

def table(heads, rows):
    "A Markdown table."
    print('| '+' | '.join(heads)+' |\n|:--'+'|--:'*(len(heads)-1)+'|')
    for r in rows: print('| '+' | '.join(map(str, r))+' |')
