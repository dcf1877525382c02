"transformers' Trainer and trl's train a switchable model: the same losses as our loop, and checkpoints that go on."
import re
import pytest, torch
from safetensors.torch import load_file
from datasets import Dataset
from transformers import Trainer, EarlyStoppingCallback, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
import switchable_llm as sl
from switchable_llm.core.profiles import Profile
from switchable_llm.core.calibration import learn_ranges_
from switchable_llm.core.switching import added_params, base_params, make_switchable_, use_profile
from switchable_llm.data.embedded import tiny_squad
from switchable_llm.data.encoding import collate, encode
from switchable_llm.joint_training import all_profiles, batch_rows, fixed_profile, random_layers, random_profile, train
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.models.loading import load_model
from switchable_llm.training.callback import SwitchCallback, reference_model
from switchable_llm.training.settings import TrainConfig

NAMES = ('bw8','bw6','bw4')
STEPS,SIZE,ACCUMULATE = 6,4,2

def switchable(folder='tiny', dropout=0., act='per_token', profiles=NAMES, **kw):
    "A model with adapters that already do something, its tokenizer and questions; the same each time."
    model,tok = load_model(folder)
    make_switchable_(model, profiles, sl.QuantConfig(act=act), **kw)
    torch.manual_seed(0); add_adapters_(model, r=4, dropout=dropout)
    for n,p in added_params(model).items(): torch.nn.init.normal_(p, std=.02)
    data = [encode(q, tok) for q in tiny_squad(64)]
    if act=='per_tensor': sl.calibrate_(model, [collate(data[:8], tok.pad_token_id)])
    return model, tok, data

def settings(folder, **kw):
    "Of a run like `TrainConfig(steps=STEPS, ...)` in `ours`."
    own = dict(per_device_train_batch_size=SIZE, gradient_accumulation_steps=ACCUMULATE, max_steps=STEPS, warmup_steps=2,
               learning_rate=1e-3, weight_decay=.1, optim='adamw_torch', seed=0, train_sampling_strategy='sequential')
    quiet = dict(use_cpu=True, report_to=[], logging_steps=1, save_strategy='no', disable_tqdm=True)
    return dict(output_dir=str(folder)) | own | quiet | kw

def trainer(model, tok, data, folder, callback, cls=Trainer, evaluate=None, **kw):
    "A trainer that takes the questions in the order of our loop."
    lengths = tuple(len(d.ids) for d in data)
    order = [j for i in range(STEPS*ACCUMULATE) for j in batch_rows(lengths, SIZE, i, 0)]
    args = TrainingArguments(**settings(folder, remove_unused_columns=False, **kw))
    return cls(model, args, data_collator=lambda rows: collate(rows, tok.pad_token_id), callbacks=[callback],
               train_dataset=[data[j] for j in order], eval_dataset=evaluate)

def losses(trainer): return [h['loss'] for h in trainer.state.log_history if 'loss' in h]
def profiles_of(trainer): return [h['profile'] for h in trainer.state.log_history if 'loss' in h]

def ours(model, tok, data, policy, **kw):
    "Losses and profiles of our loop."
    cfg = TrainConfig(steps=STEPS, batch_size=SIZE, accumulate=ACCUMULATE, lr=1e-3, warmup=2, weight_decay=.1, **kw)
    curve = train(model, data, policy, cfg, tok.pad_token_id, progress=False, cpu=True)['curve']
    return [c[1] for c in curve], [c[2] for c in curve]

# With float activations no code flips where two loops add in another order: what is compared is continuous.
SMOOTH = [Profile(f'w{w}', sl.Bits(w)) for w in (4, 6, 8)]

def both(policy, folder, act='per_token', profiles=NAMES, learned=False, ours_too=None, **kw):
    "Our loop and Trainer on the same: losses, profiles and models."
    (a,tok,data),(b,*_) = (switchable(act=act, profiles=profiles) for _ in range(2))
    for m in (a, b) if learned else (): learn_ranges_(m)   # they have a learning rate of their own
    wanted,drawn = ours(a, tok, data, policy(a), **ours_too or {})
    t = trainer(b, tok, data, folder, SwitchCallback(policy(b)), **kw)
    t.train()
    assert profiles_of(t)==drawn and len(set(losses(t)))==STEPS
    assert b.switch.profile.name=='float', "the live profile is the caller's"
    return wanted, losses(t), a, b

