"""Callers on loopback: our server beside llama.cpp's, and a burst at one fixed profile and at `auto`.

    python benchmarks/serving.py peers PACKED.safetensors --data squad/ --gguf Q8_0.gguf Q4_0.gguf --out results/benchmarks
    python benchmarks/serving.py burst PACKED.safetensors --data squad/ --out results/benchmarks

`peers`: 1, 4 and 8 callers, each with its next request when the last one is done; llama.cpp is the server of its Python
wheel, xllamacpp. `burst`: requests come by chance at a low rate, then faster than the fixed profile can serve, then at the
low rate again; the same requests at the same moments for both. A prompt is the beginning of a real text. What `auto`
costs in quality is the mean negative log-likelihood of how some of those texts really go on, by profile, weighted by what
served them."""
import argparse, http.client, json, math, os, random, statistics, subprocess, sys, threading, time
from contextlib import contextmanager
from pathlib import Path
import torch
from common import table, write
from switchable_llm.core.switching import use_profile
from switchable_llm.data.squad import load_squad
from switchable_llm.serving.packed import load_packed, load_packed_tokenizer

START = 32   # tokens of a prompt

def texts(data, tokenizer, n):
    "Beginnings of real texts, and how they go on; none twice."
    seen = dict.fromkeys(q['context'] for q in load_squad(data, 'validation'))
    all_ = [tokenizer(t, add_special_tokens=False).input_ids for t in seen]
    long = [t for t in all_ if len(t)>=START+64]
    random.Random(0).shuffle(long)
    if len(long)<n: long *= math.ceil(n/len(long))
    return [(t[:START], t[START:START+64]) for t in long[:n]]

# ---- servers ----
@contextmanager
def ours(file, threads, *options):
    "A port."
    run = [sys.executable, '-c', 'import sys; from switchable_llm.apps.cli import main; sys.exit(main(sys.argv[1:]))']
    run += ['serve', str(file), '--name', 'm', '--port', '0', '--log', 'none', *options]
    env = os.environ|dict(OMP_NUM_THREADS=str(threads))
    p = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, env=env)
    try:
        for line in p.stderr:
            if 'listening at' in line: break
        else: raise SystemExit('the server did not start')
        threading.Thread(target=lambda: [0 for _ in p.stderr], daemon=True).start()
        yield int(line.split('//')[1].split('/')[0].rpartition(':')[2])
    finally: p.terminate(); p.wait(60)

THEIRS = """
import sys, time, xllamacpp as x
p = x.CommonParams()
p.model.path,p.n_parallel,p.n_ctx,p.port,p.warmup = sys.argv[1],8,8*256,0,True
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[2])
s = x.Server(p)
print('listening at', s.listening_address, flush=True)
time.sleep(3600)
"""
@contextmanager
def theirs(gguf, threads):
    "A port."
    run = [sys.executable, '-c', THEIRS, gguf, str(threads)]
    p = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = next((l for l in p.stdout if 'listening at' in l), None)
        if line is None: raise SystemExit(f'{gguf}: llama.cpp did not start')
        yield int(line.strip().rpartition(':')[2])
    finally: p.terminate(); p.wait(60)

# ---- a caller ----
def ask(port, ids, new, model='m'):
    "Seconds to the first token and to the last, tokens, and who spoke."
    body = dict(model=model, prompt=ids, max_tokens=new, temperature=0, stream=True, ignore_eos=True)
    c,start,first,n,spoke = http.client.HTTPConnection('127.0.0.1', port, timeout=300),time.perf_counter(),None,0,None
    try:
        c.request('POST', '/v1/completions', json.dumps(body), {'Content-Type':'application/json'})
        r = c.getresponse()
        if r.status!=200: return dict(status=r.status)
        for line in r:
            if not line.startswith(b'data: {'): continue
            piece = json.loads(line[6:])
            if 'error' in piece: return dict(status=500, error=piece['error'])
            spoke = piece['model']
            if not piece['choices']: continue
            if first is None: first = time.perf_counter()-start
            n += 1
        return dict(status=200, first=first, whole=time.perf_counter()-start, pieces=n, spoke=spoke)
    finally: c.close()

