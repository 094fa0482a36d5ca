"""A client of servers with OpenAI's HTTP API: many questions at once, or one answer streamed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import httpx

from qwen_ds.decode.exceptions import DecodingError
from qwen_ds.errors import UserError
from serve.answering import Answer, Question
from serve.endpoint.options import EndpointOptions, base_url, read_key
from serve.endpoint.patience import Patience, Tries
from serve.endpoint.reference import EndpointLosses
from serve.endpoint.wire import (
    EndpointRefused,
    Trouble,
    answer_of,
    check_status,
    delta_of,
    events,
    model_names,
    request_of,
)

CONNECT_SECONDS, READ_SECONDS = 10.0, 600.0
T = TypeVar("T")
_Work = Callable[[httpx.AsyncClient], Coroutine[None, None, T]]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request of a server, and what its answer holds."""

    path: str
    body: bytes
    read: Callable[[str, bytes], T]
    """Takes the URL and the answer's body. Trouble: it is cut off, or no answer at all."""


@dataclass(frozen=True)
class Endpoint:
    """A model of a server; `connect` makes one."""

    url: str
    model: str
    key: str | None
    patience: Patience
    concurrency: int = 32
    losses: EndpointLosses | None = None  # None: nobody asks for any

    def answer(self, questions: Iterable[Question]) -> Iterator[tuple[int, Answer | DecodingError]]:
        """As `Answerer.answer`, with so many requests under way at a time."""
        return self._all(partial(self._ask, one) for one in questions)

    def call(self, calls: Iterable[Call[T]]) -> Iterator[tuple[int, T | DecodingError]]:
        """Yield (index into calls, what came back or why nothing did) as they end.

        UserError or Failed: the server answers nobody any more.
        """
        return self._all(partial(self._called, one) for one in calls)

    def _all(self, works: Iterable[_Work[T]]) -> Iterator[tuple[int, T]]:
        waiting = iter(enumerate(works))
        done: set[asyncio.Task[tuple[int, T]]] = set()
        pending: set[asyncio.Task[tuple[int, T]]] = set()
        with asyncio.Runner() as runner:
            client = httpx.AsyncClient(
                headers=self._headers,
                timeout=self._timeout,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            )
            try:
                while True:
                    done, pending = runner.run(self._next(client, waiting, pending))
                    if not done:
                        return
                    for task in done:
                        yield task.result()
            finally:  # those that failed beside the first, too: asyncio would print their errors
                runner.run(_end(client, done | pending))

    async def _next(
        self,
        client: httpx.AsyncClient,
        waiting: Iterator[tuple[int, _Work[T]]],
        pending: set[asyncio.Task[tuple[int, T]]],
    ) -> tuple[set[asyncio.Task[tuple[int, T]]], set[asyncio.Task[tuple[int, T]]]]:
        """Send as many as may be under way, and wait for the first to end: (ended, the others)."""
        while len(pending) < self.concurrency and (one := next(waiting, None)) is not None:
            index, work = one
            pending.add(asyncio.create_task(_numbered(index, work(client))))
        if not pending:
            return set(), set()
        return await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)

    async def _called(self, one: Call[T], client: httpx.AsyncClient) -> T | DecodingError:
        try:
            return await self._posted(client, self.url + one.path, one.body, one.read)
        except EndpointRefused as refused:
            return refused

    async def _ask(self, question: Question, client: httpx.AsyncClient) -> Answer | DecodingError:
        path, body = request_of(question, self.model)
        url = self.url + path
        try:
            answer = await self._posted(client, url, body, answer_of)
        except EndpointRefused as refused:
            return refused
        if self.losses is None or not self.losses.is_asked(question, answer):
            return answer
        url, body = f"{self.url}/completions", self.losses.body_of(question, self.model)
        try:
            raw = await self._posted(client, url, body, lambda _, raw: raw, is_extra=True)
            return self.losses.take(question, answer, raw)
        except (EndpointRefused, UserError) as refused:
            self.losses.fail(str(refused))
            return answer

    async def _posted(
        self,
        client: httpx.AsyncClient,
        url: str,
        body: bytes,
        read: Callable[[str, bytes], T],
        is_extra: bool = False,
    ) -> T:
        """An answer as `read` has it, asked for until there is one; where it `is_extra`, only while
        the server is in trouble with everything. EndpointRefused: there is none."""
        tries = Tries(self.patience)
        while True:
            try:
                try:
                    response = await client.post(url, content=body)
                except httpx.RequestError as error:
                    raise trouble_of(url, error) from None
                wait = response.headers.get("retry-after")
                check_status(url, response.status_code, wait, response.content)
                found = read(url, response.content)
            except Trouble as trouble:
                if is_extra and trouble.may_be_the_row:
                    raise EndpointRefused(str(trouble)) from None
                await asyncio.sleep(tries.wait_after(trouble))
            except EndpointRefused:
                self.patience.answered()
                raise
            else:
                self.patience.answered()
                return found

    def stream(self, question: Question) -> Generator[tuple[str, str | None], None, None]:
        """Yield one answer as it comes: text, and with the last of it the finish reason.

        Until the first of it is there, the request is sent again as in `answer`. EndpointRefused:
        the server does not answer this. Trouble: the answer broke off.
        """
        tries = Tries(self.patience)
        while True:
            try:
                yield from self._stream_once(question)
                return
            except _NotBegun as failed:
                time.sleep(tries.wait_after(failed.trouble))

    def _stream_once(self, question: Question) -> Iterator[tuple[str, str | None]]:
        path, body = request_of(question, self.model, stream=True)
        url, begun = self.url + path, False
        try:
            with (
                httpx.Client(headers=self._headers, timeout=self._timeout) as client,
                client.stream("POST", url, content=body) as response,
            ):
                raw = b"" if response.status_code == 200 else response.read()
                check_status(url, response.status_code, response.headers.get("retry-after"), raw)
                for data in events(response.iter_bytes()):
                    if data == b"[DONE]":
                        break
                    text, reason = delta_of(url, data)
                    self.patience.answered()
                    begun = True
                    yield text, reason
                    if reason is not None:
                        return
                raise Trouble(f"{url} broke off its answer")
        except (httpx.RequestError, Trouble) as error:
            trouble = error if isinstance(error, Trouble) else trouble_of(url, error)
            raise (trouble if begun else _NotBegun(trouble)) from None

    @property
    def _headers(self) -> dict[str, str]:
        return headers_with(self.key)

    @property
    def _timeout(self) -> httpx.Timeout:
        read = min(READ_SECONDS, max(self.patience.seconds, CONNECT_SECONDS))
        return httpx.Timeout(read, connect=CONNECT_SECONDS, pool=None)


