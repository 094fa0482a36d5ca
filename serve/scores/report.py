"""Evaluation: predict, unless predictions are given; score; report as JSON and on the terminal."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

from rich.cells import chop_cells

from qwen_ds import dist
from qwen_ds.data.read.files import BadRow, read_rows
from qwen_ds.data.read.limits import DEFAULT, FileOptions
from qwen_ds.data.read.sources import NotRead, ReadOptions, iter_prompts
from qwen_ds.disk.place import output_file, refuse_input
from qwen_ds.disk.write import write_json
from qwen_ds.errors import UserError
from qwen_ds.runlog import say
from qwen_ds.terminal import show
from serve.files.parts import check_output, held_output, remove_parts
from serve.files.prediction import PredictionFigures, predict
from serve.files.prompts import say_not_read
from serve.files.sources import adapters_told
from serve.options import EvaluateOptions, SamplingOptions
from serve.scores import metrics


def evaluate(options: EvaluateOptions) -> dict[str, Any] | None:
    """Predict (unless there are predictions), score, and write metrics.json.

    Returns its content on rank 0, None on the others. UserError: nothing to score, an answer
    missing in the data, an output that exists or that another process writes.
    """
    report_file = output_file(Path(options.output_dir) / "metrics.json")
    with held_output(report_file) if dist.rank() == 0 else nullcontext():
        return _evaluate(options, report_file)


def _evaluate(options: EvaluateOptions, report_file: Path) -> dict[str, Any] | None:
    predictions_file = output_file(Path(options.output_dir) / "predictions.jsonl")
    if dist.rank() == 0:
        advice = "a new --output_dir, or --overwrite true to replace it"
        given = [options.predictions] if options.predictions else []
        refuse_input(report_file, [*given, *options.data])
        check_output(report_file, options.overwrite, advice)
    figures: PredictionFigures | None = None
    if options.predictions is not None:
        if dist.rank() != 0:
            return None
        lines = read_predictions(Path(options.predictions), options)
    else:
        if (options.model is None and options.endpoint is None) or not options.data:
            raise UserError(
                "no model or no data given; expected --model (or --endpoint) and --data, or "
                "--predictions"
            )
        if dist.rank() == 0:
            advice = (
                "a new --output_dir, --overwrite true to replace it, or --predictions with its "
                "name to score it"
            )
            check_output(predictions_file, options.overwrite, advice)
        figures = predict(
            options.model,
            options.data,
            predictions_file,
            options,
            needs_reference=True,
            keeps_parts=True,
        )
        if figures is None:
            return None
        lines = list(_prediction_lines(predictions_file))
    scores = metrics.score_all(
        [line["prediction"] for line in lines], [line["reference"] for line in lines]
    )
    report = report_of(options, lines, scores, figures)
    write_json(report_file, report)
    if figures is not None:
        remove_parts(predictions_file)
    show(f"{in_words(report, scores, lines)}\n\nscores: {report_file}")
    return report


def _sampling(options: EvaluateOptions) -> dict[str, Any]:
    told = {field.name: vars(options)[field.name] for field in fields(SamplingOptions)}
    return told | {"num_beams": options.num_beams}


def report_of(
    options: EvaluateOptions,
    lines: Sequence[dict[str, Any]],
    scores: dict[str, metrics.Scores],
    figures: PredictionFigures | None,
) -> dict[str, Any]:
    """The content of metrics.json: data, options, counts, speed, and both profiles' scores."""
    reasons = Counter(line["finish_reason"] for line in lines if line.get("finish_reason"))
    report: dict[str, Any] = {
        "model": options.model or options.endpoint,
        **adapters_told(options),
        "data": options.data,
        "predictions": options.predictions or str(Path(options.output_dir) / "predictions.jsonl"),
        "sampling": None if figures is None else _sampling(options),
        "rows": len(lines),
        "finish_reasons": dict(sorted(reasons.items())),
        "empty_predictions": sum(not line["prediction"].strip() for line in lines),
        "completion_tokens": sum(line.get("completion_tokens") or 0 for line in lines),
    }
    if figures is not None:
        # This run spent no time on the rows of an interrupted one.
        tokens = report["completion_tokens"] * (figures.rows_of_this_run / figures.rows)
        report |= {
            "prompts_cut": figures.prompts_cut,
            "seconds": round(figures.seconds, 6),
            "tokens_per_second": round(tokens / figures.seconds, 2) if figures.seconds else None,
        }
    return report | {profile: s.as_dict() for profile, s in scores.items()}


