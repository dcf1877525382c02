"""Damaged and forged packed files: none may crash or hang a process, and every error names the file.

    python tests/fuzz_packed.py                     20,000 cases
    python tests/fuzz_packed.py --cases 2000        as the tests run it
    python tests/fuzz_packed.py --asan              over kernels compiled with the address sanitizer (g++, libasan)
    python tests/fuzz_packed.py --only 1234         one case again, in this process

Each case is made from its number alone: a healthy file, changed in one way or a few. Workers load it; what loads
runs a short generation, a change of profile, and the lean loop. They say which case they begin, so that a crash has
a number."""
import argparse, collections, copy, json, math, os, queue, random, resource, shutil, subprocess, sys, tempfile
import threading, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HANG = 300          # seconds without a word from a worker; a case takes milliseconds
MOST_FAULTS = 10    # after so many deaths a worker gives up
GROWTH = 1 << 30    # bytes of memory that a worker may grow by: nothing is taken that a file does not hold

# --- healthy files ---

def toy(kind, **kw):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    ends = dict(bos_token_id=1, eos_token_id=1, pad_token_id=0)
    if kind=='gpt2':
        return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4, **ends))
    sizes = dict(vocab_size=97, num_hidden_layers=2, hidden_size=48, intermediate_size=84, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes|ends|kw))

def make_healthy(folder):
    "Files of several kinds in a folder."
    import torch
    from switchable_llm.data.embedded import tiny_tokenizer
    from switchable_llm.lora_routing import add_adapters_
    from switchable_llm.serving.exports import freeze
    from switchable_llm.quantizers import QuantConfig
    from switchable_llm.core.profiles import Profile
    from switchable_llm.core.calibration import calibrate_
    from switchable_llm.core.switching import make_switchable_
    half = Profile.from_dict(dict(name='half', default='w4a8', rules=[dict(layers=[1], bits='float')]))
    own_ends = dict(embedding=8, lm_head=6)
    gpt2,tied = toy('gpt2'),toy('llama', tie_word_embeddings=True)
    qwen2 = toy('qwen2', tie_word_embeddings=False).to(torch.bfloat16)
    apart = toy('llama', tie_word_embeddings=False)
    windows = dict(sliding_window=2, layer_types=['full_attention','sliding_attention'])
    gemma3,phi3 = toy('gemma3_text', head_dim=12, **windows),toy('phi3', intermediate_size=80, sliding_window=2)
    for name,model,profiles,cfg,ends,more in (
        ('gpt2', gpt2, ['bw4','bw8','mixed8648'], {}, True, {}),
        ('llama', tied, ['bw4','bw8'], dict(act='per_token'), False, own_ends),
        ('qwen2', qwen2, ['bw4','bw6'], dict(weight='per_group', group_size=32), True, {}),
        ('gemma3', gemma3, ['bw4','bw8'], {}, False, {}),
        ('phi3', phi3, ['bw4','bw8'], dict(act='per_token'), True, {}),
        ('half', apart, [half], dict(act='per_token', act_symmetric=True), False, {})):
        make_switchable_(model.eval(), profiles, QuantConfig(**cfg), embedding=ends, lm_head=ends)
        calibrate_(model, [dict(input_ids=torch.randint(1, 97, (3, 11)))])
        add_adapters_(model, r=2, dropout=0.)
        for l in model.switch.layers:
            for a in l.adapters.values(): torch.nn.init.normal_(a.b, std=.02)
        freeze(model, folder/f'{name}.safetensors', tokenizer=tiny_tokenizer() if name=='gpt2' else None, **more)
    shutil.copy(ROOT/'tests'/'data'/'packed_v1.safetensors', folder/'v1.safetensors')

# --- ways to change one ---

def parts(data):
    "Description and tensors of a healthy file."
    from safetensors.torch import load
    n = int.from_bytes(data[:8], 'little')
    d = json.loads(json.loads(data[8:8+n])['__metadata__']['switchable_llm'])
    return d, dict(sorted(load(bytes(data)).items()))   # safetensors gives them in any order

