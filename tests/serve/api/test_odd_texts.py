"""Characters that other programs stumble over: NUL is a letter like all others, and half a
surrogate pair is no text."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.api.running import Running

pytestmark = pytest.mark.job
CHAT = "/v1/chat/completions"
# One place of a text at a time; TEXT stands for the odd one.
BODIES = {
    "question": (CHAT, '{"messages": [{"role": "user", "content": "TEXT"}], "max_tokens": 2}'),
    "system": (
        CHAT,
        '{"messages": [{"role": "system", "content": "TEXT"},'
        ' {"role": "user", "content": "q"}], "max_tokens": 2}',
    ),
    "part": (
        CHAT,
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "TEXT"}]}],'
        ' "max_tokens": 2}',
    ),
    "stop": (
        CHAT,
        '{"messages": [{"role": "user", "content": "q"}], "stop": "TEXT", "max_tokens": 2}',
    ),
    "user": (
        CHAT,
        '{"messages": [{"role": "user", "content": "q"}], "user": "TEXT", "max_tokens": 2}',
    ),
    "prompt": ("/v1/completions", '{"prompt": "TEXT", "max_tokens": 2}'),
    "prompts": ("/v1/completions", '{"prompt": ["a", "TEXT"], "max_tokens": 2}'),
    "choice": ("/v1/completions", '{"prompt": "a", "guided_choice": ["TEXT"], "max_tokens": 9}'),
}


def post(server: Running, place: str, text: str) -> Any:
    path, body = BODIES[place]
    raw = body.replace("TEXT", text).encode()
    return server.client.post(path, content=raw, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("place", BODIES)
def test_nul_is_a_letter(server: Running, place: str) -> None:
    response = post(server, place, r"a\u0000b")
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] >= 1


def test_nul_is_neither_lost_nor_an_end(server: Running) -> None:
    found = server.client.post("/tokenize", json={"prompt": "a\0b"}).json()
    text = server.client.post("/detokenize", json={"tokens": found["tokens"]}).json()
    assert text == {"prompt": "a\0b"}
    echo = {"prompt": "a\0b", "echo": True, "max_tokens": 0}
    choice = server.client.post("/v1/completions", json=echo).json()["choices"][0]
    assert choice["text"] == "a\0b"


@pytest.mark.parametrize("half", [r"a\ud800b", r"\udc00", r"\ud83d", r"\ude00\ud83d"])
@pytest.mark.parametrize("place", BODIES)
def test_half_a_pair_is_a_400(server: Running, place: str, half: str) -> None:
    response = post(server, place, half)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["message"] and "\n" not in error["message"]


def test_a_whole_pair_is_its_character(server: Running) -> None:
    pair = server.client.post("/tokenize", content=rb'{"prompt": "\ud83d\ude00"}').json()
    assert pair == server.client.post("/tokenize", json={"prompt": "😀"}).json()
