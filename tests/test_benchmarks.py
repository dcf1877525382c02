"Speed is compared with a record of this kind of processor, and where there is none, with the least of all, by less."
import json, sys
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/'benchmarks'))
import common, ratios

@pytest.fixture
def planted(tmp_path, monkeypatch):
    "Records of two generations of one name and of another processor; this machine is the first of them."
    monkeypatch.setattr(common, 'processor', lambda: 'AMD EPYC'); monkeypatch.setattr(ratios, 'processor', lambda: 'AMD EPYC')
    monkeypatch.setattr(common, 'cpuinfo', lambda field: {'cpu family':'25', 'model':'17'}[field])
    monkeypatch.setattr(common, 'native_level', lambda: 'AVX512'); monkeypatch.setattr(ratios, 'instructions', lambda: ['avx2','avx512_f'])
    def record(name, processor, flags, **levels):
        held = dict(results=dict(processor=processor, levels=levels), environment=dict(flags=flags))
        (tmp_path/f'ratios-{name}.json').write_text(json.dumps(held))
    record('amd-epyc-avx512', 'AMD EPYC', ['avx2','avx512_f','avx_vnni'], AVX2=dict(a=4., b=9.), AVX512=dict(a=8.))
    record('intel-xeon-avx512', 'Intel Xeon', ['avx2','avx512_f'], AVX2=dict(a=6.))
    return record

def test_another_generation_of_the_same_name_is_another_processor(planted, tmp_path):
    assert ratios.expected(tmp_path)==(dict(AVX2=dict(a=4., b=9.), AVX512=dict(a=8.)), 1/4)

@pytest.mark.parametrize('name,flags', [
    ('amd-epyc-family-25-model-17-avx512', ['avx2','avx512_f','one that a newer torch names']), ('amd-epyc-of-old', ['avx512_f','avx2'])])
def test_a_record_of_this_kind_is_what_counts(planted, tmp_path, name, flags):
    planted(name, 'AMD EPYC', flags, AVX2=dict(a=2.))
    assert ratios.expected(tmp_path)==(dict(AVX2=dict(a=2.)), 2/3)

def test_what_is_too_slow_is_named_and_what_was_never_measured_is_not():
    assert ratios.fallen(dict(a=1., b=2., c=.1), dict(a=2., b=2.), 2/3)==['a']
