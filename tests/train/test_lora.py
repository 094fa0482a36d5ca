"""The LoRA branch against peft's own, the parameter count of the real shape, and adapters to
continue from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.recipe.options import LoraOptions
from qwen_ds.train import lora, lora_product
from qwen_ds.train.lora import add_lora, config_of, init_from, plain_name, write_adapter

ALL = ["c_attn", "c_proj", "w1", "w2"]
IDS = torch.arange(24).reshape(2, 12)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def wrapped(
    small_dir: Path, dtype: torch.dtype = torch.float32, **options: object
) -> peft.PeftModel:
    """`small` with an adapter whose B is not zero."""
    model = QWenLMHeadModel.from_pretrained(small_dir, dtype=dtype)
    settings = LoraOptions(**{"dropout": 0.0, "targets": ALL, "r": 4, "alpha": 6, **options})  # type: ignore[arg-type]
    result = add_lora(model, settings, base=str(small_dir), seed=3)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in trained(result).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return result


def count_at_7b(
    options: LoraOptions, layers: int, row_ids: Sequence[int] = ()
) -> lora.ParameterCount:
    """Parameters of an adapter on the 7B, if it had so many layers."""
    config = QWenConfig(
        vocab_size=151_936, hidden_size=4096, num_hidden_layers=layers, num_attention_heads=32,
        intermediate_size=22_016,
    )  # fmt: skip
    with torch.device("meta"):
        model = add_lora(QWenLMHeadModel(config), options, base="", seed=0, row_ids=row_ids)
    return lora.count_parameters(model)


def test_the_default_adapter_of_the_7b_has_the_original_projects_size() -> None:
    count = count_at_7b(LoraOptions(), layers=32)
    assert count.trainable == 10_158_080
    assert count.total == 7_721_324_544 + 10_158_080
    assert "10,158,080 trainable" in str(count)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_our_branch_equals_pefts(small_dir: Path, tmp_path: Path, variant: str) -> None:
    """Outputs and every gradient in fp32, and the folder loads into stock peft."""
    ours = wrapped(small_dir, variant=variant)
    write_adapter(tmp_path, config_of(ours), trained(ours))
    base = QWenLMHeadModel.from_pretrained(small_dir)
    stock = peft.PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True)
    logits = [model(IDS, labels=IDS) for model in (ours, stock)]
    torch.testing.assert_close(logits[0].logits, logits[1].logits, rtol=1e-5, atol=1e-5)
    for out in logits:
        out.loss.backward()
    theirs = trained(stock)
    assert theirs.keys() == trained(ours).keys() and len(theirs) >= 30
    for name, p in trained(ours).items():
        torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_branch_computes_in_the_activations_dtype(small_dir: Path) -> None:
    model = wrapped(small_dir, dtype=torch.bfloat16).train()
    seen: set[torch.dtype] = set()

    def note(tensor: Tensor) -> Tensor:
        seen.add(tensor.dtype)
        return tensor

    linear = next(m for m in model.modules() if isinstance(m, lora.LoraLinear))
    x = torch.ones(2, linear.in_features, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        assert linear(x).dtype == torch.bfloat16
    assert seen == {torch.bfloat16}
    model(IDS, labels=IDS).loss.backward()
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert {p.grad.dtype for p in trained(model).values() if p.grad is not None} == {torch.float32}


def test_only_the_branch_sees_dropout_and_only_in_training(small_dir: Path) -> None:
    model = wrapped(small_dir, dropout=0.5)
    plain = wrapped(small_dir, dropout=0.0)
    torch.testing.assert_close(model.eval()(IDS).logits, plain.eval()(IDS).logits)
    assert (model.train()(IDS).logits - plain(IDS).logits).abs().max() > 1e-3


@pytest.mark.parametrize(("targets", "dropped_tensors"), [(ALL, 4), (["w1", "c_attn"], 2)])
def test_maps_of_one_input_drop_it_once(
    small_dir: Path, monkeypatch: pytest.MonkeyPatch, targets: list[str], dropped_tensors: int
) -> None:
    """w1 and w2 read the same x: where both have a branch, these share what dropout leaves."""
    drop = mock.Mock(wraps=lora_product.drop)
    monkeypatch.setattr(lora_product, "drop", drop)
    model = wrapped(small_dir, dropout=0.5, targets=targets).train()
    model(IDS)
    assert drop.call_count == dropped_tensors * model.config.num_hidden_layers


def test_attention_and_mlp_projections_can_be_told_apart(small_dir: Path) -> None:
    for target, others in (("attn.c_proj", "mlp"), ("mlp.c_proj", "attn")):
        names = trained(wrapped(small_dir, targets=[target]))
        assert names and all(target in n and f".{others}." not in n for n in names)


def test_training_continues_from_an_adapter(small_dir: Path, tmp_path: Path, golden: Path) -> None:
    """Ours, the official finetune.py's stock folder, and the original project's
    pytorch_model.bin."""

    def continued(folder: Path, **options: object) -> peft.PeftModel:
        settings = LoraOptions(**{"dropout": 0.0, "targets": ALL, "r": 4, "alpha": 6, **options})  # type: ignore[arg-type]
        again = add_lora(QWenLMHeadModel.from_pretrained(small_dir), settings, base="", seed=8)
        init_from(again, replace(settings, init_from=str(folder), allow_pickle=True))
        return again

    for variant in ("lora", "dora", "rslora"):
        first = wrapped(small_dir, variant=variant)
        values = {plain_name(n): p.detach().clone() for n, p in trained(first).items()}
        folders = [tmp_path / variant]
        write_adapter(folders[0], config_of(first), trained(first))
        if variant == "lora":
            folders.append(tmp_path / "bin")
            folders[1].mkdir()
            bare = {k.replace("base_model.model.", ""): v for k, v in values.items()}
            torch.save(bare, folders[1] / "pytorch_model.bin")
        for folder in folders:
            again = trained(continued(folder, variant=variant))
            assert len(again) == len(values)
            assert all(torch.equal(values[plain_name(n)], p) for n, p in again.items()), folder
    outputs = load_file(golden / "lora" / "outputs.safetensors")
    inputs = {name: outputs[name] for name in ("input_ids", "attention_mask", "labels")}
    loss = continued(golden / "lora" / "adapter", alpha=8).eval()(**inputs).loss
    torch.testing.assert_close(loss, outputs["loss_eval"], rtol=0, atol=5e-6)


def test_the_written_folder_is_plain_and_readable_by_all(small_dir: Path, tmp_path: Path) -> None:
    model = wrapped(small_dir)
    write_adapter(tmp_path, config_of(model), trained(model))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    assert (tmp_path / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["target_modules"] == ALL and config["inference_mode"] is True
    partitioned = {"base_model.model.x.lora_A.default.weight": torch.empty(0)}
    with pytest.raises(AssertionError, match="empty"):
        write_adapter(tmp_path / "empty", config_of(model), partitioned)