class _NotBegun(Exception):
    """A stream that failed before its first text."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(str(trouble))
        self.trouble = trouble


async def _numbered(index: int, work: Coroutine[None, None, T]) -> tuple[int, T]:
    return index, await work


async def _end(client: httpx.AsyncClient, pending: set[asyncio.Task[T]]) -> None:
    """Drop what is still under way."""
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    await client.aclose()


def headers_with(key: str | None) -> dict[str, str]:
    """The headers of every request."""
    content = {"content-type": "application/json"}
    return content | {"authorization": f"Bearer {key}"} if key else content


def trouble_of(url: str, error: httpx.RequestError) -> Trouble:
    """A failed connection as Trouble. UserError for a certificate that is not trusted."""
    said = " ".join(str(error).split()) or type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in said:
        raise UserError(f"{url}: {said}; expected a certificate that this machine trusts") from None
    # A time-out while it answers, or an answer that breaks off, may come from what was asked.
    may_be_the_row = isinstance(error, httpx.ReadTimeout | httpx.RemoteProtocolError)
    return Trouble(f"{url}: {said}", None, may_be_the_row)


def connect(
    options: EndpointOptions, seconds: float, tell: Callable[[str], None], concurrency: int = 1
) -> Endpoint:
    """Find the server of `options` and its model; a server in trouble is waited for `seconds` long.

    UserError: not such a server, or it refuses the key. Failed: it stayed down.
    """
    assert options.endpoint is not None
    url, key = base_url(options.endpoint), read_key(options.api_key_file)
    patience = Patience(seconds, tell)
    names = _models(f"{url}/models", key, patience, options.endpoint_model is None)
    model = options.endpoint_model or names[0]
    if names and model not in names:
        tell(f"{url} lists no model {model}, but {', '.join(names[:5])}")
    return Endpoint(url, model, key, patience, concurrency, EndpointLosses(tell))


def _models(url: str, key: str | None, patience: Patience, needed: bool) -> list[str]:
    """The names that a server lists; unless they are needed, none where it has no such list."""
    tries = Tries(patience)
    while True:
        try:
            try:
                response = httpx.get(url, headers=headers_with(key), timeout=CONNECT_SECONDS)
            except httpx.RequestError as error:
                raise trouble_of(url, error) from None
            status, wait = response.status_code, response.headers.get("retry-after")
            if status in (404, 405) and not needed:
                return []
            check_status(url, status, wait, response.content)
        except Trouble as trouble:
            time.sleep(tries.wait_after(trouble))
        except EndpointRefused as refused:
            expected = "expected a server with OpenAI's API, such as http://gpu01:8000/v1"
            raise UserError(f"{refused}; {expected}") from None
        else:
            patience.answered()
            return model_names(url, response.content)
