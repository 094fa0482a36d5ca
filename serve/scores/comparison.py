"""Several sides' scores beside each other, and the others against the first: comparison.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.scores.intervals import paired
from serve.scores.measured import number_or_none
from serve.scores.scored import Scored


def comparison_of(scored: Sequence[Scored]) -> dict[str, Any]:
    """The content of comparison.json, but for its further sections: scores with intervals by full
    name and side, and the differences to the first side, tested on the same rows."""
    names = [each.side.name for each in scored]
    return {
        "models": names,
        "rows": len(scored[0].lines),
        "scores": _scores(scored),
        "paired": _paired(scored),
        "resamples": scored[0].side.options.resamples,
    }


def _scores(scored: Sequence[Scored]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in scored:
        for name, value in each.values.items():
            low, high = map(number_or_none, each.intervals[name])
            found.setdefault(name, {})[each.side.name] = [value, low, high]
    return found


def _paired(scored: Sequence[Scored]) -> dict[str, Any]:
    """Of the measures that both sides have."""
    found: dict[str, Any] = {}
    first = {one.full_names: one for one in scored[0].measured}
    for each in scored[1:]:
        for other in each.measured:
            if (one := first.get(other.full_names)) is None:
                continue
            figures = paired(one, other, resamples=each.side.options.resamples)
            for name, *row in zip(other.full_names, *figures, strict=True):
                difference, low, high, p = (number_or_none(float(x)) for x in row)
                if difference is not None:
                    told = {"difference": difference, "low": low, "high": high, "p": p}
                    found.setdefault(name, {})[each.side.name] = told
    return found
