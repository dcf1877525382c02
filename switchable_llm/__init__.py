"""One causal language model, many precisions.

    import switchable_llm as sl
    model, tokenizer = sl.load('tiny')                    # a folder, a .gguf file, a name on the hub
    sl.make_switchable(model, ['bw8', 'bw6', 'w4a8'])     # every layer its own bits, and adapters
    sl.train(model, tokenizer, sl.squad('tiny'), steps=60)   # all profiles together
    print(sl.evaluate(model, tokenizer, sl.squad('tiny', 'validation', 50)))
    with sl.use_profile(model, 'w4a8'): ...               # this thread, this task, this block

Each name is imported when it is first used."""
__version__ = "0.1.0"

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from sys import meta_path as _meta_path, modules as _modules

# What people need most, and the module that has it; `squad` has another name there.
WHERE = dict(
    load='apps.front_door', make_switchable='apps.front_door', train='apps.front_door', quantize='apps.front_door',
    squad='data.squad', text='data.text', chat='data.chat',
    evaluate='profiles_eval', compare='profiles_eval', answer='profiles_eval', profile_cost='search.costs',
    use_profile='core.switching', kernel_report='core.switching', calibrate_='core.calibration',
    Profile='core.profiles', PROFILES='core.profiles', Bits='quantizers', QuantConfig='quantizers',
    TrainConfig='training.settings', random_profile='joint_training',
    SwitchCallback='training.callback', reference_model='training.callback', lm_eval='apps.harness',
    save_switchable='models.checkpoints', SwitchableConfig='models.quantizer', update_card='models.cards',
    base_on_disk_='models.loading',
    import_peft='lora_routing', export_peft='lora_routing', freeze='serving.exports', check_packed='serving.packed',
    export_float='serving.exports', export_torchao='formats.torchao', export_gguf='formats.gguf_file')
_THERE = dict(squad='load_squad')
_STUDY = 'scipy','torchmetrics','matplotlib','datasets'   # what the extra `study` brings

__all__ = list(WHERE)

def __getattr__(name):
    if name not in WHERE: raise AttributeError(f'module {__name__!r} has no attribute {name!r}: it has {", ".join(WHERE)}')
    try: module = _import_module(f'{__name__}.{WHERE[name]}')
    except ModuleNotFoundError as e:
        if (e.name or '').partition('.')[0] not in _STUDY: raise
        raise ImportError(f"{name} needs the package {e.name.partition('.')[0]}: pip install 'switchable-llm[study]'") from e
    found = getattr(module, _THERE.get(name, name))
    globals()[name] = found
    return found

def __dir__(): return sorted([*WHERE, '__version__'])

class _WhenImported:   # tells transformers of this library's models when it reads its list of quantization methods
    module = 'transformers.quantizers.auto'
    def find_spec(self, name, path=None, target=None):
        if name!=self.module: return None
        _meta_path.remove(self)
        spec = _find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module): load(module); _import_module(f'{__name__}.models.quantizer')
        spec.loader.exec_module = exec_module
        return spec

if _WhenImported.module in _modules: _import_module(f'{__name__}.models.quantizer')
else: _meta_path.insert(0, _WhenImported())
