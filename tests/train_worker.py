"""Trains a toy model: the body of the tests that start, kill or multiply processes.

As a script, under `accelerate launch`: `train_worker.py FOLDER OUT PHASE`. PHASE is `whole` (gradients of three
policies and of questions without answers, one uninterrupted run with dropout, and one that stops in the middle) or `resume` (the
stopped one goes on). Each process writes OUT/PHASE-RANK.pt."""
import hashlib, os, sys
from contextlib import contextmanager
from pathlib import Path
import torch
from accelerate.utils import set_seed
from torch.optim.optimizer import register_optimizer_step_pre_hook
from switchable_llm.data.encoding import encode
from switchable_llm.models.loading import load_model
from switchable_llm.data.embedded import tiny_squad
from switchable_llm.joint_training import Policy, all_profiles, random_layers, random_profile, train
from switchable_llm.training.settings import TrainConfig
from switchable_llm.lora_routing import adapter_params, add_adapters_
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import make_switchable_

NAMES = ('bw4','bw6','bw8')
def policies(names, bits):
    return dict(
        random_profile=lambda m: random_profile(names, seed=3),
        random_layers=lambda m: random_layers(m, bits, seed=3),
        all_profiles=lambda m: all_profiles(names))
POLICIES = policies(NAMES, ('w4a4','w6a6','w8a8'))
# With float activations no code can flip where two processes add in another order than one: what is compared is a
# continuous function.
SMOOTH = [Profile(f'w{w}', Bits(w)) for w in (4, 6, 8)]
SMOOTH_POLICIES = policies(('w4','w6','w8'), ('w4','w6','w8'))
QUIET = dict(progress=False, cpu=True)   # how all tests train

# `--multi_gpu` is what makes accelerate start several processes on this machine; with `train(cpu=True)` they meet over
# gloo. `--cpu` alone starts one.
LAUNCH = ('-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no '
          '--dynamo_backend no --main_process_port 0').split()
HAS_GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()

class Stopped(Exception):
    "Raised in the middle of a run."

def questions(tok): return [encode(q, tok, 256) for q in tiny_squad(64)]

def toy(folder, dropout=0., profiles=NAMES, **kw):
    "A switchable model with adapters, its tokenizer and questions; the same in every process."
    model,tok = load_model(folder)
    make_switchable_(model, profiles, QuantConfig(act='per_token'))
    set_seed(0); add_adapters_(model, r=4, dropout=dropout, **kw)
    return model, tok, questions(tok)

def settings(steps, **kw):
    own = dict(batch_size=4, accumulate=2, lr=1e-2, warmup=2, weight_decay=.1)
    return TrainConfig(steps=steps, **own|kw)

def watched(policy, seen):
    "The policy, with a digest of what it chose at each step in `seen`."
    def pick(step):
        profiles = policy(step)
        seen.append(hashlib.sha256(repr(profiles).encode()).hexdigest())
        return profiles
    return Policy(policy.name, pick, policy.settings)

def learnt(model): return {n:p.detach().clone() for n,p in adapter_params(model).items()}

def run(folder, policy, steps, dropout=0., checkpoint=None, every=2, stop_at=None, pause=None, **kw):
    "Train; returns the adapters, the profiles chosen and the curve."
    model,tok,data = toy(folder, dropout)
    seen = []
    def callback(step, curve):
        if pause: pause(step)
        if step==stop_at: raise Stopped
    pick = watched(POLICIES[policy](model), seen)
    try: result = train(model, data, pick, settings(steps, **kw), tok.pad_token_id,
                        checkpoint=checkpoint, every=every, callback=callback, **QUIET)
    except Stopped: result = dict(curve=[], processes=None)
    return dict(params=learnt(model), seen=seen, curve=result['curve'], processes=result['processes'])

@contextmanager
def gradients(model):
    "What the optimizer is given: for each of its steps, parameter -> gradient."
    found = []
    def note(*_): found.append({n:p.grad.clone() for n,p in adapter_params(model).items() if p.grad is not None})
    hook = register_optimizer_step_pre_hook(note)
    try: yield found
    finally: hook.remove()

def smooth(folder, policy, steps=4, without=(), **kw):
    "Gradients of each step of a run that moves nothing; the questions in `without` have no answer."
    model,tok,data = toy(folder, profiles=SMOOTH)
    gen = torch.Generator().manual_seed(0)
    for p in adapter_params(model).values(): torch.nn.init.normal_(p, std=.1, generator=gen)
    data = [e._replace(ids=e.ids[:e.prompt]) if i in without else e for i,e in enumerate(data)]
    seen,start = [],learnt(model)
    cfg = settings(steps, **(dict(lr=1e-30, warmup=0, clip=None) | kw))
    pick = watched(SMOOTH_POLICIES[policy](model), seen)
    with gradients(model) as found: result = train(model, data, pick, cfg, tok.pad_token_id, **QUIET)
    assert all(torch.equal(p, start[n]) for n,p in adapter_params(model).items())
    return dict(gradients=found, seen=seen) | result

# Every batch of two has rows of both, of one process, or none with an answer.
SPARSE = dict(policy='random_profile', steps=16, without=range(0, 44), batch_size=2, accumulate=1)

def main(folder, out, phase):
    out,todo = Path(out),{}
    if phase=='whole':
        for p in POLICIES: todo[p] = smooth(folder, p)
        todo['sparse'] = smooth(folder, **SPARSE)
        todo['dropout'] = run(folder, 'random_profile', 6, dropout=.1, checkpoint=out/'whole')
        run(folder, 'random_profile', 6, dropout=.1, checkpoint=out/'stopped', stop_at=2)
    else: todo['dropout'] = run(folder, 'random_profile', 6, dropout=.1, checkpoint=out/'stopped')
    torch.save(todo, out/f"{phase}-{os.environ['RANK']}.pt")
    # The group's threads must not outlive the interpreter.
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()

if __name__=='__main__': main(*sys.argv[1:])
