"""The cache of token rows: a folder for each set of inputs, named by a hash, made once and never changed.

The hash covers everything that decides a row: the bytes of the input files and their names (rows name their
file:line), the options, the vocabulary, and the code that reads and encodes. So a changed input never meets an old
folder, and nothing has to be cleared by hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qwen_ds.data.read.dialogue import RowError
from qwen_ds.data.read.files import SourceRow
from qwen_ds.data.read.readers import find_reader
from qwen_ds.data.read.sources import Place, iter_conversations, locate, rows_of
from qwen_ds.data.rows.blocks import Block
from qwen_ds.data.rows.data_report import PartReport
from qwen_ds.data.rows.encode import EncodeOptions
from qwen_ds.data.rows.workers import default_workers
from qwen_ds.data.rows.writer import FORMAT_VERSION, ROW, ROWS_FILE, RowWriter, encode_all, is_whole
from qwen_ds.errors import UserError
from qwen_ds.model import chatml, tokenizer
from qwen_ds.recipe.options import DataOptions

DEFAULT_CACHE = "~/.cache/qwen_ds/rows"


def make_or_find(
    data: DataOptions,
    paths: Sequence[str],
    model_dir: Path,
    options: EncodeOptions,
    n_workers: int | None = None,
) -> Path:
    """The cache folder with the token rows of some paths, made first where it is missing or damaged.

    Any number of processes may call this at once: one of a machine makes the rows, the others wait for it. A folder is
    made beside its place and renamed when it is complete, so one that was broken off is never seen.

    Args:
        n_workers: processes that encode; None means one per core, 0 none besides this one.

    Raises:
        UserError: a row or a data set that cannot be trained on, or a cache that cannot be written.
    """
    vocabulary = tokenizer.load_encoding(model_dir)
    parts = [locate(path) for path in paths]
    key = _key(data, parts, options, vocabulary.sha256)
    cache = Path(data.cache_dir or DEFAULT_CACHE).expanduser()
    folder = cache / key
    if is_whole(folder):
        return folder
    with contextlib.ExitStack() as stack:
        with _writing(cache):
            cache.mkdir(parents=True, exist_ok=True)
            is_held = stack.enter_context(_lock(cache / f"{key}.lock"))
        if not is_whole(folder):
            _make(folder, is_held, data, paths, model_dir, options, n_workers)
    return folder


@contextlib.contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """What the system says in here, it says of the cache."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{cache}: {error.strerror or error}; expected a folder that can be written, with room for the tokenised "
            "rows (data.cache_dir)"
        ) from error


class _CacheWriter(RowWriter):
    """A RowWriter that names the cache when the disk does not take a row."""

    def __init__(self, folder: Path) -> None:
        with _writing(folder.parent):
            super().__init__(folder)

    def add(self, block: Block, sources: Sequence[str], part: int, report: PartReport) -> None:
        with _writing(self.folder.parent):
            super().add(block, sources, part, report)

    def finish(self, meta: dict[str, Any]) -> None:
        with _writing(self.folder.parent):
            super().finish(meta)

    def close(self) -> None:
        with _writing(self.folder.parent):
            super().close()


def _key(
    data: DataOptions, parts: Sequence[Place], options: EncodeOptions, vocabulary_sha256: str
) -> str:
    decisive = {
        "format_version": FORMAT_VERSION,
        "code": _code_sha256(),
        "vocabulary": vocabulary_sha256,
        "options": dataclasses.asdict(options),
        "reading": [data.format, data.columns, data.bad_rows],
        "inputs": [_input_sha256(part) for part in parts],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _code_sha256() -> str:
    """Of the modules that turn files into rows: a mended reader must not be hidden by the rows of the broken one."""
    files = sorted(Path(__file__).parents[1].rglob("*.py")) + [
        Path(chatml.__file__),
        Path(tokenizer.__file__),
    ]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def _input_sha256(part: Place) -> list[Any]:
    """The name of a data set, and a hash for each of its files; of one on the hub, for its rows."""
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
            raise UserError(
                f"{file}: {error.strerror or error}; expected a readable file"
            ) from error
    return found


@lru_cache(maxsize=4096)
def _file_sha256(path: Path, size: int, changed_ns: int) -> str:
    """Remembered while size and time stay the same: a run asks more than once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a lock among the processes of this machine; the kernel frees it if we die. False where the file system has
    none: then several may make the same rows, and the first to finish is taken."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _make(
    folder: Path,
    may_clean: bool,
    data: DataOptions,
    paths: Sequence[str],
    model_dir: Path,
    options: EncodeOptions,
    n_workers: int | None,
) -> None:
    half = folder.with_name(f".{folder.name}.{os.getpid()}")
    with _writing(folder.parent):
        if may_clean:  # what a killed process left; the lock says that nobody is at it
            for left in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(left)
        half.mkdir()
    try:
        _fill(half, data, paths, model_dir, options, n_workers)
        with _writing(folder.parent):
            if folder.exists() and not is_whole(folder):
                shutil.rmtree(folder)
            try:
                half.rename(folder)
            except OSError:  # without a lock somebody else may have been faster
                if not is_whole(folder):
                    raise
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _fill(
    folder: Path,
    data: DataOptions,
    paths: Sequence[str],
    model_dir: Path,
    options: EncodeOptions,
    n_workers: int | None,
) -> None:
    """Read, encode and write the rows of all paths, and check that each data set is one to train on."""
    encoding = tokenizer.load_encoding(model_dir)
    reports = [PartReport(path) for path in paths]
    counts: list[Counter[str]] = [Counter() for _ in paths]
    streams = [
        iter_conversations([path], data.format, data.columns, bad_rows=data.bad_rows, counts=count)
        for path, count in zip(paths, counts, strict=True)
    ]
    writer = _CacheWriter(folder)
    # Shown on a terminal only, and not for the seconds that a small data set takes.
    with tqdm(desc="tokenising", unit=" rows", disable=None, delay=3, mininterval=0.5) as bar:
        encode_all(
            list(zip(reports, streams, strict=True)),
            writer,
            encoding,
            model_dir / tokenizer.VOCABULARY_FILE,
            options,
            default_workers() if n_workers is None else n_workers,
            bar.update,
        )
    for report, count in zip(reports, counts, strict=True):
        report.read = count["rows"]
        report.formats = _formats(data, locate(report.path))
        report.check()
    writer.close()
    contents = np.memmap(folder / ROWS_FILE, ROW, "r")["content"]
    writer.finish(
        {
            "pad_id": encoding.eod_id,
            "vocabulary_sha256": encoding.sha256,
            "options": {
                **dataclasses.asdict(options),
                "format": data.format,
                "columns": data.columns,
            },
            "data_sets": [report.to_dict() for report in reports],
            "duplicates": len(contents) - len(np.unique(contents)),
        }
    )


def _formats(data: DataOptions, part: Place) -> dict[str, str]:
    """File to the reader of its first row, as far as it has one."""
    if data.columns:
        return {part.path: f"columns {', '.join(data.columns)}"}
    if data.format != "auto":
        return {part.path: data.format}
    alone = [Place(str(file), files=(file,)) for file in part.files] or [part]
    return {each.path: _format(each) for each in alone}


def _format(part: Place) -> str:
    first = next((row.row for row in rows_of(part) if isinstance(row, SourceRow)), None)
    # An object that maps names to lists of rows is read as those rows (sources.py).
    inner = next(iter(first.values()), None) if isinstance(first, dict) else None
    for row in (first, *(inner[:1] if isinstance(inner, list) else [])):
        with contextlib.suppress(RowError):
            return find_reader(row).name
    return "none"
