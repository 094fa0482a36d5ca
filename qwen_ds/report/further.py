"""Further sections of an evaluation: forgetting, a judge, and the figures that were required."""

from __future__ import annotations

from typing import Any, NamedTuple

from qwen_ds.report.evaluations import Score, ScoreTable
from qwen_ds.report.folder import Row, number
from qwen_ds.report.verdict import Sentence, Severity, percent, short

_SEVERITY: dict[str, Severity] = {"forgot": "warn", "no sign": "good", "cannot tell": "note"}


class Forgetting(NamedTuple):
    """Figures on general rows by model, and what changed against the first."""

    models: list[str]
    figures: list[tuple[str, list[Score]]]
    changes: list[Sentence]


class Judged(NamedTuple):
    """A model's answers against those of the first, by a judge."""

    model: str
    win_rate: Score
    counts: str


class Required(NamedTuple):
    """A figure that was required of a model."""

    text: str
    model: str
    value: float | None
    met: bool


class Further(NamedTuple):
    """All further sections of one report; what it lacks is empty."""

    place: str
    forgetting: Forgetting | None
    judge: str  # the model that judged
    judged: list[Judged]
    required: list[Required]


def further(table: ScoreTable) -> list[Further]:
    """The further sections of the reports of a table, of those that have any."""
    reports = [("", table.comparison)] if table.comparison else []
    reports += [(each.place, each.report) for each in table.evaluations]
    found = [_of(place, report) for place, report in reports]
    return [each for each in found if each.forgetting or each.judged or each.required]


def _of(place: str, report: Row) -> Further:
    judge = report.get("judge") or {}
    general = report.get("general")
    return Further(
        place,
        _forgetting(general) if isinstance(general, dict) else None,
        str(judge.get("judge_model") or ""),
        [_judged(name, found) for name, found in (judge.get("results") or {}).items()],
        [
            Required(str(each["require"]), str(each["model"]), number(each, "value"), each["met"])
            for each in report.get("gate") or []
        ],
    )


def _forgetting(section: Row) -> Forgetting:
    scores: dict[str, dict[str, Any]] = section["scores"]
    names = list(dict.fromkeys(name for figures in scores.values() for name in figures))
    figures = [
        (name.replace("_", " "), [Score(*each.get(name, (None,))) for each in scores.values()])
        for name in names
    ]
    changes = []
    for model, change in (section.get("changes") or {}).items():
        told = [change[kind] for kind in ("texts", "questions") if kind in change]
        changes += [
            Sentence(f"{model}: {each['in_words']}.", _SEVERITY[each["verdict"]]) for each in told
        ]
    return Forgetting(list(scores), figures, changes)


def _judged(model: str, found: Row) -> Judged:
    counts = ", ".join(
        f"{int(found[key]):,} {word}"
        for key, word in (
            ("wins", "won"),
            ("losses", "lost"),
            ("ties", "even"),
            ("turned", "turned with the order"),
            ("unreadable", "verdicts not readable"),
            ("failed", "verdicts failed"),
        )
        if found.get(key)
    )
    rate = Score(found.get("win_rate"), found.get("low"), found.get("high"))
    return Judged(model, rate, counts)


def sentences(found: list[Further]) -> list[Sentence]:
    """Sentences for the verdict: forgetting, what the judge preferred, and requirements missed."""
    out = []
    for each in found:
        if each.forgetting:
            out += [
                Sentence(f"Forgetting, {text}", severity)
                for text, severity in each.forgetting.changes
            ]
        for model, rate, _ in each.judged:
            if rate.value is None or rate.low is None or rate.high is None:
                continue
            text = f"The judge {each.judge} prefers {model} in {percent(rate.value)} of the rows"
            interval = f"95 %: {percent(rate.low)} to {percent(rate.high)}"
            sure: Severity = "good" if rate.low > 0.5 else "warn" if rate.high < 0.5 else "note"
            out.append(Sentence(f"{text} ({interval}).", sure))
        for required in each.required:
            if not required.met:
                value = "not measured" if required.value is None else short(required.value)
                text = f"Required and missed: {required.text} ({required.model}: {value})."
                out.append(Sentence(text, "stop"))
    return out
