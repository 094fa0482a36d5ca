"""Compressed files and archives, unfolded piece by piece under a budget."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar, cast

from qwen_ds.data.read.limits import MB, Budget, Budgeted, FileOptions, LimitReached, Readable
from qwen_ds.errors import UserError

_XZ_MEMORY = 256 * MB  # its header may ask for 4 GB
_ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2}
_TAR_MARK, _TAR_MARK_AT = b"ustar", 257
_ZIP_MARKS = b"PK\x03\x04", b"PK\x05\x06"  # the second opens an empty archive


def _gzip(stream: Readable) -> Readable:
    return gzip.GzipFile(fileobj=cast(IO[bytes], stream))


def _bzip2(stream: Readable) -> Readable:
    return bz2.BZ2File(cast(IO[bytes], stream))


def _zstd(stream: Readable) -> Readable:
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(
        cast(IO[bytes], stream), read_across_frames=True
    )


class _Xz:
    """An xz stream with a bound on the decoder's memory, which LZMAFile has not."""

    def __init__(self, packed: Readable) -> None:
        self._packed, self._input, self._decoder = packed, b"", self._new()

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=_XZ_MEMORY)

    def read(self, size: int, /) -> bytes:
        while True:
            if self._decoder.eof:  # another stream may follow, after padding with zeros
                self._input = self._decoder.unused_data.lstrip(b"\0")
                while not self._input:
                    more = self._packed.read(1 << 16)
                    if not more:
                        return b""
                    self._input = more.lstrip(b"\0")
                self._decoder = self._new()
            if self._decoder.needs_input and not self._input:
                self._input = self._packed.read(1 << 16)
                if not self._input:
                    raise EOFError("the file ends before its end-of-stream mark")
            data = self._decoder.decompress(self._input, size)
            self._input = b""
            if data:
                return data


_COMPRESSED: dict[bytes, Callable[[Readable], Readable]] = {
    b"\x1f\x8b": _gzip,
    b"BZh": _bzip2,
    b"\xfd7zXZ\0": _Xz,
    b"\x28\xb5\x2f\xfd": _zstd,
}


def unpacked(head: bytes, stream: Readable) -> Readable | None:
    """The stream decompressed, None if its first bytes are of no compression that is known."""
    opener = next((o for magic, o in _COMPRESSED.items() if head.startswith(magic)), None)
    return None if opener is None else opener(stream)


def damages() -> tuple[type[Exception], ...]:
    """The errors of a damaged packed file."""
    import zstandard

    return (
        EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile,
        zstandard.ZstdError,
    )  # fmt: skip


def is_tar(head: bytes) -> bool:
    return head.startswith(_TAR_MARK, _TAR_MARK_AT)


def is_zip(head: bytes) -> bool:
    return head.startswith(_ZIP_MARKS)


class _Headers:
    """A tar archive's stream, of which no header is read that does not fit into a row."""

    def __init__(self, stream: IO[bytes], name: str, options: FileOptions) -> None:
        self._stream, self._name, self._options = stream, name, options
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= self._options.row_bytes:
            raise LimitReached(
                f"{self._name}: a header of {size:,} bytes in the archive; expected at most "
                f"{self._options.max_row_mb} MB (data.max_row_mb)"
            )
        return self._stream.read(size)


Member = tuple[str, Readable]
Entry = TypeVar("Entry")
Chosen = Callable[[list[str]], list[str]]


def _last_of_each(
    members: list[tuple[str, Entry]], name: str, options: FileOptions
) -> dict[str, Entry]:
    """The members by their names; of equal names the last, as any program unpacks them."""
    found = dict(members)
    if len(found) < len(members):
        for each, entry in members:
            if found[each] is not entry:
                options.on_left_out(f"{name}:{each}", "a later file of this name replaces it")
    return found


def tar_members(
    stream: IO[bytes], name: str, chosen: Chosen, budget: Budget, options: FileOptions
) -> Iterator[Member]:
    """The chosen files of a tar archive, by name."""
    careful = cast(IO[bytes], _Headers(stream, name, options))
    with tarfile.open(fileobj=careful) as archive:
        members = _last_of_each(
            [(each.name, each) for each in archive if each.isreg()], name, options
        )
        for each in chosen(list(members)):
            inside = archive.extractfile(members[each])
            assert inside is not None, "only regular members are chosen"
            yield each, Budgeted(inside, budget)


def zip_members(
    archive: zipfile.ZipFile, name: str, chosen: Chosen, budget: Budget, options: FileOptions
) -> Iterator[Member]:
    """The chosen files of a zip archive, by name."""
    infos = [(info.filename, info) for info in archive.infolist() if not info.is_dir()]
    members = _last_of_each(infos, name, options)
    for each in chosen(list(members)):
        info = members[each]
        if info.flag_bits & 1:
            raise UserError(f"{name}:{each}: encrypted; expected an archive without a password")
        if info.compress_type not in _ZIP_METHODS:
            raise UserError(
                f"{name}:{each}: packed by method {info.compress_type}; expected deflate or bzip2"
            )
        with archive.open(info) as inside:
            yield each, Budgeted(cast(Any, inside), budget)
