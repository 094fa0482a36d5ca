"""Facts about the original Qwen that the decoding engine needs to run its rows packed."""

from __future__ import annotations

import torch

from qwen_ds.decode.kv import KVShape
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.rotary import ntk_alpha


def kv_shape(config: QWenConfig, dtype: torch.dtype, device: torch.device) -> KVShape:
    """Keys and values that a token adds, of a model that computes in `dtype`."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    return KVShape(layers, heads, config.kv_channels, dtype, device)


def alpha_of_prompt(config: QWenConfig, prompt_len: int) -> int:
    """Alpha of dynamic NTK for a prompt of so many tokens; 1 where the model has none."""
    if config.seq_length is None or not config.use_dynamic_ntk:
        return 1
    return int(ntk_alpha(torch.tensor(prompt_len), config.seq_length))
