"The front door: six lines that run as written, few names, and nothing imported before it is used."
import json, subprocess, sys
import pytest
import switchable_llm as sl

def run(code, env, **kw):
    "What a fresh process prints, as JSON."
    out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=600, **kw)
    assert out.returncode==0, out.stderr
    return out.stdout

def six_lines():
    "The lines of the package's own documentation."
    lines = [l.strip() for l in sl.__doc__.splitlines() if l.startswith('    ')]
    assert lines[0].startswith('import switchable_llm as sl') and len(lines)==6
    return '\n'.join(lines)

def test_the_six_lines_run_as_written(child_env, tmp_path):
    assert 'w4a8' in run(six_lines(), child_env, cwd=tmp_path)

def test_dir_shows_what_people_need():
    names = [n for n in dir(sl) if not n.startswith('_')]
    assert sorted(sl.__all__)==names and 20<=len(names)<=36

@pytest.mark.parametrize('name', sl.__all__)
def test_each_name_is_there_and_documented(name):
    found = getattr(sl, name)
    assert found is getattr(sl, name)
    if name!='PROFILES': assert found.__doc__ and found.__module__==f'switchable_llm.{sl.WHERE[name]}'

def test_help_shows_them():
    import pydoc
    text = pydoc.render_doc(sl, renderer=pydoc.plaintext)
    assert all(n in text for n in sl.__all__)

def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(AttributeError, match='no attribute .quantise.*make_switchable'): sl.quantise

HEAVY = 'matplotlib','ipywidgets','datasets','torchmetrics','scipy'

def loaded_after(code, env):
    "What of it is loaded, beside what transformers itself takes where it is installed."
    first = 'import json, sys, torch, transformers, accelerate\nfrom transformers import PreTrainedModel\nbefore = set(sys.modules)'
    probe = f'{first}\n{code}\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules and m not in before]))'
    return json.loads(run(probe, env).splitlines()[-1])

@pytest.mark.parametrize('code', ['import switchable_llm', 'import switchable_llm as sl\nsl.load, sl.train, sl.freeze, sl.squad',
                                  'import switchable_llm as sl\nm,t = sl.load("tiny")\nsl.make_switchable(m)\n'
                                  'sl.train(m, t, sl.squad("tiny", n=8), steps=1, progress=False)'])
def test_a_server_and_a_trainer_load_nothing_heavy(code, child_env): assert not loaded_after(code, child_env)

COST = """
import json, resource, sys, time
import torch, transformers
from transformers import PreTrainedModel   # transformers itself is lazy
def now(): return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
before = now()
import switchable_llm as sl
sl.load, sl.make_switchable, sl.train, sl.use_profile
print(json.dumps([b-a for a,b in zip(before, now())]+[before[0]]))
"""

def test_the_import_costs_little(child_env):
    """Beside torch and transformers: at most 0.3 s of processor time, or on a slow machine a sixth of what those two take,
    and 20 MB, with all that loads and trains."""
    costs = [json.loads(run(COST, child_env)) for _ in range(3)]
    print(costs)
    assert any(s<max(.3, base/6) for s,_,base in costs) and min(mb for _,mb,_ in costs)<20, costs

def test_what_the_extra_brings_is_told_by_its_name(child_env):
    code = ("import sys, torch\nfrom transformers import PreTrainedModel\nfor m in ('scipy','torchmetrics'): sys.modules[m] = None\n"
            "import pydoc, switchable_llm as sl\nm,t = sl.load('tiny'); sl.make_switchable(m)\n"
            "print(sl.answer(m, t, sl.squad('tiny', 'validation', 1)))\nassert pydoc.render_doc(sl)\n"
            "try: sl.evaluate(m, t, sl.squad('tiny', 'validation', 2), 'bw8')\nexcept ImportError as e: print(e)")
    assert "pip install 'switchable-llm[study]'" in run(code, child_env)

def test_a_packed_model_says_that_it_is_frozen(tmp_path):
    import switchable_llm as sl
    model,tokenizer = sl.load('tiny')
    sl.make_switchable(model, ['w4'])
    sl.freeze(model, tmp_path/'m.safetensors', tokenizer=tokenizer)
    packed,tokenizer = sl.load(tmp_path/'m.safetensors')
    for work in (sl.train, sl.quantize):
        with pytest.raises(ValueError, match='loaded from a packed file and is frozen'): work(packed, tokenizer, sl.squad('tiny', n=4))
