"""Products of bf16 tensors in fp32, cheap dropout and compiled blocks: the numbers stay what they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen_ds.config import LoraOptions, ModelOptions, Recipe
from qwen_ds.model import wide
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.train import setup
from qwen_ds.train.lora import add_lora, drop
from qwen_ds.train.loss import LossHead, TrainingModel


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(came: Tensor, exact: Tensor) -> float:
    return float((came.detach().double() - exact.detach()).norm() / exact.detach().norm())


def training_model(folder: Path, dropout: float = 0.0, *, widened: bool = False) -> TrainingModel:
    model = QWenLMHeadModel.from_pretrained(folder, dtype=torch.bfloat16)
    if widened:
        setup.widen(model)
    wrapped = add_lora(model, LoraOptions(dropout=dropout), base="", seed=3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # as if trained
            parameter.data.copy_(0.05 * normal(*parameter.shape, dtype=torch.float32, seed=len(name)))
    return TrainingModel(wrapped, model.transformer, model.lm_head).train()


def gradients(model: TrainingModel) -> dict[str, Tensor]:
    ids_BT = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    model(ids_BT, ids_BT).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_wide_products_are_bf16_products() -> None:
    """Result and gradients of linear maps and attention are bf16 and no further from the exact ones than bf16's own."""
    x, grad = normal(30, 64), normal(30, 48, seed=1)
    native = nn.Linear(64, 48).to(torch.bfloat16).requires_grad_(False)
    widened = wide.WideLinear(64, 48, device="meta")
    widened.weight, widened.bias = native.weight, native.bias
    exact_x = x.double().requires_grad_()
    exact = F.linear(exact_x, native.weight.double(), native.bias.double())
    exact.backward(grad.double())
    for module in (native, widened):
        given = x.clone().requires_grad_()
        came = module(given)
        came.backward(grad)
        assert came.dtype == given.grad.dtype == torch.bfloat16
        assert error(came, exact) < 3e-3 and error(given.grad, exact_x.grad) < 3e-3

    qkv = [normal(2, 4, 17, 16, seed=i) for i in range(3)]
    exact_qkv = [t.double().requires_grad_() for t in qkv]
    exact = F.scaled_dot_product_attention(*exact_qkv, is_causal=True)
    out_grad = normal(2, 4, 17, 16, seed=9)
    exact.backward(out_grad.double())
    given_qkv = [t.clone().requires_grad_() for t in qkv]
    came = wide.causal_attention(*given_qkv)
    came.backward(out_grad)
    assert came.dtype == torch.bfloat16 and error(came, exact) < 5e-3
    for given, wanted in zip(given_qkv, exact_qkv, strict=True):
        assert given.grad.dtype == torch.bfloat16 and error(given.grad, wanted.grad) < 1e-2


def test_a_widened_model_trains_within_bf16_rounding(small_dir: Path) -> None:
    """Its distance from the fp32 model's gradients is no larger than that of plain bf16."""
    exact = QWenLMHeadModel.from_pretrained(small_dir, dtype=torch.bfloat16)
    reference = training_model(small_dir)
    for module in (reference, exact):
        module.float()
    wanted = gradients(reference)
    plain, widened = gradients(training_model(small_dir)), gradients(training_model(small_dir, widened=True))
    assert plain.keys() == widened.keys() == wanted.keys()

    def distance(found: dict[str, Tensor]) -> float:
        return max(error(found[name], wanted[name].double()) for name in wanted)

    assert distance(widened) < 1.2 * distance(plain) < 0.1
    again = gradients(training_model(small_dir, widened=True))
    assert all(torch.equal(again[name], widened[name]) for name in widened)


@pytest.mark.parametrize("slow", [True, False])
def test_the_loss_head_is_the_same_in_either_dtype(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    """fp64 cross-entropy on the same bf16 numbers."""
    monkeypatch.setattr(wide, "has_slow_bf16", lambda: slow)
    head = nn.Linear(64, 700, bias=False).to(torch.bfloat16)
    hidden = normal(2, 9, 64).requires_grad_()
    labels = torch.randint(0, 700, (2, 9), generator=torch.Generator().manual_seed(2))
    loss = LossHead(head)(hidden, labels)
    loss.backward()
    exact_hidden, exact_weight = (
        hidden.detach().double().requires_grad_(),
        head.weight.detach().double().requires_grad_(),
    )
    exact = F.cross_entropy(
        (exact_hidden @ exact_weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    exact.backward()
    assert error(loss.detach(), exact.detach()) < 1e-3
    assert hidden.grad.dtype == torch.bfloat16 and error(hidden.grad, exact_hidden.grad) < 1e-2
    assert error(head.weight.grad, exact_weight.grad) < 1e-2


def test_dropout_keeps_the_right_share_and_nothing_else_changes() -> None:
    x = normal(700, 301).abs() + 1
    torch.manual_seed(0)
    dropped, share = drop(x, 0.3)
    zero = dropped == 0
    assert abs(float(zero.float().mean()) - 0.3) < 0.005 and abs(share - 0.7) < 2**-16
    assert torch.equal(dropped[~zero], x[~zero])
    for axis in (0, 1):  # no row or column is special, nor one of the four numbers of a draw
        assert (zero.float().mean(axis) - 0.3).abs().max() < 0.13
    of_four = zero.flatten()[: 4 * (x.numel() // 4)].view(-1, 4).float()
    assert (of_four.mean(0) - 0.3).abs().max() < 0.01
    assert (torch.corrcoef(of_four.T) - torch.eye(4)).abs().max() < 0.02
    torch.manual_seed(0)
    assert torch.equal(drop(x, 0.3)[0], dropped)


def test_the_choice_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, auto = torch.device("cpu"), torch.device("cuda"), Recipe()
    monkeypatch.setattr(wide, "has_slow_bf16", lambda: False)
    assert setup.choose_attention(auto, cpu).model.attention == "eager"
    assert setup.choose_attention(auto, cuda).model.attention == "sdpa"
    assert setup.choose_attention(Recipe(model=ModelOptions(dtype="float32")), cpu).model.attention == "sdpa"
    monkeypatch.setattr(wide, "has_slow_bf16", lambda: True)
    assert setup.choose_attention(auto, cpu).model.attention == "sdpa"
    assert setup.choose_attention(Recipe(model=ModelOptions(attention="eager")), cpu).model.attention == "eager"


@pytest.mark.job
@pytest.mark.parametrize("recompute", ["none", "all"])
def test_compiled_blocks_train_alike(small_dir: Path, recompute: str) -> None:
    """With dropout, which draws the same numbers, and with activation checkpointing."""
    plain, compiled = (training_model(small_dir, 0.1, widened=True) for _ in range(2))
    transformer = compiled.model.get_base_model().transformer
    for model in (plain, compiled):
        setup.recompute_blocks(model.model.get_base_model(), recompute)
    setup.compile_blocks(compiled.model.get_base_model(), torch.device("cpu"))
    assert all(block._compiled_call_impl is not None for block in transformer.h)
    wanted, found = gradients(plain), gradients(compiled)
    assert max(error(found[name], wanted[name].double()) for name in wanted) < 0.03
