"Typos on real questions, attacks on other families and in bfloat16, and what a stopped study leaves."
import json, math, random
from dataclasses import replace
from pathlib import Path
import pytest, torch
from transformers import LlamaConfig, LlamaForCausalLM
from switchable_llm.adversarial import (
    ATTACKS, KINDS, WHERE, adaptive, adversarial_task, allowed_tokens, distortion,
    flip_tokens, misspell, perturbation, row_scores, stack_masks, token_mask, white_box, with_typos)
from switchable_llm.apps.cli import main
from switchable_llm.study.records import load_records
from switchable_llm.data.encoding import collate, encode
from switchable_llm.models.loading import load_model
from switchable_llm.data.squad import load_squad
from switchable_llm.data.embedded import tiny_squad, tiny_tokenizer
from switchable_llm.training.settings import TrainConfig
from switchable_llm.joint_training import fixed_profile, train
from switchable_llm.lora_routing import adapter_keys, adapter_params, add_adapters_
from switchable_llm.models.checkpoints import load_switchable, save_switchable
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.packed import load_packed
from switchable_llm.quantizers import QuantConfig
from switchable_llm.data.spans import collate_windows, encode_windows
from switchable_llm.search.extraction import span_extraction
from switchable_llm.search.strategies import score_strategy, strategy, use_strategy
from switchable_llm.core.switching import make_switchable_, use_profile
from test_real_models import byte_bpe

TOK = tiny_tokenizer()
PROFILES = 'bw4','bw8'
SQUAD = Path(__file__).resolve().parents[2]/'shared'/'data'/'squad'
ODD = [dict(id='odd', question=q, context=c, answers=dict(text=[a], answer_start=[c.index(a)]))
       for q,c,a in (('¿Quién? 日本は', 'Ünïcödé — 日本 “quotes” and\nlines, 42 %.', '日本'),
                     ('', 'x', 'x'), ('?', '1234 5678', '1234'), ('a'*50, 'Straße 7 straße', 'straße'))]

def real_questions(n=150): return load_squad(SQUAD, 'validation', n, seed=1) if SQUAD.exists() else tiny_squad(n)

def small_model():
    torch.manual_seed(0)
    small = dict(vocab_size=len(TOK), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    m = LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=2)).eval()
    make_switchable_(m, PROFILES, QuantConfig(act='per_token')); add_adapters_(m, r=2)
    for p in adapter_params(m).values(): torch.nn.init.normal_(p, std=.1)
    return m

@pytest.fixture(scope='module')
def model(): return small_model()

def batch_of(n=6):
    qs = tiny_squad(n, 'validation'); qs.sort(key=lambda q: -len(encode(q, TOK).ids))
    b = collate([encode(q, TOK) for q in qs], TOK.pad_token_id)
    return b, [q['id'] for q in qs], stack_masks([token_mask(q, TOK) for q in qs], b['input_ids'].shape[1])

def test_typos_on_real_questions():
    rng,qs = random.Random(0),real_questions(50)
    for q in qs+ODD:
        rate,where,kinds = rng.choice((0., .03, .3, 1.)),rng.choice(WHERE),rng.sample(KINDS, rng.randint(1, 4))
        protect = rng.random()<.7
        t = with_typos(q, rate, where, kinds, protect, seed=rng.random())
        for text,start,now in zip(q['answers']['text'], q['answers']['answer_start'], t['answers']['answer_start']):
            assert 0<=now<=len(t['context'])
            if protect: assert t['context'][now:now+len(text)]==text
        if rate==0: assert t==q
        assert (t['question']==q['question']) or where!='context'
        assert (t['context']==q['context']) or where!='question'
        assert t['id']==q['id'] and q==json.loads(json.dumps(q))
    low,high = (distortion(qs, [with_typos(q, r) for q in qs]) for r in (.05, .2))
    assert 0<low<high<.4

def test_a_higher_rate_adds_to_a_lower_one():
    text = real_questions(5)[0]['context']
    one,two = (misspell(text, r, ['neighbour'])[0] for r in (.1, .5))
    changed = [[a!=b for a,b in zip(text, t)] for t in (one, two)]
    assert sum(changed[0])<sum(changed[1]) and not any(a and not b for a,b in zip(*changed))

