"""The port of the API, the HTTP server that listens at it, and the signals that end it."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import uvicorn

from qwen_ds.errors import UserError
from qwen_ds.signals import last_words
from qwen_ds.terminal import show
from serve.api.connections import HEADER_BYTES, Clients, Connection, patient
from serve.api.gate import Gate, Log
from serve.api.options import ApiOptions
from serve.api.tls import tls_context

LAST_WORDS_SECONDS = 5
_HURRIED_SECONDS = 0.5
_IDLE_SECONDS = 75
_LOOK_SECONDS = 0.5
_MOST_CLIENTS = 16_384
_BACKLOG = 2048  # of clients that nobody has accepted yet; the kernel's own limit may be lower
_NOTICE_SECONDS = 60
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)


def most_clients() -> int:
    """The clients to have at a time: half of the open files that this process may have.

    Its soft limit of open files is raised to the hard one. The other half is for clients that are
    being refused, for files, and for engines that start anew.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # a container may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_CLIENTS if most == resource.RLIM_INFINITY else min(most // 2, _MOST_CLIENTS)


class _Accepted(socket.socket):
    """A connection that counts as open until it is closed."""

    def __init__(self, port: Port, descriptor: int) -> None:
        super().__init__(port.family, port.type, port.proto, descriptor)
        self._port = port
        port.number_open += 1

    def close(self) -> None:
        if self.fileno() >= 0:
            self._port.number_open -= 1
        super().close()


class Port(socket.socket):
    """The socket at which the server listens; it never lets clients use up all open files.

    Clients over `most_clients` are refused in words (connections.py), and that takes a while; so
    do TLS handshakes. There is room for half as many of both; more are closed at once.
    """

    def __init__(self, family: int, most: int) -> None:
        # With its protocol named, asyncio sends small pieces at once (TCP_NODELAY).
        super().__init__(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self.most_clients, self.number_open = most, 0
        self._next_notice = 0.0

    def listen(self, backlog: int = _BACKLOG, /) -> None:
        """Listen. asyncio's backlog, which is ours to ignore, is also the number of clients that it
        accepts before any of them can be refused."""
        super().listen(_BACKLOG)

    def accept(self) -> tuple[socket.socket, Any]:
        given, address = super().accept()
        if self.number_open >= self.most_clients * 3 // 2:
            given.close()
            self._notice(f"{self.number_open:,} connections are open; more are closed unanswered")
            raise BlockingIOError  # as if there were none
        return _Accepted(self, given.detach()), address

    def take_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Say an error that the event loop has met; a lack of open files once a minute, since
        asyncio meets it at each of its tries."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _OUT_OF_FILES:
            self._notice(f"{error.strerror}; new clients wait (ulimit -n gives the limit)")
        else:
            loop.default_exception_handler(context)

    def _notice(self, text: str) -> None:
        now = time.monotonic()
        if now >= self._next_notice:
            self._next_notice = now + _NOTICE_SECONDS
            show(text, err=True)


@contextmanager
def listening(options: ApiOptions) -> Iterator[Port]:
    """The port. UserError: it is in use, or not this user's or machine's."""
    try:
        info = socket.getaddrinfo(options.host, int(options.port), type=socket.SOCK_STREAM)[0]
        port = Port(info[0], most_clients())
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
        resting: set[Connection] = set()
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            connections = cast(set[Connection], self.server_state.connections)
            found = {connection for connection in connections if connection.is_at_rest}
            for one in found & resting:
                one.transport.abort()
            resting = found


def configured(
    options: ApiOptions, gate: Gate, most: int, log: Callable[[dict[str, Any]], None]
) -> uvicorn.Config:
    """The server's settings, for so many clients. UserError: a certificate or key that cannot be
    read."""
    patience = min(options.body_seconds, options.request_seconds)
    context = tls_context(options)
    config = uvicorn.Config(
        gate, log_config=None, log_level="error", access_log=False, lifespan="off",
        server_header=False, timeout_keep_alive=_IDLE_SECONDS,
        h11_max_incomplete_event_size=HEADER_BYTES, http=patient(Clients(patience, most, log)),
        ws="none", backlog=1,
        timeout_graceful_shutdown=round(options.drain_seconds) + LAST_WORDS_SECONDS,
    )  # fmt: skip
    config.load()
    config.ssl = context
    return config


def on_signals(end: Callable[[], None], log: Log) -> None:
    """Call `end` at the first signal; a second one ends the process at once, and its engines."""
    is_ending = False

    def stop(number: int) -> None:
        nonlocal is_ending
        if is_ending:
            for engine in multiprocessing.active_children():
                engine.kill()
            log.close(_HURRIED_SECONDS)
            os._exit(last_words(number))
        is_ending = True
        end()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)


def url_of(options: ApiOptions, port: int) -> str:
    """The server's address."""
    scheme = "http" if options.ssl_certfile is None else "https"
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"{scheme}://{host}:{port}"
