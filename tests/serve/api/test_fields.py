"""Fields of requests: what is refused by name, what counts, and what stands in an answer for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qwen_ds.decode.request import PromptFigures
from qwen_ds.decode.sampler import TokenLogprobs
from qwen_ds.model.folder import find_model
from qwen_ds.model.tokenizer import load_encoding
from serve.api.bodies import Body, ChatBody, CompletionBody, DetokenizeBody
from serve.api.chat import ChatRequest
from serve.api.completions import TextRequest
from serve.api.errors import ApiError
from serve.api.jobs import Event
from serve.api.served import Served, knows_turns
from tests.serve.api.test_tool_calls import FUNCTION, ask

Json = dict[str, Any]
MESSAGES = [{"role": "user", "content": "q"}]
TOOLS = [{"type": "function", "function": FUNCTION}]
MANY = 200_000


@pytest.fixture(scope="module")
def served(vocab_path: Path) -> Served:
    return Served(("qwen",), (), load_encoding(vocab_path), 8192, True)


def error_of(vocabulary: Path, body: Json, path: str = "/v1/chat/completions") -> Json:
    response, pool = ask(vocabulary, lambda job: ["ok"], body, path)
    assert response.status_code == 400, response.text
    assert pool.jobs_seen == [] and len(response.text) < 1000
    return response.json()["error"]


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (CompletionBody, "prompt", [-1] * MANY),
        (CompletionBody, "prompt", [[1, -1] * MANY]),
        (CompletionBody, "prompt", ["a"] * MANY),
        (CompletionBody, "prompt", [{}] * MANY),
        (ChatBody, "messages", [1] * MANY),
        (ChatBody, "tools", [1] * MANY),
        (ChatBody, "functions", [1] * MANY),
        (ChatBody, "guided_choice", [1] * MANY),
        (ChatBody, "logit_bias", {str(i): "x" for i in range(MANY)}),
        (ChatBody, "structured_outputs", {str(i): "x" for i in range(MANY)}),
        (ChatBody, "structured_outputs", {"choice": [1] * MANY}),
        (DetokenizeBody, "tokens", [-1] * MANY),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_long_wrong_value_is_one_error(kind: type[Body], field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        kind.model_validate_json(json.dumps({"messages": MESSAGES, field: value}))
    assert error.value.error_count() == 1


@pytest.mark.parametrize(
    ("prompt", "place"),
    [
        ([1, -1], "prompt[1] is -1"), ([True], "prompt[0] is True"), ([1, "a"], "prompt[1] is 'a'"),
        (["a", 1], "prompt[1] is 1"), ([[1], [2, 2**31]], "prompt[1][1] is 2147483648"),
        ([], "prompt"), ("", "prompt is empty"), ([[1], []], "prompt is empty"),
        (7, "prompt"), ({}, "prompt"), ([None], "prompt[0] is None"),
    ],
)  # fmt: skip
def test_a_wrong_prompt_is_told_by_its_place(vocab_path: Path, prompt: Any, place: str) -> None:
    error = error_of(vocab_path, {"prompt": prompt}, "/v1/completions")
    assert error["param"] == "prompt" and error["message"].startswith(place)


@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": 0}, {"max_completion_tokens": 0}, {"stop_token_ids": [151936]},
        {"structured_outputs": {"grammar": "root ::= 'a'"}},
        {"structured_outputs": {"structural_tag": "{}"}}, {"guided_whitespace_pattern": " "},
        {"logits_processors": ["x"]}, {"return_token_ids": True}, {"regex": "a"},
        {"continue_final_message": True}, {"add_generation_prompt": False},
        {"tool_choice": "required"}, {"tool_choice": {"type": "function"}},
        {"tool_choice": "none", "functions": [FUNCTION]},
        {"function_call": {"name": "f"}, "tools": TOOLS}, {"function_call": {"name": "f"}},
        {"tool_choice": "required", "tools": []},
        {"logit_bias": {"151900": 1}}, {"logit_bias": {"9" * 5000: 1}}, {"logit_bias": {"01": 1}},
        {"stream_options": {"continuous_usage_stats": True}}, {"min_tokens": 9, "max_tokens": 3},
        {"guided_regex": "a", "tools": TOOLS, "tool_choice": "required"},
        {"guided_regex": "a", "guided_choice": ["b"]},
    ],
    ids=lambda field: " ".join(field),
)  # fmt: skip
def test_what_would_be_ignored_is_a_400_that_names_it(vocab_path: Path, field: Json) -> None:
    error = error_of(vocab_path, {"messages": MESSAGES, **field})
    assert error["param"] == next(iter(field))


@pytest.mark.parametrize(
    "field",
    [
        {"stop_token_ids": None},
        {"skip_special_tokens": False},
        {"tool_choice": "none"},
        {"structured_outputs": {"json": None, "regex": "a", "grammar": None, "disable_any": False}},
        {"continue_final_message": False, "add_generation_prompt": True},
        {"tool_choice": "auto", "functions": [FUNCTION]},
        {"function_call": None, "tools": TOOLS},
    ],
    ids=lambda field: " ".join(field),
)
def test_what_asks_for_nothing_else_is_answered(vocab_path: Path, field: Json) -> None:
    response, _ = ask(vocab_path, lambda job: ["ok"], {"messages": MESSAGES, **field})
    assert response.status_code == 200, response.text


def test_a_last_message_of_the_assistant_is_continued_by_its_name(vocab_path: Path) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "so"}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    response, _ = ask(vocab_path, lambda job: ["ok"], body)
    assert response.status_code == 200, response.text
    assert error_of(vocab_path, {"messages": messages, "continue_final_message": False})


@pytest.mark.parametrize(
    ("kind", "choice"),
    [("tools", {"tool_choice": "none"}), ("functions", {"function_call": "none"}), ("tools", {})],
)
def test_tokenize_counts_what_a_choice_leaves(vocab_path: Path, kind: str, choice: Json) -> None:
    body = {"messages": MESSAGES, kind: TOOLS if kind == "tools" else [FUNCTION], **choice}
    _, pool = ask(vocab_path, lambda job: ["ok"], body)
    response, _ = ask(vocab_path, lambda job: [], body, "/tokenize")
    assert response.json()["tokens"] == list(pool.jobs_seen[0].ids)


def test_a_prompts_stop_strings_are_the_clients_own_without_functions(vocab_path: Path) -> None:
    _, pool = ask(vocab_path, lambda job: ["ok"], {"messages": MESSAGES, "stop": ["\n\n Joshua"]})
    assert pool.jobs_seen[0].stops == ("\n\n Joshua",)


def test_parts_that_are_no_text_are_refused_whatever_they_carry(vocab_path: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "x"}, "text": "hi"}
    error = error_of(vocab_path, {"messages": [{"role": "user", "content": [image]}]})
    assert error["message"].startswith("messages[0].content")
    plain = [{"role": "user", "content": [{"text": "a"}, {"type": "text", "text": "b"}]}]
    response, _ = ask(vocab_path, lambda job: ["ok"], {"messages": plain})
    assert response.status_code == 200


def test_a_base_model_answers_completions_only(served: Served, full_dir: Path) -> None:
    folder = find_model(full_dir)
    assert knows_turns(folder, False)
    folder = replace(folder, generation={"chat_format": "raw"})
    assert knows_turns(folder, True)
    base = replace(served, chats=knows_turns(folder, False))
    with pytest.raises(ApiError, match="chat_format raw"):
        ChatRequest(ChatBody(messages=MESSAGES), base, 8192)
    assert TextRequest(CompletionBody(prompt="q"), base, 8192).jobs


def test_log_probabilities_have_a_limit_for_all_choices_together(served: Served) -> None:
    def ask_for(prompts: int) -> TextRequest:
        prompt = [[1] * 8000] * prompts
        body = CompletionBody(prompt=prompt, echo=True, logprobs=20, max_tokens=0)
        return TextRequest(body, served, 8192)

    assert len(ask_for(4).jobs) == 4
    with pytest.raises(ApiError, match="log-probabilities") as error:
        ask_for(5)
    assert error.value.status == 400 and error.value.param == "logprobs"
    body = ChatBody(messages=MESSAGES, logprobs=True, top_logprobs=20, n=128)
    with pytest.raises(ApiError, match="log-probabilities"):
        ChatRequest(body, served, 8192)
    assert len(ChatRequest(ChatBody(messages=MESSAGES, n=128), served, 8192).jobs) == 128


def told_choice(served: Served, ids: list[int], new: list[int], answer: str) -> Json:
    """The choice of an answer with log-probabilities and echo."""
    body = CompletionBody(prompt=ids, echo=True, logprobs=0, max_tokens=9)
    request = TextRequest(body, served, 8192)
    prompt = PromptFigures(0, tuple(TokenLogprobs(token, -1.0, 1, ()) for token in ids[1:]))
    for i, token in enumerate(new):
        is_last = i + 1 == len(new)
        told = TokenLogprobs(token, -1.0, 1, ())
        event = Event(0, token, answer if is_last else "", "length" if is_last else None)
        request.take(0, replace(event, logprobs=told, prompt=None if i else prompt))
    return request.answer({})["choices"][0]


def test_places_of_tokens_count_characters(served: Served) -> None:
    """Of the text itself, also where a character has several tokens."""
    text, answer = "龘😀b", "好龘"
    ids, new = served.encoding.ordinary(text), served.encoding.ordinary(answer)
    assert len(ids) > len(text)
    choice = told_choice(served, ids, new, answer)
    assert choice["text"] == text + answer
    raw = [served.encoding.token_bytes(token) for token in (*ids, *new)]
    # A character is there with its last byte.
    begun = [b"".join(raw[:i]).decode(errors="ignore") for i in range(len(raw))]
    assert choice["logprobs"]["text_offset"] == [len(text) for text in begun]


def test_an_answers_places_begin_behind_a_prompt_that_ends_inside_a_character(
    served: Served,
) -> None:
    begun, *rest = served.encoding.ordinary("龘")
    cut = served.encoding.decode(rest)
    choice = told_choice(served, [begun], rest, cut)
    assert choice["text"] == served.encoding.decode([begun]) + cut
    places = choice["logprobs"]["text_offset"]
    assert places[:2] == [0, len(served.encoding.decode([begun]))]


def test_usage_counts_equal_prompts_and_no_answer_where_none_is_wanted(vocab_path: Path) -> None:
    def usage(**body: Any) -> Json:
        response, _ = ask(vocab_path, lambda job: ["ok"], body, "/v1/completions")
        assert response.status_code == 200, response.text
        return response.json()["usage"]

    one, two = usage(prompt="a b", n=2), usage(prompt=["a b", "a b"])
    assert two["prompt_tokens"] == 2 * one["prompt_tokens"] > 0
    assert two["completion_tokens"] == one["completion_tokens"] == 2
    none = usage(prompt="a b", echo=True, max_tokens=0)
    assert none["completion_tokens"] == 0 and none["total_tokens"] == none["prompt_tokens"]
