"""The path of a request through the engines: queued, answered whole or in pieces, or given up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from serve.api.bodies import SampledBody
from serve.api.engines import EngineJob, EnginePool
from serve.api.errors import ApiError, of_job
from serve.api.gate import Passing
from serve.api.jobs import Event, Job
from serve.api.metrics import Metrics

Json = dict[str, Any]
Result = TypeVar("Result")
CLIENT_LEFT = "the client left"
# A request that an engine refuses is refused within a step, and may still have its own status.
_LOOK_SECONDS = 2.0
_KEEP_ALIVE_SECONDS = 10.0
_KEEP_ALIVE = b": keep-alive\n\n"


class Answerable(Protocol):
    """A request of one of the routes: its jobs, and the form of its answers."""

    jobs: list[Job]
    model: str

    @property
    def body(self) -> SampledBody: ...

    def take(self, index: int, event: Event) -> None: ...

    def answer(self, usage: Json) -> Json: ...

    def first_chunk(self, index: int) -> Json | None: ...

    def chunks(self, index: int, event: Event) -> list[Json]: ...

    def usage_chunk(self, usage: Json) -> Json: ...


class ClientGone(Exception):
    """The client has left; nobody waits for an answer."""


def no_engine() -> ApiError:
    """The error where every engine is loading or dead."""
    return ApiError(503, "no engine is ready; send the request again", retry_after=5)


class Answers:
    """The jobs of one request in their engine, and their events in the order in which they come."""

    def __init__(
        self, pool: EnginePool, metrics: Metrics, model: str, jobs: Sequence[Job], began: float
    ) -> None:
        """`began`: when the request came (monotonic). ApiError 503: no engine is there."""
        engine = pool.least_busy()
        if engine is None:
            raise no_engine()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._first: tuple[int, Event] | None = None
        self.texts = [""] * len(jobs)
        self.timers = [metrics.timer(model, job.sampling.max_new_tokens, began) for job in jobs]
        self.left = len(jobs)
        # All in one engine: they tend to begin alike.
        self._works: list[EngineJob] = [
            engine.submit(job, partial(self._put, i)) for i, job in enumerate(jobs)
        ]

    def _put(self, index: int, event: Event) -> None:
        timer = self.timers[index]
        self.texts[index] += event.text
        if event.token is not None:
            timer.token(event.prompt, len(self._works[index].job.ids), event.begun)
        if event.is_last:
            self.left -= 1
            timer.end("error" if event.error is not None else str(event.finish_reason))
        self._events.put_nowait((index, event))

    async def next(self, seconds: float | None = None) -> tuple[int, Event] | None:
        """The next event and whose it is; None on time-out.

        ApiError: the job has failed.
        """
        if self._first is not None:
            (index, event), self._first = self._first, None
        elif seconds is None or not self._events.empty():
            index, event = await self._events.get()
        else:
            try:
                async with asyncio.timeout(seconds):
                    index, event = await self._events.get()
            except TimeoutError:
                return None
        if event.error is not None:
            raise of_job(event.error)
        return index, event

    @property
    def has_more(self) -> bool:
        return self.left > 0 or self._first is not None or not self._events.empty()

    def put_back(self, index: int, event: Event) -> None:
        """Let an event be the next one again."""
        self._first = index, event

    def usage(self) -> Json:
        """Tokens of prompt and answers, in OpenAI's form; choices of one prompt share it."""
        # Choices of one prompt have one tuple of ids; equal prompts have two.
        prompts = {
            id(work.job.ids): (work, timer)
            for work, timer in zip(self._works, self.timers, strict=True)
        }
        prompt = sum(len(work.job.ids) for work, _ in prompts.values())
        new = sum(timer.new_tokens for timer in self.timers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {
                "cached_tokens": sum(timer.cached_tokens for _, timer in prompts.values())
            },
        }

    def close(self, reason: str = "abort") -> None:
        """End what has not ended."""
        for work, timer in zip(self._works, self.timers, strict=True):
            work.close()
            timer.end(reason)