def joined(path, d, tensors):
    "A file of them with the checksums that belong to it: forged, not damaged."
    from safetensors.torch import save_file
    from switchable_llm.serving.packed_file import BLANK, checksum, seal
    if isinstance(d, dict) and isinstance(d.get('checksums'), dict):
        d['checksums'] = {k:checksum(t) for k,t in tensors.items()}
    save_file({k:t.contiguous() for k,t in tensors.items()}, path,
              metadata=dict(format='pt', switchable_llm=json.dumps(d), head_checksum=BLANK))
    seal(path)

def sealed(path, data):
    "The bytes, with a new checksum of the head where there is one."
    import re
    from xxhash import xxh3_64_hexdigest
    n = int.from_bytes(data[:8], 'little')
    head = bytes(data[8:8+n])
    if m := re.search(b'"head_checksum":"([0-9a-f]{16})"', head):
        head = head.replace(m[1], b'0'*16)
        head = head.replace(b'0'*16, xxh3_64_hexdigest(head).encode())
    path.write_bytes(bytes(data[:8])+head+bytes(data[8+n:]))

def flip(rng, data, low, high, most=3):
    for _ in range(rng.randint(1, most)): data[rng.randrange(low, high)] ^= 1<<rng.randrange(8)

def start(data): return 8+int.from_bytes(data[:8], 'little')

def head_bits(rng, path, data):
    flip(rng, data, 0, start(data))
    path.write_bytes(data)
def head_bits_sealed(rng, path, data):
    flip(rng, data, 8, start(data))
    sealed(path, data)
def data_bits(rng, path, data):
    flip(rng, data, start(data), len(data), 9)
    path.write_bytes(data)
def cut(rng, path, data):
    ends = [rng.randrange(len(data)), rng.randrange(64), start(data)+rng.randint(-9, 9)]
    path.write_bytes(data[:rng.choice(ends)])
def longer(rng, path, data): path.write_bytes(data+rng.randbytes(rng.randint(1, 99)))
def block(rng, path, data):
    at,n = rng.randrange(len(data)),rng.choice([1, 16, 512, 4096])
    fill = rng.choice([bytes(n), b'\xff'*n, rng.randbytes(n), bytes(data[:n])])
    data[at:at+n] = fill[:len(data)-at]
    path.write_bytes(data)

ODD = (None, True, False, 0, -1, 1, 2, 3, 7, 8, 9, 17, 2**31, 2**63, 10**12, 10**30, .5, -1e308, 1e308,
       math.nan, math.inf, '', 'x', 'float', 'w4a8', '8', 'layers', '../../etc/passwd', 'x'*5000, '\ud800',
       [], {}, [[]], [0], {'a':1}, [[[]]*3]*3)

def places(v, at=()):
    "Every place in nested lists and mappings."
    for k in (v if isinstance(v, dict) else range(len(v)) if isinstance(v, list) else ()):
        yield at+(k,)
        yield from places(v[k], at+(k,))

def change(rng, d):
    "One place of a description, anyhow."
    at = rng.choice([p for p in places(d) if p[0]!='checksums'])
    holder = d
    for k in at[:-1]: holder = holder[k]
    k,old = at[-1],holder[at[-1]]
    how = rng.randrange(8)
    if how==0: del holder[k]
    elif how==1 and isinstance(holder, dict):
        value = copy.deepcopy(rng.choice(ODD))
        names = ['extra', 'num_hidden_layers', 'n_layer', 'auto_map', 'attn_implementation', k+'s']
        holder[rng.choice(names)] = value
    elif how==1: holder.insert(rng.randrange(len(holder)+1), copy.deepcopy(old))
    elif how==2 and type(old) in (int, float):
        holder[k] = rng.choice([old*10, old+1, old-1, -old, old*2, old//2, old*10**6, float(old)])
    elif how==3: holder[k] = copy.deepcopy(rng.choice([*holder.values()] if isinstance(holder, dict) else holder))
    elif how==4 and isinstance(old, str):
        digits = old.replace('0', '1'),old.replace('4', '8')
        holder[k] = rng.choice([old[:-1], old+old, old.upper(), old[::-1], *digits])
    elif how==5 and isinstance(old, list): holder[k] = rng.choice([old*2, old[::-1], old[:-1], old*1000])
    else: holder[k] = copy.deepcopy(rng.choice(ODD))

def fields(rng, path, data):
    d,tensors = parts(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])): change(rng, d)
    joined(path, d, tensors)

