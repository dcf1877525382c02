"The installed command, as a shell sees it."
import json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pytest
from conftest import heed_ctrl_c

COMMAND = Path(sys.executable).with_name('switchable-llm')
pytestmark = pytest.mark.skipif(not COMMAND.exists(), reason='the package is not installed')
SHORT = '--steps 4 --batch-size 4 --train-n 40 --calibration 2 --profiles bw4 mixed8648'.split()

@pytest.fixture
def cli(child_env, tmp_path):
    "Run the command in an empty folder; status, stdout, stderr."
    def run(*argv, stdin=''):
        p = subprocess.run([COMMAND, *map(str, argv)], cwd=tmp_path, env=child_env, input=stdin, capture_output=True, text=True, timeout=240)
        return p.returncode, p.stdout, p.stderr
    return run

def test_presets(cli):
    status,out,err = cli('presets')
    assert (status, err)==(0, '')
    table = dict(re.split(r'\s{2,}', l, maxsplit=1) for l in out.splitlines())
    assert table['setting'].split()==['tiny','smollm2','gpt2'] and table['dtype'].split()==['float32','bfloat16','float32']

def test_check_of_profiles(cli, tmp_path, toy_folder):
    (tmp_path/'good.yaml').write_text('name: mine\ndefault: w8a8\nrules: [{site: mlp_in, bits: w4}]\n')
    (tmp_path/'deep.json').write_text('{"name": "deep", "default": "w8a8", "rules": [{"layers": 7, "bits": "w4"}]}')
    (tmp_path/'bad.yaml').write_text('name: mine\ndefault: w1\n')
    assert cli('profiles', 'check', 'good.yaml')==(0, 'good.yaml: mine is sound\n', '')
    status,out,err = cli('profiles', 'check', 'good.yaml', 'deep.json', 'bad.yaml', 'none.json', '--fit', '--model', toy_folder)
    assert status==1 and out=='good.yaml: mine is sound and fits the model\n'
    lines = [l for l in err.splitlines() if l]
    assert len(lines)==3 and all(l.startswith('error: ') for l in lines)
    for l,words in zip(lines, (('deep.json','layers 0-1'), ('bad.yaml','w=1'), ('none.json','No such file'))): assert all(w in l for w in words), l

def test_a_mistake_is_one_line(cli):
    status,out,err = cli('evaluate', 'nowhere')
    assert (status, out)==(1, '') and err.startswith('error: ') and err.count('\n')==1 and 'nowhere' in err
    status,out,err = cli('evaluate', 'nowhere', '--debug')
    assert status==1 and 'Traceback' in err

def test_usage(cli):
    assert cli()[0]==cli('fly')[0]==2
    status,out,err = cli('run', '--steps', 'many')
    assert (status, out)==(2, '') and '--steps' in err and 'usage:' in err

def test_every_help_has_an_example(child_env):
    "One process for all: the same parser, without eight starts."
    code = "import sys\nfrom switchable_llm.cli import main\nfor c in sys.argv[1:]:\n    assert main([*c.split(), '--help'])==0"
    commands = ['run','train','experiment','evaluate','answer','profiles','profiles list','profiles show','profiles check','presets','freeze','export','kernels','explore']
    p = subprocess.run([sys.executable, '-c', code, *commands], env=child_env, capture_output=True, text=True, timeout=120)
    assert (p.returncode, p.stderr)==(0, '')
    pages = p.stdout.split('usage: ')[1:]
    for c,page in zip(commands, pages, strict=True): assert page.startswith(f'switchable-llm {c}') and f'examples:\n  switchable-llm {c}' in page

def test_help_of_the_command(cli):
    status,out,_ = cli('--help')
    assert status==0 and all(c in out for c in ('run','train','experiment','evaluate','answer','freeze','export','kernels','explore','profiles','presets'))

