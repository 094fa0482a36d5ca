"""Adapters in sequence and weighted, against peft's own merges one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from qwen_ds.errors import UserError
from qwen_ds.model.modeling import QWenLMHeadModel
from tests.export.folders import bf16_copy, merge_with, peft_adapter

OPTIONS: list[dict[str, Any]] = [
    {"target_modules": ["c_attn", "w1"]},
    {"use_dora": True, "target_modules": ["w1", "mlp.c_proj"]},
    {
        "target_modules": ["w2"],
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": {"wte": [3, 500]},
    },
]


def test_in_sequence_each_goes_onto_the_result_of_the_one_before(
    small_dir: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / f"adapter{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        peft_adapter(small_dir, folder, seed=i, **OPTIONS[i])
    report = merge_with(small_dir, folders, tmp_path / "out", block_bytes=3000)
    model = QWenLMHeadModel.from_pretrained(str(small_dir), dtype=torch.float32)
    for folder in folders:
        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=2e-6)
    kinds = {name: after.kind for name, after in report.changed.items()}
    assert (
        kinds["transformer.h.0.mlp.w1.weight"] == "lora, dora"
        and kinds["transformer.wte.weight"] == "rows"
    )
    assert report.adapters == [str(folder) for folder in folders] and report.weights is None
    assert {f"adapter{i}/adapter_model.safetensors" for i in (1, 2, 3)} < report.inputs.keys()

    backwards = merge_with(small_dir, folders[::-1], tmp_path / "backwards")
    other = load_file(tmp_path / "backwards" / "model.safetensors")
    assert backwards.changed.keys() == report.changed.keys()
    assert not torch.equal(
        other["transformer.h.0.mlp.w1.weight"], merged["transformer.h.0.mlp.w1.weight"]
    )


def test_weighted_the_changes_of_the_bare_base_are_added_up(
    small_dir: Path, tmp_path: Path
) -> None:
    base = load_file(small_dir / "model.safetensors")
    folders, weights = [tmp_path / f"adapter{i}" for i in range(3)], [0.5, -0.25, 1.5]
    alone = [
        peft_adapter(small_dir, folder, seed=i, **OPTIONS[i]) for i, folder in enumerate(folders)
    ]
    report = merge_with(small_dir, folders, tmp_path / "out", weights=weights, block_bytes=3000)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in base.items():
        change = sum(
            weight * (one[name].double() - tensor.double())
            for weight, one in zip(weights, alone, strict=True)
        )
        torch.testing.assert_close(
            merged[name], (tensor.double() + change).float(), rtol=1e-6, atol=4e-6
        )
    assert report.changed["transformer.h.0.mlp.w1.weight"].kind == "0.5 lora + -0.25 dora"
    assert report.weights == weights


def test_a_sequence_is_rounded_once(small_dir: Path, tmp_path: Path) -> None:
    """Two halves of a change that single-handedly would be rounded away: together they are not."""
    base = bf16_copy(small_dir, tmp_path / "base")
    peft_adapter(base, tmp_path / "adapter", target_modules=["w1"], lora_alpha=0.001)
    name, weights = "transformer.h.0.mlp.w1.weight", load_file(base / "model.safetensors")
    merge_with(base, [tmp_path / "adapter"] * 40, tmp_path / "at_once")
    at_once = load_file(tmp_path / "at_once" / "model.safetensors")[name]
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (
        adapter[f"base_model.model.transformer.h.0.mlp.w1.lora_{side}.weight"].double()
        for side in "AB"
    )
    exact = weights[name].double() + 40 * 0.001 / 4 * (b @ a)
    assert (at_once != exact.bfloat16()).float().mean() < 1e-3
    step_by_step = weights[name]
    for _ in range(40):
        step_by_step = (step_by_step.double() + 0.001 / 4 * (b @ a)).bfloat16()
    assert (step_by_step != exact.bfloat16()).float().mean() > 0.01


def test_every_adapter_needs_a_weight(small_dir: Path, golden: Path, tmp_path: Path) -> None:
    adapters = [golden / "lora" / "adapter", golden / "lora_base" / "adapter"]
    for weights, count in (([1.0], 1), ([0.1, 0.2, 0.3], 3)):
        with pytest.raises(
            UserError, match=f"{count} weights and 2 adapters were given; expected one for each"
        ):
            merge_with(small_dir, adapters, tmp_path / "out", weights=weights)
