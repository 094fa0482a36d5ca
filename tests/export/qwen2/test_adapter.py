"""A converted adapter in stock PEFT on stock Qwen2: the logits are those of the native model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import Qwen2ForCausalLM

from qwen_ds.errors import UserError
from qwen_ds.export.qwen2.adapter import convert_adapter
from qwen_ds.model.modeling import QWenLMHeadModel

ALL_TARGETS = ["c_attn", "c_proj", "w1", "w2"]
IDS_BT = torch.arange(5, 45)[None]


def trained(base: Path, folder: Path, **options: Any) -> Tensor:
    """Save an adapter of random values on the native model; returns its logits on IDS_BT."""
    torch.manual_seed(3)
    model = QWenLMHeadModel.from_pretrained(str(base), dtype=torch.float32)
    wrapped = get_peft_model(
        model, LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ALL_TARGETS, **options})
    )
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return logits(wrapped.eval(), IDS_BT)


@torch.inference_mode()
def logits(model: torch.nn.Module, ids_BT: Tensor, **options: Tensor) -> Tensor:
    return model(input_ids=ids_BT, **options).logits


def on_stock(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(
        Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter)
    ).eval()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_the_golden_adapter_gives_the_official_logits(
    small_dir: Path, small_qwen2: Path, golden: Path, tmp_path: Path
) -> None:
    assert convert_adapter(small_dir, golden / "lora" / "adapter", tmp_path / "out") == 3 * 7
    expected = load_file(golden / "lora" / "outputs.safetensors")
    mask_BT = expected["attention_mask"]
    found_BTV = logits(
        on_stock(small_qwen2, tmp_path / "out"), expected["input_ids"], attention_mask=mask_BT
    )
    assert_close(found_BTV[mask_BT.bool()], expected["logits"][mask_BT.bool()], atol=3e-5, rtol=0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "README.md"
    }  # fmt: skip
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "out").iterdir())
    config = config_of(tmp_path / "out")
    assert config["target_modules"] == sorted(
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    )
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (
        4,
        8,
        {},
        {},
    )


def test_a_is_shared_and_b_is_split_by_rows(small_dir: Path, golden: Path, tmp_path: Path) -> None:
    convert_adapter(small_dir, golden / "lora" / "adapter", tmp_path / "out")
    old = load_file(golden / "lora" / "adapter" / "adapter_model.safetensors")
    new = load_file(tmp_path / "out" / "adapter_model.safetensors")
    fused, parts = (
        "base_model.model.transformer.h.1.attn.c_attn",
        "base_model.model.model.layers.1.self_attn",
    )
    rows_of_b = [new[f"{parts}.{name}.lora_B.weight"] for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(torch.cat(rows_of_b), old[f"{fused}.lora_B.weight"])
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(new[f"{parts}.{name}.lora_A.weight"], old[f"{fused}.lora_A.weight"])


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "lora_alpha": 7},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "r": 3},
        {
            "rank_pattern": {"attn.c_proj": 2, r"h\.1\..*w1": 5},
            "alpha_pattern": {r"h\.[02].*c_proj": 30},
        },
        {"use_rslora": True, "rank_pattern": {"w2": 5}, "alpha_pattern": {"c_attn": 7}},
        {"target_modules": ["c_attn"]},
        {"target_modules": ["attn.c_proj", "lm_head"]},
        {"target_modules": ["c_attn", "w1"], "layers_to_transform": [0, 2]},
    ],
    ids=str,
)
def test_every_variant_computes_the_same_in_stock_peft(
    small_dir: Path, small_qwen2: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    expected_BTV = trained(small_dir, tmp_path / "adapter", **options)
    convert_adapter(small_dir, tmp_path / "adapter", tmp_path / "out")
    assert_close(
        logits(on_stock(small_qwen2, tmp_path / "out"), IDS_BT), expected_BTV, atol=2e-5, rtol=0
    )
    bare_BTV = logits(Qwen2ForCausalLM.from_pretrained(small_qwen2, dtype=torch.float32), IDS_BT)
    assert (bare_BTV - expected_BTV).abs().max() > 0.1
    in_every_layer = "layers_to_transform" not in options
    assert all(
        ("." not in name) == in_every_layer
        for name in config_of(tmp_path / "out")["target_modules"]
    )


def test_alphas_come_back_as_they_were_written(small_dir: Path, tmp_path: Path) -> None:
    options = {
        "use_rslora": True,
        "r": 3,
        "lora_alpha": 7,
        "rank_pattern": {"w2": 5},
        "alpha_pattern": {"w2": 10},
    }
    trained(small_dir, tmp_path / "adapter", **options)
    convert_adapter(small_dir, tmp_path / "adapter", tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["alpha_pattern"] == {f"model.layers.{i}.mlp.gate_proj": 10 for i in range(3)}
    assert config["rank_pattern"] == {f"model.layers.{i}.mlp.gate_proj": 5 for i in range(3)}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"modules_to_save": ["ln_f", "lm_head"]}, r"lm_head\.weight"),
        ({"bias": "lora_only"}, r"transformer\.h\.0\.attn\.c_attn\.bias"),
        ({"trainable_token_indices": {"wte": [511, 0]}}, r"transformer\.wte\.weight"),
    ],
)
def test_what_replaces_values_must_be_merged_instead(
    small_dir: Path, tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    trained(small_dir, tmp_path / "adapter", **options)
    with pytest.raises(UserError, match=rf"adapter: replaces values of {name}; .*: merge instead$"):
        convert_adapter(small_dir, tmp_path / "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_an_adapter_of_another_base_and_an_output_that_exists_are_refused(
    small_dir: Path, golden: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(small_dir, tmp_path / "base"))
    settings = json.loads((base / "config.json").read_text()) | {"intermediate_size": 400}
    (base / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"lora_[AB]\.weight is .*an adapter of another base"):
        convert_adapter(base, golden / "lora" / "adapter", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="mine: exists and is not empty"):
        convert_adapter(small_dir, golden / "lora" / "adapter", tmp_path / "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "mine"}