def test_run_evaluate_answer(cli, tmp_path, toy_folder):
    status,out,err = cli('run', '--model', toy_folder, *SHORT, '--eval-n', 4, '--no-ablation')
    assert status==0, err
    assert 'before training\nprofile' in out and 'after training\nprofile' in out and 'train' in err
    paths = dict(re.findall(r'^(record|figures|model) +(\S+)$', out, flags=re.M))
    record = json.loads((tmp_path/paths['record']).read_text())
    assert [s['profile']['name'] for s in record['after']['scores']]==['bw4','mixed8648'] and record['config']['preset']['steps']==4
    figures = list(tmp_path.glob(paths['figures']))
    assert len(figures)==3 and all('<svg' in f.read_text() for f in figures)
    status,out,err = cli('evaluate', paths['model'], '--n', 4, '--profiles', 'bw4')
    assert status==0 and 'bw4' in out and (tmp_path/re.search(r'record +(\S+)', out)[1]).exists(), err
    status,out,err = cli('answer', paths['model'], '--question', 'Where?', '--context', '-', stdin='Bemola lives in Tarito.')
    assert status==0 and [l.split(':')[0] for l in out.splitlines()]==['float','bw4','mixed8648'], err

@pytest.mark.skipif(os.name!='posix', reason='needs signals')
def test_experiments(cli, tmp_path, toy_folder):
    common = ['--quiet', '--model', toy_folder, *SHORT, '--eval-n', 12]
    assert cli('run', *common, '--no-ablation')[0]==0
    for name,options,word in (('objectives', ['--seeds', 0, 1, '--arms', 'random_profile', 'ranges', '--mix', 'w4a4', 'w6a8', '--unseen', 1], 'By default: '), ('calibration', ['--mix', 'w4a4', 'w6a8', '--unseen', 1], 'ranges'),
                              ('spans', [], 'extractive F1 %'), ('allocation', ['--search-questions', 6, '--questions', 6, '--evaluations', 2], 'bytes: ')):
        status,out,err = cli('experiment', name, *common, *options)
        assert (status, err)==(0, '') and word in out, (name, out, err)
        assert len(list((tmp_path/'runs/tiny'/name).glob('*.json')))==(4 if name=='objectives' else 1)
        assert cli('experiment', name, *common, *options)==(0, out, '')         # all is there: nothing is run again
    status,out,err = cli('experiment', 'allocation', *common, '--search-questions', 41)
    assert status==1 and err.startswith('error: ') and 'other settings' in err
    assert cli('experiment', 'luck')[0]==2
    assert 'mix=w6a6: no profile' in cli('experiment', 'objectives', *common, '--arms', 'random_profile', '--out', 'other')[2]   # the default mix, without six activation bits

def test_seeds_at_once(cli, tmp_path, toy_folder):
    "Two processes write what one does, and an error in one is told."
    common = ['experiment', 'cpt', '--model', toy_folder, *SHORT[2:-3], '--profiles', 'bw4', 'bw8', '--steps', 2, '--cycles', 1, '--eval-n', 3, '--questions', 3, '--max-new-tokens', 3, '--arms', 'cyclic', '--quiet', '--seeds', 0, 1]
    one,two = (cli(*common, '--jobs', n, '--out', f'jobs{n}') for n in (1, 2))
    assert one[0]==two[0]==0 and one[1]==two[1], (one, two)
    scores = [[json.loads((tmp_path/f'jobs{n}/tiny/cpt/cyclic-s{s}.json').read_text())['scores'] for s in (0, 1)] for n in (1, 2)]
    assert scores[0]==scores[1] and scores[0][0]!=scores[0][1]
    (tmp_path/'jobs2/tiny/cpt/cyclic-s1.json').write_text('{')
    status,_,err = cli(*common, '--jobs', 2, '--out', 'jobs2')
    assert status==1 and 'error: seed 1: stopped by an error' in err

