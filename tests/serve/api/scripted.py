"""The API over an engine that says what a test wants it to say."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from qwen_ds.decode.request import PromptFigures
from qwen_ds.decode.stop import FinishReason
from qwen_ds.model.tokenizer import load_encoding
from serve.api.answering import Answering
from serve.api.app import Front, create_app
from serve.api.gate import Gate
from serve.api.jobs import Event, Figures, Job, JobError, Ready
from serve.api.metrics import Metrics
from serve.api.served import Served

Says = Callable[[Job], Sequence[str] | JobError]
"""The pieces of the answer to a job, or why there is none."""


class ScriptedPool:
    """A pool of one engine, which is ready at once and answers from a script."""

    def __init__(self, says: Says, ends: FinishReason = "stop") -> None:
        self.says, self.ends = says, ends
        self.jobs_seen: list[Job] = []
        self.cancelled, self.pause_seconds = 0, 0.0
        self.lines: list[dict[str, Any]] = []  # of the log
        self.number, self.room, self.jobs = 0, 100_000, 0
        self.figures, self.ready_card = Figures(), Ready(100_000, 4, 1.0)
        self.engines, self.has_loaded = [self], True

        self.is_ready = True

    @property
    def ready(self) -> list[Any]:
        return [self] if self.is_ready else []

    def least_busy(self) -> Any:
        return self

    def submit(self, job: Job, sink: Callable[[Event], None]) -> Any:
        self.jobs_seen.append(job)
        self.jobs += 1
        return _Work(self, job, asyncio.ensure_future(self._answer(job, sink)))

    async def _answer(self, job: Job, sink: Callable[[Event], None]) -> None:
        said = self.says(job)
        try:
            if isinstance(said, JobError):
                sink(Event(0, None, error=said))
                return
            for i, piece in enumerate(said):
                is_last = i + 1 == len(said)
                prompt = PromptFigures(0) if i == 0 else None
                sink(Event(0, 1, piece, self.ends if is_last else None, prompt=prompt))
                await asyncio.sleep(self.pause_seconds)
        finally:
            self.jobs -= 1


class _Work:
    def __init__(self, pool: ScriptedPool, job: Job, task: asyncio.Future[None]) -> None:
        self.job, self._pool, self._task = job, pool, task

    def close(self) -> None:
        if not self._task.done():
            self._pool.cancelled += 1
            self._task.cancel()


def scripted_app(
    vocabulary: Path, says: Says, keys: Sequence[str] = ()
) -> tuple[Gate, ScriptedPool]:
    """The whole app over a scripted engine."""
    pool: Any = ScriptedPool(says)
    served = Served(("qwen",), ("tuned",), load_encoding(vocabulary), 8192, True)
    metrics = Metrics(pool, (*served.names, *served.adapters))
    answering = Answering(pool, metrics, 100, 60.0)
    app = create_app(Front(served, pool, metrics, answering))
    return Gate(app, keys, 10**6, 10.0, pool.lines.append), pool


@contextmanager
def scripted_server(
    vocabulary: Path, says: Says, http: Any = "h11", keys: Sequence[str] = ()
) -> Iterator[tuple[str, ScriptedPool]]:
    """The same on a port of its own: its URL and the engine."""
    app, pool = scripted_app(vocabulary, says, keys)
    config = uvicorn.Config(app, port=0, http=http, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", pool
    finally:
        server.should_exit = True
        thread.join(30)
