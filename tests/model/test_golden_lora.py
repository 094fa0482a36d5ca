"""Stock PEFT adapters on the native model: outputs, gradients and merged weights (golden/lora,
golden/lora_base)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

ADAPTERS = [("lora", 3e-5), ("lora_base", 3e-4)]


def tuned(small_dir: Path, golden: Path, name: str) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(small_dir)
    return PeftModel.from_pretrained(base, str(golden / name / "adapter"), is_trainable=True).eval()


@pytest.mark.parametrize("name, tolerance", ADAPTERS)
def test_an_official_adapter_gives_official_outputs_and_gradients(
    small_dir, golden, name: str, tolerance: float
) -> None:
    model = tuned(small_dir, golden, name)
    data = load_file(golden / name / "outputs.safetensors")
    out = model(**{name: data[name] for name in ("input_ids", "attention_mask", "labels")})
    real = data["attention_mask"].bool()
    assert_close(out.logits[real], data["logits"][real], atol=tolerance, rtol=0.0)
    assert_close(out.loss, data["loss_eval"], atol=5e-6, rtol=0.0)
    out.loss.backward()
    names = [name for name in data if name.startswith("grad.")]
    assert len(names) == 5
    for name in names:
        parameter = name.removeprefix("grad.").replace(".weight", ".default.weight")
        found, expected = model.get_parameter(parameter).grad, data[name]
        assert_close(found, expected, atol=2e-5 * expected.abs().max().item(), rtol=0.0)


@pytest.mark.parametrize("name, tolerance", ADAPTERS)
def test_merging_an_official_adapter_gives_official_weights(
    small_dir, golden, name: str, tolerance: float
) -> None:
    merged = tuned(small_dir, golden, name).merge_and_unload()
    data = load_file(golden / name / "outputs.safetensors")
    weights = merged.state_dict()
    base = load_file(small_dir / "model.safetensors")
    changed = load_file(golden / name / "merged_changed.safetensors")
    for key, expected in changed.items():
        assert_close(weights[key], expected, atol=tolerance, rtol=0.0)
    if name == "lora":  # lora_base lists the changes of the first block only
        assert {key for key in base if not torch.equal(base[key], weights[key])} == set(changed)
    with torch.no_grad():
        logits = merged(data["input_ids"], attention_mask=data["attention_mask"]).logits
    found = logits[torch.arange(4), data["attention_mask"].sum(-1) - 1]
    assert_close(found, data["merged_last_logits"], atol=tolerance, rtol=0.0)
