"Span extraction with every family that can do it, on tokenizers of other kinds, and against SQuAD's rules written out."
import random, re, string
from collections import Counter
from dataclasses import replace
import pytest, torch
from tokenizers import pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering, GPT2Config, GPT2ForQuestionAnswering, GPTNeoConfig, GPTNeoXConfig, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config, Qwen3Config
from switchable_llm.study.presets import PRESETS
from switchable_llm.data.models import load_model
from switchable_llm.study.records import load_records
from switchable_llm.data.embedded import tiny_squad, tiny_tokenizer
from switchable_llm.joint_training import Objective, fixed_profile, train
from switchable_llm.training.settings import TrainConfig
from switchable_llm.lora_routing import adapter_params, add_adapters_
from switchable_llm.data.checkpoints import load_switchable, save_switchable
from switchable_llm.training.objectives import Distillation, Stability
from switchable_llm.serving.packed import freeze, load_packed
from switchable_llm.quantizers import Bits, QuantConfig
from switchable_llm.data.spans import collate_windows, encode_windows
from switchable_llm.search.extraction import evaluate_spans, extract, span_extraction, span_outputs, train_head_
from switchable_llm.study.experiments import run_spans
from switchable_llm.core.profiles import Profile, find_sites
from switchable_llm.core.switching import make_switchable_, use_profile
