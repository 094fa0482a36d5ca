"""Loading of an engine from a checkpoint folder: device, dtype, and adapters on the model."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from qwen_ds.decode.request import Vocabulary
from qwen_ds.decode.stop import StopRule
from qwen_ds.disk.adapter_folder import tell_adapter
from qwen_ds.disk.weights import TORCH_DTYPES
from qwen_ds.model.adapter import Adapter, check_adapter_fits, read_adapter
from qwen_ds.model.device import take_device
from qwen_ds.model.folder import ModelFolder, find_model
from qwen_ds.model.loading import load_base
from qwen_ds.model.prepacked import prepack
from qwen_ds.model.shapes import state_shapes
from qwen_ds.runlog import say
from serve.engine.adapted import AdaptedModule
from serve.engine.adapters import DEFAULT, named_adapters, put_adapters
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
    adapters: Mapping[str, str | Path] | None = None,
    allow_pickle: bool = False,
    gpu: int | None = None,
) -> ServingEngine:
    """Load a checkpoint folder (inspected or not) or hub id, and put unmerged PEFT adapters on it.

    Args:
        adapter: folder of one that answers all requests, as that named default does.
        device: auto, cuda or cpu.
        dtype: auto (see `choose_dtype`), bfloat16, float16 or float32.
        adapters: folders by the names that requests have. One named default answers requests that
            name none, in place of the bare base.
        allow_pickle: also read an adapter's adapter_model.bin.
        gpu: its number; None: the local rank's.

    UserError: no such model, adapter or device, or an adapter for another base.
    """
    folders = dict(adapters or {})
    if adapter is not None:
        assert not folders, "one adapter for all requests, or adapters by name"
        folders = {DEFAULT: adapter}
    place = take_device(device, gpu)
    folder = model_dir if isinstance(model_dir, ModelFolder) else find_model(model_dir)
    family, encoding = folder.family, folder.encoding
    fitting = {name: _fitting(at, folder, allow_pickle) for name, at in folders.items()}
    model: Any = load_base(folder, "auto" if dtype == "auto" else TORCH_DTYPES[dtype])
    model = model.to(choose_dtype(dtype, model.dtype, place)).to(place)
    served = put_adapters(model, fitting, family) if fitting else None
    prepack(model, (AdaptedModule,))
    vocabulary = Vocabulary(
        encoding.n_vocab, encoding.decode, encoding.token_bytes, len(encoding.ranks)
    )
    return ServingEngine(
        model,
        vocabulary,
        StopRule(family.stop_ids(encoding)),
        family.context(folder.config),
        family.kv_shape(folder.config, model.dtype, place),
        family.alpha_of(folder.config),
        served,
    )


def _fitting(folder: str | Path, base: ModelFolder, allow_pickle: bool) -> Adapter:
    adapter = read_adapter(folder, allow_pickle=allow_pickle)
    check_adapter_fits(adapter, state_shapes(base.config))
    return adapter


def find_adapters(
    given: Sequence[str], base: ModelFolder, allow_pickle: bool = False
) -> dict[str, Path]:
    """Adapter folders by name, from a command's values (see `named_adapters`), before anything is
    loaded. UserError: no adapter, or one that does not fit."""
    found = {}
    for name, folder in named_adapters(given).items():
        adapter = read_adapter(tell_adapter(folder), allow_pickle=allow_pickle)
        for note in check_adapter_fits(adapter, state_shapes(base.config)):
            say(f"{adapter.folder}: {note}")
        found[name] = adapter.folder
    return found


def silence_libraries() -> None:
    """Keep the loading bars and the advice of libraries off a command's terminal."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # peft uses deprecated calls of transformers, which the user cannot change.
    warnings.simplefilter("ignore", FutureWarning)


def free_memory() -> None:
    """Give back the memory of a model that nothing holds any more, the GPU's too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
