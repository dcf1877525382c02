"What the scripts share: where things are, which notebooks there are, which cells run."
import configparser, json, os, re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
_cfg = configparser.ConfigParser()
_cfg.read(ROOT/'settings.ini')
CFG = _cfg.defaults()
SITE = CFG['doc_host'] + CFG['doc_baseurl']

def notebooks():
    "The notebooks, in reading order; those that begin with `_` or `.` are private."
    return sorted(NBS.glob('[!_.]*.ipynb'))

def read_cells(path):
    "Cells of a notebook, each with its source as one string."
    cells = json.loads(Path(path).read_text(encoding='utf-8'))['cells']
    return [{**c, 'source': ''.join(c['source'])} for c in cells]

def skipped(source):
    "Whether tests and execution pass over a code cell: a flag in `tst_flags`, `eval: false`, or the export call."
    flags = dict(re.findall(r'^#\s*\|\s*(\w+):?[ \t]*(.*)$', source, flags=re.M))
    return bool(flags.keys() & set(CFG['tst_flags'].split())) or flags.get('eval','').strip().lower()=='false' or 'nbdev_export(' in source

def cores(): return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1

def offline_env(**extra):
    "Environment in which no hub is asked and every core is used once."
    return {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': str(cores()), 'TOKENIZERS_PARALLELISM': 'false',
            'HF_HUB_OFFLINE': '1', 'TRANSFORMERS_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1', **extra}
