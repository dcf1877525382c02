"A short run of `fuzz_packed.py`: damaged and forged files neither crash nor hang, and every error names the file."
import os
from collections import Counter
from fuzz_packed import WAYS, fuzz, kind

# 20,000 by hand; `python tests/fuzz_packed.py --asan` looks closer
CASES = int(os.environ.get('SWITCHABLE_LLM_FUZZ', 2000))

def test_no_file_crashes_or_hangs_a_process():
    found = fuzz(CASES)
    assert not found['faults'], found['faults'][:5]
    assert found['cases']==CASES
    ways = {w.__name__:Counter(kind(e) for e in found['ends'] if e['how'].split()[1]==w.__name__) for w in WAYS}
    assert sum(c.total() for c in ways.values())>=.95*CASES, 'some changes could not be written'
    if CASES<1000: return
    for w in ('head_bits','cut','longer'): assert set(ways[w])=={'refused'}, w     # damage is always seen
    for w in ('data_bits','values','lies','fields','config'):
        assert len(ways[w])>1, f'{w}: all end alike, which tests little'

def test_a_worker_that_dies_is_seen_and_its_case_is_known():
    found = fuzz(12, workers=2, die=5)
    (fault,) = found['faults']
    assert fault['end']==5 and fault['out'].startswith('crash')
    assert found['cases']==12 and {e['end'] for e in found['ends']}=={*range(12)}-{5}
