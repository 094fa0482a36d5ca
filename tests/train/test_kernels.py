"""The choice of dtype and attention, cheap dropout and compiled blocks: the numbers stay what they
were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen_ds.model.family import QWEN
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.plan.recomputation import from_recipe
from qwen_ds.recipe.options import LoraOptions
from qwen_ds.train import setup
from qwen_ds.train.lora import add_lora
from qwen_ds.train.lora_product import drop
from qwen_ds.train.loss import TrainingModel


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def error(came: Tensor, exact: Tensor) -> float:
    return float((came.detach().double() - exact.detach()).norm() / exact.detach().norm())


def training_model(folder: Path, dropout: float, dtype: torch.dtype) -> TrainingModel:
    model = QWenLMHeadModel.from_pretrained(folder, dtype=dtype)
    wrapped = add_lora(model, LoraOptions(dropout=dropout), base="", seed=3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:  # as if trained
            value = normal(*parameter.shape, dtype=torch.float32, seed=len(name))
            parameter.data.copy_(0.05 * value)
    return TrainingModel(wrapped, model.transformer, model.lm_head).train()


def gradients(model: TrainingModel) -> dict[str, Tensor]:
    ids_BT = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    model(ids_BT, ids_BT).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_dropout_keeps_the_right_share_and_nothing_else_changes() -> None:
    x = normal(700, 301).abs() + 1
    torch.manual_seed(0)
    dropped, keep, share = drop(x, 0.3)
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


@pytest.mark.job
@pytest.mark.parametrize(
    ("recompute", "dtype", "bound"), [("none", torch.bfloat16, 0.03), ("all", torch.float32, 1e-5)]
)
def test_compiled_blocks_train_alike(
    small_dir: Path, recompute: str, dtype: torch.dtype, bound: float
) -> None:
    """With dropout, which draws the same numbers, and with activation checkpointing."""
    plain, compiled = (training_model(small_dir, 0.1, dtype) for _ in range(2))
    transformer = compiled.model.get_base_model().transformer
    for model in (plain, compiled):
        setup.recompute_blocks(model.model.get_base_model(), from_recipe(recompute))
    setup.compile_blocks(compiled.model.get_base_model(), QWEN, torch.device("cpu"))
    assert all(block._compiled_call_impl is not None for block in transformer.h)
    wanted, found = gradients(plain), gradients(compiled)
    assert max(error(found[name], wanted[name].double()) for name in wanted) < bound
