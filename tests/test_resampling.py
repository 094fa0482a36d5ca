"""Rows drawn again: how often the interval and p are right, on simulated sets."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qwen_ds.resampling import RESAMPLES, SEED, Figures, interval, resampled, two_sided_p

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def drawn_means(values_NM: Figures, seed: int = SEED, resamples: int = RESAMPLES) -> Figures:
    return resampled(values_NM, np.random.default_rng(seed), resamples) / len(values_NM)


def scores_like_rouge(rng: np.random.Generator, rows: int, sets: int) -> Figures:
    """Scores [rows, sets]: skewed, one in ten is 0; their mean is 0.9 * 2 / 7."""
    return rng.beta(2, 5, size=(rows, sets)) * (rng.random((rows, sets)) < 0.9)


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    """In 93 to 97 % of 2,000 sets of 200 rows; the share's standard deviation is sqrt(0.95 * 0.05 /
    2000) = 0.5 %. The sets are columns, so that all share the places of the rows drawn."""
    values = scores_like_rouge(np.random.default_rng(1), rows=200, sets=2000)
    low, high = interval(drawn_means(values))
    mean = 0.9 * 2 / 7
    assert 0.93 <= ((low <= mean) & (mean <= high)).mean() <= 0.97
    # By the central limit theorem the width is 2 * 1.96 standard errors.
    width = 2 * 1.96 * values.std(axis=0) / math.sqrt(200)
    assert (high - low).mean() == pytest.approx(width.mean(), rel=0.03)


def test_two_rows_give_an_interval_of_all_that_can_be_drawn() -> None:
    # Means of 0 and 1 drawn twice: 0, 1/2 and 1 in 1, 2 and 1 of 4 cases.
    assert interval(drawn_means(np.array([[0.0], [1.0]]))) == ([0.0], [1.0])
    assert interval(drawn_means(np.array([[0.3]]))) == ([0.3], [0.3])


def test_all_statistics_share_the_rows_that_are_drawn() -> None:
    values_NM = np.array([[1.0, 10.0], [2.0, 20.0], [5.0, 50.0]])
    sums_RM = resampled(values_NM, np.random.default_rng(3), 50)
    np.testing.assert_array_equal(sums_RM[:, 1], 10 * sums_RM[:, 0])
    rng = np.random.default_rng(3)
    sums = [values_NM[rng.integers(3, size=3)].sum(axis=0) for _ in range(50)]
    np.testing.assert_array_equal(sums_RM, sums)


def test_p_is_small_by_chance_as_often_as_it_says() -> None:
    """Models that differ by chance alone: p <= 0.05 in 5 % of 1,500 comparisons, of which 0.6 % is
    one standard deviation, and p <= 0.5 in half of them (1.3 %)."""
    rng = np.random.default_rng(4)
    common = scores_like_rouge(rng, 120, 1500)
    a, b = (common + rng.normal(0, 0.1, common.shape) for _ in "12")
    differences_RM = drawn_means(b - a, resamples=400)
    p, (low, high) = two_sided_p(differences_RM, (b - a).mean(axis=0)), interval(differences_RM)
    assert 0.035 <= (p <= 0.05).mean() <= 0.07
    assert 0.45 <= (p <= 0.5).mean() <= 0.55
    assert 0.93 <= ((low <= 0) & (high >= 0)).mean() <= 0.97


def test_rounding_does_not_decide_which_resamples_lie_as_far() -> None:
    """Shares of right answers, whose differences are sums of 1, 0 and -1: counted in integers."""
    rng = np.random.default_rng(0)
    for rows in (7, 10, 30, 90):
        first_N, second_N = rng.random(rows) < 0.6, rng.random(rows) < 0.8
        right_N2 = np.stack([first_N, second_N], axis=1).astype(np.float64)
        sums_R2 = resampled(right_N2, np.random.default_rng(1), 300)
        sums_R = (sums_R2[:, 1] - sums_R2[:, 0]).astype(int)
        found = int(second_N.sum()) - int(first_N.sum())
        as_far = int((abs(sums_R - found) >= abs(found)).sum())
        shares_R2, shares_2 = sums_R2 / rows, right_N2.mean(axis=0)
        differences_R1 = shares_R2[:, 1:] - shares_R2[:, :1]
        assert two_sided_p(differences_R1, shares_2[1:] - shares_2[:1]) == [(as_far + 1) / 301]


def test_resamples_in_which_a_measure_is_not_defined_do_not_count() -> None:
    nan = math.nan
    values_RM = np.array([[nan, nan, 0.0], [nan, 2.0, 0.0], [nan, 2.0, 9.0]])
    low, high = interval(values_RM)
    np.testing.assert_allclose([low, high], [[nan, 2, 0], [nan, 2, 8.55]])
    # Of two resamples none lies as far from 2 as 0 does; of three, all do from 0.
    np.testing.assert_allclose(two_sided_p(values_RM, np.array([nan, 2, 0])), [nan, 1 / 3, 1])
