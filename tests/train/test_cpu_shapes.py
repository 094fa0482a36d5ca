"""Compiled training on a CPU: few shapes, the same numbers, and no code for each shape."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from qwen_ds.model.family import QWEN
from qwen_ds.model.modeling import QWenLMHeadModel
from qwen_ds.model.token_grid import TokenGrid
from qwen_ds.plan.recomputation import from_recipe
from qwen_ds.recipe.options import LoraOptions
from qwen_ds.train import lora, setup
from qwen_ds.train.cpu_shapes import meet_shapes_first, use_few_shapes
from qwen_ds.train.loss import TrainingModel

SHAPES = [(1, 64), (3, 23), (8, 10), (2, 31), (1, 40), (5, 7)]


def training_model(path: Path, dtype: torch.dtype, attention: str = "eager") -> TrainingModel:
    model = QWenLMHeadModel.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    wrapped = lora.add_lora(model, LoraOptions(r=4, dropout=0.0), base=str(path), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.02, generator=generator)
    return TrainingModel(wrapped, model.base_model, model.get_output_embeddings()).train()


def base_of(model: TrainingModel) -> Any:
    wrapped: Any = model.model
    return wrapped.get_base_model()


def sampler_of(sizes: list[int]) -> Any:
    return SimpleNamespace(token_counts=tuple(sizes))


def gradients(model: TrainingModel, ids_BT: Tensor) -> Tensor:
    model.zero_grad()
    model(ids_BT, ids_BT).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


@pytest.mark.job
@pytest.mark.parametrize(
    ("dtype", "bound", "recompute"),
    [(torch.float32, 1e-5, "none"), (torch.bfloat16, 0.03, "none"), (torch.bfloat16, 0.03, "all")],
)
def test_all_shapes_share_one_code_and_the_gradients_are_the_same(
    small_dir: Path, dtype: torch.dtype, bound: float, recompute: str
) -> None:
    """A single row first, which could have code of its own, and numbers on the grid as they are."""
    torch._dynamo.reset()
    plain, compiled = (training_model(small_dir, dtype) for _ in range(2))
    for model in (plain, compiled):
        setup.recompute_blocks(base_of(model), from_recipe(recompute))
    setup.compile_blocks(base_of(compiled), QWEN, torch.device("cpu"))
    use_few_shapes(compiled.transformer, sampler_of([62, 78]), partitioned=False)
    counters.clear()
    for number, shape in enumerate(SHAPES):
        ids_BT = torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(number))
        wanted, found = gradients(plain, ids_BT), gradients(compiled, ids_BT)
        assert (found - wanted).norm() < bound * wanted.norm(), shape
    # Two at most: the first block's input has no gradient, that of the others has.
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


def test_a_flat_micro_batch_needs_no_compiler(small_dir: Path) -> None:
    """Where compilation is switched off, or gives up, blocks get it as they are."""
    plain, flat = (training_model(small_dir, torch.float32) for _ in range(2))
    use_few_shapes(flat.transformer, sampler_of([]), partitioned=True)
    ids_BT = torch.arange(69).reshape(3, 23)
    wanted, found = gradients(plain, ids_BT), gradients(flat, ids_BT)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    ("attention", "dropout", "dtype", "grid"),
    [
        ("eager", 0.0, torch.bfloat16, TokenGrid.of([62])),
        ("eager", 0.0, torch.float32, TokenGrid(step=1)),
        ("eager", 0.1, torch.bfloat16, None),
        ("sdpa", 0.0, torch.bfloat16, None),
    ],
)
def test_only_plain_attention_finds_the_rows_of_a_flat_micro_batch(
    small_dir: Path, attention: str, dropout: float, dtype: torch.dtype, grid: TokenGrid | None
) -> None:
    model = training_model(small_dir, dtype, attention)
    model.transformer.config.attn_dropout_prob = dropout
    use_few_shapes(model.transformer, sampler_of([62]), partitioned=False)
    assert model.transformer.token_grid == grid


def test_with_a_cache_a_mask_or_hidden_states_blocks_get_their_rows(small_dir: Path) -> None:
    model = base_of(training_model(small_dir, torch.float32)).eval()
    ids_BT = torch.tensor([[1, 2, 3], [4, 5, 6]])
    asked: list[dict[str, Any]] = [
        {"use_cache": True},
        {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
        {"output_hidden_states": True},
    ]
    wanted = [model(ids_BT, **each).logits for each in asked]
    use_few_shapes(model.transformer, sampler_of([62]), partitioned=True)
    for each, logits in zip(asked, wanted, strict=True):
        assert torch.equal(model(ids_BT, **each).logits, logits)


class Block(nn.Module):
    """x * weight, with dropout; notes what it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.met: list[tuple[int, bool]] = []

    def forward(self, x_1MD: Tensor, scale: float) -> Tensor:
        self.met.append((x_1MD.shape[1], bool(x_1MD.any())))
        return nn.functional.dropout(x_1MD * self.weight, 0.5) * scale


def test_a_new_number_of_tokens_meets_one_block_first_and_leaves_no_trace() -> None:
    block = Block()
    meet_shapes_first(block)
    torch.manual_seed(0)
    wanted = nn.functional.dropout(torch.ones(1, 8, 3), 0.5)
    torch.manual_seed(0)
    assert torch.equal(block(torch.ones(1, 8, 3), 1.0), wanted), "random numbers were drawn"
    block(torch.ones(1, 8, 3), 1.0)
    block(torch.ones(1, 9, 3), 1.0)
    with torch.no_grad():
        block(torch.ones(1, 10, 3), 1.0)
    assert block.met == [(8, False), (8, True), (8, True), (9, False), (9, True), (10, True)]
    assert block.weight.grad is None
