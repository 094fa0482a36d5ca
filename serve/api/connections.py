"""Connections of clients: uvicorn's, with limits and with errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from serve.api.errors import ApiError
from serve.api.gate import Passing, line_of, passing_of

HEADER_BYTES = 64 * 1024  # of one request
_LINGER_SECONDS = 1.0
_REST_SECONDS = 1.0  # of a connection that makes room for another one, at least


@dataclass(slots=True)
class Clients:
    """The limits of all connections of one server, those that wait for a request, and those that
    were refused and have not gone yet.

    Args:
        patience: seconds that a client may keep us waiting.
        most: clients at a time. One more takes the place of the one that has rested longest, or is
            refused where none rests.
        log: is told one object for what is no request and for each client that is refused.
    """

    patience: float = 60.0
    most: int = 10_000
    log: Callable[[dict[str, Any]], None] = lambda line: None
    # Since when (seconds of the loop), the longest first.
    resting: dict[Connection, float] = field(default_factory=dict)
    leaving: dict[Connection, None] = field(default_factory=dict)

    def longest_resting(self, now: float) -> Connection | None:
        """The connection that makes room for another one; None where all have something to do."""
        for connection, since in self.resting.items():
            if now - since < _REST_SECONDS:
                return None
            if connection.is_at_rest:
                return connection
        return None


class Connection(H11Protocol):
    """HTTP/1.1 with one client, which is cut off where it keeps us waiting.

    uvicorn itself waits without end for headers, for the rest of a body once it has answered, and
    for a client that reads nothing.
    """

    clients: ClassVar[Clients] = Clients()
    _waiting: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        clients, now = self.clients, self.loop.time()
        if len(self.connections) - len(clients.leaving) > clients.most:
            resting = clients.longest_resting(now)
            if resting is None:
                came = f"{clients.most:,} clients are connected"
                self._refuse(ApiError(503, f"{came}; send it again", retry_after=1))
                return
            resting.transport.abort()
            # At once, so that the next client does not end another one.
            self.connections.discard(resting)
            del clients.resting[resting]
        clients.resting[self] = now
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self.clients.resting.pop(self, None)
        self.clients.leaving.pop(self, None)
        self._stop_waiting()
        self._stop_stalled()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            super().data_received(data)
            self._watch()

    @property
    def _is_under_way(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_at_rest(self) -> bool:
        """Whether no request is under way and every answer is gone."""
        return not (self._is_under_way or self.transport.get_write_buffer_size())

    def _watch(self) -> None:
        """Give the client so long for the whole of a request's headers; more bytes of them do not
        lengthen that."""
        if self._is_refused or self._is_under_way:
            self.clients.resting.pop(self, None)
            self._stop_waiting()
        elif self._waiting is None and not self.transport.is_closing():
            self._waiting = self.loop.call_later(self.clients.patience, self.transport.abort)

    def on_response_complete(self) -> None:
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self.clients.patience, self._abort_if_unread)
        super().on_response_complete()
        if not (self._is_under_way or self._is_refused or self.transport.is_closing()):
            self.clients.resting[self] = self.loop.time()
        if self.conn.their_state is h11.SEND_BODY:  # it was answered before its body was there
            self._watch()

    def _abort_if_unread(self) -> None:
        if self.cycle.response_complete and self.transport.get_write_buffer_size():
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self.clients.patience, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_stalled()
        super().resume_writing()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _stop_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no request, and close the connection."""
        found = sys.exception()
        status = found.error_status_hint if isinstance(found, h11.RemoteProtocolError) else 400
        if status == 431:
            text = f"the headers are too large; expected at most {HEADER_BYTES:,} bytes"
        else:
            text = f"this is not a request in HTTP/1.1: {found or msg}"
        self._refuse(ApiError(status, text))

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error, where that can still be done, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            is_begun = self._is_under_way
            scope: Any = self.scope
            passing = passing_of(scope) if is_begun else Passing()
            passing.status = error.status
            # What is wrong; behind a second colon is what the client has sent, a key perhaps.
            passing.error = ": ".join(error.message.split(": ")[:2])
            self._answer(error, passing)
            if not is_begun:
                self.clients.log(line_of({"client": self.client}, passing))
        if self._is_under_way:
            self.cycle.disconnected = True  # nothing more can be sent
            self.cycle.message_event.set()
        # Closed with bytes unread, it would be reset, and the answer lost with it.
        self._is_refused = True
        self._watch()
        leaving = self.clients.leaving
        if len(leaving) > self.clients.most // 4:
            oldest = next(iter(leaving))
            del leaving[oldest]
            oldest.transport.abort()
        leaving[self] = None
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def _answer(self, error: ApiError, passing: Passing) -> None:
        headers, body = error.encoded()
        headers |= {"connection": "close", "x-request-id": passing.request_id}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        for event in (
            h11.Response(
                status_code=error.status,
                headers=[*self.server_state.default_headers, *raw],
                reason=STATUS_PHRASES[error.status],
            ),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")


def patient(clients: Clients) -> type[Connection]:
    """The class of the connections of one server, for uvicorn, which makes them."""
    return type("PatientConnection", (Connection,), {"clients": clients})
