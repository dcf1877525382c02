"What the scripts share: where things are, which notebooks there are, which cells run."
import configparser, json, os, re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
_cfg = configparser.ConfigParser()
_cfg.read(ROOT/'settings.ini')
CFG = _cfg.defaults()
SITE = CFG['doc_host'] + CFG['doc_baseurl']

# The groups of notebooks, in reading order: sidebar, README's map, and the test of who may import whom are made from
# this. A part is a folder of `nbs/` and of the package; the chapters lie at the top of both, and what comes before them.
class Part(NamedTuple):
    folder:str
    title:str
    what:str      # In a few words
    rooms:tuple   # File names without .ipynb

PARTS = [Part(folder, title, what, tuple(rooms.split())) for folder,title,what,rooms in (
    ('', '', 'what it is, how things are done, what was found', 'index how 06_report'),
    ('', 'The book', '', '00_quantizers 01_lora_routing 02_joint_training 03_profiles_eval 04_cpt 05_adversarial'),
    ('system', 'System', 'files, digests, compiled code, kinds of models', 'files progress digests native families'),
    ('attention', 'Attention', 'keys and values in few bits', 'caches attending'),
    ('core', 'Core', 'layers that switch', 'opaque integer rotation profiles layers experts switching calibration gates'),
    ('models', 'Models', 'in and out of files', 'loading checkpoints quantizer cards pretrained'),
    ('data', 'Data', 'examples, and what is learnt from them', 'squad squad_scores embedded encoding tasks spans sources text chat'),
    ('training', 'Training', 'settings, resuming, objectives, other loops', 'settings resuming objectives callback'),
    ('search', 'Search', 'which bits, for which cost', 'intervals costs groups sensitivity allocation strategies gptq extraction'),
    ('serving', 'Serving', 'kernels, one file', 'kernels kept parts lean generating packed_file packed hub exports'),
    ('server', 'Server', 'many callers, each at its own precision', 'many requests engine elastic words protocol app hosting cluster'),
    ('formats', 'Formats', 'files for other programs', 'torchao gguf_blocks gguf_words gguf_file'),
    ('study', 'Study', 'runs and their records', 'records figures statistics runs methods experiments arms robustness searches'),
    ('findings', 'Findings', 'records to pictures and sentences',
        'plots comparisons ablation arms choices defences verdicts answers earlier'),
    ('apps', 'Apps', 'six lines, the command', 'front_door cli options commands packing asking harness studying tools'),
    ('explorer', 'Explorer', 'a page in the browser', 'page exploration grid looks waiting explorer opening'))]


def name_of(path): return Path(path).relative_to(NBS).as_posix()   # core/switching.ipynb

def notebooks():
    "The notebooks, in reading order; those that begin with `_` or `.` are private. All must stand in `PARTS`."
    found = [NBS/p.folder/f'{r}.ipynb' for p in PARTS for r in p.rooms]
    def private(p): return any(d[0] in '._' for d in p.relative_to(NBS).parts[:-1])
    there = {p for p in NBS.rglob('[!_.]*.ipynb') if not private(p)}
    if odd := sorted(map(name_of, {*found} ^ there)):
        raise SystemExit(f"scripts/project.py lists other notebooks than there are: {', '.join(odd)}")
    return found

def module_of(path):
    "The module that a notebook exports, like `core.switching`, or nothing."
    found = re.search(r'"#\s*\|\s*default_exp\s+([\w.]+)', path.read_text(encoding='utf-8'))
    return found and found[1]

def read_cells(path):
    "Cells of a notebook, each with its source as one string."
    cells = json.loads(Path(path).read_text(encoding='utf-8'))['cells']
    return [{**c, 'source': ''.join(c['source'])} for c in cells]

def skipped(source):
    "Whether tests and execution pass over a code cell: a flag in `tst_flags`, `eval: false`, or the export call."
    flags = dict(re.findall(r'^#\s*\|\s*(\w+):?[ \t]*(.*)$', source, flags=re.M))
    if flags.keys() & set(CFG['tst_flags'].split()): return True
    return flags.get('eval', '').strip().lower()=='false' or 'nbdev_export(' in source

def cores(): return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1

def offline_env(**extra):
    "Environment in which no hub is asked and every core is used once."
    offline = dict.fromkeys(('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_DATASETS_OFFLINE'), '1')
    threads = dict(OMP_NUM_THREADS=str(cores()), TOKENIZERS_PARALLELISM='false')
    return {**os.environ, 'PYTHONPATH': str(ROOT), **threads, **offline, **extra}
