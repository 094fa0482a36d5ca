"""Prompt lengths in a cache: given, remembered, inferred, or asked for. Their effect on the model's
numbers is in test_golden_long."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from qwen_ds.model.cache import declare_prompt_lens, prompt_lens_of, row_lens

S = 8  # seq_length


def lens_of(
    cache: DynamicCache | None,
    length: int,
    past: int = 0,
    rows: int = 1,
    mask: Tensor | None = None,
    given: object = None,
) -> int | Tensor:
    return prompt_lens_of(cache, (rows, length), past, mask, given, S)


def test_lengths_are_tensors_only_where_a_row_may_exceed_seq_length() -> None:
    mask_BT = torch.tensor([[1] * 4 + [0] * 6, [1] * 10])
    assert row_lens(None, 10, S) == 10
    assert row_lens(mask_BT[:, :S], S, S) == S
    found = row_lens(mask_BT, 10, S)
    assert isinstance(found, Tensor) and found.tolist() == [4, 10]


def test_given_lengths_win_and_are_remembered() -> None:
    cache = DynamicCache()
    declare_prompt_lens(cache, 30)
    assert lens_of(cache, 5) == 30
    assert lens_of(cache, 5, past=5, given=30) == lens_of(cache, 1, past=10) == 30
    assert lens_of(cache, 5, given=20) == lens_of(cache, 1, past=5) == 20  # it was reset
    declare_prompt_lens(cache, 30)
    assert lens_of(cache, 5, given=20) == 20  # before anything is rotated for 30
    assert lens_of(None, 5, given=7) == 7


@pytest.mark.parametrize(
    ("given", "came"),
    [
        (-1, "-1"),
        (7.0, "7.0"),
        (True, "True"),
        (torch.tensor([5, -5]), r"\[5, -5\]"),
        (torch.tensor([5.0, 7.5]), r"\[5.0, 7.5\]"),
        (torch.tensor([5, 6, 7]), r"\[5, 6, 7\]"),
    ],
)
def test_lengths_that_cannot_be_are_refused(given: object, came: str) -> None:
    expected = rf"^prompt_lens is {came}; expected the tokens .*, an int or int64 \[2\]$"
    for cache in (None, DynamicCache()):
        with pytest.raises(ValueError, match=expected):
            lens_of(cache, 5, rows=2, given=given)


@pytest.mark.parametrize("first", [20, torch.tensor([20, 20])])
def test_given_lengths_stay_those_of_the_first_forward(first: int | Tensor) -> None:
    cache = DynamicCache()
    lens_of(cache, 5, rows=2, given=first)
    for same in (first, 20, torch.tensor([20, 20])):
        lens_of(cache, 1, past=5, rows=2, given=same)
    for other in (21, torch.tensor([20, 21])):
        with pytest.raises(ValueError, match=r"^prompt_lens is .*21.*; expected .*20.* as in the"):
            lens_of(cache, 1, past=5, rows=2, given=other)
    assert lens_of(cache, 1, past=5, given=20) == 20  # one of the rows was selected


def test_the_first_forward_fixes_the_length_for_the_tokens_decoded_after_it() -> None:
    cache = DynamicCache()
    assert lens_of(cache, 5) == 5
    assert [lens_of(cache, 1, past) for past in range(5, 20)] == [5] * 15
    assert lens_of(cache, 6) == 6  # empty again: it was reset


def test_lengths_that_matter_and_cannot_be_known_are_asked_for() -> None:
    cache = DynamicCache()
    lens_of(cache, 5)
    assert lens_of(cache, 3, past=5) == 5  # within seq_length all alphas are 1
    with pytest.raises(ValueError, match="3 tokens follow 6 cached ones.*expected prompt_lens"):
        lens_of(cache, 3, past=6)
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="4-D attention mask and 9 tokens.*expected prompt_lens"):
        lens_of(None, 9, mask=mask)
    assert lens_of(None, 8, mask=mask[..., :8, :8]) == 8
    assert lens_of(None, 9, mask=mask, given=9) == 9
