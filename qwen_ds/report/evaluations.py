"""Evaluations that lie in a run folder, as serve.evaluate writes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qwen_ds.report.folder import Row, RunFiles, finite, number
from qwen_ds.report.significance import Paired, compare, matched

METRICS, ROWS, PREDICTIONS = "metrics.json", "rows.jsonl", "predictions.jsonl"
COMPARISON = "comparison.json"
MAX_EVALUATIONS = 12
# Measures that belong to no profile.
GENERAL = (
    "stop_rate", "exact_match", "distinct-1", "distinct-2", "length_ratio", "repetition_rate",
    "verbatim_share", "perplexity",
)  # fmt: skip
LOWER_IS_BETTER = ("perplexity", "repetition_rate", "verbatim_share")
NEITHER_IS_BETTER = ("length_ratio", "distinct-1", "distinct-2")
# The score that stands for all: the first of these that there is.
MAIN = tuple(
    f"{profile}.rouge-l"
    for profile in ("seed", "chatglm", "chatglm3", "rouge-score", "rouge_score")
)
_MEASURES = ("rouge-", "bleu", "chrf")
_NO_PROFILES = ("signatures", "intervals")  # they have the same keys


@dataclass(frozen=True, slots=True)
class Score:
    """A score with its 95 % interval, where there is one."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One metrics.json with what lies beside it."""

    place: str  # its folder, below the run's
    model: str  # in words
    is_base: bool
    data: tuple[str, ...]  # names of files
    report: Row
    scores: dict[str, Score]  # by full name, F of what has F, P and R
    signatures: dict[str, str]
    rows: list[Row]
    predictions: list[Row]
    written: float  # seconds, as the file system has it

    @property
    def main(self) -> str:
        """The score that stands for all of them: the one by which the evaluation ranks its rows,
        else the first of MAIN that it has, else its first."""
        asked = str(self.report.get("ranked_by"))
        return next(name for name in (asked, *MAIN, *self.scores) if name in self.scores)

    @property
    def num_rows(self) -> int:
        return int(number(self.report, "rows") or len(self.rows))


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Evaluations on the same data, side by side; the first is the one compared with."""

    data: str
    evaluations: list[Evaluation]
    verdicts: list[dict[str, Paired]]  # by full name, one for each evaluation after the first
    comparison: Row  # comparison.json, if they come from one call

    @property
    def title(self) -> str:
        """The data, or the folder where they are not told."""
        return self.data or ", ".join(each.place for each in self.evaluations)

    @property
    def heads(self) -> list[str]:
        """The models, and where they do not come from one call, the folders."""
        if self.comparison:
            return [each.model for each in self.evaluations]
        return [f"{each.model} ({each.place})" for each in self.evaluations]

    @property
    def names(self) -> list[str]:
        return score_names(self.evaluations)


def score_names(evaluations: Sequence[Evaluation]) -> list[str]:
    """Full names of all scores, in the order of the profiles."""
    return list(dict.fromkeys(name for each in evaluations for name in each.scores))


def find(run: RunFiles) -> list[Evaluation]:
    """The evaluations in a run folder, the oldest first; of many the newest."""
    files = [file for file in run.folder.glob("**/" + METRICS) if file.is_file()]
    files.sort(key=lambda file: (file.stat().st_mtime, file))
    if len(files) > MAX_EVALUATIONS:
        run.troubles.append(
            f"{len(files)} evaluations; the newest {MAX_EVALUATIONS} of them are on this page"
        )
    found = []
    for file in files[-MAX_EVALUATIONS:]:
        place = file.parent.relative_to(run.folder).as_posix()
        name = f"{place}/{METRICS}"
        report = run.reader.json(name)
        made = run.reader.guarded(name, partial(_of, run, report, place), None)
        if made is not None:
            found.append(made)
    return found


def _of(run: RunFiles, report: Row, place: str) -> Evaluation | None:
    scores = scores_of(report)
    if not scores:
        return None
    model, adapter = report.get("model"), report.get("adapter")
    asked = run.recipe.get("model")
    is_base = not adapter and isinstance(asked, dict) and _same(model, asked.get("path"))
    return Evaluation(
        place,
        _in_words(model, adapter, is_base),
        is_base,
        tuple(Path(str(file)).name for file in report.get("data") or []),
        report,
        scores,
        {str(key): str(text) for key, text in (report.get("signatures") or {}).items()},
        run.reader.lines(f"{place}/{ROWS}"),
        run.reader.lines(f"{place}/{PREDICTIONS}"),
        (run.folder / place / METRICS).stat().st_mtime,
    )


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _in_words(model: Any, adapter: Any, is_base: bool) -> str:
    if is_base:
        return "base"
    if isinstance(adapter, str) and adapter:
        # "adapter" is what the run's own is called; another one has the name of its run.
        path = Path(adapter)
        return "adapter" if path.name == "adapter" else f"adapter {path.name}"
    return Path(model).name if isinstance(model, str) and model else "predictions"


def scores_of(report: Row) -> dict[str, Score]:
    """Scores of a metrics.json by full name, with their intervals; of three F."""
    intervals = report.get("intervals") or {}
    values: dict[str, Any] = {}
    for key, value in report.items():
        if key not in _NO_PROFILES and _is_profile(value):
            for name, measure in value.items():
                values[f"{key}.{name}"] = measure["f"] if isinstance(measure, dict) else measure
        elif key in GENERAL:
            values[key] = value
    found = {}
    for name, value in values.items():
        low, high = intervals.get(name) or (None, None)
        found[name] = Score(finite(value), low, high)
    return found


def _is_profile(value: Any) -> bool:
    return isinstance(value, dict) and any(str(name).startswith(_MEASURES) for name in value)


def tables(run: RunFiles, evaluations: Sequence[Evaluation]) -> list[ScoreTable]:
    """The evaluations by what they belong to: one call that compared models, or the same data."""
    groups: dict[tuple[bool, str], list[Evaluation]] = {}
    for evaluation in evaluations:
        above, data = Path(evaluation.place).parent.as_posix(), ", ".join(evaluation.data)
        is_call = run.reader.has(f"{above}/{COMPARISON}")
        groups.setdefault((is_call, above if is_call else data), []).append(evaluation)
    found = []
    for (is_call, place), members in groups.items():
        comparison = run.reader.json(f"{place}/{COMPARISON}") if is_call else {}
        if is_call:
            order = [str(name) for name in comparison.get("models") or []]
            members = [replace(each, model=Path(each.place).name) for each in members]
            members.sort(key=lambda e: order.index(e.model) if e.model in order else len(order))
        else:
            members = sorted(members, key=lambda e: (not e.is_base, e.written))
        verdicts = [_verdicts(members[0], other, comparison) for other in members[1:]]
        found.append(ScoreTable(", ".join(members[0].data), members, verdicts, comparison))
    return found


def _verdicts(first: Evaluation, other: Evaluation, comparison: Row) -> dict[str, Paired]:
    """Paired verdicts: those of the call that compared them, else from the rows of both."""
    told, name = comparison.get("paired"), Path(other.place).name
    if isinstance(told, dict):
        return {
            measure: Paired(*(float(each[name][key]) for key in ("difference", "low", "high", "p")))
            for measure, each in told.items()
            if isinstance(each, dict)
            and isinstance(each.get(name), dict)
            and all(
                number(each[name], key) is not None for key in ("difference", "low", "high", "p")
            )
        }
    return verdicts(first, other)


def verdicts(first: Evaluation, other: Evaluation) -> dict[str, Paired]:
    """Paired verdicts from the rows of both, where all rows of each are those of the other."""
    pairs = matched(first.rows, other.rows)
    if not pairs or not len(pairs) == len(first.rows) == len(other.rows):
        return {}
    means = {
        name: (score.value, other.scores[name].value)
        for name, score in first.scores.items()
        if name in other.scores
    }
    return compare(
        pairs, {n: (a, b) for n, (a, b) in means.items() if a is not None and b is not None}
    )


def is_better(name: str, difference: float) -> bool | None:
    """Whether a difference of this measure is for the better; None: it is neither."""
    measure = name.rpartition(".")[2] if name not in GENERAL else name
    if measure in NEITHER_IS_BETTER or not difference:
        return None
    return (difference < 0) == (measure in LOWER_IS_BETTER)
