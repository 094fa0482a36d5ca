"""What a micro-batch launches and moves stays within its bars."""

from __future__ import annotations

from torch import Tensor

from qwen_ds.recipe.options import LoraOptions
from tests.benchmarks import launches


def test_a_block_of_the_default_recipe_stays_within_its_bars() -> None:
    """Eager. Before rotary and LoRA were functions of their own: 105 launches, 1.94 MB a token."""
    moved = launches.count(LoraOptions())
    assert moved.launches.total() <= 0.7 * 105
    assert launches.megabytes(moved) <= 1.2
    parameters = list(launches.block_7b(LoraOptions()).parameters())
    assert sum(p.requires_grad for p in parameters) == 6
    assert all(isinstance(p, Tensor) and p.device.type == "meta" for p in parameters)


def test_a_compiled_block_of_the_default_recipe_stays_within_its_bar() -> None:
    assert 0.5 < launches.compiled_bytes(LoraOptions(), width=256) <= 0.9
