"""The options in adapter_config.json: which are read, which are refused, and their ranges.

PEFT trusts this file: a string where a flag belongs is true, a misspelt rank ends in a traceback,
and options of later versions are dropped with a warning. Here every option is read, refused, or
known to mean nothing once training is over (test_every_option_of_peft_is_decided_about).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_ds.errors import UserError

# Options that change what the tensors mean: ignored, they give a model nobody trained.
UNSUPPORTED = (
    "fan_in_fan_out", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication",
    "target_parameters", "lora_bias", "arrow_config", "kasa_config", "monteclora_config",
    "megatron_config", "velora_config", "enable_lora",
)  # fmt: skip
# Options of training, of quantised bases, and of other models.
WITHOUT_EFFECT = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "lora_dropout", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
    "merge_weights",
)  # fmt: skip
READ = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "trainable_token_indices", "bias", "use_rslora", "use_dora", "init_lora_weights",
)  # fmt: skip

# Initialisations that take something out of the base: such an adapter fits only what is left of it.
_INIT_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
# These train a head of their own in place of the language model's.
_OTHER_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")

MAX_RANK = 2**17  # wider than any layer of any Qwen
MAX_ALPHA = 1e6
MAX_ENTRIES = 10_000  # of a list: every module of Qwen-72B, named in full, makes 400
MAX_LISTS = 100  # of names in layers_pattern, each of which is tried on each module
MAX_PATTERNS = 1000  # of rank_pattern or alpha_pattern, each of which is tried on each module
_NAME = re.compile(r"[\w.]{1,200}")
_NAMES = f"names of modules, at most {MAX_ENTRIES}"


def check_options(path: Path, config: Mapping[str, Any]) -> None:
    """Check the options of a LoRA adapter, read from `path`, without the base. UserError names the
    first that can't be honoured, or whose value PEFT would not have written."""
    _check_kind(path, config)
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not _is_rank(r) or not _is_alpha(alpha):
        raise UserError(
            f"{path}: r is {_short(r)}, lora_alpha is {_short(alpha)}; expected a whole number and"
            f" a number, above 0 and at most {MAX_RANK} and {MAX_ALPHA:g}"
        )

    def require(right: bool, name: str, expected: str) -> None:
        if not right:
            raise UserError(f"{path}: {name} is {_short(config.get(name))}; expected {expected}")

    for name in ("use_dora", "use_rslora"):
        require(isinstance(config.get(name), bool | None), name, "true or false")
    bias = config.get("bias")
    require(bias in (None, "none", "all", "lora_only"), "bias", "none, all or lora_only")
    for name, right, what in (
        ("rank_pattern", _is_rank, f"whole numbers from 1 to {MAX_RANK}"),
        ("alpha_pattern", _is_alpha, f"numbers above 0, up to {MAX_ALPHA:g}"),
    ):
        patterns = config.get(name) or {}
        right_values = isinstance(patterns, dict) and all(map(right, patterns.values()))
        require(right_values, name, f"patterns with {what}")
        if len(patterns) > MAX_PATTERNS:
            came = f"{name} has {len(patterns)} patterns"
            raise UserError(f"{path}: {came}; expected at most {MAX_PATTERNS}")
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    named = isinstance(targets, str) or _are_names(targets)
    require(named and bool(targets), "target_modules", f"{_NAMES}, or a pattern")
    named = excluded is None or isinstance(excluded, str) or _are_names(excluded)
    require(named, "exclude_modules", f"{_NAMES}, or a pattern")
    saved = config.get("modules_to_save") or []
    named = _are_names(saved) and all(map(_NAME.fullmatch, saved))
    require(named, "modules_to_save", f"a list of {_NAMES}")
    _check_layers(path, config)
    _check_token_rows(path, config.get("trainable_token_indices"))


def unknown_options(config: Mapping[str, Any]) -> list[str]:
    """Names of options that are set and that this release of PEFT does not have."""
    known = {*UNSUPPORTED, *WITHOUT_EFFECT, *READ}
    return [name for name, value in config.items() if name not in known and value]


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {_short(config.get('peft_type'))}; expected 'LORA'")
    if used := [name for name in UNSUPPORTED if config.get(name)]:
        raise UserError(
            f"{path}: {used[0]} is {_short(config[used[0]])}; expected an adapter trained without"
            " it"
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_INIT_CHANGES_BASE):
        raise UserError(
            f"{path}: init_lora_weights is {_short(init)}, which trains against a changed base;"
            " expected an adapter that was saved with peft's conversion to plain LoRA"
        )
    if init not in _INITS:
        raise UserError(
            f"{path}: init_lora_weights is {_short(init)}; expected one of {', '.join(_INITS)}"
        )
    if config.get("task_type") in _OTHER_TASKS:
        raise UserError(
            f"{path}: task_type is {config['task_type']!r}, whose model has another head; expected"
            " 'CAUSAL_LM'"
        )


def _check_layers(path: Path, config: Mapping[str, Any]) -> None:
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    listed = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(_is_index(i) for i in listed) or len(listed) > MAX_ENTRIES:
        raise UserError(
            f"{path}: layers_to_transform is {_short(layers)}; expected the number of a layer, or"
            " a list of them"
        )
    names: Any = [pattern] if isinstance(pattern, str) and pattern else pattern or []
    if not _are_names(names) or len(names) > MAX_LISTS or not all(map(_NAME.fullmatch, names)):
        raise UserError(
            f"{path}: layers_pattern is {_short(pattern)}; expected the name of the list of layers,"
            f" such as h, or at most {MAX_LISTS} names"
        )
    if isinstance(config["target_modules"], str) and (listed or names):
        raise UserError(
            f"{path}: target_modules is a pattern beside layers_to_transform or layers_pattern;"
            " expected a list of names, without which peft takes neither"
        )
    if names and layers is None:
        raise UserError(
            f"{path}: layers_pattern is set without layers_to_transform; expected both or neither"
        )


def _check_token_rows(path: Path, rows: object) -> None:
    tables = rows if isinstance(rows, dict) else {} if rows is None else {"the embedding": rows}
    indices: Any
    for name, indices in tables.items():
        right = isinstance(indices, list) and all(map(_is_index, indices))
        if not right or len(set(indices)) < len(indices) or not name:
            raise UserError(
                f"{path}: trainable_token_indices has {_short(indices)} for {_short(name)};"
                " expected different token ids"
            )


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _is_alpha(value: object) -> bool:
    """Whether it is a number in range; NaN compares false with everything."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= MAX_ALPHA


def _are_names(value: object) -> bool:
    if not isinstance(value, list) or len(value) > MAX_ENTRIES:
        return False
    return all(isinstance(name, str) and name for name in value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
