"""Losses of references from a server: told, not told, and not worth an evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from serve.endpoint import patience
from serve.endpoint.client import connect
from serve.endpoint.options import EndpointOptions
from serve.endpoint.reference import EndpointLosses
from tests.serve.endpoint.test_client import question
from tests.serve.scripted_server import Body, Handler, scripted

PROMPT = ["<|im_start|>", "system", "\n", "<|im_end|>", "assistant", "\n"]
ANSWER = ["回", "�", "<|im_end|>"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.02)


def told(tokens: list[str], logprobs: list[float | None]) -> object:
    return {"choices": [{"text": "", "logprobs": {"tokens": tokens, "token_logprobs": logprobs}}]}


WHOLE = told([*PROMPT, *ANSWER, "made"], [None, *[-9.0] * 5, -1.0, -0.5, -0.25, -7.0])


def server_that(replies: object) -> object:
    def act(handler: Handler, body: Body, _: int) -> bool:
        if body and "prompt" in body:
            handler.reply(200, replies) if replies is not None else handler.break_off()
            return True
        if body:
            message = {"message": {"content": "a"}, "finish_reason": "stop"}
            handler.reply(200, {"choices": [message], "usage": {"prompt_tokens": len(PROMPT)}})
        return bool(body)

    return act


def asked(replies: object, count: int = 6) -> tuple[list[tuple[float | None, int | None]], int]:
    """Losses of the answers, and how often the server was asked for one; the words that it said."""
    questions = [replace(question(f"q {i}"), reference="回答") for i in range(count)]
    with scripted(server_that(replies)) as server:  # type: ignore[arg-type]
        endpoint = connect(EndpointOptions(server.url), 20.0, said.append, 1)
        found = dict(endpoint.answer(questions))
        times = sum("prompt" in body for body in server.bodies)
    return [(found[i].reference_nll, found[i].reference_tokens) for i in range(count)], times  # type: ignore[union-attr]


said: list[str] = []


@pytest.fixture(autouse=True)
def silence() -> None:
    said.clear()


def test_the_sum_is_of_the_reference_and_of_the_token_that_ends_it() -> None:
    losses, times = asked(WHOLE)
    assert losses == [(1.75, 3)] * 6 and times == 6 and not said


@pytest.mark.parametrize(
    "replies",
    [
        None,  # breaks off
        {"choices": [{"text": "a"}]},
        {"error": "no"},
        told(["<", "|", *PROMPT[1:], *ANSWER, "made"], [-1.0] * 11),  # control tokens as text
        told([*PROMPT, "x", *ANSWER[:2], "made"], [-1.0] * 10),
        told([*PROMPT[:-1], "x", *ANSWER, "made"], [-1.0] * 10),  # another prompt than was counted
        told([*PROMPT, *ANSWER, "made"], [None] * 10),
    ],
)
def test_a_server_that_does_not_tell_is_asked_three_times_and_said_once(replies: object) -> None:
    losses, times = asked(replies)
    assert losses == [(None, None)] * 6 and times == 3
    (words,) = [one for one in said if "no perplexity" in one]
    assert words.startswith("no loss of references from this server")


def test_nobody_is_asked_for_rows_without_a_reference() -> None:
    losses = EndpointLosses(said.append)
    with scripted(server_that(WHOLE)) as server:  # type: ignore[arg-type]
        ((_, answer),) = connect(EndpointOptions(server.url), 20.0, said.append, 1).answer(
            [question("q")]
        )
        assert not any("prompt" in body for body in server.bodies)
    assert not losses.is_asked(question("q"), answer)  # type: ignore[arg-type]


def test_the_prompt_is_chatml_up_to_the_end_of_the_reference(tmp_path: Path) -> None:
    body = EndpointLosses(said.append).body_of(replace(question("q"), reference="回答"), "m")
    assert b"<|im_start|>user\\nq<|im_end|>\\n<|im_start|>assistant\\n" in body
    assert b'\\u56de\\u7b54<|im_end|>"' in body and b'"echo": true' in body
