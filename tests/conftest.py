"What the tests share: a toy model on disk, and the environment of a child process."
import os, signal, sys
os.environ['HF_HUB_OFFLINE'] = '1'   # before transformers reads it
from pathlib import Path
import pytest, torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as hf_logging
from switchable_llm.data.embedded import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))   # the workers
hf_logging.set_verbosity_error(); hf_logging.disable_progress_bar()
torch.set_num_threads(1)   # the models are too small to share

@pytest.fixture(scope='session')
def toy_folder(tmp_path_factory):
    "A GPT-2 of two narrow layers that knows nothing, as `save_pretrained` writes it."
    folder,tok = tmp_path_factory.mktemp('toy')/'base',tiny_tokenizer()
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tok), n_positions=256, n_embd=32, n_layer=2, n_head=4)
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder); tok.save_pretrained(folder)
    return folder

@pytest.fixture(scope='session')
def child_env():
    "Environment of a child process: this library, no hub, one thread."
    return {**os.environ, 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1',
            'OMP_NUM_THREADS': '1', 'TOKENIZERS_PARALLELISM': 'false'}

def heed_ctrl_c():
    "In a child before it starts: interrupts have their usual effect, also in the background of a shell."
    signal.signal(signal.SIGINT, signal.SIG_DFL)
