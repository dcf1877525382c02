"""One training step of switchable LoRA against other ways to train LoRA, on GPT-2's shape.

Run `python benchmarks/train_step.py [--dtype bfloat16] [--growth] [--out results/benchmarks]`. All
contestants have random weights, random tokens, LoRA of rank 8 on `c_attn`, `c_proj` (both) and `c_fc`,
dropout 0, AdamW, and one loop body: the model's own loss (`labels`), backward, optimizer step.

`peft float` has float weights. The switchable models hold five calibrated profiles and draw one for each
step; their activation ranges are observed in every step (`switch.recording`). The others train PEFT's LoRA
over their own fake-quantized layers, all at 8-bit weights and activations; libraries that are not installed
are named and left out. The steps alternate in one process; ratios are medians of neighbours."""
import copy, itertools, random, statistics, time
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D
from common import gpt2, missing, options, ratio, swap_linears, table, take_turns, write
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.core.profiles import Profile
from switchable_llm.core.calibration import calibrate_
from switchable_llm.core.switching import kernel_report, make_switchable_, switch_of
from switchable_llm.search.costs import held_bytes

FLOAT = 'peft float'
MORE = (5,8),(7,8),(3,8),(5,5),(7,7)
PROFILES = ['bw4','bw6','bw8','w4a8','mixed8648', *(Profile(f'w{w}a{a}', Bits(w, a)) for w,a in MORE)]
TARGETS = ['c_attn','c_proj','c_fc']
GROWTH = dict(batch=(1,2,4,8), length=(64,256,512), layers=(2,6,12), profiles=(1,5,10), rank=(8,64))

def tokens(args):
    ids = torch.randint(50257, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids))

def base(args):
    return gpt2(args.layers, getattr(torch, args.dtype), n_positions=max(1024, args.length), use_cache=False)

def with_peft(change=lambda model,args: model):
    "PEFT's LoRA over what `change` makes of the model."
    def make(args):
        model = change(base(args), args)
        conv = any(isinstance(m, Conv1D) for m in model.modules())
        config = LoraConfig(r=args.rank, lora_alpha=16, lora_dropout=0., target_modules=TARGETS, fan_in_fan_out=conv,
                            task_type='CAUSAL_LM')
        return get_peft_model(model, config), lambda: None
    return make

def with_switches(act, codes='nested', kernel='auto'):
    def make(args):
        model,profiles = base(args),PROFILES[:args.profiles]
        make_switchable_(model, profiles, QuantConfig(act=act, codes=codes))
        calibrate_(model, [tokens(args)])
        add_adapters_(model, r=args.rank, alpha=16, dropout=0.)
        switch,rng = switch_of(model),random.Random(0)
        switch.kernel,switch.recording = kernel,True
        # each once, so that all weights are ready when timing begins; then by chance
        drawn = itertools.chain(profiles, iter(lambda: rng.choice(profiles), None))
        def draw(): switch.profile = next(drawn)
        return model, draw
    return make

def torchao_qat(model, args):
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    a = IntxFakeQuantizeConfig(torch.int8, 'per_token', is_symmetric=False)
    w = IntxFakeQuantizeConfig(torch.int8, 'per_channel')
    config = QATConfig(activation_config=a, weight_config=w, step='prepare')
    quantize_(swap_linears(model), config, filter_fn=lambda m,name: name.rpartition('.')[2] in TARGETS)
    return model

def quanto_qat(model, args):
    from optimum.quanto import Calibration, qint8, quantize
    quantize(swap_linears(model), weights=qint8, activations=qint8, include=[f'*.{t}' for t in TARGETS])
    with torch.no_grad(), Calibration(): model(**tokens(args))
    return model

def brevitas_qat(model, args):
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat
    def make(i, o):   # ranges are fixed after one step
        return QuantLinear(i, o, bias=True, weight_quant=Int8WeightPerChannelFloat,
                           input_quant=Int8ActPerTensorFloat, input_collect_stats_steps=1)
    return swap_linears(model, make)

PEERS = {'torchao QAT':('torchao', torchao_qat), 'optimum-quanto QAT':('optimum', quanto_qat),
         'brevitas':('brevitas', brevitas_qat)}
OWN = {'per_tensor':with_switches('per_tensor'),
       'per_token':with_switches('per_token'),
       'per_tensor, independent codes':with_switches('per_tensor', codes='independent'),
       'per_tensor, float arithmetic':with_switches('per_tensor', kernel='float'),
       'per_token, float arithmetic':with_switches('per_token', kernel='float')}

def contestants(only):
    "Name -> maker, of those that were asked for and are installed."
    found = {FLOAT:with_peft()} | OWN
    for k,(package,change) in PEERS.items():
        if only and k not in only: continue
        if why := missing(package): print(f'{k}: {why}')
        else: found[k] = with_peft(change)
    if only and (lost := set(only)-set(found)-set(PEERS)):
        raise SystemExit(f"--only {', '.join(lost)}: choose from {', '.join([*found, *PEERS])}")
    return {k:m for k,m in found.items() if k==FLOAT or not only or k in only}