def config(rng, path, data):
    d,tensors = parts(data)
    for part in rng.choice([('config',), ('config',), ('generation',), ('config', 'generation')]):
        change(rng, d[part] or {'x':1})
    joined(path, d, tensors)

def reshaped(rng, t):
    import torch
    how = rng.randrange(9)
    if how==0: return t.repeat(10, *[1]*(t.dim()-1)) if t.dim() else t.repeat(10)
    if how==1: return t[:0] if t.dim() else t.reshape(1)
    if how==2: return t.T if t.dim()==2 else t.flatten()
    if how==3: return t[:-1] if t.dim() else t
    if how==4: return t.unsqueeze(rng.randint(0, t.dim()))
    if how==5: return t.reshape(-1).view(torch.uint8) if t.element_size()>1 else t.to(torch.int8)
    if how==6:
        types = 'float16 float32 float64 int32 int64 bool bfloat16'.split()
        return t.to(getattr(torch, rng.choice(types)))
    if how==7: return torch.cat([t, t[-1:]]) if t.dim() else t
    return torch.zeros_like(t) if rng.random()<.5 else t.flip(0) if t.dim() else t

def tensors(rng, path, data):
    d,ts = parts(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        n,m = rng.choice(list(ts)),rng.choice(list(ts))
        how = rng.randrange(6)
        if how==0: ts.pop(n)
        elif how==1:
            names = [n+'x', n.replace('0', '1'), 'extra', n+'.weight', 'transformer.h.7.ln_1.weight']
            ts[rng.choice(names)] = ts[n].clone()
        elif how==2: ts[n],ts[m] = ts[m].clone(),ts[n].clone()
        else: ts[n] = reshaped(rng, ts[n])
        if not ts: return path.write_bytes(data)
    joined(path, d, ts)

def values(rng, path, data):
    "Shapes as they should be, numbers as they should not."
    import torch
    d,ts = parts(data)
    for n in rng.sample(list(ts), rng.randint(1, 6)):
        t = ts[n].clone()
        if t.numel()==0: continue
        if t.is_floating_point(): odd = [math.nan, math.inf, -math.inf, 0., -1., 1e38, 1e-45, 3e4]
        else:
            info = torch.iinfo(t.dtype)
            odd = [v for v in (0, 1, 255, -1, 2**31-1, -2**31) if info.min<=v<=info.max]
        t.view(-1)[rng.randrange(t.numel()):] = rng.choice(odd)
        ts[n] = t
    joined(path, d, ts)

def lies(rng, path, data):
    "A description and tensors that agree with each other in something wrong."
    import torch
    d,ts = parts(data)
    l = rng.choice(d['layers'])
    at = l['name']
    how = rng.randrange(6)
    if how==0:                                          # more rows
        l['shape'][0] *= 10
        for k in list(ts):
            if not k.startswith(at+'.') or '.range' in k or k.endswith('.a') or not ts[k].numel(): continue
            ts[k] = ts[k].repeat(10, *[1]*(ts[k].dim()-1))
    if how==1:                                          # more inputs
        l['shape'][1] *= 2
        for k in ('high','middle','low'):
            if (t := ts.get(f'{at}.{k}')) is not None and t.numel(): ts[f'{at}.{k}'] = t.repeat_interleave(2, 1)
        for k in [k for k in ts if k.startswith(f'{at}.adapters') and k.endswith('.a')]: ts[k] = ts[k].repeat(1, 2)
    if how==2 and l['adapters']:                        # another rank
        a,r = l['adapters'][0],rng.choice([1, 3, 64, 1000])
        a['r'] = r
        for ab,shape in (('a', (r, l['shape'][1])), ('b', (l['shape'][0], r))):
            generator = torch.Generator().manual_seed(0)
            ts[f"{at}.adapters.{a['key']}.{ab}"] = torch.randn(shape, generator=generator)
    if how==3:                                          # heads
        for k in ('n_head','num_attention_heads','num_key_value_heads','head_dim'):
            if k in d['config']: d['config'][k] = rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 24, 48, 96])
    if how==4:
        kinds = ['linear','dynamic','yarn','longrope','llama3','default','proportional']
        d['config'].update(rope_parameters=dict(
            rope_type=rng.choice(kinds), rope_theta=rng.choice([1, 1e4, 0, -1, 1e300]),
            factor=rng.choice([1., 8., 0., -2., 1e30]), partial_rotary_factor=rng.choice([.5, .25, 2., 0.])))
    if how==5:                                          # positions and vocabulary
        for k in ('n_positions','max_position_embeddings'):
            if k in d['config']: d['config'][k] = rng.choice([1, 2, 10**6, 10**9])
        if (wpe := 'transformer.wpe.weight') in ts:
            ts[wpe] = ts[wpe].repeat(rng.choice([1, 3]), 1)[:d['config']['n_positions']]
    joined(path, d, ts)

