"""Certainty of scores: the percentile bootstrap, and its paired test of two models (Koehn,
"Statistical significance tests for machine translation evaluation", 2004)."""

# Shapes: N rows, K statistics of a row, M measures, R resamples.

from __future__ import annotations

import numpy as np

from qwen_ds.resampling import RESAMPLES, SEED, interval, resampled, two_sided_p
from serve.scores.measured import Figures, Measured


def bootstrap(
    measured: Measured, seed: int = SEED, resamples: int = RESAMPLES
) -> tuple[Figures, Figures]:
    """low_M, high_M: the 95 % percentile interval of each measure, over rows drawn again.

    The same seed draws the same rows for all measures of one set, and those that sacrebleu draws.
    """
    sums_RK = resampled(measured.statistics_NK, np.random.default_rng(seed), resamples)
    return interval(measured.combine(sums_RK))


def paired(
    a: Measured, b: Measured, seed: int = SEED, resamples: int = RESAMPLES
) -> tuple[Figures, Figures, Figures, Figures]:
    """difference_M (b - a), low_M, high_M, p_M of two models' answers to the same rows.

    Each resample draws the same rows on both sides. p is that of `two_sided_p`; sacrebleu's is of
    one side, about half of it.
    """
    assert a.names == b.names and len(a.statistics_NK) == len(b.statistics_NK), "not the same rows"
    both_NK = np.hstack([a.statistics_NK, b.statistics_NK])
    sums_RK = resampled(both_NK, np.random.default_rng(seed), resamples)
    sums_a, sums_b = np.split(sums_RK, [a.statistics_NK.shape[1]], axis=1)
    with np.errstate(invalid="ignore"):  # two endless perplexities have no difference
        difference_M = b.values_M - a.values_M
        differences_RM = b.combine(sums_b) - a.combine(sums_a)
    return difference_M, *interval(differences_RM), two_sided_p(differences_RM, difference_M)
