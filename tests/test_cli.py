"""The command: most of it by its function, in this process; as a shell sees it where a process is what is tested.

One training, one run and one packed file are shared: the tests read them, and write elsewhere."""
import argparse, io, json, os, re, shlex, signal, subprocess, sys, time
from dataclasses import fields
from pathlib import Path
import pytest
from safetensors import SafetensorError
from conftest import heed_ctrl_c
from switchable_llm.apps import commands as module
from switchable_llm.apps.cli import COMMANDS as ALL, main, make_parser, missing_package, one_line
from switchable_llm.apps.options import GROUPS
from switchable_llm.data.embedded import tiny_squad
from switchable_llm.study.arms import SECTIONS
from switchable_llm.study.methods import METHODS
from switchable_llm.study.records import PRESETS, Preset
from switchable_llm import __version__
from switchable_llm.system import progress
from switchable_llm.system.files import claim
from switchable_llm.system.native import library
from switchable_llm.study.runs import NUMBERS, WORDS

COMMAND = Path(sys.executable).with_name('switchable-llm')
installed = pytest.mark.skipif(not COMMAND.exists(), reason='the package is not installed')
SHORT = '--steps 4 --batch-size 4 --train-n 40 --profiles bw4 mixed8648'.split()
STUDY = [*SHORT, '--calibration', '2', '--calibration-size', '4']   # with options that only `run` and `experiment` have
CODE = 'import sys; from switchable_llm.apps.cli import main; sys.exit(main(sys.argv[1:]))'
ASK = ['--question', 'Who?', '--context', 'Bemola was born in 1834.']
MIX = ['--mix', 'w4a4', 'w6a8', '--unseen', 1]

@pytest.fixture
def cli(monkeypatch, tmp_path, capsys):
    "Run the command in an empty folder; status, stdout, stderr."
    monkeypatch.chdir(tmp_path)
    def run(*argv, stdin=''):
        monkeypatch.setattr(sys, 'stdin', io.StringIO(stdin))
        capsys.readouterr()
        status = main([str(a) for a in argv])
        return status, *capsys.readouterr()
    return run

@pytest.fixture
def refused(cli, tmp_path):
    "A command that ends with one line, and leaves everything as it was."
    def run(*argv, says, status=1):
        def state(): return {p:(p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob('*')}
        before = state()
        got,out,err = cli(*argv)
        assert (got, out)==(status, '') and 'Traceback' not in err, (got, out, err)
        if status==1: assert err.startswith('error: ') and err.count('\n')==1, err
        for s in [says] if isinstance(says, str) else says: assert s in err, err
        assert state()==before
    return run

@pytest.fixture(scope='module')
def mine(tmp_path_factory, toy_folder):
    "A checkpoint, and the packed file of it."
    folder = tmp_path_factory.mktemp('trained')
    train = ['train', '--model', toy_folder, *SHORT, '--act', 'per_token', '--quiet', '--out', folder/'mine']
    assert main([*train])==0
    packed = ['--out', str(folder/'mine.safetensors'), '--embedding', '8', '--lm-head', '8']
    assert main(['freeze', str(folder/'mine'), *packed])==0
    return folder

@pytest.fixture(scope='module')
def runs(tmp_path_factory, toy_folder):
    "What `run` writes, and what it said."
    folder = tmp_path_factory.mktemp('run')
    out,err = folder/'out',folder/'err'
    with open(out, 'w') as o, open(err, 'w') as e, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'stdout', o); patch.setattr(sys, 'stderr', e)
        how = [*STUDY, '--eval-n', '12', '--no-ablation', '--out', str(folder/'runs')]
        status = main(['run', '--model', str(toy_folder), *how])
    assert status==0, err.read_text()
    return folder, out.read_text(), err.read_text()

# --- what it says of itself ---------------------------------------------------------------------------------------

@installed
def test_the_installed_command(child_env, tmp_path):
    p = subprocess.run([COMMAND, 'presets'], cwd=tmp_path, env=child_env, capture_output=True, text=True, timeout=600)
    assert (p.returncode, p.stderr)==(0, '')
    table = dict(re.split(r'\s{2,}', l, maxsplit=1) for l in p.stdout.splitlines())
    assert table['setting'].split()==['tiny','smollm2','gpt2']
    assert table['act'].split()==['per_tensor','per_token','per_tensor']

@pytest.mark.skipif(os.name!='posix', reason='needs a shell')
def test_a_closed_pipe_is_no_traceback(child_env):
    line = f"{sys.executable} -c '{CODE}' presets | true"
    p = subprocess.run(line, shell=True, env=child_env, capture_output=True, text=True, timeout=600)
    assert 'Traceback' not in p.stderr and 'Error' not in p.stderr

def commands(parser, path=()):
    "Every command with its parser."
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name,p in action.choices.items():
                yield ' '.join((*path, name)),p.filled()
                yield from commands(p, (*path, name))

COMMANDS = dict(commands(make_parser()))

def test_the_commands(cli):
    verbs = ('run train experiment evaluate answer generate lm-eval profiles presets quantize freeze export check kernels '
             'serve explore').split()
    assert set(ALL)==set(verbs) and set(COMMANDS)=={*verbs, *(f'profiles {c}' for c in ('list','show','check'))}
    status,out,err = cli('--help')
    assert (status, err)==(0, '') and all(c in out for c in COMMANDS if ' ' not in c)

