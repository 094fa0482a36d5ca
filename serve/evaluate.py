"""Scores of a model's answers against the answers in the data, as JSON, as a table, and three of them to look at.

    python -m serve.evaluate --model DIR_OR_HUB_ID [--adapter DIR] --data FILE... --output_dir DIR
    python -m serve.evaluate --predictions FILE [--data FILE...] --output_dir DIR      # score what is there already
    deepspeed --num_gpus 8 --module serve.evaluate ...

--output_dir gets predictions.jsonl (see serve.predict) and metrics.json. What the scores
mean: serve/scores/metrics.py.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qwen_ds import dist
from qwen_ds.data.read.files import BadRow, read_rows
from qwen_ds.data.read.sources import iter_prompts
from qwen_ds.disk.place import require_folder
from qwen_ds.errors import UserError
from qwen_ds.runlog import run_command
from serve.engine.engine import silence_libraries
from serve.files.parts import check_output
from serve.options import EvaluateOptions, parse
from serve.predict import RunFigures, count_outcomes, predict
from serve.scores import metrics

NUM_SAMPLES = 3


def evaluate(options: EvaluateOptions) -> dict[str, Any] | None:
    """Predict (unless there are predictions), score, and write metrics.json.

    Returns:
        The content of metrics.json on rank 0, None on the others.

    Raises:
        UserError: nothing to score, an answer missing in the data, an output that exists.
    """
    folder = Path(options.output_dir)
    report_file, predictions_file = folder / "metrics.json", folder / "predictions.jsonl"
    if dist.rank() == 0:
        check_output(
            report_file, options.overwrite, "a new --output_dir, or --overwrite true to replace it"
        )
    figures: RunFigures | None = None
    if options.predictions is not None:
        if dist.rank() != 0:
            return None
        lines = read_predictions(Path(options.predictions), options)
    else:
        if options.model is None or not options.data:
            raise UserError(
                "no model or no data given; expected --model and --data, or --predictions"
            )
        if dist.rank() == 0:
            advice = "a new --output_dir, --overwrite true to replace it, or --predictions with its name to score it"
            check_output(predictions_file, options.overwrite, advice)
        figures = predict(
            options.model, options.data, predictions_file, options, needs_reference=True
        )
        if figures is None:
            return None
        lines = [
            json.loads(line)
            for line in predictions_file.read_text(encoding="utf-8").split("\n")[:-1]
        ]
    scores = metrics.score_all(
        [line["prediction"] for line in lines], [line["reference"] for line in lines]
    )
    report = report_of(options, lines, scores, figures)
    require_folder(folder, make=True)
    fresh = report_file.with_name("metrics.json.new")
    fresh.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(report_file)
    print(f"{in_words(report, scores, lines)}\n\nscores: {report_file}", flush=True)
    return report


def report_of(
    options: EvaluateOptions,
    lines: Sequence[dict[str, Any]],
    scores: dict[str, metrics.Scores],
    figures: RunFigures | None,
) -> dict[str, Any]:
    """The content of metrics.json: what was scored and how, the scores of both profiles, counts, and the speed."""
    report: dict[str, Any] = {
        "model": options.model,
        "adapter": options.adapter,
        "data": options.data,
        "predictions": options.predictions or str(Path(options.output_dir) / "predictions.jsonl"),
        "sampling": None if figures is None else asdict(options.sampling()),
        **count_outcomes(lines),
    }
    if figures is not None:
        ours = (
            figures.rows_of_this_run / figures.rows
        )  # rows of an interrupted run cost this one no time
        report |= {
            "prompts_cut": figures.prompts_cut,
            "seconds": round(figures.seconds, 6),
            "tokens_per_second": round(report["completion_tokens"] * ours / figures.seconds, 2)
            if figures.seconds
            else None,
        }
    return report | {profile: s.as_dict() for profile, s in scores.items()}


def read_predictions(file: Path, options: EvaluateOptions) -> list[dict[str, Any]]:
    """Lines of serve.predict, or any rows with `prediction` and `reference`; references of --data go before theirs."""
    references: list[tuple[str | None, str]] | None = None
    if options.data:
        rows = iter_prompts(
            options.data, fmt=options.format, columns=options.columns, system=options.system
        )
        references = [(reference, source) for _, reference, source in rows][: options.limit]
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected predictions of serve.predict")
    lines: list[dict[str, Any]] = []
    for row in read_rows(file):
        if isinstance(row, BadRow):
            raise UserError(f"{row.source}: {row.detail}")
        value = row.row
        if not isinstance(value, dict) or not isinstance(value.get("prediction"), str):
            found = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise UserError(
                f"{row.source}: found {found}; expected an object with a text prediction"
            )
        lines.append({**value, "source": value.get("source") or row.source})
        if options.limit is not None and len(lines) == options.limit:
            break
    if not lines:
        raise UserError(f"{file}: no rows; expected at least one prediction")
    if references is not None:
        if len(references) != len(lines):
            raise UserError(
                f"{file}: {len(lines)} predictions; expected {len(references)}, one for each row of --data"
            )
        lines = [
            {**line, "reference": ref, "source": at}
            for line, (ref, at) in zip(lines, references, strict=True)
        ]
    for line in lines:
        if not isinstance(line.get("reference"), str) or not line["reference"].strip():
            raise UserError(
                f"{line['source']}: no reference; expected an answer to compare with, or --data to take it from"
            )
    return lines


def in_words(
    report: dict[str, Any], scores: dict[str, metrics.Scores], lines: Sequence[dict[str, Any]]
) -> str:
    """What is printed: a line of counts, the table, and some answers beside their references."""
    counts = [f"{report['rows']} rows", f"{report['empty_predictions']} empty predictions"]
    counts += [f"{count} ended by {reason}" for reason, count in report["finish_reasons"].items()]
    if report.get("tokens_per_second"):
        counts.append(f"{report['seconds']:.1f} s, {report['tokens_per_second']:.1f} tokens/s")
    picked = sorted(
        {round(i * (len(lines) - 1) / max(NUM_SAMPLES - 1, 1)) for i in range(NUM_SAMPLES)}
    )
    samples = "\n\n".join(sample(lines[i], shutil.get_terminal_size().columns) for i in picked)
    return f"{', '.join(counts)}\n\n{metrics.table(scores)}\n\n{samples}"


def sample(line: dict[str, Any], columns: int) -> str:
    """One answer for the eye: question, reference and prediction, wrapped behind their names."""
    out = [str(line.get("source", ""))]
    for name in ("prompt", "reference", "prediction"):
        text = " ".join(str(line.get(name) or "").split()) or "(empty)"
        for number, piece in enumerate(wrap(text, max(columns - 14, 20))):
            out.append(f"  {name if number == 0 else '':<12}{piece}")
    return "\n".join(out)


def wrap(text: str, columns: int) -> Iterator[str]:
    """The text in pieces of at most `columns` terminal columns, of which a Chinese character takes two."""
    piece, width = "", 0
    for character in text:
        takes = _columns_of(character)
        if width + takes > columns:
            yield piece
            piece, width = "", 0
        piece, width = piece + character, width + takes
    yield piece


def _columns_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def main() -> int:
    options = parse(EvaluateOptions, __doc__.split("\n\n")[0])
    silence_libraries()
    evaluate(options)
    return 0


if __name__ == "__main__":
    run_command(main)
