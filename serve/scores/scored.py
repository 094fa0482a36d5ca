"""The scores of one side's answers, and the two files that tell them: metrics.json, rows.jsonl."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from qwen_ds.disk.digest import model_sha256
from qwen_ds.model.folder import find_model
from serve.files.prediction import PredictionFigures
from serve.files.sources import adapters_told
from serve.options import EvaluateOptions, SamplingOptions
from serve.scores.answers import Line, scored_row
from serve.scores.intervals import bootstrap
from serve.scores.measured import Figures, Measured, number_or_none
from serve.scores.profiles import measure
from serve.scores.sides import Side

RANKED_BY = "seed.rouge-l"
SHOWN_ROWS = 3
_ROW_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Scored:
    """One side, its answers and their scores."""

    side: Side
    lines: Sequence[Line]
    measured: Sequence[Measured]
    intervals: dict[str, tuple[float, float]]  # 95 %, by full name
    figures: PredictionFigures | None  # of the run that answered; None: they were there

    @property
    def values(self) -> dict[str, float | None]:
        """By full name; None where not defined."""
        return {
            name: number_or_none(value)
            for one in self.measured
            for name, value in zip(one.full_names, one.values_M, strict=True)
        }

    def ranked(self) -> list[int]:
        """Places of the rows, the worst first by RANKED_BY."""
        scores_N = self._rows_of(RANKED_BY)
        return [int(place) for place in np.argsort(np.nan_to_num(scores_N), kind="stable")]

    def _rows_of(self, full_name: str) -> Figures:
        for one in self.measured:
            if full_name in one.full_names:
                return one.row_values_NM[:, one.full_names.index(full_name)]
        raise AssertionError(full_name)

    def row_lines(self) -> Iterator[str]:
        """The lines of rows.jsonl: id, source, and the row's own scores by full name."""
        columns = [
            (name, one_N)
            for one in self.measured
            for name, one_N in zip(one.full_names, one.row_values_NM.T, strict=True)
        ]
        for place, line in enumerate(self.lines):
            row = {"id": line.get("id", place), "source": line["source"]}
            row |= {name: number_or_none(one_N[place], _ROW_DIGITS) for name, one_N in columns}
            yield json.dumps(row, ensure_ascii=False)


def score(
    side: Side,
    lines: Sequence[Line],
    figures: PredictionFigures | None,
    training: Container[str] | None,
) -> Scored:
    """Score one side's answers, with intervals."""
    measured = measure([scored_row(line) for line in lines], training)
    intervals = {}
    for one in measured:
        low_M, high_M = bootstrap(one, resamples=side.options.resamples)
        for name, low, high in zip(one.full_names, low_M, high_M, strict=True):
            intervals[name] = float(low), float(high)
    return Scored(side, lines, measured, intervals, figures)


def report_of(scored: Scored) -> dict[str, Any]:
    """The content of metrics.json: model, data, options, counts, scores with their signatures and
    intervals, and the places of the worst and best rows. No figure of it depends on the clock."""
    options, lines, figures = scored.side.options, scored.lines, scored.figures
    given, ranked = scored.side.given, scored.ranked()
    reasons = Counter(line["finish_reason"] for line in lines if line.get("finish_reason"))
    report: dict[str, Any] = {
        "model": options.model or options.endpoint,
        **({"endpoint_model": options.endpoint_model} if options.endpoint else {}),
        **_sums(options, is_answered=given is None),
        "data": options.data,
        "predictions": scored.side.predictions.name if given is None else str(given),
        "sampling": None if given is not None else _sampling(options),
        "rows": len(lines),
        "finish_reasons": dict(sorted(reasons.items())),
        "empty_predictions": sum(not line["prediction"].strip() for line in lines),
        "completion_tokens": sum(line.get("completion_tokens") or 0 for line in lines),
    }
    if figures is not None:
        report["prompts_cut"] = figures.prompts_cut
    report |= _scores(scored.measured)
    told = {name: pair for name, pair in scored.intervals.items() if all(map(math.isfinite, pair))}
    return report | {
        "intervals": {name: list(pair) for name, pair in told.items()},
        "resamples": options.resamples,
        "ranked_by": RANKED_BY,
        "worst": ranked[:SHOWN_ROWS],
        "best": ranked[: -SHOWN_ROWS - 1 : -1],
    }


def _scores(measured: Sequence[Measured]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    signatures: dict[str, str] = {}
    for one in measured:
        if one.profile:
            found[one.profile] = one.as_dict()
            signatures[one.profile] = one.signature
        else:
            found |= one.as_dict()
            signatures |= dict.fromkeys(one.names, one.signature)
    return found | {"signatures": signatures}


def _sampling(options: EvaluateOptions) -> dict[str, Any]:
    told = {field.name: vars(options)[field.name] for field in fields(SamplingOptions)}
    return told | {"num_beams": options.num_beams}


def _sums(options: EvaluateOptions, is_answered: bool) -> dict[str, Any]:
    """The adapter by name, and checksums of weights: a model card must not tell the scores of
    another model. Answers that were there already tell of no weights."""
    if not is_answered:
        return {"adapter": None, "adapter_sha256": None, "model_sha256": None}
    if options.model is None:
        return {**adapters_told(options), "model_sha256": None}
    return {**adapters_told(options), "model_sha256": model_sha256(find_model(options.model).path)}


def speed_of(scored: Scored) -> dict[str, Any]:
    """The content of speed.json: how fast this run was, an interrupted run's rows aside."""
    figures = scored.figures
    assert figures is not None, "nothing was generated"
    tokens = sum(line.get("completion_tokens") or 0 for line in scored.lines)
    tokens = round(tokens * figures.rows_of_this_run / figures.rows)
    rate = round(tokens / figures.seconds, 2) if figures.seconds else None
    return {
        "seconds": round(figures.seconds, 6),
        "rows_of_this_run": figures.rows_of_this_run,
        "tokens_per_second": rate,
    }
