"""Encoding of all conversations in their order, by this process and a pool of others.

The pool's processes are forked off a fork server, a fresh interpreter that has imported this module
already. They neither copy the training process, with its threads and its GPU, nor import it anew.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor

from qwen_ds.data.read.dialogue import Dropped
from qwen_ds.data.rows.blocks import Block, encode_block
from qwen_ds.data.rows.data_report import PartReport
from qwen_ds.data.rows.encode import EncodeOptions
from qwen_ds.data.rows.row_file import RowWriter
from qwen_ds.model.chatml import Conversation
from qwen_ds.model.tokenizer import Encoding

# More workers would wait for the parent, which reads all the rows.
MOST_WORKERS = 8
CHUNK_ROWS = 1024
# Rows that one process encodes in the seconds that it takes to start workers.
INLINE_ROWS = 16_384

Stream = Iterator[tuple[Conversation | Dropped, str]]
Submit = Callable[[list[Conversation]], Future[Block] | None]

# In a worker, what `_start` loaded for it.
_encoder: tuple[Encoding, EncodeOptions] | None = None


def default_workers() -> int:
    """One for each core that this process may use besides its own, up to MOST_WORKERS."""
    return min(len(os.sched_getaffinity(0)) - 1, MOST_WORKERS)


@contextlib.contextmanager
def encoding_pool(encoding: Encoding, options: EncodeOptions, count: int) -> Iterator[Submit]:
    """Start processes that encode; yields the function that hands a chunk to the next idle one.

    The function returns None until the first process is up. If a process dies, every outstanding
    result raises BrokenProcessPool.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(count, context, _start, (encoding, options))
    with _main_hidden():
        ready = pool.submit(os.getpid)

    def submit(conversations: list[Conversation]) -> Future[Block] | None:
        if not ready.done():
            return None
        with _main_hidden():  # the pool starts a process when the first chunk needs it
            return pool.submit(_encode, conversations)

    try:
        yield submit
    finally:
        # If the rows ended before a process was up, there is nothing to wait for.
        pool.shutdown(wait=ready.done(), cancel_futures=True)


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep multiprocessing from running the launch script again in each process that it starts.

    Else workers would import all of training, and a script without `if __name__ == "__main__"`
    would start over: test_the_launch_script_is_not_run_again.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start(encoding: Encoding, options: EncodeOptions) -> None:
    global _encoder
    # Ctrl-C reaches the whole process group; only the parent handles it, and ends the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = encoding, options
    gc.freeze()  # a collection would touch, and so copy, every page shared with the fork server


def _end_with_parent() -> None:
    """End this worker with its parent: it waits on a pipe that its siblings also hold open, and
    would wait forever after a kill of the parent (test_no_process_outlives_a_killed_parent)."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


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
