"""The port of the API, and the HTTP server that listens at it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from qwen_ds.errors import UserError
from serve.api.connections import HEADER_BYTES, patient
from serve.api.gate import Gate
from serve.api.options import ApiOptions

LAST_WORDS_SECONDS = 5
_IDLE_SECONDS = 75
_LOOK_SECONDS = 0.5


@contextmanager
def listening(options: ApiOptions) -> Iterator[socket.socket]:
    """The port. UserError: it is in use, or not this user's or machine's."""
    try:
        info = socket.getaddrinfo(options.host, int(options.port), type=socket.SOCK_STREAM)[0]
        # With its protocol named, asyncio sends small pieces at once (TCP_NODELAY).
        port = socket.socket(info[0], socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise UserError(f"--host {options.host}: {error.strerror}") from None
    with port:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            port.bind(info[4])
        except OSError as error:
            raise UserError(
                f"--port {options.port} of {options.host}: {error.strerror}; expected a free port"
            ) from None
        yield port


class Server(uvicorn.Server):
    """uvicorn, with the signals left to us: it would end by them a second time."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, but idle clients under TLS are not waited for: each may take 30 s to say
        good-bye."""
        aborting = asyncio.ensure_future(self._abort_idle())
        try:
            await super().shutdown(sockets)
        finally:
            aborting.cancel()

    async def _abort_idle(self) -> None:
        """Cut off connections that are found at rest twice in a row."""
        resting: set[Any] = set()
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            found: set[Any] = {c for c in self.server_state.connections if _is_at_rest(c)}
            for one in found & resting:
                one.transport.abort()
            resting = found


def _is_at_rest(connection: Any) -> bool:
    cycle, transport = connection.cycle, connection.transport
    is_done = cycle is None or cycle.response_complete
    return bool(is_done and not transport.get_write_buffer_size())


def configured(options: ApiOptions, gate: Gate) -> uvicorn.Config:
    """The server's settings. UserError: a certificate or key that cannot be read."""
    patience = min(options.body_seconds, options.request_seconds)
    config = uvicorn.Config(
        gate, log_config=None, log_level="error", access_log=False, lifespan="off",
        server_header=False, timeout_keep_alive=_IDLE_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES, http=patient(patience), ws="none",
        timeout_graceful_shutdown=round(options.drain_seconds) + LAST_WORDS_SECONDS,
        ssl_certfile=options.ssl_certfile, ssl_keyfile=options.ssl_keyfile,
    )  # fmt: skip
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"--ssl_certfile {options.ssl_certfile}: {error}") from None
    return config


def url_of(options: ApiOptions, port: int) -> str:
    """The server's address."""
    scheme = "http" if options.ssl_certfile is None else "https"
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{scheme}://{host}:{port}"
