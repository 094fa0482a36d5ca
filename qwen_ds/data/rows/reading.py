"""How a recipe's data files are read, and by which reader."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from qwen_ds.data.read.containers import rows_inside
from qwen_ds.data.read.dialogue import RowError, object_of
from qwen_ds.data.read.files import SourceRow
from qwen_ds.data.read.limits import FileOptions
from qwen_ds.data.read.places import Place, rows_of
from qwen_ds.data.read.readers import find_reader
from qwen_ds.data.read.sources import ReadOptions
from qwen_ds.data.rows.data_report import PartReport
from qwen_ds.recipe.options import DataOptions


def read_options(data: DataOptions, report: PartReport | None = None) -> ReadOptions:
    """How the rows of a recipe are read; `report` takes what becomes of the files."""
    files = FileOptions(data.encoding, data.max_row_mb, data.max_expansion)
    if report is not None:
        encodings, left_out = report.encodings, report.left_out
        files = replace(files, on_encoding=encodings.__setitem__, on_left_out=left_out.__setitem__)
    return ReadOptions(data.format, data.columns, bad_rows=data.bad_rows, files=files)


def formats_of(data: DataOptions, part: Place) -> dict[str, str]:
    """By file, the reader of its first row."""
    if data.columns:
        return {part.path: f"columns {', '.join(data.columns)}"}
    if data.format != "auto":
        return {part.path: data.format}
    alone = [replace(part, path=str(file), files=(file,)) for file in part.files] or [part]
    files = read_options(data).files
    return {each.path: _format(each, files) for each in alone}


def _format(part: Place, files: FileOptions) -> str:
    first = next((row.row for row in rows_of(part, files) if isinstance(row, SourceRow)), None)
    inside = rows_inside(first, lambda row: _reader(row) is not None, part.split, part.path)
    return _reader(first if inside is None else next(inside.rows)[0]) or "none"


def _reader(row: object) -> str | None:
    with suppress(RowError):
        return find_reader(object_of(row, "the row")).name
    return None
