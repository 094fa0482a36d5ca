"""The LoRA branch against peft's own, the parameter count of the real shape, and adapters to
continue from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.recipe.options import LoraOptions
from qwen_ds.train import lora
from qwen_ds.train.lora import (
    add_lora,
    config_of,
    count_parameters,
    init_from,
    plain_name,
    write_adapter,
)

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


def test_the_default_adapter_of_the_7b_has_the_original_projects_size() -> None:
    config = QWenConfig(
        vocab_size=151_936,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=22_016,
    )
    with torch.device("meta"):
        model = QWenLMHeadModel(config)
        count = count_parameters(add_lora(model, LoraOptions(), base="", seed=0))
    assert count.trainable == 10_158_080
    assert count.total == 7_721_324_544 + 10_158_080
    assert "10,158,080 trainable" in str(count)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_our_branch_equals_pefts(small_dir: Path, tmp_path: Path, variant: str) -> None:
    """Outputs and every gradient in fp32, and the folder loads into stock peft."""
    ours = wrapped(small_dir, variant=variant)
    write_adapter(tmp_path, config_of(ours), trained(ours))
    stock = peft.PeftModel.from_pretrained(
        QWenLMHeadModel.from_pretrained(small_dir), str(tmp_path), is_trainable=True
    )
    logits = [model(IDS, labels=IDS) for model in (ours, stock)]
    torch.testing.assert_close(logits[0].logits, logits[1].logits, rtol=1e-5, atol=1e-5)
    for out in logits:
        out.loss.backward()
    theirs = trained(stock)
    assert theirs.keys() == trained(ours).keys() and len(theirs) >= 30
    for name, parameter in trained(ours).items():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6, msg=name
        )


def test_the_branch_computes_in_the_activations_dtype(small_dir: Path) -> None:
    model = wrapped(small_dir, dtype=torch.bfloat16).train()
    seen: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, lora.CastLinear):
            module.register_forward_hook(
                lambda _m, args, out: seen.update((args[0].dtype, out.dtype))
            )
    model(IDS, labels=IDS).loss.backward()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert {p.grad.dtype for p in trained(model).values() if p.grad is not None} == {torch.float32}


def test_only_the_branch_sees_dropout_and_only_in_training(small_dir: Path) -> None:
    model = wrapped(small_dir, dropout=0.5)
    plain = wrapped(small_dir, dropout=0.0)
    torch.testing.assert_close(model.eval()(IDS).logits, plain.eval()(IDS).logits)
    assert (model.train()(IDS).logits - plain(IDS).logits).abs().max() > 1e-3


def test_attention_and_mlp_projections_can_be_told_apart(small_dir: Path) -> None:
    for target, others in (("attn.c_proj", "mlp"), ("mlp.c_proj", "attn")):
        names = trained(wrapped(small_dir, targets=[target]))
        assert names and all(target in n and f".{others}." not in n for n in names)


def test_training_continues_from_an_adapter(small_dir: Path, tmp_path: Path, golden: Path) -> None:
    """Ours, the official finetune.py's stock folder, and the original project's
    pytorch_model.bin."""
    first = wrapped(small_dir)
    values = {plain_name(n): p.detach().clone() for n, p in trained(first).items()}
    write_adapter(tmp_path / "ours", config_of(first), trained(first))
    (tmp_path / "bin").mkdir()
    torch.save(
        {k.replace("base_model.model.", ""): v for k, v in values.items()},
        tmp_path / "bin" / "pytorch_model.bin",
    )
    options = LoraOptions(dropout=0.0, targets=ALL, r=4, alpha=6)
    for folder in ("ours", "bin"):
        again = add_lora(QWenLMHeadModel.from_pretrained(small_dir), options, base="", seed=8)
        init_from(again, replace(options, init_from=str(tmp_path / folder)))
        assert all(torch.equal(values[plain_name(n)], p) for n, p in trained(again).items()), folder
    for variant in ("dora", "rslora"):
        options = LoraOptions(dropout=0.0, targets=ALL, r=4, alpha=6, variant=variant)  # type: ignore[arg-type]
        first = wrapped(small_dir, variant=variant)
        write_adapter(tmp_path / variant, config_of(first), trained(first))
        again = add_lora(QWenLMHeadModel.from_pretrained(small_dir), options, base="", seed=8)
        init_from(again, replace(options, init_from=str(tmp_path / variant)))
        assert all(
            torch.equal(p, q)
            for p, q in zip(trained(first).values(), trained(again).values(), strict=True)
        )
    official = LoraOptions(dropout=0.0, targets=ALL, r=4, alpha=8)
    again = add_lora(QWenLMHeadModel.from_pretrained(small_dir), official, base="", seed=8)
    init_from(again, replace(official, init_from=str(golden / "lora" / "adapter")))
    outputs = load_file(golden / "lora" / "outputs.safetensors")
    again.eval()
    loss = again(
        outputs["input_ids"], attention_mask=outputs["attention_mask"], labels=outputs["labels"]
    ).loss
    torch.testing.assert_close(loss, outputs["loss_eval"], rtol=0, atol=5e-6)


def test_the_written_folder_is_plain_and_readable_by_all(small_dir: Path, tmp_path: Path) -> None:
    model = wrapped(small_dir)
    write_adapter(tmp_path, config_of(model), trained(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (tmp_path / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["target_modules"] == ALL and config["inference_mode"] is True
    with pytest.raises(AssertionError, match="empty"):
        write_adapter(
            tmp_path / "empty",
            config_of(model),
            {"base_model.model.x.lora_A.default.weight": torch.empty(0)},
        )