def tokenizers(rng, path, data):
    import torch
    d,ts = parts(data)
    if 'tokenizer' not in ts: return fields(rng, path, data)
    t = bytearray(ts['tokenizer'].numpy().tobytes())
    if rng.random()<.5: flip(rng, t, 0, len(t), 5)
    else:
        text = json.loads(bytes(t))
        change(rng, text)
        t = bytearray(json.dumps(text).encode())
    if rng.random()<.3: change(rng, d['tokenizer'])
    ts['tokenizer'] = torch.frombuffer(t, dtype=torch.uint8)
    joined(path, d, ts)

WAYS = [head_bits, head_bits_sealed, head_bits_sealed, data_bits, data_bits, cut, longer, block, fields, fields,
        fields, config, config, tensors, tensors, values, values, lies, lies, tokenizers]

UNWRITABLE = IndexError,KeyError,TypeError,ValueError,RuntimeError,OverflowError,AttributeError

def make_case(i, seed, healthy, path):
    "Write case `i`; how it was made, and whether data are compared with their checksums."
    rng = random.Random(f'{seed}-{i}')
    base,way = rng.choice(sorted(healthy)),rng.choice(WAYS)
    try: way(rng, path, bytearray(healthy[base]))
    except UNWRITABLE as e:   # this change cannot be written
        path.write_bytes(healthy[base])
        return f'{base} {way.__name__}: {type(e).__name__}',True
    return f'{base} {way.__name__}',rng.random()<.5

# --- one case ---

def try_case(path, verify, heap):
    "What comes of a file: 'refused', 'runs', 'late ...' for an error after loading, or 'fault ...'."
    import torch
    from switchable_llm.serving.packed import load_packed, load_packed_tokenizer
    for load in (lambda: load_packed_tokenizer(path), lambda: load_packed(path, verify=verify)):
        try: found = load()
        except ValueError as e:
            found = None
            if path.name not in str(e): return f'fault: does not name the file: {str(e)[:200]}'
        except Exception as e: return f'fault: {type(e).__name__}: {str(e)[:200]}'
    if found is None: return 'refused'
    if heap: found._apply(torch.clone)     # where the address sanitizer sees the ends of each tensor
    try: return use(found)
    except Exception as e: return f'late {type(e).__name__}: {str(e)[:120]}'

def use(model):
    import torch
    from switchable_llm.serving.parts import PARTS
    from switchable_llm.serving.lean import LiveStep, lean_tokens
    ids = torch.tensor([[1, 2, 3]])
    for p in [*model.switch.profiles][:2]:
        model.switch.profile = p
        with torch.no_grad(): model(ids)
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, num_beams=1,
                       pad_token_id=0)
        if model.config.model_type in PARTS and model.switch.cfg.group_size%16==0:
            list(lean_tokens(LiveStep(model, 16), [1, 2, 3], 3))
    return 'runs'

