"The page `live/`: the embedded model in the browser. Its packed file and its questions are made when the site is built."
import base64, json, shutil, sys
from pathlib import Path
from docsite.process import LIVE
from project import NBS, ROOT

sys.path.insert(0, str(ROOT))   # the library that lies here

import torch
import switchable_llm as sl

NAME = LIVE[0].partition('/')[0]
FOLDER = NBS/NAME
STEPS = 300   # of training: a minute or two
PROFILES = ('bw8', 'bw6', 'w4a8', 'bw4', 'mixed8648', dict(name='ends8', default='w4a8', rules=[dict(layers=[0, 3], bits='w8a8')]),
            dict(name='w3a6', default='w3a6'), dict(name='w2a8', default='w2a8'))

def make_file(path, steps=STEPS, cfg=None):
    "Train the adapters of all widths together on the embedded task, and freeze the model with its tokenizer."
    model,tokenizer = sl.load('tiny')
    profiles = [sl.PROFILES[p] if isinstance(p, str) else sl.Profile.from_dict(p) for p in PROFILES]
    sl.make_switchable(model, profiles, cfg or sl.QuantConfig(act='per_token'), r=4, alpha=8, route='bits')   # one for each width
    sl.train(model, tokenizer, sl.squad('tiny', n=max(100, 8*steps)), steps=steps, batch_size=8, lr=3e-3, progress=False)
    sl.freeze(model, path, tokenizer=tokenizer)

def questions(n=40):
    "Questions that no training saw, as the page wants them."
    return [dict(question=q['question'], context=q['context'], answer=q['answers']['text'][0])
            for q in sl.squad('tiny', 'validation', n)]

RECORD = ROOT/'results'/'smollm2'/'live'/'shared-s0.json'   # of scripts/live_answers.py

def answers():
    "What the page shows of the real model; nothing without its record."
    if not RECORD.is_file(): return None
    r = json.loads(RECORD.read_text(encoding='utf-8'))
    preset = r['config']['preset']
    how = (f"SmolLM2-135M, {preset['steps']} steps of {preset['batch_size']} questions of SQuAD, one adapter for all widths, one seed. "
           f"{len(r['questions'])} questions about paragraphs that were written for this page: the answers stand in a record of the study, "
           'and nothing is computed here. Right is an answer that is the expected one and no more (exact match). float is the model before '
           'training: it often answers in sentences, which that does not count. With one seed and so few questions, profiles that differ '
           'by a few right answers may be equally good.')
    which = ('Shown are float and the profiles that the study trains this model at. bw4 is not one of them: where another training of it '
             '(results/smollm2-repair) had bw4, with activations of four bits, it lost more than any other profile. A float '
             'model with the same training was not asked these questions.')
    return dict(how=how, which=which, costs=r['costs'],
                questions=[{k:q[k] for k in ('question','context','answers','said')} for q in r['questions']])

def script(name, value): return f'window.{name} = {json.dumps(value)}\n'

def write(folder, steps=STEPS):
    "The page, its questions, and the packed file: twice, since a page that is opened as a file may only load scripts."
    folder = Path(folder)
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns('.*', '*.safetensors', '*.json'))
    torch.manual_seed(0)
    make_file(folder/'tiny.safetensors', steps)
    packed = base64.b64encode((folder/'tiny.safetensors').read_bytes()).decode()
    (folder/'tiny.js').write_text(script('PACKED', packed), encoding='utf-8')
    (folder/'questions.js').write_text(script('QUESTIONS', questions()), encoding='utf-8')
    (folder/'answers.js').write_text(script('ANSWERS', answers()), encoding='utf-8')
