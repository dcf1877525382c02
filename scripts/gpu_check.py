"""What has to run on a GPU, in a few minutes; nothing is assumed of it but PyTorch and the package's needs.

    python scripts/gpu_check.py parts                       every stage of the product, with the embedded model
    python scripts/gpu_check.py speed MODEL DATA [--copies N]  steps a second, launches a step, alone and side by side

Each part prints one line: what it found, or the fault. The exit status is the number of faults."""
import argparse, sys, tempfile, time, traceback
from dataclasses import replace
from multiprocessing import get_context
import torch
from torch.profiler import ProfilerActivity, profile
from switchable_llm.adversarial import ATTACKS, adaptive, allowed_tokens, flip_tokens, perturbation, row_scores, white_box
from switchable_llm.core.calibration import calibrate_
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import make_switchable_, use_profile
from switchable_llm.data.encoding import collate, encode
from switchable_llm.joint_training import fixed_profile, random_profile, train
from switchable_llm.lora_routing import add_adapters_, export_peft
from switchable_llm.models.checkpoints import load_switchable, save_switchable
from switchable_llm.models.loading import load_model
from switchable_llm.profiles_eval import answer, evaluate, perplexity
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.search.gptq import quantize_
from switchable_llm.search.sensitivity import Meter
from switchable_llm.search.strategies import strategy
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.packed import load_packed
from switchable_llm.study.arms import SECTIONS, run_arms
from switchable_llm.study.experiments import run_spans
from switchable_llm.study.records import PRESETS, environment
from switchable_llm.study.robustness import PLANS, run_robustness
from switchable_llm.study.runs import fit, run_joint, study_data, study_device, study_model, train_config

QUICK = replace(PRESETS['tiny'], steps=12, eval_n=24, calibration=2, train_n=400)
SMOOTH = [Profile('w8', Bits(8)), Profile('w4', Bits(4))]   # float activations: no code flips where sums differ

def made(device=None, profiles=('bw8','bw6','w4a8'), **settings):
    model,tokenizer = study_model(replace(QUICK, **dict(act='per_token', profiles=profiles) | settings), device=device)
    return model, tokenizer, *study_data(QUICK, tokenizer)[::2]

def scores():
    "Perplexities are the CPU's, and answers come out."
    model,tok,_,asked = made()
    model.switch.add(SMOOTH[0])
    here = perplexity(model, tok, asked).text
    with use_profile(model, 'w8'): w8 = perplexity(model, tok, asked).text
    model.cpu()
    there = perplexity(model, tok, asked).text
    with use_profile(model, 'w8'): w8_there = perplexity(model, tok, asked).text
    assert abs(here/there-1)<1e-4 and abs(w8/w8_there-1)<1e-3, (here, there, w8, w8_there)
    e = evaluate(model.to(study_device()), tok, asked[:8], ['bw8','w4a8'])
    return f'float {here:.4f} ({there:.4f}), w8 {w8:.4f} ({w8_there:.4f}), F1 {e["bw8"].summary["f1"].value:.2f}'

def trains(kernel, act):
    "Losses of twelve steps are those of float arithmetic on the CPU, as far as rounding lets them."
    ends = {}
    for device,k in (('cpu','float'), (None, kernel)):
        p = replace(QUICK, act=act, kernel=k, target='text', profiles=('bw8','bw6','w4a8'))
        model,tok = study_model(p, device='cpu' if device else None)
        data,_,_ = study_data(p, tok)
        if act=='per_tensor': calibrate_(model, [collate(data[:16], tok.pad_token_id)])
        cfg = train_config(p)
        torch.manual_seed(0); add_adapters_(model, r=4, dropout=0.)
        found = train(model, data, fixed_profile('bw8'), cfg, tok.pad_token_id, progress=False, cpu=bool(device))
        assert found['device'].split(':')[0]==(device or study_device().type), found['device']
        ends[device] = [c[1] for c in found['curve']]
    a,b = ends.values()
    gap = max(abs(x-y) for x,y in zip(a, b))
    assert gap<.05*max(a), (a, b)
    return f'largest difference {gap:.1e} of {a[0]:.3f} to {a[-1]:.3f}'

def routes():
    "All routes train; a width's own adapter moves at that width only."
    out = []
    for route in ('bits','shared','shared+bits'):
        model,tok,data,_ = made()
        _,r = fit(replace(QUICK, ranges='calibrated', act='per_token'), model, tok, data, 'equal_exposure', progress=False, route=route)
        out.append(f"{route} {r['curve'][-1][1]:.3f}")
    return ', '.join(out)

