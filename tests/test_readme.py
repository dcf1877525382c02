"The README's code and commands run as they are written, in their order, on the embedded model; and it is short."
import json, re, shlex, subprocess, sys
import pytest
from transformers import AutoConfig
from conftest import ROOT
from switchable_llm.apps.cli import make_parser
from switchable_llm.data.embedded import tiny_squad

COMMAND = sys.executable,'-c','import sys; from switchable_llm.apps.cli import main; sys.exit(main())'
README = (ROOT/'README.md').read_text(encoding='utf-8')

def blocks(language, text=README): return re.findall(rf'^```{language}\n(.*?)^```', text, flags=re.M|re.S)

def commands(): return [shlex.split(l.split('  #')[0]) for b in blocks('sh') for l in b.splitlines()]

def test_it_is_short(): assert len(README.split())<=900

def test_first_screen():
    "A sentence, a picture, how to install, lines of code that show the switch, three numbers with their machine."
    start = README[:README.index('## Keep it')]
    picture = re.search(r'!\[[^\]]{20,}\]\((nbs/live/live\.gif)\)', start)
    assert picture and (ROOT/picture[1]).is_file() and 'pip install' in start
    assert 'use_profile' in ''.join(blocks('python', start)) and len(''.join(blocks('python', start)).splitlines())<=8
    numbers = start[start.index('## Three numbers'):]
    heads,*rows = [[c.strip() for c in l.strip('|').split('|')] for l in numbers.splitlines() if l.startswith('|') and ':--' not in l]
    assert len(rows)==3 and all('**' in c for r in rows for c in r[1:])
    assert re.match(r"GPT-2's shape.*threads", heads[0]) and len(heads)>=3 and all('AVX' in machine for machine in heads[1:])
    assert '**Use it**' in start and '**Do not use it**' in start
    order = re.findall(r'^## (.+)$', README, flags=re.M)
    assert order==['Try it','Three numbers','Two commands','Keep it, and serve it','Your own data','Chapters','Your own profile','Findings']

def check_serving(folder, env):
    "The server's two lines on the file that the Python before them wrote, at another port."
    argv, = [c[1:] for c in commands() if c[:2]==['switchable-llm','serve']]
    server = subprocess.Popen([*COMMAND, *argv, '--port', '0'], cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
    try:
        said = next(l for l in server.stderr if 'listening at' in l)
        port = re.search(r':(\d+)/v1', said)[1]
        curl = [w.replace(':8000', f':{port}') for w in next(c for c in commands() if c[0]=='curl')]
        got = json.loads(subprocess.run([*curl, '-sS', '--max-time', '60'], capture_output=True, check=True).stdout)
        assert got['model']==json.loads(curl[-1])['model'] and got['choices'][0]['text']==' weaver', got
    finally:
        server.terminate()
        assert server.wait(60)==0

def test_python_runs(tmp_path, child_env):
    check = '''
assert len(said)==50 and model.switch.profile.name=='float' and served.switch.profile.name=='bw6'
assert sl.answer(served, tokenizer, [question])[0]==question['answers']['text'][0]
print('done')'''
    code = '\n'.join(blocks('python'))+check
    p = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=child_env, capture_output=True, text=True, timeout=1800)
    assert p.returncode==0 and p.stdout.strip().endswith('done'), p.stderr[-2000:]
    check_serving(tmp_path, child_env)

def test_commands_run_in_their_order(tmp_path, child_env):
    "All but the explorer, which serves until it is stopped (tests/test_page.py runs it), and the server (below)."
    (tmp_path/'my_mix.yaml').write_text(blocks('yaml')[0])
    questions = tiny_squad(600)
    (tmp_path/'corpus.txt').write_text('\n\n'.join(q['context'] for q in questions))
    ours = [c[1:] for c in commands() if c[0]=='switchable-llm']
    assert len(ours)>=6
    for argv in ours:
        make_parser().parse_args(argv)   # ends the process where an option is unknown
        if argv[0] in ('explore','serve'): continue
        p = subprocess.run([*COMMAND, *argv], cwd=tmp_path, env=child_env, capture_output=True, text=True, timeout=1800)
        assert p.returncode==0, f'{argv}: {p.stderr[-2000:]}'
    for folder in ('my-text','my_model'): assert AutoConfig.from_pretrained(tmp_path/folder).quantization_config
    assert (tmp_path/'my_model.gguf').is_file() and (tmp_path/'my_model.lora.gguf').is_file()

def test_targets_of_make_exist():
    rules,targets = (ROOT/'Makefile').read_text(encoding='utf-8'),[c[1] for c in commands() if c[0]=='make']
    assert targets and all(re.search(rf'^{t}:', rules, flags=re.M) for t in targets)

@pytest.mark.parametrize('link', sorted(set(re.findall(r'\]\((?!https?:)([^)\s]+)\)', README))))
def test_links_lead_somewhere(link): assert (ROOT/link.partition('#')[0]).is_file()
