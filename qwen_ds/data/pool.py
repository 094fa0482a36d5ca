"""Processes that work for this one on chunks of rows.

They are forked off a fork server, a fresh interpreter that has imported the work's module already.
They neither copy this process, with its threads and its GPU, nor import it anew. A single one is
started without a server, which would take the memory of another process.
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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

# More workers would wait for the parent, which reads all the rows.
MOST_WORKERS = 8
Submit = Callable[[Callable[[Any], Any], Any], Future[Any] | None]


def default_workers() -> int:
    """One for each core that this process may use besides its own, up to MOST_WORKERS."""
    return min(len(os.sched_getaffinity(0)) - 1, MOST_WORKERS)


@contextlib.contextmanager
def process_pool(
    count: int, module: str, start: Callable[..., None], arguments: tuple[Any, ...]
) -> Iterator[Submit]:
    """Start processes; yields a function that hands (function, argument) to the next idle one.

    The function returns None until the first process is up. If a process dies, every outstanding
    result raises BrokenProcessPool.

    Args:
        module: has the functions; the fork server imports it.
        start: called in each process with `arguments`, once.
    """
    context = multiprocessing.get_context("spawn" if count == 1 else "forkserver")
    context.set_forkserver_preload([module])
    pool = ProcessPoolExecutor(count, context, _begin, (start, arguments))
    with _main_hidden():
        ready = pool.submit(os.getpid)

    def submit(work: Callable[[Any], Any], argument: Any) -> Future[Any] | None:
        if not ready.done():
            return None
        with _main_hidden():  # the pool starts a process when the first chunk needs it
            return pool.submit(work, argument)

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


def _begin(start: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches the whole process group; only the parent handles it, and ends the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    start(*arguments)
    gc.freeze()  # a collection would touch, and so copy, every page shared with the fork server


def _end_with_parent() -> None:
    """End this worker with its parent: it waits on a pipe that its siblings also hold open, and
    would wait forever after a kill of the parent (test_no_process_outlives_a_killed_parent)."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
