"""The cache of token rows: one file for each set of inputs, named by a hash and never changed.

The hash covers everything that a row depends on: the bytes of the input files and their names (rows
name their file:line), the options, the vocabulary, and the code that reads and encodes. So a
changed input never finds an old file, and nothing has to be cleared by hand. A file that is
damaged, or is not that of its name, is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_ds.data.read.places import Place, locate, rows_of
from qwen_ds.data.read.sources import NotRead, iter_conversations
from qwen_ds.data.rows.data_report import PartReport
from qwen_ds.data.rows.encode import EncodeOptions
from qwen_ds.data.rows.reading import formats_of, read_options
from qwen_ds.data.rows.row_file import FORMAT_VERSION, RowWriter, cache_errors, fault
from qwen_ds.data.rows.workers import encode_all
from qwen_ds.disk.lock import kernel_lock
from qwen_ds.disk.place import cache_home
from qwen_ds.disk.write import replacing
from qwen_ds.errors import UserError
from qwen_ds.model import chatml, tokenizer
from qwen_ds.model.tokenizer import Encoding
from qwen_ds.recipe.options import DataOptions
from qwen_ds.runlog import say


def make_or_find(
    data: DataOptions,
    paths: Sequence[str],
    encoding: Encoding,
    options: EncodeOptions,
    every_byte: bool = True,
) -> Path:
    """Return the cache file with the token rows of some paths; make it if it is missing or damaged.

    Any number of processes may call this at once: one on each machine makes the rows, others wait.
    UserError: a row or a data set that cannot be trained on, or a cache that cannot be written.
    """
    key = _key(data, [locate(path) for path in paths], options, encoding.sha256)
    cache = Path(data.cache_dir) if data.cache_dir else cache_home() / "rows"
    path = cache / f"{key}.arrow"
    if fault(path, key, every_byte) is None:
        return path
    with contextlib.ExitStack() as stack:
        with cache_errors(cache):
            cache.mkdir(parents=True, exist_ok=True)
            is_held = stack.enter_context(_lock(cache / f"{key}.lock"))
            found = fault(path, key, every_byte)
            if found is None:
                return path
            if os.path.lexists(path):
                _make_room(path, found)
            if is_held:  # so whatever is here is the remains of a killed process
                for left in cache.glob(f".{path.name}.*"):
                    left.unlink()
        # Without a lock several processes may make the file at once, each under a name of its own.
        unfinished = stack.enter_context(replacing(path, owner=str(os.getpid())))
        _fill(unfinished, key, data, paths, encoding, options)
        with cache_errors(cache):
            stack.close()
    return path


def _make_room(path: Path, found: str) -> None:
    """Say that the rows are made again. A rename then replaces what lies there."""
    if path.is_dir() and not path.is_symlink():
        raise UserError(f"{path}: a folder; expected room for the token rows (data.cache_dir)")
    say(f"{path}: {found}; the token rows are made anew")


def _key(
    data: DataOptions, parts: Sequence[Place], options: EncodeOptions, vocabulary_sha256: str
) -> str:
    decisive = {
        "format_version": FORMAT_VERSION,
        "code": _code_sha256(),
        "vocabulary": vocabulary_sha256,
        "options": asdict(options),
        "reading": [data.format, data.columns, data.bad_rows]
        + [data.encoding, data.max_row_mb, data.max_expansion],
        "inputs": [_input_sha256(part) for part in parts],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _code_sha256() -> str:
    """Hash of the modules that make rows: rows cached before a bug fix must not hide it."""
    room = Path(__file__).parents[1]
    # The doctor looks at rows and makes none.
    files = [path for path in sorted(room.rglob("*.py")) if room / "doctor" not in path.parents]
    files += [Path(chatml.__file__), Path(tokenizer.__file__)]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def _input_sha256(part: Place) -> list[Any]:
    """The name of a data set, and a hash of each of its files or, on the hub, of its rows."""
    if part.hub_id is not None:
        digest = hashlib.sha256()
        for row in rows_of(part):
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
        return [part.path, digest.hexdigest()]
    files = list(part.files)
    if part.saved is not None:
        files = sorted(path for path in part.saved.rglob("*") if path.is_file())
    found: list[Any] = [part.path, part.split]
    for file in files:
        try:
            stat = file.stat()
            found += [str(file), _file_sha256(file, stat.st_size, stat.st_mtime_ns)]
        except OSError as error:
            what = f"{file}: {error.strerror or error}; expected a readable file"
            raise UserError(what) from error
    return found


@lru_cache(maxsize=4096)
def _file_sha256(path: Path, size: int, changed_ns: int) -> str:
    """Hash a file, once for each size and time of change: a run asks more than once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a lock among the processes of this machine; the kernel frees it if we die.

    Yields False where the file system has no locks.
    """
    # Reading is enough for a lock, and for the file of another user who shares the cache.
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NONBLOCK, 0o644)
    try:
        yield kernel_lock(descriptor, wait=True) is True
    finally:
        os.close(descriptor)


def _fill(
    file: Path,
    key: str,
    data: DataOptions,
    paths: Sequence[str],
    encoding: Encoding,
    options: EncodeOptions,
) -> None:
    """Read, encode and write the rows of all paths, and check that each can be trained on."""
    parts: list[tuple[PartReport, Counter[str]]] = [(PartReport(path), Counter()) for path in paths]
    not_read: list[NotRead] = [{} for _ in paths]
    streams = [
        (part, iter_conversations([part.path], read_options(data, part), count, unread))
        for (part, count), unread in zip(parts, not_read, strict=True)
    ]
    with RowWriter(file) as writer:
        # Shown on a terminal only, and not for a small data set that takes a moment.
        with tqdm(desc="tokenising", unit=" rows", disable=None, delay=3, mininterval=0.5) as bar:
            encode_all(streams, writer, encoding, options, bar.update)
        for (report, count), unread in zip(parts, not_read, strict=True):
            report.read = count["rows"]
            report.not_read = dict(sum(unread.values(), Counter()).most_common())
            report.formats = formats_of(data, locate(report.path))
            report.check()
        writer.finish(
            {
                "key": key,
                "pad_id": encoding.eod_id,
                "vocabulary_sha256": encoding.sha256,
                "options": {**asdict(options), "format": data.format, "columns": data.columns},
                "data_sets": [report.to_dict() for report, _ in parts],
            }
        )