# --- workers ---

def work(args):
    import torch
    os.environ['HF_HUB_OFFLINE'] = '1'
    torch.set_num_threads(1)
    import logging, warnings
    warnings.filterwarnings('ignore'); logging.disable(logging.CRITICAL)
    folder = Path(args.folder)
    healthy = {p.stem:p.read_bytes() for p in (folder/'healthy').iterdir()}
    path = folder/f'case-{args.first % args.workers}.safetensors'
    say = lambda **kw: print(json.dumps(kw), flush=True)
    for i in range(args.first, args.cases, args.workers):
        how,verify = make_case(i, args.seed, healthy, path)
        say(begin=i, how=how)
        if i==args.die: os.abort()
        t,before = time.process_time(),resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out = try_case(path, verify, args.heap)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)*1024
        say(end=i, how=how, out=out if grown<GROWTH else f'fault: took {grown:,} bytes',
            seconds=time.process_time()-t, grown=grown)

class Worker:
    "A process that works through its share; a new one takes over where it ends too early."
    def __init__(self, args, number, env):
        self.args,self.number,self.env,self.next,self.faults,self.done = args,number,env,number,[],[]
    def run(self):
        while self.next<self.args.cases and len(self.faults)<MOST_FAULTS: self.one_process()

    def one_process(self):
        a,lines,at = self.args,queue.Queue(),None
        cmd = [sys.executable, __file__, '--work', str(a.folder), '--first', str(self.next), '--die', str(a.die)]
        cmd += ['--cases', str(a.cases), '--workers', str(a.workers), '--seed', str(a.seed)]
        log = Path(a.folder)/f'log-{self.number}'
        with open(log, 'wb') as err:
            p = subprocess.Popen(cmd + ['--heap']*bool(a.asan), stdout=subprocess.PIPE, stderr=err, text=True,
                                 env=self.env)
            threading.Thread(target=lambda: [*map(lines.put, p.stdout), lines.put(None)], daemon=True).start()
            while True:
                try: line = lines.get(timeout=HANG)
                except queue.Empty:
                    p.kill()
                    break
                if line is None: break
                try: said = json.loads(line)
                except ValueError: continue   # the package of tokenizers writes lines of its own
                at = said if 'begin' in said else None
                if 'end' in said:
                    self.done.append(said)
                    self.next = said['end']+a.workers
            code = p.wait()
        if code==0:
            self.next = a.cases
            return
        if at is None and not self.done: raise SystemExit(f'a worker does not begin: {log.read_text()[-2000:]}')
        if code==-9: what = f'hang: nothing for {HANG} s'
        else: what = f'crash: exit status {code}: {log.read_text(errors="replace")[-3000:]}'
        self.faults.append(dict(end=at['begin'] if at else self.next, how=at['how'] if at else '?', out=what))
        kept = Path(a.folder)/f"fault-{self.faults[-1]['end']}.safetensors"
        shutil.copy(Path(a.folder)/f'case-{self.number}.safetensors', kept)
        self.next = self.faults[-1]['end']+a.workers

def sanitized(folder):
    "A copy of the package whose kernels are compiled with the address sanitizer, and the environment that uses it."
    package = Path(folder)/'package'/'switchable_llm'
    shutil.copytree(ROOT/'switchable_llm', package, ignore=shutil.ignore_patterns('_native*', '__pycache__'))
    flags = ['-O1', '-g', '-fno-omit-frame-pointer', '-fsanitize=address', '-std=c++17', '-fopenmp',
             '-fno-math-errno', '-fPIC', '-shared']
    sources = map(str, sorted((ROOT/'csrc').glob('*.cpp')))
    subprocess.run(['g++', *flags, *sources, '-o', str(package/'_native.so')], check=True)
    def where(lib):
        p = subprocess.run(['g++', f'-print-file-name={lib}'], check=True, capture_output=True, text=True)
        return p.stdout.strip()
    return dict(PYTHONPATH=str(package.parent), LD_PRELOAD=f"{where('libasan.so')} {where('libstdc++.so.6')}",
                ASAN_OPTIONS='detect_leaks=0:abort_on_error=1:allocator_may_return_null=1')

