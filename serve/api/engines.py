"""Engines in processes of their own, as the front's event loop sees them.

Each has two threads: one reads its pipe and hands what comes to the loop, one writes, so that a
full pipe never holds up the loop. An engine that dies fails its own jobs, and is started anew.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from qwen_ds.errors import EXIT_FAILURE
from qwen_ds.runlog import say
from serve.api import worker
from serve.api.jobs import (
    ENGINE_GONE,
    Cancel,
    Event,
    Figures,
    Job,
    JobError,
    Ready,
    Refused,
    StepEvents,
    Submit,
)
from serve.api.worker import EngineSettings

_REAPED_SECONDS = 1.0
SILENT_SECONDS = 300.0  # of an engine with work: beyond them it hangs, as a stuck kernel does
_RESTART_SECONDS, _MOST_RESTART_SECONDS = 0.5, 30.0

_GONE = JobError(ENGINE_GONE, "the engine that worked on this request has ended; send it again")


class EngineJob:
    """A job that an engine has. `sink` gets its events, in the event loop; the last one has a
    finish reason or an error."""

    def __init__(
        self, engine: EngineProcess, key: int, job: Job, sink: Callable[[Event], None]
    ) -> None:
        self.job, self.engine = job, engine
        self._key, self._sink = key, sink
        self._is_over = False
        self.left = job.tokens  # that it may still take

    def put(self, event: Event) -> None:
        self._is_over = self._is_over or event.is_last
        self._sink(event)

    def close(self) -> None:
        """End the job; once it has ended this does nothing."""
        if not self._is_over:
            self._is_over = True
            self.engine.cancel(self._key)


class EngineProcess:
    """One engine, whichever process it runs in at the moment."""

    def __init__(self, settings: EngineSettings, number: int) -> None:
        self.number = number
        self.ready: Ready | None = None  # None: it loads, or is dead
        self.refused: Refused | None = None
        self.figures = Figures()
        self._settings = settings
        self._works: dict[int, EngineJob] = {}
        self._tokens = 0
        self._heard = time.monotonic()
        self._next_key = 0
        self._failures = 0
        self._has_begun = False  # was ready once
        self._is_closed = False
        self._process: SpawnProcess | None = None
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._changed: Callable[[], None] = lambda: None

    @property
    def outstanding_tokens(self) -> int:
        """Tokens that its jobs may still take."""
        return self._tokens

    @property
    def jobs(self) -> int:
        return len(self._works)

    def start(self, changed: Callable[[], None]) -> None:
        """Start a process; `changed` is called in the loop when it is ready, refused or dead."""
        self._changed = changed
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(
            target=worker.work, args=(theirs, self._settings, self.number),
            name=f"engine-{self.number}", daemon=True,
        )  # fmt: skip
        self._process.start()
        theirs.close()
        loop = asyncio.get_running_loop()
        self._outgoing = queue.SimpleQueue()
        for target, *args in ((self._read, ours, loop), (_write, ours, self._outgoing)):
            threading.Thread(target=target, args=args, daemon=True).start()

    def submit(self, job: Job, sink: Callable[[Event], None]) -> EngineJob:
        """Give the engine a job; the first event says whether it takes it."""
        self._next_key += 1
        if not self._works:
            self._heard = time.monotonic()
        work = EngineJob(self, self._next_key, job, sink)
        self._works[self._next_key] = work
        self._tokens += job.tokens
        self._outgoing.put(Submit(self._next_key, job))
        return work

    def cancel(self, key: int) -> None:
        if key in self._works:
            self._forget(key)
            self._outgoing.put(Cancel(key))

    def _forget(self, key: int) -> None:
        self._tokens -= self._works.pop(key).left

    def _count(self, work: EngineJob, event: Event) -> None:
        """Take what an event has brought off the outstanding tokens."""
        done = (event.token is not None) + (len(work.job.ids) if event.prompt is not None else 0)
        work.left -= done
        self._tokens -= done

    def _read(self, pipe: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """The thread that reads what the engine says, until it ends."""
        while True:
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                break
            loop.call_soon_threadsafe(self._take, message)
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._ended)

    def _take(self, message: Ready | Refused | StepEvents) -> None:
        self._heard = time.monotonic()
        if isinstance(message, StepEvents):
            self.figures = message.figures
            for event in message.events:
                work = self._works.get(event.key)
                if work is None:  # cancelled meanwhile
                    continue
                self._count(work, event)
                if event.is_last:
                    self._forget(event.key)
                    self._failures = 0
                work.put(event)
        elif isinstance(message, Ready):
            self.ready, self._has_begun = message, True
            self._changed()
        else:
            self.refused = message

    def _ended(self) -> None:
        """The process is gone: fail its jobs, and start another one if it was ever ready."""
        self.ready, self.figures = None, Figures()
        self._outgoing.put(None)
        for key, work in list(self._works.items()):
            self._forget(key)
            work.put(Event(key, None, error=_GONE))
        if self._is_closed:
            return
        if not self._has_begun:
            self.refused = self.refused or Refused(f"{self._end()} while it loaded", EXIT_FAILURE)
        else:
            wait = min(_RESTART_SECONDS * 2**self._failures, _MOST_RESTART_SECONDS)
            self._failures += 1
            asyncio.get_running_loop().call_later(wait, self._restart)
        self._changed()

    def _end(self) -> str:
        """How the process has ended, in words."""
        assert self._process is not None
        self._process.join(_REAPED_SECONDS)
        return f"engine {self.number} has ended (exit code {self._process.exitcode})"

    def end_if_silent(self, seconds: float) -> None:
        """Kill the process if it has work and says nothing for so long. It is started anew, as one
        that dies by itself. Beam search goes on beside the steps, and is not waited for."""
        is_busy = any(work.job.num_beams == 1 for work in self._works.values())
        silent = time.monotonic() - self._heard
        if self.ready is not None and is_busy and silent > seconds:
            say(f"engine {self.number} has said nothing for {silent:.0f} s; it is ended")
            assert self._process is not None
            self._process.kill()
            self._heard = time.monotonic()

    def _restart(self) -> None:
        if not self._is_closed:
            why = "" if self.refused is None else f": {self.refused.message}"
            say(f"{self._end()}{why}; it starts anew")
            self.refused = None
            self.start(self._changed)

    def close(self) -> None:
        """End the process, and its jobs with it."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()  # it writes nothing that could be left half done
            process.join()


