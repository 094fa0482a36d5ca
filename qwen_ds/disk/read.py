"""Small files, read on no trust: regular files only, of bounded size, UTF-8, one JSON object."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qwen_ds.errors import UserError

# The largest that is right is a Qwen2's tokenizer.json, 11 MB. Parsed, JSON takes 30 times as much.
MAX_BYTES = 32 * 2**20
_LFS_POINTER = b"version https://git-lfs"
_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading, without ever waiting. OSError for anything else."""
    # Looked at before it is opened, since opening alone may act on a device; and once more after
    # that, since another file may have got the name. O_NONBLOCK: a FIFO would wait for a writer.
    _require_regular(os.stat(path), path)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        _require_regular(os.fstat(file.fileno()), path)
        yield file


def _require_regular(about: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(about.st_mode):
        kind = _KINDS.get(stat.S_IFMT(about.st_mode), "of an unknown kind")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))


def refuse_lfs_pointer(path: Path, beginning: bytes) -> None:
    """Raise UserError where a clone without Git LFS left a pointer in place of a file."""
    if beginning.startswith(_LFS_POINTER):
        raise UserError(
            f"{path}: a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
        )


def read_bytes(path: Path, limit: int = MAX_BYTES, expected: str = "a regular file") -> bytes:
    """The whole of a regular file. UserError: it cannot be read, is larger than `limit` bytes, or
    is a Git LFS pointer; `expected` ends the message."""
    try:
        return _take(path, limit)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; expected {expected}") from None


def _take(path: Path, limit: int) -> bytes:
    with open_regular(path) as file:
        # One byte more tells a file that is too long from one that fits, whatever its size says:
        # it may grow, and what /proc holds has none.
        raw = file.read(limit + 1)
    refuse_lfs_pointer(path, raw)
    if len(raw) > limit:
        raise OSError(errno.EFBIG, f"more than {limit / 2**20:g} MiB", str(path))
    return raw


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """A file's text in UTF-8. UserError as `read_bytes`, and for another encoding."""
    raw = read_bytes(path, limit, "a text file in UTF-8")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {error}; expected a text file in UTF-8") from None


def parse_json(raw: bytes) -> Any:
    """The value that JSON in UTF-8 spells. ValueError: it is not JSON, is nested too deeply, or
    gives a key twice, of which each reader would take another."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name[:100]!r} comes twice")
            seen.add(name)
    return found


def json_object(path: Path, raw: bytes) -> dict[str, Any]:
    """The JSON object in the bytes of a file; UserError names the file (see `parse_json`)."""
    try:
        found = parse_json(raw)
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error}); expected an object") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: a JSON {type(found).__name__}; expected an object")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The file's object. UserError: missing, no regular file, too large, a Git LFS pointer, not
    UTF-8, not JSON, nested too deeply, a key twice, or no object."""
    try:
        raw = _take(path, MAX_BYTES)
    except OSError as error:
        came = f"not readable as JSON ({error.strerror or error})"
        raise UserError(f"{path}: {came}; expected an object") from None
    return json_object(path, raw)
