"The page of recipes: every line of it runs as it stands, in its order, in one folder."
import re, shlex, subprocess, sys
import pytest
from conftest import ROOT
from switchable_llm.apps.cli import make_parser

sys.path.insert(0, str(ROOT/'scripts'))
import project

PAGE = ROOT/'nbs/how.ipynb'
MAIN = 'from switchable_llm.apps.cli import main; status = main({}); assert not status, status\n'

def blocks(source, language): return re.findall(rf'^```{language}\n(.*?)^```', source, flags=re.M|re.S)

def commands(source, language='sh'):
    lines = (l for b in blocks(source, language) for l in b.splitlines() if l.startswith('switchable-llm '))
    return [shlex.split(l)[1:] for l in lines]

CELLS = project.read_cells(PAGE)
TEXTS = [c['source'] for c in CELLS if c['cell_type']=='markdown']

def served(client):
    "The lines of a client, asked of a server that is started as the page says, at a port that is free."
    return f'''
import subprocess, sys
server = subprocess.Popen([sys.executable, '-c', 'import sys; from switchable_llm.apps.cli import main; sys.exit(main())',
                           'serve', 'my-model.safetensors', '--port', '0'], stderr=subprocess.PIPE, text=True)
try:
    port = next(l for l in server.stderr if 'listening at' in l).split('/v1')[0].rpartition(':')[2]
    asked = """{client}""".replace(':8000', ':'+port).replace('client.completions', 'reply = client.completions')
    exec(asked)
    assert reply.choices[0].text and reply.model=='my-model:w4a8', reply
finally: server.terminate(); server.wait(60)
'''

def script():
    "All that the page says, as one Python program; the temporary folder is the page's own."
    for c in CELLS:
        if c['cell_type']=='code': yield c['source']; continue
        for language,block in re.findall(r'^```(\w+)\n(.*?)^```', c['source'], flags=re.M|re.S):
            if language=='yaml': yield f"Path('my_mix.yaml').write_text({block!r})"
            if language=='python': yield served(block)
            if language=='sh': yield from (MAIN.format(a) for a in commands(f'```sh\n{block}```') if a[0]!='serve')

def test_every_line_runs(tmp_path, child_env):
    (tmp_path/'how.py').write_text('\n'.join(script()))
    p = subprocess.run([sys.executable, 'how.py'], cwd=tmp_path, env=child_env, capture_output=True, text=True, timeout=1500)
    assert p.returncode==0, p.stderr[-3000:]

def test_commands_that_need_more_than_is_here_are_known():
    "llama.cpp, a network or a browser: at least the command line takes them."
    argvs = [a for t in TEXTS for k in ('sh','text') for a in commands(t, k)]
    assert len(argvs)>15
    for a in argvs: make_parser().parse_args(a)

@pytest.mark.parametrize('text', [t for s in TEXTS for t in re.split('(?=^## )', s, flags=re.M) if t.startswith('## ')])
def test_each_recipe_is_short_and_says_where_there_is_more(text):
    prose = re.sub('```.*?```', '', text, flags=re.S)
    assert len(prose.split())<90 and re.search(r'\]\([\w/]+\.(ipynb|html)', prose), text[:60]
