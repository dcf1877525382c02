"""The study's most telling arms in the minutes that a GPU is lent: several processes on one device, one record an arm and seed.

    python scripts/gpu_study.py prepare MODEL DATA OUT [--rotate] [--weight per_group] [--chosen]   the model that all arms start from
    python scripts/gpu_study.py run OUT --arms float bits shared --seeds 0 1 2 --jobs 8 --seconds 480

All arms of a seed start from the same model and see the same questions in the same order. Scores are of questions that
nobody trained on: likelihoods of all, answers of 500. What is recorded already is not run again.

Seen on an H100 (November 2026): 8 processes at once, each of 1,000 steps of 8 questions, did not end in 310 s, since the
device takes turns among processes; run `gpu_check.py speed` first, which says what one takes alone and several together."""
import argparse, copy, time, traceback
from collections import Counter
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
import numpy as np
import torch
from accelerate.utils import set_seed
from switchable_llm.core.profiles import read_profiles
from switchable_llm.core.switching import make_switchable_, switch_of, use_profile
from switchable_llm.cpt import CycleConfig, SCHEDULES
from switchable_llm.data.encoding import encode
from switchable_llm.data.squad import load_squad
from switchable_llm.data.squad_scores import em_f1
from switchable_llm.joint_training import equal_exposure, fixed_profile, high_to_low, train, with_highest
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.models.checkpoints import base_hash
from switchable_llm.models.loading import load_model
from switchable_llm.profiles_eval import answer, perplexity, room_of
from switchable_llm.quantizers import QuantConfig
from switchable_llm.search.gptq import quantize_
from switchable_llm.study.methods import check_apart, method_texts
from switchable_llm.study.records import Preset, PRESETS, known_record, save_record
from switchable_llm.study.runs import OBJECTIVES, as_saved, study_device, train_config

PRESET = replace(PRESETS['smollm2'], name='smollm2-gpu', dtype='float32', attention='sdpa', batch_size=8, kernel='compiled',
                 weight='per_group', profiles=('bw8','bw6','w4a8','bw4'), eval_n=None)
RANK = 24          # of all adapters of a layer together, in every arm
CYCLE = CycleConfig(cycles=8, b_min=6, b_max=8)