def resumes():
    "A run that was stopped ends with the same bits."
    with tempfile.TemporaryDirectory() as d:
        ends = []
        for stop in (None, 7):
            model,tok,data,_ = made()
            torch.manual_seed(0); add_adapters_(model, r=4)
            def die(step, curve):
                if step==stop: raise KeyboardInterrupt
            run = lambda callback=None: train(model, data, fixed_profile('bw6'), train_config(QUICK), tok.pad_token_id,
                                              checkpoint=f'{d}/{stop}', every=5, progress=False, callback=callback)
            try: run(die)
            except KeyboardInterrupt:
                model,tok,data,_ = made(); torch.manual_seed(0); add_adapters_(model, r=4); run()
            ends.append([p.detach().clone() for p in model.parameters()])
        assert all(map(torch.equal, *ends))
        return 'bit for bit'

def attacks():
    "FGSM, PGD, an adaptive attacker and token flips raise the loss."
    model,tok,data,asked = made()
    b = {k:v.to(study_device()) for k,v in collate([encode(q, tok) for q in asked[:8]], tok.pad_token_id).items()}
    out,keys = [],list(range(8))
    with use_profile(model, 'bw8'), torch.no_grad(): clean = row_scores(model, b)[0].mean().item()
    knows = adaptive(strategy('random_profile', ['bw8','bw6']), 2)
    for name,who in (('fgsm', white_box('bw8')), ('pgd', white_box('bw8')), ('pgd_l2', knows)):
        delta = perturbation(model, b, .2, replace(ATTACKS[name], steps=min(3, ATTACKS[name].steps)), who, keys)
        with use_profile(model, 'bw8'), torch.no_grad(): after = row_scores(model, b, delta)[0].mean().item()
        assert after>clean; out.append(f'{name} {after-clean:+.2f}')
    flipped = flip_tokens(model, b, 2, allowed_tokens(model, tok), white_box('bw8'), keys)
    assert (flipped!=b['input_ids']).any()
    return ', '.join(out)

def chosen_codes():
    "Chosen codes, groups, a rotation and a cache in few bits."
    out = []
    for cfg in (QuantConfig(act='per_token'), QuantConfig(act='per_token', weight='per_group', group_size=32, rotate=True)):
        model,tok = load_model('tiny')
        make_switchable_(model.to(study_device()), ['w4','w4a4','w8a8k8v4'], cfg)
        data,_,asked = study_data(QUICK, tok)
        with use_profile(model, 'w4'): before = perplexity(model, tok, asked).text
        quantize_(model, [collate(data[i:i+8], tok.pad_token_id) for i in range(0, 64, 8)])
        with use_profile(model, 'w4'): after = perplexity(model, tok, asked).text
        with use_profile(model, 'w8a8k8v4'): cached = perplexity(model, tok, asked).text
        out.append(f'w4 {before:.3f} to {after:.3f}, w8a8k8v4 {cached:.3f}')
    return '; '.join(out)

def files():
    "A checkpoint and a packed file of a model on the GPU, opened there again; an adapter for PEFT."
    model,tok,data,_ = made()
    add_adapters_(model, route='shared+bits', r=6)
    for l in model.switch.layers:
        for k in ('4','shared'): torch.nn.init.normal_(l.adapters[k].b, std=.02)
    ids = torch.tensor([data[0].ids], device=study_device())
    def logits(m, p):
        with torch.no_grad(), use_profile(m, p): return m(ids).logits
    with tempfile.TemporaryDirectory() as d:
        save_switchable(model, f'{d}/m', base='tiny')
        again = load_switchable(f'{d}/m', load_model('tiny')[0]).to(study_device())
        for p in ('bw8','w4a8'): assert torch.equal(logits(again, p), logits(model, p)), p
        freeze(model, f'{d}/m.packed', tokenizer=tok)
        packed = load_packed(f'{d}/m.packed', device=study_device().type)
        gaps = {p:((logits(packed, p)-logits(model, p)).norm()/logits(model, p).norm()).item() for p in ('bw8','w4a8')}
        assert max(gaps.values())<.05, gaps
        export_peft(model, 'shared', f'{d}/peft')
        with use_profile(packed, 'w4a8'): n = packed.generate(ids[:, :12], max_new_tokens=8, do_sample=False).shape[1]-12
    return f'packed differs by {max(gaps.values()):.1e}, {n} tokens generated'

def whole(name, run, **changes):
    def part():
        with tempfile.TemporaryDirectory() as d:
            records = run(replace(QUICK, **changes), d)
            return f'{len(records) if isinstance(records, list) else 1} records'
    part.__name__ = name
    return part

def meter():
    model,tok,data,_ = made()
    m = Meter(model, data[:16], tok.pad_token_id)
    return f'{float(m("bw8").sum()):.3f}'

SHORT = replace(PLANS['tiny'], questions=8, steps=2, restarts=1, rates=(.1,), radii=(.05,), draws=1, repeats=1)

def training(kernel, act):
    def part(): return trains(kernel, act)
    part.__name__ = f'trains, {kernel}, {act}'
    return part

