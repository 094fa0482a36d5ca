"""Answers and references to score: made now, or from files of predictions and of data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from qwen_ds import dist
from qwen_ds.data.read.files import BadRow, read_rows
from qwen_ds.data.read.limits import DEFAULT, FileOptions
from qwen_ds.data.read.sources import NotRead, ReadOptions, iter_prompts
from qwen_ds.disk.place import output_file
from qwen_ds.errors import UserError
from qwen_ds.runlog import say
from serve.engine.loading import free_memory
from serve.files.prediction import PredictionFigures, predict
from serve.files.prompts import References, say_not_read
from serve.files.ranks import Leader
from serve.files.references import references_of, require_columns
from serve.options import EvaluateOptions
from serve.scores.rows import ScoredRow
from serve.scores.sides import Side

Line = dict[str, Any]
"""A line of serve.predict's output, or what has at least a prediction and a source."""


def read_predictions(file: Path, options: EvaluateOptions) -> list[Line]:
    """Lines of serve.predict, or any rows with `prediction` and `reference`; references of --data
    take precedence.

    UserError: no predictions, another number of references, or a row without a text to score or to
    compare with.
    """
    lines = list(prediction_lines(file, options.limit, options.files()))
    if not lines:
        raise UserError(f"{file}: no rows; expected at least one prediction")
    if options.data:
        found = _references_of_data(options)
        if len(found) != len(lines):
            raise UserError(
                f"{file}: {len(lines)} predictions; expected {len(found)}, one for each row of "
                "--data"
            )
        lines = [line | reference for line, reference in zip(lines, found, strict=True)]
    else:
        require_columns({key for line in lines for key in line}, options.references)
        lines = [_with_references(line, options.references) for line in lines]
    for line in lines:
        if not isinstance(line.get("reference"), str) or not line["reference"].strip():
            raise UserError(
                f"{line['source']}: no reference; expected an answer to compare with, or --data to "
                "take it from"
            )
    return lines


def prediction_lines(
    file: Path, limit: int | None = None, reading: FileOptions = DEFAULT
) -> Iterator[Line]:
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


def _references_of_data(options: EvaluateOptions) -> list[Line]:
    """Of each row of --data what replaces the same keys of a prediction's line."""
    files = options.files().told_by(say)
    reading = ReadOptions(options.format, options.columns, options.system, files=files)
    not_read: NotRead = {}
    seen: list[object] = []
    known: set[str] = set()
    found: list[Line] = []
    rows = iter_prompts(options.data, reading, not_read, seen, options.references)
    for _, reference, source in islice(rows, options.limit):
        texts = references_of(reference, seen, options.references, source)
        first = texts[0] if texts else None
        found.append({"reference": first, "references": list(texts), "source": source})
        known.update(seen[0] if seen and isinstance(seen[0], dict) else ())
    require_columns(known, options.references)
    for counts in not_read.values():
        for name in options.references:
            counts.pop(name, None)
    say_not_read(not_read)
    return found


def _with_references(line: Line, columns: Sequence[str]) -> Line:
    """A line whose further references are those that it has, and those of its `columns`."""
    own = line.get("reference")
    own = own if isinstance(own, str) else None
    texts = references_of(own, [line], ["references", *columns], line["source"])
    return line | {"reference": texts[0] if texts else own, "references": list(texts)}


def scored_row(line: Line) -> ScoredRow:
    """The share of a line that is scored."""
    nll, tokens = line.get("reference_nll"), line.get("reference_tokens")
    is_told = isinstance(nll, int | float) and isinstance(tokens, int)
    references = tuple(line.get("references") or ()) or (line["reference"],)
    return ScoredRow(
        line["prediction"],
        references,
        line.get("finish_reason"),
        float(nll) if is_told and nll is not None else None,
        tokens if is_told else None,
    )


def require_same_rows(names: Sequence[str], sides: Sequence[Sequence[Line]]) -> None:
    """Raise UserError unless all sides answer the same rows, as far as their lines tell."""
    for name, lines in zip(names[1:], sides[1:], strict=True):
        if len(lines) != len(sides[0]):
            raise UserError(
                f"{name} has {len(lines)} rows and {names[0]} {len(sides[0])}; expected answers to "
                "the same rows"
            )
        for number, (one, other) in enumerate(zip(sides[0], lines, strict=True), 1):
            for key in ("prompt", "reference"):
                if key in one and key in other and one[key] != other[key]:
                    raise UserError(
                        f"row {number} of {name} has another {key} than that of {names[0]}; "
                        "expected answers to the same rows"
                    )


def answered(
    sides: Sequence[Side], last_file: Path
) -> list[tuple[Side, list[Line], PredictionFigures | None]] | None:
    """Every side with its answers, made one side after another unless they are given; None on all
    ranks but the first."""
    if sides[0].given is not None:
        if dist.rank() != 0:
            return None
        read = [read_predictions(side.predictions, side.options) for side in sides]
        require_same_rows([side.name for side in sides], read)
        return [(side, lines, None) for side, lines in zip(sides, read, strict=True)]
    made = []
    files = [output_file(side.predictions) for side in sides]
    with Leader(last_file, files) as leader:
        for side, file in zip(sides, files, strict=True):
            if len(sides) > 1:
                say(f"{side.name}:")
            leader.wait_for(file)
            o = side.options
            references: References = "scored" if o.perplexity else "needed"
            made.append(predict(o.model, o.data, file, o, references, keeps_parts=True))
            free_memory()
    if dist.rank() != 0:
        return None
    lines = [list(prediction_lines(file)) for file in files]
    return list(zip(sides, lines, made, strict=True))
