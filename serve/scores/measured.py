"""Measures of a set of rows as sums over the rows: so means and measures of the whole set alike can
be taken of all rows, of one row, and of rows drawn again."""

# Shapes: N rows, K statistics of a row, M measures, ... any leading axes.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

Figures = NDArray[np.float64]
Combine = Callable[[Figures], Figures]


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """The measures of one profile on some rows.

    A name alone is F where a measure has precision, recall and F; theirs end in .p and .r.
    """

    profile: str  # "": general measures
    signature: str  # all that was computed
    names: tuple[str, ...]  # M
    statistics_NK: Figures  # float64
    combine: Combine  # sums of statistics [..., K] -> measures [..., M]; NaN: not defined
    higher_is_better: tuple[bool | None, ...]  # M; None: neither higher nor lower is better

    @property
    def values_M(self) -> Figures:
        """The measures of all rows."""
        return self.combine(self.statistics_NK.sum(axis=0))

    @property
    def row_values_NM(self) -> Figures:
        """The measures of each row alone."""
        return self.combine(self.statistics_NK)

    @property
    def full_names(self) -> tuple[str, ...]:
        """PROFILE.MEASURE, or the measure's own name where it belongs to no profile."""
        return tuple(f"{self.profile}.{name}" if self.profile else name for name in self.names)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: {"rouge-1": {"f", "p", "r"}, .., "bleu-4": x}; None where not finite."""
        values = {
            name: number_or_none(value)
            for name, value in zip(self.names, self.values_M, strict=True)
        }
        out: dict[str, Any] = {}
        for name, value in values.items():
            if name.endswith((".p", ".r")):
                out[name[:-2]][name[-1]] = value
            else:
                out[name] = {"f": value} if f"{name}.p" in values else value
        return out


def number_or_none(value: float, digits: int | None = None) -> float | None:
    """A number for JSON, which has neither NaN nor infinity."""
    if not math.isfinite(value):
        return None
    return float(value) if digits is None else round(float(value), digits)


def divided(sums: Figures) -> Figures:
    """All statistics but the last, divided by the last; NaN where that is 0."""
    below = sums[..., -1:]
    return np.divide(
        sums[..., :-1], below, out=np.full_like(sums[..., :-1], np.nan), where=below != 0
    )


def means(
    profile: str,
    signature: str,
    names: Sequence[str],
    values_NM: Sequence[Sequence[float]],
    higher_is_better: bool | None = True,
) -> Measured:
    """Measures that are means over the rows."""
    values = np.asarray(values_NM, dtype=np.float64)
    ones = np.ones((len(values), 1))
    better = (higher_is_better,) * len(names)
    return Measured(profile, signature, tuple(names), np.hstack([values, ones]), divided, better)


def signature(**parts: object) -> str:
    """The parts as key:value, joined by bars, as sacrebleu writes its own."""
    return "|".join(f"{key}:{value}" for key, value in parts.items())


def versions(*packages: str) -> str:
    """The installed versions of packages."""
    return ", ".join(f"{package} {version(package)}" for package in packages)
