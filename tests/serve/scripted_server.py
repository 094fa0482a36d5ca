"""A server with OpenAI's API whose answers and troubles a test scripts."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.jobs import free_port

Body = dict[str, Any]
Trouble = Callable[["Handler", Body, int], bool]
"""Acts in place of an answer, and returns whether it did; it gets the number of tries before."""


def answer_to(body: Body) -> str:
    """A text that follows from what was asked alone."""
    asked = body.get("prompt") or body["messages"][-1]["content"]
    return f"回答 {hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}: {asked[-20:]}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: ScriptedServer  # type: ignore[assignment]

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, value: object, **headers: str) -> None:
        raw = json.dumps(value, ensure_ascii=False).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def break_off(self, beginning: bytes = b'{"choices": [{"mess') -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(beginning)
        self.close_connection = True

    def stream(self, deltas: list[str], reason: str | None, seconds: float = 0.0) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for delta in deltas:
            self._event({"choices": [{"delta": {"content": delta}, "finish_reason": None}]})
            time.sleep(seconds)
        if reason is not None:
            self._event({"choices": [{"delta": {}, "finish_reason": reason}]})
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, value: object) -> None:
        raw = json.dumps(value, ensure_ascii=False).encode()
        self.wfile.write(b"data: " + raw + b"\n\n")
        self.wfile.flush()

    def do_GET(self) -> None:
        self.server.authorized.append(self.headers.get("Authorization"))
        if self.server.trouble(self, {}, self.server.count("models")):
            return
        if self.path != "/v1/models":
            self.reply(404, {"detail": "Not Found"})
            return
        self.reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        self.server.authorized.append(self.headers.get("Authorization"))
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        self.server.bodies.append(body)
        with self.server.under_way():
            time.sleep(self.server.seconds)
            if self.server.trouble(self, body, self.server.count(raw.decode())):
                return
            text = answer_to(body)
            if body["stream"]:
                self.stream(list(text), "stop")
                return
            key = "text" if "prompt" in body else "message"
            content = text if "prompt" in body else {"role": "assistant", "content": text}
            usage = {"prompt_tokens": 5, "completion_tokens": len(text)}
            choice = {key: content, "finish_reason": "stop"}
            self.reply(200, {"choices": [choice], "usage": usage})


class ScriptedServer(ThreadingHTTPServer):
    """The server, with what it was asked."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, port: int, trouble: Trouble = lambda *_: False) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.trouble, self.seconds, self.models = trouble, 0.0, ["qwen"]
        self.bodies: list[Body] = []
        self.authorized: list[str | None] = []
        self.most_under_way = 0
        self._under_way = 0
        self._connections: list[socket.socket] = []
        self._tries: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, key: str) -> int:
        """How often this was asked before."""
        with self._lock:
            self._tries[key] += 1
            return self._tries[key] - 1

    @contextmanager
    def under_way(self) -> Iterator[None]:
        with self._lock:
            self._under_way += 1
            self.most_under_way = max(self.most_under_way, self._under_way)
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def cut_all(self) -> None:
        """Close every connection, as the end of the server's process would."""
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: object) -> None:
        """Clients leave as they like."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def scripted(
    trouble: Trouble = lambda *_: False, port: int | None = None
) -> Iterator[ScriptedServer]:
    """A running server."""
    server = ScriptedServer(free_port() if port is None else port, trouble)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        server.cut_all()
        thread.join()


def closed_url() -> tuple[int, str]:
    """A port at which nobody listens, and its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return port, f"http://127.0.0.1:{port}/v1"
