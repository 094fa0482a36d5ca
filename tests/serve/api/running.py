"""A server of the API as a process, as users start it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 120


class Running:
    """A server, what it prints, and a client for it."""

    def __init__(self, words: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serve.api", "--port", "0", *words],
            cwd=Path(__file__).parents[3],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
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

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and wait for the end; the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join(10)
        return code


@contextmanager
def running(*words: str) -> Iterator[Running]:
    """A server that runs inside the block."""
    server = Running(list(words))
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
