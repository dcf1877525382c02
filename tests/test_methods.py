"Scores of methods: no context that chooses codes is scored."
import json
from dataclasses import replace
import pytest
from switchable_llm.data.embedded import tiny_squad
from switchable_llm.study.arms import run_arms
from switchable_llm.study.methods import check_apart, run_methods
from switchable_llm.study.records import PRESETS

def write(path, examples):
    def paragraph(q): return dict(context=q['context'], qas=[dict(id=q['id'], question=q['question'], answers=[
        dict(text=t, answer_start=s) for t,s in zip(q['answers']['text'], q['answers']['answer_start'])])])
    path.write_text(json.dumps(dict(data=[dict(title='t', paragraphs=[paragraph(q) for q in examples])])))

def test_a_context_in_both_parts_is_refused_before_a_model_is_loaded(tmp_path):
    "Blocks of tokens begin elsewhere in each part, so that none is in both: only the contexts show it."
    train,other = tiny_squad(160, 'train', 0),tiny_squad(160, 'validation', 0)
    write(tmp_path/'train.json', train); write(tmp_path/'validation.json', [*other[1:], train[7]])
    preset = replace(PRESETS['tiny'], data=str(tmp_path), model='no such model')
    said = '1 contexts are in both parts'
    with pytest.raises(ValueError, match=said): run_methods(preset, tmp_path/'runs', ['group'], n=4, calibration=4)
    with pytest.raises(ValueError, match=said): check_apart(preset)
    with pytest.raises(ValueError, match=said): run_arms(replace(preset, chosen=8), out=tmp_path/'runs')
    write(tmp_path/'validation.json', other)
    check_apart(preset)
