"""Certainty by rows drawn again: the percentile bootstrap, and the p of a paired difference (Efron
and Tibshirani, "An Introduction to the Bootstrap", 1993).

Shapes: N rows, K statistics of a row, M measures, R resamples.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

SEED, RESAMPLES, LEVEL = 1234, 1000, 0.95
_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_ROUNDING = 1e-9  # of a difference
Figures = NDArray[np.float64]


def resampled(statistics_NK: Figures, rng: np.random.Generator, resamples: int) -> Figures:
    """Sums of statistics [R, K] over rows drawn with replacement, for all statistics the same.

    A generator of one seed draws the rows that sacrebleu draws by it.
    """
    rows, sums_RK = len(statistics_NK), np.empty((resamples, statistics_NK.shape[1]))
    for r in range(resamples):
        times_N = np.bincount(rng.integers(rows, size=rows), minlength=rows).astype(np.float64)
        # Not BLAS, whose sums depend on the number of threads.
        sums_RK[r] = np.einsum("n,nk->k", times_N, statistics_NK, optimize=False)
    return sums_RK


def interval(values_RM: Figures) -> tuple[Figures, Figures]:
    """low_M, high_M: the 95 % percentile interval over the resamples in which a measure is defined;
    NaN where it never is, or where an end lies among infinite ones."""
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        low_M, high_M = np.nanquantile(values_RM, _TAILS, axis=0)
    return low_M, high_M


def two_sided_p(differences_RM: Figures, found_M: Figures) -> Figures:
    """p_M: the share of resamples whose difference lies at least as far from the one found as that
    lies from 0, itself counted among them; NaN where the difference found is not finite.

    Shares of few rows often lie just as far: rounding must not decide about those.
    """
    with np.errstate(invalid="ignore"):
        least_M = np.abs(found_M) * (1 - _ROUNDING)
        as_far_RM = np.abs(differences_RM - found_M) >= least_M
    defined_M = np.isfinite(differences_RM).sum(axis=0)
    p_M = (as_far_RM.sum(axis=0) + 1) / (defined_M + 1)
    return np.where(np.isfinite(found_M), p_M, np.nan)
