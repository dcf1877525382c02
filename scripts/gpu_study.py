"""Arms of the study in the minutes that a GPU is lent: several processes on one device, one record an arm and seed.

    python scripts/gpu_study.py OUT --model MODEL --data DATA --sections routes cycles --seeds 0 1 2 --jobs 4 --seconds 480

Codes are chosen once, before the processes start. What is recorded already is not run again, so a second call goes on. An
arm is not begun where the longest one seen would not end in time.

Seen on an H100 (November 2026): 8 processes at once, each of 1,000 steps of 8 questions, did not end in 310 s, since the
device takes turns among processes; run `gpu_check.py speed` first, which says what one takes alone and several together."""
import argparse, time, traceback
from dataclasses import replace
from multiprocessing import get_context
from queue import Empty
import torch
from switchable_llm.study.arms import SECTIONS, run_arms, start
from switchable_llm.study.records import PRESETS

PRESET = replace(PRESETS['smollm2'], name='smollm2-gpu', dtype='float32', attention='sdpa', batch_size=8, kernel='compiled')

def worker(preset, args, jobs, end, longest):
    torch.set_num_threads(1); torch.set_float32_matmul_precision('high')
    while True:
        try: section,arm,seed = jobs.get(timeout=1)
        except Empty: return
        if time.time()+longest.value>end:
            print(f'{arm}, seed {seed}: left out, {end-time.time():.0f} s are left', flush=True); continue
        begun = time.time()
        try: run_arms(replace(preset, seed=seed), section, args.out, [arm], args.answers, False, lambda s: print(s, flush=True))
        except Exception as e:
            traceback.print_exc(); print(f'{arm}, seed {seed}: FAULT {type(e).__name__}: {e}', flush=True); continue
        longest.value = max(longest.value, time.time()-begun)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('out')
    for name in ('model','data'): p.add_argument(f'--{name}', default=getattr(PRESET, name))
    p.add_argument('--preset', choices=[*PRESETS, PRESET.name], default=PRESET.name)
    p.add_argument('--sections', nargs='+', choices=list(SECTIONS), default=['routes'])
    p.add_argument('--arms', nargs='+', help='only these')
    p.add_argument('--seeds', type=int, nargs='+', default=[0])
    for name,n in dict(jobs=2, seconds=480, answers=500, steps=PRESET.steps, batch_size=PRESET.batch_size).items():
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=n)
    args = p.parse_args()
    preset = PRESET if args.preset==PRESET.name else PRESETS[args.preset]
    own = {} if args.preset=='tiny' else dict(model=args.model, data=args.data, steps=args.steps, batch_size=args.batch_size)
    preset,ctx,end = replace(preset, **own),get_context('spawn'),time.time()+args.seconds
    start(preset, args.out)   # the codes of all
    jobs,longest = ctx.Queue(),ctx.Value('d', 0.)
    for seed in args.seeds:
        for section in args.sections:
            for arm in SECTIONS[section](preset):
                if not args.arms or arm in args.arms: jobs.put((section, arm, seed))
    ps = [ctx.Process(target=worker, args=(preset, args, jobs, end, longest)) for _ in range(args.jobs)]
    for q in ps: q.start()
    for q in ps: q.join(max(1, end+20-time.time()))
    for q in ps:
        if q.is_alive(): q.terminate()

if __name__=='__main__': main()
