"`generate()` with a batch: native rows, each the answer that it gives alone; padding, beams, sampling, a profile for each row."
import warnings
import pytest, torch
import test_cache_bits as bits, test_lean_families as families
from switchable_llm.core.switching import use_profile
from switchable_llm.quantizers import QuantConfig
from test_rows import packed

pytestmark = families.native
KW = dict(max_new_tokens=10, pad_token_id=0, eos_token_id=None, do_sample=False)

@pytest.fixture(scope='module', params=['llama','mistral','gpt2'])
def model(request, tmp_path_factory):
    return packed(bits.toy(request.param), tmp_path_factory.mktemp('b')/'m.safetensors', QuantConfig(act='per_token'))

def texts(n=4):
    "Prompts of several lengths, padded on the left; their mask; the prompts alone."
    g = torch.Generator().manual_seed(3)
    alone = [torch.randint(3, 97, (1, k), generator=g) for k in (9, 4, 17, 1)[:n]]
    wide = max(t.shape[1] for t in alone)
    ids = torch.cat([torch.nn.functional.pad(t, (wide-t.shape[1], 0)) for t in alone])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(t), (wide-t.shape[1], 0)) for t in alone])
    return ids, mask, alone

def new(model, ids, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        return model.generate(ids, **(KW | kw))[:, ids.shape[1]:]

def test_a_row_is_its_answer_alone(model):
    ids,mask,alone = texts()
    for name in ('w8','w8a8','w4a8'):
        with use_profile(model, name):
            got = new(model, ids, attention_mask=mask)
            assert model.native_status.modules==0 and model.native_status.native==mask.sum()+4*9
            for row,t in zip(got, alone): assert torch.equal(row, new(model, t)[0])

def test_each_row_at_its_own_profile(model):
    ids,mask,alone = texts()
    names = ['w4a8','w8a8','w8','w4a8_k8v4']
    got = new(model, ids, attention_mask=mask, profiles=names)
    for row,t,name in zip(got, alone, names):
        with use_profile(model, name): assert torch.equal(row, new(model, t)[0])
    one = new(model, alone[0], profiles=['w6a6'])
    with use_profile(model, 'w6a6'): assert torch.equal(one, new(model, alone[0]))

def test_scores_are_those_of_the_rows_alone(model):
    ids,mask,alone = texts(3)
    kw = dict(output_logits=True, return_dict_in_generate=True, **KW)
    with use_profile(model, 'w8a8'):
        got = torch.stack(model.generate(ids, attention_mask=mask, **kw).logits, 1)
        for row,t in zip(got, alone): assert torch.equal(row, torch.stack(model.generate(t, **kw).logits, 1)[0])

def test_beams_and_samples_as_the_modules_choose_them(model):
    ids,mask,_ = texts(3)
    with use_profile(model, 'w8'):   # float activations: no code flips
        for how in (dict(num_beams=3), dict(num_beams=3, num_return_sequences=2), dict(do_sample=True, num_return_sequences=3)):
            torch.manual_seed(7); got = new(model, ids, attention_mask=mask, **how)
            assert model.native_status.modules==0
            torch.manual_seed(7)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                want = model.generate(ids, attention_mask=mask, cache_implementation='dynamic', **(KW | how))[:, ids.shape[1]:]
            assert model.native_status.native==0
            assert torch.equal(got, want), how

def test_beams_at_profiles_of_their_own(model):
    ids,mask,alone = texts(2)
    got = new(model, ids, attention_mask=mask, num_beams=3, profiles=['w4a8','w8'])
    for row,t,name in zip(got, alone, ('w4a8','w8')):
        with use_profile(model, name): assert torch.equal(row, new(model, t, num_beams=3)[0])

def test_what_cannot_be_is_said(model):
    ids,mask,_ = texts(2)
    with pytest.raises(ValueError, match='profiles has 1 names for 2 rows'): model.generate(ids, profiles=['w8'], **KW)
    with pytest.raises(ValueError, match="give a name for each row"): model.generate(ids, profiles='w8', **KW)
    with pytest.raises((ValueError, KeyError), match='w99'): model.generate(ids, profiles=['w99','w8'], **KW)
    with pytest.raises(ValueError, match='native steps'): model.generate(ids, profiles=['w8','w4'], use_cache=False, **KW)
    right = mask.flip(1)
    with pytest.warns(UserWarning, match='padding that is not on the left'): model.generate(ids.flip(1), attention_mask=right, **KW)
    assert model.native_status.native==0
