"""The cache of token rows on disk: its files, and how they are filled.

A folder of the cache, made beside its place and renamed into it when complete:

    ids.bin     int32, the tokens of all rows one after another
    runs.bin    int32 [R, 2], start and end of each run of learnt tokens, counted from the start of its row
    rows.bin    one `ROW` for each row
    meta.json   FORMAT_VERSION, sizes, the names that sources begin with, the report
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen_ds.data.read.dialogue import Dropped
from qwen_ds.data.rows.blocks import Block, encode_block
from qwen_ds.data.rows.data_report import PartReport
from qwen_ds.data.rows.encode import EncodeOptions
from qwen_ds.data.rows.workers import Workers
from qwen_ds.model.chatml import Conversation
from qwen_ds.model.tokenizer import Encoding

FORMAT_VERSION = 1
IDS_FILE, RUNS_FILE, ROWS_FILE, META_FILE = "ids.bin", "runs.bin", "rows.bin", "meta.json"

ROW = np.dtype(
    [
        ("start", "<i8"),  # of its tokens in ids.bin
        ("first_run", "<i8"),  # in runs.bin
        ("number", "<i8"),  # of its source; -1: the source has none
        ("content", "<u8"),  # hash of tokens and labels
        ("prompt", "<u8"),  # hash of the first user text
        ("length", "<i4"),
        ("n_runs", "<i4"),
        ("learnt", "<i4"),  # labels that count
        ("name", "<i4"),  # of its source, in meta.json
        ("part", "<i4"),  # which entry of data.train
    ]
)

CHUNK_ROWS = 1024
# Starting workers takes some seconds, in which one process encodes this many rows.
INLINE_ROWS = 16_384
_LAST_NUMBER = re.compile(r"(.*?)(0|[1-9][0-9]{0,17})([^0-9]*)", re.DOTALL)

Stream = Iterator[tuple[Conversation | Dropped, str]]


@dataclass(slots=True)
class _Names:
    """Sources as (name, number): a million "train.jsonl:17" are one name, "train.jsonl:*", and a million numbers."""

    index: dict[tuple[str, str], int] = field(default_factory=dict)

    def split(self, source: str) -> tuple[int, int]:
        found = _LAST_NUMBER.fullmatch(source)
        before, digits, after = found.groups() if found else (source, "-1", "")
        return self.index.setdefault((before, after), len(self.index)), int(digits)


class RowWriter:
    """Writes blocks of rows into a folder, in the order in which they come. Memory does not grow with the rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {
            name: (folder / name).open("xb") for name in (IDS_FILE, RUNS_FILE, ROWS_FILE)
        }
        self._names = _Names()
        self._sha256 = hashlib.sha256()
        self._n_ids = self._n_runs = self.n_rows = 0

    def add(self, block: Block, sources: Sequence[str], part: int, report: PartReport) -> None:
        """Append a block. `sources` are those of its whole chunk; the report counts what became of each."""
        for place, reason in block.dropped:
            report.drop(reason, sources[place])
        for place, what in block.cuts:
            report.cut(what, sources[place])
        n_rows = len(block.length_K)
        if not n_rows:
            return
        rows = np.empty(n_rows, ROW)
        rows["start"] = self._n_ids + np.cumsum(block.length_K, dtype=np.int64) - block.length_K
        rows["first_run"] = (
            self._n_runs + np.cumsum(block.n_runs_K, dtype=np.int64) - block.n_runs_K
        )
        rows["length"], rows["n_runs"], rows["learnt"] = (
            block.length_K,
            block.n_runs_K,
            block.learnt_K,
        )
        rows["content"], rows["prompt"], rows["part"] = block.content_K, block.prompt_K, part
        kept = [sources[place] for place in block.place_K.tolist()]
        rows["name"], rows["number"] = zip(*map(self._names.split, kept), strict=True)
        for name, array in ((IDS_FILE, block.ids_N), (RUNS_FILE, block.runs_R2), (ROWS_FILE, rows)):
            self._files[name].write(array.tobytes())
        self._sha256.update(block.content_K.tobytes())
        self._n_ids += len(block.ids_N)
        self._n_runs += len(block.runs_R2)
        self.n_rows += n_rows
        _count(block, kept, report)

    def finish(self, meta: dict[str, Any]) -> None:
        """Close the files and write meta.json. sha256 is that of all rows' content hashes: of tokens and labels."""
        self.close()
        sizes = {
            IDS_FILE: self._n_ids * 4,
            RUNS_FILE: self._n_runs * 8,
            ROWS_FILE: self.n_rows * ROW.itemsize,
        }
        found = {
            "format_version": FORMAT_VERSION,
            "bytes": sizes,
            "sha256": self._sha256.hexdigest(),
            "names": list(self._names.index),
            **meta,
        }
        (self.folder / META_FILE).write_text(json.dumps(found), encoding="utf-8")

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def read_meta(folder: Path) -> dict[str, Any]:
    """The meta.json of a folder of the cache."""
    found: dict[str, Any] = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    return found


