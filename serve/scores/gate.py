"""Figures that an evaluation must reach: `--require "seed.rouge-l>=0.2" "stop_rate>=0.99"`."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_ds.errors import UserError
from serve.options import EvaluateOptions
from serve.scores import general
from serve.scores.judge import WIN_RATE
from serve.scores.profiles import measure
from serve.scores.rows import ScoredRow

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt,
}  # fmt: skip
_FORM = re.compile(r"\s*(?:([^:]+):)?\s*([^\s<>=:]+)\s*(>=|<=|>|<)\s*([^\s<>=]+)\s*")
_EXPECTED = "expected a measure, one of >=, >, <= and <, and a number, such as stop_rate>=0.99"


@dataclass(frozen=True, slots=True)
class Requirement:
    """One figure that must hold."""

    text: str  # as it was given
    names: tuple[str, ...]  # of the sides that must hold it
    measure: str
    sign: str
    bound: float

    def holds(self, value: float | None) -> bool:
        """Whether a value reaches it; one that was not measured does not."""
        return value is not None and _OPERATORS[self.sign](value, self.bound)


def requirements_of(options: EvaluateOptions, names: Sequence[str]) -> list[Requirement]:
    """The requirements of an evaluation whose sides have these names; without a name, one is for
    all sides but the first, with which the others are compared.

    UserError: not a requirement, a side or measure that there is not, or one that these options
    don't measure.
    """
    if not options.require:
        return []
    needs = _needs()
    return [_requirement(text, options, names, needs) for text in options.require]


def _needs() -> dict[str, tuple[str, ...]]:
    """By full name of a measure, the options without which it is not measured."""
    row = ScoredRow("a", ("a",), "stop", 1.0, 1)
    of_answers = [name for one in measure([row], training=frozenset()) for name in one.full_names]
    needs: dict[str, tuple[str, ...]] = {name: ("data",) for name in of_answers}
    for option, name in (("training", "verbatim_share"), ("perplexity", "perplexity")):
        needs[name] += (option,)
    needs |= {name: ("general",) for name in (*general.MEASURES, *general.AGAINST_FIRST)}
    return needs | {WIN_RATE: ("data", "judge")}


def _requirement(
    text: str,
    options: EvaluateOptions,
    names: Sequence[str],
    needs: Mapping[str, tuple[str, ...]],
) -> Requirement:
    found = _FORM.fullmatch(text)
    bound = _number(found[4]) if found else None
    if found is None or bound is None:
        raise UserError(f"--require {text!r}: not a requirement; {_EXPECTED}")
    name, measured, sign = found[1], found[2], found[3]
    if name is not None and name not in names:
        raise UserError(
            f"--require {text!r}: no side is named {name}; expected one of {', '.join(names)}"
        )
    if measured not in needs:
        near = difflib.get_close_matches(measured, needs, 3, 0.4) or [*needs][:3]
        raise UserError(
            f"--require {text!r}: no measure is named {measured}; expected one such as "
            f"{', '.join(near)}"
        )
    given = {**vars(options), "data": options.data or options.predictions}
    for option in needs[measured]:
        if not given[option]:
            raise UserError(f"--require {text!r}: {measured} is measured with --{option} alone")
    sides = (name,) if name is not None else tuple(names[1:] or names)
    if measured in (*general.AGAINST_FIRST, WIN_RATE) and names[0] in sides:
        raise UserError(
            f"--require {text!r}: {measured} is that of a model against the first, {names[0]}; "
            "expected another one, or --compare with several"
        )
    return Requirement(text, sides, measured, sign, bound)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def judged(
    requirements: Sequence[Requirement], values: Mapping[str, Mapping[str, float | None]]
) -> list[dict[str, Any]]:
    """Each requirement and side, as JSON: the figure, and whether it is `met`.

    Args:
        values: by side and full name of a measure, as far as it was measured.
    """
    return [
        {
            "require": one.text, "model": name, "value": values[name].get(one.measure),
            "met": one.holds(values[name].get(one.measure)),
        }
        for one in requirements
        for name in one.names
    ]  # fmt: skip


def in_words(found: Sequence[Mapping[str, Any]], is_comparison: bool) -> list[str]:
    """A line for each verdict of `judged`."""
    lines = []
    for one in found:
        value = "not measured" if one["value"] is None else f"{one['value']:.4f}"
        side = f"{one['model']}: " if is_comparison else ""
        verdict = "holds" if one["met"] else "MISSED"
        lines.append(f"required  {verdict:<8}{side}{one['require']}  ({value})")
    return lines
