"""The file of token rows: Arrow IPC, written a block at a time and read through memory mapping.

Each block is a record batch of `SCHEMA`. A last batch without rows has, as JSON in its metadata,
the facts about all rows (`RowWriter.finish`). After Arrow's footer comes our own: a checksum of all
bytes before it, and `MAGIC`. So a file that was cut short has none, and a flipped bit is found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from qwen_ds.data.rows.blocks import Block
from qwen_ds.data.rows.data_report import PartReport
from qwen_ds.errors import UserError

FORMAT_VERSION = 3
MAGIC = b"QWENROWS"
# Of bytes that are hashed at once: checking needs no memory to speak of, and all cores.
CHUNK_BYTES = 1 << 24
_FOOTER_BYTES = xxhash.xxh3_128().digest_size + len(MAGIC)
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        # Start and end of each run of target tokens, counted from the start of the row.
        "target_runs": pa.list_(pa.list_(pa.int32(), 2)),
        "num_targets": pa.int32(),  # target tokens, counted after the shift by one
        "content_hash": pa.uint64(),  # of tokens and labels
        "prompt_hash": pa.uint64(),  # of the first user text
        "part": pa.int32(),  # which entry of data.train
        "source_name": pa.int32(),  # in the names that `finish` writes
        "source_number": pa.int64(),  # -1: the source has none
    }
)
_ABOUT = "qwen_ds.token_rows"
# What precedes the last number, the number, and the rest. Leading zeros, and digits beyond 18, stay
# in the first part: the number must fit int64 and print as it was.
_LAST_NUMBER = re.compile(r"(.*?)(0|[1-9][0-9]{0,17})([^0-9]*)", re.DOTALL)


@contextlib.contextmanager
def cache_errors(cache: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that names the cache."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{cache}: {error.strerror or error}; expected a folder that can be written, with room "
            "for the tokenised rows (data.cache_dir)"
        ) from error


class RowWriter:
    """Writes blocks of rows to a file, in the order in which they come, and their checksum.

    Memory grows by 8 bytes a row: the content hashes, by which repeated rows are counted. Leaving
    the context closes the file; only `finish` completes it. UserError if rows cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._cache = path.parent
        with cache_errors(self._cache):
            self._file = path.open("w+b")
        self._arrow = pa.ipc.new_file(self._file, SCHEMA)
        # A million "train.jsonl:17" are one name, ("train.jsonl:", ""), and a million numbers.
        self._names: dict[tuple[str, str], int] = {}
        self._contents: list[np.ndarray] = []

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *error: object) -> None:
        with cache_errors(self._cache):
            self._file.close()

    def add(self, block: Block, sources: Sequence[str], part: int, report: PartReport) -> None:
        """Append a block and count its rows in the report; `sources` are those of its chunk."""
        for place, reason in block.dropped:
            report.drop(reason, sources[place])
        for place, what in block.cuts:
            report.cut(what, sources[place])
        kept = [sources[place] for place in block.place_K.tolist()]
        if not kept:
            return
        report.keep(block, kept)
        names, numbers = zip(*map(self._split, kept), strict=True)
        runs = pa.FixedSizeListArray.from_arrays(pa.array(block.runs_R2.reshape(-1)), 2)
        columns = [
            pa.ListArray.from_arrays(_offsets(block.length_K), pa.array(block.ids_N)),
            pa.ListArray.from_arrays(_offsets(block.n_runs_K), runs),
            block.learnt_K,
            block.content_K,
            block.prompt_K,
            np.full(len(kept), part, np.int32),
            np.array(names, np.int32),
            np.array(numbers, np.int64),
        ]
        with cache_errors(self._cache):
            self._arrow.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._contents.append(block.content_K)

    def finish(self, about: dict[str, Any]) -> None:
        """Write the last batch and the footer.

        Its metadata is `about` with format_version; names (beginnings and ends of sources); sha256
        (of all content hashes in order); and duplicates (rows that repeat an earlier one).
        """
        contents = np.concatenate([np.empty(0, "<u8"), *self._contents])
        found = {
            "format_version": FORMAT_VERSION,
            "sha256": hashlib.sha256(contents.tobytes()).hexdigest(),
            "names": list(self._names),
            "duplicates": len(contents) - len(np.unique(contents)),
            **about,
        }
        with cache_errors(self._cache):
            no_rows = pa.RecordBatch.from_pylist([], SCHEMA)
            self._arrow.write_batch(no_rows, custom_metadata={_ABOUT: json.dumps(found)})
            self._arrow.close()
            self._file.flush()
            # The pages that were written are still in memory.
            footer = _checksum(self._file.fileno(), self._file.tell()) + MAGIC
            self._file.write(footer)
            self._file.close()

    def _split(self, source: str) -> tuple[int, int]:
        found = _LAST_NUMBER.fullmatch(source)
        before, digits, after = found.groups() if found else (source, "-1", "")
        return self._names.setdefault((before, after), len(self._names)), int(digits)


