"""Names of an adapter's tensors: those of any version of peft, under any wrapper, as one set.

A key is the name that current peft uses, `base_model.model.<module>.lora_A.weight`. The tensors of
a module are its parts: lora_A, lora_B, lora_magnitude_vector (DoRA's), rows (replaced token rows),
weight and bias (saved whole).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_ds.errors import UserError
from qwen_ds.model.adapter_asked import token_rows_of
from qwen_ds.model.family import QWEN

PEFT_PREFIX = "base_model.model."
ROWS = "token_adapter.trainable_tokens_delta"

_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?!weight$)\w+)?\.weight$")
_MAGNITUDE = re.compile(r"^(?P<module>.+)\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?$")
_EMBEDDING_LORA = re.compile(r"\.lora_embedding_[AB](?:\.\w+)?$")
_TOKEN_ROWS = re.compile(r"^(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.\w+)?$")
_SAVED = re.compile(
    r"^(?P<module>.+?)(?:\.modules_to_save(?:\.\w+)?|\.base_layer)?\.(?P<parameter>weight|bias)$"
)
# Part, the part that it needs beside it, and its dimensions.
_PARTNERS = (
    ("lora_A", "lora_B", 2), ("lora_B", "lora_A", 2), ("lora_magnitude_vector", "lora_A", 1)
)  # fmt: skip


def sort_keys(
    folder: Path, in_file: Mapping[str, object]
) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Sort the tensors of a file by module: key -> name in the file; and module -> part -> key.
    UserError: an unknown name, or two names for one tensor."""
    names: dict[str, str] = {}
    parts: dict[str, dict[str, str]] = {}
    for name in in_file:
        short = QWEN.without_wrappers(name) or ""
        if match := _LORA.match(short):
            kind, suffix = f"lora_{match['side']}", f"lora_{match['side']}.weight"
        elif match := _MAGNITUDE.match(short):
            kind = suffix = "lora_magnitude_vector"
        elif match := _TOKEN_ROWS.match(short):
            kind, suffix = "rows", ROWS
        elif (match := _SAVED.match(short)) and not re.search(
            r"\.(lora_|original_module|token_adapter)", short
        ):
            kind = suffix = match["parameter"]
        elif _EMBEDDING_LORA.search(short):
            raise UserError(
                f"{folder}: {name} is LoRA on the embedding, which is not supported; expected"
                " LoRA on linear layers (rows of the embedding are trained by"
                " trainable_token_indices, the whole of it by modules_to_save)"
            )
        else:
            raise UserError(
                f"{folder}: unknown tensor {name}; expected PEFT's names on Qwen's modules, such as"
                f" {PEFT_PREFIX}{QWEN.example}.lora_A.weight"
            )
        key = f"{PEFT_PREFIX}{match['module']}.{suffix}"
        if key in names:
            raise UserError(
                f"{folder}: {name} and {names[key]} are the same tensor; expected one adapter in "
                "the file"
            )
        names[key] = name
        parts.setdefault(match["module"], {})[kind] = key
    return names, parts


def check_pairs(
    folder: Path, parts: Mapping[str, Mapping[str, str]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise UserError unless every low-rank tensor has its partner and is not empty."""
    for keys in parts.values():
        for kind, partner, dimensions in _PARTNERS:
            if (key := keys.get(kind)) is None:
                continue
            if partner not in keys:
                raise UserError(f"{folder}: {key} has no {partner} beside it; expected both")
            shape = shapes[key]
            if 0 in shape or len(shape) != dimensions:
                raise UserError(
                    f"{folder}: {key} is {list(shape)}; expected a whole tensor (saved under "
                    "ZeRO-3 without gathering?)"
                )


def inferred_config(
    parts: Mapping[str, Mapping[str, str]], shapes: Mapping[str, tuple[int, ...]], alpha: float
) -> dict[str, Any]:
    """Make an adapter_config.json for an adapter without one; ranks follow from the shapes."""
    ranks = {name: shapes[keys["lora_A"]][0] for name, keys in parts.items() if "lora_A" in keys}
    usual = max(set(ranks.values()), key=list(ranks.values()).count, default=1)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": usual,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {module: r for module, r in ranks.items() if r != usual},
        "alpha_pattern": {},
        "modules_to_save": sorted(name for name, keys in parts.items() if "weight" in keys) or None,
        "use_dora": any("lora_magnitude_vector" in keys for keys in parts.values()),
        "use_rslora": False,
        "bias": "none",
    }


def token_indices(
    folder: Path, config: Mapping[str, Any], module: str, count: int
) -> tuple[int, ...]:
    """Rows of `module` that the `count` stored ones replace; UserError if the numbers differ."""
    indices = token_rows_of(config, module)
    if indices is None or len(indices) != count:
        listed = "none" if indices is None else len(indices)
        came = f"{module} replaces {count} rows"
        raise UserError(f"{folder}: {came}; trainable_token_indices lists {listed} for it")
    return tuple(indices)