@dataclass(frozen=True)
class Arm:
    "One way of training."
    route:str='shared'            # As `add_adapters_` takes it; 'float' for an adapter of the float model
    policy:str='equal_exposure'   # Or one of the schedules of cyclic training, or 'with_highest', 'none'
    objective:str='cross_entropy' # One of `OBJECTIVES`
    profiles:tuple|None=None      # That are trained; by default those that the model was prepared for
    steps:float=1.                # As a share of the preset's

    def ranks(self, widths):   # that come to `RANK` together
        if self.route=='bits': return dict(r=RANK//len(widths))
        if self.route=='shared+bits': return dict(r=RANK//2, own=RANK//2//len(widths))
        return dict(r=RANK)

ROUTES = {'float':Arm('float', 'fixed_float', profiles=('float',)), 'bits':Arm('bits'), 'shared':Arm('shared'),
          'shared+bits':Arm('shared+bits'), 'untrained':Arm('shared', 'none', steps=0.)}
CYCLES = {f'cpt-{s}':Arm('shared', s, profiles=('bw6','w7a7','bw8')) for s in ('static_high','static_low','random','cyclic')}
AIMS = {f'aim-{o}':Arm('shared', p, o, steps=.5) for o,p in (('kl_highest','with_highest'),('cross_entropy','with_highest'))}
ALONE = {f'alone-{p}':Arm('shared', f'fixed_{p}', profiles=(p,)) for p in ('bw8','bw6','w4a8','bw4')}
ARMS = ROUTES | CYCLES | AIMS | ALONE

def prepare(args):
    "Load, make switchable, choose codes; written whole, so that every process starts from the same."
    out = Path(args.out); out.mkdir(parents=True, exist_ok=True)
    preset = replace(PRESET, name=args.name, model=args.model, data=args.data, weight=args.weight, eval_seed=0,
                     batch_size=args.batch_size, kernel=args.kernel, profiles=tuple(args.profiles))
    check_apart(preset)   # before a model is loaded: nothing that chooses codes or trains is scored
    cfg = QuantConfig(act='per_token', weight=args.weight, group_size=32, rotate=tuple(args.sites) if args.sites else args.rotate)
    model,tok = load_model(preset.model, preset.dtype)
    model.to(study_device()).set_attn_implementation(preset.attention)
    make_switchable_(model, read_profiles([*args.profiles, *(p for p in args.also if p not in args.profiles)]), cfg)
    start = time.perf_counter()
    if args.chosen:
        texts = method_texts(preset, tok, 'train', 64, room_of(model, 512))
        quantize_(model, [dict(input_ids=torch.tensor([t.ids for t in texts[i:i+4]])) for i in range(0, len(texts), 4)],
                  tuple(args.widths))
    base = dict(name=Path(preset.model).name, dtype=preset.dtype, sha256=base_hash(model))
    torch.save(dict(model=model.cpu(), tokenizer=tok, quantizer=as_saved(cfg.to_dict()), chosen=list(args.widths)*args.chosen,
                    preset=asdict(preset), base=base), out/'start.pt')
    print(f'prepared in {time.perf_counter()-start:.0f} s', flush=True)

def opened(out):
    d = torch.load(Path(out)/'start.pt', weights_only=False)
    model = d['model'].to(study_device())
    model.switch.kernel = d['preset']['kernel']
    return model, d

def exposure(model, curve):
    "Steps that moved each adapter of the bank."
    used = Counter()
    for _,_,names,_ in curve:
        keys = {k for n in names.split('+') for s in switch_of(model).bound[n] if s.adapter for k in s.adapter.split('+')}
        used.update(keys)
    return dict(used)

def policy_of(arm, model, steps, seed):
    widths = [switch_of(model).bound[n][0].bits.w for n in arm.profiles]
    if arm.policy=='equal_exposure': return equal_exposure(arm.profiles, widths, seed)
    if arm.policy=='with_highest': return with_highest(high_to_low(model, arm.profiles), 1, seed)
    if arm.policy.startswith('fixed_'): return fixed_profile(arm.policy[6:])
    return SCHEDULES[arm.policy](model, steps, seed, CYCLE)

def run_arm(name, seed, model, d, data, asked, args):
    preset = Preset(**d['preset'] | dict(profiles=tuple(d['preset']['profiles'])))
    arm = replace(ARMS[name], profiles=ARMS[name].profiles or preset.profiles)
    preset = replace(preset, seed=seed, steps=round(args.steps*arm.steps))
    named = asdict(preset) | dict(model=Path(preset.model).name, data='squad')
    config = as_saved(dict(preset=named, arm=asdict(arm), rank=RANK, cycle=asdict(CYCLE), quantizer=d['quantizer'],
                           chosen=d['chosen'], questions=len(asked), answered=args.answers))
    if known := known_record(args.out, preset.name, 'arms', name, seed, config): return known
    model,tok,start = copy.deepcopy(model),d['tokenizer'],time.perf_counter()
    set_seed(seed)
    trained,policy = dict(curve=[], seconds=0., tokens=0, device=str(study_device())),None
    if arm.route=='float': add_adapters_(model, ['float'], r=RANK, alpha=2*RANK, dropout=0.)
    elif arm.steps:
        ranks = arm.ranks({switch_of(model).bound[p][0].bits.w for p in arm.profiles})
        add_adapters_(model, route=arm.route, alpha=2*ranks['r'], dropout=0., **ranks)
    if arm.steps:
        policy = policy_of(arm, model, preset.steps, seed)
        trained = train(model, data, policy, train_config(preset), tok.pad_token_id, objective=OBJECTIVES[arm.objective],
                        progress=False)
    quantized = [n for n in switch_of(model).profiles if n!='float']
    scored = ['float'] if arm.route=='float' else quantized if arm.steps else ['float', *quantized]
    scores = {p:score(model, tok, p, asked, args.answers, preset) for p in scored}
    settings = policy and as_saved({k:v for k,v in policy.settings.items() if k!='profiles'})
    curve = [[i, round(l, 4), n] for i,l,n,_ in trained['curve']]
    record = dict(preset=preset.name, experiment='arms', name=name, seed=seed, config=config, base=d['base'],
                  policy=policy and [policy.name, settings], exposure=exposure(model, trained['curve']),
                  parameters=sum(p.numel() for p in model.parameters() if p.requires_grad) if arm.steps else 0,
                  scores=scores, training={k:trained[k] for k in ('seconds','tokens','device')} | dict(curve=curve),
                  seconds=time.perf_counter()-start)
    if name=='untrained': record |= dict(ids=[q['id'] for q in asked], articles=[q['title'] for q in asked])
    save_record(record, args.out)
    if args.keep:
        adapters = {n:p.detach().cpu() for n,p in model.named_parameters() if '.adapters.' in n}
        torch.save(adapters, Path(args.out)/f'{name}-s{seed}.pt')
    means = ', '.join(f"{p} {np.sum(s['nll_answer'])/np.sum(s['n_answer']):.3f} {100*np.mean(s['f1']):.1f}" for p,s in scores.items())
    print(f"{name}, seed {seed}: trained {trained['seconds']:.0f} s of {record['seconds']:.0f}: {means}", flush=True)
    return record

def score(model, tok, profile, asked, answers, preset):
    with use_profile(model, profile):
        p = perplexity(model, tok, asked, preset.max_length)
        said = answer(model, tok, asked[:answers], preset.max_length, preset.max_new_tokens, 65536)
    em,f1 = zip(*(em_f1(s, q['answers']['text'], 'squad') for s,q in zip(said, asked)))
    return dict(nll_answer=[round(x, 4) for x in p.nll_answer], n_answer=list(p.n_answer),
                nll_text=[round(x, 2) for x in p.nll_text], n_text=list(p.n_text), em=[int(x) for x in em], f1=[round(x, 4) for x in f1])

def questions(d, args):
    preset = Preset(**d['preset'])
    asked = load_squad(preset.data, 'validation', args.questions, 0)
    long = [encode(q, d['tokenizer'], 10**6) for q in load_squad(preset.data, 'train', None, 0)]
    return [e for e in long if len(e.ids)<=preset.max_length], asked

def worker(i, args, jobs, end, lasts):
    torch.set_num_threads(1); torch.set_float32_matmul_precision('high')
    model,d = opened(args.out)
    data,asked = questions(d, args)
    while True:
        try: name,seed = jobs.get(timeout=1)
        except Exception: return
        longest = lasts.value*ARMS[name].steps if ARMS[name].steps else 0
        if time.time()+longest>end:
            print(f'{name}, seed {seed}: left out, {end-time.time():.0f} s are left', flush=True); continue
        start = time.time()
        try: run_arm(name, seed, model, d, data, asked, args)
        except Exception as e:
            traceback.print_exc()
            print(f'{name}, seed {seed}: FAULT {type(e).__name__}: {e}', flush=True)
            continue
        if ARMS[name].steps: lasts.value = max(lasts.value, (time.time()-start)/ARMS[name].steps)

def run(args):
    ctx,end = get_context('spawn'),time.time()+args.seconds
    jobs,lasts = ctx.Queue(),ctx.Value('d', 0.)
    for job in [(a, s) for s in args.seeds for a in args.arms]: jobs.put(job)
    ps = [ctx.Process(target=worker, args=(i, args, jobs, end, lasts)) for i in range(args.jobs)]
    for p in ps: p.start()
    for p in ps: p.join(max(1, end+20-time.time()))
    for p in ps:
        if p.is_alive(): p.terminate()
    print(f'{len(list(Path(args.out).glob("*/*/*.json")))} records', flush=True)

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = a.add_subparsers(dest='what', required=True)
    p,r = sub.add_parser('prepare'),sub.add_parser('run')
    for name in ('model','data','out'): p.add_argument(name)
    r.add_argument('out')
    for name in ('--rotate','--chosen'): p.add_argument(name, action='store_true')
    p.add_argument('--profiles', nargs='+', default=PRESET.profiles, help='that are trained and scored')
    p.add_argument('--also', nargs='*', default=('w7a7','mixed8648'), help='profiles that are scored')
    p.add_argument('--widths', nargs='+', type=int, default=(4, 6, 8), help='that codes are chosen for')
    p.add_argument('--sites', nargs='*')
    for name in ('weight','batch_size','kernel','name'):
        p.add_argument(f'--{name}', default=getattr(PRESET, name), type=type(getattr(PRESET, name)))
    r.add_argument('--arms', nargs='+', default=list(ROUTES), choices=list(ARMS), metavar='ARM')
    r.add_argument('--seeds', type=int, nargs='+', default=[0])
    for name,n in dict(jobs=2, seconds=480, steps=PRESET.steps, questions=None, answers=500).items():
        r.add_argument(f'--{name}', type=int, default=n)
    r.add_argument('--keep', action='store_true')
    args = a.parse_args()
    dict(prepare=prepare, run=run)[args.what](args)

if __name__=='__main__': main()