def drawn_from(names): return lambda model: random_profile(names, 3)

@pytest.mark.parametrize('policy', ['profiles','layers'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_the_losses_are_those_of_our_loop(policy, checkpointing, tmp_path):
    names = [p.name for p in SMOOTH]
    policy = dict(profiles=drawn_from(names), layers=lambda m: random_layers(m, ('w4','w6','w8'), seed=3))[policy]
    wanted,found,a,b = both(policy, tmp_path, profiles=SMOOTH, activation_checkpointing=checkpointing)
    assert found==pytest.approx(wanted, rel=1e-4)
    for p,q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-5)

VARIANTS = dict(per_token={}, static=dict(act='per_tensor'), learned=dict(act='per_tensor', learned=True),
                bf16=dict(bf16=True, ours_too=dict(mixed_precision='bf16')))

@pytest.mark.parametrize('how', VARIANTS)
def test_so_they_are_with_activations_of_few_bits(how, tmp_path):
    "To the bit where sums are added alike; a code that flips elsewhere moves a loss a little."
    wanted,found,a,b = both(drawn_from(NAMES), tmp_path, **VARIANTS[how])
    assert found==pytest.approx(wanted, rel=.02)
    if how=='learned':
        moved = [(n, p, q) for (n,p),q in zip(a.named_parameters(), b.parameters()) if n.endswith('log_ratio')]
        assert any(p.abs().max()>1e-3 for _,p,_ in moved)
        for _,p,q in moved: torch.testing.assert_close(q, p, rtol=.05, atol=1e-4)

# --- checkpoints ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('act', ['per_token','per_tensor'])
def test_a_run_that_was_stopped_goes_on(act, tmp_path):
    "With dropout, moments, learned ranges and the draw of the profiles as if it had not been stopped."
    def fresh(seed=None):
        model,tok,data = switchable(dropout=.1, act=act)
        if act=='per_tensor': learn_ranges_(model)
        for p in added_params(model).values() if seed else (): torch.nn.init.normal_(p)   # all is to be read
        return model, tok, data
    def run(at, model, tok, data, **kw):
        t = trainer(model, tok, data, at, SwitchCallback(random_profile(NAMES, 3)), save_strategy='steps', save_steps=3)
        t.train(**kw)
        return t
    whole = run(tmp_path, *fresh())
    saved = load_file(tmp_path/'checkpoint-3/model.safetensors')
    assert {n for n in added_params(whole.model)}<=set(saved)
    if act=='per_tensor': assert sum(n.endswith('.log_ratio') for n in saved)>0
    again = run(tmp_path, *fresh(1), resume_from_checkpoint=str(tmp_path/'checkpoint-3'))
    assert losses(again)==losses(whole) and profiles_of(again)==profiles_of(whole)
    for (n,p),q in zip(whole.model.named_parameters(), again.model.parameters()): assert torch.equal(p, q), n

# --- evaluation -----------------------------------------------------------------------------------------------------

def loss_at(model, tok, data, profile):
    with use_profile(model, profile), torch.no_grad():
        return model.eval()(**collate(data, tok.pad_token_id)).loss.item()

def test_evaluation_is_at_the_live_profile_or_at_each(tmp_path):
    model,tok,data = switchable()
    model.switch.profile = 'bw6'
    t = trainer(model, tok, data, tmp_path, SwitchCallback(), evaluate=data[:8], eval_strategy='steps', eval_steps=3)
    t.train()
    assert t.evaluate()['eval_loss']==pytest.approx(loss_at(model, tok, data[:8], 'bw6'), rel=1e-5)
    assert sum('eval_loss' in h for h in t.state.log_history)==3 and model.switch.profile.name=='bw6'
    t = trainer(model, tok, data, tmp_path, SwitchCallback(evaluate=['bw4','bw8']), evaluate=data[:8])
    found = t.evaluate()
    for p in ('bw4','bw8'):
        assert found[f'eval_{p}_loss']==pytest.approx(loss_at(model, tok, data[:8], p), rel=1e-5)
    assert found['eval_loss']==found['eval_bw4_loss']!=found['eval_bw8_loss']
    two = t.evaluate(dict(a=data[:8], b=data[8:12]))
    assert two['eval_bw8_a_loss']==found['eval_bw8_loss'] and 'eval_bw4_b_loss' in two

def test_the_best_checkpoint_is_that_of_the_first_profile(tmp_path):
    model,tok,data = switchable()
    t = trainer(model, tok, data, tmp_path, SwitchCallback(evaluate=['bw4','bw8']), evaluate=data[:8],
                eval_strategy='steps', eval_steps=2, save_strategy='steps', save_steps=2, load_best_model_at_end=True,
                learning_rate=.05)
    t.train()
    seen = [h['eval_bw4_loss'] for h in t.state.log_history if 'eval_bw4_loss' in h]
    assert len(seen)==3 and t.state.best_metric==min(seen)<max(seen)
    assert loss_at(model, tok, data[:8], 'bw4')==pytest.approx(min(seen), rel=1e-5)

# --- errors ---------------------------------------------------------------------------------------------------------

class Stop(TrainerCallback):
    def on_substep_end(self, args, state, *rest, **kwargs):
        if state.global_step==2: raise KeyboardInterrupt

def test_a_run_that_fails_leaves_the_profile(tmp_path):
    model,tok,data = switchable()
    t = trainer(model, tok, data, tmp_path, SwitchCallback(fixed_profile('bw4')))
    t.add_callback(Stop)
    with use_profile(model, 'bw8'):
        with pytest.raises(KeyboardInterrupt): t.train()
        assert model.switch.profile.name=='bw8' and model.training
        batch = collate(data[:4], tok.pad_token_id)
        assert model(**batch).loss.item()==pytest.approx(loss_at(model, tok, data[:4], 'bw8'), rel=1e-6)
    assert model.switch.profile.name=='float'

def test_what_cannot_work_is_said_before_the_work(tmp_path):
    model,tok,data = switchable()
    def refused(what, callback, m=model):
        with pytest.raises(ValueError, match=re.escape(what)): trainer(m, tok, data, tmp_path, callback)
    refused("profile 'bw3'", SwitchCallback(fixed_profile('bw3')))
    refused("profile 'bw3'", SwitchCallback(evaluate=['bw8','bw3']))
    refused('3 profiles at step 0 (bw8, bw6, bw4)', SwitchCallback(all_profiles(NAMES)))
    refused('make_switchable_', SwitchCallback(), load_model('tiny')[0])
    with pytest.raises(ValueError, match="'bw8'"): SwitchCallback(evaluate='bw8')
    with pytest.raises(RuntimeError, match='callbacks='): SwitchCallback().on_train_begin(None, None, None)
    with pytest.raises(ValueError, match="profile 'float' trains nothing"):
        trainer(model, tok, data, tmp_path, SwitchCallback(fixed_profile('float'))).train()

def test_a_callback_that_was_removed_does_nothing(tmp_path):
    model,tok,data = switchable()
    t = trainer(model, tok, data, tmp_path, SwitchCallback(fixed_profile('bw4'), evaluate=['bw4','bw8']), evaluate=data[:4])
    t.remove_callback(SwitchCallback)
    model.switch.profile = 'bw8'
    assert set(t.evaluate())>={'eval_loss'} and 'eval_bw4_loss' not in t.evaluate()
    t.train()
    t.add_callback(SwitchCallback(fixed_profile('bw4')))
    t.train()
    assert profiles_of(t)==['bw4']*STEPS

def test_the_frozen_base_has_no_dropout(toy_folder, tmp_path):
    "As in our loop; GPT-2's own is 0.1."
    def first(callback, **kw):
        model,tok,data = switchable(toy_folder)
        t = trainer(model, tok, data, tmp_path, callback, max_steps=1, gradient_accumulation_steps=1, **kw)
        t.train()
        return losses(t)[0], loss_at(switchable(toy_folder)[0], tok, [t.train_dataset[i] for i in range(SIZE)], 'bw4')
    for kw in ({}, dict(activation_checkpointing=True)):
        loss,without = first(SwitchCallback(fixed_profile('bw4')), **kw)
        assert loss==pytest.approx(without, rel=1e-4)

# --- trl ------------------------------------------------------------------------------------------------------------

def talks(n=16):
    def one(q): return dict(prompt=f"question: {q['question']}\nanswer:", completion=f" {q['answers']['text'][0]}")
    return [one(q) for q in tiny_squad(n)]

def pairs(n=16):
    rows = talks(n)
    return Dataset.from_list([dict(prompt=a['prompt'], chosen=a['completion'], rejected=b['completion'])
                              for a,b in zip(rows, rows[1:]+rows[:1])])

@pytest.mark.parametrize('checkpointing', [True, False])
def test_sft(checkpointing, tmp_path):
    model,tok,_ = switchable()
    args = SFTConfig(**settings(tmp_path, max_length=64, activation_checkpointing=checkpointing, learning_rate=1e-2))
    t = SFTTrainer(model, args, train_dataset=Dataset.from_list(talks()), processing_class=tok,
                   callbacks=[SwitchCallback(random_profile(NAMES, 3))])
    before = {n:p.clone() for n,p in added_params(model).items()}
    base = {n:p.clone() for n,p in base_params(model).items()}
    t.train()
    drawn = profiles_of(t)
    assert drawn==[random_profile(NAMES, 3)(i)[0] for i in range(STEPS)] and losses(t)[-1]<losses(t)[0]
    moved = {n.split('.adapters.')[1].split('.')[0] for n,p in added_params(model).items() if not torch.equal(p, before[n])}
    assert moved=={d[-1] for d in drawn}
    assert all(torch.equal(p, base[n]) for n,p in base_params(model).items())

def dpo(model, tok, folder, callback, **kw):
    own = {k:kw.pop(k) for k in ('ref_model',) if k in kw}
    args = DPOConfig(**settings(folder, max_length=64, **kw))
    return DPOTrainer(model, args=args, train_dataset=pairs(), processing_class=tok, callbacks=[callback], **own)

def test_dpo_compares_with_the_same_profile_before_training(tmp_path):
    "So that the first loss of each profile is log 2, as it is without switching."
    model,tok,_ = switchable()
    reference = reference_model(model)
    assert all(p is q for p,q in zip(base_params(model).values(), base_params(reference).values()))
    t = dpo(model, tok, tmp_path, SwitchCallback(random_profile(NAMES, 3)), ref_model=reference, learning_rate=0.)
    t.train()
    assert losses(t)==pytest.approx([torch.tensor(2.).log().item()]*STEPS, abs=1e-5)
    t = dpo(model, tok, tmp_path, SwitchCallback(random_profile(NAMES, 3)), ref_model=reference, learning_rate=1e-2)
    t.train()
    assert losses(t)[-1]<.69 and profiles_of(t)==[random_profile(NAMES, 3)(i)[0] for i in range(STEPS)]
    fixed = dpo(switchable()[0], tok, tmp_path, SwitchCallback(fixed_profile('bw4'), reference='float'),
                ref_model=reference_model(model), learning_rate=0.)
    fixed.train()
    assert max(abs(x-.6931) for x in losses(fixed))>1e-3, 'bw4 against the float model'

def test_dpo_can_compute_its_reference_beforehand(tmp_path):
    "At the profile that is live then."
    model,tok,_ = switchable()
    model.switch.profile = 'bw4'
    t = dpo(model, tok, tmp_path, SwitchCallback(fixed_profile('bw4')), precompute_ref_log_probs=True, learning_rate=0.)
    t.train()
    assert losses(t)==pytest.approx([.6931]*STEPS, abs=1e-3)

def test_trl_does_not_pass_by_a_head_that_is_switchable(tmp_path):
    model,tok,_ = switchable(lm_head=True)
    args = SFTConfig(**settings(tmp_path, max_length=64))
    t = SFTTrainer(model, args, train_dataset=Dataset.from_list(talks()), processing_class=tok, callbacks=[SwitchCallback()])
    with pytest.raises(ValueError, match='output head'): t.train()

def test_other_callbacks_hear_of_an_evaluation_once(tmp_path):
    "With the numbers of all profiles, so that early stopping finds its own."
    class Heard(TrainerCallback):
        def __init__(self): self.metrics = []
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            self.metrics.append(sorted(k for k in metrics if k.endswith('loss')))
    model,tok,data = switchable()
    heard,stop = Heard(),EarlyStoppingCallback(2)
    t = trainer(model, tok, data, tmp_path, SwitchCallback(evaluate=['bw4','bw8']), evaluate=data[:8], eval_strategy='steps',
                eval_steps=1, save_strategy='steps', save_steps=1, max_steps=8, learning_rate=0., load_best_model_at_end=True,
                metric_for_best_model='eval_loss')
    for c in (heard, stop): t.add_callback(c)
    t.train()
    assert heard.metrics==[['eval_bw4_loss','eval_bw8_loss','eval_loss']]*t.state.global_step
    assert t.state.global_step==3   # nothing was learnt: the second evaluation without a better loss is the third
