"The embedded model has room: float errs, each width costs something, and its outlier channels change no answer."
import re, runpy
import numpy as np, pytest, torch
from conftest import ROOT
from switchable_llm.core.calibration import calibrate_
from switchable_llm.core.profiles import read_profiles
from switchable_llm.core.switching import make_switchable_, use_profile
from switchable_llm.data.embedded import tiny_squad, tiny_tokenizer
from switchable_llm.data.encoding import encode
from switchable_llm.models.loading import load_model
from switchable_llm.profiles_eval import answer, perplexity
from switchable_llm.quantizers import QuantConfig
from switchable_llm.search.intervals import interval
from switchable_llm.study.records import PRESETS
from switchable_llm.study.runs import calibration_batches, study_data

PRESET = PRESETS['tiny']
WIDTHS = 'bw8','w6a6','w4a8','w4a4'
MADE = runpy.run_path(ROOT/'scripts'/'train_tiny.py')

@pytest.fixture(scope='module')
def scored():
    "Surprise of 1,000 answers, in nats, of the untrained model with the preset's quantizer."
    model,tok = load_model('tiny')
    make_switchable_(model, read_profiles(WIDTHS), QuantConfig(weight=PRESET.weight, act=PRESET.act, codes=PRESET.codes))
    calibrate_(model, calibration_batches(PRESET, study_data(PRESET, tok)[0], tok.pad_token_id))
    asked,nll = tiny_squad(1000, 'validation'),{}
    for p in ('float', *WIDTHS):
        with use_profile(model, p): nll[p] = np.array(perplexity(model, tok, asked, PRESET.max_length).nll_answer)
    return nll

def test_each_width_costs_something(scored):
    rises = [interval(np.mean, scored[p]-scored['float']) for p in WIDTHS]
    assert all(r.low>0 for r in rises), rises
    assert rises[0].value < rises[1].value < rises[3].value and rises[0].value < rises[2].value < rises[3].value

def test_float_answers_most_and_not_all():
    model,tok = load_model('tiny')
    asked = tiny_squad(1000, 'validation')
    right = np.mean([a==q['answers']['text'][0] for a,q in zip(answer(model, tok, asked, PRESET.max_length), asked)])
    assert .85<=right<=.95

def test_outlier_channels_change_nothing():
    "Taken out again, they leave the same logits; with them, some channels are far larger than the others."
    (model,tok),(plain,_) = load_model('tiny'),load_model('tiny')
    MADE['add_outliers_'](plain, factors={i:1/k for i,k in MADE['OUTLIERS'].items()})
    ids = torch.tensor([encode(tiny_squad(1, 'validation')[0], tok).ids])
    with torch.no_grad(): assert torch.equal(model(ids).logits, plain(ids).logits)
    def ratio(m):   # largest over median channel of what the first MLP reads
        seen = []
        hook = m.transformer.h[1].mlp.c_fc.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
        with torch.no_grad(): m(ids)
        hook.remove()
        size = seen[0].abs().amax((0, 1))
        return (size.max()/size.median()).item()
    assert ratio(model) > 2*ratio(plain)

def test_questions_of_two_steps():
    "They name nobody that the answer's sentence is about; one sentence describes whom they mean, another answers."
    def plain(q): return re.search(r'(of|live|born|is|does|was) [A-Z][a-z]{3}\b', q['question']) and 'the home of' not in q['question']
    asked = [q for q in tiny_squad(400, max_facts=6, two_step=1.) if not plain(q)]
    assert len(asked)>100 and all(plain(q) for q in tiny_squad(400, two_step=0.))
    for q in asked:
        start = q['answers']['answer_start'][0]
        sentence = next(s for s in re.finditer(r'[^.]+\.', q['context']) if s.start()<=start<s.end())[0]
        words = {w for w in re.findall(r'\w+', sentence) if w[0].isupper() or w.isdigit()}-{'The'}
        told = {w for w in re.findall(r'\w+', q['question']) if w[0].isupper() and len(w)==4 or w.isdigit()}-{'When','What'}
        assert not words&told, (q, sentence)

@pytest.mark.parametrize('two_step', [-.1, 1.1, float('nan')])
def test_a_share_is_a_share(two_step):
    with pytest.raises(ValueError, match='two_step=.*needs a share'): tiny_squad(1, two_step=two_step)

def test_the_tokenizer_of_the_package_is_the_one_that_is_made():
    made,there = tiny_tokenizer(),load_model('tiny')[1]
    assert made.get_vocab()==there.get_vocab()
    assert all(made(q['context']).input_ids==there(q['context']).input_ids for q in tiny_squad(50))
