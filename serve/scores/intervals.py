"""Certainty of scores: the percentile bootstrap, and its paired test of two models (Efron and
Tibshirani, "An Introduction to the Bootstrap", 1993; Koehn, "Statistical significance tests for
machine translation evaluation", 2004)."""

# Shapes: N rows, K statistics of a row, M measures, R resamples.

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np

from serve.scores.measured import Figures, Measured

SEED, RESAMPLES, LEVEL = 1234, 1000, 0.95
_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def bootstrap(
    measured: Measured, seed: int = SEED, resamples: int = RESAMPLES
) -> tuple[Figures, Figures]:
    """low_M, high_M: the 95 % percentile interval of each measure, over rows drawn again.

    The same seed draws the same rows for all measures of one set, and those that sacrebleu draws.
    """
    (sums_RK,) = _resampled([measured.statistics_NK], seed, resamples)
    return _interval(measured.combine(sums_RK))


def paired(
    a: Measured, b: Measured, seed: int = SEED, resamples: int = RESAMPLES
) -> tuple[Figures, Figures, Figures, Figures]:
    """difference_M (b - a), low_M, high_M, p_M of two models' answers to the same rows.

    Each resample draws the same rows on both sides. p is two-sided: the share of resamples whose
    difference lies at least as far from the one found as that lies from 0, itself counted among
    them. sacrebleu's p is of one side, about half of it.
    """
    assert a.names == b.names and len(a.statistics_NK) == len(b.statistics_NK), "not the same rows"
    sums_a, sums_b = _resampled([a.statistics_NK, b.statistics_NK], seed, resamples)
    with np.errstate(invalid="ignore"):  # two endless perplexities have no difference
        difference_M = b.values_M - a.values_M
        differences_RM = b.combine(sums_b) - a.combine(sums_a)
        as_far_RM = np.abs(differences_RM - difference_M) >= np.abs(difference_M)
    defined_M = np.isfinite(differences_RM).sum(axis=0)
    p_M = (as_far_RM.sum(axis=0) + 1) / (defined_M + 1)
    low_M, high_M = _interval(differences_RM)
    return difference_M, low_M, high_M, np.where(np.isfinite(difference_M), p_M, np.nan)


def _resampled(sides: list[Figures], seed: int, resamples: int) -> list[Figures]:
    """Sums of statistics [R, K] of each side, over the same rows drawn with replacement."""
    sums = [np.empty((resamples, side.shape[1])) for side in sides]
    for r, times_N in enumerate(_times_drawn(len(sides[0]), seed, resamples)):
        for out, side in zip(sums, sides, strict=True):
            # Not BLAS, whose sums depend on the number of threads.
            out[r] = np.einsum("n,nk->k", times_N, side, optimize=False)
    return sums


def _times_drawn(rows: int, seed: int, resamples: int) -> Iterator[Figures]:
    """How often each row is drawn, of each resample."""
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(rng.integers(rows, size=rows), minlength=rows).astype(np.float64)


def _interval(values_RM: Figures) -> tuple[Figures, Figures]:
    """Percentiles of the resamples in which a measure is defined; NaN where it never is, or where
    they lie among infinite ones."""
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        low_M, high_M = np.nanquantile(values_RM, _TAILS, axis=0)
    return low_M, high_M
