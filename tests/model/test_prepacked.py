"""Prepacked linear layers change the speed and nothing else."""

from __future__ import annotations

import pytest
import torch

import qwen_ds
from qwen_ds.model.configuration import QWenConfig
from qwen_ds.model.modeling import QWenMLP
from qwen_ds.model.prepacked import PrepackedLinear, prepack

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN has products in bf16 for CPUs with AVX-512 alone",
)


def model(dtype: torch.dtype) -> qwen_ds.QWenLMHeadModel:
    torch.manual_seed(0)
    config = QWenConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        kv_channels=16, intermediate_size=128, seq_length=64,
    )  # fmt: skip
    return qwen_ds.QWenLMHeadModel(config).eval().to(dtype)


@needs_bf16
@pytest.mark.parametrize("rows", [1, 7, 32, 300])
def test_prepacked_layers_give_the_same_bits(rows: int) -> None:
    plain, packed = model(torch.bfloat16), model(torch.bfloat16)
    assert prepack(packed) == 2 * 5 + 1
    ids = torch.randint(0, 500, (1, rows), generator=torch.Generator().manual_seed(rows))
    with torch.inference_mode():
        assert torch.equal(plain(ids).logits, packed(ids).logits)


@needs_bf16
def test_children_of_modules_to_keep_stay() -> None:
    packed = model(torch.bfloat16)
    assert prepack(packed, (QWenMLP,)) == 2 * 2 + 1
    for name, module in packed.named_modules():
        assert not (".mlp." in name and isinstance(module, PrepackedLinear))


def test_layers_of_fp32_are_left() -> None:
    assert prepack(model(torch.float32)) == 0


def test_layers_are_left_where_onednn_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert prepack(model(torch.bfloat16)) == 0