@pytest.mark.parametrize('command', COMMANDS)
def test_every_help_has_an_example_and_says_what_each_option_is(command, cli):
    status,out,err = cli(*command.split(), '--help')
    assert (status, err)==(0, '') and out.startswith(f'usage: switchable-llm {command}')
    assert f'examples:\n  switchable-llm {command}' in out
    for a in COMMANDS[command]._actions:
        assert a.help or isinstance(a, argparse._SubParsersAction), f'{command}: {a.dest} has no help'
    for l in out.partition('examples:')[2].strip().splitlines():      # they are read by the parser that shows them
        if '"' not in l: make_parser().parse_args(l.partition(' < ')[0].split()[1:])

def options(command): return {a.option_strings[0] for a in COMMANDS[command]._actions if a.option_strings}

def test_train_has_few_options_and_the_study_has_all():
    "What a person sets; the rest stands in a preset, and can be changed where the study is run."
    asked = ('out adapters-only model data profiles preset steps batch-size lr r route max-length train-n act dtype seed policy '
             'device quiet debug')
    own = 'task column config split validation by chat-template'
    assert options('train')=={'-h', *('--'+o for o in f'{asked} {own}'.split())} and len(options('train'))<=28
    every = {'--'+f.name.replace('_','-') for f in fields(Preset) if f.name!='name'}
    for c in ('run','experiment'): assert every<=options(c)
    assert '--objective' in options('run')

def test_options_stand_in_groups_that_say_what_a_person_wants(cli):
    _,out,_ = cli('train', '--help')
    titles = [l[:-1] for l in out.splitlines() if l.endswith(':') and not l.startswith(' ')]
    groups = ['what to work on', 'how text and chats are read', 'how layers are quantized', 'adapters', 'how long to train', 'output']
    assert titles==['options', *groups, 'examples']
    grouped = [n for names in GROUPS.values() for n in names]
    assert sorted(grouped)==sorted(f.name for f in fields(Preset) if f.name!='name')

def test_usage(cli):
    assert cli()[0]==cli('fly')[0]==cli('experiment', 'luck')[0]==cli('train')[0]==2

