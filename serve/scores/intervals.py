"""Certainty of scores: the percentile bootstrap, and its paired test of two models (Efron and
Tibshirani, "An Introduction to the Bootstrap", 1993; Koehn, "Statistical significance tests for
machine translation evaluation", 2004)."""

# Shapes: N rows, K statistics of a row, M measures, R resamples.

from __future__ import annotations

import warnings

import numpy as np

from serve.scores.measured import Figures, Measured

SEED, RESAMPLES, LEVEL = 1234, 1000, 0.95
_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def bootstrap(
    measured: Measured, seed: int = SEED, resamples: int = RESAMPLES
) -> tuple[Figures, Figures]:
    """low_M, high_M: the 95 % percentile interval of each measure, over rows drawn again.

    The same seed draws the same rows for all measures of one set.
    """
    (sums_RK,) = _resampled([measured.statistics_NK], seed, resamples)
    return _interval(measured.combine(sums_RK))


def paired(
    a: Measured, b: Measured, seed: int = SEED, resamples: int = RESAMPLES
) -> tuple[Figures, Figures, Figures, Figures]:
    """difference_M (b - a), low_M, high_M, p_M of two models' answers to the same rows.

    Each resample draws the same rows on both sides. p is two-sided: the share of resamples whose
    difference lies as far from the one found as that lies from 0; it is at least 1 / (R + 1).
    """
    assert a.names == b.names and len(a.statistics_NK) == len(b.statistics_NK), "not the same rows"
    difference_M = b.values_M - a.values_M
    sums_a, sums_b = _resampled([a.statistics_NK, b.statistics_NK], seed, resamples)
    differences_RM = b.combine(sums_b) - a.combine(sums_a)
    low_M, high_M = _interval(differences_RM)
    as_far_RM = np.abs(differences_RM - difference_M) >= np.abs(difference_M)
    p_M = (as_far_RM.sum(axis=0) + 1) / (resamples + 1)
    return difference_M, low_M, high_M, np.where(np.isnan(difference_M), np.nan, p_M)


def _resampled(sides: list[Figures], seed: int, resamples: int) -> list[Figures]:
    """Sums of statistics [R, K] of each side, over the same rows drawn with replacement."""
    rows = len(sides[0])
    rng = np.random.default_rng(seed)
    sums = [np.empty((resamples, side.shape[1])) for side in sides]
    for r in range(resamples):
        times_N = np.bincount(rng.integers(rows, size=rows), minlength=rows).astype(np.float64)
        for out, side in zip(sums, sides, strict=True):
            out[r] = times_N @ side
    return sums


def _interval(values_RM: Figures) -> tuple[Figures, Figures]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        low_M, high_M = np.nanquantile(values_RM, _TAILS, axis=0)
    return low_M, high_M