def is_whole(folder: Path) -> bool:
    """Whether a folder of the cache is there, of this format, and every file as long as it was made.

    (A machine that lost its power can leave a renamed folder whose files are short.)
    """
    try:
        meta = read_meta(folder)
        return meta["format_version"] == FORMAT_VERSION and all(
            (folder / name).stat().st_size == size for name, size in meta["bytes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _count(block: Block, kept: Sequence[str], report: PartReport) -> None:
    report.kept += len(kept)
    report.tokens += int(block.length_K.sum())
    report.learnt_tokens += int(block.learnt_K.sum())
    longest = int(block.length_K.argmax())
    if block.length_K[longest] > report.longest_tokens:
        report.longest_tokens, report.longest = int(block.length_K[longest]), kept[longest]
    if report.first_content is None:
        report.first_content = int(block.content_K[0])
    report.all_identical &= bool((block.content_K == report.first_content).all())


def encode_all(
    streams: Sequence[tuple[PartReport, Stream]],
    writer: RowWriter,
    encoding: Encoding,
    vocabulary: Path,
    options: EncodeOptions,
    n_workers: int,
    on_rows: Callable[[int], None],
) -> None:
    """Encode the conversations of every part into the writer, in their order.

    The first INLINE_ROWS are encoded here. If there are more, worker processes join in, and this process goes on
    encoding whenever they have enough to do. What is under way is bounded, so that memory stays the same however many
    rows come.
    """
    pending: deque[tuple[Future[Block] | Block, list[str], int, PartReport]] = deque()
    seen = 0
    workers: Workers | None = None

    def write_next() -> None:
        block, sources, part, report = pending.popleft()
        writer.add(block if isinstance(block, Block) else block.result(), sources, part, report)
        on_rows(len(sources))

    try:
        for part, (report, stream) in enumerate(streams):
            for conversations, sources in _chunks(report, stream):
                if workers is None and n_workers and seen >= INLINE_ROWS:
                    workers = Workers(vocabulary, options, n_workers)
                seen += len(sources)
                if (
                    workers is not None
                    and sum(_is_open(entry[0]) for entry in pending) < 2 * n_workers
                ):
                    pending.append((workers.submit(conversations), sources, part, report))
                else:
                    pending.append(
                        (encode_block(encoding, conversations, options), sources, part, report)
                    )
                while pending and (not _is_open(pending[0][0]) or len(pending) > 4 * n_workers):
                    write_next()
        while pending:
            write_next()
    finally:
        if workers is not None:
            workers.close()


def _is_open(block: Future[Block] | Block) -> bool:
    return not isinstance(block, Block) and not block.done()


def _chunks(report: PartReport, stream: Stream) -> Iterator[tuple[list[Conversation], list[str]]]:
    conversations: list[Conversation] = []
    sources: list[str] = []
    for found, source in stream:
        if isinstance(found, Dropped):
            report.drop(found.reason, source, found.detail, found.unreadable)
            continue
        conversations.append(found)
        sources.append(source)
        if len(sources) == CHUNK_ROWS:
            yield conversations, sources
            conversations, sources = [], []
    if sources:
        yield conversations, sources
