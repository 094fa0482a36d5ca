"""The loss head against plain cross-entropy, and the promise that logits exist only a chunk at a
time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_ds.model.chatml import IGNORE
from qwen_ds.train import loss
from qwen_ds.train.loss import LossHead, cross_entropy_sum


def _case(dtype: torch.dtype, tokens: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(tokens, 12, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(97, 12, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, 97, (tokens,), generator=g)


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    value = F.cross_entropy(h @ w.T, targets, reduction="sum")
    (value * 0.5).backward()
    assert h.grad is not None and w.grad is not None
    return value, h.grad, w.grad


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # 50 tokens: three whole chunks and a short one.
    monkeypatch.setattr(loss, "chunk_tokens", lambda rows: 16)


def test_loss_and_both_gradients_equal_plain_cross_entropy_in_fp64() -> None:
    hidden, weight, targets = _case(torch.float32)
    value = cross_entropy_sum(hidden, weight, targets)
    (value * 0.5).backward()
    expected, grad_hidden, grad_weight = _plain(hidden, weight, targets)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(hidden.grad.double(), grad_hidden, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(weight.grad.double(), grad_weight, rtol=1e-4, atol=2e-6)


def test_bf16_gradients_stay_within_bf16_rounding() -> None:
    hidden, weight, targets = _case(torch.bfloat16)
    (cross_entropy_sum(hidden, weight, targets) * 0.5).backward()
    _, grad_hidden, grad_weight = _plain(hidden, weight, targets)
    for came, expected in ((hidden.grad, grad_hidden), (weight.grad, grad_weight)):
        assert came.dtype == torch.bfloat16
        assert (came.double() - expected).norm() / expected.norm() < 0.02


def test_no_targets_give_zero_loss_and_zero_gradient() -> None:
    hidden, weight, targets = _case(torch.float32, tokens=0)
    value = cross_entropy_sum(hidden, weight, targets)
    value.backward()
    assert value.item() == 0.0 and weight.grad.abs().max().item() == 0.0


def test_the_loss_shifts_once_and_ignores_what_is_not_learnt() -> None:
    head = nn.Linear(12, 97, bias=False)
    hidden = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[IGNORE, IGNORE, 7, 8, IGNORE], [3, 4, IGNORE, IGNORE, 9]])
    # By hand: (row, position of the hidden state) -> target; labels[1, 0] has nothing before it
    # that could predict it.
    pairs = {(0, 1): 7, (0, 2): 8, (1, 0): 4, (1, 3): 9}
    expected = sum(
        F.cross_entropy(head(hidden[at]), torch.tensor(target)) for at, target in pairs.items()
    )
    torch.testing.assert_close(LossHead(head)(hidden, labels), expected)


def test_the_head_has_one_name_only() -> None:
    assert list(LossHead(nn.Linear(4, 9, bias=False)).parameters()) == []


_MEMORY = """
import resource, sys, torch
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.train.loss import TrainingModel
model = QWenLMHeadModel.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
training = TrainingModel(model.train(), model.transformer, model.lm_head)
for parameter in training.parameters():
    parameter.requires_grad_(False)
model.transformer.h[0].attn.c_attn.weight.requires_grad_()
ids = torch.arange(4096).reshape(8, 512)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
training(ids[:, :16], ids[:, :16]).backward()
before = peak()
training(ids, ids).backward()
print(peak() - before)
"""


@pytest.mark.job
def test_no_tensor_of_batch_by_length_by_vocabulary_exists(full_dir: Path) -> None:
    """A training step on 4,088 targets over the real vocabulary: their logits alone would be 1.2 GB
    in bf16 and 2.5 GB in fp32; beside one chunk (256 MiB in fp32, half of that in bf16, twice)
    little may be held."""
    command = [sys.executable, "-c", _MEMORY, str(full_dir)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 700e6, f"{int(run.stdout) / 1e9:.2f} GB"
