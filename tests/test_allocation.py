"Bits per layer: random oracles, faults of the measuring log, tied ends, families with several matrices per site."
import random
from dataclasses import replace
import numpy as np
import pytest, torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from switchable_llm.search.allocation import Choices, allocate, search
from switchable_llm.study.searches import random_choice, run_allocation
from switchable_llm.study.presets import PRESETS
from switchable_llm.data.encoding import Encoded
from switchable_llm.lora_routing import add_adapters_
from switchable_llm.data.checkpoints import save_switchable
from switchable_llm.search.costs import profile_cost