def stepper(make, args):
    "A model, one step of it, and the sizes of its adapters' parameters."
    model,draw = make(args)
    params,batch = [p for p in model.train().parameters() if p.requires_grad],tokens(args)
    for p in params: p.data = p.data.float()   # float32 whatever the base is
    optimizer = torch.optim.AdamW(params, lr=2e-4, weight_decay=.01)
    def step():
        draw()
        model(**batch, labels=batch['input_ids'], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model, step, sum(p.numel() for p in params)

def measure(args, makers):
    "Models by name, and the seconds of their steps."
    made = {}
    for k,m in makers.items():
        try: made[k] = stepper(m, args)
        except Exception as e:
            if k not in PEERS: raise   # the others go on without it
            print(f'{k}: {type(e).__name__}: {str(e).splitlines()[0][:200]}')
    one = made[FLOAT][2]
    assert all(n%one==0 for *_,n in made.values()), 'the adapters differ in size'   # a bank holds one for each width
    times = take_turns({k:s for k,(_,s,_) in made.items()}, args.steps, max(3, args.profiles))
    return {k:m for k,(m,*_) in made.items()}, times

def change_time(model, n=2000):
    "Median microseconds of a change of profile, by name."
    switch,times,rng = switch_of(model),[],random.Random(1)
    names = [k for k in switch.profiles if k!='float']
    for _ in range(n):
        p = rng.choice(names)
        start = time.perf_counter()
        switch.profile = p
        times.append(time.perf_counter()-start)
    return statistics.median(times)*1e6

def compare(args):
    "The table of one setting, and its results."
    models,times = measure(args, contestants(args.only))
    own = {k:m for k,m in models.items() if k in OWN}
    changes,held = {k:change_time(m) for k,m in own.items()},{k:held_bytes(m) for k,m in own.items()}
    ratios = {k:ratio(times, k, FLOAT) for k in times}
    print(f'GPT-2 of {args.layers} layers, {args.dtype}, batch {args.batch} x {args.length}, rank {args.rank}, '
          f'{args.profiles} profiles, {torch.get_num_threads()} threads, medians of {args.steps} steps\n')
    def row(k):
        t = statistics.median(times[k])
        cells = [k, f'{t:.3f}', f'{args.batch*args.length/t:.0f}', f'{ratios[k]:.2f}']
        if k not in own: return cells+['', '']
        ready = sum(b for w,b in held[k].items() if w.startswith('ready'))
        return cells+[f'{changes[k]:.1f}', f'{ready/1e6:.0f}']
    heads = ['one training step','seconds','tokens/s','ratio to PEFT','change of profile, µs','weights held ready, MB']
    table(heads, map(row, times))
    kernels = {k:kernels_of(m) for k,m in own.items()}
    for k,report in kernels.items():
        print(f"\n{k}: {'; '.join(dict.fromkeys(why for r in report.values() for why in r))}")
    return dict(seconds=times, ratios=ratios, change_microseconds=changes, held_bytes=held, kernels=kernels)

def kernels_of(model):
    "Profile -> which kernel, or why none -> the number of layers."
    profiles = [p for p in switch_of(model).profiles if p!='float']
    return {p:{why:len(names) for why,names in kernel_report(model, p).items()} for p in profiles}

def grow(args):
    "How the ratio to PEFT changes with one setting at a time."
    makers = contestants(args.only or ['per_tensor','per_token'])
    out,names = [],[k for k in makers if k!=FLOAT]
    for axis,values in GROWTH.items():
        rows = []
        for v in values:
            here = copy.copy(args)
            setattr(here, axis, v)
            times = measure(here, makers)[1]
            ratios = {k:ratio(times, k, FLOAT) for k in times}
            out.append(dict(axis=axis, value=v, seconds=times, ratios=ratios))
            rows.append((v, *(f'{statistics.median(t):.3f}' for t in times.values()),
                         *(f'{ratios[k]:.2f}' if k in times else '' for k in names)))
        table([axis, *(f'{k}, s' for k in times), *(f'{k} / PEFT' for k in names)], rows)
        print(flush=True)
    return out

def main():
    p = options(__doc__)
    p.add_argument('--steps', type=int, default=5, help='timed steps of each contestant')
    p.add_argument('--batch', type=int, default=4, help='rows')
    p.add_argument('--length', type=int, default=256, help='tokens of a row')
    p.add_argument('--layers', type=int, default=12, help='blocks of the model')
    most = len(PROFILES)
    p.add_argument('--profiles', type=int, default=5, choices=range(1, most+1), metavar=f'1..{most}',
                   help='profiles that a switchable model draws from')
    p.add_argument('--rank', type=int, default=8, help='rank of the adapters')
    p.add_argument('--dtype', choices=['float32','bfloat16'], default='float32', help='type of the base weights')
    p.add_argument('--threads', type=int, help='threads of PyTorch; by default its own choice')
    p.add_argument('--only', nargs='+', help=f'contestants beside {FLOAT!r}, by their names in the table')
    p.add_argument('--growth', action='store_true',
                   help='vary batch, length, layers, profiles and rank, one at a time, instead')
    p.add_argument('--out', type=Path, help='folder for the record, a JSON file')
    args = p.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    results = grow(args) if args.growth else compare(args)
    write(args.out, f"train_{'growth' if args.growth else 'step'}_{args.dtype}", args, results)

if __name__=='__main__': main()