def closed(port, callers, seconds, work, new, model='m'):
    "What callers get who ask again when they are served: each request with what came of it."
    end,done,lock,todo = time.perf_counter()+seconds,[],threading.Lock(),iter(work)
    def call():
        while time.perf_counter()<end:
            with lock: ids,_ = next(todo)
            r = ask(port, ids, new, model)
            with lock: done.append(r)
    began = time.perf_counter()
    threads = [threading.Thread(target=call) for _ in range(callers)]
    for t in threads: t.start()
    for t in threads: t.join()
    return done,time.perf_counter()-began

def share(xs, q): return sorted(xs)[min(len(xs)-1, int(q*len(xs)))]

def peers(args):
    tokenizer = load_packed_tokenizer(args.file)
    work = texts(args.data, tokenizer, 4000)
    runs = {p:lambda p=p: (ours(args.file, args.threads), f'm:{p}') for p in args.profiles}
    runs |= {f'llama.cpp {Path(g).stem.rpartition("-")[2]}':lambda g=g: (theirs(g, args.threads), 'm') for g in args.gguf}
    seen = {}
    for turn in range(args.rounds):
        for name,make in runs.items():
            server,model = make()
            with server as port:
                closed(port, 4, 2, work, 8, model)   # warm
                for n in args.callers:
                    done,took = closed(port, n, args.seconds, work[turn*1000+n*100:], args.new, model)
                    if odd := [d for d in done if d['status']!=200]: raise SystemExit(f'{name}: {odd[0]}')
                    seen.setdefault(name, {}).setdefault(n, []).append(dict(
                        tokens_per_second=len(done)*args.new/took, first_p50=statistics.median(d['first'] for d in done),
                        first_p95=share([d['first'] for d in done], .95), whole_p95=share([d['whole'] for d in done], .95),
                        requests=len(done)))
    columns = dict(tokens_per_second=1, first_p50=1e3, first_p95=1e3, whole_p95=1e3)   # seconds are shown in ms
    def shown(rs): return [f'{statistics.median(r[k] for r in rs)*f:.0f}' for k,f in columns.items()]
    rows = [[name, n, *shown(rs)] for name,of in seen.items() for n,rs in of.items()]
    table(['','callers','tokens/s','first token, ms (median)','(95 %)','last token, ms (95 %)'], rows)
    args.file,args.gguf,args.data,args.run = Path(args.file).name,[Path(g).name for g in args.gguf],Path(args.data).name,None
    write(args.out, 'serving_peers', args, seen)

# ---- a burst ----
@torch.no_grad()
def surprise(file, work, profiles):
    "profile -> mean negative log-likelihood of how each text goes on, nats per token."
    model,out = load_packed(file),{}
    def loss(a, b):
        logits = model(torch.tensor([a+b])).logits[0, len(a)-1:-1]
        return float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(b)))
    for p in profiles:
        with use_profile(model, p): out[p] = [loss(a, b) for a,b in work]
    return out

def open_loop(port, moments, work, new, model, seconds):
    "Each request with its moment and what came of it; what the server said of itself meanwhile."
    start,done,states,over = time.perf_counter(),[],[],threading.Event()
    def watch():
        while not over.wait(.25):
            c = http.client.HTTPConnection('127.0.0.1', port, timeout=10)
            c.request('GET', '/health'); states.append([time.perf_counter()-start, json.loads(c.getresponse().read())]); c.close()
    def call(i, at): done.append(dict(ask(port, work[i][0], new, model), at=at, text=i))
    watcher = threading.Thread(target=watch); watcher.start()
    threads = []
    for i,at in enumerate(moments):
        time.sleep(max(0, start+at-time.perf_counter()))
        t = threading.Thread(target=call, args=(i, at)); t.start(); threads.append(t)
    for t in threads: t.join()
    time.sleep(max(0, start+seconds-time.perf_counter()))
    over.set(); watcher.join()
    return sorted(done, key=lambda d: d['at']),[[round(t, 2), s['waiting'], s['running'], s['profile']] for t,s in states]

