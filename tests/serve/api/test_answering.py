"""Answers on their way: what the log tells, who may ask from where, and no event is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from qwen_ds.model.tokenizer import load_encoding
from serve.api.answering import Answering
from serve.api.app import Front, create_app
from serve.api.gate import Gate
from serve.api.metrics import Metrics
from serve.api.served import Served
from tests.serve.api.scripted import ScriptedPool

BODY = {"messages": [{"role": "user", "content": "秘密"}]}


def answered(
    vocabulary: Path,
    log_text: bool,
    headers: dict[str, str] | None = None,
    keys: Sequence[str] = (),
    **more: Any,
) -> tuple[httpx.Response, list[dict[str, Any]]]:
    pool: Any = ScriptedPool(lambda job: ["ant", "wort"])
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
    response, (line,) = answered(vocab_path, False, n=10)
    assert response.status_code == 503 and response.headers["retry-after"] == "1"
    assert "at most 9" in line["error"]
