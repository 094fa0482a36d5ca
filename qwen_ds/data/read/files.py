"""Source rows from files. The content decides how a file is read: most `.json` are JSON lines.

JSON is read in every arrangement (files_json.py), CSV with a header line, and parquet; each plain,
as `.gz`, or inside a tar archive. Text is UTF-8, with or without a byte order mark, or GB18030.
Only a top-level JSON object is ever in memory as a whole.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import IO, Any

from qwen_ds.data.read.files_json import (
    BadRow,
    SourceRow,
    iter_array,
    iter_lines,
    iter_objects,
    stands_alone,
    undecodable,
)
from qwen_ds.errors import UserError

DATA_SUFFIXES = tuple(".json .jsonl .jsonlines .ndjson .csv .tsv .parquet .gz .tgz .tar".split())
_HIDDEN = re.compile(r"(?:\A|/)(?:__MACOSX|\.[^/]+)(?:/|\Z)")
_OF_DATASETS = ("dataset_infos.json", "dataset_info.json", "state.json")

_HEAD_BYTES = 1 << 22
_CHUNK_BYTES = 1 << 20
_PARQUET_ROWS = 1024
_GZIP, _PARQUET, _TAR_MARK, _TAR_MARK_AT = b"\x1f\x8b", b"PAR1", b"ustar", 257
_FOREIGN = {
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
    b"BZh": "compressed with bzip2: unpack it first",
    b"\xfd7zXZ": "compressed with xz: unpack it first",
    b"ARROW1": "an Arrow file: give the folder that load_from_disk reads",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}
BinaryStream = IO[bytes] | gzip.GzipFile
_DELIMITERS = ",\t;|"
_LONGEST_CELL = 1 << 26  # characters; csv's own limit of 131,072 is less than a long document
_ONE_COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_EXPECTED = "JSON, JSON lines, CSV with a header line, or parquet"


@dataclass(frozen=True, slots=True)
class _Content:
    """Bytes to read, with a name for messages: a file, a decompressed .gz, an archive's member."""

    name: str
    open: Callable[[], BinaryStream]
    is_member: bool = False


def read_rows(path: str | Path) -> Iterator[SourceRow | BadRow]:
    """The rows of one file in order; a BadRow says where and why one cannot be read.

    `source` is "file:line" of the row's first line, "file#index" (from 0) in parquet, and
    "file:member:line" in an archive. UserError if the file is missing, empty, damaged or of another
    type.
    """
    path = Path(path)
    if not path.is_file():
        came = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {came}; expected a data file")
    try:
        yield from _rows(_Content(str(path), lambda: path.open("rb")))
    except OSError as error:  # includes damaged gzip data
        raise UserError(f"{path}: {error.strerror or error}; expected a readable file") from error
    except (EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{path}: damaged archive ({error}); expected {_EXPECTED}") from error


def chosen_names(names: Iterable[str]) -> list[str]:
    """The data files among the names of a folder or an archive, sorted: those with a known suffix,
    or all if there are none."""
    seen = [name for name in names if not _HIDDEN.search(name)]
    data = [name for name in seen if name.lower().endswith(DATA_SUFFIXES)]
    return sorted([name for name in data if Path(name).name not in _OF_DATASETS] or seen)


def _rows(content: _Content) -> Iterator[SourceRow | BadRow]:
    plain, head = content, _head(content)
    if head.startswith(_GZIP):
        plain = replace(content, open=lambda: _Unzipped(content.open()))
        head = _head(plain)
    is_tar, is_parquet = head.startswith(_TAR_MARK, _TAR_MARK_AT), head.startswith(_PARQUET)
    with ExitStack() as stack:
        if plain is not content and (is_tar or is_parquet):  # these need to seek
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            with plain.open() as stream:
                shutil.copyfileobj(stream, unpacked)
            plain = replace(content, open=lambda: unpacked)
        if is_tar and not content.is_member:
            yield from _tar_rows(plain)
        elif is_parquet:
            yield from _parquet_rows(plain)
        else:
            yield from _text_rows(plain, head)


def _text_rows(content: _Content, head: bytes) -> Iterator[SourceRow | BadRow]:
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise UserError(f"{content.name}: {what}; expected {_EXPECTED}")
    encoding = encoding_of(head)
    lines = head.decode(encoding, "replace").lstrip("\ufeff").split("\n")
    first = next((line for line in lines if line.strip()), "")
    if not first:
        raise UserError(f"{content.name}: the file is empty; expected {_EXPECTED}")
    opens = first.lstrip()[0]
    header = None if opens in "{[" else _csv_header(first)
    with content.open() as stream:
        if opens == "[":
            yield from iter_array(_decoded(stream, content.name, encoding), content.name)
        elif opens == "{" and not stands_alone(first):
            yield from iter_objects(stream, content.name, encoding)
        elif header is not None:
            yield from _csv_rows(stream, content.name, encoding, *header)
        # JSON lines even if the first is broken: others may be whole.
        elif opens == "{" or any(line.startswith("{") for line in lines[:10]):
            yield from iter_lines(stream, content.name, encoding)
        else:
            came = f"the text begins with {first.strip()[:40]!r}"
            line = lines.index(first) + 1
            raise UserError(f"{content.name}:{line}: {came}; expected {_EXPECTED}")


def encoding_of(head: bytes) -> str:
    """Choose utf-8 or gb18030 by the first megabytes of a file.

    UTF-8, unless more characters are malformed in it than well formed, and fewer in GB18030. So one
    damaged byte does not turn a UTF-8 file into wrong characters: its line is reported.
    """
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _HEAD_BYTES)
    except UnicodeDecodeError:
        as_utf8 = head.decode("utf-8", "replace")
        wrong = as_utf8.count("\ufffd")
        right = sum(char > "\x7f" for char in as_utf8) - wrong
        if wrong > right and head.decode("gb18030", "replace").count("\ufffd") < wrong:
            return "gb18030"
    return "utf-8"


