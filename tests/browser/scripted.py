"""A server of the chat page whose answers a test scripts piece by piece."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.jobs import free_port

Body = dict[str, Any]
WAIT_SECONDS = 20


class Gate:
    """A place in an answer at which it waits until the test opens it."""

    def __init__(self) -> None:
        self._opened, self._reached = threading.Event(), threading.Event()

    def open(self) -> None:
        """Let the answer go on, once it has come here."""
        assert self._reached.wait(WAIT_SECONDS), "the answer never came to its gate"
        self._opened.set()

    async def passed(self) -> None:
        self._reached.set()
        while not self._opened.is_set():
            await asyncio.sleep(0.005)


Piece = str | bytes | Gate | Body


@dataclass
class Answer:
    """Pieces of an answer, in order: text, gates, events, and bytes as they stand."""

    pieces: list[Piece]
    is_complete: bool = True  # false: the stream ends in the middle
    usage: Body = field(default_factory=lambda: {"prompt_tokens": 7, "completion_tokens": 3})


@dataclass
class Refusal:
    """An answer that is an error."""

    status: int
    message: str
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


Script = Callable[[Body], Answer | Refusal]


def saying(*pieces: Piece, is_complete: bool = True) -> Script:
    """A script that answers every request alike."""
    return lambda _: Answer(list(pieces), is_complete)


class ScriptedPage:
    """The server, with the requests that it got."""

    def __init__(self, page: httpx.Response, port: int) -> None:
        """
        Args:
            page: as the real server sends it, with its policy.
        """
        self.page = page
        self.url = f"http://127.0.0.1:{port}"
        self.script: Script = saying("ok")
        self.models, self.key = ["base", "tuned"], ""
        self.bodies: list[Body] = []
        self.left = threading.Event()  # set once a client leaves in the middle of an answer
        self.app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/v1/models", self._list),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )

    async def _page(self, _: Request) -> Response:
        return Response(self.page.content, headers=dict(self.page.headers))

    def _refuse_key(self, request: Request) -> Response | None:
        if not self.key or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "a key that is not known"}}, 401)

    async def _list(self, request: Request) -> Response:
        models = {"data": [{"id": name} for name in self.models]}
        return self._refuse_key(request) or JSONResponse(models)

    async def _chat(self, request: Request) -> Response:
        if (refused := self._refuse_key(request)) is not None:
            return refused
        body = await request.json()
        self.bodies.append(body)
        planned = self.script(body)
        if isinstance(planned, Refusal):
            error = {"message": planned.message, "code": planned.code}
            return JSONResponse({"error": error}, planned.status, planned.headers)
        return StreamingResponse(self._events(planned), media_type="text/event-stream")

    async def _events(self, answer: Answer) -> AsyncIterator[bytes]:
        try:
            for piece in answer.pieces:
                if isinstance(piece, Gate):
                    await piece.passed()
                elif isinstance(piece, bytes):
                    yield piece
                else:
                    yield event_of(piece)
        except (asyncio.CancelledError, GeneratorExit):
            self.left.set()
            raise
        if answer.is_complete:
            yield event_of({"choices": [{"delta": {}, "finish_reason": "stop"}]})
            yield event_of({"choices": [], "usage": answer.usage})
            yield b"data: [DONE]\n\n"


def event_of(piece: str | Body) -> bytes:
    """A server-sent event: of text a part of an answer, else what is given."""
    value = {"choices": [{"delta": {"content": piece}}]} if isinstance(piece, str) else piece
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


@contextmanager
def scripted_page(page: httpx.Response) -> Iterator[ScriptedPage]:
    """A running server."""
    port = free_port()
    scripted = ScriptedPage(page, port)
    server = uvicorn.Server(
        uvicorn.Config(scripted.app, port=port, log_level="error", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield scripted
    finally:
        server.should_exit = True
        thread.join()
