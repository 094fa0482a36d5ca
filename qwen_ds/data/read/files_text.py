"""Text from bytes: lines and pieces of it, with a bound on what is in memory."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from io import BytesIO

from qwen_ds.data.read.limits import FileOptions, Readable
from qwen_ds.errors import UserError

_CHUNK_BYTES = 1 << 20


class Lines:
    """The lines of a stream as bytes with their line ends, the last one perhaps without.

    Attributes:
        number: of the line that came last, from 1.
        held: bytes read since a row was complete, about. The reader of rows sets it to 0; beyond
            the limit of a row LimitReached is raised.
    """

    def __init__(self, stream: Readable, name: str, options: FileOptions) -> None:
        self._stream, self._options, self.name = stream, options, name
        self.number = self.held = 0

    def __iter__(self) -> Iterator[bytes]:
        begun: list[bytes] = []  # pieces of a line that has not ended
        limit = self._options.row_bytes + _CHUNK_BYTES
        while chunk := self._stream.read(_CHUNK_BYTES):
            self.held += len(chunk)
            if self.held > limit:
                raise self._options.too_long(f"{self.name}:{self.number + 1}")
            end = chunk.rfind(b"\n") + 1
            if not end:
                begun.append(chunk)
                continue
            for line in BytesIO(b"".join([*begun, chunk[:end]])):
                self.number += 1
                yield line
            begun = [chunk[end:]]
        if last := b"".join(begun):
            self.number += 1
            yield last


class OneLineEnd:
    """A stream whose lines end in CR alone (old Macs, some spreadsheets), with LF instead."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream

    def read(self, size: int, /) -> bytes:
        return self._stream.read(size).replace(b"\r", b"\n")


class AsUtf8:
    """A stream in UTF-16 and the like, whose lines do not end in the byte of LF, as UTF-8."""

    def __init__(self, stream: Readable, name: str, encoding: str) -> None:
        self._stream, self._name, self._encoding = stream, name, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._read = 0

    def read(self, size: int, /) -> bytes:
        while data := self._stream.read(size):
            if text := self._decoded(data):
                return text.encode("utf-8", "surrogatepass")
            self._read += len(data)
        return self._decoded(b"").encode("utf-8", "surrogatepass")

    def _decoded(self, data: bytes) -> str:
        try:
            return self._decoder.decode(data, final=not data)
        except UnicodeError as error:
            raise UserError(
                f"{self._name}: not {self._encoding.upper()} text ({error}); expected text in one "
                "encoding"
            ) from error


def pieces(stream: Readable, name: str, encoding: str, errors: str = "strict") -> Iterator[str]:
    """The text of a stream in pieces; UserError with its line for an undecodable byte, unless
    `errors` is another of Python's ways."""
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    line = 1
    while True:
        raw = stream.read(_CHUNK_BYTES)
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise UserError(
                f"{name}:{line}: {undecodable(encoding, error)}; what follows in the array cannot "
                "be read"
            ) from error
        if text:
            yield text
        if not raw:
            return
        line += raw.count(b"\n")


def shown(encoding: str) -> str:
    return "UTF-8" if encoding == "utf-8" else encoding.upper()


def undecodable(encoding: str, error: UnicodeDecodeError) -> str:
    """A byte that is wrong in its encoding, in words."""
    byte = error.object[error.start]
    return f"byte 0x{byte:02x} is not {shown(encoding)}; expected text in one encoding"
