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
from dataclasses import dataclass
from pathlib import Path
from typing import IO

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
    "file:member:line" in an archive.

    Raises:
        UserError: a file that is missing, empty, damaged or of another type.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: {'a folder' if path.is_dir() else 'no such file'}; expected a data file"
        )
    try:
        yield from _rows(_Content(str(path), lambda: path.open("rb")))
    except OSError as error:  # includes damaged gzip data
        raise UserError(f"{path}: {error.strerror or error}; expected a readable file") from error
    except (EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{path}: damaged archive ({error}); expected {_EXPECTED}") from error


def chosen_names(names: Iterable[str]) -> list[str]:
    """The data files among the names of a folder or an archive, sorted.

    The suffix decides; if no name has a known one, all are taken.
    """
    seen = [name for name in names if not any(_is_hidden(part) for part in name.split("/"))]
    data = [name for name in seen if name.lower().endswith(DATA_SUFFIXES)]
    return sorted([name for name in data if Path(name).name not in _OF_DATASETS] or seen)


def _is_hidden(part: str) -> bool:
    return part == "__MACOSX" or (part.startswith(".") and part != ".")


def _rows(content: _Content) -> Iterator[SourceRow | BadRow]:
    head = _head(content)
    if head.startswith(_GZIP):
        packed = content
        content = _Content(packed.name, lambda: _Unzipped(packed.open()), packed.is_member)
        head = _head(content)
        if head.startswith(_PARQUET) or _is_tar(head):  # these need to seek
            with tempfile.TemporaryFile() as unpacked, content.open() as stream:
                shutil.copyfileobj(stream, unpacked)
                yield from _unpacked_rows(
                    _Content(content.name, lambda: unpacked, content.is_member), head
                )
            return
    yield from _unpacked_rows(content, head)


def _unpacked_rows(content: _Content, head: bytes) -> Iterator[SourceRow | BadRow]:
    if _is_tar(head) and not content.is_member:
        yield from _tar_rows(content)
    elif head.startswith(_PARQUET):
        yield from _parquet_rows(content)
    else:
        yield from _text_rows(content, head)


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
            number = lines.index(first) + 1
            raise UserError(
                f"{content.name}:{number}: the text begins with {first.strip()[:40]!r}; "
                f"expected {_EXPECTED}"
            )


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
    best: tuple[str, list[str]] | None = None
    for delimiter in _DELIMITERS:
        try:
            names = [
                name.strip() for name in next(csv.reader([line], delimiter=delimiter, strict=True))
            ]
        except csv.Error:
            continue
        if best is None or len(names) > len(best[1]):
            best = delimiter, names
    if best is None:
        return None
    named = [name for name in best[1] if name]  # pandas writes its index column without a name
    if (
        len(set(named)) < len(named)
        or not named
        or any(len(name) > 64 or set('{}[]":') & set(name) for name in named)
    ):
        return None
    return best if len(named) > 1 or _ONE_COLUMN.fullmatch(named[0]) else None


class _DecodedLines:
    """Lines of text from lines of bytes. Unlike a generator it goes on after a decoding error."""

    def __init__(self, stream: Iterable[bytes], encoding: str) -> None:
        self.stream, self.encoding, self.number = iter(stream), encoding, 0

    def __iter__(self) -> _DecodedLines:
        return self

    def __next__(self) -> str:
        raw = next(self.stream)
        self.number += 1
        return raw.decode(self.encoding)


def _csv_rows(
    stream: BinaryStream, name: str, encoding: str, delimiter: str, header: list[str]
) -> Iterator[SourceRow | BadRow]:
    csv.field_size_limit(_LONGEST_CELL)
    lines = _DecodedLines(stream, encoding)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    is_header = True
    while True:
        source = f"{name}:{lines.number + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            yield undecodable(source, encoding, error)
            continue
        except csv.Error as error:
            yield BadRow(
                source, "not valid CSV", f"not valid CSV: {error}; expected {len(header)} cells"
            )
            continue
        if not cells:
            continue
        if is_header:
            is_header = False
        elif len(cells) != len(header):
            detail = f"{len(cells)} cells; expected {len(header)}, as in the header line"
            yield BadRow(source, "wrong number of cells", detail)
        else:
            yield SourceRow(
                {key: cell for key, cell in zip(header, cells, strict=True) if key}, source
            )


def _parquet_rows(content: _Content) -> Iterator[SourceRow | BadRow]:
    import pyarrow
    import pyarrow.parquet

    with content.open() as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            index = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    yield SourceRow(row, f"{content.name}#{index}")
                    index += 1
        except pyarrow.ArrowException as error:
            first = str(error).splitlines()[0]
            raise UserError(
                f"{content.name}: damaged parquet file ({first}); expected parquet"
            ) from error


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


def _is_tar(head: bytes) -> bool:
    return head[_TAR_MARK_AT : _TAR_MARK_AT + len(_TAR_MARK)] == _TAR_MARK