def fuzz(cases, workers=None, seed=0, asan=False, folder=None, die=-1):
    "Run cases, case `die` ending its worker; what came of each, and the faults."
    with tempfile.TemporaryDirectory() as tmp:
        args = argparse.Namespace(cases=cases, workers=workers or os.cpu_count() or 1, seed=seed, asan=asan,
                                  folder=folder or tmp, die=die)
        env = {**os.environ, 'PYTHONPATH':str(ROOT), 'OMP_NUM_THREADS':'1', 'HF_HUB_OFFLINE':'1',
               'TOKENIZERS_PARALLELISM':'false'}
        (Path(args.folder)/'healthy').mkdir(parents=True, exist_ok=True)
        make_healthy(Path(args.folder)/'healthy')
        if asan: env |= sanitized(args.folder)
        team = [Worker(args, n, env) for n in range(args.workers)]
        threads = [threading.Thread(target=w.run) for w in team]
        for t in threads: t.start()
        for t in threads: t.join()
    ends = [e for w in team for e in w.done]
    faults = [f for w in team for f in w.faults]+[e for e in ends if e['out'].startswith('fault')]
    return dict(cases=len(ends)+sum(len(w.faults) for w in team),
                counts=collections.Counter(kind(e) for e in ends), faults=faults,
                slowest=max(ends, key=lambda e: e['seconds']), grown=max(e['grown'] for e in ends), ends=ends)

def kind(end): return end['out'].partition(' ')[0].partition(':')[0]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--cases', type=int, default=20_000)
    p.add_argument('--workers', type=int)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--asan', action='store_true', help='compile the kernels with the address sanitizer')
    p.add_argument('--folder', help='where files are kept that crash; by default a temporary one')
    p.add_argument('--only', type=int, help='one case, in this process')
    p.add_argument('--work', help=argparse.SUPPRESS)
    p.add_argument('--first', type=int, default=0, help=argparse.SUPPRESS)
    p.add_argument('--die', type=int, default=-1, help=argparse.SUPPRESS)
    p.add_argument('--heap', action='store_true', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.work:
        args.folder = args.work
        return work(args)
    if args.only is not None:
        folder = Path(args.folder or tempfile.mkdtemp())
        (folder/'healthy').mkdir(parents=True, exist_ok=True)
        make_healthy(folder/'healthy')
        path = folder/f'only-{args.only}.safetensors'
        healthy = {q.stem:q.read_bytes() for q in (folder/'healthy').iterdir()}
        how,verify = make_case(args.only, args.seed, healthy, path)
        print(how, path, flush=True)
        return print(try_case(path, verify, False))
    start = time.time()
    found = fuzz(args.cases, args.workers, args.seed, args.asan, args.folder)
    ways = collections.Counter((e['how'].split()[1], kind(e)) for e in found['ends'])
    for (way, out),n in sorted(ways.items()): print(f'{n:6} {way} {out}')
    late = collections.Counter(e['out'] for e in found['ends'] if kind(e)=='late')
    for out,n in late.most_common(40): print(f'{n:6} {out}')
    for f in found['faults']: print(f"FAULT case {f['end']} ({f['how']}): {f['out']}")
    slow = found['slowest']
    print(f"{found['cases']:,} cases in {time.time()-start:.0f} s: {dict(found['counts'])}; "
          f"{len(found['faults'])} faults; slowest {slow['seconds']:.1f} s (case {slow['end']}, {slow['how']}); "
          f"grew by {found['grown']/1e6:.0f} MB")
    sys.exit(bool(found['faults']))

if __name__=='__main__': main()