class Answering:
    """The rules for all requests: how many at a time, and for how long."""

    def __init__(
        self,
        pool: EnginePool,
        metrics: Metrics,
        most: int,
        seconds: float,
        text_of: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        """
        Args:
            most: answers under way and waiting, of all requests together.
            seconds: for one request.
            text_of: the text of a prompt's ids, for the log; None: it has no texts.
        """
        self._pool, self._metrics, self._most, self.seconds = pool, metrics, most, seconds
        self._text_of = text_of
        self.is_draining = False

    async def respond(self, request: Request, asked: Answerable) -> Response:
        """Answer a request, as a whole or as a stream of events.

        ApiError: it cannot be answered now (503), in time (504), or at all.
        """
        passing: Passing = request.scope["passing"]
        passing.model = asked.model
        if self.is_draining:
            raise ApiError(503, "the server is about to end", retry_after=10)
        if len(asked.jobs) > self._most:
            came = f"{len(asked.jobs)} answers are asked for"
            raise ApiError(400, f"{came}; this server takes {self._most} at a time", "n")
        if self._pool.jobs + len(asked.jobs) > self._most:
            came = f"{self._pool.jobs} answers are under way or wait"
            raise ApiError(503, f"{came}; expected at most {self._most}", retry_after=1)
        answers = Answers(self._pool, self._metrics, asked.model, asked.jobs, passing.began)
        deadline = asyncio.get_running_loop().time() + self.seconds
        try:
            if not asked.body.stream:
                whole = self._in_time(self._whole(answers, asked), deadline)
                return await unless_gone(request.receive, whole)
            first = answers.next(_LOOK_SECONDS)
            found = await unless_gone(request.receive, first)
            if found is not None:
                answers.put_back(*found)
        except BaseException:
            self._tell(passing, asked, answers)
            answers.close()
            raise
        finally:
            if not asked.body.stream:
                self._tell(passing, asked, answers)
                answers.close()
        return EventStream(self._events(answers, asked, deadline, passing))

    async def _in_time(self, work: Coroutine[Any, Any, Result], deadline: float) -> Result:
        try:
            async with asyncio.timeout_at(deadline):
                return await work
        except TimeoutError:
            raise self._late() from None

    def _late(self) -> ApiError:
        return ApiError(504, f"the answer took more than {self.seconds:.0f} s", code="timeout")

    async def _whole(self, answers: Answers, asked: Answerable) -> Response:
        while answers.has_more:
            found = await answers.next()
            assert found is not None
            asked.take(*found)
        usage = answers.usage()
        # In a thread: with log-probabilities it may be megabytes, and streams go on meanwhile.
        return await run_in_threadpool(lambda: JSONResponse(asked.answer(usage)))

    async def _events(
        self, answers: Answers, asked: Answerable, deadline: float, passing: Passing
    ) -> AsyncIterator[bytes]:
        """The events of a streamed answer; when it is closed, so is the work for it."""
        loop = asyncio.get_running_loop()
        # A client that does not read holds up this generator, and must not hold up the engine.
        ending = loop.call_at(deadline, answers.close)
        try:
            begun: set[int] = set()
            while answers.has_more:
                left = deadline - loop.time()
                if left <= 0:
                    raise self._late()
                found = await answers.next(min(left, _KEEP_ALIVE_SECONDS))
                if found is None:
                    yield _KEEP_ALIVE
                    continue
                index, event = found
                lines = []
                if index not in begun:
                    begun.add(index)
                    lines += [asked.first_chunk(index)]
                lines += asked.chunks(index, event)
                text = b"".join(_sse(line) for line in lines if line is not None)
                if text:
                    yield text
            if asked.body.wants_usage:
                yield _sse(asked.usage_chunk(answers.usage()))
        except ApiError as error:
            passing.error = error.logged()
            yield _sse(error.body())
        finally:
            ending.cancel()
            self._tell(passing, asked, answers)
            answers.close()
        yield b"data: [DONE]\n\n"

    def _tell(self, passing: Passing, asked: Answerable, answers: Answers) -> None:
        """Put the figures of an answer into its line of the log."""
        usage, first = answers.usage(), answers.timers[0].first_seconds
        passing.figures = {
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "completion_tokens": usage["completion_tokens"],
        }
        if first is not None:
            passing.figures["first_token_seconds"] = round(first, 4)
        if self._text_of is not None:
            prompts = dict.fromkeys(job.ids for job in asked.jobs)
            passing.figures["prompts"] = [self._text_of(ids) for ids in prompts]
            passing.figures["answers"] = answers.texts


class EventStream(Response):
    """Server-sent events, given up when the client leaves."""

    def __init__(self, events: AsyncIterator[bytes]) -> None:
        self.status_code, self.background = 200, None
        self._events = events
        self.init_headers(
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
            }
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            await unless_gone(receive, self._pump(send))
        except ClientGone:
            scope["passing"].status, scope["passing"].error = 499, CLIENT_LEFT

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Do the work while the client is there. ClientGone: it has left, and the work was stopped."""
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientGone
    finally:
        for task in (doing, leaving):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _sse(data: Json) -> bytes:
    """A server-sent event; JSON with all its letters, which may be lone surrogates."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode(errors="backslashreplace") + b"\n\n"
