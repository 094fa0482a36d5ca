"""From a checkpoint folder to an engine: the device, the dtype, an adapter on the model."""

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
from qwen_ds.model.adapter import load_adapter
from qwen_ds.model.family import QWEN
from qwen_ds.model.folder import find_model
from serve.engine.engine import ServingEngine


def choose_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in. auto: as stored, but float32 for float16 on a CPU, which computes
    float16 slowly and in part not at all."""
    if name != "auto":
        return TORCH_DTYPES[name]
    return torch.float32 if device.type == "cpu" and stored == torch.float16 else stored


def load_engine(
    model_dir: str | Path,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> ServingEngine:
    """Load a checkpoint folder or hub id, with an unmerged PEFT adapter on it if given.

    Args:
        device: auto, cuda or cpu.
        dtype: auto (see `choose_dtype`), bfloat16, float16 or float32.

    Raises:
        UserError: no such model, adapter or device, or an adapter for another base.
    """
    folder, place = find_model(str(model_dir)), choose_device(device)
    stored = "auto" if dtype == "auto" else TORCH_DTYPES[dtype]
    model: Any = QWEN.model_class.from_pretrained(folder, dtype=stored)  # a PeftModel later on
    context = QWEN.context(model.config)
    model = model.to(choose_dtype(dtype, model.dtype, place))
    if adapter is not None:
        model = load_adapter(model, Path(adapter))
    encoding = QWEN.load_encoding(folder)
    vocabulary = Vocabulary(encoding.n_vocab, encoding.eod_id, encoding.decode)
    return ServingEngine(model.to(place), vocabulary, StopRule(QWEN.stop_ids(encoding)), context)


def silence_libraries() -> None:
    """Keep progress bars of loading and advice of transformers off a command's terminal."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # peft calls transformers in ways that are deprecated; the user cannot change that.
    warnings.simplefilter("ignore", FutureWarning)
