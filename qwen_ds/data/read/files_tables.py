"""Tables that are no text: parquet, Arrow (file and stream format), Excel."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime
from typing import IO, Any

from qwen_ds.data.read.files_arrow import unfolded_sizes
from qwen_ds.data.read.files_csv import row_of
from qwen_ds.data.read.files_json import BadRow, SourceRow, bad_bytes
from qwen_ds.data.read.files_packed import Chosen
from qwen_ds.data.read.limits import DEFAULT, Budget, FileOptions
from qwen_ds.errors import UserError

_ROWS_AT_ONCE = 1024
_ROWS_BYTES = 1 << 29  # of rows that are made from a batch together
PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_WORKBOOK = "xl/workbook.xml"


Rows = Iterator[SourceRow | BadRow]


def reader_of(head: bytes) -> Callable[[IO[bytes], str, FileOptions], Rows] | None:
    """The function that reads such a table, None for anything else."""
    if head.startswith(PARQUET):
        return parquet_rows
    if head.startswith(_ARROW_FILE) or head.startswith(_ARROW_STREAM):
        return arrow_rows
    return None


def parquet_rows(stream: IO[bytes], name: str, options: FileOptions) -> Rows:
    """The rows of a parquet file, "name#index" from 0. Texts that repeat are in memory once."""
    import pyarrow
    import pyarrow.parquet

    try:
        about = pyarrow.parquet.ParquetFile(stream)
        schema = about.schema
        _check_sizes(stream, name, options, _groups_of(about.metadata))
        texts = [c.path for c in map(schema.column, range(len(schema))) if c.physical_type == _TEXT]
        stream.seek(0)
        file = pyarrow.parquet.ParquetFile(stream, read_dictionary=texts)
        yield from numbered_rows(file.iter_batches(batch_size=_ROWS_AT_ONCE), name, options)
    except (pyarrow.ArrowException, OSError) as error:
        came = f"damaged parquet file ({str(error).splitlines()[0]})"
        raise UserError(f"{name}: {came}; expected parquet") from error


_TEXT = "BYTE_ARRAY"


def _groups_of(metadata: Any) -> Iterator[tuple[int, int]]:
    """(bytes once decompressed, rows) of each row group of a parquet file."""
    for at in range(metadata.num_row_groups):
        group = metadata.row_group(at)
        yield max(group.total_byte_size, 0), group.num_rows


def _check_sizes(
    stream: IO[bytes], name: str, options: FileOptions, parts: Iterable[tuple[int, int]]
) -> None:
    """Raise LimitReached before anything is decompressed that is beyond a limit."""
    budget = Budget(name, stream.seek(0, os.SEEK_END), options)
    index = 0
    for count, rows in parts:
        budget.spend(count)
        if count > rows * options.row_bytes and rows:
            raise options.too_long(f"{name}#{index}")
        index += rows
    stream.seek(0)


def arrow_rows(stream: IO[bytes], name: str, options: FileOptions) -> Rows:
    """The rows of an Arrow file in either format, "name#index" from 0."""
    import pyarrow

    try:
        _check_sizes(stream, name, options, ((size, 0) for size in unfolded_sizes(stream)))
        is_file = stream.read(len(_ARROW_FILE)) == _ARROW_FILE
        stream.seek(0)
        if is_file:
            file = pyarrow.ipc.open_file(stream)
            batches = (file.get_batch(at) for at in range(file.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(stream))
        yield from numbered_rows(batches, name, options)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        came = f"damaged Arrow file ({str(error).splitlines()[0]})"
        raise UserError(f"{name}: {came}; expected Arrow") from error


def numbered_rows(batches: Iterable[Any], name: str, options: FileOptions = DEFAULT) -> Rows:
    """The rows of pyarrow's batches or tables, "name#index" from 0."""
    index = 0
    for batch in batches:
        # A text of a dictionary counts once, however many rows repeat it: as rows they may take
        # far more than the batch, up to its size each.
        step = min(max(_ROWS_BYTES // max(batch.nbytes, 1), 1), _ROWS_AT_ONCE)
        may_be_long = batch.nbytes > options.row_bytes
        step = 1 if may_be_long else step
        for start in range(0, batch.num_rows, step):
            part = batch.slice(start, step)
            if may_be_long and _bytes_of(part) > options.row_bytes:
                raise options.too_long(f"{name}#{index}")
            for row in _values(part):
                source = f"{name}#{index}"
                if isinstance(row, UnicodeDecodeError):
                    yield bad_bytes(source, "utf-8", row)
                else:
                    yield SourceRow(row, source)
                index += 1


def _values(part: Any) -> list[Any]:
    """The rows of a slice; instead of one whose text is no UTF-8, the error."""
    try:
        return list(part.to_pylist())
    except UnicodeDecodeError as error:
        if part.num_rows == 1:
            return [error]
        return [row for at in range(part.num_rows) for row in _values(part.slice(at, 1))]


def _bytes_of(row: Any) -> int:
    """Bytes of a single row; of dictionaries, those of the texts that it refers to."""
    import pyarrow

    return sum(
        len(column[0].as_py() or "") if pyarrow.types.is_dictionary(column.type) else column.nbytes
        for column in row.columns
    )


def is_workbook(archive: zipfile.ZipFile) -> bool:
    return _WORKBOOK in archive.namelist()


def workbook_sheets(
    archive: zipfile.ZipFile, name: str, budget: Budget, chosen: Chosen
) -> Iterator[tuple[str, Iterator[SourceRow]]]:
    """The title of every chosen sheet, and its rows below the first line, "name:sheet:line".

    A cell is text, as a CSV file would have it.
    """
    import openpyxl

    budget.spend(sum(info.file_size for info in archive.infolist()))
    try:
        assert archive.fp is not None
        book = openpyxl.load_workbook(archive.fp, read_only=True, data_only=True, keep_links=False)
    # The library raises all kinds of errors for damaged or foreign XML.
    except Exception as error:
        raise _damaged(name, error) from error
    sheets = {sheet.title: sheet for sheet in book.worksheets}
    for title in chosen(list(sheets)):
        yield title, _sheet_rows(sheets[title], f"{name}:{title}")


def _sheet_rows(sheet: Any, name: str) -> Iterator[SourceRow]:
    sheet.reset_dimensions()  # what the file says of them may be wrong
    rows = enumerate(sheet.iter_rows(values_only=True), 1)
    names: list[str] | None = None
    while True:
        try:
            number, cells = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _damaged(name, error) from error
        texts = [_text(cell) for cell in cells]
        if not any(texts):
            continue
        if names is None:
            names = [text.strip() for text in texts]
            continue
        texts += [""] * (len(names) - len(texts))
        if any(texts[len(names) :]):
            raise UserError(
                f"{name}:{number}: {len(texts)} cells; expected {len(names)}, as in the header line"
            )
        yield SourceRow(row_of(names, texts), f"{name}:{number}")


def _text(cell: object) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, datetime) and not (cell.hour or cell.minute or cell.second):
        return cell.date().isoformat()
    return (
        cell.isoformat(*[" "] * isinstance(cell, datetime)) if isinstance(cell, date) else f"{cell}"
    )


def _damaged(name: str, error: Exception) -> UserError:
    what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return UserError(f"{name}: damaged Excel file ({what}); expected a workbook")
