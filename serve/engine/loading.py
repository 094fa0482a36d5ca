"""Loading of an engine from a checkpoint folder: device, dtype, and an adapter on the model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from qwen_ds.decode.batch import Vocabulary
from qwen_ds.decode.stop import StopRule
from qwen_ds.disk.weights import TORCH_DTYPES
from qwen_ds.machine import choose_device
from qwen_ds.model.adapter_loading import load_adapter
from qwen_ds.model.folder import ModelFolder, find_model
from qwen_ds.model.loading import load_base
from serve.engine.engine import ServingEngine


def choose_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in. auto: as stored, but float32 for float16 on a CPU, where float16 is
    slow and some operations lack it."""
    if name != "auto":
        return TORCH_DTYPES[name]
    return torch.float32 if device.type == "cpu" and stored == torch.float16 else stored


def load_engine(
    model_dir: str | Path | ModelFolder,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    *,
    allow_pickle: bool = False,
) -> ServingEngine:
    """Load a checkpoint folder (inspected or not) or hub id, and put an unmerged PEFT adapter on it
    if one is given.

    `device` is auto, cuda or cpu; `dtype` is auto (see `choose_dtype`), bfloat16, float16 or
    float32; `allow_pickle` is about the adapter. UserError: no such model, adapter or device, or an
    adapter for another base.
    """
    place = choose_device(device)
    folder = model_dir if isinstance(model_dir, ModelFolder) else find_model(model_dir)
    family, encoding = folder.family, folder.encoding
    model: Any = load_base(folder, "auto" if dtype == "auto" else TORCH_DTYPES[dtype])
    model = model.to(choose_dtype(dtype, model.dtype, place))
    if adapter is not None:
        model = load_adapter(model, adapter, allow_pickle=allow_pickle)
    vocabulary = Vocabulary(encoding.n_vocab, encoding.eod_id, encoding.decode)
    stop, context = StopRule(family.stop_ids(encoding)), family.context(folder.config)
    return ServingEngine(model.to(place), vocabulary, stop, context)


def silence_libraries() -> None:
    """Keep the loading bars and the advice of libraries off a command's terminal."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # peft uses deprecated calls of transformers, which the user cannot change.
    warnings.simplefilter("ignore", FutureWarning)
