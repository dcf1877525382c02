"""Trains a toy model: the body of the tests that start, kill or multiply processes.

As a script, under `accelerate launch`: `train_worker.py FOLDER OUT PHASE`, with PHASE `whole` (three policies, one uninterrupted run with dropout, and
one that stops in the middle) or `resume` (the stopped one goes on). Each process writes OUT/PHASE-RANK.pt."""
import hashlib, os, sys
from pathlib import Path
import torch
from accelerate.utils import set_seed
from switchable_llm.data import encode, load_model, tiny_squad
from switchable_llm.joint_training import Policy, TrainConfig, all_profiles, random_layers, random_profile, train
from switchable_llm.lora_routing import adapter_params, add_adapters_
from switchable_llm.quantizers import QuantConfig
from switchable_llm.switching import make_switchable_

NAMES = ('bw4','bw6','bw8')
POLICIES = dict(random_profile=lambda m: random_profile(NAMES, seed=3), random_layers=lambda m: random_layers(m, seed=3), all_profiles=lambda m: all_profiles(NAMES))

class Stopped(Exception):
    "Raised in the middle of a run."

def toy(folder, dropout=0.):
    "A switchable model with adapters, its tokenizer and questions; the same in every process."
    model,tok = load_model(folder)
    make_switchable_(model, NAMES, QuantConfig(act='per_token'))
    set_seed(0); add_adapters_(model, r=4, dropout=dropout)
    return model, tok, [encode(q, tok, 256) for q in tiny_squad(64)]

def settings(steps, **kw): return TrainConfig(**(dict(steps=steps, batch_size=4, accumulate=2, lr=1e-2, warmup=2, weight_decay=.1) | kw))

def watched(policy, seen):
    "The policy, with a digest of what it chose at each step in `seen`."
    def pick(step):
        profiles = policy(step)
        seen.append(hashlib.sha256(repr(profiles).encode()).hexdigest())
        return profiles
    return Policy(policy.name, pick, policy.settings)

def run(folder, policy, steps, dropout=0., checkpoint=None, every=2, stop_at=None, pause=None):
    "Train; returns the adapters, the profiles chosen and the curve."
    model,tok,data = toy(folder, dropout)
    seen = []
    def callback(step, curve):
        if pause: pause(step)
        if step==stop_at: raise Stopped
    try: result = train(model, data, watched(POLICIES[policy](model), seen), settings(steps), tok.pad_token_id, checkpoint=checkpoint, every=every, progress=False, callback=callback, cpu=True)
    except Stopped: result = dict(curve=[], processes=None)
    return dict(params={n:p.detach().clone() for n,p in adapter_params(model).items()}, seen=seen, curve=result['curve'], processes=result['processes'])

def main(folder, out, phase):
    out,todo = Path(out),{}
    if phase=='whole':
        for p in POLICIES: todo[p] = run(folder, p, 4)
        todo['dropout'] = run(folder, 'random_profile', 6, dropout=.1, checkpoint=out/'whole')
        run(folder, 'random_profile', 6, dropout=.1, checkpoint=out/'stopped', stop_at=2)
    else: todo['dropout'] = run(folder, 'random_profile', 6, dropout=.1, checkpoint=out/'stopped')
    torch.save(todo, out/f"{phase}-{os.environ['RANK']}.pt")
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()   # its threads must not outlive the interpreter

if __name__=='__main__': main(*sys.argv[1:])
