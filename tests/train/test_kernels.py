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
from qwen_ds.recipe.loading import load_recipe
from qwen_ds.recipe.options import LoraOptions
from qwen_ds.train import setup, survey
from qwen_ds.train.lora import add_lora
from qwen_ds.train.lora_product import drop
from qwen_ds.train.loss import TrainingModel, loss_of_logits


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


# p and the number of elements that a draw decides on
SHARES = [(0.05, 8), (0.1, 8), (0.3, 8), (0.01, 4), (0.001, 4), (0.9, 8), (0.98, 4)]


@pytest.mark.parametrize(("p", "of_one_draw"), SHARES)
def test_dropout_keeps_the_share_that_it_says(p: float, of_one_draw: int) -> None:
    """A small p is neither lost nor changed: it is exact to 2 %, as is the share that is kept."""
    x = normal(2000, 301).abs() + 1
    torch.manual_seed(0)
    dropped, keep, share = drop(x, p)
    assert abs(1 - share - p) <= 0.02 * min(p, 1 - p)
    assert (share * 2**8 == round(share * 2**8)) == (of_one_draw == 8)
    deviation = (share * (1 - share) / x.numel()) ** 0.5
    assert abs(float(keep.double().mean()) - share) < 4 * deviation
    assert torch.equal(dropped != 0, keep) and torch.equal(dropped[keep], x[keep])
    mean = float(dropped.double().mean()) / share
    assert abs(mean / float(x.double().mean()) - 1) < 6 * deviation / share


@pytest.mark.parametrize(("p", "of_one_draw"), [(0.3, 8), (0.01, 4)])
def test_dropout_keeps_no_place_more_often_than_another(p: float, of_one_draw: int) -> None:
    torch.manual_seed(0)
    x = normal(700, 301).abs() + 1
    zero = ~drop(x, p)[1]
    for axis in (0, 1):  # no row or column is special, nor one of the numbers of a draw
        assert (zero.float().mean(axis) - p).abs().max() < 0.13
    of_one = zero.flatten()[: 8 * (x.numel() // 8)].view(-1, of_one_draw).float()
    assert (of_one.mean(0) - p).abs().max() < 0.01
    assert (torch.corrcoef(of_one.T) - torch.eye(of_one_draw)).abs().max() < 0.02
    torch.manual_seed(0)
    assert torch.equal(drop(normal(700, 301).abs() + 1, p)[1], ~zero)


@pytest.mark.job
@pytest.mark.parametrize("p", [0.1, 0.01])
def test_compiled_dropout_draws_the_same_numbers(p: float) -> None:
    compiled = torch.compile(drop, dynamic=True, options={"fallback_random": True})
    x = normal(37, 101)
    found = []
    for function in (drop, compiled):
        torch.manual_seed(0)
        found.append(function(x, p))
    for plain, other in zip(*found, strict=True):
        assert torch.equal(torch.as_tensor(plain), torch.as_tensor(other))


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
    assert all("forward" in vars(b) for b in transformer.h)
    wanted, found = gradients(plain), gradients(compiled)
    assert max(error(found[name], wanted[name].double()) for name in wanted) < bound


@pytest.mark.parametrize("compiles", [False, True])
def test_the_loss_is_compiled_where_the_blocks_are(
    compiles: bool, small_dir: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"content": "a", "summary": "b"}\n')
    asked = load_recipe([
        "--model.path", str(small_dir), "--device", "cpu", "--data.train", str(rows),
        "--output_dir", str(tmp_path / "out"), "--model.compile", str(compiles).lower(),
        "--model.activation_checkpointing", "none",
    ])  # fmt: skip
    device = torch.device("cpu")
    loaded = setup.load_model(survey.decide(asked, device), device)
    assert (loaded.training.loss_head.loss_of is not loss_of_logits) == compiles
