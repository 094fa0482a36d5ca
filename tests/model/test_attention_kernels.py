"""The kernel that is named is the one that runs, and cuDNN's never is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from qwen_ds.model.attention_kernels import attention_kernels, without_cudnn_attention
from qwen_ds.model.configuration import QWenConfig


@pytest.fixture
def _cudnn_as_before() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.usefixtures("_cudnn_as_before")
def test_cudnns_attention_is_switched_off_and_the_others_stay() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    without_cudnn_attention()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert (
        torch.backends.cuda.mem_efficient_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    )


def config(attention: str, dropout: float = 0.0) -> QWenConfig:
    made = QWenConfig(
        num_attention_heads=4, kv_channels=8, hidden_size=32, attn_dropout_prob=dropout
    )
    made._attn_implementation = attention
    return made


@pytest.mark.parametrize(
    ("dropout", "name", "operation"),
    [
        (0.0, "FlashAttention", "flash_attention"),
        (0.1, "plain matrix products", "attention_math"),
    ],
)
def test_the_kernel_that_is_named_runs(dropout: float, name: str, operation: str) -> None:
    shapes = [(3, 17), (1, 40)]
    found = attention_kernels(config("sdpa", dropout), shapes, torch.float32, torch.device("cpu"))
    assert found == name
    for rows, length in shapes:
        q = torch.randn(rows, length, 4, 8, requires_grad=True).transpose(1, 2)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            F.scaled_dot_product_attention(q, q, q, None, dropout, True)
        assert any(operation in event.key for event in seen.key_averages())


def test_eager_attention_asks_nobody() -> None:
    found = attention_kernels(config("eager"), [(1, 2)], torch.float32, torch.device("cpu"))
    assert found == "plain matrix products"
