"The `switchable-llm` command in processes that have imported it already: what a shell sees of it, without the seconds of a start."
import multiprocessing as mp, os, sys
from pathlib import Path
import torch
from switchable_llm.cli import main

TESTS = Path(__file__).parent
STREAMS = (('stdin', os.O_RDONLY, 'r'), ('stdout', os.O_WRONLY, 'w'), ('stderr', os.O_WRONLY, 'w'))

def run_here(argv, cwd, env, streams):
    "Body of a child: the command, in a folder, with an environment and a file for each stream."
    os.chdir(cwd)
    os.environ.clear(); os.environ.update(env)
    for fd,(name,flags,mode) in enumerate(STREAMS):
        os.dup2(os.open(streams/name, flags), fd)
        setattr(sys, name, open(fd, mode, encoding='utf-8', closefd=False))
    torch.set_num_threads(1)
    sys.argv = ['switchable-llm', *argv]
    sys.exit(main(argv))

def server(env):
    "A server of processes, which imports before it forks. The first call starts it."
    ctx,old = mp.get_context('forkserver'),os.environ.get('PYTHONPATH')
    ctx.set_forkserver_preload(['command'])
    os.environ['PYTHONPATH'] = os.pathsep.join([env['PYTHONPATH'], str(TESTS)])
    try: mp.forkserver.ensure_running()
    finally:
        if old is None: del os.environ['PYTHONPATH']
        else: os.environ['PYTHONPATH'] = old
    return ctx

def run(argv, cwd, env, streams, stdin=''):
    "Run the command to its end; status, stdout, stderr."
    streams.mkdir(exist_ok=True)
    for name,text in (('stdin', stdin), ('stdout', ''), ('stderr', '')): (streams/name).write_text(text, encoding='utf-8')
    p = server(env).Process(target=run_here, args=([str(a) for a in argv], cwd, env, streams))
    p.start(); p.join()
    return p.exitcode, *((streams/n).read_text(encoding='utf-8') for n in ('stdout','stderr'))