def _offsets(length_K: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(length_K)]).astype(np.int32))


class RowFile:
    """The rows of a whole file, memory-mapped and read-only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _open(path)
        self.about = _read_about(reader)  # what `RowWriter.finish` wrote
        self._table = reader.read_all()

    def __len__(self) -> int:
        return self._table.num_rows

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of a row's tokens, int32, and of its runs of target tokens, int32 [runs, 2]."""
        ids, runs = (self._table.column(name)[row].values for name in ("input_ids", "target_runs"))
        return _numpy(ids), _numpy(runs.flatten()).reshape(-1, 2)

    def source(self, row: int) -> str:
        """Where a row comes from, "file:line"."""
        before, after = self.about["names"][self._table.column("source_name")[row].as_py()]
        number = self._table.column("source_number")[row].as_py()
        return f"{before}{number}{after}" if number >= 0 else before + after

    def lengths(self) -> np.ndarray:
        """int32 [rows]: tokens of each row."""
        return _whole(pc.list_value_length(self._table.column("input_ids")))

    def column(self, name: str) -> np.ndarray:
        """A numeric column of the schema, copied."""
        return _whole(self._table.column(name))


def _whole(column: pa.ChunkedArray) -> np.ndarray:
    return np.concatenate([_numpy(chunk) for chunk in column.chunks])


def _numpy(numbers: pa.Array) -> np.ndarray:
    """A view, read-only. pyarrow's own `to_numpy` imports pandas: 30 MB in every rank."""
    dtype, (_, buffer) = np.dtype(str(numbers.type)), numbers.buffers()
    if buffer is None:  # of no rows
        return np.zeros(0, dtype)
    return np.frombuffer(buffer, dtype, len(numbers), numbers.offset * dtype.itemsize)


def _open(path: Path) -> pa.RecordBatchFileReader:
    whole = pa.memory_map(str(path)).read_buffer()
    return pa.ipc.open_file(pa.BufferReader(whole.slice(0, max(0, whole.size - _FOOTER_BYTES))))


def _checksum(descriptor: int, size: int) -> bytes:
    """Of the first `size` bytes of a file, read by all cores at once (6 GB/s by one of them)."""

    def of_chunk(start: int) -> bytes:
        chunk = os.pread(descriptor, min(CHUNK_BYTES, size - start), start)
        return xxhash.xxh3_128_digest(chunk)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return xxhash.xxh3_128_digest(b"".join(pool.map(of_chunk, range(0, size, CHUNK_BYTES))))


def _read_about(reader: pa.RecordBatchFileReader) -> dict[str, Any]:
    if reader.schema != SCHEMA or not reader.num_record_batches:
        raise ValueError("not a file of token rows")
    batch = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
    about: dict[str, Any] = json.loads((batch.custom_metadata or {}).get(_ABOUT, "null"))
    if not about or about["format_version"] != FORMAT_VERSION:
        raise ValueError("not a whole file of token rows of this version")
    return about


def fault(path: Path, key: str, every_byte: bool = True) -> str | None:
    """The reason not to use the file as the rows of `key`, in words; None if there is none.

    Without `every_byte` the checksum is taken on trust: another rank of this machine has compared
    it.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
            return "not a file"
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size - _FOOTER_BYTES
            file.seek(max(0, size))
            footer = file.read()
            if size < 0 or not footer.endswith(MAGIC):
                return "cut short, or not a file of token rows"
            if every_byte and footer[: -len(MAGIC)] != _checksum(file.fileno(), size):
                return "damaged: its checksum is another"
        about = _read_about(_open(path))
    except OSError as error:
        return str(error.strerror or error)
    except (ValueError, KeyError):  # pyarrow.ArrowInvalid is a ValueError
        return "not a file of token rows of this version"
    return None if about.get("key") == key else "the rows of other inputs"
