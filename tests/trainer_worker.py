"""Trains a toy model as other tools do: the body of the tests that start several processes.

As a script, under `accelerate launch`: `trainer_worker.py FOLDER OUT`. Each process writes OUT/RANK.pt, with what `trained`
(transformers' Trainer) and `sharded` (FSDP2) return; both run in one process too."""
import os, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import added_params, make_switchable_, use_profile
from switchable_llm.data.embedded import tiny_squad
from switchable_llm.data.encoding import collate, encode
from switchable_llm.joint_training import random_profile, train
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.models.loading import load_model
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.training.callback import SwitchCallback

# With float activations no code can flip where two processes add in another order than one.
SMOOTH = [Profile(f'w{w}', Bits(w)) for w in (4, 6, 8)]
POLICY = random_profile([p.name for p in SMOOTH], 3)

def toy(folder, profiles=SMOOTH):
    "A switchable model with adapters that do something, and batches of 8 questions; the same in every process."
    model,tok = load_model(folder)
    make_switchable_(model, profiles, QuantConfig(act='per_token'))
    torch.manual_seed(0); add_adapters_(model, r=4, dropout=0.)
    for p in added_params(model).values(): torch.nn.init.normal_(p, std=.1)
    return model, tok, [encode(q, tok, 256) for q in tiny_squad(64)]

def whole(p): return (p.full_tensor() if hasattr(p, 'full_tensor') else p).detach().clone()

def trained(folder, out, processes=1, **kw):
    "Losses, gradient norms, profiles and adapters after six steps of Trainer."
    model,tok,data = toy(folder)
    args = TrainingArguments(str(out), per_device_train_batch_size=4//processes, gradient_accumulation_steps=2, max_steps=6,
        warmup_steps=2, learning_rate=1e-2, weight_decay=.1, optim='adamw_torch', train_sampling_strategy='sequential',
        use_cpu=True, report_to=[], logging_steps=1, save_strategy='no', disable_tqdm=True, remove_unused_columns=False, **kw)
    t = Trainer(model, args, train_dataset=data, data_collator=lambda rows: collate(rows, tok.pad_token_id),
                callbacks=[SwitchCallback(POLICY)])
    t.train()
    history = [h for h in t.state.log_history if 'loss' in h]
    return dict(losses=[h['loss'] for h in history], norms=[float(h['grad_norm']) for h in history],
                profiles=[h['profile'] for h in history], learnt={n:whole(p) for n,p in added_params(model).items()})

def sharded(folder, profiles=SMOOTH, rank=0, processes=1):
    "The same of a loop of one's own, in which each process holds a part of the model and sees a part of the rows."
    model,tok,data = toy(folder, profiles)
    names = [p if isinstance(p, str) else p.name for p in profiles]
    if processes>1:
        mesh = init_device_mesh('cpu', (processes,))
        for block in model.transformer.h: fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert hasattr(model.switch.layers[0].weight, 'full_tensor'), 'the base is in parts'
    optimizer,losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2),[]
    for step in range(6):
        batch = collate(data[8*step:8*step+8], tok.pad_token_id)
        mine = {k:v[rank::processes] for k,v in batch.items()}
        share = processes*(mine['labels'][:, 1:]>=0).sum()/(batch['labels'][:, 1:]>=0).sum()   # FSDP takes the mean
        with use_profile(model, names[step%len(names)]): loss = model(**mine, use_cache=False).loss*share
        loss.backward()
        kept = [l for l in model.switch.layers if l._weights and hasattr(l.weight, 'full_tensor')]
        assert not kept, 'a whole weight was kept of a part'
        optimizer.step(); optimizer.zero_grad()
        loss = loss.detach()/processes
        if processes>1: dist.all_reduce(loss)
        losses.append(loss.item())
    if processes>1:
        try: train(model, data, POLICY, cpu=True)
        except ValueError as e: assert 'sharded' in str(e)
        else: raise AssertionError('our loop took a part for the whole')
    return dict(losses=losses, learnt={n:whole(p) for n,p in added_params(model).items()})

def main(folder, out):
    rank,n = int(os.environ['RANK']),int(os.environ['WORLD_SIZE'])
    todo = dict(plain=trained(folder, out, n), checkpointing=trained(folder, out, n, activation_checkpointing=True),
                sharded=sharded(folder, rank=rank, processes=n), int8=sharded(folder, ('bw8','bw4'), rank, n))
    torch.save(todo, Path(out)/f'{rank}.pt')
    dist.destroy_process_group()   # its threads must not outlive the interpreter

if __name__=='__main__': main(*sys.argv[1:])
