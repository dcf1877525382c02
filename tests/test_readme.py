"The README's code runs as it is written, and its commands are commands."
import re, shlex, subprocess, sys
from conftest import ROOT
from switchable_llm.apps.cli import make_parser

README = (ROOT/'README.md').read_text(encoding='utf-8')

def blocks(language): return re.findall(rf'^```{language}\n(.*?)^```', README, flags=re.M|re.S)

def test_first_screen():
    "One sentence, a picture, six lines, a table of the real model."
    start = README[:README.index('\n## ')]
    picture = re.search(r'!\[[^\]]{20,}\]\((index_files/[\w-]+\.svg)\)', start)
    assert picture and (ROOT/picture[1]).is_file()
    assert len(blocks('python')[1].strip().splitlines())==6 and '| profile |' in start and 'SmolLM2' in start

def test_python_runs(tmp_path, child_env):
    check = '''
assert [s.profile.name for s in scores]==['float','bw4','bw6','bw8'] and model.switch.profile.name=='float'
assert served.switch.profile.name=='bw6' and answer(served, tokenizer, [question])[0]==question['answers']['text'][0]
print('done')'''
    code = '\n'.join(blocks('python'))+check
    how = dict(cwd=tmp_path, env=child_env, capture_output=True, text=True, timeout=1800)
    p = subprocess.run([sys.executable, '-c', code], **how)
    assert p.returncode==0 and p.stdout.strip().endswith('done'), p.stderr[-2000:]

def test_commands_are_known():
    lines = [l.split('  #')[0].strip() for b in blocks('sh') for l in b.splitlines()]
    found = [shlex.split(l)[1:] for l in lines if l.startswith('switchable-llm ')]
    assert len(found)>8
    for argv in found: make_parser().parse_args(argv)   # ends the process where an option is unknown
    targets = [l.split()[1] for l in lines if l.startswith('make ')]
    rules = (ROOT/'Makefile').read_text(encoding='utf-8')
    assert targets and all(re.search(rf'^{t}:', rules, flags=re.M) for t in targets)
