"""Source rows from files. The content decides how a file is read: most `.json` are JSON lines.

JSON is read in every arrangement (files_json.py), CSV with a header line (files_csv.py), parquet,
Arrow and Excel (files_tables.py); each plain, compressed, or inside a tar or zip archive
(files_packed.py). Text is UTF-8 or in another encoding (files_encoding.py). Only a row is ever in
memory as a whole, a packed file unfolds only so far, and both limits are options (limits.py).
"""

from __future__ import annotations

import re
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, cast

from qwen_ds.data.read import files_packed
from qwen_ds.data.read.containers import key_of_turns
from qwen_ds.data.read.file_names import (
    chosen_names,
    is_about_data,
    is_hidden,
    names_of_split,
    split_of,
    splits_among,
)
from qwen_ds.data.read.files_csv import csv_rows, table_of
from qwen_ds.data.read.files_encoding import encoding_of
from qwen_ds.data.read.files_json import (
    BadRow,
    SourceRow,
    iter_array,
    iter_lines,
    iter_objects,
    parsed,
    stands_alone,
)
from qwen_ds.data.read.files_tables import is_workbook, reader_of, workbook_sheets
from qwen_ds.data.read.files_text import AsUtf8, Lines, OneLineEnd, pieces
from qwen_ds.data.read.limits import (
    DEFAULT,
    Budget,
    Budgeted,
    FileOptions,
    LimitReached,
    Readable,
    Rewound,
)
from qwen_ds.errors import UserError

_HEAD_BYTES = 1 << 22
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_OPENS_ARRAY = re.compile(r'\[\s*(?:[\[{"\]\-0-9]|true|false|null|NaN|Infinity|\Z)')
_EXPECTED = "JSON, JSON lines, CSV with a header line, or parquet"
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe, which can be read only once",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


@dataclass(frozen=True, slots=True)
class _Content:
    """Bytes to read, with a name for messages: a file, or an archive's member."""

    name: str
    stream: Readable
    options: FileOptions
    file: IO[bytes] | None = None  # the stream itself where it can seek
    size: int = 0  # of the file that it comes from
    is_member: bool = False


