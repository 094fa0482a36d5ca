"""The grid of tokens: few numbers, nothing lost, and zeros that change nothing."""

from __future__ import annotations

import pytest
import torch

from qwen_ds.model.token_grid import STEP, TokenGrid, on_grid, unflat, with_zeros, without_zeros


@pytest.mark.parametrize("grid", [TokenGrid.of((100, 130, 131, 500)), TokenGrid(step=1)])
@pytest.mark.parametrize("shape", [(1, 7), (2, 65), (4, 125), (3, 300)])
def test_a_flat_micro_batch_has_its_tokens_and_zeros_after_them(
    grid: TokenGrid, shape: tuple[int, int]
) -> None:
    x_BTD = torch.randn(*shape, 3)
    flat_1MD = grid.flat(x_BTD)
    tokens = x_BTD.shape[:2].numel()
    assert torch.equal(unflat(flat_1MD, *shape), x_BTD)
    assert torch.equal(without_zeros(flat_1MD, tokens)[0], x_BTD.flatten(0, 1))
    assert torch.equal(with_zeros(without_zeros(flat_1MD, tokens), flat_1MD.shape[1]), flat_1MD)
    # Two at least: a compiler makes code of its own for none, and for one.
    assert flat_1MD.shape[1] - tokens >= 2
    assert not flat_1MD[:, tokens:].any()
    assert flat_1MD._base is None, "a compiler would look at the shape of what it is a view of"


def test_the_numbers_of_a_grid() -> None:
    grid = TokenGrid.of((100, 130, 500))
    assert grid.counts == (102, 132, 502)  # with two zeros
    assert [grid.at_least(n) for n in (100, 102, 103, 502)] == [102, 102, 132, 502]
    assert grid.at_least(20) == STEP, "a number far below those that are known"
    assert grid.at_least(320) == 5 * STEP
    assert grid.at_least(503) == 8 * STEP, "beyond them"
    assert TokenGrid.of((20, 40)).at_least(24) == 42, "a known number below the step"


def test_only_16_bit_products_of_a_cpu_are_on_the_grid() -> None:
    for dtype, rows in ((torch.bfloat16, 2 * STEP), (torch.float16, 2 * STEP), (torch.float32, 70)):
        x_ND = torch.ones(70, 3, dtype=dtype)
        padded = on_grid(x_ND)
        assert padded.shape == (rows, 3)
        assert padded.sum() == x_ND.sum()
    assert on_grid(torch.ones(70, 3, dtype=torch.bfloat16, device="meta")).shape == (70, 3)
