"""The size of an Arrow file's batches once decompressed, from its headers alone.

pyarrow decompresses a batch before anything can be asked about it. A compressed buffer begins with
its true length, and the message before it, a flatbuffer, says where it lies.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import IO

_MARK, _FILE_MARK = 0xFFFFFFFF, b"ARROW1\0\0"
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_MOST_HEADER_BYTES = 1 << 26


def unfolded_sizes(stream: IO[bytes]) -> Iterator[int]:
    """The bytes of each compressed batch or dictionary. ValueError for a file that is damaged."""
    try:
        stream.seek(0)
        at = len(_FILE_MARK) if stream.read(len(_FILE_MARK)) == _FILE_MARK else 0
        while True:
            stream.seek(at)
            first = stream.read(8)
            if len(first) < 8:
                return
            mark, size = struct.unpack("<II", first)
            if mark != _MARK:  # before Arrow 0.15
                mark, size = 0, mark
            if not size:
                return
            if size > _MOST_HEADER_BYTES:
                raise ValueError(f"a header of {size:,} bytes")
            begin = at + (8 if mark else 4)
            stream.seek(begin)
            message = _Flat(stream.read(size))
            body_bytes = message.number(message.root, 3, "<q")
            if body_bytes < 0:
                raise ValueError("a batch of less than no bytes")
            yield sum(_lengths(stream, message, begin + size))
            at = begin + size + body_bytes
    except struct.error as error:
        raise ValueError("a header that leads outside itself") from error


class _Flat:
    """A flatbuffer; a table is its place."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.root = self.read("<I", 0)

    def read(self, kind: str, at: int) -> int:
        if at < 0:
            raise struct.error
        return int(struct.unpack_from(kind, self.data, at)[0])

    def field(self, table: int, slot: int) -> int:
        """The place of a table's field, 0 if it has none."""
        entries = table - self.read("<i", table)
        if 4 + 2 * slot >= self.read("<H", entries):
            return 0
        offset = self.read("<H", entries + 4 + 2 * slot)
        return table + offset if offset else 0

    def number(self, table: int, slot: int, kind: str) -> int:
        at = self.field(table, slot)
        return self.read(kind, at) if at else 0

    def follow(self, table: int, slot: int) -> int:
        """The table or vector that a field refers to, 0 if there is none."""
        at = self.field(table, slot)
        return at + self.read("<I", at) if at else 0


def _lengths(stream: IO[bytes], message: _Flat, body: int) -> Iterator[int]:
    """The true lengths of a message's buffers, if they are compressed."""
    kind = message.number(message.root, 1, "<B")
    batch = message.follow(message.root, 2)
    if kind == _DICTIONARY_BATCH:
        batch = message.follow(batch, 1)
    if kind not in (_DICTIONARY_BATCH, _RECORD_BATCH) or not message.follow(batch, 3):
        return
    buffers = message.follow(batch, 2)
    for place in range(message.read("<I", buffers)):
        offset, length = (message.read("<q", buffers + 4 + 16 * place + 8 * i) for i in (0, 1))
        if length >= 8:
            stream.seek(body + offset)
            yield max(struct.unpack("<q", stream.read(8))[0], 0)
