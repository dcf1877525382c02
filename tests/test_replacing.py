"Records and figures replace only older ones of ours: whatever else has their name stays, and is told before the work."
import json
import pytest
from matplotlib import pyplot as plt
from switchable_llm.apps.cli import main
from switchable_llm.study.records import is_record, record_target, save_record
from switchable_llm.study.figures import is_figure, save_figure

def figure():
    fig,ax = plt.subplots(); plt.close(fig)
    ax.plot([1, 2])
    return fig

THEIRS = {   # what may lie there -> its content
    'a note':b'dear diary', 'JSON of another program':b'{"preset": "tiny", "name": "mine"}', 'a list':b'[1, 2]', 'nothing':b'',
    'a drawing':b'<svg xmlns="http://www.w3.org/2000/svg"><title>switchable_llm</title></svg>', 'no text':b'\xff\x00\x81',
    'a cut record':b'{"preset": "tiny", "experiment": "joint", "name": "mine", "se'}

@pytest.mark.parametrize('what', THEIRS)
def test_what_is_no_figure_of_ours_stays(what, tmp_path):
    path = tmp_path/'mine.svg'
    path.write_bytes(THEIRS[what])
    assert not is_figure(path)
    with pytest.raises(FileExistsError, match='stays as it is'): save_figure(figure(), path)
    assert path.read_bytes()==THEIRS[what] and [p.name for p in tmp_path.iterdir()]==['mine.svg']

@pytest.mark.parametrize('what', THEIRS)
def test_what_is_no_record_stays(what, tmp_path):
    path = tmp_path/'tiny/joint/mine-s0.json'
    path.parent.mkdir(parents=True)
    path.write_bytes(THEIRS[what])
    assert not is_record(path)
    with pytest.raises(FileExistsError, match='stays as it is'): record_target(tmp_path, 'tiny', 'joint', 'mine', 0)
    assert path.read_bytes()==THEIRS[what]

def test_an_older_one_of_ours_is_replaced(tmp_path):
    path = save_figure(figure(), tmp_path/'mine.svg', alt='A line')
    first = path.read_bytes()
    assert is_figure(path) and save_figure(figure(), path, alt='A line').read_bytes()==first
    record = dict(preset='tiny', experiment='joint', name='mine', seed=0)
    path = save_record(record, tmp_path)
    assert is_record(path)
    record_target(tmp_path, 'tiny', 'joint', 'mine', 0)
    record_target(tmp_path, 'tiny', 'joint', 'another', 0)   # nothing there

def test_a_folder_and_a_missing_file_are_neither(tmp_path):
    assert not any(f(p) for f in (is_figure, is_record) for p in (tmp_path, tmp_path/'nowhere'))

@pytest.mark.parametrize('there,content', [
    ('tiny/joint/random_profile-per_tensor-learned-nested-s0.json', '{"dear": "diary"}'),
    ('tiny/ablation/untrained-s0.json', '{"dear": "diary"}'),
    ('tiny/figures/random_profile-per_tensor-learned-nested-s0-cost.svg', '<svg/>'),
    ('tiny/figures/random_profile-per_tensor-learned-nested-s0-ablation.svg', '<svg/>')])
def test_the_study_tells_before_the_work(there, content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('switchable_llm.apps.studying.run_joint', lambda *a, **kw: pytest.fail('work was begun'))
    path = tmp_path/'runs'/there
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert main(['run', '--preset', 'tiny'])==1
    out,err = capsys.readouterr()
    assert out=='' and path.name in err and 'stays as it is' in err and err.count('\n')==1
    assert path.read_text()==content

def test_a_record_of_a_score_tells_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('switchable_llm.apps.commands.load', lambda *a, **kw: pytest.fail('a model was loaded'))
    path = tmp_path/'runs/checkpoints/evaluate/mine-s0.json'
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dict(shopping=['milk'])))
    assert main(['evaluate', 'mine'])==1
    assert 'mine-s0.json' in capsys.readouterr().err and json.loads(path.read_text())==dict(shopping=['milk'])
