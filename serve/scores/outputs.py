"""The files of an evaluation, and which of those that are there may be replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen_ds.disk.place import output_file, refuse_input, require_folder
from qwen_ds.disk.write import replacing, write_json, write_text
from serve.files.parts import check_output
from serve.options import EvaluateOptions
from serve.scores.scored import Scored, report_of, speed_of
from serve.scores.sides import Side, is_comparison

_MARK = ".scores.unfinished"  # while it is there, files of scores are an interrupted run's
_ADVICE = "a new --output_dir, or --overwrite true to replace it"


def last_file_of(options: EvaluateOptions) -> Path:
    """The file that is written last: an evaluation is complete once it is there."""
    name = "comparison.json" if is_comparison(options) else "metrics.json"
    return output_file(Path(options.output_dir) / name)


def check_last(last_file: Path, options: EvaluateOptions) -> None:
    """Raise UserError if the last file is there and may not be replaced, or is an input."""
    refuse_input(last_file, options.data)
    if not _is_unfinished(last_file.parent):
        check_output(last_file, options.overwrite, _ADVICE)
    require_folder(last_file.parent)


def check_side(side: Side, last_file: Path) -> None:
    """Raise UserError for outputs of a side that are there, unless an interrupted run left them."""
    overwrite = side.options.overwrite
    inputs: list[Path | str] = [*side.options.data]
    inputs += [] if side.given is None else [side.given]
    for file in (last_file, *_files_of(side)):
        refuse_input(file, inputs)
    if side.given is None:
        advice = f"{_ADVICE}, or --predictions with its name to score it"
        check_output(output_file(side.predictions), overwrite, advice)
    if not _is_unfinished(last_file.parent):
        for file in _files_of(side):
            check_output(output_file(file), overwrite, _ADVICE)


def _files_of(side: Side) -> list[Path]:
    return [side.folder / name for name in ("rows.jsonl", "speed.json", "metrics.json")]


def _is_unfinished(folder: Path) -> bool:
    return (folder / _MARK).is_file()


@contextmanager
def unfinished(folder: Path) -> Iterator[None]:
    """Mark a folder until all files of scores are in it, which the block writes."""
    mark = folder / _MARK
    write_text(mark, "")
    yield
    mark.unlink()


def write_side(scored: Scored, is_last: bool) -> dict[str, Any]:
    """Write a side's rows.jsonl, speed.json and metrics.json, the last unless it `is_last` of all
    files and waits; returns its content."""
    report = report_of(scored)
    rows_file, speed_file, report_file = map(output_file, _files_of(scored.side))
    require_folder(rows_file.parent, make=True)
    with replacing(rows_file) as made, made.open("w", encoding="utf-8") as out:
        out.writelines(f"{line}\n" for line in scored.row_lines())
    if scored.figures is not None:
        write_json(speed_file, speed_of(scored))
    if not is_last:
        write_json(report_file, report)
    return report
