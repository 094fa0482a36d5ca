"""The gate that every HTTP request passes: its id, keys, origins, the body, and the log.

It is plain ASGI, so that it also sees the end of a stream and the client that leaves.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_ds.errors import UserError
from qwen_ds.terminal import show_json
from serve.api.errors import ApiError
from serve.api.origins import require_own_page

MOST_REQUESTS = 4096  # under way
OPEN_PATHS = ("/", "/health")  # without a key: the page asks for one by itself
_OPEN_BODY_BYTES = 1024
# Of bodies that are still coming: so many whole ones, and never less than so many bytes.
_WHOLE_BODIES, _LEAST_BODIES_BYTES = 32, 256 * 10**6
_LOG_LINES = 10_000  # that may wait for a slow reader
_REQUEST_ID = b"x-request-id"
_ID_CHARACTERS = 128


@dataclass(slots=True)
class Passing:
    """One request on its way, as the log tells it; routes add to it (scope["passing"])."""

    began: float = field(default_factory=time.monotonic)
    status: int = 0
    model: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)


def passing_of(scope: Scope) -> Passing:
    """The request's own, made at the first call; a client may have sent the id."""
    if "passing" not in scope:
        given = dict(scope["headers"]).get(_REQUEST_ID, b"").decode("latin-1")
        fits = 0 < len(given) <= _ID_CHARACTERS and given.isascii() and given.isprintable()
        scope["passing"] = Passing(request_id=given) if fits else Passing()
    found: Passing = scope["passing"]
    return found


class Gate:
    """ASGI middleware around the whole app."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        max_body_bytes: int,
        body_seconds: float,
        log: Callable[[dict[str, Any]], None],
        cors_origins: Sequence[str] = (),
        host: str | None = None,
    ) -> None:
        """
        Args:
            keys: any of them lets a request pass; none: every request passes.
            body_seconds: for a client to send its body.
            log: is told one object a request.
            cors_origins: of pages that may ask from a browser; they can read our errors, too.
            host: the address at which the server listens; None: the Host of a request is not
                looked at.
        """
        self._app, self._keys = app, [key.encode() for key in keys]
        self._max_bytes, self._seconds, self._log = max_body_bytes, body_seconds, log
        self._origins, self._host, self._under_way = cors_origins, host, 0
        self._held_bytes = 0  # of bodies that the app does not have yet
        self._most_held_bytes = max(_WHOLE_BODIES * max_body_bytes, _LEAST_BODIES_BYTES)
        self._checked: ASGIApp = self._check
        if cors_origins:
            self._checked = CORSMiddleware(
                self._check, cors_origins, allow_methods=["*"], allow_headers=["*"],
                expose_headers=["retry-after", "x-should-retry", "x-request-id"],
            )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passing = passing_of(scope)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                passing.status = message["status"]
                own = (_REQUEST_ID, passing.request_id.encode())
                message = {**message, "headers": [*message.get("headers", ()), own]}
            await send(message)

        self._under_way += 1
        try:
            await self._checked(scope, receive, sending)
        finally:
            self._under_way -= 1
            self._log(line_of(scope, passing))

    async def _check(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through to the app, with its body."""
        passing: Passing = scope["passing"]
        try:
            if self._under_way > MOST_REQUESTS:
                came = f"more than {MOST_REQUESTS:,} requests are under way"
                raise ApiError(503, f"{came}; send it again", retry_after=1)
            if self._keys:
                self._require_key(scope)
            else:
                require_own_page(scope, self._host, self._origins)
            body = await self._body(scope, receive)
            await self._app(scope, _Replayed(body, receive), send)
        except ApiError as error:
            passing.error = error.logged()
            if not passing.status:
                await _send_error(send, error)
        except _Gone:
            if not passing.status:  # else what came was no HTTP, and was answered so
                passing.status = 499
                passing.error = "the client left before its request was there"

    def _require_key(self, scope: Scope) -> None:
        if _is_open(scope):
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, value = given.partition(b" ")
        value = value.strip()
        if kind.lower() == b"basic":
            try:
                value = base64.b64decode(value, validate=True).partition(b":")[2]
            except binascii.Error:
                value = b""
        elif kind.lower() != b"bearer":
            value = b""
        # All of them, so that the time tells nothing.
        matches = [hmac.compare_digest(value, key) for key in self._keys]
        if not any(matches):
            came = "no key" if not value else "a key that is not known"
            raise ApiError(
                401, f"{came}; expected Authorization: Bearer KEY", code="invalid_api_key"
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. ApiError: it is too large (413), comes too slowly (408), or there is no
        room for it beside the others (503)."""
        most = _OPEN_BODY_BYTES if _is_open(scope) else self._max_bytes
        too_large = ApiError(413, f"the body is too large; expected at most {most:,} bytes")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise too_large
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self._seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    part, more = message.get("body", b""), message.get("more_body", False)
                    parts.append(part)
                    size += len(part)
                    self._held_bytes += len(part)
                    if size > most:
                        raise too_large
                    if self._held_bytes > self._most_held_bytes:
                        came = f"bodies of {self._most_held_bytes:,} bytes are under way"
                        raise ApiError(503, f"{came}; send it again", retry_after=1)
            return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408, f"the body is incomplete; expected all of it within {self._seconds:g} s"
            ) from None
        finally:
            self._held_bytes -= size


def _is_open(scope: Scope) -> bool:
    """Whether a request needs no key; such ones have no use for a body either."""
    return scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS"


class _Gone(Exception):
    """The client has left."""


class _Replayed:
    """A receive that gives the body once, and then what the client does."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _send_error(send: Send, error: ApiError) -> None:
    headers, body = error.encoded()
    if error.status == 408:
        headers["connection"] = "close"
    # With the others the connection stays: what is left of the body is read and thrown away. Closed
    # with bytes unread it would be reset, and the answer lost with it.
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def line_of(scope: Scope, passing: Passing) -> dict[str, Any]:
    """The line of the log for a request that is over; what never was one has no method."""
    client = scope.get("client") or ("", 0)
    line: dict[str, Any] = {
        "time": _now(),
        "request_id": passing.request_id,
        "client": client[0],
        "method": scope.get("method"),
        "path": scope.get("path"),
        "status": passing.status,
        "seconds": round(time.monotonic() - passing.began, 4),
    }
    if passing.model is not None:
        line["model"] = passing.model
    line |= passing.figures
    return line if passing.error is None else line | {"error": passing.error}


class Log:
    """Lines of JSON on standard output, written by a thread: nobody who reads them slowly, or not
    at all, holds up the server. Lines that find no room are dropped and counted."""

    def __init__(self, most: int = _LOG_LINES) -> None:
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(most)
        # Each is counted by one thread: lines without room, lines not written, and those told of.
        self._dropped = self._failed = self._told = 0
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    def put(self, line: dict[str, Any]) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self, seconds: float) -> None:
        """Write what is left, for so long at most."""
        try:
            self._lines.put(None, timeout=seconds)
        except queue.Full:
            return
        self._writer.join(seconds)

    def _write(self) -> None:
        is_open = True
        while is_open:
            line = self._lines.get()
            is_open = line is not None
            lines = [] if line is None else [line]
            lost = self._dropped + self._failed
            if lost > self._told:
                lines.append({"time": _now(), "dropped": lost - self._told})
            try:
                show_json([json.dumps(one, ensure_ascii=False) for one in lines])
            except (OSError, UserError):  # such as a full disk, which may have room again
                self._failed += line is not None
            else:
                self._told = lost
