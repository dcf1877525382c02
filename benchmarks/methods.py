"""What groups and a rotation cost where it counts: tokens a second from one packed file, at each precision.

Run `python benchmarks/methods.py [--out results/benchmarks]`. SmolLM2's shape with random weights, embedding and head
at 8 bits, the lean loop. All contestants take turns in one process."""
import statistics, tempfile
from pathlib import Path
from common import options, table, take_turns, write
from rotation import llama, speaker
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import make_switchable_
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.quantizers import QuantConfig
from switchable_llm.serving.exports import freeze

BITS = 'w8','w4','w8a8','w6a6','w4a8','w4a4'
_GROUP = dict(weight='per_group', group_size=32)
METHODS = {'channel':{}, 'channel-rotated':dict(rotate=True), 'group':_GROUP, 'group-rotated':_GROUP | dict(rotate=True)}

def packed(path, layers, settings):
    model = llama(layers)
    make_switchable_(model, [Profile(b, b) for b in BITS], QuantConfig(act='per_token', **settings))
    add_adapters_(model, r=8, dropout=0.)
    return freeze(model, path, lm_head=8, embedding=8)

def main():
    p = options(__doc__)
    for k,v in dict(layers=30, rounds=9, tokens=32).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--out', help='folder for the record')
    args,results = p.parse_args(),{}
    with tempfile.TemporaryDirectory() as folder:
        sizes = {k:sum(packed(Path(folder)/k, args.layers, m).values()) for k,m in METHODS.items()}
        for bits in BITS:
            times = take_turns({k:speaker(Path(folder)/k, bits, args.tokens) for k in METHODS}, args.rounds)
            for k,t in times.items(): results[f'{k}, {bits}'] = dict(tokens_a_second=args.tokens/statistics.median(t), file=sizes[k])
    rows = [[b, *(f"{results[f'{k}, {b}']['tokens_a_second']:.0f}" for k in METHODS)] for b in BITS]
    table(['tokens a second', *METHODS], rows)
    write(args.out, 'methods', args, results)

if __name__=='__main__': main()
