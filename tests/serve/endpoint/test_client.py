"""A server in every kind of trouble: complete answers, or one line that says why there are none."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.errors import Failed, UserError
from qwen_ds.model.chatml import Conversation, Turn
from serve.answering import Answer, Question
from serve.endpoint import patience
from serve.endpoint.client import Endpoint, connect
from serve.endpoint.options import EndpointOptions
from serve.endpoint.wire import EndpointRefused, Trouble
from tests.serve.scripted_server import Body, Handler, answer_to, closed_url, scripted


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(patience, "LONGEST_WAIT", 0.1)


def question(text: str, **sampling: Any) -> Question:
    return Question(Conversation(None, (Turn("user", text),)), SamplingParams(**sampling))


QUESTIONS = [question(f"question {i}") for i in range(40)]


def connected(url: str, seconds: float = 20.0, concurrency: int = 8, **more: Any) -> Endpoint:
    return connect(EndpointOptions(url, **more), seconds, lambda _: None, concurrency)


def texts(found: Iterator[tuple[int, object]]) -> list[str]:
    """In the order of the questions, each of which must have its answer."""
    answers = dict(found)
    assert all(isinstance(answer, Answer) for answer in answers.values()), answers
    return [answers[i].text for i in range(len(answers))]  # type: ignore[attr-defined]


def in_trouble(handler: Handler, body: Body, tries: int) -> bool:
    """Each question meets another trouble, one of them several."""
    if not body:  # GET /models
        return False
    number = int(body["messages"][-1]["content"].split()[-1])
    kind = (number + tries) % 6
    if tries > number % 4:
        return False
    if kind == 0:
        handler.reply(429, {"error": {"message": "slow down"}}, Retry_After="0")
    elif kind == 1:
        handler.reply(500, {"error": {"message": "a worker died"}})
    elif kind == 2:
        handler.break_off()
    elif kind == 3:
        handler.close_connection = True  # without a word
    elif kind == 4:
        handler.reply(200, {"choices": [{"message": {}, "finish_reason": "abort"}]})
    else:
        handler.reply(503, {"detail": "loading"})
    return True


def test_troubles_of_all_kinds_change_no_answer() -> None:
    expected = [f"{answer_to({'messages': [{'content': f'question {i}'}]})}" for i in range(40)]
    with scripted(in_trouble) as server:
        assert texts(connected(server.url).answer(QUESTIONS)) == expected
        assert len(server.bodies) > 80, "each question meets its trouble first"


def test_a_server_that_is_down_for_a_while_is_waited_for() -> None:
    with scripted() as server:
        port, endpoint = server.server_address[1], connected(server.url)
        server.seconds = 0.05
        found = endpoint.answer(QUESTIONS)
        first = [next(found) for _ in range(10)]
    again: list[Any] = []

    def later() -> None:
        time.sleep(0.5)
        with scripted(port=port) as server:
            again.append(server)
            done.wait(20)

    done = threading.Event()
    thread = threading.Thread(target=later)
    thread.start()
    rest = list(found)
    done.set()
    thread.join()
    assert texts(iter([*first, *rest])) and len({i for i, _ in [*first, *rest]}) == 40
    assert again and len(again[0].bodies) >= 22


def test_a_server_that_stays_down_ends_in_one_line() -> None:
    _, url = closed_url()
    with pytest.raises(Failed, match=r"/models: .*nothing else for 0.3 s; the same command"):
        connected(url, seconds=0.3)
    with scripted() as server:
        endpoint = connected(server.url, seconds=0.3)
    with pytest.raises(Failed, match="/chat/completions"):
        list(endpoint.answer(QUESTIONS))


def test_a_time_out_ends_no_command_whose_server_answers() -> None:
    """The waiting time begins anew with each answer that anybody gets."""
    with scripted(lambda h, b, n: bool(b) and n < 12 and refused(h, b)) as server:
        server.seconds = 0.1

        def refused(handler: Handler, body: Body) -> bool:
            if body["messages"][-1]["content"] != "question 1":
                return False
            handler.reply(503, {})
            return True

        endpoint = connected(server.url, seconds=0.6, concurrency=2)
        assert len(texts(endpoint.answer(QUESTIONS))) == 40


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_row_that_is_refused_fails_alone_in_the_servers_words(status: int) -> None:
    def refusing(handler: Handler, body: Body, _: int) -> bool:
        if body and body["messages"][-1]["content"] == "question 3":
            handler.reply(status, {"error": {"message": "no such\nthing"}})
            return True
        return False

    with scripted(refusing) as server:
        found = dict(connected(server.url).answer(QUESTIONS))
    refused = found.pop(3)
    assert isinstance(refused, EndpointRefused)
    assert f"answered {status} (no such thing)" in str(refused)
    assert len(found) == 39 and all(isinstance(answer, Answer) for answer in found.values())


def test_a_row_at_which_the_server_always_fails_does_not_stop_the_others() -> None:
    def failing(handler: Handler, body: Body, _: int) -> bool:
        if body and body["messages"][-1]["content"] == "question 3":
            handler.reply(500, {"message": "CUDA error"})
            return True
        return False

    with scripted(failing) as server:
        server.seconds = 0.02
        found = dict(connected(server.url, concurrency=2).answer(QUESTIONS))
    failed = [i for i, answer in found.items() if isinstance(answer, EndpointRefused)]
    assert failed == [3] and len(found) == 40
    assert "CUDA error" in str(found[3]) and "8 times" in str(found[3])


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_ends_the_command(status: int, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret-1\n")

    def locked(handler: Handler, *_: object) -> bool:
        if handler.headers.get("Authorization") == "Bearer secret-2":
            return False
        handler.reply(status, {"error": {"message": "bad key"}})
        return True

    with scripted(locked) as server:
        with pytest.raises(UserError, match=rf"answered {status} \(bad key\).*--api_key_file"):
            connected(server.url, api_key_file=str(key))
        key.write_text("secret-2\n")
        endpoint = connected(server.url, api_key_file=str(key))
        assert len(texts(endpoint.answer(QUESTIONS[:3]))) == 3
        server.trouble = lambda handler, *_: handler.reply(status, {}) is None
        with pytest.raises(UserError, match=f"answered {status}"):
            list(endpoint.answer(QUESTIONS))


def test_no_more_than_so_many_are_under_way() -> None:
    with scripted() as server:
        server.seconds = 0.02
        assert len(texts(connected(server.url, concurrency=5).answer(QUESTIONS))) == 40
        assert server.most_under_way == 5


def test_the_model_is_the_named_one_or_the_first_of_the_servers() -> None:
    told: list[str] = []
    with scripted() as server:
        server.models = ["first", "second"]
        assert connected(server.url).model == "first"
        assert connected(server.url + "/", endpoint_model="second").model == "second"
        options = EndpointOptions(server.url, "third")
        assert connect(options, 5.0, told.append).model == "third"
        list(connected(server.url, endpoint_model="second").answer(QUESTIONS[:1]))
        assert server.bodies[-1]["model"] == "second"
    assert len(told) == 1 and "lists no model third, but first, second" in told[0]


def test_a_url_without_the_api_is_named() -> None:
    with scripted() as server:
        with pytest.raises(UserError, match=r"answered 404 \(Not Found\); expected a server with"):
            connected(server.url.removesuffix("/v1"))
        server.trouble = lambda handler, *_: handler.reply(200, ["hello"]) is None
        with pytest.raises(UserError, match="lists no model"):
            connected(server.url)


def test_the_answering_is_left_without_waiting_for_the_rest() -> None:
    """As after Ctrl-C: what is under way is dropped."""
    with scripted() as server:
        endpoint = connected(server.url, concurrency=4)
        server.trouble = lambda h, b, n: time.sleep(3 if "question 1" in str(b) else 0) is not None
        found = endpoint.answer(QUESTIONS)
        next(found)
        started = time.monotonic()
        found.close()  # type: ignore[attr-defined]
        assert time.monotonic() - started < 2.5


def test_a_streamed_answer_comes_in_pieces_and_ends_with_its_reason() -> None:
    def streaming(handler: Handler, body: Body, _: int) -> bool:
        if body:
            handler.stream(["a\u2028b", "\x85c\r\n", "", "裙"], "length")
        return bool(body)

    with scripted(streaming) as server:
        pieces = list(connected(server.url).stream(question("x")))
        assert server.bodies[-1]["stream"] is True
    assert "".join(text for text, _ in pieces) == "a\u2028b\x85c\r\n裙"
    assert [reason for _, reason in pieces] == [None] * 4 + ["length"]


def test_a_stream_that_fails_is_sent_again_only_before_its_first_text() -> None:
    def failing(handler: Handler, body: Body, tries: int) -> bool:
        if body and tries < 2:
            handler.reply(503, {})
            return True
        if body and "broken" in body["messages"][-1]["content"]:
            handler.stream(["half "], None)
            return True
        return False

    with scripted(failing) as server:
        endpoint = connected(server.url)
        whole = "".join(text for text, _ in endpoint.stream(question("x")))
        assert whole == answer_to({"messages": [{"content": "x"}]})
        broken = endpoint.stream(question("broken"))
        assert next(broken) == ("half ", None)
        with pytest.raises(Trouble, match="broke off"):
            next(broken)
        assert len(server.bodies) == 6
