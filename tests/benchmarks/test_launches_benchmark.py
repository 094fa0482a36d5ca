"""What a micro-batch launches and moves stays within its bars."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_ds.recipe.options import LoraOptions
from tests.benchmarks import launches


def test_the_counter_knows_products_views_and_broadcasts() -> None:
    x = torch.zeros(8, 16, dtype=torch.bfloat16, device="meta")
    row = torch.zeros(1, 16, dtype=torch.float32, device="meta")
    with launches.Moved() as moved:
        widened = x * row.expand(8, 16)  # 256 + 64 bytes read, 512 written
        widened.t().mm(widened)
        torch.empty_like(x).copy_(x)
    assert dict(moved.launches) == {"mul": 1, "mm": 1, "copy_": 1}
    assert moved.bytes["mul"] == 256 + 64 + 512 and "mm" not in moved.bytes


def test_a_block_of_the_default_recipe_stays_within_its_bars() -> None:
    """Eager. Before rotary and LoRA were functions of their own: 105 launches, 1.94 MB a token."""
    moved = launches.count(LoraOptions())
    assert moved.num_launches <= 0.7 * 105
    assert moved.megabytes <= 1.2
    parameters = list(launches.block_7b(LoraOptions()).parameters())
    assert sum(p.requires_grad for p in parameters) == 6
    assert all(isinstance(p, Tensor) and p.device.type == "meta" for p in parameters)
