"""The gate as plain ASGI: whose requests pass, and how much of a body it takes."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve.api import gate as gate_module
from serve.api.gate import Gate

KEYS = ("first-key", "second-key", "pass:word")
MOST = 100  # bytes of a body
OPEN = [("GET", "/"), ("GET", "/health"), ("OPTIONS", "/v1/models")]


class App:
    """An app that reads its body and answers 200."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        assert not message["more_body"], "the gate gives the whole body at once"
        self.bodies.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})


class Passed:
    """One request through a gate: what its client sees, the app and the log."""

    def __init__(
        self,
        parts: Sequence[bytes] = (b"",),
        headers: dict[str, str] | None = None,
        keys: Sequence[str] = (),
        method: str = "POST",
        path: str = "/tokenize",
    ) -> None:
        """A body comes in parts; after the last one the client is silent if that is None."""
        self.app, self.sent, self.lines = App(), list[Message](), list[dict[str, Any]]()
        self.received = 0
        self._parts = parts
        gate = Gate(self.app, keys, MOST, 0.2, self.lines.append)
        given = {"host": "127.0.0.1:8044"} | (headers or {})
        raw = [(name.lower().encode(), value.encode()) for name, value in given.items()]
        scope = {
            "type": "http", "method": method, "path": path, "headers": raw, "scheme": "http",
            "client": ("127.0.0.1", 9), "server": ("127.0.0.1", 8044), "query_string": b"",
        }  # fmt: skip
        asyncio.run(asyncio.wait_for(gate(scope, self._receive, self._send), 60))

    async def _receive(self) -> Message:
        if self.received == len(self._parts):
            await asyncio.Event().wait()
        part = self._parts[self.received]
        self.received += 1
        more = self.received < len(self._parts)
        return {"type": "http.request", "body": part, "more_body": more}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def error(self) -> dict[str, Any]:
        found = json.loads(b"".join(one["body"] for one in self.sent[1:]))["error"]
        assert set(found) == {"message", "type", "param", "code"} and "\n" not in found["message"]
        return dict(found)


def basic(text: str) -> str:
    return f"Basic {base64.b64encode(text.encode()).decode()}"


@pytest.mark.parametrize(
    "given",
    ["Bearer first-key", "Bearer second-key", "bearer  first-key", "BEARER pass:word",
     basic("anybody:first-key"), basic(":second-key"), basic("me:pass:word"),
     basic("a:first-key").replace("Basic", "basic")],
)  # fmt: skip
def test_each_key_lets_a_request_pass(given: str) -> None:
    passed = Passed([b"{}"], {"Authorization": given}, KEYS)
    assert passed.status == 200 and passed.app.bodies == [b"{}"]


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", "Bearer first", "Bearer first-key2", "Bearer FIRST-KEY",
     "Bearer first-key,second-key", "first-key", "Digest first-key", "Basic first-key", "Basic",
     "Basic ====", "Basic Zm9v*", basic("first-key"), basic("first-key:"), basic("me:first-key "),
     "Basic " + base64.b64encode(b"me:\xff").decode(), "Bearer schl\u00fcssel"],
)  # fmt: skip
def test_other_keys_are_a_401_before_the_body_is_read(given: str | None) -> None:
    passed = Passed([b"{}"], {} if given is None else {"Authorization": given}, KEYS)
    assert passed.status == 401 and passed.error["code"] == "invalid_api_key"
    assert passed.headers["www-authenticate"].startswith("Bearer")
    assert passed.received == 0 and passed.app.bodies == []
    assert not any(key in passed.error["message"] for key in KEYS)
    assert [line["status"] for line in passed.lines] == [401]


def test_without_keys_every_request_passes() -> None:
    for headers in ({}, {"Authorization": "Bearer any"}):
        assert Passed([b"{}"], headers).status == 200


@pytest.mark.parametrize(("method", "path"), OPEN)
def test_open_paths_ask_for_no_key(method: str, path: str) -> None:
    assert Passed(keys=KEYS, method=method, path=path).status == 200


@pytest.mark.parametrize("path", ["/metrics", "/v1/models", "//", "/health/", "/health/x", ""])
def test_no_other_path_is_open(path: str) -> None:
    assert Passed(keys=KEYS, method="GET", path=path).status == 401


