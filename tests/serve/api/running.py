"""A server of the API as a process, as users start it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 120


class Running:
    """A server, what it prints, and a client for it."""

    def __init__(self, words: list[str], threads: int, before: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "serve.api", "--port", "0", *words],
            cwd=Path(__file__).parents[3],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = until(self._ready_url, START_SECONDS, lambda: f"{self.lines}")
        self.client = httpx.Client(base_url=self.url, timeout=60, verify=False)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def _ready_url(self) -> str | None:
        assert self.process.poll() is None, self.lines
        found = [re.search(r"^ready at (\S+)$", line) for line in self.lines]
        return next((match[1] for match in found if match), None)

    def logged(self) -> list[dict[str, Any]]:
        """The lines of the log."""
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    def figure(self, name: str) -> float:
        """The sum of a figure of /metrics over its labels."""
        text = self.client.get("/metrics").text
        values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        assert values, name
        return sum(map(float, values))

    def engines(self) -> list[int]:
        """The processes of the engines."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                words = (place / "cmdline").read_bytes()
            except OSError:  # it has ended meanwhile
                continue
            if parent == self.process.pid and b"spawn_main" in words:
                found.append(int(place.name))
        return sorted(found)

    def connected(self, body: dict[str, Any], path: str, *headers: str) -> socket.socket:
        """A connection of its own, over which a POST was sent."""
        url, raw = httpx.URL(self.url), json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", f"Host: {url.host}:{url.port}"]
        lines += [f"Content-Length: {len(raw)}", "Content-Type: application/json", *headers]
        found = socket.create_connection((url.host, url.port or 80))
        found.settimeout(60)
        found.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + raw)
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end; the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join(10)
        return code


@contextmanager
def running(*words: str, threads: int = 1, before: Sequence[str] = ()) -> Iterator[Running]:
    """A server that runs inside the block; each engine has so many threads at most. `before` are
    words of another command that starts it."""
    server = Running(list(words), threads, before)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)
        server.client.close()


def until(found: Callable[[], Any], seconds: float = 30, why: Callable[[], str] = str) -> Any:
    """Wait until `found` gives something, and return that."""
    ends = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < ends, why()
        time.sleep(0.05)
    return value


def events(lines: Iterator[str]) -> list[dict[str, Any]]:
    """The objects of a stream of server-sent events, which must end as OpenAI's do."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(one) for one in data[:-1]]
