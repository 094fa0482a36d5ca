"""The proof on whole models, loaded as training and prediction load them, adapters by peft."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qwen_ds.disk.read import read_json
from qwen_ds.export.merge_plan import MergePlan
from qwen_ds.export.proof.noise import RoundingNoise
from qwen_ds.export.proof.sides import POSITIONS, Outputs, ProofRow, put_adapters
from qwen_ds.model.config_check import checked_qwen2
from qwen_ds.model.family import FAMILIES
from qwen_ds.model.folder import find_qwen2, inspect_folder
from qwen_ds.model.loading import load_base


def whole_outputs(plan: MergePlan, merged: Path, rows: Sequence[ProofRow]) -> Outputs:
    """Compute logits of both sides, with one model in memory at a time."""
    model = _load(plan.base.folder)
    base_PV = expected_PV = _logits(model, rows)
    if plan.adapters.members:
        fold = put_adapters(model, plan.adapters)
        expected_PV = _logits(model, rows)
        fold()
    RoundingNoise(plan.rounded()).spoil(model)
    noisy_PV = _logits(model, rows)
    del model
    gc.collect()  # peft's wrappers refer to each other, and would outlive `del`
    return Outputs(base_PV, expected_PV, noisy_PV, _logits(_load(merged), rows))


def memory_needed(plan: MergePlan) -> int:
    """Bytes of memory that `whole_outputs` takes on CPUs."""
    specs = plan.base.tensors.values()
    items = [spec.num_rows * spec.items_per_row for spec in specs]
    added = sum(
        torch.Size(shape).numel()
        for adapter in plan.adapters.members
        for shape in adapter.shapes.values()
    )
    copies = 3 if plan.adapters.weights is not None else 1
    positions = POSITIONS + min(POSITIONS, len(plan.adapters.replaced_tokens()))
    logits = 4 * positions * max(spec.num_rows for spec in specs)
    # fp32; loading holds the largest tensor twice; four sets of logits; half a GB of activations.
    return 4 * (copies * sum(items) + 2 * added + max(items) + logits) + 2**29


def _load(folder: Path) -> nn.Module:
    if read_json(folder / "config.json")["model_type"] in FAMILIES:
        return load_base(inspect_folder(folder), torch.float32)
    config = checked_qwen2(find_qwen2(folder).settings, folder / "config.json")
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        str(folder), config=config, dtype=torch.float32, trust_remote_code=False
    )
    return model.eval()


@torch.no_grad()
def _logits(model: nn.Module, rows: Sequence[ProofRow]) -> Tensor:
    found = [
        model(input_ids=row.ids_T[None], use_cache=False, logits_to_keep=row.positions)
        for row in rows
    ]
    return torch.cat([outputs.logits[0].float() for outputs in found])
