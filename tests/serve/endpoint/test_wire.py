"""Bodies and errors of OpenAI's API."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.errors import UserError
from qwen_ds.model.chatml import Conversation, Turn
from serve.answering import Answer, Question
from serve.endpoint.wire import (
    EndpointRefused,
    Trouble,
    answer_of,
    check_status,
    delta_of,
    events,
    request_of,
)

TURNS = (Turn("user", "你好"), Turn("assistant", "您好"), Turn("user", "lone \ud800"))


def test_a_request_holds_all_turns_and_how_to_sample() -> None:
    greedy = SamplingParams(max_new_tokens=7, temperature=0.3)
    path, body = request_of(Question(Conversation(None, TURNS), greedy), "qwen")
    assert path == "/chat/completions"
    assert json.loads(body) == {
        "model": "qwen",
        "max_tokens": 7,
        "temperature": 0,
        "stream": False,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "您好"},
            {"role": "user", "content": "lone \ud800"},
        ],
    }
    drawn = SamplingParams(True, 0.5, 0.9, 20, 7, seed=3).of_row(4)
    found = json.loads(request_of(Question("raw", drawn), "qwen", stream=True)[1])
    assert found.pop("seed") == drawn.seed >> 32 < 2**31
    assert found == {
        "model": "qwen",
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "stream": True,
        "prompt": "raw",
    }
    assert request_of(Question("raw", drawn), "qwen")[0] == "/completions"


def test_an_answer_needs_neither_counts_nor_a_text() -> None:
    whole = {
        "choices": [{"message": {"content": "a"}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1},
    }
    assert answer_of("u", json.dumps(whole).encode()) == Answer("a", "length", 3, 1)
    least = {"choices": [{"message": {"content": None}}]}
    assert answer_of("u", json.dumps(least).encode()) == Answer("", "stop", None, None)
    raw = {"choices": [{"text": "b", "finish_reason": "stop"}], "usage": None}
    assert answer_of("u", json.dumps(raw).encode()) == Answer("b", "stop", None, None)


@pytest.mark.parametrize(
    "raw", [b"", b'{"choices": [{"mes', b"[]", b'{"choices": []}', b"<html>", b'{"choices": [3]}']
)
def test_what_is_no_answer_is_asked_for_again(raw: bytes) -> None:
    with pytest.raises(Trouble, match="something else than an answer"):
        answer_of("u", raw)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"error": {"message": "too\\nlong", "type": "x"}}', "(too long)"),
        ('{"object": "error", "message": "of vLLM"}', "(of vLLM)"),
        ('{"detail": [{"loc": ["body"]}]}', '([{"loc": ["body"]}])'),
        ("plain words", "(plain words)"),
        ("", "answered 400"),
        ("x" * 1000, f"({'x' * 300}...)"),
    ],
)
def test_the_words_of_an_error_are_found(body: str, said: str) -> None:
    with pytest.raises(EndpointRefused) as refused:
        check_status("u", 400, None, body.encode())
    assert str(refused.value).endswith(said)


def test_retry_after_is_a_number_or_a_date_of_at_most_two_minutes() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=60))
    for header, low, high in (
        ("7", 7, 7),
        ("9999", 120, 120),
        ("-3", 0, 0),
        (soon, 50, 60),
        (format_datetime(datetime(2020, 1, 1, tzinfo=UTC)), 0, 0),
    ):
        with pytest.raises(Trouble) as trouble:
            check_status("u", 429, header, b"")
        assert trouble.value.retry_after is not None
        assert low <= trouble.value.retry_after <= high, header
    for header in (None, "soon", "nan"):
        with pytest.raises(Trouble) as trouble:
            check_status("u", 429, header, b"")
        assert trouble.value.retry_after is None


def test_other_statuses_end_the_command() -> None:
    for status in (301, 402, 405):
        with pytest.raises(UserError, match=f"answered {status}; expected a server"):
            check_status("u", status, None, b"")


def test_events_are_cut_at_line_feeds_alone_wherever_the_chunks_end() -> None:
    stream = ': note\r\ndata: {"a": "\u2028\x85裙"}\r\n\r\nevent: x\ndata:[DONE]\n\n'.encode()
    expected = ['{"a": "\u2028\x85裙"}'.encode(), b"[DONE]"]
    for size in range(1, len(stream)):
        chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert list(events(chunks)) == expected


def test_an_event_may_hold_counts_or_an_error() -> None:
    assert delta_of("u", b'{"choices": [], "usage": {}}') == ("", None)
    last = b'{"choices": [{"delta": {"role": "assistant"}, "finish_reason": "stop"}]}'
    assert delta_of("u", last) == ("", "stop")
    assert delta_of("u", b'{"choices": [{"text": "a"}]}') == ("a", None)
    with pytest.raises(EndpointRefused, match="gave up .*out of memory"):
        delta_of("u", b'{"error": {"message": "out of memory"}}')
    with pytest.raises(Trouble):
        delta_of("u", b"{")
