"""A LoRA adapter of Qwen as one of Qwen2: the same change of the weights, in a stock PEFT folder.

On the fused c_attn A is shared by q_proj, k_proj and v_proj, and B's rows (and DoRA's magnitudes,
one a row) are split between them as the weight's rows are. B @ A and every row's norm stay what
they were, and so does a module's scaling.

Shapes: O output features (rows), I input features, R rank.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qwen_ds.disk.place import require_new_folder
from qwen_ds.disk.weights import save_tensors
from qwen_ds.disk.write import publish, write_json
from qwen_ds.errors import UserError
from qwen_ds.export.base_check import base_name
from qwen_ds.export.card import write_card
from qwen_ds.export.output_place import building, check_inputs_elsewhere, telling_errors
from qwen_ds.export.qwen2 import settings
from qwen_ds.export.qwen2.names import qwen2_modules
from qwen_ds.export.stream.changes import Adapters
from qwen_ds.model.adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Adapter,
    LoraPair,
    check_adapter_fits,
    read_adapter,
)
from qwen_ds.model.adapter_keys import PEFT_PREFIX
from qwen_ds.model.carry_over import carry_over
from qwen_ds.model.family import QWEN
from qwen_ds.model.shapes import state_shapes

# Keys that a stock PEFT reads, beside those decided here. All others are about training.
_KEPT = ("lora_alpha", "lora_dropout", "peft_type", "r", "use_dora", "use_rslora")


def convert_adapter(base: Path, adapter: Path, output: Path, *, allow_pickle: bool = False) -> int:
    """Write an adapter of Qwen as an adapter of the Qwen2 made from the same base.

    Of the folder `base` only config.json and the legal texts are read. Returns the number of
    modules that the new adapter changes. UserError if the adapter does not fit the base or replaces
    rows or whole tensors, or the output exists.
    """
    config = settings.read_qwen_config(base)
    source = read_adapter(adapter, allow_pickle=allow_pickle)
    check_adapter_fits(source, state_shapes(config))
    if replaced := sorted((*source.saved, *(f"{module}.weight" for module in source.token_rows))):
        raise UserError(
            f"{adapter}: replaces values of {replaced[0]}; expected LoRA on linear layers: merge"
            " instead"
        )
    output = Path(os.path.abspath(output))
    check_inputs_elsewhere(output, (base, adapter))
    require_new_folder(output)
    pairs = {
        target: pair for module, pair in source.pairs.items() for target in qwen2_modules(module)
    }
    # The Qwen2 has no id of its own: this name tells its Qwen.
    name = f"{base_name(base).rpartition('/')[2]}-qwen2"
    with telling_errors(output, "a disk"), building(output) as folder:
        save_tensors(folder / WEIGHTS_NAME, _tensors(source))
        write_json(folder / CONFIG_NAME, _config(source, pairs, config.num_hidden_layers, name))
        carry_over(base, folder, legal_only=True)
        write_card(folder, base, Adapters((source,)), "qwen2")
        publish(folder, output)
    return len(pairs)


def _tensors(source: Adapter) -> dict[str, Tensor]:
    """Each target's A_RI, its rows of B_OR and of the magnitudes [O], under PEFT's keys. UserError
    names a value that is not finite."""
    values, found = source.state_dict(), dict[str, Tensor]()
    for module, pair in source.pairs.items():
        targets = qwen2_modules(module)
        rows = source.shapes[pair.b_key][0] // len(targets)
        for i, target in enumerate(targets):
            first, last = i * rows, (i + 1) * rows
            found[f"{PEFT_PREFIX}{target}.lora_A.weight"] = values[pair.a_key].clone()
            b_OR = values[pair.b_key][first:last].clone()
            found[f"{PEFT_PREFIX}{target}.lora_B.weight"] = b_OR
            if pair.magnitude_key is not None:
                magnitude_O = values[pair.magnitude_key][first:last].clone()
                found[f"{PEFT_PREFIX}{target}.lora_magnitude_vector"] = magnitude_O
    return found


def _config(
    source: Adapter, pairs: Mapping[str, LoraPair], num_layers: int, base: str
) -> dict[str, Any]:
    """adapter_config.json: the targets, and each unusual rank and alpha, under the new names."""
    layers = Counter(target.rpartition(".")[2] for target in pairs)
    # A short name, which is what other engines know, means the module in every layer.
    (head,) = qwen2_modules(QWEN.head)
    in_every_layer = all(
        count == (1 if name == head else num_layers) for name, count in layers.items()
    )
    usual = source.config["lora_alpha"]
    alphas = {
        # Twelve digits: alpha came through a division, and 16 should stay 16.
        target: float(f"{pair.scaling * _divisor(source, pair.r):.12g}")
        for target, pair in pairs.items()
        if pair.scaling != usual / _divisor(source, pair.r)
    }
    return {
        **{key: source.config[key] for key in _KEPT if key in source.config},
        "task_type": source.config.get("task_type") or "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(layers if in_every_layer else pairs),
        "modules_to_save": None,
        "rank_pattern": {
            target: pair.r for target, pair in pairs.items() if pair.r != source.config["r"]
        },
        "alpha_pattern": alphas,
    }


def _divisor(source: Adapter, r: int) -> float:
    return math.sqrt(r) if source.config.get("use_rslora") else r
