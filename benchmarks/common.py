"What the benchmarks share: who takes part, whose turn it is, and the record of it."
import importlib.util, json, platform, statistics, sys, time
from importlib import metadata
from pathlib import Path
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D
from switchable_llm.core.integer import KERNELS, try_kernel
from switchable_llm.study.records import environment
