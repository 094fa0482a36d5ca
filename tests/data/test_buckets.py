"""Buckets of lengths: as few as the allowed padding takes, and none longer than the longest row."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from qwen_ds.data import buckets
from qwen_ds.data.buckets import PADDING_SHARE, bucketed


def padding(lens: np.ndarray, ends: np.ndarray) -> float:
    """Share of the rows' tokens that padding to the next of `ends` adds."""
    return float((ends[np.searchsorted(ends, lens)] - lens).sum() / lens.sum())


@pytest.mark.parametrize("seed", range(5))
def test_no_fewer_lengths_and_none_better_of_that_number(seed: int) -> None:
    """Against all choices of lengths, one by one."""
    lens = np.random.default_rng(seed).choice(np.arange(20, 400), 9).repeat(3)
    found = np.unique(bucketed(lens))
    values = np.unique(lens)
    best = {
        k: min(
            padding(lens, np.array([*inner, values[-1]]))
            for inner in combinations(values[:-1], k - 1)
        )
        for k in range(1, len(values) + 1)
    }
    assert padding(lens, found) == pytest.approx(best[len(found)])
    assert best[len(found)] <= PADDING_SHARE < best.get(len(found) - 1, np.inf)


def test_a_row_grows_little_and_never_beyond_the_longest() -> None:
    rng = np.random.default_rng(0)
    for lens in (
        np.exp(rng.normal(np.log(135), 0.2, 5000)).astype(np.int32),
        np.clip(np.exp(rng.normal(np.log(300), 1.5, 5000)), 2, 8192).astype(np.int32),
        rng.integers(2, 30_000, 5000).astype(np.int32),
    ):
        padded = bucketed(lens)
        assert (padded >= lens).all() and padded.max() == lens.max()
        assert padded.sum() <= lens.sum() * (1 + PADDING_SHARE)
        assert len(np.unique(padded)) < 130


def test_equal_rows_are_one_bucket_and_no_rows_none() -> None:
    assert bucketed(np.full(7, 33, np.int32)).tolist() == [33] * 7
    assert bucketed(np.empty(0, np.int32)).tolist() == []


def test_many_lengths_are_thinned_at_equal_ratios() -> None:
    """So that short rows lose no more to the thinning than long ones."""
    values = np.arange(10, 20_001)
    ends = buckets._candidates(values)
    assert 300 < len(ends) <= buckets._CANDIDATES and ends[-1] == 20_000
    long = ends[ends > 200]
    assert (long[1:] / long[:-1]).max() < 1.02 and set(range(10, 60)) < set(ends)
