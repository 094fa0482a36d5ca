"""Connections of clients: uvicorn's, with limits of time and with errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.api.errors import ApiError

HEADER_BYTES = 64 * 1024  # of one request
_LINGER_SECONDS = 1.0


class Connection(H11Protocol):
    """HTTP/1.1 with one client, which is cut off where it keeps us waiting.

    uvicorn itself waits without end for headers, for the rest of a body once it has answered, and
    for a client that reads nothing.
    """

    patience: ClassVar[float] = 60.0  # seconds
    _waiting: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _is_refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_stalled()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            super().data_received(data)
            self._watch()

    def _watch(self) -> None:
        """Give the client so long for the whole of a request's headers; more bytes of them do not
        lengthen that."""
        if self._is_refused or (self.cycle is not None and not self.cycle.response_complete):
            self._stop_waiting()
        elif self._waiting is None and not self.transport.is_closing():
            self._waiting = self.loop.call_later(self.patience, self.transport.abort)

    def on_response_complete(self) -> None:
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self.patience, self._abort_if_unread)
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:  # it was answered before its body was there
            self._watch()

    def _abort_if_unread(self) -> None:
        if self.cycle.response_complete and self.transport.get_write_buffer_size():
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self.patience, self.transport.abort)

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
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if status == 431:
            text = f"the headers are too large; expected at most {HEADER_BYTES:,} bytes"
        else:
            text = f"this is not a request in HTTP/1.1: {error or msg}"
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(ApiError(status, text).body()).encode()
            headers = [("content-type", "application/json"), ("connection", "close")]
            headers.append(("content-length", str(len(body))))
            for event in (
                h11.Response(status_code=status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # nothing more can be sent
            self.cycle.message_event.set()
        # Closed with bytes unread, it would be reset, and the answer lost with it.
        self._is_refused = True
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)


def patient(seconds: float) -> type[Connection]:
    """Connections that wait so long for their clients."""
    return type("PatientConnection", (Connection,), {"patience": seconds})
