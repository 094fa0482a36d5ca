"""Limits of a server: keys, sizes, pace, time, dead engines, and its own end."""

from __future__ import annotations

import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.api.running import Running, running, until

pytestmark = pytest.mark.job
CHAT = "/v1/chat/completions"
TOKENS = 200


def chat(tokens: int, text: str = "q") -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}


def content_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def connected(server: Running) -> socket.socket:
    url = httpx.URL(server.url)
    found = socket.create_connection((url.host, url.port or 80))
    found.settimeout(60)
    return found


def test_slow_huge_and_many_requests_harm_nobody(full_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key\nsecond-key\n")
    file.chmod(0o644)
    limits = ["--max_body_mb", "0.01", "--body_seconds", "1", "--request_seconds", "4"]
    limits += ["--slots", "1", "--max_queue", "1", "--api_key_file", str(file)]
    with running("--model", str(full_dir), *limits) as server:
        keys_are_asked_for(server)
        server.client.headers["Authorization"] = "Bearer first-key"
        post = server.client.post
        assert post("/tokenize", content=b" " * 20_000).status_code == 413
        chunks = (b" " * 1000 for _ in range(20))  # without a length
        assert post("/tokenize", content=chunks).status_code == 413
        with connected(server) as slow:
            key = b"Authorization: Bearer first-key"
            slow.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\n" + key)
            slow.sendall(b"\r\nContent-Length: 100\r\n\r\n{")
            assert slow.recv(100).startswith(b"HTTP/1.1 408")
        with connected(server) as large:
            large.sendall(b"GET / HTTP/1.1\r\nx: " + b"a" * 100_000)
            assert large.recv(100).startswith(b"HTTP/1.1 431")
        with connected(server) as silent:
            assert silent.recv(1) == b""
        with connected(server) as half:
            half.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            half.shutdown(socket.SHUT_WR)
            assert half.recv(100).startswith(b"HTTP/1.1 200")
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda _: post(CHAT, json=chat(8000)), range(3)))
        assert sorted(answer.status_code for answer in answers) == [503, 504, 504]
        refused = next(answer for answer in answers if answer.status_code == 503)
        assert int(refused.headers["retry-after"]) >= 1
        assert post(CHAT, json=chat(1)).status_code == 200
        assert server.figure("vllm:num_requests_running") == 0


def keys_are_asked_for(server: Running) -> None:
    assert any("other users can read the keys" in line for line in server.lines)
    get = server.client.get
    assert get("/health").status_code == 200
    for wrong in ("", "Bearer nix", "Basic nix", "first-key"):
        response = get("/v1/models", headers={"Authorization": wrong} if wrong else {})
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert get("/v1/models", headers={"Authorization": "Bearer second-key"}).status_code == 200
    assert get("/v1/models", auth=("anybody", "first-key")).status_code == 200


def test_a_dead_engine_ends_its_requests_alone_and_a_signal_lets_answers_end(
    full_dir: Path,
) -> None:
    words = ["--model", str(full_dir), "--engines", "2", "--drain_seconds", "3"]
    with running(*words) as server, ThreadPoolExecutor(4) as pool:
        engines = server.engines()
        assert len(engines) == 2

        def ask(tokens: int, text: str = "q") -> Any:
            return pool.submit(server.client.post, CHAT, json=chat(tokens, text))

        texts = ["q", "\u4f60\u597d", "Name three rivers.", "1+1="]
        known = [content_of(ask(TOKENS, text).result()) for text in texts]
        assert len(set(known)) == 4
        answers = [ask(TOKENS, text) for text in texts]
        until(lambda: server.figure("vllm:num_requests_running") == 4)
        os.kill(engines[0], signal.SIGKILL)
        codes = sorted(answer.result().status_code for answer in answers)
        assert codes == [200, 200, 500, 500]
        for answer, text in zip(answers, known, strict=True):
            if answer.result().status_code == 200:
                assert content_of(answer.result()) == text
            else:
                assert answer.result().json()["error"]["code"] == "engine_gone"
        until(lambda: server.client.get("/health").status_code == 200, 120)
        short, long = ask(5), ask(8000)
        until(lambda: server.figure("vllm:num_requests_running") >= 1)
        assert server.end() == 0
        assert short.result().json()["usage"]["completion_tokens"] == 5
        assert long.result().json()["error"]["code"] == "engine_gone"


def test_a_second_signal_ends_at_once_while_an_answer_is_under_way(full_dir: Path) -> None:
    words = ["--model", str(full_dir), "--drain_seconds", "600"]
    with running(*words) as server, server.connected(chat(8000) | {"stream": True}, CHAT) as stream:
        assert stream.recv(100).startswith(b"HTTP/1.1 200")
        engines = server.engines()
        server.process.send_signal(signal.SIGINT)
        until(lambda: refuses(server))
        assert server.process.poll() is None
        assert server.end(signal.SIGTERM) == 128 + signal.SIGTERM
        until(lambda: not any(Path(f"/proc/{engine}").exists() for engine in engines))


def refuses(server: Running) -> bool:
    """Whether the server takes no more clients."""
    try:
        connected(server).close()
    except ConnectionRefusedError:
        return True
    return False
