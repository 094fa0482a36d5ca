"""CSV with a header line: any usual delimiter, told by the rows that it cuts alike."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, repeat

from qwen_ds.data.read.files_json import BadRow, SourceRow, bad_bytes
from qwen_ds.data.read.files_text import Lines
from qwen_ds.data.read.limits import FileOptions

_DELIMITERS = ",\t;|"
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*')  # Excel's first line
_ONE_COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ROWS_TRIED, _ALIKE = 50, 0.8


@dataclass(frozen=True, slots=True)
class Table:
    """The shape of a CSV file. `skip` lines stand before the header."""

    delimiter: str
    names: list[str]
    skip: int = 0


def table_of(lines: list[str]) -> Table | None:
    """The table that begins with these lines, None if they are no CSV.

    Either the header's names are as short and plain as names are, or the rows below have as many
    cells as it has; running text has neither.
    """
    skip = next((at for at, line in enumerate(lines) if line.strip()), 0)
    delimiters = _DELIMITERS
    if separator := _SEPARATOR_LINE.fullmatch(lines[skip]):
        delimiters, skip = separator[1], skip + 1
    best: tuple[bool, int, Table] | None = None
    for delimiter in delimiters:
        rows = _rows_tried(lines[skip:], delimiter)
        if not rows:
            continue
        names = [cell.strip() for cell in rows[0]]
        alike = [len(row) == len(names) for row in rows[1:]]
        is_even = len(names) > 1 and sum(alike) >= max(1, _ALIKE * len(alike))
        if any(names) and (is_even or separator or _is_plain(names)):
            found = is_even, len(names), Table(delimiter, names, skip)
            best = found if best is None or found[:2] > best[:2] else best
    return None if best is None else best[2]


def _rows_tried(lines: list[str], delimiter: str) -> list[list[str]]:
    """The header, and what of the first rows can be cut into cells."""
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    with suppress(csv.Error):
        rows.extend(row for row in islice(reader, _ROWS_TRIED) if row)
    return rows


def _is_plain(names: list[str]) -> bool:
    """Whether these can only be names of columns: short, and free of JSON's signs."""
    named = [name for name in names if name]  # pandas writes its index column without a name
    if any(len(name) > 64 or set('{}[]":') & set(name) for name in named):
        return False
    return len(named) > 1 or _ONE_COLUMN.fullmatch("".join(named)) is not None


def csv_rows(
    lines: Lines, encoding: str, table: Table, options: FileOptions
) -> Iterator[SourceRow | BadRow]:
    """The rows below the header; one of another width, or that is no CSV, is a BadRow."""
    csv.field_size_limit(2 * options.row_bytes)  # the lines have a limit of their own
    name, width = lines.name, len(table.names)
    is_plain = all(table.names) and len({*table.names}) == width
    # A map, unlike a generator, goes on after an error. The reader does not count such a line.
    texts = map(bytes.decode, iter(lines), repeat(encoding))
    for _ in range(table.skip):
        next(texts)
    reader = csv.reader(texts, delimiter=table.delimiter, strict=True)
    uncounted, is_header = table.skip, True
    while True:
        source = f"{name}:{reader.line_num + uncounted + 1}"
        lines.held = 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            uncounted += 1
            yield bad_bytes(source, encoding, error)
            continue
        except csv.Error as error:
            detail = f"not valid CSV: {error}; expected {width} cells"
            yield BadRow(source, "not valid CSV", detail)
            continue
        if not cells:
            continue
        if is_header:
            is_header = False
            continue
        if len(cells) != width:
            if len(cells) < width or any(cells[width:]):
                detail = f"{len(cells)} cells; expected {width}, as in the header line"
                yield BadRow(source, "wrong number of cells", detail)
                continue
            cells = cells[:width]  # delimiters at the end of the line
        row = dict(zip(table.names, cells, strict=True)) if is_plain else row_of(table.names, cells)
        yield SourceRow(row, source)


def row_of(names: list[str], cells: list[str]) -> dict[str, object]:
    """The cells of a row by the names of their columns; those without a name are left out.

    Columns of one name that say different things give a tuple, which is an error where a reader
    wants a text, and else is counted as not read.
    """
    row: dict[str, dict[str, None]] = {name: {} for name in names if name}
    for name, cell in zip(names, cells, strict=False):
        if name and cell:
            row[name][cell] = None
    return {k: tuple(said) if len(said) > 1 else next(iter(said), "") for k, said in row.items()}
