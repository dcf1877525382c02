"One row, one answer: the same bits whether tokens come one by one, as a prompt or in chunks, and with one thread or several."
import random
import pytest, torch
import test_cache_bits as bits, test_lean_families as families
from switchable_llm.core.calibration import calibrate_
from switchable_llm.core.profiles import Profile
from switchable_llm.core.switching import make_switchable_, use_profile
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.serving.exports import freeze
from switchable_llm.serving.lean import LiveStep
from switchable_llm.serving.packed import load_packed

pytestmark = families.native
PROFILES = [Profile('w8', Bits(8)), Profile('w4', Bits(4)), 'w8a8', 'w6a6', 'w4a8', 'w4a8_k8v4', 'w8a8_k4v2']

@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

def packed(model, path, cfg):
    made = [p if isinstance(p, Profile) else Profile(p, Bits.parse(p.replace('_', ''))) for p in PROFILES]
    make_switchable_(model, made, cfg)
    calibrate_(model, [dict(input_ids=bits.IDS)])
    add_adapters_(model, r=3)
    for l in model.switch.layers:
        for p in l.adapters.parameters(): torch.nn.init.normal_(p, std=.1)
    freeze(model, path)
    return load_packed(path)

def check(model, seed, threads, rounds=2):
    "Number of answers that were compared."
    rng,n = random.Random(seed),0
    for name in [p for p in model.switch.profiles if p!='float']:
        for _ in range(rounds):
            ids = [rng.randrange(3, 97) for _ in range(rng.randrange(40, 120))]
            with use_profile(model, name):
                threads(rng.choice((1, 2, 3)))
                one,some = LiveStep(model),LiveStep(model)
                alone = [one(t).clone() for t in ids]
                threads(rng.choice((1, 2, 3)))
                i = 0
                while i<len(ids):
                    part = ids[i:i+rng.choice((1, 2, 5, 8, 13, 31, 64, 90))]
                    i += len(part); n += 1
                    assert torch.equal(some.prompt(part), alone[i-1]), f'{name}: {len(part)} tokens that end at {i} of {len(ids)}'
    return n

@pytest.mark.parametrize('act', ['per_token','per_tensor'])
@pytest.mark.parametrize('case', bits.CASES)
def test_chunks_do_not_matter(case, act, tmp_path, threads):
    model = packed(bits.toy(case), tmp_path/'m.safetensors', QuantConfig(act=act))
    with torch.no_grad(): assert check(model, 0, threads)>20

def test_groups_and_rotation(tmp_path, threads):
    cfg = QuantConfig(act='per_token', weight='per_group', group_size=16, rotate=True)
    with torch.no_grad(): check(packed(bits.toy('llama'), tmp_path/'m.safetensors', cfg), 0, threads)
