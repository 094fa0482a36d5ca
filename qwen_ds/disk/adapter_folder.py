"""The files of an adapter folder: configuration checked, weights opened, neither interpreted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen_ds.disk.read import read_json
from qwen_ds.disk.weights import read_header, read_pickle
from qwen_ds.errors import UserError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAMES = ("adapter_model.bin", "pytorch_model.bin")

# Options of peft that change what the tensors mean: ignored, they give a model nobody trained.
_UNSUPPORTED = (
    "fan_in_fan_out", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication",
    "target_parameters", "lora_bias", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# Initialisations that take something out of the base: such an adapter fits only what is left of it.
_INIT_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(folder: Path) -> dict[str, Any] | None:
    """Read adapter_config.json; None where there is none. Raises UserError for anything but LoRA
    and for options that cannot be honoured."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return None
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {config.get('peft_type')!r}; expected 'LORA'")
    if used := [name for name in _UNSUPPORTED if config.get(name)]:
        raise UserError(
            f"{path}: {used[0]} is {config[used[0]]!r}; expected an adapter trained without it"
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_INIT_CHANGES_BASE):
        raise UserError(
            f"{path}: init_lora_weights is {init!r}, which trains against a changed base; expected"
            " an adapter that was saved with peft's conversion to plain LoRA"
        )
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float):
        raise UserError(
            f"{path}: r is {r!r}, lora_alpha is {alpha!r}; expected a whole number and a number"
        )
    return config


def open_weights(
    folder: Path, allow_pickle: bool
) -> tuple[Mapping[str, Tensor] | None, dict[str, tuple[int, ...]]]:
    """The tensors of an adapter's pickle, or None for a safetensors file; and the shape of each,
    under the file's own names.

    Raises UserError for no weights, a pickle that is not allowed, or a broken file.
    """
    path = folder / WEIGHTS_NAME
    if path.is_file():
        return None, {spec.name: spec.shape for spec in read_header(path).tensors}
    pickles = [folder / name for name in PICKLE_NAMES if (folder / name).is_file()]
    if not pickles:
        raise UserError(f"{folder}: no {WEIGHTS_NAME}; expected a PEFT adapter folder")
    if not allow_pickle:
        raise UserError(f"{pickles[0]}: a pickle; expected {WEIGHTS_NAME}")
    loaded = read_pickle(pickles[0], mmap=False)
    return loaded, {name: tuple(tensor.shape) for name, tensor in loaded.items()}
