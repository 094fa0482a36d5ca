"""Buckets: the few lengths to which rows are padded, so that micro-batches have few shapes.

Each new (rows, length) costs: a CPU's kernels keep something for every shape that they meet, a
CUDA graph or an attention plan is made for each, and a GPU's allocator fits no block twice.
"""

from __future__ import annotations

import numpy as np

# Buckets may pad the rows by this share of their tokens; sorting within a step leaves as much
# again. AdvertiseGen's lengths then need 21 buckets (test_an_epoch_has_few_shapes).
PADDING_SHARE = 0.022
# Lengths that can end a bucket. More distinct ones are thinned to nearly equal ratios.
_CANDIDATES = 512


def bucketed(lens: np.ndarray, share: float = PADDING_SHARE) -> np.ndarray:
    """The length of its bucket for each row, at least its own, int32 [rows].

    These are as few lengths as keep the padding within `share` of all tokens, and the best of that
    number: a one-dimensional quantiser, found by dynamic programming (Bruce 1965). The longest
    is the longest row's, so no row grows beyond it.

    Args:
        lens: int [rows], tokens of each row, all positive.
    """
    if not len(lens):
        return np.zeros(0, np.int32)
    values, counts = np.unique(lens.astype(np.int64), return_counts=True)
    ends = _candidates(values)
    of_end = np.searchsorted(ends, values)
    rows = np.bincount(of_end, weights=counts)
    # Padding within a candidate's own span cannot be avoided and counts as well.
    tokens = np.bincount(of_end, weights=counts * values)
    chosen = _fewest(ends, rows, tokens, share * float(tokens.sum()))
    return chosen[np.searchsorted(chosen, lens)].astype(np.int32)


def _candidates(values: np.ndarray) -> np.ndarray:
    """The sorted distinct lengths, or the last of each of _CANDIDATES nearly equal ratios."""
    if len(values) <= _CANDIDATES:
        return values
    ratios = np.log(values / values[0]) / np.log(values[-1] / values[0])
    group = np.ceil(ratios * (_CANDIDATES - 1)).astype(np.int64)
    return values[np.append(group[1:] != group[:-1], True)]


def _fewest(ends: np.ndarray, rows: np.ndarray, tokens: np.ndarray, allowed: float) -> np.ndarray:
    """The fewest of `ends` (sorted, the last included) whose padding is at most `allowed` tokens,
    or all of them.

    Args:
        rows, tokens: float [ends], of the rows that are longer than the end before.
    """
    n = len(ends)
    rows_before = np.concatenate([[0.0], rows.cumsum()])
    tokens_before = np.concatenate([[0.0], tokens.cumsum()])
    # padding[i, j]: of the rows of ends i to j - 1, padded to the last of these.
    padding = np.full((n + 1, n + 1), np.inf)
    for j in range(1, n + 1):
        of_rows = rows_before[j] - rows_before[:j]
        padding[:j, j] = ends[j - 1] * of_rows - (tokens_before[j] - tokens_before[:j])
    best, starts = np.full(n + 1, np.inf), list[np.ndarray]()
    best[0] = 0.0
    while len(starts) < n and best[n] > allowed:
        total = best[:, None] + padding
        starts.append(total.argmin(axis=0))
        best = total.min(axis=0)
    chosen, j = list[int](), n
    for start in reversed(starts):
        chosen.append(j - 1)
        j = int(start[j])
    return ends[chosen[::-1]]