def read_predictions(file: Path, options: EvaluateOptions) -> list[dict[str, Any]]:
    """Lines of serve.predict, or any rows with `prediction` and `reference`; references of --data
    take precedence. UserError: no predictions, another number of references, or a row without a
    text to score or to compare with.
    """
    lines = list(_prediction_lines(file, options.limit, options.files()))
    if not lines:
        raise UserError(f"{file}: no rows; expected at least one prediction")
    if options.data:
        files = options.files().told_by(say)
        reading = ReadOptions(options.format, options.columns, options.system, files=files)
        not_read: NotRead = {}
        rows = iter_prompts(options.data, reading, not_read)
        found = [{"reference": reference, "source": source} for _, reference, source in rows]
        say_not_read(not_read)
        found = found[: options.limit]
        if len(found) != len(lines):
            raise UserError(
                f"{file}: {len(lines)} predictions; expected {len(found)}, one for each row of "
                "--data"
            )
        lines = [line | reference for line, reference in zip(lines, found, strict=True)]
    for line in lines:
        if not isinstance(line.get("reference"), str) or not line["reference"].strip():
            raise UserError(
                f"{line['source']}: no reference; expected an answer to compare with, or --data to "
                "take it from"
            )
    return lines


def _prediction_lines(
    file: Path, limit: int | None = None, reading: FileOptions = DEFAULT
) -> Iterator[dict[str, Any]]:
    """The first `limit` rows, each an object with a text `prediction` and the `source` of it."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected predictions of serve.predict")
    for row in islice(read_rows(file, reading), limit):
        if isinstance(row, BadRow):
            raise UserError(f"{row.source}: {row.detail}")
        value = row.row
        if not isinstance(value, dict) or not isinstance(value.get("prediction"), str):
            found = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise UserError(
                f"{row.source}: found {found}; expected an object with a text prediction"
            )
        yield {**value, "source": value.get("source") or row.source}


def in_words(
    report: dict[str, Any], scores: dict[str, metrics.Scores], lines: Sequence[dict[str, Any]]
) -> str:
    """The report for a terminal: a line of counts, the table, and some answers with references."""
    counts = [f"{report['rows']} rows", f"{report['empty_predictions']} empty predictions"]
    counts += [f"{count} ended by {reason}" for reason, count in report["finish_reasons"].items()]
    if report.get("tokens_per_second"):
        counts.append(f"{report['seconds']:.1f} s, {report['tokens_per_second']:.1f} tokens/s")
    last = len(lines) - 1
    picked = sorted({0, round(last / 2), last})
    samples = "\n\n".join(sample(lines[i], shutil.get_terminal_size().columns) for i in picked)
    return f"{', '.join(counts)}\n\n{metrics.table(scores)}\n\n{samples}"


def sample(line: dict[str, Any], columns: int) -> str:
    """One answer to read: question, reference and prediction, each wrapped after its name."""
    out = [str(line.get("source", ""))]
    for name in ("prompt", "reference", "prediction"):
        text = " ".join(str(line.get(name) or "").split()) or "(empty)"
        first, *rest = chop_cells(text, max(columns - 14, 20))
        out += [f"  {name:<12}{first}", *(" " * 14 + piece for piece in rest)]
    return "\n".join(out)