@pytest.mark.parametrize('tokenizer', [TOK, byte_bpe([q['context'] for q in real_questions(30)], 700)],
                         ids=['syllables','bytes'])
def test_mask_spares_frame_and_answer(tokenizer):
    for q in [*real_questions(40), *ODD]:
        for length in (512, 60):
            try: e = encode(q, tokenizer, length)
            except ValueError: continue   # a question that does not fit
            mask = token_mask(q, tokenizer, max_length=length)
            assert len(mask)==e.prompt
            kept = tokenizer.decode([i for i,m in zip(e.ids, mask) if not m])
            assert 'question:' in kept and 'context:' in kept

def test_attack_on_another_family_and_in_bfloat16(model):
    b,keys,where = batch_of()
    half = LlamaForCausalLM(model.config).eval()
    half.load_state_dict({k.replace('.base.', '.'):v for k,v in model.state_dict().items()
                          if 'adapters' not in k and 'observers' not in k})
    half.to(torch.bfloat16)
    make_switchable_(half, PROFILES, QuantConfig(act='per_token'))
    for m,slack in ((model, 1e-4), (half, .2)):
        with torch.no_grad(), use_profile(m, 'bw8'): clean = row_scores(m, b)[0]
        for name in ATTACKS:
            delta = perturbation(m, b, .3, ATTACKS[name], white_box('bw8'), keys, where)
            assert delta.dtype==torch.float32 and delta.isfinite().all() and not delta[~where].any()
            with torch.no_grad(), use_profile(m, 'bw8'): hurt = row_scores(m, b, delta)[0]
            if 'pgd' in name: assert hurt.mean()>clean.mean()-slack
        zero = perturbation(m, b, 0., ATTACKS['pgd'], white_box('bw8'), keys, where)
        # the clean result, to the bit
        with torch.no_grad(), use_profile(m, 'bw8'): assert torch.equal(row_scores(m, b, zero)[0], clean)
        allowed = allowed_tokens(m, TOK)
        flipped = flip_tokens(m, b, 2, allowed, adaptive(strategy('random_profile', PROFILES), 2), keys, where, tries=2)
        assert ((flipped!=b['input_ids']).sum(1)<=2).all() and not (flipped!=b['input_ids'])[~where].any()
    # attacks train nothing
    assert not any(p.grad is not None for p in model.parameters())

def test_order_of_configurations_does_not_matter(model):
    "Draws have no counter: a strategy that is scored after others scores the same."
    qs = tiny_squad(8, 'validation')
    def scored(name): return score_strategy(model, TOK, qs, strategy(name, PROFILES), max_new_tokens=3).lean()
    names = ['random_profile','random_layer','random_token','random_batch']
    first = {n:scored(n) for n in names}
    again = {n:scored(n) for n in reversed(names)}
    assert first==again
    shuffled = score_strategy(model, TOK, qs[::-1], strategy('random_profile', PROFILES), max_new_tokens=3).lean()
    assert shuffled['nll_answer'][::-1]==pytest.approx(first['random_profile']['nll_answer'], abs=1e-3)

def test_one_profile_is_no_draw(model):
    b,keys,_ = batch_of()
    with torch.no_grad(), use_profile(model, 'bw4'): fixed = row_scores(model, b)[0]
    for name in ('random_profile','random_layer','random_token','random_batch'):
        with torch.no_grad(), use_strategy(model, strategy(name, ['bw4']), keys):
            assert torch.equal(row_scores(model, b)[0], fixed)

def test_shared_adapter_is_saved_and_packed(tmp_path, toy_folder):
    m,tok = load_model(toy_folder)
    make_switchable_(m, ['bw4','bw8','mixed8648'], QuantConfig(act='per_token', codes='nested'))
    add_adapters_(m, route='shared', r=2)
    for p in adapter_params(m).values(): torch.nn.init.normal_(p, std=.2)
    save_switchable(m, tmp_path/'saved', base=str(toy_folder))
    back = load_switchable(tmp_path/'saved', load_model(toy_folder)[0])
    assert back.switch.route_name=='shared' and adapter_keys(back)==['shared']
    freeze(m, tmp_path/'packed.safetensors', tokenizer=tok); packed = load_packed(tmp_path/'packed.safetensors')
    ids = torch.randint(5, len(tok), (2, 9))
    with torch.no_grad():
        for p in m.switch.profiles:
            with use_profile(m, p), use_profile(back, p):
                want = m(ids).logits; assert torch.equal(want, back(ids).logits)
            if p!='float':
                with use_profile(packed, p): torch.testing.assert_close(packed(ids).logits, want, atol=1e-3, rtol=1e-3)

