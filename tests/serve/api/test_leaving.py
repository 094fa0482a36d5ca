"""Clients that leave, or end their half of the connection: nothing works on for nobody."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from tests.serve.api.running import Running, until

pytestmark = pytest.mark.job
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MANY, FEW = 8000, 3  # MANY take the engine many seconds


def chat(tokens: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "leave"}]
    given = {"messages": messages, "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    return given | more


def generated(server: Running) -> float:
    return server.figure("vllm:generation_tokens_total")


def aborted(server: Running) -> float:
    text = server.client.get("/metrics").text
    lines = [line for line in text.splitlines() if 'finished_reason="abort"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines if "success_total" in line)


def is_idle(server: Running) -> bool:
    """No engine has a job, by what it told after its last step."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return not any(server.figure(name) for name in names)


def assert_nothing_works_on(server: Running, before: float, jobs: int) -> None:
    """The engine has dropped the jobs of a client that has left, and generates for others alone.

    Args:
        before: tokens that were generated before that client came.
    """
    until(lambda: is_idle(server))
    left = generated(server)
    assert before < left < before + jobs * MANY, "it had begun, and it had not ended"
    answer = server.client.post(CHAT, json=chat(FEW))
    assert answer.json()["usage"]["completion_tokens"] == FEW
    assert generated(server) == left + FEW
    assert server.figure("vllm:kv_cache_usage_perc") == 0


@pytest.mark.parametrize(
    "more", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}], ids=str
)
def test_the_jobs_of_a_client_that_leaves_are_gone_from_the_engine(
    server: Running, more: dict[str, Any]
) -> None:
    until(lambda: is_idle(server))
    before, aborts, logged = generated(server), aborted(server), len(server.logged())
    jobs = more.get("n", 1)
    with server.connected(chat(MANY, **more), CHAT):
        until(lambda: server.figure("vllm:num_requests_running") == jobs)
        until(lambda: generated(server) > before + jobs)
    assert_nothing_works_on(server, before, jobs)
    assert aborted(server) == aborts + jobs

    def lines() -> list[dict[str, Any]]:
        found = [line for line in server.logged()[logged:] if line["path"] == CHAT]
        return [line for line in found if line["completion_tokens"] != FEW]

    (line,) = until(lines)
    assert jobs <= line["completion_tokens"] < jobs * MANY


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_job_waits_is_forgotten(
    server: Running, stream: bool
) -> None:
    """The engine has 32 slots: the 33rd answer waits for one."""
    until(lambda: is_idle(server))
    before = generated(server)
    with server.connected(chat(MANY, n=32), CHAT):
        until(lambda: server.figure("vllm:num_requests_running") == 32)
        with server.connected(chat(MANY, stream=stream), CHAT):
            until(lambda: server.figure("vllm:num_requests_waiting") == 1)
        until(lambda: server.figure("vllm:num_requests_waiting") == 0)
        assert server.figure("vllm:num_requests_running") == 32
    assert_nothing_works_on(server, before, 33)


@pytest.mark.parametrize("stream", [False, True])
def test_a_half_closed_connection_is_answered_whole_or_given_up(
    server: Running, stream: bool
) -> None:
    """A client that ends its half may be gone, or wait: no half of an answer comes, and no job
    runs on."""
    until(lambda: is_idle(server))
    for tokens in (FEW, MANY):
        with server.connected(chat(tokens, stream=stream), CHAT, "Connection: close") as half:
            if tokens == MANY:
                until(lambda: server.figure("vllm:num_requests_running") == 1)
            half.shutdown(socket.SHUT_WR)
            if tokens == MANY:
                until(lambda: is_idle(server))
            reply = b"".join(iter(lambda: half.recv(1 << 16), b""))
        if reply and tokens == FEW and not stream:
            assert reply.startswith(b"HTTP/1.1 200")
            body = json.loads(reply.partition(b"\r\n\r\n")[2])
            assert body["usage"]["completion_tokens"] == FEW
        until(lambda: is_idle(server))
        assert server.client.post(CHAT, json=chat(FEW)).status_code == 200


def test_a_body_that_its_client_cuts_off_begins_no_job(server: Running) -> None:
    until(lambda: is_idle(server))
    before, url = generated(server), httpx.URL(server.url)
    raw = json.dumps(chat(MANY)).encode()
    with socket.create_connection((url.host, url.port or 80)) as cut:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {url.host}:{url.port}\r\n"
        cut.sendall(f"{head}Content-Length: {len(raw) + 1}\r\n\r\n".encode() + raw)
        cut.shutdown(socket.SHUT_WR)
        cut.settimeout(60)
        assert not cut.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert server.client.post(CHAT, json=chat(FEW)).status_code == 200
    assert generated(server) == before + FEW
