"Trains gates under `accelerate launch`: `gates_worker.py FOLDER OUT`; each process writes OUT/RANK.pt."
import os, sys
from pathlib import Path
import torch
import train_worker
from switchable_llm.core.gates import BitBudget, add_gates_, gate_params, use_gates
from switchable_llm.joint_training import Objective, fixed_profile, train
from switchable_llm.lora_routing import adapter_params

def toy(folder, per='layer', dropout=0.):
    "The toy model of the training tests, with gates."
    model,tok,data = train_worker.toy(folder, dropout)
    add_gates_(model, per=per)
    return model, tok, data

def run(folder, per='layer', steps=4, dropout=0., checkpoint=None, callback=None, model=None, budget=5., **kw):
    "Train gates and adapters in the real loop; returns the model and the loop's result."
    m,tok,data = toy(folder, per, dropout)
    m = model or m
    with use_gates(m):
        cfg,objective = train_worker.settings(steps, lr=2e-3, **kw),Objective((BitBudget(budget),))
        result = train(m, data, fixed_profile('gates'), cfg, tok.pad_token_id, objective=objective,
                       checkpoint=checkpoint, every=2, callback=callback, **train_worker.QUIET)
    return m, result

def learnt(m): return {n:p.detach().clone() for n,p in (gate_params(m)|adapter_params(m)).items()}

def main(folder, out):
    m,r = run(folder, steps=3)
    torch.save(dict(params=learnt(m), processes=r['processes']), Path(out)/f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()   # its threads must not outlive the interpreter

if __name__=='__main__': main(*sys.argv[1:])
