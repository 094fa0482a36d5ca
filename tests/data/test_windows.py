"""The budget of micro-batches that take the least time."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_ds.data.windows import LEAST_TOKENS, level_budget

UNLIKE = np.repeat(np.arange(100, 900, 100), 16).astype(np.int32)  # 128 rows, 57,600 tokens


def test_rows_of_one_length_fill_the_budget() -> None:
    assert level_budget([np.full(128, 128, np.int32)], 1, 8192) == 8192


def test_a_budget_is_halved_while_that_saves_padding_and_only_then() -> None:
    """Rows of eight lengths fall apart into runs of one length, without any padding, once a
    micro-batch holds 16 of the shortest."""
    assert level_budget([UNLIKE], 1, 8192) < 8192
    assert level_budget([UNLIKE], 1, 8192) == level_budget([UNLIKE], 1, 16384)
    assert level_budget([UNLIKE, UNLIKE], 1, 8192) == level_budget([UNLIKE], 1, 8192)


@pytest.mark.parametrize("budget", [300, 1500, LEAST_TOKENS])
def test_small_budgets_stay(budget: int) -> None:
    assert level_budget([UNLIKE], 1, budget) == budget


def test_steps_of_which_each_rank_has_few_tokens_are_left_whole() -> None:
    """Two micro-batches of 500 tokens would take a GPU as long as two of 1,024."""
    lens = np.array([100, 900] * 4, np.int32)
    assert level_budget([lens], 8, 4096) == 4096
