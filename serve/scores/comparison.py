"""Several sides' scores beside each other, and the others against the first: comparison.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.scores.intervals import paired
from serve.scores.scored import ScoredSide, number_or_none


def comparison_of(sides: Sequence[ScoredSide]) -> dict[str, Any]:
    """The content of comparison.json, but for its further sections: scores with intervals by full
    name and side, and the differences to the first side, tested on the same rows."""
    names = [side.candidate.name for side in sides]
    return {
        "models": names,
        "rows": len(sides[0].lines),
        "scores": _scores(sides),
        "paired": _paired(sides),
        "resamples": sides[0].candidate.options.resamples,
    }


def _scores(sides: Sequence[ScoredSide]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for side in sides:
        for name, value in side.values.items():
            low, high = map(number_or_none, side.intervals[name])
            found.setdefault(name, {})[side.candidate.name] = [value, low, high]
    return found


def _paired(sides: Sequence[ScoredSide]) -> dict[str, Any]:
    """Of the measures that both sides have."""
    found: dict[str, Any] = {}
    first = {one.full_names: one for one in sides[0].measured}
    for side in sides[1:]:
        for other in side.measured:
            if (one := first.get(other.full_names)) is None:
                continue
            figures = paired(one, other, resamples=side.candidate.options.resamples)
            for name, *row in zip(other.full_names, *figures, strict=True):
                difference, low, high, p = (number_or_none(float(x)) for x in row)
                if difference is not None:
                    told = {"difference": difference, "low": low, "high": high, "p": p}
                    found.setdefault(name, {})[side.candidate.name] = told
    return found
