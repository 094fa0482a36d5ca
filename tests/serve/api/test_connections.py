"""Clients that keep the server waiting: for headers, for a body, or to be read."""

from __future__ import annotations

import itertools
import json
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from serve.api.connections import HEADER_BYTES, Clients, Connection, patient
from tests.serve.api.running import until
from tests.serve.api.scripted import scripted_server

PATIENCE = 0.5
HEADERS = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"


class Endless(Sequence[str]):
    """Pieces of an answer without an end."""

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: Any) -> Any:
        return "x" * 20_000

    def __iter__(self) -> Iterator[str]:
        return itertools.repeat(self[0])


def hasty() -> type[Connection]:
    """Connections that soon lose patience."""
    return patient(Clients(PATIENCE))


def connected(url: str, buffer: int | None = None) -> socket.socket:
    place = httpx.URL(url)
    found = socket.socket()
    if buffer is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    found.settimeout(60)
    found.connect((place.host, place.port or 80))
    return found


def chat(**more: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "q"}], **more}).encode()


def drip(client: socket.socket, data: bytes, pause: float = PATIENCE / 10) -> None:
    """Send it byte after byte until the server has cut the connection."""
    try:
        for byte in data:
            client.sendall(bytes([byte]))
            time.sleep(pause)
    except OSError:
        return
    raise AssertionError("the server took it all")


def test_headers_that_never_end_are_cut_off_however_they_come(vocab_path: Path) -> None:
    with scripted_server(vocab_path, lambda job: ["yes"], hasty()) as (url, _):
        with connected(url) as silent:
            assert silent.recv(1) == b""
        with connected(url) as slow:
            drip(slow, b"GET /health HTTP/1.1\r\nx: " + b"a" * 1000)
        with connected(url) as second:
            second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert second.recv(10_000).startswith(b"HTTP/1.1 200")
            drip(second, b"GET /health HTTP/1.1\r\nx: " + b"a" * 1000)


def test_a_body_that_nobody_waits_for_is_cut_off(vocab_path: Path) -> None:
    with (
        scripted_server(vocab_path, lambda job: ["yes"], hasty(), ["key"]) as (url, _),
        connected(url) as client,
    ):
        client.sendall(HEADERS % 1000)
        assert client.recv(10_000).startswith(b"HTTP/1.1 401")
        drip(client, b" " * 999)


def test_a_refusal_reaches_a_client_that_sends_its_whole_body_first(vocab_path: Path) -> None:
    """The body is larger than all buffers between the two: closed with bytes unread, the connection
    would be reset under the client's hands."""
    size = 40_000_000
    with scripted_server(vocab_path, lambda job: ["yes"]) as (url, _), connected(url) as client:
        for _ in range(2):  # the same connection serves the next request
            client.sendall(HEADERS % size + b" " * size)
            assert client.recv(10_000).startswith(b"HTTP/1.1 413")


def test_an_answer_that_takes_longer_is_not_cut_nor_is_the_next_one(vocab_path: Path) -> None:
    with scripted_server(vocab_path, lambda job: ["a"] * 20, hasty()) as (url, pool):
        pool.pause_seconds = PATIENCE / 5
        with httpx.Client(base_url=url, timeout=60) as client:
            for stream in (True, False, True):
                body = chat(stream=stream)
                answer = client.post("/v1/chat/completions", content=body)
                assert answer.status_code == 200
                assert ("[DONE]" if stream else "a" * 20) in answer.text


def test_a_client_that_reads_nothing_is_cut_off_and_its_job_cancelled(vocab_path: Path) -> None:
    with scripted_server(vocab_path, lambda job: Endless(), hasty()) as (url, pool):
        pool.pause_seconds = 0.001
        body = chat(stream=True)
        with connected(url, 4096) as client:
            client.sendall(HEADERS % len(body) + body)
            until(lambda: pool.cancelled)
            (line,) = until(lambda: pool.lines)
            assert line["status"] == 499 and line["error"] == "the client left"


def test_a_client_that_leaves_is_a_499_in_the_log_streaming_or_not(vocab_path: Path) -> None:
    for stream in (False, True):
        with scripted_server(vocab_path, lambda job: Endless()) as (url, pool):
            pool.pause_seconds = 0.1
            body = chat(stream=stream)
            with connected(url) as client:
                client.sendall(HEADERS % len(body) + body)
                until(lambda: pool.jobs_seen)
            (line,) = until(lambda: pool.lines)
            assert line["status"] == 499 and line["error"] == "the client left"
            assert pool.cancelled