def test_interrupted_and_continued(cli, child_env, tmp_path, toy_folder):
    "A real Ctrl-C in the middle of training; the same command then ends with the bits of a run that was left alone."
    argv = ['train', '--model', toy_folder, *SHORT[2:], '--steps', 400, '--out']
    log = tmp_path/'log'
    with open(log, 'w') as f: p = subprocess.Popen([COMMAND, *map(str, argv), 'model'], cwd=tmp_path, env=child_env, stderr=f, stdout=subprocess.DEVNULL, preexec_fn=heed_ctrl_c)
    try:
        deadline = time.time()+120
        while not list(tmp_path.glob('model.training/step-*')) and p.poll() is None and time.time()<deadline: time.sleep(.02)
        p.send_signal(signal.SIGINT)
        status = p.wait(60)
    finally: p.kill(); p.wait()
    assert status==130 and 'the same command goes on' in log.read_text() and not (tmp_path/'model').exists()
    assert cli(*argv, 'model')[0]==cli(*argv, 'other')[0]==0
    assert (tmp_path/'model/adapters.safetensors').read_bytes()==(tmp_path/'other/adapters.safetensors').read_bytes()

def test_a_closed_pipe_is_no_traceback(child_env):
    p = subprocess.run(f'"{COMMAND}" presets | true', shell=True, env=child_env, capture_output=True, text=True, timeout=60)
    assert 'Traceback' not in p.stderr

def test_freeze_serve_export(cli, child_env, tmp_path, toy_folder):
    "A checkpoint becomes one file, which answers and is scored without its base model; and is exported."
    status,_,err = cli('train', '--model', toy_folder, *SHORT, '--act', 'per_token', '--out', 'mine', '--quiet')
    assert status==0, err
    status,out,err = cli('freeze', 'mine', '--out', 'mine.safetensors', '--embedding', 8, '--lm-head', 8)
    assert status==0 and 'codes' in out and f"{(tmp_path/'mine.safetensors').stat().st_size:,}" in out, err
    ask = ['--question', 'Who?', '--context', 'Bemola was born in 1834.']
    for path in ('mine','mine.safetensors'):
        status,out,err = cli('answer', path, '--profiles', 'bw4', 'mixed8648', *ask)
        assert status==0 and [l.split(':')[0] for l in out.splitlines()]==['bw4','mixed8648'], err
    status,out,err = cli('evaluate', 'mine.safetensors', '--n', 2, '--quiet')
    assert status==0 and 'mixed8648' in out, err
    status,_,err = cli('answer', 'mine.safetensors', '--model', toy_folder, *ask)
    assert status==1 and 'leave out --model' in err
    assert cli('export', 'mine', '--profile', 'bw4', '--format', 'float', '--out', 'merged')[0]==0 and (tmp_path/'merged'/'config.json').exists()
    assert cli('export', 'mine', '--profile', 'bw4', '--format', 'gguf', '--dtype', 'F16', '--no-tokenizer', '--out', 'mine.gguf')[0]==0
    status,_,err = cli('export', 'mine', '--profile', 'bw4', '--format', 'float', '--out', 'merged')
    assert status==1 and 'merged' in err
    code = "import sys; sys.modules['gguf'] = None\nfrom switchable_llm.cli import main\nsys.exit(main('export mine --profile bw4 --format gguf --out other.gguf'.split()))"      # as where it is not installed
    p = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=child_env, capture_output=True, text=True)
    assert p.returncode==1 and "pip install 'switchable-llm[gguf]'" in p.stderr and 'Traceback' not in p.stderr
    status,_,err = cli('freeze', 'mine', '--out', 'x.safetensors', '--profiles', 'bw5')
    assert status==1 and "'bw5'" in err and not (tmp_path/'x.safetensors').exists()

def test_kernels(cli):
    status,out,err = cli('kernels')
    assert (status, err)==(0, '') and 'quantize' in out and 'onednn' in out