@pytest.mark.parametrize(
    "parts", [[b"a" * MOST], [b"a" * 60, b"b" * 40], [b"", b"{}", b""], [b"x"] * MOST]
)
def test_a_body_of_up_to_the_limit_reaches_the_app_as_one(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    for headers in ({}, {"Content-Length": str(len(whole))}):
        passed = Passed(parts, headers)
        assert passed.status == 200 and passed.app.bodies == [whole]


def test_a_declared_size_beyond_the_limit_is_refused_unread() -> None:
    for length in (str(MOST + 1), "9" * 30):
        passed = Passed([b"a" * (MOST + 1)], {"Content-Length": length})
        assert passed.status == 413
        assert passed.error["type"] == "invalid_request_error"
        assert passed.received == 0 and passed.app.bodies == []


def test_a_body_without_a_size_is_read_up_to_the_limit() -> None:
    passed = Passed([b"a" * 40] * 100)
    assert passed.status == 413
    assert passed.received == 3 and passed.app.bodies == []


def test_a_body_beyond_its_declared_size_is_refused_too() -> None:
    passed = Passed([b"a" * 60] * 5, {"Content-Length": "5"})
    assert passed.status == 413 and passed.received == 2


def test_each_request_is_one_line_of_the_log() -> None:
    passed = Passed([b"{}"], {"Content-Length": "2"})
    (line,) = passed.lines
    assert (line["status"], line["method"], line["path"]) == (200, "POST", "/tokenize")
    assert line["client"] == "127.0.0.1" and line["seconds"] >= 0


class Silent(Passed):
    """A client that begins a body, and sends no more of it."""

    async def _receive(self) -> Message:
        message = await super()._receive()
        return message | {"more_body": True}


class Gone(Passed):
    """A client that leaves in the middle of its body."""

    async def _receive(self) -> Message:
        if self.received == len(self._parts):
            return {"type": "http.disconnect"}
        return await super()._receive() | {"more_body": True}


def test_a_body_that_stops_coming_is_a_408() -> None:
    passed = Silent([b"{"])
    assert passed.status == 408 and passed.headers["connection"] == "close"
    assert passed.app.bodies == [] and [line["status"] for line in passed.lines] == [408]


def test_a_client_that_leaves_in_its_body_gets_no_answer() -> None:
    passed = Gone([b"{"])
    assert passed.sent == [] and passed.app.bodies == [] and len(passed.lines) == 1


@pytest.mark.parametrize("given", ["abc-1", "a b", "~" * 128, "!"])
def test_a_request_keeps_the_id_that_its_client_gave(given: str) -> None:
    passed = Passed([b"{}"], {"X-Request-Id": given})
    assert passed.headers["x-request-id"] == given == passed.lines[0]["request_id"]


def test_other_requests_get_an_id_of_their_own_errors_too() -> None:
    seen = set()
    for given in (None, "", "x" * 129, "a\tb", "\u00fc", "a\x7f"):
        headers = {} if given is None else {"X-Request-Id": given}
        for passed in (Passed([b"{}"], headers), Passed([b"{}"], headers, KEYS)):
            own = passed.headers["x-request-id"]
            assert own == passed.lines[0]["request_id"] and own != given
            assert 0 < len(own) <= 128 and own.isascii() and own.isprintable()
            seen.add(own)
    assert len(seen) == 12


class Crowd:
    """Clients whose bodies are under way at one gate at the same time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gate_module, "_LEAST_BODIES_BYTES", 0)
        self.app, self.lines = App(), list[dict[str, Any]]()
        self.gate = Gate(self.app, (), MOST, 60.0, self.lines.append)

    def begin(self, size: int, ends: asyncio.Event) -> asyncio.Task[list[Message]]:
        """A client that sends so many bytes, and the end of its body once it is told to."""
        parts: list[Message] = [{"type": "http.request", "body": b"a" * size, "more_body": True}]

        async def receive() -> Message:
            if parts:
                return parts.pop()
            await ends.wait()
            return {"type": "http.request", "body": b"", "more_body": False}

        async def ask() -> list[Message]:
            sent: list[Message] = []

            async def send(message: Message) -> None:
                sent.append(message)

            scope = {
                "type": "http", "method": "POST", "path": "/tokenize", "headers": [],
                "client": ("127.0.0.1", 9),
            }  # fmt: skip
            await self.gate(scope, receive, send)
            return sent

        return asyncio.ensure_future(ask())


def test_bodies_that_are_still_coming_have_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 whole ones; one more is refused at once, and what leaves makes room again."""
    crowd = Crowd(monkeypatch)

    async def press() -> None:
        ends = asyncio.Event()
        held = [crowd.begin(MOST, ends) for _ in range(32)]
        refused = await asyncio.wait_for(crowd.begin(1, ends), 30)
        assert refused[0]["status"] == 503
        assert dict(refused[0]["headers"])[b"retry-after"] == b"1"
        assert not any(one.done() for one in held) and crowd.app.bodies == []
        held.pop().cancel()
        await asyncio.sleep(0)
        held.append(crowd.begin(MOST, ends))
        await asyncio.sleep(0)
        ends.set()
        assert [(await one)[0]["status"] for one in held] == [200] * 32
        again = [crowd.begin(MOST, ends) for _ in range(32)]
        assert [(await one)[0]["status"] for one in again] == [200] * 32

    asyncio.run(press())
    assert len(crowd.app.bodies) == 64


def test_the_budget_is_never_less_than_256_mb() -> None:
    """Small limits of one body leave it; large ones lengthen it."""
    assert Gate(App(), (), 10**6, 1.0, print)._most_held_bytes == 256 * 10**6
    assert Gate(App(), (), 10**8, 1.0, print)._most_held_bytes == 32 * 10**8
