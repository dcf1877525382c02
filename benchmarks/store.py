"""What it costs to hold several precisions, and to change between them.

Run `python benchmarks/store.py [--out results/benchmarks]`. The model has GPT-2's shape and random weights,
and profiles of 4, 6 and 8 bits with an adapter each. Measured are: the time of a change (PEFT's
`set_adapter`, quantizing anew, and one assignment here, in training and packed); the bytes of weights held
ready for all three, and of the file; the time to load. A change is timed without the forward pass after it.
Where the work waits until that pass (quantizing anew), the difference of two passes is timed."""
import statistics, tempfile, time
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.models.checkpoints import load_switchable, save_switchable
from common import gpt2, options, table, write
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.packed import load_packed
from switchable_llm.quantizers import QuantConfig
from switchable_llm.core.switching import make_switchable_
from switchable_llm.search.costs import held_bytes

WIDTHS = 'bw4','bw6','bw8'

def seconds(f, n=1):
    "Median seconds of `n` calls."
    times = []
    for _ in range(n):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter()-start)
    return statistics.median(times)

def switchable(args, codes='nested', kernel='auto', ends=False):
    model = gpt2(args.layers)
    make_switchable_(model, WIDTHS, QuantConfig(codes=codes, act='per_token'), embedding=ends, lm_head=ends)
    add_adapters_(model, r=8, dropout=0.)
    model.switch.kernel = kernel
    return model

def run(model, p, ids=torch.zeros(1, 1, dtype=torch.long)):
    model.switch.profile = p
    model(ids)

def changes(args, packed):
    "Seconds of a change of precision."
    config = LoraConfig(r=8, target_modules=['c_attn','c_proj','c_fc'], fan_in_fan_out=True)
    peft = get_peft_model(gpt2(args.layers), config, adapter_name='bw4')
    for n in WIDTHS[1:]: peft.add_adapter(n, peft.peft_config['bw4'])
    names = list(WIDTHS)*args.rounds
    def assign(switch):
        def to(p): switch.profile = p
        return statistics.median(seconds(lambda: to(p)) for p in names*10)
    out = {'PEFT set_adapter':statistics.median(seconds(lambda: peft.set_adapter(n)) for n in names)}
    for kernel,what in dict(float='quantize anew, float arithmetic', auto='prepare anew, integer kernels').items():
        model = switchable(args, kernel=kernel)
        model.switch.keep = 1
        run(model, 'bw4')
        again = seconds(lambda: run(model, 'bw4'), 5)
        out[what] = statistics.median(seconds(lambda: run(model, n)) for n in names)-again
    model = switchable(args)
    return out | {'one assignment, in training':assign(model.switch), 'one assignment, packed':assign(packed.switch)}

def memory(args, packed):
    "Bytes of the weights of the blocks that are held ready for all widths, and that each reads."
    def ready(**kw):
        model = switchable(args, **kw)
        for p in WIDTHS: run(model, p)
        return sum(b for k,b in held_bytes(model).items() if k.startswith('ready'))
    layers = [l for l,s in zip(packed.switch.layers, packed.switch.sites) if s.layer is not None]
    planes = {n:sum(getattr(l, n).numel() for l in layers) for n in ('high','middle','low')}
    sums = [b for l in layers for k,b in l.named_buffers() if k.startswith('sums')]
    rest = 4*sum(t.numel() for t in (*sums, *(l.step for l in layers)))
    every = sum(planes.values())+rest
    return {'three float copies':ready(codes='independent', kernel='float'), 'training, integer kernels':ready(),
            'packed, all widths':every, 'packed, read at 8 bits':every,
            'packed, read at 6 bits':planes['high']+planes['middle']+rest,
            'packed, read at 4 bits':planes['high']+rest}

@torch.no_grad()
def main():
    p = options(__doc__)
    p.add_argument('--layers', type=int, default=12, help='blocks of the model')
    p.add_argument('--rounds', type=int, default=7, help='changes to each width')
    p.add_argument('--out', type=Path, help='folder for the record')
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        base = gpt2(args.layers)
        base.save_pretrained(folder/'base')
        model = switchable(args, ends=True)
        save_switchable(model, folder/'checkpoint')
        alone = {w:sum(freeze(model, folder/f'{w}.safetensors', [w]).values()) for w in WIDTHS}
        size = freeze(model, folder/'all.safetensors')
        def from_checkpoint(): load_switchable(folder/'checkpoint', GPT2LMHeadModel.from_pretrained(folder/'base'))
        load = {'packed file':seconds(lambda: load_packed(folder/'all.safetensors'), 5),
                'base model and checkpoint':seconds(from_checkpoint, 3)}
        packed = load_packed(folder/'all.safetensors')
        change,held = changes(args, packed),memory(args, packed)
    n = 0
    for b in base.transformer.h:
        n += sum(m.weight.numel() for m in (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj))
    print(f'GPT-2 of {args.layers} layers, {n/1e6:.1f} million weights in its blocks\n')
    def time_of(v): return f'{1e3*v:.2f} ms' if v>1e-3 else f'{1e6*v:.1f} µs'
    table(['change of precision','time'], [(k, time_of(v)) for k,v in change.items()])
    print()
    heads = ['weights of the blocks, for 4, 6 and 8 bits','MB','bytes a weight']
    table(heads, [(k, f'{v/1e6:.0f}', f'{v/n:.2f}') for k,v in held.items()])
    print()
    rows = [(f'{w} alone', f'{v/1e6:.1f}') for w,v in alone.items()]+[('all in one', f'{sum(size.values())/1e6:.1f}')]
    table(['file','MB'], rows+[(f'- {k}', f'{v/1e6:.2f}') for k,v in size.items()])
    print()
    table(['load','seconds'], [(k, f'{v:.2f}') for k,v in load.items()])
    write(args.out, 'store', args, dict(weights=n, change=change, held=held, alone=alone, file=size, load=load))

if __name__=='__main__': main()
