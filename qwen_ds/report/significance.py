"""Whether two sets of answers to the same rows differ: the paired percentile bootstrap, on scores
of rows.

The drawing and the figures are those of serve.evaluate, so that a measure that is a mean over rows
gets the same verdict in both places.
"""

# Shapes: N rows, M measures.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_ds.report.folder import Row, number
from qwen_ds.resampling import RESAMPLES, SEED, interval, resampled, two_sided_p


@dataclass(frozen=True, slots=True)
class Paired:
    """The difference of a measure, second less first, with its 95 % interval and two-sided p."""

    difference: float
    low: float
    high: float
    p: float

    @property
    def is_significant(self) -> bool:
        return self.low > 0 or self.high < 0


def paired(
    difference_NM: NDArray[np.float64], seed: int = SEED, resamples: int = RESAMPLES
) -> list[Paired]:
    """One verdict a measure on the rows' differences, second less first; N is at least 1."""
    sums_RM = resampled(difference_NM, np.random.default_rng(seed), resamples)
    means_RM, found_M = sums_RM / len(difference_NM), difference_NM.mean(axis=0)
    low_M, high_M = interval(means_RM)
    p_M = two_sided_p(means_RM, found_M)
    figures = zip(found_M, low_M, high_M, p_M, strict=True)
    return [Paired(*map(float, each)) for each in figures]


def key_of_rows(*sides: list[Row]) -> tuple[str, ...]:
    """Names of the fields that tell rows apart on every side and that the sides have in common:
    the source; where several rows share one, as those of a JSON list on one line do, source and id;
    the id where the sources of the sides differ. Empty: no row is on all sides."""
    for names in (("source",), ("source", "id"), ("id",)):
        found = [[key for row in side if (key := row_key(row, names))] for side in sides]
        is_unique = all(len(set(keys)) == len(keys) for keys in found)
        if is_unique and set.intersection(*map(set, found)):
            return names
    return ()


def row_key(row: Row, names: tuple[str, ...]) -> tuple[str | int, ...]:
    """A row's values of these fields; empty where it lacks one."""
    values = tuple(value for name in names if isinstance(value := row.get(name), str | int))
    return values if len(values) == len(names) else ()


def matched(first: list[Row], second: list[Row]) -> list[tuple[Row, Row]]:
    """Rows that are on both sides, in the order of the first; see `key_of_rows`."""
    names = key_of_rows(first, second)
    others = {key: row for row in second if (key := row_key(row, names))}
    return [(row, others[key]) for row in first if (key := row_key(row, names)) in others]


def compare(
    pairs: list[tuple[Row, Row]], means: dict[str, tuple[float, float]]
) -> dict[str, Paired]:
    """Verdicts by full name, on the measures that both rows of every pair have.

    `means` are the scores of both sides as a whole. A measure that is no mean over rows, such as
    the BLEU of a corpus, has no verdict: from rows alone it cannot be computed anew.
    """
    values: dict[str, NDArray[np.float64]] = {}
    for name, wholes in means.items():
        sides = [[number(pair[side], name) for pair in pairs] for side in (0, 1)]
        if not pairs or any(value is None for side in sides for value in side):
            continue
        both = np.asarray(sides, dtype=np.float64)
        if np.allclose(both.mean(axis=1), wholes, rtol=1e-4, atol=1e-6):
            values[name] = both[1] - both[0]
    if not values:
        return {}
    return dict(zip(values, paired(np.stack(list(values.values()), axis=1)), strict=True))
