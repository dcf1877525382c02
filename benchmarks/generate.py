"""Tokens a second and the time of a prompt, from one packed file and from transformers in float32.

Run `python benchmarks/generate.py [--out results/benchmarks]`. The model has GPT-2's shape and random
weights; embedding and head are packed too, with adapters of rank 8. The contestants take turns in one
process. `generate` is transformers' own, `lean` the lean loop of this library. Libraries that are not
installed are named and left out. Each contestant is first asked for the logits of the same prompt, and their
distance from float32 is in the table: a fast wrong answer is no answer."""
import argparse, statistics, tempfile, time, warnings
from pathlib import Path
import torch
from common import gpt2, missing, options, ratio, swap_linears, table, take_turns, write
from switchable_llm.serving.lean import LiveStep, lean_tokens
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.packed import load_packed
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import make_switchable_

WIDTHS = 8,6,4
PROFILES = [Profile(f'w{w}{a and f"a{a}"}', Bits(w, a or None)) for a in ('', 8) for w in WIDTHS]

def packed_file(args, folder):
    "One file for all profiles, from the same weights as the float model."
    model = gpt2(args.layers)
    cfg = QuantConfig(codes='nested', act='per_token')
    make_switchable_(model, PROFILES, cfg, embedding=True, lm_head=True)
    add_adapters_(model, r=args.rank, dropout=0.)
    for l in model.switch.layers:
        for a in l.adapters.values(): torch.nn.init.normal_(a.b, std=1e-3)
    return freeze(model, folder/'model.safetensors')

def peers(args):
    "Other libraries' models: name -> model, or why not."
    def torchao(config):
        from torchao.quantization import quantize_
        m = swap_linears(gpt2(args.layers))
        quantize_(m, config)
        return m
    def quanto(w):
        from optimum.quanto import freeze, qint4, quantize
        m = swap_linears(gpt2(args.layers, torch.bfloat16))   # its kernels for CPU take bfloat16
        # its four-bit kernel takes rows in multiples of 16
        quantize(m, weights=w, exclude=['lm_head'] if w is qint4 else None)
        freeze(m)
        return m
    out = {'transformers bfloat16':lambda: gpt2(args.layers, torch.bfloat16)}
    if not missing('torchao'):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
        out |= {'torchao int8 weight-only':lambda: torchao(Int8WeightOnlyConfig()),
                'torchao int8 dynamic':lambda: torchao(Int8DynamicActivationInt8WeightConfig())}
    else: print('torchao:', missing('torchao'))
    if not missing('optimum'):
        from optimum.quanto import qint4, qint8
        out |= {'quanto int8, bfloat16':lambda: quanto(qint8),
                'quanto int4, bfloat16, float head':lambda: quanto(qint4)}
    else: print('optimum-quanto:', missing('optimum'))
    def dynamic():
        model = swap_linears(gpt2(args.layers))
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    return out | {'torch dynamic int8':dynamic}

def contestants(args, file):
    "name -> (logits of a prompt, run that many new tokens after that prompt)."
    def through_generate(model, profile=None):
        def set_profile():
            if profile: model.switch.profile = profile
        def logits(ids):
            set_profile()
            return model(ids).logits[0, -1].float()
        def run(ids, n):
            set_profile()
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                           do_sample=False, pad_token_id=0)
        return logits, run
    def through_lean(step, profile):
        def run(ids, n):
            packed.switch.profile = profile
            return list(lean_tokens(step, ids[0].tolist(), n))
        def logits(ids):
            packed.switch.profile,step.cache.length = profile,0
            return step.prompt(ids[0].tolist()).clone()
        return logits, run
    base,packed = gpt2(args.layers),load_packed(file)
    step = LiveStep(packed)
    out = {FLOAT:through_generate(base)}
    for name,make in (peers(args) if args.peers else {}).items():
        try: out[name] = through_generate(make())
        except Exception as e: print(f'{name}: left out: {type(e).__name__}: {str(e).splitlines()[0][:150]}')
    out |= {f'generate {p.name}':through_generate(packed, p.name) for p in PROFILES}
    return out | {f'lean {p.name}':through_lean(step, p.name) for p in PROFILES}