def test_an_answer_that_nobody_reads_does_not_keep_its_connection(vocab_path: Path) -> None:
    with scripted_server(vocab_path, lambda job: ["x" * 10**7], hasty()) as (url, pool):
        body = chat()
        with connected(url, 4096) as client:
            client.sendall(HEADERS % len(body) + body)
            until(lambda: pool.lines)
            time.sleep(4 * PATIENCE)
            size = 0
            try:
                while part := client.recv(1 << 20):
                    size += len(part)
            except ConnectionResetError:
                pass
            assert size < 10**7


def test_what_is_no_request_gets_an_error_in_openais_form(vocab_path: Path) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n"
    cases = [
        (b"nonsense\r\n\r\n", 400),
        (head + b"Content-Length: nix\r\n\r\n", 400),
        (head + b"Transfer-Encoding: chunked\r\n\r\nnix\r\n", 400),
        (head + b"x: " + b"a" * 2 * HEADER_BYTES, 431),
    ]
    lines: list[dict[str, Any]] = []
    kind = patient(Clients(PATIENCE, log=lines.append))
    with scripted_server(vocab_path, lambda job: ["yes"], kind) as (url, pool):
        for i, (raw, status) in enumerate(cases):
            with connected(url) as client:
                client.sendall(raw)
                headers, body = whole_answer(client)
            reason = {400: "Bad Request", 431: "Request Header Fields Too Large"}[status]
            assert headers[""] == f"HTTP/1.1 {status} {reason}", raw[:80]
            assert headers["connection"] == "close" and headers["date"].endswith("GMT")
            assert json.loads(body)["error"]["type"] == "invalid_request_error"
            # One line for each, by whoever knows of the request.
            (line,) = until(lambda i=i: [*lines, *pool.lines][i:])  # type: ignore[misc]
            assert line["status"] == status and line["request_id"] == headers["x-request-id"]
            assert line["error"] and line["client"] == "127.0.0.1"
            if status == 400 and b"chunked" in raw:
                assert (line["method"], line["path"]) == ("POST", "/tokenize")
                lines.append(pool.lines.pop())
        assert httpx.get(f"{url}/health").status_code == 200


def whole_answer(client: socket.socket) -> tuple[dict[str, str], bytes]:
    """The headers, under "" the first line, and the body, up to the end of the connection."""
    answer = b"".join(iter(lambda: client.recv(10_000), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    return {"": first} | {n.lower(): v for n, _, v in (one.partition(": ") for one in rest)}, body


def test_the_log_has_no_header_that_was_not_one(vocab_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    kind = patient(Clients(PATIENCE, log=lines.append))
    with scripted_server(vocab_path, lambda job: ["yes"], kind) as (url, _), connected(url) as one:
        one.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization Bearer my-key\r\n\r\n")
        assert whole_answer(one)[0][""].startswith("HTTP/1.1 400")
    assert [line["status"] for line in lines] == [400] and "my-key" not in str(lines)


def test_a_new_client_takes_the_place_of_the_one_that_has_rested_longest(vocab_path: Path) -> None:
    ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with (
        scripted_server(vocab_path, lambda job: ["yes"], patient(Clients(60, most=3))) as (url, _),
        connected(url) as first,
        connected(url) as second,
        connected(url) as third,
    ):
        for one in (second, third, first):  # all of them rest, and the second has longest
            one.sendall(ask)
            assert one.recv(10_000).startswith(b"HTTP/1.1 200")
        time.sleep(1.1)
        with connected(url) as fourth:
            fourth.sendall(ask)
            assert fourth.recv(10_000).startswith(b"HTTP/1.1 200")
            assert second.recv(1) == b""
            for one in (first, third):
                one.sendall(ask)
                assert one.recv(10_000).startswith(b"HTTP/1.1 200")


def test_a_client_too_many_is_refused_where_nobody_rests(vocab_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    kind = patient(Clients(60, most=2, log=lines.append))
    with scripted_server(vocab_path, lambda job: Endless(), kind) as (url, pool):
        pool.pause_seconds = 0.05
        body = chat(stream=True)
        with connected(url) as first, connected(url) as second:
            for one in (first, second):
                one.sendall(HEADERS % len(body) + body)
            until(lambda: len(pool.jobs_seen) == 2)
            with connected(url) as third:
                third.sendall(HEADERS % 1_000_000 + b" " * 1_000_000)
                headers, answer = whole_answer(third)
            assert headers[""] == "HTTP/1.1 503 Service Unavailable"
            assert headers["retry-after"] == "1"
            assert json.loads(answer)["error"]["type"] == "server_error"
            (line,) = lines
            assert line["status"] == 503 and line["request_id"] == headers["x-request-id"]
            assert first.recv(100).startswith(b"HTTP/1.1 200"), "those who were there stay"
        until(lambda: pool.cancelled == 2)
        with connected(url) as fourth:
            fourth.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert fourth.recv(100).startswith(b"HTTP/1.1 200")
