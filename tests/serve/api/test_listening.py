"""The port: clients never take all open files, and a lack of them is no flood of words."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from serve.api.listening import Port
from tests.serve.api.running import Running, running, until

FILES = 120
REST_SECONDS = 1.2


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one() -> None:
    program = (
        "import resource; from serve.api.listening import most_clients\n"
        "most = most_clients()\n"
        "print(most, *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    command = ["prlimit", "--nofile=100:400", sys.executable, "-c", program]
    root = Path(__file__).parents[3]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["200", "400", "400"]


@contextmanager
def idle(server: Running, number: int) -> Iterator[None]:
    """Connections that send nothing."""
    url = httpx.URL(server.url)
    with ExitStack() as stack:
        for _ in range(number):
            one = socket.create_connection((url.host, url.port or 80), 60)
            stack.enter_context(one)
        yield


@pytest.mark.job
def test_many_idle_clients_lock_nobody_out_and_too_few_files_are_said_once(small_dir: Path) -> None:
    words = ["--model", str(small_dir), "--memory_gb", "0.1"]
    with running(*words, before=["prlimit", f"--nofile={FILES}:{FILES}"]) as server:
        folder = Path(f"/proc/{server.process.pid}/fd")
        own = len(list(folder.iterdir()))
        with idle(server, FILES + 30):
            until(lambda: [line for line in server.logged() if line["status"] == 503])
            assert len(list(folder.iterdir())) < FILES
            time.sleep(REST_SECONDS)
            assert httpx.get(f"{server.url}/health").status_code == 200
        until(lambda: len(list(folder.iterdir())) <= own + 1)
        assert not [line for line in server.lines if "ulimit" in line]
        # Fewer than the server had counted on, as where something else takes them.
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (own + 5, FILES))
        before = len(server.lines)
        with idle(server, 50):
            until(lambda: any("ulimit" in line for line in server.lines))
            time.sleep(3)  # asyncio tries again each second
            said = [line for line in server.lines[before:] if not line.startswith("{")]
            assert said == ["Too many open files; new clients wait (ulimit -n gives the limit)"]
        until(lambda: httpx.get(f"{server.url}/health", timeout=60).status_code == 200)
        assert server.end() == 0


def test_connections_over_the_last_limit_are_closed_and_others_of_the_loops_errors_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Port(socket.AF_INET, 2) as port, ExitStack() as stack:
        port.bind(("127.0.0.1", 0))
        port.listen(1)
        clients = [
            stack.enter_context(socket.create_connection(port.getsockname(), 60)) for _ in range(5)
        ]
        accepted = [port.accept()[0] for _ in range(3)]
        for client in clients[3:]:
            with pytest.raises(BlockingIOError):
                port.accept()
            assert client.recv(1) == b""
        accepted[0].close()
        accepted[0].close()
        stack.enter_context(socket.create_connection(port.getsockname(), 60))
        accepted.append(port.accept()[0])
        assert port.number_open == 3
        for one in accepted:
            one.close()
        assert port.number_open == 0
        assert capsys.readouterr().err.count("closed unanswered") == 1
        told: list[dict[str, object]] = []
        loop = asyncio.new_event_loop()
        loop.default_exception_handler = told.append  # type: ignore[method-assign, assignment]
        port.take_error(loop, {"exception": OSError(errno.EMFILE, os.strerror(errno.EMFILE))})
        assert told == []
        port.take_error(loop, {"exception": OSError(errno.EIO, os.strerror(errno.EIO))})
        assert len(told) == 1
        loop.close()