def bandwidth():
    "Bytes a second that all threads read together: the limit of decoding."
    x = torch.ones(2**28)                # 1 GiB, more than the caches
    times = []
    for _ in range(5):
        start = time.perf_counter()
        x.sum()
        times.append(time.perf_counter()-start)
    return x.numel()*4/min(times)

def bytes_per_token(packed):
    "What one token reads of the file at each width: planes, steps and sums of every product, its adapter."
    layers = [l for l in packed.switch.layers if l.multiplies]
    planes = {n:sum(getattr(l, n).numel() for l in layers) for n in ('high','middle','low')}
    rest = sum(8*l.n for l in layers)+sum(p.numel()*4 for l in layers for p in l.adapters['8'].parameters())
    return {8:sum(planes.values())+rest, 6:planes['high']+planes['middle']+rest, 4:planes['high']+rest}

FLOAT = 'transformers float32'

@torch.no_grad()
def main():
    p = options(__doc__)
    p.add_argument('--tokens', type=int, default=32, help='new tokens of a decoding run')
    p.add_argument('--start', type=int, default=8, help='tokens of its prompt')
    p.add_argument('--prompt', type=int, default=256, help='tokens of the long prompt')
    p.add_argument('--rounds', type=int, default=7, help='turns of each contestant')
    p.add_argument('--layers', type=int, default=12, help='blocks of the model')
    p.add_argument('--rank', type=int, default=8, help='rank of the adapters')
    p.add_argument('--threads', type=int, help='threads of PyTorch; by default its own choice')
    p.add_argument('--peers', action=argparse.BooleanOptionalAction, default=True, help='other libraries too')
    p.add_argument('--only', nargs='+', help=f'contestants beside {FLOAT!r}, by their names in the table')
    p.add_argument('--out', type=Path, help='folder for the record')
    args = p.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    warnings.filterwarnings('ignore')
    with tempfile.TemporaryDirectory() as folder:
        size,file = packed_file(args, Path(folder)),Path(folder)/'model.safetensors'
        made = contestants(args, file)
        made = {k:v for k,v in made.items() if k==FLOAT or not args.only or k in args.only}
        gen = torch.Generator().manual_seed(0)
        short,long = (torch.randint(50257, (1, n), generator=gen) for n in (args.start, args.prompt))
        right = made[FLOAT][0](long)
        limit = dict(bandwidth=bandwidth(), bytes=bytes_per_token(load_packed(file)))
        gap = {k:((logits(long)-right).norm()/right.norm()).item() for k,(logits,_) in made.items()}
        def all_runs(ids, n): return {k:(lambda run=run: run(ids, n)) for k,(_,run) in made.items()}
        decode = take_turns(all_runs(short, args.tokens), args.rounds)
        prompt = take_turns(all_runs(long, 1), args.rounds)
    print(f'GPT-2 of {args.layers} layers, batch 1, {torch.get_num_threads()} threads, medians of {args.rounds} '
          f'turns; {args.tokens} tokens after {args.start}; a prompt of {args.prompt}\n')
    def row(k): return (k, f'{args.tokens/statistics.median(decode[k]):.0f}', f'{1/ratio(decode, k, FLOAT):.2f}',
                        f'{1e3*statistics.median(prompt[k]):.0f}', f'{1/ratio(prompt, k, FLOAT):.2f}', f'{gap[k]:.2g}')
    table(['','tokens/s','x float32','prompt, ms','x float32','distance of logits'], map(row, made))
    shown = [f"{w} bits takes {1e3*b/limit['bandwidth']:.1f} ms" for w,b in limit['bytes'].items()]
    print(f"\nreading {limit['bandwidth']/1e9:.0f} GB/s; at that rate a token of {', '.join(shown)}")
    write(args.out, 'generate', args, dict(decode=decode, prompt=prompt, gap=gap, file=size, **limit))

if __name__=='__main__': main()
