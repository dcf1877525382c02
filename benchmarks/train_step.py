"""One training step of switchable LoRA against PEFT's LoRA, on GPT-2's shape: `python benchmarks/train_step.py [--dtype bfloat16] [--out FILE]`.

Random weights, random tokens, LoRA of rank 8 on `c_attn`, `c_proj` (both) and `c_fc`, dropout 0, AdamW, and one loop body for all: the model's own
loss (`labels`), on all tokens but the first, backward, optimizer step. `peft` has float weights; the others hold five calibrated profiles and draw one
for each step. The steps of the contestants alternate in one process, so that what else the machine does falls on all alike; the table gives medians."""
import argparse, json, platform, random, statistics, sys, time
from pathlib import Path
import peft, torch, transformers
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.quantizers import QuantConfig
from switchable_llm.switching import calibrate_, make_switchable_, switch_of

PROFILES = ('bw4','bw6','bw8','w4a8','mixed8648')
TARGETS = ['c_attn','c_proj','c_fc']

def base(args):
    torch.manual_seed(0)
    config = GPT2Config(n_layer=args.layers, n_positions=max(1024, args.length), embd_pdrop=0., attn_pdrop=0., resid_pdrop=0., use_cache=False)
    return GPT2LMHeadModel(config).to(getattr(torch, args.dtype))

def trainables(model):
    "The adapters, in float32 whatever the base is, and their optimizer."
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params: p.data = p.data.float()
    return params, torch.optim.AdamW(params, lr=2e-4, weight_decay=.01)

def with_peft(args, batch):
    model = get_peft_model(base(args), LoraConfig(r=8, lora_alpha=16, lora_dropout=0., target_modules=TARGETS, fan_in_fan_out=True, task_type='CAUSAL_LM')).train()
    return model, lambda: None

def with_switches(act, fused=False):
    def make(args, batch):
        model = base(args)
        make_switchable_(model, PROFILES, QuantConfig(act=act))
        if fused: model.switch.fused = True
        calibrate_(model, [batch])
        add_adapters_(model, r=8, alpha=16, dropout=0.)
        rng,switch = random.Random(0),switch_of(model)
        def draw(): switch.profile = rng.choice(PROFILES)
        return model.train(), draw
    return make

def stepper(make, args, batch):
    "A function that makes one step and returns its seconds."
    model,draw = make(args, batch)
    params,optimizer = trainables(model)
    def step():
        start = time.perf_counter()
        draw()
        loss = model(**batch, labels=batch['input_ids'], use_cache=False).loss
        loss.backward()
        optimizer.step(); optimizer.zero_grad(set_to_none=True)
        return time.perf_counter()-start
    return model, step, sum(p.numel() for p in params)

def change_time(model, n=2000):
    "Median microseconds of a change of profile, by name."
    switch,times,rng = switch_of(model),[],random.Random(1)
    for _ in range(n):
        p = rng.choice(PROFILES); start = time.perf_counter()
        switch.profile = p
        times.append(time.perf_counter()-start)
    return statistics.median(times)*1e6

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--steps', type=int, default=15, help='timed steps of each contestant')
    p.add_argument('--warmup', type=int, default=len(PROFILES)*2, help='steps before: the quantized weights are made and kept')
    p.add_argument('--batch', type=int, default=4, help='rows')
    p.add_argument('--length', type=int, default=256, help='tokens of a row')
    p.add_argument('--layers', type=int, default=12, help='blocks of the model')
    p.add_argument('--dtype', choices=['float32','bfloat16'], default='float32', help='type of the base weights')
    p.add_argument('--threads', type=int, help='threads of PyTorch; by default its own choice')
    p.add_argument('--only', nargs='+', help='contestants, by their names in the table')
    p.add_argument('--out', type=Path, help='write the times as a JSON record')
    args = p.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    makers = {'peft float':with_peft, 'per_tensor':with_switches('per_tensor'), 'per_token':with_switches('per_token')}
    if hasattr(switch_of(_tiny()), 'fused'): makers |= {f'{k} fused':with_switches(k, True) for k in ('per_tensor','per_token')}
    makers = {k:m for k,m in makers.items() if k=='peft float' or not args.only or k in args.only}
    ids = torch.randint(GPT2Config().vocab_size, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    made = {k:stepper(m, args, batch) for k,m in makers.items()}
    assert len({n for *_,n in made.values()} - {made['peft float'][2]*3})<=1, 'the adapters differ in size'   # three widths: three adapters
    for _ in range(args.warmup):
        for _,step,_ in made.values(): step()
    times,order = {k:[] for k in made},list(made)
    for i in range(args.steps):
        for k in order[i%len(order):]+order[:i%len(order)]:
            print(f'\rstep {i+1}/{args.steps}', end='', file=sys.stderr, flush=True)
            times[k].append(made[k][1]())
    print(file=sys.stderr)
    report(args, times, {k:change_time(m) for k,(m,*_) in made.items() if k!='peft float'})

def _tiny():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    make_switchable_(model, ['bw4'])
    return model

def report(args, times, changes):
    "A Markdown table, and the record."
    tokens,medians = args.batch*args.length,{k:statistics.median(v) for k,v in times.items()}
    print(f'GPT-2 of {args.layers} layers, {args.dtype}, batch {args.batch} x {args.length}, {torch.get_num_threads()} threads, medians of {args.steps} steps\n')
    print('| one training step | seconds | tokens/s | ratio to PEFT | change of profile, µs |\n|:--|--:|--:|--:|--:|')
    for k,t in medians.items():
        ratio = statistics.median(a/b for a,b in zip(times[k], times['peft float']))
        print(f"| {k} | {t:.3f} | {tokens/t:.0f} | {ratio:.2f} | {f'{changes[k]:.1f}' if k in changes else ''} |")
    if not args.out: return
    versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__, peft=peft.__version__)
    record = dict(settings={k:v for k,v in vars(args).items() if k!='out'}, threads=torch.get_num_threads(), versions=versions, seconds=times, change_microseconds=changes)
    args.out.write_text(json.dumps(record))

if __name__=='__main__': main()
