"""Write the record that the live page shows beside its own model: a real one, trained as the arm `shared` of the study, asked
thirty questions of nbs/live/thirty.json at every profile. `live_answers.py --model MODEL --data DATA [--out runs]` trains it
first, or goes on where the study's records of that arm left their training."""
import argparse, dataclasses, json, sys
from pathlib import Path
from project import NBS, ROOT

sys.path.insert(0, str(ROOT))

import torch
from tqdm.auto import tqdm
from switchable_llm.core.switching import switch_of, use_profile
from switchable_llm.data.encoding import encode
from switchable_llm.data.squad_scores import em_f1
from switchable_llm.models.loading import load_model
from switchable_llm.profiles_eval import stop_ids
from switchable_llm.search.costs import profile_cost
from switchable_llm.study.arms import train_shared
from switchable_llm.study.records import PRESETS, save_record

MOST = 16   # tokens of an answer

@torch.no_grad()
def greedy(model, tokenizer, ids):
    "Likeliest tokens until the line ends: `[[text, probability], ...]`."
    stops,now,past,out = set(stop_ids(model, tokenizer)),torch.tensor([ids]),None,[]
    while len(out)<MOST:
        said = model(now, past_key_values=past, use_cache=True)
        past,p = said.past_key_values,said.logits[0,-1].float().softmax(-1)
        token = int(p.argmax())
        if token in stops: break
        out.append([tokenizer.decode([token]), round(float(p[token]), 4)])
        now = torch.tensor([[token]])
    return out

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ('model','data'): parser.add_argument(f'--{name}', required=True)
    parser.add_argument('--out', default='runs')
    args = parser.parse_args()
    preset = dataclasses.replace(PRESETS['smollm2'], model=args.model, data=args.data, ranges='calibrated')
    work = Path(args.out)/'progress'/preset.name/'arms'/f'shared-s{preset.seed}'
    model,tokenizer = train_shared(preset, args.out, work),load_model(preset.model)[1]
    asked = json.loads((NBS/'live'/'thirty.json').read_text(encoding='utf-8'))
    names = list(switch_of(model).profiles)
    for q in tqdm(asked):
        ids = list(encode(dict(q, answers=None), tokenizer).ids)
        q['said'] = {}
        for n in names:
            with use_profile(model, n): words = greedy(model, tokenizer, ids)
            text = ''.join(w for w,_ in words).strip()
            em,f1 = em_f1(text, q['answers'])
            q['said'][n] = dict(words=words, em=em, f1=round(f1, 4))
    cost = {n:profile_cost(model, n) for n in names}
    save_record(dict(preset=preset.name, experiment='live', name='shared', seed=preset.seed, config=dict(preset=dataclasses.asdict(preset)),
                     costs={n:dict(bytes=c.bytes, bops=c.bops) for n,c in cost.items()}, questions=asked), args.out)

if __name__=='__main__': main()
