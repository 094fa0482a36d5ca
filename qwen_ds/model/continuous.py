"""transformers' continuous batching with this model: `generate_batch`, `transformers serve`, TRL.

It packs the rows of a step into one sequence, as our own engine does, and passes its cache and the
places of the tokens as further arguments of forward. These say nothing of prompts, so dynamic NTK
cannot act: prompts that need it are refused.

Shapes: N new tokens of all rows, H heads, W head width.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qwen_ds.decode.kv import PackedCache
from qwen_ds.model.configuration import QWenConfig


class TransformersPages(PackedCache):
    """The pages of transformers' continuous batching, where attention asks for its cache."""

    # LogN's factors are made at each step: one that is captured is replayed when rows have grown.
    num_keys = sys.maxsize

    def __init__(self, attention_mask: Tensor | None, arguments: dict[str, Any]) -> None:
        if "cache" not in arguments:
            raise TypeError(f"forward() got an unexpected keyword argument {min(arguments)!r}")
        self._arguments = {"attention_mask": attention_mask, **arguments}

    def attend(self, q_NHW: Tensor, k_NHW: Tensor, v_NHW: Tensor, layer: int) -> Tensor:
        module: Any = SimpleNamespace(layer_idx=layer)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_NHW, k_NHW, v_NHW))  # [1, H, N, W]
        out_1NHW, _ = sdpa_attention_forward(module, q, k, v, **self._arguments)
        return out_1NHW[0]


class ContinuousGenerationMixin(GenerationMixin):
    """Generation by transformers, in whose continuous batching no prompt is too long."""

    config: QWenConfig

    def init_continuous_batching(self, *args: Any, **options: Any) -> Any:
        """As in transformers; add_request of its manager raises ValueError for a long prompt."""
        manager: Any = super().init_continuous_batching(*args, **options)
        unchecked = type(manager).add_request

        def add_request(input_ids: list[int], *args: Any, **options: Any) -> Any:
            self._require_short(input_ids)
            return unchecked(manager, input_ids, *args, **options)

        manager.add_request = add_request
        return manager

    def generate_batch(self, inputs: list[list[int]], *args: Any, **options: Any) -> Any:
        """As in transformers; ValueError for a prompt longer than seq_length with dynamic NTK."""
        for ids in inputs:
            self._require_short(ids)
        return super().generate_batch(inputs, *args, **options)

    def _require_short(self, ids: list[int]) -> None:
        seq_length = self.config.seq_length
        assert seq_length is not None
        if self.config.use_dynamic_ntk and len(ids) > seq_length:
            raise ValueError(
                f"a prompt has {len(ids)} tokens; expected at most seq_length, {seq_length}: "
                "continuous batching of transformers lacks dynamic NTK (generate has it)"
            )
