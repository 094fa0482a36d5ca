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
from qwen_ds.train.loss import (
    LossHead,
    LossOfLogits,
    compiled_loss,
    cross_entropy_sum,
    loss_formula,
    loss_of_logits,
)

IDS = torch.tensor([96, 4, 50])  # rows of the head that are trained beside it


def _case(dtype: torch.dtype, tokens: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, its trained rows, and targets, some of which are such rows."""
    g = torch.Generator().manual_seed(5)
    hidden, weight, rows = (
        torch.randn(n, 12, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (tokens, 97, len(IDS))
    )
    targets = torch.randint(0, 97, (tokens,), generator=g)
    targets[::5] = IDS[torch.arange(len(targets[::5])) % 3]
    return hidden, weight, rows, targets


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # 50 tokens: three whole chunks and a short one.
    monkeypatch.setattr(loss, "chunk_tokens", lambda rows: 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("loss_of", [loss_of_logits, loss_formula])
def test_loss_and_gradients_equal_plain_cross_entropy_in_fp64(
    loss_of: LossOfLogits, with_rows: bool, dtype: torch.dtype
) -> None:
    """In bf16 within its rounding."""
    hidden, weight, rows, targets = _case(dtype)
    if with_rows:
        weight.data[IDS] = 1e3  # what the rows replace has no say
    of_rows = (rows, IDS) if with_rows else (None, None)
    value = cross_entropy_sum(hidden, weight, targets, *of_rows, loss_of)
    (value * 0.5).backward()
    h, w, r = (t.detach().double().requires_grad_() for t in (hidden, weight, rows))
    logits = h @ (w.index_copy(0, IDS, r) if with_rows else w).T
    expected = F.cross_entropy(logits, targets, reduction="sum")
    (expected * 0.5).backward()
    exact = dtype == torch.float32
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-6 if exact else 1e-3, atol=1e-4)
    for came, plain in [(hidden, h), (weight, w)] + [(rows, r)] * with_rows:
        assert came.grad.dtype == dtype
        assert (came.grad.double() - plain.grad).norm() / plain.grad.norm() < 1e-2
        if exact:
            torch.testing.assert_close(came.grad.double(), plain.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.job
def test_one_compilation_serves_chunks_of_all_lengths() -> None:
    """Within rounding it gives what eager operations give, with and without trained rows."""
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    compiled, compilations = compiled_loss(), []
    for tokens in (50, 16, 7, 21, 33, 65):  # rests of 2 to 7 tokens, and twice one of a single one
        for with_rows in (False, True):
            found = []
            for loss_of in (compiled, loss_of_logits):
                hidden, weight, rows, targets = _case(torch.bfloat16, tokens)
                of_rows = (rows, IDS) if with_rows else (None, None)
                value = cross_entropy_sum(hidden, weight, targets, *of_rows, loss_of)
                value.backward()
                found.append([value, hidden.grad, weight.grad, *([rows.grad] if with_rows else [])])
            for came, eager in zip(*found, strict=True):
                assert came is not None and eager is not None and came.dtype == eager.dtype
                assert (came - eager).norm() <= 1e-3 * eager.norm()
        compilations.append(graphs["unique_graphs"])
    # Of one token dynamo makes a graph of its own.
    assert compilations[3] == compilations[0] and compilations[5] <= compilations[0] + 1
    torch._dynamo.reset()


@pytest.mark.job
def test_a_first_chunk_that_needs_no_zeros_shares_its_code_with_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "chunk_tokens", lambda rows: 64)
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    hidden, weight, _, targets = _case(torch.bfloat16, 100)  # 64 and 36
    cross_entropy_sum(hidden, weight, targets, loss_of=compiled_loss())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.bfloat16, {64, 128}), (torch.float32, {100})])
def test_the_head_of_a_cpu_sees_few_numbers_of_targets_in_16_bits(
    dtype: torch.dtype, tokens: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "chunk_tokens", lambda rows: 128)
    seen: set[int] = set()

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        seen.add(len(x))
        return x @ weight.t()

    monkeypatch.setattr(loss.F, "linear", linear)
    for targets in (100,) if dtype == torch.float32 else (3, 60, 64, 65, 100, 127):
        hidden, weight, _, targets_N = _case(dtype, targets)
        cross_entropy_sum(hidden, weight, targets_N)
    assert seen == tokens


def test_no_targets_give_zero_loss_and_zero_gradient() -> None:
    hidden, weight, _, targets = _case(torch.float32, tokens=0)
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
from qwen_ds.train.loss import TrainingModel, compiled_loss
model = QWenLMHeadModel.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
training = TrainingModel(model.train(), model.transformer, model.lm_head)
if sys.argv[2] == "compiled":
    training.loss_head.loss_of = compiled_loss()
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
@pytest.mark.parametrize(("how", "most"), [("eager", 700e6), ("compiled", 400e6)])
def test_no_tensor_of_batch_by_length_by_vocabulary_exists(
    how: str, most: float, full_dir: Path
) -> None:
    """A training step on 4,088 targets over the real vocabulary: their logits alone would be 1.2 GB
    in bf16 and 2.5 GB in fp32; beside one chunk (256 MiB in fp32, half of that in bf16, twice)
    little may be held. A compiled loss needs no chunk in fp32."""
    command = [sys.executable, "-c", _MEMORY, str(full_dir), how]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout) < most, f"{int(run.stdout) / 1e9:.2f} GB"
