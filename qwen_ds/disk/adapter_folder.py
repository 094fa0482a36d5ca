"""The files of an adapter folder: found, configuration checked, weights opened; not interpreted."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen_ds.disk.adapter_options import check_options
from qwen_ds.disk.read import open_regular, read_json, refuse_lfs_pointer
from qwen_ds.disk.weights import DTYPE_NAMES, read_header, read_pickle
from qwen_ds.errors import UserError
from qwen_ds.runlog import say

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAMES = ("adapter_model.bin", "pytorch_model.bin")

# What training and merging can compute with. Integers and float8 need scales that PEFT has not.
_DTYPES = ("F64", "F32", "F16", "BF16")
# A checkpoint of ours, and of transformers' Trainer (LLaMA-Factory, ms-swift).
_CHECKPOINT = re.compile(r"(?:step_|checkpoint-)(\d+)")


def find_adapter(given: Path | str) -> Path:
    """The adapter folder that `given` is, or holds: a run has its own in adapter/, and so has each
    of its checkpoints.

    UserError: no such folder, a file, or a run without a final adapter; it names a checkpoint then.
    """
    folder = Path(os.path.expanduser(given))
    if not os.path.isdir(folder):
        came = "not a folder" if os.path.exists(folder) else "no such folder"
        raise UserError(
            f"{folder}: {came}; expected an adapter folder with {CONFIG_NAME} and {WEIGHTS_NAME}"
        )
    if _holds_adapter(folder):
        return folder
    if _holds_adapter(folder / "adapter"):
        return folder / "adapter"
    numbered = {
        int(found[1]): path
        for above in (folder / "checkpoints", folder)
        if above.is_dir()
        for path in above.iterdir()
        if (found := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    }
    there = [path for _, path in sorted(numbered.items()) if _adapter_in(path)]
    if there:
        raise UserError(
            f"{folder}: no final adapter; expected an adapter folder, such as that of its last"
            f" checkpoint, {_adapter_in(there[-1])}"
        )
    return folder


def tell_adapter(given: Path | str) -> Path:
    """`find_adapter`, and say so where the adapter lies in the folder that was given."""
    if (found := find_adapter(given)) != Path(os.path.expanduser(given)):
        say(f"{given}: its adapter is {found}")
    return found


def _adapter_in(checkpoint: Path) -> Path | None:
    places = (checkpoint, checkpoint / "adapter")
    return next((place for place in places if _holds_adapter(place)), None)


def _holds_adapter(folder: Path) -> bool:
    # A pytorch_model.bin beside a config.json is a whole model's.
    names = [CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAMES[0]]
    names += [] if (folder / "config.json").exists() else PICKLE_NAMES[1:]
    return any(_is_there(folder / name) for name in names)


def read_config(folder: Path) -> dict[str, Any] | None:
    """Read adapter_config.json; None where there is none. Raises UserError for anything but LoRA,
    for options that cannot be honoured, and for values that PEFT would not have written."""
    path = folder / CONFIG_NAME
    if not _is_there(path):
        return None
    config = read_json(path)
    check_options(path, config)
    return config


def _is_there(path: Path) -> bool:
    """Whether anything has this name; what is no regular file is refused where it is read."""
    return path.exists() or path.is_symlink()


def open_weights(
    folder: Path, allow_pickle: bool, option: str = "--allow_pickle"
) -> tuple[Mapping[str, Tensor] | None, dict[str, tuple[int, ...]]]:
    """The tensors of an adapter's pickle, or None for a safetensors file; and the shape of each,
    under the file's own names.

    Raises UserError for no weights, a pickle that is not allowed (it names `option`), a broken
    file, or tensors of a dtype that is not one of weights.
    """
    path = folder / WEIGHTS_NAME
    if _is_there(path):
        tensors = read_header(path).tensors
        for spec in tensors:
            _check_dtype(path, spec.name, spec.dtype)
        return None, {spec.name: spec.shape for spec in tensors}
    pickles = [folder / name for name in PICKLE_NAMES if _is_there(folder / name)]
    if not pickles:
        raise UserError(f"{folder}: no {WEIGHTS_NAME}; expected a PEFT adapter folder")
    if not allow_pickle:
        with suppress(OSError), open_regular(pickles[0]) as file:
            refuse_lfs_pointer(pickles[0], file.read(64))
        raise UserError(
            f"{pickles[0]}: a pickle; expected {WEIGHTS_NAME} ({option} true reads a pickle that"
            " holds nothing but tensors)"
        )
    loaded = read_pickle(pickles[0], mmap=False)
    for name, tensor in loaded.items():
        _check_dtype(pickles[0], name, DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)))
    return loaded, {name: tuple(tensor.shape) for name, tensor in loaded.items()}


def _check_dtype(path: Path, name: str, dtype: str) -> None:
    if dtype not in _DTYPES:
        raise UserError(f"{path}: {name} has dtype {dtype}; expected one of {', '.join(_DTYPES)}")