def burst(args):
    tokenizer = load_packed_tokenizer(args.file)
    work,fixed = texts(args.data, tokenizer, 3000),args.profiles[0]
    options = ['--profiles',*args.profiles,'--first-token',str(args.target),'--hold',str(args.hold),'--waiting','1000','--gain','0']
    with ours(args.file, args.threads, *options) as port:
        closed(port, 8, 3, work, args.new, f'm:{fixed}')
        capacity = {}
        for p in args.profiles:
            done,took = closed(port, args.texts, args.measure, work, args.new, f'm:{p}')
            capacity[p] = len(done)/took
    print('requests a second that can be served:', {p:round(c, 2) for p,c in capacity.items()}, flush=True)
    rng,moments,t = random.Random(0),[],0.
    ends = [args.quiet, args.quiet+args.burst, 2*args.quiet+args.burst]
    while t<ends[-1]:
        rate = capacity[fixed]*(args.factor if ends[0]<=t<ends[1] else .3)
        t += rng.expovariate(rate)
        moments.append(t)
    results,asked = dict(capacity=capacity, ends=ends, runs={}),{}
    for name in (fixed, 'auto'):
        with ours(args.file, args.threads, *options) as port:
            closed(port, 4, 3, work[::-1], 8, f'm:{name}')
            done,states = open_loop(port, moments, work, args.new, f'm:{name}', ends[-1])
        results['runs'][name] = dict(requests=done, states=states)
        asked |= {d['text']:work[d['text']] for d in done}
    found = surprise(args.file, list(asked.values())[:args.scored], args.profiles)
    results['nll'] = loss = {p:statistics.fmean(xs) for p,xs in found.items()}
    rows = []
    for name,r in results['runs'].items():
        good = [d for d in r['requests'] if d['status']==200]
        firsts = [d['first'] for d in good if args.quiet<=d['at']<args.quiet+args.burst]
        spoke = [d['spoke'].partition(':')[2] for d in good]
        r['lost'] = statistics.fmean(loss[p]-loss[fixed] for p in spoke)
        served = ', '.join(f'{p} {spoke.count(p)/len(spoke):.0%}' for p in args.profiles)
        rows.append([name, len(r['requests']), len(r['requests'])-len(good), f'{statistics.median(firsts):.2f}',
                     f'{share(firsts, .95):.2f}', f"{r['lost']:+.4f}", served])
    table(['','requests','failed','first token in the burst, s (median)','(95 %)','nats lost','served by'], rows)
    args.file,args.data,args.run = Path(args.file).name,Path(args.data).name,None
    write(args.out, 'serving_burst', args, results)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = p.add_subparsers(required=True)
    for name,run in dict(peers=peers, burst=burst).items():
        k = kinds.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        k.set_defaults(run=run)
        k.add_argument('file', help='what `freeze` wrote')
        k.add_argument('--data', required=True, help='folder of SQuAD, for texts')
        k.add_argument('--profiles', nargs='+', default=['bw8','bw6','w4a8'], help='the finest first')
        k.add_argument('--threads', type=int, default=1, help='of the server; the callers need a core too')
        k.add_argument('--new', type=int, default=64, help='tokens of an answer')
        k.add_argument('--out', help='folder for the record')
        if name=='peers':
            k.add_argument('--gguf', nargs='*', default=[], help='files for llama.cpp')
            k.add_argument('--callers', type=int, nargs='+', default=[1, 4, 8])
            k.add_argument('--seconds', type=float, default=15., help='of each run')
            k.add_argument('--rounds', type=int, default=2)
        else:
            k.add_argument('--quiet', type=float, default=15., help='seconds before the burst, and after it')
            k.add_argument('--burst', type=float, default=60., help='seconds')
            k.add_argument('--factor', type=float, default=1.15, help='requests of the burst, of those that the first profile can serve')
            k.add_argument('--measure', type=float, default=20., help='seconds in which that is measured')
            k.add_argument('--texts', type=int, default=16, help='callers by whom it is measured')
            k.add_argument('--target', type=float, default=.5, help='seconds to the first token that `auto` holds')
            k.add_argument('--hold', type=float, default=5.)
            k.add_argument('--scored', type=int, default=60, help='texts on which the profiles are compared')
    args = p.parse_args()
    args.run(args)

if __name__=='__main__': main()
