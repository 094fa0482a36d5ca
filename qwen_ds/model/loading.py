"""Loading of a base: the one way by which training, serving and proof get an inspected model."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import GenerationConfig

from qwen_ds.model.family import LanguageModel
from qwen_ds.model.folder import ModelFolder


def load_base(
    folder: ModelFolder,
    dtype: torch.dtype | Literal["auto"],
    attention: str | None = None,
) -> LanguageModel:
    """Load the model that was inspected, in evaluation mode.

    transformers reads its weights and no settings: those of the folder have been read and checked,
    and its generation settings have no effect on our own decoding.

    Args:
        dtype: "auto": as config.json says, else as stored.
        attention: eager or sdpa; None: config.json's, else transformers' choice.
    """
    chosen = {} if attention is None else {"attn_implementation": attention}
    model = folder.family.model_class.from_pretrained(
        folder.path,
        config=folder.config,
        dtype=dtype,
        generation_config=GenerationConfig(),
        **chosen,
    )
    assert isinstance(model, folder.family.model_class)
    for parameter in model.parameters():  # a pickle may hold a turned view; DeepSpeed takes none
        parameter.data = parameter.data.contiguous()
    return model