def _decoded(stream: BinaryStream, name: str, encoding: str) -> Iterator[str]:
    """The text of a stream in pieces; UserError with its line for an undecodable byte."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    while True:
        raw = stream.read(_CHUNK_BYTES)
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            fault = undecodable(f"{name}:{line}", encoding, error)
            raise UserError(
                f"{fault.source}: {fault.detail}; what follows in the array cannot be read"
            ) from error
        if text:
            yield text
        if not raw:
            return
        line += raw.count(b"\n")


def _csv_header(line: str) -> tuple[str, list[str]] | None:
    """(delimiter, column names) of a line that can be a CSV header, None for any other.

    A header's names are short, distinct and free of JSON's signs, unlike running text.
    """
    delimiter, names = "", list[str]()
    for each in _DELIMITERS:
        with suppress(csv.Error):
            cells = next(csv.reader([line], delimiter=each, strict=True))
            if len(cells) > len(names):
                delimiter, names = each, [cell.strip() for cell in cells]
    named = [name for name in names if name]  # pandas writes its index column without a name
    is_header = (
        len(set(named)) == len(named)
        and not any(len(name) > 64 or set('{}[]":') & set(name) for name in named)
        and (len(named) > 1 or _ONE_COLUMN.fullmatch("".join(named)))
    )
    return (delimiter, names) if is_header else None


def _csv_rows(
    stream: BinaryStream, name: str, encoding: str, delimiter: str, header: list[str]
) -> Iterator[SourceRow | BadRow]:
    csv.field_size_limit(_LONGEST_CELL)
    # A map, unlike a generator, goes on after an error. The reader does not count such a line.
    lines = map(bytes.decode, stream, repeat(encoding))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    undecoded, is_header = 0, True
    while True:
        source = f"{name}:{reader.line_num + undecoded + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            undecoded += 1
            yield undecodable(source, encoding, error)
            continue
        except csv.Error as error:
            detail = f"not valid CSV: {error}; expected {len(header)} cells"
            yield BadRow(source, "not valid CSV", detail)
            continue
        if not cells:
            continue
        if is_header:
            is_header = False
        elif len(cells) != len(header):
            detail = f"{len(cells)} cells; expected {len(header)}, as in the header line"
            yield BadRow(source, "wrong number of cells", detail)
        else:
            row = {key: cell for key, cell in zip(header, cells, strict=True) if key}
            yield SourceRow(row, source)


def _parquet_rows(content: _Content) -> Iterator[SourceRow | BadRow]:
    import pyarrow
    import pyarrow.parquet

    with content.open() as stream:
        try:
            batches = pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=_PARQUET_ROWS)
            yield from numbered_rows(batches, content.name)
        except pyarrow.ArrowException as error:
            came = f"damaged parquet file ({str(error).splitlines()[0]})"
            raise UserError(f"{content.name}: {came}; expected parquet") from error


def numbered_rows(batches: Iterable[Any], name: str) -> Iterator[SourceRow]:
    """The rows of pyarrow's batches or tables, "name#index" from 0."""
    rows = (row for batch in batches for row in batch.to_pylist())
    return (SourceRow(row, f"{name}#{index}") for index, row in enumerate(rows))


def _tar_rows(content: _Content) -> Iterator[SourceRow | BadRow]:
    with content.open() as stream:
        stream.seek(0)
        with tarfile.open(fileobj=stream) as archive:
            members = {member.name: member for member in archive if member.isreg()}
            for name in chosen_names(members):

                def opened(member: tarfile.TarInfo = members[name]) -> IO[bytes]:
                    inside = archive.extractfile(member)
                    assert inside is not None, "only regular members are chosen"
                    return inside

                yield from _rows(_Content(f"{content.name}:{name}", opened, is_member=True))


class _Unzipped(gzip.GzipFile):
    """A gzip stream that closes what it reads from, which GzipFile leaves open."""

    def __init__(self, packed: IO[bytes] | gzip.GzipFile) -> None:
        super().__init__(fileobj=packed)
        self.packed = packed

    def close(self) -> None:
        super().close()
        self.packed.close()


def _head(content: _Content) -> bytes:
    with content.open() as stream:
        return stream.read(_HEAD_BYTES)
