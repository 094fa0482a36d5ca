"""Prompt lengths in a cache: given, remembered, inferred, or asked for. Their effect on the model's
numbers is in test_golden_long."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from qwen_ds.model.cache import NewTokens, declare_prompt_lens, prompt_lens_of, row_lens

S = 8  # seq_length


def lens_of(
    cache: DynamicCache | None, new: NewTokens, mask: Tensor | None = None, given: int | None = None
) -> int | Tensor:
    return prompt_lens_of(cache, new, mask, given, S)


def test_lengths_are_tensors_only_where_a_row_may_exceed_seq_length() -> None:
    mask_BT = torch.tensor([[1] * 4 + [0] * 6, [1] * 10])
    assert row_lens(None, 10, S) == 10
    assert row_lens(mask_BT[:, :S], S, S) == S
    found = row_lens(mask_BT, 10, S)
    assert isinstance(found, Tensor) and found.tolist() == [4, 10]


def test_given_lengths_win_and_are_remembered() -> None:
    cache = DynamicCache()
    declare_prompt_lens(cache, 30)
    assert lens_of(cache, NewTokens(1, 5, 0)) == 30
    assert lens_of(cache, NewTokens(1, 5, 5), given=20) == 20
    assert lens_of(cache, NewTokens(1, 1, 10)) == 20
    assert lens_of(None, NewTokens(1, 5, 0), given=7) == 7


def test_the_first_forward_fixes_the_length_for_the_tokens_decoded_after_it() -> None:
    cache = DynamicCache()
    assert lens_of(cache, NewTokens(1, 5, 0)) == 5
    assert [lens_of(cache, NewTokens(1, 1, past)) for past in range(5, 20)] == [5] * 15
    assert lens_of(cache, NewTokens(1, 6, 0)) == 6  # empty again: it was reset


def test_lengths_that_matter_and_cannot_be_known_are_asked_for() -> None:
    cache = DynamicCache()
    lens_of(cache, NewTokens(1, 5, 0))
    assert lens_of(cache, NewTokens(1, 3, 5)) == 5  # within seq_length all alphas are 1
    with pytest.raises(ValueError, match="3 tokens follow 6 cached ones.*expected prompt_lens"):
        lens_of(cache, NewTokens(1, 3, 6))
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="4-D attention mask and 9 tokens.*expected prompt_lens"):
        lens_of(None, NewTokens(1, 9, 0), mask)
    assert lens_of(None, NewTokens(1, 8, 0), mask[..., :8, :8]) == 8
    assert lens_of(None, NewTokens(1, 9, 0), mask, given=9) == 9
