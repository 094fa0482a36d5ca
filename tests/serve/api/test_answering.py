"""Answers on their way: what the log tells, who may ask from where, and no event is lost."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_ds.model.tokenizer import load_encoding
from serve.api import gate as gates
from serve.api.answering import Answering
from serve.api.app import Front, create_app
from serve.api.errors import ApiError
from serve.api.gate import Gate, Log
from serve.api.metrics import Metrics
from serve.api.served import Served
from tests.serve.api.scripted import ScriptedPool, scripted_app

BODY = {"messages": [{"role": "user", "content": "秘密"}]}


def answered(
    vocabulary: Path,
    log_text: bool,
    headers: dict[str, str] | None = None,
    keys: Sequence[str] = (),
    jobs: int = 0,
    is_ready: bool = True,
    **more: Any,
) -> tuple[httpx.Response, list[dict[str, Any]]]:
    pool: Any = ScriptedPool(lambda job: ["ant", "wort"])
    pool.jobs, pool.is_ready = jobs, is_ready
    encoding = load_encoding(vocabulary)
    served = Served(("qwen",), (), encoding, 8192, True)
    metrics = Metrics(pool, served.names)
    answering = Answering(pool, metrics, 9, 60.0, encoding.decode if log_text else None)
    lines: list[dict[str, Any]] = []
    app = create_app(Front(served, pool, metrics, answering))
    gate = Gate(app, keys, 10**6, 10.0, lines.append, ["https://page.example"])

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(gate)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            path = "/v1/chat/completions"
            return await client.post(path, json=BODY | more, headers=headers)

    return asyncio.run(post()), lines


def test_the_log_has_figures_and_texts_only_where_they_are_asked_for(vocab_path: Path) -> None:
    for stream in (False, True):
        _, (line,) = answered(vocab_path, False, stream=stream)
        assert line["status"] == 200 and line["model"] == "qwen" and line["completion_tokens"] == 2
        assert "秘密" not in str(line) and "wort" not in str(line)
        _, (line,) = answered(vocab_path, True, stream=stream)
        assert "秘密" in line["prompts"][0] and line["answers"] == ["antwort"]


def test_pages_of_other_origins_are_let_in_by_name(vocab_path: Path) -> None:
    for origin, allowed in (("https://page.example", True), ("https://other.example", False)):
        response, _ = answered(vocab_path, False, {"Origin": origin})
        assert ("access-control-allow-origin" in response.headers) == allowed
    response, _ = answered(vocab_path, False, {"Origin": "https://page.example"}, ["key"])
    assert response.status_code == 401 and "access-control-allow-origin" in response.headers


def test_more_answers_than_may_wait_are_a_503_with_retry_after(vocab_path: Path) -> None:
    response, (line,) = answered(vocab_path, False, jobs=5, n=5)
    assert response.status_code == 503 and response.headers["retry-after"] == "1"
    assert "at most 9" in line["error"]


def test_more_answers_than_can_ever_be_are_a_400(vocab_path: Path) -> None:
    response, _ = answered(vocab_path, False, n=10)
    assert response.status_code == 400 and response.json()["error"]["param"] == "n"


def test_without_an_engine_a_request_is_a_503_whatever_it_would_need(vocab_path: Path) -> None:
    response, _ = answered(vocab_path, False, is_ready=False, n=10)
    assert response.status_code == 503 and response.headers["retry-after"] == "5"


def sent(
    vocabulary: Path, ask: Callable[[httpx.AsyncClient], Any], keys: Sequence[str] = ()
) -> tuple[httpx.Response, ScriptedPool]:
    """The answer to one request."""
    gate, pool = scripted_app(vocabulary, lambda job: ["yes"], keys)

    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(gate)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await ask(client)

    return asyncio.run(answer()), pool


def test_without_keys_a_foreign_page_is_refused_and_with_them_it_needs_one(
    vocab_path: Path,
) -> None:
    evil = {"Origin": "http://evil.example"}
    response, _ = answered(vocab_path, False, evil)
    assert response.status_code == 403 and "Origin" in response.json()["error"]["message"]
    response, _ = answered(vocab_path, False, evil, ["key"])
    assert response.status_code == 401
    response, _ = answered(vocab_path, False, evil | {"Authorization": "Bearer key"}, ["key"])
    assert response.status_code == 200


def test_routes_without_a_key_take_no_bodies(vocab_path: Path) -> None:
    async def chunks() -> Any:
        for _ in range(3):
            yield b" " * 1000

    for method, path in (("GET", "/"), ("POST", "/health"), ("OPTIONS", "/v1/models")):
        for body in (b" " * 3000, chunks()):
            response, _ = sent(
                vocab_path, lambda c: c.request(method, path, content=body), ["key"]  # noqa: B023
            )  # fmt: skip
            assert response.status_code == 413


def test_more_requests_than_can_be_held_are_a_503_with_retry_after(
    vocab_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "MOST_REQUESTS", 0)
    response, pool = sent(vocab_path, lambda c: c.get("/health"))
    assert response.status_code == 503 and response.headers["retry-after"] == "1"
    assert pool.lines[0]["status"] == 503


def test_errors_hold_little_of_what_a_client_sent_and_the_log_nothing(vocab_path: Path) -> None:
    name = "秘密" * 50_000
    response, pool = sent(
        vocab_path, lambda c: c.post("/v1/chat/completions", json=BODY | {"model": name})
    )
    error = response.json()["error"]["message"]
    assert response.status_code == 404 and len(error) < 300 and "expected one of: qwen" in error
    (line,) = pool.lines
    assert "model_not_found: model:" in line["error"] and "秘密" not in line["error"]
    response, pool = sent(vocab_path, lambda c: c.get("/" + "x" * 9000))
    assert response.status_code == 404 and len(response.json()["error"]["message"]) < 2100
    assert len(pool.lines[0]["error"]) < 210
    for text in ("it's", "a \"b\" 'c'", "\\", "a\nb"):
        told = ApiError(400, f"role is {text!r}; expected user", "messages").logged()
        assert re.fullmatch(r"messages: role is (['\"])…\1; expected user", told)


def test_an_answer_that_took_too_long_is_not_asked_for_again() -> None:
    assert ApiError(504, "late").headers()["x-should-retry"] == "false"
    assert "x-should-retry" not in ApiError(503, "full", retry_after=1).headers()


def test_a_client_that_does_not_read_holds_no_engine_beyond_the_time_of_its_request(
    vocab_path: Path,
) -> None:
    pool: Any = ScriptedPool(lambda job: ["a"] * 100_000)
    pool.pause_seconds = 0.01
    served = Served(("qwen",), (), load_encoding(vocab_path), 8192, True)
    metrics = Metrics(pool, served.names)
    app = create_app(Front(served, pool, metrics, Answering(pool, metrics, 9, 0.2)))
    gate = Gate(app, (), 10**6, 10.0, pool.lines.append)
    body = json.dumps(BODY | {"stream": True}).encode()

    async def ask() -> None:
        left = asyncio.Event()
        asked = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if not asked:
                await left.wait()
                return {"type": "http.disconnect"}
            return asked.pop()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [],
            "query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": "",
        }  # fmt: skip
        answering = asyncio.ensure_future(gate(scope, receive, send))
        async with asyncio.timeout(30):
            while not pool.cancelled:
                await asyncio.sleep(0.01)
        assert not answering.done()
        left.set()
        await answering

    asyncio.run(ask())
    assert pool.lines[0]["status"] == 499 and pool.lines[0]["error"] == "the client left"


def test_a_log_that_nobody_reads_holds_nobody_up_and_counts_what_it_drops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_read, faults = threading.Event(), [OSError(28, "No space left on device")]
    found: list[dict[str, int]] = []

    def show(lines: Iterable[str]) -> None:
        assert is_read.wait(30)
        if faults:
            raise faults.pop()
        found.extend(json.loads(line) for line in lines)

    monkeypatch.setattr(gates, "show_json", show)
    log = Log(3)
    for i in range(100):
        log.put({"line": i})
    is_read.set()
    log.close(30)
    numbers = [line["line"] for line in found if "line" in line]
    assert numbers == sorted(set(numbers)) and len(numbers) in (2, 3)
    assert sum(line["dropped"] for line in found if "dropped" in line) == 100 - len(numbers)


def test_the_page_runs_its_own_script_alone_and_no_other_page_is_there(vocab_path: Path) -> None:
    response, _ = sent(vocab_path, lambda c: c.get("/"))
    policy = response.headers["content-security-policy"]
    (script,) = re.findall("<script>(.*?)</script>", response.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and "unsafe" not in policy
    for path in ("/docs", "/redoc"):
        response, _ = sent(vocab_path, lambda c: c.get(path))  # noqa: B023
        assert response.status_code == 404
    for path in ("/health", "/", "/metrics", "/version", "/v1/models"):
        response, _ = sent(vocab_path, lambda c: c.head(path))  # noqa: B023
        assert response.status_code == 200 and response.content == b""
