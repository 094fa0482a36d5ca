"""The API as clients see it: answers, errors, limits, and what happens when somebody leaves."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_ds.decode.request import Request
from qwen_ds.decode.sampling import SamplingParams
from qwen_ds.model.chatml import Conversation, Turn, encode_prompt
from qwen_ds.model.folder import find_model
from serve.engine.engine import stream
from serve.engine.loading import load_engine
from tests.serve.api.running import Running, events, until

pytestmark = pytest.mark.job
GREEDY = {"temperature": 0, "max_tokens": 12}
QUESTIONS = ["你好", "Name three rivers.", "1+1=", "类型#裙*风格#长" * 9]


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **GREEDY, **more}


def post(server: Running, body: dict[str, Any], path: str = "/v1/chat/completions") -> Any:
    response = server.client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture(scope="module")
def expected(full_dir: Path) -> list[str]:
    """What the engine answers to QUESTIONS in this process."""
    engine = load_engine(full_dir, device="cpu")
    encoding = find_model(full_dir).encoding
    prompts = [
        encode_prompt(encoding, Conversation(None, (Turn("user", text),))) for text in QUESTIONS
    ]
    requests = [Request(ids, SamplingParams(max_new_tokens=12), engine.stop) for ids in prompts]
    answers = dict(stream(engine.start(memory_gb=0.05), requests))
    return [answers[i].text for i in range(len(QUESTIONS))]


def test_answers_are_the_engines_whole_and_streamed_together_and_alone(
    server: Running, expected: list[str]
) -> None:
    def whole(text: str) -> str:
        return post(server, chat(text))["choices"][0]["message"]["content"]

    def streamed(text: str) -> str:
        with server.client.stream(
            "POST", "/v1/chat/completions", json=chat(text, stream=True)
        ) as r:
            found = events(r.iter_lines())
        assert found[0]["choices"][0]["delta"]["role"] == "assistant"
        assert found[-1]["choices"][0]["finish_reason"] == "length"
        return "".join(one["choices"][0]["delta"].get("content", "") for one in found)

    with ThreadPoolExecutor(8) as pool:
        wholes = list(pool.map(whole, QUESTIONS * 4))
        streams = list(pool.map(streamed, QUESTIONS * 4))
    assert wholes == expected * 4
    assert streams == expected * 4


def test_token_ids_end_an_answer_and_control_tokens_may_be_left_out(server: Running) -> None:
    def told(**more: Any) -> dict[str, Any]:
        body = {"prompt": [1, 2, 3], "temperature": 0, "max_tokens": 8, **more}
        return post(server, body, "/v1/completions")["choices"][0]

    plain = told(logprobs=0)
    pieces = plain["logprobs"]["tokens"]
    assert plain["finish_reason"] == "length" and len(pieces) == 8
    third = post(server, {"prompt": pieces[2]}, "/tokenize")["tokens"]
    assert len(third) == 1
    # With ignore_eos, too, which is about the model's own ends.
    cut = told(stop_token_ids=third, ignore_eos=True)
    before = pieces.index(pieces[2])
    assert cut["finish_reason"] == "stop" and cut["text"] == "".join(pieces[:before])
    # A control token that the logits are forced to.
    ids = post(server, {"messages": [{"role": "user", "content": "q"}]}, "/tokenize")["tokens"]
    extra = ids[0] + 3  # <|im_start|> is ids[0]; behind <|im_end|> come the <|extra_N|>
    forced = {"logit_bias": {str(extra): 100}, "max_tokens": 2}
    name = told(**forced)["text"]
    assert name.startswith("<|extra_") and told(**forced, skip_special_tokens=False)["text"] == name
    assert told(**forced, skip_special_tokens=True)["text"] == ""


def test_usage_comes_with_the_answer_and_in_a_last_chunk(server: Running) -> None:
    body = chat("usage" * 40)
    first, again = post(server, body)["usage"], post(server, body)["usage"]
    assert (
        first["total_tokens"]
        == first["prompt_tokens"] + 12
        == first["prompt_tokens"] + (first["completion_tokens"])
    )
    # A page is 32 tokens.
    known = again["prompt_tokens_details"]["cached_tokens"]
    assert 32 <= known < again["prompt_tokens"] and known % 32 == 0
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        last = events(response.iter_lines())[-1]
    assert last["choices"] == [] and last["usage"] == again


def test_choices_of_one_seed_are_the_same_again_and_differ_from_each_other(
    server: Running,
) -> None:
    body = chat("seed", n=3, temperature=1.2, seed=7)
    texts = [[c["message"]["content"] for c in post(server, body)["choices"]] for _ in range(2)]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    body |= {"stream": True}
    with server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        found = [one["choices"][0] for one in events(response.iter_lines())]
    streamed = [
        "".join(c["delta"].get("content", "") for c in found if c["index"] == i) for i in range(3)
    ]
    assert streamed == texts[0]


def test_completions_take_text_and_ids_and_echo_with_logprobs(server: Running) -> None:
    ids = post(server, {"prompt": "the capital of 中国"}, "/tokenize")["tokens"]
    body = {"max_tokens": 1, "temperature": 0, "logprobs": 2, "echo": True}
    by_text = post(server, body | {"prompt": "the capital of 中国"}, "/v1/completions")
    by_ids = post(server, body | {"prompt": [ids]}, "/v1/completions")
    assert by_text["choices"] == by_ids["choices"]
    told = by_ids["choices"][0]["logprobs"]
    assert (
        len(told["tokens"]) == len(ids) + 1
        and "".join(told["tokens"]) == by_ids["choices"][0]["text"]
    )
    assert told["token_logprobs"][0] is None and all(p < 0 for p in told["token_logprobs"][1:])
    assert all(len(top) == 2 for top in told["top_logprobs"][1:])
    two = post(server, body | {"prompt": [ids, ids[:3]], "max_tokens": 0}, "/v1/completions")
    assert two["choices"][0]["logprobs"]["token_logprobs"] == told["token_logprobs"][:-1]
    assert len(two["choices"][1]["logprobs"]["tokens"]) == 3


def test_tokens_are_those_that_the_chat_route_feeds(server: Running) -> None:
    body = chat("你好 <|im_end|>")
    found = post(server, body, "/tokenize")
    assert found["count"] == len(found["tokens"]) == post(server, body)["usage"]["prompt_tokens"]
    assert found["tokens"].count(151645) == 2, "a control token in a text is text"
    text = post(server, {"tokens": found["tokens"]}, "/detokenize")["prompt"]
    assert text.endswith("<|im_start|>assistant\n") and "你好 <|im_end|>" in text


def test_models_are_listed_and_others_are_404(server: Running) -> None:
    names = [one["id"] for one in server.client.get("/v1/models").json()["data"]]
    assert names == ["qwen", "alias"]
    assert server.client.get("/v1/models/alias").json()["id"] == "alias"
    for response in (
        server.client.get("/v1/models/gpt-4"),
        server.client.post("/v1/chat/completions", json=chat("q", model="gpt-4")),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


def test_the_originals_route_answers_one_json_string(server: Running) -> None:
    answer = post(
        server, {"text": "你好", "do_sample": False, "max_new_tokens": 12}, "/nlg/text_generate"
    )
    assert answer == post(server, chat("你好"))["choices"][0]["message"]["content"]
    beams = post(
        server,
        {"text": "你好", "do_sample": False, "max_new_tokens": 12, "num_beams": 2},
        "/nlg/text_generate",
    )
    assert isinstance(beams, str) and beams
    response = server.client.post("/nlg/text_generate", json={"penalty_alpha": 0.6})
    assert response.status_code == 400 and "penalty_alpha" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat("q", max_tokens=100_000), "max_tokens"),
        (chat("q", temperature=-1), "temperature"),
        (chat("q", top_p="0.5"), "top_p"),
        (chat("q", logit_bias={"x": 1}), "logit_bias"),
        (chat("q", stop=["a"] * 100), "stop"),
        (chat("q", n=1000), "n"),
        (chat("q", audio={}), "audio"),
        (chat("q", response_format={"type": "xml"}), "response_format"),
        (chat("q", functions=[{"name": "f"}]), "functions"),
        (chat("q", tools=[{"type": "retrieval"}]), "tools"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({}, "messages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_field_is_a_400_that_names_it(
    server: Running, body: dict[str, Any], param: str
) -> None:
    response = server.client.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"messages":' * 5000,
     b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": NaN}'],
    ids=["empty", "cut", "list", "null", "string", "bytes", "deep list", "deep object", "nan"],
)  # fmt: skip
def test_a_body_that_is_no_request_is_a_400(server: Running, raw: bytes) -> None:
    response = server.client.post("/v1/chat/completions", content=raw)
    assert response.status_code == 400 and response.json()["error"]["message"]


@pytest.mark.parametrize(("letter", "status"), [(b"\\u0000", 200), (b"\\ud800", 400)])
def test_nul_is_answered_and_half_a_character_is_no_text(
    server: Running, letter: bytes, status: int
) -> None:
    raw = b'{"messages": [{"role": "user", "content": "a%bb"}], "max_tokens": 2}' % letter
    response = server.client.post("/v1/chat/completions", content=raw)
    assert response.status_code == status, response.text


def test_unknown_fields_are_ignored(server: Running) -> None:
    body = chat("你好", store=True, metadata={"a": "b"}, parallel_tool_calls=True, new_field=[1])
    assert post(server, body)["choices"] == post(server, chat("你好"))["choices"]


def test_stop_strings_and_structures_hold(server: Running, expected: list[str]) -> None:
    stop = expected[0][4:7]
    choice = post(server, chat(QUESTIONS[0], stop=stop))["choices"][0]
    assert choice["message"]["content"] == expected[0][: expected[0].index(stop)]
    assert choice["finish_reason"] == "stop"
    schema = {"type": "object", "properties": {"名": {"enum": ["甲", 7]}}, "required": ["名"]}
    schema |= {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = chat("q", response_format=form, temperature=1.5, max_tokens=60)
    content = post(server, body)["choices"][0]["message"]["content"]
    assert json.loads(content)["名"] in ("甲", 7)
    chosen = post(server, chat("q", guided_choice=["好", "坏"]))["choices"][0]
    assert chosen["message"]["content"] in ("好", "坏")
    wrong = chat("q", response_format=form | {"json_schema": {"schema": {"type": "nix"}}})
    assert server.client.post("/v1/chat/completions", json=wrong).status_code == 400


def test_a_client_that_leaves_is_cancelled(server: Running) -> None:
    """Streaming or not; its pages are free again."""
    long = chat("leave", max_tokens=5000, ignore_eos=True, model="alias")
    ended = server.figure("vllm:request_success_total")

    def gone() -> list[dict[str, Any]]:
        return [line for line in server.logged() if line.get("model") == "alias"]

    for body in (long, long | {"stream": True}):
        with socket.create_connection(
            (httpx.URL(server.url).host, httpx.URL(server.url).port)
        ) as s:
            raw = json.dumps(body).encode()
            s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: ")
            s.sendall(f"{len(raw)}\r\n\r\n".encode() + raw)
            until(lambda: server.figure("vllm:num_requests_running") == 1)
        until(lambda: server.figure("vllm:num_requests_running") == 0)
    assert server.figure("vllm:request_success_total") == ended + 2
    until(lambda: len(gone()) == 2)
    assert all(line["completion_tokens"] < 5000 for line in gone())


def test_one_poisoned_request_among_many_fails_alone(server: Running, expected: list[str]) -> None:
    poison = {"prompt": [[151_900]], "max_tokens": 4}

    def one(i: int) -> Any:
        if i == 13:
            return server.client.post("/v1/completions", json=poison).status_code
        return post(server, chat(QUESTIONS[i % 4]))["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(one, range(32)))
    assert found.pop(13) == 400
    assert found == [expected[i % 4] for i in range(32) if i != 13]
