"""Make the embedded model: `OMP_NUM_THREADS=1 python scripts/train_tiny.py [FOLDER]`, by default `switchable_llm/tiny`.

It is trained by the project's own loop, in float, on invented questions only, in two lessons. The first, on questions of one
step, was the cell of `nbs/02_joint_training.ipynb` in the commit `FIRST`, from nothing; this script takes its weights out of git
(a shallow clone has no such commit). The second is here: names that share syllables, and questions of two steps. It took 15
minutes of one thread on a busy machine. It learns the names; at questions of two steps it still guesses. In the end it is given
outlier channels, which change nothing of what it computes. All is seeded; other processors and versions of torch round
otherwise, and their model is another one."""
import json, subprocess, sys, time, torch
from pathlib import Path
from safetensors.torch import load
from transformers import GPT2Config, GPT2LMHeadModel
from switchable_llm.data.embedded import tiny_squad, tiny_tokenizer
from switchable_llm.data.encoding import encode
from switchable_llm.joint_training import train
from switchable_llm.training.settings import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
SEED = 1
OUTLIERS = {1:128., 2:64., 3:128.}   # block -> factor of some channels that its MLP reads; powers of two, so nothing is rounded
FIRST = '160543a'   # the commit of the model that learnt the first lesson: one step, two to five facts, names unlike each other
STAGES = (   # most facts, share of two steps where there are enough, optimizer steps, schedule
    (6, .7, 4000, 'cosine'),)

def new_tiny_gpt2(tok):
    "An untrained GPT-2, with positions and half of the keys begun so that it learns to look for a token sooner."
    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(tok), n_positions=256, n_embd=128, n_layer=4, n_head=4, initializer_range=.08,
        resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., activation_function='gelu_pytorch_tanh',
        bos_token_id=tok.eos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id))
    at = torch.arange(256.)[:,None]*10000**(-torch.arange(0, 128, 2.)/128)
    model.transformer.wpe.weight.data = .05*torch.cat([at.sin(), at.cos()], 1)
    for b in model.transformer.h: b.attn.c_attn.weight.data[:,128:192] = b.attn.c_attn.weight.data[:,:64]
    return model

def add_outliers_(model, n=6, factors=OUTLIERS):
    "Multiply `n` channels of the norms before these MLPs, and what reads them by the inverse: the same function."
    gen,d = torch.Generator().manual_seed(0),model.config.n_embd
    for i,k in factors.items():
        block,ch = model.transformer.h[i],torch.randperm(d, generator=gen)[:n]
        for p in block.ln_2.parameters(): p.data[ch] *= k
        block.mlp.c_fc.weight.data[ch] /= k

def undo_first_outliers_(model, n=16, k=1/4):
    "The model of `FIRST` had others, in its norms and in the values of its attentions."
    gen,d = torch.Generator().manual_seed(0),model.config.n_embd
    for b in model.transformer.h:
        for norm,layer in ((b.ln_1, b.attn.c_attn), (b.ln_2, b.mlp.c_fc)):
            ch = torch.randperm(d, generator=gen)[:n]
            for p in norm.parameters(): p.data[ch] *= k
            layer.weight.data[ch] /= k
        ch = torch.randperm(d, generator=gen)[:n]
        for p in b.attn.c_attn.parameters(): p.data[..., 2*d+ch] *= k
        b.attn.c_proj.weight.data[ch] /= k

def first_lesson(tok):
    "The model of `FIRST`, without its outliers and with rows for new tokens."
    at = lambda name: subprocess.run(['git', 'show', f'{FIRST}:switchable_llm/tiny/{name}'], cwd=ROOT, check=True, stdout=-1).stdout
    old = json.loads(at('tokenizer.json'))['model']['vocab']
    weights,model = load(at('model.safetensors')),new_tiny_gpt2(tok)
    rows = weights['transformer.wte.weight']
    weights['transformer.wte.weight'] = torch.stack([rows[old[t]] if t in old else rows.mean(0)
                                                     for t in tok.convert_ids_to_tokens(range(len(tok)))])
    model.load_state_dict(weights, strict=False); model.tie_weights()
    undo_first_outliers_(model)
    return model

def train_tiny(tok, after=lambda model, stage, step: None):
    "The trained model, without outliers; `after` is called at each hundredth step."
    model = first_lesson(tok)
    for stage,(facts,two_step,steps,schedule) in enumerate(STAGES):
        items = [encode(q, tok) for q in tiny_squad(40*steps, seed=SEED+stage, max_facts=facts, two_step=two_step)]
        cfg = TrainConfig(steps=steps, schedule=schedule, batch_size=32, accumulate=1, lr=1e-3, warmup=100,
                          betas=(.9, .98), answer_weight=10., text_weight=1., seed=SEED)
        def callback(step, curve):
            if (step+1)%100==0: after(model, stage, step+1)
        train(model, items, cfg=cfg, pad_id=tok.pad_token_id, progress=False, callback=callback, cpu=True)
    return model.eval()

def right(model, tok, questions):
    "Share of questions whose answer is the likeliest at every token."
    found = 0
    for q in questions:
        e = encode(q, tok)
        with torch.no_grad(): out = model(torch.tensor([e.ids])).logits[0, e.prompt-1:-1].argmax(-1)
        found += tuple(out.tolist())==e.ids[e.prompt:]
    return found/len(questions)

def main(folder):
    tok,start = tiny_tokenizer(),time.time()
    asked = [tiny_squad(100, 'train', 99, two_step=t) for t in (0., 1.)]
    def after(model, stage, step):
        if step%500: return
        shares = ', '.join(f'{right(model, tok, a):.0%}' for a in asked)
        print(f'stage {stage}, step {step}, {time.time()-start:.0f} s: one step and both {shares}', flush=True)
    model = train_tiny(tok, after)
    add_outliers_(model)
    for part in (model, tok): part.save_pretrained(folder)

if __name__=='__main__': main(Path(*sys.argv[1:2] or [Path(__file__).resolve().parents[1]/'switchable_llm/tiny']))