def test_an_interrupt_before_the_work(cli, monkeypatch):
    def interrupt(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(module, 'study_model', interrupt)
    status,out,err = cli('train', '--out', 'x')
    assert (status, out)==(130, '') and err=='interrupted; the same command goes on from the last checkpoint, if there is one\n'
    monkeypatch.setattr('switchable_llm.apps.asking.open_model', interrupt)
    assert cli('answer', '.', *ASK)==(130, '', 'interrupted\n')

# --- wrong numbers and words ----------------------------------------------------------------------------------------

WRONG = {'int':['0', '-1', '1.5', 'nan', 'many', ''], 'float':['-1', 'nan', 'inf', 'fast', '1e999']}

@pytest.mark.parametrize('name', [f.name for f in fields(Preset) if f.name in NUMBERS or f.name in WORDS])
def test_every_setting_is_refused_by_its_own_name(name, cli):
    option = '--'+name.replace('_','-')
    low = NUMBERS[name].low if name in NUMBERS else None
    kind = 'float' if name in NUMBERS and not NUMBERS[name].whole else 'int'
    values = ['int8', ''] if name in WORDS else [v for v in WRONG[kind] if v!='0' or low==1]
    for v in values:
        status,out,err = cli('run', '--out', 'x', f'{option}={v}')
        assert (status, out)==(2, '') and f'argument {option}:' in err and repr(v) in err, err
    assert not Path('x').exists()

@pytest.mark.parametrize('line', [
    'run --ablation-n 0', 'experiment routes --seeds -1', 'experiment routes --seeds 0 x', 'experiment routes --jobs 0',
    'experiment robustness --questions 0', 'experiment calibration --unseen 0', 'experiment routes --answers 0',
    'experiment allocation --search-questions 0', 'experiment allocation --evaluations 0',
    'experiment allocation --w-bits 4 1', 'experiment allocation --a-bits 0', 'evaluate m --n 0', 'evaluate m --n -3',
    'evaluate m --seed -1', 'evaluate m --max-length 0', 'answer m --question Q --context C --max-length -1',
    'freeze m --out x --embedding 1', 'freeze m --out x --lm-head 9', 'explore --port 0', 'explore --max-sessions 0',
    'explore --idle 0'])
def test_every_other_number_too(line, cli):
    *_,option,value = [w for w in line.split()]
    option = next(w for w in reversed(line.split()) if w.startswith('--'))
    status,out,err = cli(*line.split())
    assert (status, out)==(2, '') and f'argument {option}:' in err and repr(value) in err and 'needs a' in err, err

def test_what_only_the_data_can_tell(cli, monkeypatch, toy_folder):
    def begun(*a): pytest.fail('work was begun')
    monkeypatch.setattr(module, 'calibrate_', begun); monkeypatch.setattr('switchable_llm.study.runs.calibrate_', begun)
    small = ['--model', toy_folder, '--train-n', 10, '--profiles', 'bw4', '--quiet']
    for line,says in (
            (['train', '--batch-size', 11], '--batch-size 11: there are 10'),
            (['run', '--batch-size', 11, '--calibration-size', 2], '--batch-size 11: there are 10'),
            (['run', '--batch-size', 2, '--calibration-size', 11], '--calibration-size 11: there are 10')):
        status,out,err = cli(*line, *small, '--out', '-'.join(map(str, line)))
        assert (status, out)==(1, '') and says in err and err.count('\n')==1, err

def test_few_questions_are_enough_to_train(cli, tmp_path, toy_folder):
    "The preset's calibration batches are larger than the data, and are no option of `train`."
    small = ['--model', toy_folder, '--train-n', 10, '--batch-size', 2, '--steps', 1, '--profiles', 'bw4', '--quiet']
    assert cli('train', *small, '--out', 'x')==(0, 'model  x\n', '')

@pytest.mark.skipif(library() is None, reason='no compiled kernels, which alone have levels')
def test_a_level_that_is_none_is_told_before_the_work(toy_folder, tmp_path):
    env = os.environ|dict(SWITCHABLE_LLM_MAX_ISA='AVX1024')
    train = [sys.executable,'-c',CODE,'train','--model',toy_folder,*SHORT,'--out',tmp_path/'mine']
    ran = subprocess.run(train, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode==1 and 'AVX1024' in ran.stderr and 'AVX2' in ran.stderr and not list(tmp_path.iterdir())

def test_unknown_names_are_told_before_a_model_is_loaded(refused, monkeypatch, tmp_path):
    def loaded(*a, **kw): pytest.fail('a model was loaded')
    for room in ('apps.commands','study.runs'): monkeypatch.setattr(f'switchable_llm.{room}.study_model', loaded)
    (tmp_path/'bad.yaml').write_text('name: mine\ndefault: w1\n')
    for command in (['train', '--out', 'x'], ['run'], ['experiment', 'objectives']):
        refused(*command, '--profiles', 'bw5', says="'bw5'")
        refused(*command, '--profiles', 'bw4', 'bad.yaml', says=['bad.yaml', 'w=1'])
    refused('experiment', 'calibration', '--mix', 'w4a4', 'w99', says='w=99')
    refused('experiment', 'objectives', 'cycles', '--arms', 'random_profile', says=["arm='random_profile'", 'cyclic'])
    refused('experiment', 'robustness', '--checkpoint', 'nowhere', says='nowhere: missing')
    refused('profiles', 'show', 'bw5', says="'bw5'")

# --- where to ---------------------------------------------------------------------------------------------------------

def test_an_output_that_cannot_be_is_told_before_the_work(refused, cli, monkeypatch, tmp_path, mine):
    def never(*a, **kw): pytest.fail('work was begun')
    for name in ('study_model','load_checkpoint'): monkeypatch.setattr(module, name, never)
    monkeypatch.setattr('switchable_llm.apps.packing.load_checkpoint', never)
    monkeypatch.setattr('switchable_llm.study.runs.study_model', never)
    (tmp_path/'notes').mkdir()
    for name,text in (('file','mine'), ('notes/diary.txt','dear'), ('w.safetensors','weights')):
        (tmp_path/name).write_text(text)
    export = ['export', mine/'mine', '--profile', 'bw4', '--format']
    for command in (['train', '--out'], [*export, 'float', '--overwrite', '--out']):
        refused(*command, 'file', says=['file', 'is a folder'])
        refused(*command, 'file/below', says='is a file, not a folder')
    refused('train', '--out', 'notes', says=['diary.txt', 'is not a switchable model'])
    refused('train', '--out', 'notes', '--adapters-only', says=['diary.txt', 'is not a switchable checkpoint'])
    refused('train', '--out', '.', says='is not a switchable model')
    refused('train', '--out', 'x'*250, says='longer than 200 bytes')
    refused('freeze', mine/'mine', '--out', 'notes', says='is a file')
    for name in ('w.safetensors','file'):
        refused('freeze', mine/'mine', '--out', name, says=[name, 'is not a packed file'])
    refused(*export, 'gguf', '--out', 'file', says='--overwrite')
    refused(*export, 'gguf', '--overwrite', '--out', 'notes', says='is a file')
    for command in (['run'], ['experiment', 'routes'], ['evaluate', mine/'mine']):
        refused(*command, '--out', 'file', says='is a file, not a folder')
    assert (tmp_path/'notes/diary.txt').read_text()=='dear'

def test_the_folder_in_which_one_stands_is_not_replaced_under_one(refused, tmp_path, monkeypatch):
    (tmp_path/'mine').mkdir()
    monkeypatch.chdir(tmp_path/'mine')
    refused('train', '--adapters-only', '--out', '.', says='is where you are')
    assert list((tmp_path/'mine').iterdir())==[]

BOUND = os.name=='posix' and hasattr(os, 'geteuid') and os.geteuid()!=0

@pytest.mark.skipif(not BOUND, reason='needs a user whom permissions bind')
def test_no_permission_is_told_before_the_work(refused, tmp_path, mine):
    (tmp_path/'shut').mkdir(mode=0o555)
    for command in (['train'], ['run'], ['experiment', 'routes'], ['evaluate', mine/'mine'], ['freeze', mine/'mine']):
        refused(*command, '--out', 'shut/x', says='permission')

@pytest.mark.parametrize('name', ['../x', '..', '', 'a/b', 'C:\\x', 'a\nb', 'x'*200])
def test_a_name_stays_in_its_folder(name, refused, mine):
    refused('evaluate', mine/'mine', '--into', name, says='--into=')
    if name: refused('evaluate', mine/'mine', '--name', name, says='--name=')
    refused('run', '--name', name, says='--name')

def test_the_second_of_two_is_told(cli, tmp_path, toy_folder):
    "Work folders of `run`, `train` and each experiment and seed."
    common,scored = ['--quiet', '--model', toy_folder],[*STUDY, '--eval-n', 3]
    work = tmp_path/'runs/progress/tiny'
    for folder,command in (
            (work/'random_profile-per_tensor-learned-nested-s0', ['run', '--no-ablation', *scored]),
            (work/'objectives-s1', ['experiment', 'objectives', '--seeds', 1, *scored]),
            (tmp_path/'x.training', ['train', '--out', 'x', *SHORT])):
        with claim(folder):
            status,out,err = cli(*command, *common)
            assert (status, out)==(1, '') and f'process {os.getpid()} on ' in err, err
            assert 'choose another folder' in err and err.count('\n')==1, err
    assert not (tmp_path/'x').exists()

# --- profiles -----------------------------------------------------------------------------------------------------

def test_check_of_profiles(cli, tmp_path, toy_folder):
    (tmp_path/'good.yaml').write_text('name: mine\ndefault: w8a8\nrules: [{site: mlp_in, bits: w4}]\n')
    for name,layers in (('deep','7'), ('long','"0-9"')):
        rule = f'{{"layers": {layers}, "bits": "w4"}}'
        (tmp_path/f'{name}.json').write_text(f'{{"name": "{name}", "default": "w8a8", "rules": [{rule}]}}')
    (tmp_path/'bad.yaml').write_text('name: mine\ndefault: w1\n')
    assert cli('profiles', 'check', 'good.yaml')==(0, 'good.yaml: mine is sound\n', '')
    files = 'good.yaml','deep.json','long.json','bad.yaml','none.json'
    status,out,err = cli('profiles', 'check', *files, '--fit', '--model', toy_folder)
    assert status==1 and out=='good.yaml: mine is sound and fits the model\n'
    lines = err.splitlines()
    assert len(lines)==4 and all(l.startswith('error: ') for l in lines)
    told = ('deep.json','layer 7'),('long.json',"'0-9'",'layer 2'),('bad.yaml','w=1'),('none.json','No such file')
    for l,words in zip(lines, told): assert all(w in l for w in words), l

# --- the study ------------------------------------------------------------------------------------------------------

def test_run_evaluate_answer(cli, runs):
    folder,out,err = runs
    assert 'before training\nprofile' in out and 'after training\nprofile' in out and 'train' in err
    paths = dict(re.findall(r'^(record|figures|model) +(\S+)$', out, flags=re.M))
    record = json.loads(Path(paths['record']).read_text())
    assert [s['profile']['name'] for s in record['after']['scores']]==['bw4','mixed8648']
    assert record['config']['preset']['steps']==4
    *parent,pattern = Path(paths['figures']).parts
    figures = list(Path(*parent).glob(pattern))
    assert len(figures)==3 and all('<svg' in f.read_text() for f in figures)
    status,out,err = cli('evaluate', paths['model'], '--n', 4, '--profiles', 'bw4')
    assert status==0 and 'bw4' in out and Path(re.search(r'record +(\S+)', out)[1]).exists(), err
    asked = ['--question', 'Where?', '--context', '-']
    status,out,err = cli('answer', paths['model'], *asked, stdin='Bemola lives in Tarito.')
    assert status==0 and [l.split(':')[0] for l in out.splitlines()]==['float','bw4','mixed8648'], err

@pytest.mark.parametrize('name,options,word,records', [
    ('objectives', ['--seeds', 0, 1, 0, '--arms', 'shared', 'float_teacher', '--profiles', 'bw4', 'w8a4', '--answers', 2],
     'objectives, nats per token', 4),
    ('calibration', MIX, 'ranges', 1),
    ('spans', [], 'extractive F1 %', 1), ('methods', ['--questions', 2], 'a step per channel', len(METHODS)),
    ('allocation', ['--search-questions', 6, '--questions', 6, '--evaluations', 2], 'bytes: ', 1)])
def test_experiments(name, options, word, records, cli, runs, toy_folder):
    folder = runs[0]/'runs'
    command = ['experiment', name, '--quiet', '--model', toy_folder, *STUDY, '--eval-n', 12, '--out', folder, *options]
    status,out,err = cli(*command)
    assert (status, err)==(0, '') and word in out, (name, out, err)
    assert len(list((folder/'tiny'/('arms' if name in SECTIONS else name)).glob('*.json')))==records
    assert cli(*command)==(0, out, '')         # all is there: nothing is run again
    if name!='allocation': return
    status,_,err = cli(*command, '--search-questions', 41)
    assert status==1 and err.startswith('error: ') and 'other settings' in err

def test_the_seed_of_an_experiment(cli, tmp_path, toy_folder):
    short = ['--quiet', '--model', toy_folder, *STUDY, '--eval-n', 3]
    assert 'mix=w6a6: no profile' in cli('experiment', 'calibration', *short)[2]   # the default mix, without six activation bits
    status,_,err = cli('experiment', 'routes', *short, '--answers', 2, '--arms', 'shared', '--seed', 3)
    assert status==0, err
    assert [p.name for p in (tmp_path/'runs/tiny/arms').iterdir()]==['shared-s3.json']

def test_seeds_at_once(cli, tmp_path, toy_folder, child_env, monkeypatch):
    "Two processes write what one does, and an error in one is told."
    for k,v in child_env.items(): monkeypatch.setenv(k, v)
    short = ['--quiet', '--model', toy_folder, *STUDY, '--calibration', 8, '--eval-n', 3]
    common = ['experiment', 'calibration', *short, *MIX, '--seeds', 0, 1]
    one,two = (cli(*common, '--jobs', n, '--out', f'jobs{n}') for n in (1, 2))
    assert one[0]==two[0]==0 and one[1]==two[1], (one, two)
    def found(jobs, seed):
        path = tmp_path/f'jobs{jobs}/tiny/calibration/static-s{seed}.json'
        return json.loads(path.read_text())['ways']
    ways = [[found(n, s) for s in (0, 1)] for n in (1, 2)]
    assert ways[0]==ways[1] and ways[0][0]!=ways[0][1]
    for f in (tmp_path/'jobs2/progress/tiny/calibration-s1').glob('*.json'): f.write_text('{')
    status,_,err = cli(*common, '--jobs', 2, '--out', 'jobs2')
    assert status==1 and 'error: seed 1: stopped by an error' in err

@pytest.mark.skipif(os.name!='posix', reason='needs signals')
def test_interrupted_and_continued(cli, child_env, tmp_path, toy_folder):
    "A real Ctrl-C in the middle of training; the same command then ends with the bits of a run that was left alone."
    argv = ['train', '--model', toy_folder, *SHORT[2:], '--steps', 300, '--quiet', '--out']
    log = tmp_path/'log'
    with open(log, 'w') as f:
        child = [sys.executable, '-c', CODE, *map(str, argv), 'model']
        quiet = dict(stderr=f, stdout=subprocess.DEVNULL)
        p = subprocess.Popen(child, cwd=tmp_path, env=child_env, preexec_fn=heed_ctrl_c, **quiet)
    try:
        deadline = time.time()+900
        def begun(): return list(tmp_path.glob('model.training/step-*')) or p.poll() is not None
        while not begun() and time.time()<deadline: time.sleep(.01)
        p.send_signal(signal.SIGINT)
        status = p.wait(600)
    finally: p.kill(); p.wait()
    assert status==130 and log.read_text()=='interrupted; the same command goes on from the last checkpoint, if there is one\n'
    assert not (tmp_path/'model').exists()
    status,_,err = cli(*(a for a in argv if a!='--quiet'), 'model')
    assert status==0 and re.search(r'goes on after step \d+, from .*model\.training', err), err
    assert cli(*argv, 'other')[0]==0
    assert (tmp_path/'model/model.safetensors').read_bytes()==(tmp_path/'other/model.safetensors').read_bytes()

# --- checkpoints and packed files -------------------------------------------------------------------------------------

def test_a_packed_file_answers_and_is_scored(cli, mine):
    for path in ('mine','mine.safetensors'):
        status,out,err = cli('answer', mine/path, '--profiles', 'bw4', 'mixed8648', *ASK)
        assert status==0 and [l.split(':')[0] for l in out.splitlines()]==['bw4','mixed8648'], err
    status,out,err = cli('evaluate', mine/'mine.safetensors', '--n', 2, '--quiet')
    assert status==0 and 'mixed8648' in out, err

def test_freeze(cli, refused, tmp_path, mine):
    status,out,err = cli('freeze', mine/'mine', '--out', 'small.safetensors', '--profiles', 'bw4')
    assert status==0 and 'codes' in out and f"{(tmp_path/'small.safetensors').stat().st_size:,}" in out, err
    refused('freeze', mine/'mine', '--out', 'small.safetensors', says='small.safetensors: exists already')
    assert cli('freeze', mine/'mine', '--out', 'small.safetensors', '--overwrite')[0]==0
    refused('freeze', mine/'mine', '--out', 'x.safetensors', '--profiles', 'bw5', says="'bw5'")

def test_a_trained_model_is_not_lost_to_the_name_of_a_new_one(cli, refused, tmp_path, mine):
    train = ['train', '--steps', 1, '--train-n', 20, '--batch-size', 2, '--profiles', 'bw4', '--quiet', '--out', 'mine']
    quantize = ['quantize', 'tiny', '--data', 'tiny', '--task', 'squad', '--n', 16, '--profiles', 'bw4', '--quiet', '--out', 'mine']
    assert cli(*train)[0]==cli(*train)[0]==0     # the same run once more: it goes on where it was
    refused(*quantize, says='mine: exists already; choose another path, or --overwrite')
    assert cli(*quantize, '--overwrite')[0]==0
    (tmp_path/'mine.training').rename(tmp_path/'aside')
    refused(*train, says='mine: exists already; choose another path, or move it away')
    refused(*train, '--adapters-only', says='is not a switchable checkpoint')
    (tmp_path/'empty').mkdir()                   # holds nothing that could be lost
    assert cli(*quantize[:-1], 'empty')[0]==0

def test_export(cli, monkeypatch, tmp_path, mine):
    common = ['export', mine/'mine', '--profile', 'bw4', '--format']
    assert cli(*common, 'float', '--out', 'merged')[0]==0 and (tmp_path/'merged'/'config.json').exists()
    assert cli(*common, 'gguf', '--dtype', 'F16', '--no-tokenizer', '--out', 'mine.gguf')[0]==0
    assert cli(*common, 'torchao', '--out', 'state.pt')[0]==0 and (tmp_path/'state.pt').exists()
    for f,name in (('float','merged'), ('gguf','mine.gguf'), ('torchao','state.pt')):
        status,_,err = cli(*common, f, '--out', name)
        assert status==1 and name in err and '--overwrite' in err
        assert cli(*common, f, *['--no-tokenizer']*(f=='gguf'), '--overwrite', '--out', name)[0]==0
    monkeypatch.setitem(sys.modules, 'gguf', None)       # as where it is not installed
    status,_,err = cli(*common, 'gguf', '--out', 'other.gguf')
    assert status==1 and "pip install 'switchable-llm[gguf]'" in err and err.count('\n')==1

def test_a_packed_file_has_no_float_weights(refused, mine, toy_folder):
    for command in (['export', '--profile', 'bw4', '--format', 'float'], ['freeze']):
        says = 'mine.safetensors: is a file',f'no float weights to {command[0]} from','from which it was frozen'
        refused(command[0], mine/'mine.safetensors', *command[1:], '--out', 'x', says=says)
    refused('answer', mine/'mine.safetensors', '--model', toy_folder, *ASK, says='leave out --model')

def test_kernels(cli, mine):
    status,out,err = cli('kernels')
    assert (status, err)==(0, '') and 'quantize' in out and 'onednn' in out
    status,more,err = cli('kernels', mine/'mine.safetensors', 'nowhere')
    assert status==1 and more.startswith(out) and err.count('\n')==1 and 'nowhere' in err
    rows = dict(l.split(maxsplit=1) for l in more[len(out):].splitlines()[2:])
    assert list(rows)[1:]==['bw4','mixed8648']
    assert all(r.strip().startswith(('native steps','modules: ')) for p,r in rows.items() if p!='profile')

def test_check(cli, refused, tmp_path, mine):
    whole = (mine/'mine.safetensors').read_bytes()
    good,bad = tmp_path/'good.safetensors',tmp_path/'bad.safetensors'
    good.write_bytes(whole); bad.write_bytes(whole[:-1]+bytes([whole[-1]^1]))
    said = f'good.safetensors: every byte is as it was written; {len(whole):,} bytes\n'
    assert cli('check', 'good.safetensors')==(0, said, '')
    status,out,err = cli('check', 'bad.safetensors', 'good.safetensors', 'nowhere', mine/'mine')
    assert status==1 and out.startswith('good.safetensors: every byte')
    lines = err.splitlines()
    assert len(lines)==3 and all(l.startswith('error: ') for l in lines)
    told = ('bad.safetensors','damaged'),('nowhere',),('is a folder','freeze')
    for l,words in zip(lines, told): assert all(w in l for w in words), l

# --- for programs ---------------------------------------------------------------------------------------------------

def test_json_on_stdout_and_nothing_else(cli, mine, tmp_path):
    def read(*argv, status=0):
        got,out,err = cli(*argv, '--json')
        assert got==status, err
        return json.loads(out), err
    assert [p['name'] for p in read('profiles')[0]]==[p['name'] for p in read('profiles', 'list')[0]]
    shown, = read('profiles', 'show', 'mixed8648')[0]
    assert set(shown['layers'].values())=={'w6a8', 'w4a8'} and shown['cost']['w_bits']<6
    assert set(read('presets')[0])=={'tiny','smollm2','gpt2'}
    found,err = read('evaluate', mine/'mine', '--n', 3, '--profiles', 'bw4')
    score, = found['evaluation']['scores']
    assert score['profile']['name']=='bw4' and len(score['f1'])==3 and Path(found['record']).exists()
    assert f"a record of this goes to {found['record']}" in err
    answers = {f:read('answer', mine/f, *ASK, '--profiles', 'bw4', 'mixed8648')[0]['answers'] for f in ('mine','mine.safetensors')}
    assert all(list(a)==['bw4','mixed8648'] for a in answers.values())
    whole,lost = read('check', mine/'mine.safetensors', 'nowhere', status=1)[0]
    assert whole['whole'] and sum(whole['bytes'].values())==(mine/'mine.safetensors').stat().st_size and 'nowhere' in lost['error']
    (tmp_path/'two.yaml').write_text('[{name: a, default: w8a8}, {name: b, default: w4a8, rules: [{layers: 99, bits: w8}]}]')
    sound,wrong = read('profiles', 'check', 'two.yaml', '--fit', status=1)[0]
    assert sound['profile']=='a' and sound['fits'] and 'layer 99' in wrong['error']
    kernels = read('kernels', mine/'mine.safetensors')[0]
    assert {p['device'] for p in kernels['products']}>={'cpu'} and list(kernels['files'][0]['profiles'])==['bw4','mixed8648']

def test_the_version(cli):
    import torch, transformers
    status,out,err = cli('--version')
    assert (status, err, out.count('\n'))==(0, '', 1)
    for p,v in (('switchable-llm',__version__), ('torch',torch.__version__.partition('+')[0]), ('transformers',transformers.__version__)):
        assert f'{p} {v}' in out

class Terminal(io.StringIO):
    def isatty(self): return True

def test_a_log_has_lines_and_a_terminal_a_bar(tmp_path, monkeypatch, toy_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress.Lines, 'seconds', 0)
    def told(stream, out, *more):
        monkeypatch.setattr(sys, 'stderr', stream)
        assert main(['train', '--model', str(toy_folder), *SHORT, '--out', out, *more])==0
        return stream.getvalue()
    *log,last = told(io.StringIO(), 'a').splitlines()
    assert last==f"checkpoints of the training  {tmp_path/'a.training'}: delete them at will"
    assert [bool(re.fullmatch(rf'train {i}/4(, loss [\d.]+)?, \d+ s', l)) for i,l in enumerate(log[-4:], 1)]==[True]*4, log
    assert 'loss' in log[-1] and '\r' not in ''.join(log) and '\r' in told(Terminal(), 'b') and told(io.StringIO(), 'c', '--quiet')==''

def test_profiles_are_told_in_the_words_of_the_command(refused, mine):
    for verb in (['evaluate'], ['answer', *ASK], ['generate', '--prompt', 'x'], ['freeze', '--out', 'x'],
                 ['export', '--format', 'float', '--out', 'x']):
        for name in ['mine']+['mine.safetensors']*(verb[0] in ('evaluate','answer','generate')):
            refused(verb[0], mine/name, *verb[1:], '--profile', 'bw9', says=["'bw9'", 'which has', 'mixed8648', '.yaml'])
            refused(verb[0], mine/name, *verb[1:], '--profile', 'no.yaml', says='no.yaml: No such file')
    refused('train', '--out', 'x', '--profiles', 'bw9', says=["'bw9'", 'built in are', '.yaml'])

def test_the_words_of_the_embedded_model_go_into_a_gguf_file(cli):
    gguf = pytest.importorskip('gguf')
    assert main(['train', '--quiet', '--steps', '1', '--train-n', '20', '--profiles', 'bw4', '--out', 'm'])==0
    status,out,err = cli('export', 'm', '--profile', 'bw4', '--format', 'gguf', '--out', 'm.gguf')
    assert (status, [Path(l.split('  ')[1]).name for l in out.splitlines()[:2]])==(0, ['m.gguf', 'm.lora.gguf']), err
    assert out.splitlines()[2].startswith('left out  activation bits of the profile')
    fields = gguf.GGUFReader('m.gguf').fields
    assert fields['tokenizer.ggml.model'].contents()=='t5' and len(fields['tokenizer.ggml.tokens'].contents())>100
    assert cli('export', 'm', '--profile', 'bw4', '--format', 'gguf', '--out', 'n.gguf', '--no-tokenizer')[0]==0
    assert gguf.GGUFReader('n.gguf').fields['tokenizer.ggml.model'].contents()=='no_vocab'

# --- one way out ------------------------------------------------------------------------------------------------------

def test_a_mistake_is_one_line(refused, cli, mine, tmp_path):
    for command in (
            ['evaluate','nowhere'], ['freeze','nowhere','--out','x'],
            ['export','nowhere','--profile','bw4','--format','float','--out','x'],
            ['explore','nowhere'], ['explore', str(mine/'mine'), 'nowhere']):
        refused(*command, says='nowhere: missing')
    for verb in (['answer',*ASK], ['generate','--prompt','x'], ['lm-eval','--tasks','x']):
        for path in ('nowhere.safetensors', './nowhere', 'one/two/three'):     # the hub is not asked for a path
            says = 'missing; give what' if path.endswith('.safetensors') else 'no such file or folder'
            if verb[0]!='lm-eval': refused(verb[0], path, *verb[1:], says=[path, says])
        refused(verb[0], 'tiny', *verb[1:], '--device', 'cuda:99', says='--device cuda:99: not on this machine, which has cpu')
    refused('train', '--out', 'x', '--device', 'gpu', says='--device gpu: not on this machine, which has cpu')
    refused('evaluate', mine/'mine', '--data', 'nowhere.json', says='nowhere.json')
    refused('evaluate', mine/'mine', '--profiles', 'bw5', says="'bw5'")
    for q,c in ((' ', 'C'), ('Q', '')): refused('answer', mine/'mine', '--question', q, '--context', c, says='is empty')
    refused('answer', mine/'mine', '--question', 'Q', '--context', 'C', '--max-length', 5, says='--max-length 5')
    (tmp_path/'no.safetensors').write_bytes(b'\x00'*9)
    refused('answer', 'no.safetensors', *ASK, says='no.safetensors')
    status,out,err = cli('evaluate', 'nowhere', '--debug')
    assert status==1 and 'Traceback' in err and err.splitlines()[-1].startswith('error: ')

def test_the_command_line_says_its_own_way_out(cli, refused, mine, tmp_path):
    (tmp_path/'corpus.txt').write_text('\n\n'.join(q['context'] for q in tiny_squad(100)))
    quantize = ['quantize', 'tiny', '--data', 'corpus.txt', '--n', 32, '--quiet', '--out', 'made']
    for more,says in (
            (['--profiles', 'w4a8k8v3'], "profile 'w4a8k8v3': v=3: keys and values are cached in 2, 4 or 8 bits"),
            (['--profiles', 'bw8', 'w9a8'], "profile 'w9a8': w=9: nested codes hold 2 to 8 bits"),
            (['--widths', 4, 8], ["--widths 4 8: profile 'bw6' has 6 bits", 'or leave --widths out']),
            (['--rotate', 'x'], "--rotate x: no layer of site 'x'"),
            (['--max-length', 1], '--max-length 1: cuts the calibration texts to 32 tokens')):
        refused(*quantize, *more, says=says)
    without = [w for w in quantize if w!='tiny']
    for more in (['--rotate', 'tiny'], ['--profiles', 'bw8', 'tiny']):
        refused(*without, *more, status=2, says=f'required: checkpoint (write it first: what follows {more[0]} is read')
    assert 'write it first' not in cli(*without)[2]
    status,out,err = cli(*quantize, '--group-size', 48, '--profiles', 'w2a8', 'w5a8')
    assert status==0 and [l.split()[0] for l in out.splitlines()[1:]]==['w2', 'w5', 'model'], err
    export = ['--format', 'gguf', '--out', 'x.gguf', '--profile']
    refused('export', 'made', *export, 'w5a8', says='quantize the base again with --group-size 32,')
    again = ['quantize', 'made', *quantize[2:-1], 'other']
    refused(*again, '--rotate', says='--rotate: made is switchable already and says so itself: leave the option out')
    says = "needs adapter '3'",'choose a profile of the widths that are there','among --profiles'
    own = ['train', '--steps', 1, '--batch-size', 2, '--train-n', 8, '--profiles', 'bw8', '--route', 'bits', '--quiet', '--out', 'own']
    assert cli(*own)[0]==cli('generate', 'made', '--prompt', 'Who', '--profile', 'w3a8')[0]==0   # one adapter serves all widths
    refused('generate', 'own', '--prompt', 'Who', '--profile', 'w3a8', says=says)
    assert cli(*quantize[:-1], 'turned', '--rotate', '--profiles', 'bw8')[0]==0
    refused('export', 'turned', *export, 'bw8', says='quantize the base again without --rotate,')
    refused('export', 'tiny', *export, 'bw8', says='tiny: missing; give a folder that `train`, `quantize` or `run` wrote')
    refused('freeze', mine/'mine.safetensors', '--out', 'x', says='the folder that `train`, `quantize` or `run` wrote')

def test_a_model_in_few_bits_that_gets_worse_is_told_after_the_table(cli, tmp_path):
    (tmp_path/'corpus.txt').write_text('\n\n'.join(q['context'] for q in tiny_squad(100)))
    more = ['--data', 'corpus.txt', '--n', 32, '--quiet', '--out']
    assert cli('quantize', 'tiny', '--profiles', 'w4', *more, 'four')[::2]==(0, '')
    assert cli('export', 'four', '--profile', 'w4', '--format', 'float', '--out', 'plain')[0]==0
    status,out,err = cli('quantize', 'plain', *more, 'all')
    assert status==0 and 'model  all' in out and re.fullmatch(r'note: .* more error than rounding at w4 \(.* against .*\n', err), err
    assert cli('quantize', 'plain', '--profiles', 'w4', *more, 'again')[::2]==(0, '')

def test_arms_are_written_as_one_types_them(cli):
    _,out,_ = cli('experiment', '--help')
    said = re.search(r'arms of [^(]*\(default: all\): (.*?)  --', ' '.join(out.split())+'  --')
    known = {a:None for of in SECTIONS.values() for p in PRESETS.values() for a in of(p)}
    assert [a.rstrip(',') for a in shlex.split(said[1])[:len(known)]]==list(known)

class PanicException(BaseException):
    "As `pyo3_runtime` raises it where compiled code of the tokenizers panics: no `Exception`."

@pytest.mark.parametrize('e,says', [
    (KeyError('rotary'), "KeyError: 'rotary'"), (MemoryError(), 'not enough memory'), (AttributeError('x'), 'AttributeError: x'),
    (SafetensorError('header'), 'SafetensorError: header'), (ValueError(''), 'ValueError'), (ValueError('a\nb'), 'a b'),
    (RuntimeError('Error(s) in loading:\n\n\tsize mismatch'), 'Error(s) in loading: size mismatch'),
    (RecursionError('deep'), 'deep'), (AssertionError(), 'AssertionError'),
    (PanicException('index out of bounds'), 'PanicException: index out of bounds')])
def test_whatever_happens_is_a_line(e, says, cli, monkeypatch):
    def fail(*a): raise e
    monkeypatch.setattr('switchable_llm.apps.packing.native_report', fail)
    status,out,err = cli('kernels')
    assert (status, out)==(1, '') and err.startswith('error: ') and says in err and err.count('\n')==1
    assert 'Traceback' in cli('kernels', '--debug')[2]
    assert len(one_line(ValueError('x'*10_000)))<=600

# --- packages that are not installed ----------------------------------------------------------------------------------

BLOCKED = """
import importlib.util, sys
GONE = 'matplotlib','datasets','torchmetrics','scipy','ipywidgets','voila','ipykernel'
def gone(name): return name.partition('.')[0] in GONE
class Missing:   # as where the extras are not installed
    def find_spec(self, name, path=None, target=None):
        if gone(name): raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Missing())
find = importlib.util.find_spec   # by which transformers sees what there is
importlib.util.find_spec = lambda name, *args: None if gone(name) else find(name, *args)
"""

@pytest.fixture
def without(child_env, tmp_path):
    "Run the command in a process in which the packages of the extras cannot be imported."
    def run(*argv):
        line = [sys.executable, '-c', BLOCKED+CODE, *map(str, argv)]
        p = subprocess.run(line, cwd=tmp_path, env=child_env, capture_output=True, text=True, timeout=600)
        return p.returncode, p.stdout, p.stderr
    return run

def is_told(verb, extra, err):
    "One line that says which command needs which package, and how to get it."
    said = rf"error: `switchable-llm {verb}` needs the package \w+: pip install 'switchable-llm\[{extra}\]'\n"
    return re.fullmatch(said, err) is not None

def test_without_the_extras_help_is_there_and_the_study_says_what_it_needs(without):
    for argv in (['--help'], ['fly']): assert without(*argv)[0]==(2 if argv==['fly'] else 0)
    for line in ('run', 'experiment routes'):
        status,out,err = without(*line.split())
        assert (status, out)==(1, '') and is_told(line.split()[0], 'study', err), err
    status,out,err = without('explore')
    assert (status, out)==(1, '') and is_told('explore', 'explore', err), err

SERVE = ['check mine.safetensors', 'kernels', 'freeze mine --out b.safetensors', 'profiles',
         'export mine --profile bw4 --format float --out merged', 'train --steps 1 --train-n 20 --quiet --out new']

@pytest.mark.parametrize('line', SERVE)
def test_without_the_extras_one_can_train_and_serve(line, without, tmp_path, mine, toy_folder):
    for name in ('mine','mine.safetensors'): (tmp_path/name).symlink_to(mine/name)
    model = ['--model', toy_folder] if line.split()[0]=='train' else []
    status,out,err = without(*line.split(), *model)
    assert status==0, err

def test_only_a_missing_package_of_an_extra_is_told_so():
    assert 'pip install' in missing_package(ModuleNotFoundError('x', name='scipy.stats'), 'run')
    for e in (ModuleNotFoundError('x', name='fastcore'), ImportError('x', name='scipy'), ValueError('scipy')):
        assert missing_package(e, 'run')==''