PARTS = [scores, *(training(k, a) for k in ('auto','float','compiled') for a in ('per_token','per_tensor')),
         routes, resumes, attacks, chosen_codes, files, meter,
         whole('run_joint', lambda p, d: run_joint(p, d, progress=False)),
         *(whole(f'run_arms, {s}', lambda p, d, s=s: run_arms(p, s, d, answers=8, progress=False)) for s in SECTIONS),
         whole('run_spans', lambda p, d: run_spans(p, d, progress=False), eval_n=8, train_n=64),
         whole('run_robustness', lambda p, d: run_robustness(p, d, SHORT, ('joint','rpt'), progress=False))]

def run_parts(first, every):
    faults = 0
    for part in PARTS[first::every]:
        start = time.perf_counter()
        try: said = part()
        except Exception as e:
            faults += 1
            said = f'FAULT {type(e).__name__}: {e}'
            traceback.print_exc()
        print(f'{part.__name__}: {said} ({time.perf_counter()-start:.1f} s)', flush=True)
    return faults

def ready(args, kernel='compiled', dtype='float32', batch=8, seed=0, steps=40):
    "A model with adapters after its first steps, and what it takes to go on: (model, tokenizer, training data, questions, settings)."
    torch.set_float32_matmul_precision('high')
    p = replace(PRESETS['smollm2'], model=args.model, data=args.data, dtype=dtype, attention='sdpa', kernel=kernel,
                batch_size=batch, profiles=('bw8','bw6','w4a8'), train_n=800, eval_n=64, max_length=384, seed=seed)
    model,tok = study_model(p)
    data,_,asked = study_data(p, tok)
    torch.manual_seed(0); add_adapters_(model, route='shared', r=8, dropout=0.)
    cfg = train_config(p)
    train(model, data, random_profile(['bw8','bw6','w4a8']), replace(cfg, steps=steps), tok.pad_token_id, progress=False)
    return model, tok, data, asked, cfg

def speed_of(args, kernel, dtype, batch):
    start = time.perf_counter()
    model,tok,data,asked,cfg = ready(args, kernel, dtype, batch)
    torch.cuda.synchronize(); loaded = time.perf_counter()-start
    def run(n):
        train(model, data, fixed_profile('bw6'), replace(cfg, steps=n), tok.pad_token_id, progress=False)
        torch.cuda.synchronize()
    start = time.perf_counter(); run(60)
    seconds = (time.perf_counter()-start)/60
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof: run(3)
    kernels = [e for e in prof.key_averages() if e.device_type==torch.autograd.DeviceType.CUDA]
    busy,n = sum(e.self_device_time_total for e in kernels)/3e3,sum(e.count for e in kernels)/3
    print(f'{kernel}, {dtype}, batch {batch}: {seconds*1e3:.0f} ms a step, {n:.0f} launches of {busy:.1f} ms (with the making of weights); '
          f'ready in {loaded:.0f} s; {torch.cuda.max_memory_allocated()/1e9:.1f} GB', flush=True)
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:14]:
        print(f'    {e.self_device_time_total/3e3:7.2f} ms {e.count/3:7.0f} x {e.key[:100]}')
    ways = dict(likelihood=lambda: perplexity(model, tok, asked, 384), answers=lambda: answer(model, tok, asked, 384, 16, 65536))
    for what,score in ways.items():
        start = time.perf_counter()
        with use_profile(model, 'bw6'): score()
        print(f'    64 questions, {what}: {time.perf_counter()-start:.2f} s', flush=True)

def _copy(args, seed, barrier, out):
    torch.set_num_threads(1)
    model,tok,data,_,cfg = ready(args, seed=seed, steps=10)
    barrier.wait()
    start = time.perf_counter()
    train(model, data, fixed_profile('bw6'), replace(cfg, steps=40), tok.pad_token_id, progress=False)
    torch.cuda.synchronize()
    out.put(40/(time.perf_counter()-start))

def side_by_side(args, n):
    ctx = get_context('spawn'); barrier,out = ctx.Barrier(n),ctx.Queue()
    ps = [ctx.Process(target=_copy, args=(args, i, barrier, out)) for i in range(n)]
    for p in ps: p.start()
    rates = [out.get(timeout=240) for _ in ps]
    for p in ps: p.join()
    print(f'{n} side by side: {sum(rates):.1f} steps a second together', flush=True)

def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = a.add_subparsers(dest='what', required=True)
    c = sub.add_parser('parts', help='every K-th of them from the J-th, for several processes')
    c.add_argument('--share', type=int, nargs=2, default=(0, 1), metavar=('J','K'))
    s = sub.add_parser('speed')
    s.add_argument('model'); s.add_argument('data'); s.add_argument('--copies', type=int, nargs='*', default=[])
    s.add_argument('--alone', nargs='*', default=['compiled,float32,8'])
    args = a.parse_args()
    print(environment())
    if args.what=='parts': sys.exit(run_parts(*args.share))
    for how in args.alone: speed_of(args, *how.split(',')[:2], int(how.split(',')[2]))
    for n in args.copies: side_by_side(args, n)

if __name__=='__main__': main()