def _write(pipe: Connection, outgoing: queue.SimpleQueue[Any]) -> None:
    """The thread that sends what is put into the queue, until None comes."""
    while (message := outgoing.get()) is not None:
        try:
            pipe.send(message)
        except OSError:  # the engine is gone, which the reader tells
            return


class EnginePool:
    """The engines behind one port."""

    def __init__(self, settings: EngineSettings, number: int) -> None:
        self.engines = [EngineProcess(settings, i) for i in range(number)]
        self.has_loaded = False  # all of them, once
        self._changed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        for engine in self.engines:
            engine.start(self._changed.set)
        self._watching = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(SILENT_SECONDS / 20)
            for engine in self.engines:
                engine.end_if_silent(SILENT_SECONDS)

    @property
    def ready(self) -> list[EngineProcess]:
        return [engine for engine in self.engines if engine.ready is not None]

    @property
    def jobs(self) -> int:
        return sum(engine.jobs for engine in self.engines)

    @property
    def room(self) -> int:
        """Tokens of keys and values of the engine that has the fewest."""
        return min((engine.ready.room for engine in self.engines if engine.ready), default=0)

    async def wait_until_ready(self) -> Refused | None:
        """Wait until every engine has loaded its model; or why one never will."""
        while True:
            self._changed.clear()
            if refused := next((e.refused for e in self.engines if e.refused is not None), None):
                return refused
            if len(self.ready) == len(self.engines):
                self.has_loaded = True
                return None
            await self._changed.wait()

    def least_busy(self) -> EngineProcess | None:
        """The engine with the fewest outstanding tokens; None if none is ready."""
        return min(self.ready, key=lambda engine: engine.outstanding_tokens, default=None)

    def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        for engine in self.engines:
            engine.close()
