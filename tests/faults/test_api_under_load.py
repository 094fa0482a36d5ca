"""The API under many clients, of whom some leave: every answer is whole and its own, and neither
memory nor pages are lost."""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_ds.demo import corpus
from qwen_ds.demo.base import unpack_base
from tests.serve.api.running import Running, running, until

CHAT = "/v1/chat/completions"
LIMITS = ["--slots", "8", "--max_queue", "40", "--memory_gb", "0.1"]
GROWTH_MB = 30


def body(text: str, tokens: int = 128) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "temperature": 0, "max_tokens": tokens}


async def streamed(client: httpx.AsyncClient, text: str) -> str | None:
    """An answer; None: the server has too much to do, and says so."""
    pieces = []
    async with client.stream("POST", CHAT, json=body(text) | {"stream": True}) as response:
        if response.status_code == 503:
            assert "retry-after" in response.headers
            return None
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                pieces += [c["delta"].get("content", "") for c in chunk["choices"]]
            elif line == "data: [DONE]":
                return "".join(pieces)
    raise AssertionError("the stream broke off")


async def leave(client: httpx.AsyncClient, text: str, rng: random.Random) -> None:
    """Begin an answer, and be gone in the middle of it."""
    given = body(text, 380) | {"stream": rng.random() < 0.7, "ignore_eos": True}
    try:
        async with asyncio.timeout(rng.random()), client.stream("POST", CHAT, json=given) as answer:
            async for _ in answer.aiter_lines():
                if rng.random() < 0.2:
                    return
    except TimeoutError:
        return


async def press(
    url: str, expected: dict[str, str], clients: int, seconds: float, leaving: int
) -> int:
    """Let clients ask for so long, and others leave meanwhile; the number of whole answers."""
    ends, found, texts = time.monotonic() + seconds, 0, list(expected)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def asks(seed: int) -> None:
            nonlocal found
            rng = random.Random(seed)
            while time.monotonic() < ends:
                text = rng.choice(texts)
                answer = await streamed(client, text)
                assert answer in (None, expected[text])
                found += answer is not None
                await asyncio.sleep(0.1 if answer is None else 0)

        async def leaves() -> None:
            rng = random.Random(0)
            for _ in range(leaving):
                await leave(client, rng.choice(texts), rng)

        await asyncio.gather(*(asks(i) for i in range(clients)), leaves())
    return found


def memory_mb(server: Running) -> dict[str, float]:
    """Resident memory of the front and of each engine."""
    found = {}
    engines = {f"engine {i}": number for i, number in enumerate(server.engines())}
    for name, number in ({"front": server.process.pid} | engines).items():
        status = Path(f"/proc/{number}/status").read_text()
        found[name] = int(status.split("VmRSS:")[1].split()[0]) / 1e3
    return found


def withstand(
    server: Running, expected: dict[str, str], clients: int, seconds: float, leaving: int
) -> None:
    """Press a server, and find every answer whole, its memory flat and its pages free."""
    asyncio.run(press(server.url, expected, clients, seconds / 6, leaving // 10))
    before = memory_mb(server)
    answers = asyncio.run(press(server.url, expected, clients, seconds, leaving))
    until(lambda: server.figure("vllm:num_requests_running") == 0)
    assert server.figure("vllm:num_requests_waiting") == 0
    # Pages of prompts are kept for the next ones, and all of them can be had.
    assert server.figure("vllm:kv_cache_usage_perc") == 0
    after = memory_mb(server)
    print(f"{answers} answers; MB before {before}, after {after}")
    assert answers > clients
    assert before.keys() == after.keys() and len(after) > 1
    assert all(after[name] < before[name] + GROWTH_MB for name in after), (before, after)
    assert server.end() == 0
    assert not [line for line in server.logged() if line["status"] not in (0, 200, 499, 503)]


@pytest.mark.job
def test_no_answer_is_lost_or_mixed_and_nothing_leaks(small_dir: Path) -> None:
    texts = [f"colour#{i}" * (1 + i % 5) for i in range(12)]
    with running("--model", str(small_dir), *LIMITS) as server:
        expected = {}
        for text in texts:
            whole = server.client.post(CHAT, json=body(text)).json()
            expected[text] = whole["choices"][0]["message"]["content"]
        withstand(server, expected, clients=8, seconds=3, leaving=10)


@pytest.mark.soak
def test_a_minute_of_64_clients_on_the_demos_model(tmp_path: Path) -> None:
    """The corpus says what the model answers: greedy, and in float32 whoever else asks."""
    _, _, items = corpus.splits()
    expected = {item.content: corpus.catalogue_text(item) for item in items[:12]}
    unpack_base(tmp_path / "base")
    words = ["--model", str(tmp_path / "base"), "--dtype", "float32", *LIMITS]
    with running(*words) as server:
        withstand(server, expected, clients=64, seconds=60, leaving=200)
