"""Further sections of a report, made once the answers of all sides are scored: whether the models
have forgotten anything, and which answers a judge prefers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_ds.errors import UserError
from serve.options import EvaluateOptions
from serve.scores.answers import Line
from serve.scores.general import (
    check_general,
    general_in_words,
    general_section,
    general_values,
    remove_general_parts,
)
from serve.scores.judge import (
    check_judge,
    judge_in_words,
    judge_section,
    judge_values,
    remove_judge_parts,
)
from serve.scores.sides import Side


def check_sections(sides: Sequence[Side], options: EvaluateOptions) -> None:
    """Rank 0, before anything is generated. UserError: what a section needs is missing or wrong."""
    if not options.data and not options.predictions:  # no answers
        for name in ("judge", "training"):
            if vars(options)[name]:
                raise UserError(f"--{name} is given without --data; expected rows to answer")
    check_general(sides, options)
    check_judge(sides, options)


def further_sections(
    sides: Sequence[Side], answers: Sequence[Sequence[Line]], options: EvaluateOptions
) -> dict[str, Any]:
    """The sections by name, as JSON; `options` are those of the whole evaluation.

    Rank 0 alone asks for them. `answers` are those of each side, in the order of the rows; none
    where nothing was to answer. The report of one side (metrics.json), or of several
    (comparison.json), gets the sections.
    """
    found: dict[str, Any] = {}
    if options.general:
        found["general"] = general_section(sides, options)
    if options.judge is not None:
        found["judge"] = judge_section(sides, answers, options)
    return found


def section_values(sections: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Figures of the sections that can be required, by side and by their names in the gate."""
    found: dict[str, dict[str, float | None]] = {}
    if "general" in sections:
        for side, values in general_values(sections["general"]).items():
            found.setdefault(side, {}).update(values)
    if "judge" in sections:
        for side, rate in judge_values(sections["judge"]).items():
            found.setdefault(side, {}).update(rate)
    return found


def sections_in_words(report: Mapping[str, Any]) -> list[str]:
    """The sections of a report, for a terminal."""
    general = general_in_words(report["general"]) if "general" in report else []
    judge = judge_in_words(report["judge"]) if "judge" in report else []
    return [*general, *judge]


def finish_sections(sides: Sequence[Side]) -> None:
    """Remove the parts of the sections' files, once the reports are written."""
    remove_general_parts(sides)
    remove_judge_parts(sides)
