"""When attention runs without a mask, and what a mask shows when there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen_ds.model.masking import Visibility, visibility

CPU = torch.device("cpu")
RIGHT_PADDED = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
LEFT_PADDED = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])


def seen(mask: Tensor | None, queries: int, keys: int, past: int) -> Visibility:
    return visibility(mask, queries, keys, past, CPU)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 4), RIGHT_PADDED, RIGHT_PADDED.bool()])
def test_rows_without_padding_to_the_left_take_the_causal_path_without_a_mask(
    mask: Tensor | None,
) -> None:
    assert seen(mask, 4, 4, 0) == Visibility(None, is_causal=True, left_pads_B=None)


@pytest.mark.parametrize("mask", [None, torch.ones(2, 5)])
def test_one_new_token_sees_the_whole_cache_without_a_mask(mask: Tensor | None) -> None:
    assert seen(mask, 1, 5, 4) == Visibility(None, is_causal=False, left_pads_B=None)


def test_several_new_tokens_are_causal_among_themselves_and_never_left_to_sdpa() -> None:
    found = seen(None, 2, 5, 3)  # is_causal would align them with the first keys
    assert not found.is_causal
    assert found.mask.int().tolist() == [[[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]]


def test_a_cache_allocated_up_front_hides_its_unused_end() -> None:
    found = seen(None, 1, 6, torch.tensor(3))
    assert not found.is_causal
    assert found.mask.int().tolist() == [[[[1, 1, 1, 1, 0, 0]]]]


def test_padding_to_the_left_is_hidden_from_real_tokens_and_every_query_sees_a_key() -> None:
    found = seen(LEFT_PADDED, 4, 4, 0)
    assert not found.is_causal
    assert found.left_pads_B.tolist() == [0, 2, 0]
    triangle = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert found.mask[0, 0].int().tolist() == triangle
    padded = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert found.mask[1, 0].int().tolist() == padded
    assert found.mask.any(-1).all()


def test_padding_inside_a_row_is_hidden_from_itself_too() -> None:
    """As in the official code: only where there is no key at all does padding see itself."""
    found = seen(torch.tensor([[1, 0, 1]]), 3, 3, 0)
    assert found.mask[0, 0].int().tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 1]]


def test_a_right_padded_row_that_goes_on_keeps_its_padding_hidden() -> None:
    found = seen(torch.tensor([[1, 1, 0, 0, 1]]), 1, 5, 4)
    assert found.mask.int().tolist() == [[[[1, 1, 0, 0, 1]]]]


def test_a_mask_of_four_dimensions_is_used_as_it_is() -> None:
    mask = torch.zeros(1, 1, 2, 2)
    assert seen(mask, 2, 2, 0).mask is mask
    assert not seen(mask, 2, 2, 0).is_causal