def read_rows(path: str | Path, options: FileOptions = DEFAULT) -> Iterator[SourceRow | BadRow]:
    """The rows of one file in order; a BadRow says where and why one cannot be read.

    `source` is "file:line" of the row's first line, "file#index" (from 0) in parquet and Arrow,
    "file:sheet:line" in Excel, and begins with "file:member" in an archive. UserError if the file
    is missing, empty, damaged, of another type, or beyond a limit.
    """
    path = Path(path)
    require_file(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            yield from _rows(_Content(str(path), file, options, file=file, size=size))
    except LimitReached as error:
        raise UserError(str(error)) from error
    except OSError as error:  # includes damaged gzip data
        raise UserError(f"{path}: {error.strerror or error}; expected a readable file") from error
    except files_packed.damages() as error:
        raise UserError(f"{path}: damaged archive ({error}); expected {_EXPECTED}") from error


def require_file(path: Path) -> None:
    """Raise UserError unless the path is that of a regular file, perhaps through links."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        came = "no such file"
        if path.is_symlink():
            came = f"a link to {path.readlink()}, which is not there"
        raise UserError(f"{path}: {came}; expected a data file") from None
    except (OSError, ValueError) as error:  # links in a ring, a name with a zero byte
        what = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: {what}; expected a data file") from None
    if not stat.S_ISREG(mode):
        came = next((words for is_kind, words in _KINDS.items() if is_kind(mode)), "no file")
        raise UserError(f"{path}: {came}; expected a data file")


def _rows(content: _Content) -> Iterator[SourceRow | BadRow]:
    head = content.stream.read(_HEAD_BYTES)
    whole = Rewound(head, content.stream)
    packed = files_packed.unpacked(head, whole)
    if packed is not None:
        budget = Budget(content.name, content.size, content.options)
        content = replace(content, file=None)
        stream = Budgeted(packed, budget)
        head = stream.read(_HEAD_BYTES)
        whole = Rewound(head, stream)
    if head.startswith(_LFS_POINTER):
        raise UserError(f"{content.name}: a Git LFS pointer; expected the file: git lfs pull")
    is_tar, is_zip = files_packed.is_tar(head), files_packed.is_zip(head)
    table_rows = reader_of(head)
    if (is_tar or is_zip) and content.is_member:
        kind = "tar" if is_tar else "zip"
        raise UserError(f"{content.name}: a {kind} archive inside an archive; expected {_EXPECTED}")
    if not (is_tar or is_zip or table_rows):
        yield from _text_rows(content, head, whole)
        return
    with ExitStack() as stack:
        file = content.file or stack.enter_context(tempfile.TemporaryFile())
        if content.file is None:  # these need to seek
            shutil.copyfileobj(whole, cast(IO[bytes], file))
        file.seek(0)
        if table_rows is not None:
            yield from table_rows(file, content.name, content.options)
        else:
            yield from _archive_rows(replace(content, file=file), is_tar)


def _archive_rows(content: _Content, is_tar: bool) -> Iterator[SourceRow | BadRow]:
    assert content.file is not None
    name, options, file = content.name, content.options, content.file
    budget = Budget(name, content.size, options)

    def chosen(names: list[str]) -> list[str]:
        found = chosen_names(names)
        for left in sorted({*names} - {*found}):
            if not is_hidden(left) and not is_about_data(left):
                options.on_left_out(f"{name}:{left}", "no suffix of data")
        return _of_split(found, content)

    if is_tar:
        members = files_packed.tar_members(file, name, chosen, budget, options)
    else:
        archive = zipfile.ZipFile(file)
        if is_workbook(archive):
            for title, rows in workbook_sheets(
                archive, name, budget, lambda titles: _of_split(titles, content)
            ):
                yield from _marked(rows, title, options)
            return
        members = files_packed.zip_members(archive, name, chosen, budget, options)
    for member, stream in members:
        inside = _Content(f"{name}:{member}", stream, options, size=content.size, is_member=True)
        yield from _marked(_rows(inside), member, options)


def _of_split(names: list[str], content: _Content) -> list[str]:
    """The names, in a file, of what is read for the split that is asked; the others are told."""
    split, name = content.options.split, content.name
    wanted, left = names_of_split(names, split if splits_among(names) else None, name)
    for each, reason in left.items():
        content.options.on_left_out(f"{name}:{each}", reason)
    return wanted


def _marked(
    rows: Iterator[SourceRow | BadRow], name: str, options: FileOptions
) -> Iterator[SourceRow | BadRow]:
    """The rows of what is named so, and is read for the split that is asked, if any."""
    if options.split is None or split_of(name) is None:
        return rows
    return (r._replace(split=options.split) if isinstance(r, SourceRow) else r for r in rows)


def _is_conversation(line: str) -> bool:
    """Whether a line is a row by itself that has turns and no keys, not a whole array of rows."""
    try:
        return key_of_turns(parsed(line.strip().removesuffix(","))) is not None
    except (ValueError, RecursionError):
        return False


def _text_rows(content: _Content, head: bytes, stream: Readable) -> Iterator[SourceRow | BadRow]:
    name, options = content.name, content.options
    encoding = options.encoding
    if encoding == "auto":
        encoding = encoding_of(head, name, len(head) < _HEAD_BYTES)
    if encoding not in ("utf-8", "utf8"):
        options.on_encoding(name, encoding)
    if "\n".encode(encoding)[-1:] != b"\n" or len("\n".encode(encoding)) != 1:
        stream = AsUtf8(stream, name, encoding)
        head = stream.read(_HEAD_BYTES)
        stream, encoding = Rewound(head, stream), "utf-8"
    if b"\n" not in head and b"\r" in head:
        stream, head = OneLineEnd(stream), head.replace(b"\r", b"\n")
    lines = head.decode(encoding, "replace").lstrip("\ufeff").split("\n")
    first = next((line for line in lines if line.strip("\ufeff \t\r\n\f\v")), "").lstrip("\ufeff")
    if not first:
        raise UserError(f"{name}: the file is empty; expected {_EXPECTED}")
    opens = first.lstrip()[0]
    is_array = opens == "[" and _OPENS_ARRAY.match(first.strip())
    table = None if opens == "{" or is_array else table_of(lines)
    is_conversation = is_array and _is_conversation(first)
    if opens == "[" and table is None and not is_conversation:
        yield from iter_array(pieces(stream, name, encoding), name, options)
        return
    source = Lines(stream, name, options)
    if opens == "{" and not stands_alone(first):
        chunks = pieces(stream, name, encoding, "surrogateescape")
        yield from iter_objects(chunks, name, options, encoding)
    elif table is not None:
        yield from csv_rows(source, encoding, table, options)
    # JSON lines even if the first is broken: others may be whole.
    elif is_conversation or opens == "{" or any(line.startswith("{") for line in lines[:10]):
        yield from iter_lines(source, encoding)
    else:
        came = f"the text begins with {first.strip()[:40]!r}"
        number = next(at for at, line in enumerate(lines, 1) if line.strip("\ufeff \t\r\n\f\v"))
        raise UserError(f"{name}:{number}: {came}; expected {_EXPECTED}")
