"""Further sections of a report, made once the answers of all sides are scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.options import EvaluateOptions
from serve.scores.sides import Side


def further_sections(sides: Sequence[Side], options: EvaluateOptions) -> dict[str, Any]:
    """The sections by name, as JSON; `options` are those of the whole evaluation.

    Rank 0 alone asks for them. Each side's answers are in its `predictions`, in the order of the
    rows; the report of one side (metrics.json), or of several (comparison.json), gets them.
    """
    return {}
