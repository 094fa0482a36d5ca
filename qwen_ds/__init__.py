"""Qwen-DS: fine-tuning and serving of the original Qwen (`model_type: "qwen"`).

Importing the package registers the model with transformers: AutoConfig, AutoModelForCausalLM and
AutoTokenizer then load a Qwen folder with these classes, whatever code its files refer to and
whatever `trust_remote_code` says.
"""

from __future__ import annotations

import os

# torch's C++ warns of every connection that a peer closes, with thirty stack frames each time: the
# end of one rank would bury the line that says why. Errors still show, and a user's own level
# stays. torch reads it once, when it is loaded.
os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenLMHeadModel, QWenModel
from qwen_ds.model.transformers_tokenizer import QWenTokenizer
from qwen_ds.model.transformers_tokenizer import register as _register_tokenizer

__all__ = ["QWenConfig", "QWenLMHeadModel", "QWenModel", "QWenTokenizer"]

AutoConfig.register(QWenConfig.model_type, QWenConfig)
AutoModel.register(QWenConfig, QWenModel)
AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel)
_register_tokenizer()
