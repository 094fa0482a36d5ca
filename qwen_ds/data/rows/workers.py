"""Encoding of all conversations in their order, by this process and a pool of others."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from qwen_ds.data.pool import default_workers, process_pool
from qwen_ds.data.read.dialogue import Dropped
from qwen_ds.data.rows.blocks import Block, encode_block
from qwen_ds.data.rows.data_report import PartReport
from qwen_ds.data.rows.encode import EncodeOptions
from qwen_ds.data.rows.row_file import RowWriter
from qwen_ds.model.chatml import Conversation
from qwen_ds.model.tokenizer import Encoding

CHUNK_ROWS = 1024
# Rows that one process encodes in the seconds that it takes to start workers.
INLINE_ROWS = 16_384

Stream = Iterator[tuple[Conversation | Dropped, str]]
Submit = Callable[[list[Conversation]], Future[Block] | None]

# In a worker, what `_start` loaded for it.
_encoder: tuple[Encoding, EncodeOptions] | None = None


@contextlib.contextmanager
def encoding_pool(encoding: Encoding, options: EncodeOptions, count: int) -> Iterator[Submit]:
    """Start processes that encode; yields the function that hands a chunk to the next idle one.

    The function and its results are those of `process_pool`.
    """
    with process_pool(count, __name__, _start, (encoding, options)) as submit:
        yield lambda conversations: submit(_encode, conversations)


def _start(encoding: Encoding, options: EncodeOptions) -> None:
    global _encoder
    _encoder = encoding, options


def _encode(conversations: list[Conversation]) -> Block:
    assert _encoder is not None
    encoding, options = _encoder
    return encode_block(encoding, conversations, options)


def encode_all(
    streams: Sequence[tuple[PartReport, Stream]],
    writer: RowWriter,
    encoding: Encoding,
    options: EncodeOptions,
    on_rows: Callable[[int], None],
) -> None:
    """Encode the conversations of every part into the writer, in their order.

    The first INLINE_ROWS are encoded here. If there are more, worker processes join in, and this
    process encodes whenever they have enough to do. The number of chunks under way is bounded, so
    memory does not grow with the rows.

    Args:
        on_rows: called with the number of rows of each chunk that was written.
    """
    n_workers = default_workers()
    pending: deque[tuple[Future[Block], list[str], int, PartReport]] = deque()
    submit: Submit | None = None
    seen = 0

    def write_next() -> None:
        block, sources, part, report = pending.popleft()
        writer.add(block.result(), sources, part, report)
        on_rows(len(sources))

    with contextlib.ExitStack() as stack:
        for part, (report, stream) in enumerate(streams):
            for conversations, sources in _chunks(report, stream):
                if submit is None and n_workers and seen >= INLINE_ROWS:
                    submit = stack.enter_context(encoding_pool(encoding, options, n_workers))
                seen += len(sources)
                block: Future[Block] | None = None
                if submit and sum(not entry[0].done() for entry in pending) < 2 * n_workers:
                    block = submit(conversations)
                if block is None:
                    block = Future()
                    block.set_result(encode_block(encoding, conversations, options))
                pending.append((block, sources, part, report))
                while pending and (pending[0][0].done() or len(pending) > 4 * n_workers):
                    write_next()
        while pending:
            write_next()


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
