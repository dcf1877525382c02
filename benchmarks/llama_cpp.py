"""Tokens a second of one packed file beside llama.cpp, on the same machine, in turns.

    python benchmarks/llama_cpp.py PACKED.safetensors --llama-bench PATH/llama-bench --gguf Q8_0.gguf Q4_0.gguf --out results/benchmarks

llama.cpp's sources lie in the source package of `llama-cpp-python` (vendor/llama.cpp); built where they are measured, it
uses all that the processor has:

    cmake -B build -DGGML_NATIVE=ON -DLLAMA_CURL=OFF && cmake --build build --target llama-bench

`--levels` measures ours again with fewer instructions allowed (SWITCHABLE_LLM_MAX_ISA), each in a process of its own.
"""
import argparse, json, os, statistics, subprocess, sys, time
from pathlib import Path
import torch
from common import table, write
from switchable_llm.serving.lean import LiveStep, lean_tokens
from switchable_llm.serving.packed import load_packed
from switchable_llm.system.native import native_level

@torch.no_grad()
def ours(file, profiles, tokens, prompt, threads):
    "profile -> (tokens a second, prompt tokens a second)."
    torch.set_num_threads(threads)
    model,out = load_packed(file),{}
    ids = torch.randint(1000, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    def seconds(start, n):
        t = time.perf_counter(); list(lean_tokens(step, start, n))
        return time.perf_counter()-t
    for p in profiles:
        model.switch.profile = p
        step = LiveStep(model)
        seconds(ids[:8], 8); seconds(ids, 1)
        short = seconds(ids[:8], 1)
        out[p] = tokens/(seconds(ids[:8], tokens+1)-short), prompt/seconds(ids, 1)
    return out

def theirs(program, gguf, tokens, prompt, threads):
    args = [program,'-m',gguf,'-t',str(threads),'-p',str(prompt),'-n',str(tokens),'-r','1','-o','json']
    rows = json.loads(subprocess.run(args, capture_output=True, text=True, check=True).stdout)
    return next(r['avg_ts'] for r in rows if r['n_gen']), next(r['avg_ts'] for r in rows if r['n_prompt'])

def at_level(args, level):
    more = [args.file,'--this-level',level,'--profiles',*args.profiles,'--tokens',str(args.tokens),'--prompt',str(args.prompt),
            '--threads',str(args.threads)]
    env = os.environ|dict(SWITCHABLE_LLM_MAX_ISA=level)
    ran = subprocess.run([sys.executable, __file__, *more], env=env, capture_output=True, text=True)
    if ran.returncode: raise SystemExit(f'{level}: {ran.stderr.strip().splitlines()[-1]}')
    return {f'{p} {level}':v for p,v in json.loads(ran.stdout.splitlines()[-1]).items()}

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('file', help='what `freeze` wrote')
    p.add_argument('--llama-bench', help="llama.cpp's program; without it only ours are measured")
    p.add_argument('--gguf', nargs='*', default=[], help='files for it')
    p.add_argument('--profiles', nargs='+', default=['w8a8','w4a8'])
    p.add_argument('--levels', nargs='+', default=[native_level()], help='instructions to allow, best first')
    p.add_argument('--tokens', type=int, default=128, help='to write after a start of eight')
    p.add_argument('--prompt', type=int, default=256, help='tokens of the long prompt')
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--out', help='folder for the record')
    p.add_argument('--this-level', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.this_level:
        if native_level()!=args.this_level: raise SystemExit(f'this processor has {native_level()} and no {args.this_level}')
        print(json.dumps(ours(args.file, args.profiles, args.tokens, args.prompt, args.threads)))
        return
    seen = {}
    for _ in range(args.rounds):
        turn = {}
        for level in args.levels: turn |= at_level(args, level)
        if args.llama_bench:
            for g in args.gguf: turn[f'llama.cpp {Path(g).stem}'] = theirs(args.llama_bench, g, args.tokens, args.prompt, args.threads)
        for k,v in turn.items(): seen.setdefault(k, []).append(v)
    medians = {k:tuple(statistics.median(x) for x in zip(*v)) for k,v in seen.items()}
    table(['','tokens/s',f'prompt of {args.prompt}, tokens/s'], [(k, f'{d:.0f}', f'{q:.0f}') for k,(d,q) in medians.items()])
    args.file,args.llama_bench,args.gguf = Path(args.file).name,bool(args.llama_bench),[Path(g).name for g in args.gguf]
    write(args.out, 'llama_cpp', args, seen)

if __name__=='__main__': main()
