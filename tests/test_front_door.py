"The front door: six lines that run as written, few names, and nothing imported before it is used."
import json, subprocess, sys, warnings
import pytest, torch
import switchable_llm as sl
from switchable_llm.apps.front_door import GROUPED
from switchable_llm.core.profiles import Rule
from switchable_llm.quantizers import QuantConfig
from switchable_llm.serving.exports import merge

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

def test_a_file_of_a_small_vocabulary_opens_without_a_word(child_env, tmp_path):
    "transformers warns of GPT-2's own bos_token_id, which the model that is opened does not have."
    pytest.importorskip('gguf')
    code = f"""if True:
        import logging, switchable_llm as sl
        said = []
        class Hear(logging.Handler):
            def emit(self, record): said.append(record.getMessage())
        logging.getLogger('transformers').addHandler(Hear())
        from switchable_llm.formats.gguf_file import export_gguf
        model,tokenizer = sl.load('tiny')
        sl.make_switchable(model, ['bw8'])
        export_gguf(model, 'bw8', {str(tmp_path/'m.gguf')!r}, tokenizer=tokenizer, adapter='merged')
        assert sl.load({str(tmp_path/'m.gguf')!r})[0].config.bos_token_id is None
        print([s for s in said if 'token_id' in s])"""
    assert run(code, child_env).strip()=='[]'

# --- codes chosen for texts ------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def stories():
    return [q['context'] for q in sl.squad('tiny', n=200)]

def switchable(profiles):
    model,tokenizer = sl.load('tiny')
    sl.make_switchable(model, profiles, GROUPED)
    return model,tokenizer

def test_codes_are_chosen_for_the_widths_that_the_profiles_have(stories):
    mixed = sl.Profile('mixed', 'w5a8', (Rule('w3', site=('mlp_in',)), Rule('w6', site=('mlp_out',))))
    found = sl.quantize(*switchable(['w2a8', mixed, 'bw8']), stories, 40, progress=False)
    assert all(list(c.chosen)==[2, 3, 5, 6, 8] for c in found.values())
    for widths in ((8,), (4, 6, 8)):
        with pytest.raises(ValueError, match=r"profile 'w3a8' has 3 bits, for which no code would be chosen.*leave widths out"):
            sl.quantize(*switchable(['w3a8', 'bw8']), stories, 40, widths=widths, progress=False)

def test_where_choosing_is_worse_than_rounding_it_is_said(stories, recwarn):
    "A weight that is on a grid of 4 bits already has no error there, until a code has to serve other widths too."
    model,tokenizer = switchable(['w4'])
    sl.quantize(model, tokenizer, stories, 40, progress=False)
    plain = merge(model, 'w4', adapters=False)
    recwarn.clear()
    with pytest.warns(UserWarning, match=r'more error than rounding at w4 \(\S+e-\d+ against \S+e-\d+\)'):
        found = sl.quantize(plain, tokenizer, stories, 40, progress=False)
    assert sum(c.chosen[4] for c in found.values())>2*sum(c.rounded[4] for c in found.values())
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        sl.quantize(sl.load('tiny')[0], tokenizer, stories, 40, progress=False)

def test_nested_codes_hold_no_more_than_8_bits_and_it_is_said_before_a_layer_is_replaced():
    model,_ = sl.load('tiny')
    for wide in ('w9a8', sl.Profile('wide', 'w8', (Rule('w12', site=('mlp_in',)),))):
        with pytest.raises(ValueError, match='nested codes hold 2 to 8 bits.*independent'): sl.make_switchable(model, ['bw8', wide])
    assert not hasattr(model, 'switch')
    sl.make_switchable(model, ['bw8', 'w9a8'], QuantConfig(act='per_token', codes='independent'))

@pytest.mark.parametrize('how,says', [
    (dict(widths=4), 'widths=4: needs a tuple'), (dict(widths=(4.5,)), 'widths=4.5: nested codes hold 2 to 8 bits'),
    (dict(widths=(1, 4)), 'widths=1: nested codes hold 2 to 8'), (dict(widths=(12,)), 'widths=12: nested codes hold 2 to 8'),
    (dict(examples=[None]*9), r'examples\[0\]=None: give texts'), (dict(examples=['a', 3]), r'examples\[1\]=3'),
    (dict(max_length=0), 'max_length=0: needs 1 or more'), (dict(n=0), 'n=0: needs 1 or more'),
    (dict(max_length=1), 'max_length=1: cuts the calibration texts to 128 tokens'),
    (dict(examples=['short']), 'the calibration texts have [0-9]+ tokens: give 512')])
def test_what_cannot_be_is_told_by_its_name(how, says, stories):
    model,tokenizer = sl.load('tiny')
    with pytest.raises(ValueError, match=says): sl.quantize(model, tokenizer, **(dict(examples=stories, progress=False) | how))
    if 'texts have' not in says: assert not hasattr(model, 'switch')

def test_one_question_is_no_list_of_questions():
    model,tokenizer = sl.load('tiny')
    question, = sl.squad('tiny', 'validation', 1)
    for work in (sl.answer, sl.evaluate):
        with pytest.raises(ValueError, match=r'is one dict.*\[question\]'): work(model, tokenizer, question)
    with pytest.raises(ValueError, match=r'is one dict.*\[question\]'): sl.train(*switchable(['bw8']), question)

def test_adapters_begin_with_the_same_numbers():
    def numbers(seed):
        torch.manual_seed(torch.seed() % 1000)
        before,(model,_) = torch.get_rng_state(),sl.load('tiny')
        sl.make_switchable(model, ['bw8'], seed=seed)
        assert torch.equal(torch.get_rng_state(), before)   # the caller's own draws go on as they would
        return torch.cat([p.detach().flatten() for l in model.switch.layers for p in l.adapters.parameters()])
    assert torch.equal(numbers(0), numbers(0)) and not torch.equal(numbers(0), numbers(1))
