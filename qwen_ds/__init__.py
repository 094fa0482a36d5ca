"""Qwen-DS: fine-tuning and serving of the original Qwen (`model_type: "qwen"`).

Importing the package registers the model with transformers: AutoConfig, AutoModelForCausalLM and
AutoTokenizer then load a Qwen folder with these classes, whatever code its files refer to and
whatever `trust_remote_code` says.
"""

from __future__ import annotations

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
