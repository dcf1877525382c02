"""What a rotation costs: a training step and a decoded token, with and without.

Run `python benchmarks/rotation.py [--out results/benchmarks]`. Two shapes with random weights, of GPT-2 and of SmolLM2
(Llama, 576 wide, 1536 inner, so Hadamard matrices of 36 and 12 rows take part). Both have adapters of rank 8, ranges
per token, and rotation in no layer or in all inside blocks. Steps and tokens alternate in one process; shares are
medians of neighbours."""
import statistics, tempfile
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from common import gpt2, options, ratio, table, take_turns, write
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import make_switchable_
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.quantizers import QuantConfig
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.lean import LiveStep
from switchable_llm.serving.packed import load_packed

BITS = 'w8a8','w4a8','w4'
ROTATE = {'plain':False, 'rotated':True}

def llama(layers):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True)).eval()

SHAPES = dict(gpt2=(gpt2, 12), smollm2=(llama, 30))

def adapted(make, layers, rotate):
    model = make(layers)
    make_switchable_(model, [Profile(b, b) for b in BITS], QuantConfig(act='per_token', rotate=rotate))
    add_adapters_(model, r=8, dropout=0.)
    return model

def stepper(model, args, bits):
    model.switch.profile = bits
    params = [p for p in model.train().parameters() if p.requires_grad]
    ids = torch.randint(1000, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(params, lr=2e-4)
    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step

def speaker(path, bits, tokens):
    model = load_packed(path)
    model.switch.profile = bits
    step = LiveStep(model)
    def speak():
        step.cache.begin()
        step.prompt([5]*16)
        for i in range(tokens): step(i+1)
    return speak

def main():
    p = options(__doc__)
    p.add_argument('--shapes', nargs='+', default=list(SHAPES), choices=list(SHAPES))
    p.add_argument('--layers', type=int, help='blocks, by default all of the shape')
    for k,v in dict(batch=4, length=128, rounds=7, tokens=32).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--out', help='folder for the record')
    args,results = p.parse_args(),{}
    for shape in args.shapes:
        make,layers = SHAPES[shape]
        models = {k:adapted(make, args.layers or layers, r) for k,r in ROTATE.items()}
        with tempfile.TemporaryDirectory() as folder:
            for k,m in models.items(): freeze(m, Path(folder)/k, lm_head=8, embedding=8)
            for bits in BITS:
                steps = {k:stepper(m, args, bits) for k,m in models.items()}
                words = {k:speaker(Path(folder)/k, bits, args.tokens) for k in models}
                for what,runs,rounds,per in (('step', steps, args.rounds, 1), ('token', words, 3*args.rounds, args.tokens)):
                    times = take_turns(runs, rounds)
                    seconds = {k:statistics.median(t)/per for k,t in times.items()}
                    results[f'{shape}, {bits}, {what}'] = seconds | dict(ratio=ratio(times, 'rotated', 'plain'))
    rows = [(k, *(f'{1e3*r[n]:.2f} ms' for n in ROTATE), f"{r['ratio']-1:+.1%}") for k,r in results.items()]
    table(['', *ROTATE, 'more'], rows)
    write(args.out, 'rotation', args, results)

if __name__=='__main__': main()