def test_attack_on_span_extraction(toy_folder):
    "A task that is not next-token prediction can be attacked and trained against."
    m,tok = load_model(toy_folder, head='span')
    windows = encode_windows([q for q in tiny_squad(40, max_facts=4)], tok, max_length=64, stride=8)[:12]
    make_switchable_(m, PROFILES, QuantConfig(act='per_token')); add_adapters_(m, r=2)
    b = collate_windows(windows[:4], tok.pad_token_id); w = span_extraction.weights(b, None)
    delta = perturbation(m, b, .3, replace(ATTACKS['pgd'], steps=3), task=span_extraction, weights=w)
    with torch.no_grad(): attacked,clean = (row_scores(m, b, d, span_extraction, w)[0].sum() for d in (delta, None))
    assert attacked>clean
    log = train(m, windows, fixed_profile('bw4'),
                TrainConfig(steps=2, batch_size=4, accumulate=1, lr=1e-3, warmup=0), tok.pad_token_id,
                adversarial_task(span_extraction, .1), progress=False)
    assert all(math.isfinite(l) for _,l,*_ in log['curve'])

def test_stopped_command_goes_on(tmp_path, toy_folder, monkeypatch, capsys):
    "Killed between arms and between attacks, the same command ends with the records of one that was not."
    monkeypatch.chdir(tmp_path)
    small = (f"--model {toy_folder} --steps 3 --batch-size 4 --train-n 30 --calibration 2 --eval-n 4 "
             "--profiles bw4 bw6 bw8 --max-new-tokens 3 --questions 3 --answers 2 --arms shared float --quiet")
    command = f'experiment routes robustness {small}'.split()
    import switchable_llm.study.robustness as robustness
    short = replace(robustness.PLANS['tiny'], radii=(.05,), rates=(.1,), steps=2, restarts=1, draws=1, repeats=1, train_steps=1)
    monkeypatch.setitem(robustness.PLANS, 'tiny', short)
    assert main([*command, '--out', 'whole'])==0
    said = capsys.readouterr().out
    assert '# routes' in said and '# robustness' in said and 'Checks of the attacks' in said
    count,real = [0],robustness.stage
    def stop(path, settings, make):
        count[0] += 1
        if count[0] in (2, 8, 20): raise KeyboardInterrupt
        return real(path, settings, make)
    monkeypatch.setattr(robustness, 'stage', stop)
    statuses = [main([*command, '--out', 'parts']) for _ in range(5)]
    assert 130 in statuses and statuses[-1]==0, statuses
    strip = lambda r: {k:v for k,v in r.items()
                       if k in ('scores','clean','typos','attacks','ids','steps','name','seed')}
    for e in ('arms','robustness'):
        a,b = ([strip(r) for r in load_records(tmp_path/o, 'tiny', e)] for o in ('whole','parts'))
        assert a==b and len(a)==2
    assert main([*command, '--out', 'parts', '--r', '3'])==1 and 'other settings' in capsys.readouterr().err

def test_bad_input_is_named(tmp_path, toy_folder, model):
    for rate in (-.1, 1.5, math.nan):
        with pytest.raises(ValueError, match='rate='): misspell('abc', rate)
    with pytest.raises(ValueError, match='profiles is empty'): strategy('random_profile', [])
    with pytest.raises(ValueError, match='radius='): perturbation(model, batch_of(2)[0], -1.)
    with pytest.raises(ValueError, match='keys'):
        with use_strategy(model, strategy('random_profile', PROFILES), ['one']):
            model(torch.ones(2, 3, dtype=torch.long))
    assert misspell('', 1.)==('', [0]) and misspell('12:30 !?', 1.)[0]=='12:30 !?'
