"""The counter of launches and bytes knows what moves none."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from tests.moved import Moved


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_products_views_and_broadcasts_are_known(device: str) -> None:
    x = torch.zeros(8, 16, dtype=torch.bfloat16, device=device)
    row = torch.zeros(1, 16, dtype=torch.float32, device=device)
    with Moved() as moved:
        widened = x * row.expand(8, 16)  # 256 + 64 bytes read, 512 written
        widened.t().mm(widened.view(8, 16))
        torch.empty_like(x).copy_(x)
        widened += widened  # read once
    assert moved.bytes == {"mul": 256 + 64 + 512, "copy_": 3 * 256, "add_": 2 * 512}
    assert moved.launches == {"mul": 1, "mm": 1, "copy_": 1, "add_": 1}


def test_attention_moves_nothing_whatever_kernel_does_it() -> None:
    q, k, v = (torch.zeros(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    with Moved() as moved:
        out = F.scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(out, (q, k, v), out)
    assert moved.launches.total() == 2 and not moved.bytes
