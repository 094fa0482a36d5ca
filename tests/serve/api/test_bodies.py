"""Bodies field by field: a wrong one is named, whatever else is right."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve.api.bodies import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    OriginalBody,
    TokenizeBody,
    read_body,
)
from serve.api.errors import ApiError

MESSAGES = [{"role": "user", "content": "q"}]
RIGHT: dict[type[Body], dict[str, Any]] = {
    ChatBody: {"messages": MESSAGES},
    CompletionBody: {"prompt": "a"},
    OriginalBody: {},
    TokenizeBody: {"prompt": "a"},
    DetokenizeBody: {"tokens": [1]},
}
BOTH: tuple[type[Body], ...] = (ChatBody, CompletionBody)
# Wrong values of fields, by the bodies that have them.
WRONG: tuple[tuple[tuple[type[Body], ...], str, tuple[Any, ...]], ...] = (
    (BOTH, "model", (1, ["a"], {})),
    (BOTH, "max_tokens", (-1, 1.5, "9", True, [])),
    (BOTH, "temperature", (-0.1, 101, "1", [], True)),
    (BOTH, "top_p", (0, -1, 1.1, "0.5")),
    (BOTH, "top_k", (-2, 2**31, 1.5, "1")),
    (BOTH, "min_p", (-0.1, 1.1, "0")),
    (BOTH, "n", (0, -1, 129, 1.5, "1", 10**30)),
    (BOTH, "stop", (1, "", [""], ["a", 1], ["a"] * 100, "a" * 2000, {})),
    (BOTH, "seed", (2**63, -(2**63) - 1, 1.5, "1")),
    (BOTH, "presence_penalty", (-2.1, 2.1, "1")),
    (BOTH, "frequency_penalty", (-2.1, 2.1, "1")),
    (BOTH, "repetition_penalty", (0, -1, 101, "1")),
    (BOTH, "logit_bias", ({"1": 101}, {"1": "1"}, [1], "1")),
    (BOTH, "min_tokens", (-1, 1.5, "1")),
    (BOTH, "ignore_eos", (1, "true")),
    (BOTH, "stop_token_ids", (1, [-1], ["1"], [1.5], [1] * 65)),
    (BOTH, "skip_special_tokens", (1, "true")),
    ((TokenizeBody,), "add_generation_prompt", (1, "true")),
    ((TokenizeBody,), "continue_final_message", (1, "true")),
    (BOTH, "stream", (1, "true", [])),
    (BOTH, "stream_options", (True, [], {"include_usage": "yes"})),
    (BOTH, "response_format", ("json_object", [])),
    (BOTH, "structured_outputs", ("x", {"regex": 1}, {"choice": "a"}, {"json": 1})),
    (BOTH, "guided_json", (1, [])),
    (BOTH, "guided_regex", (1, {})),
    (BOTH, "guided_choice", ("a", [1])),
    (BOTH, "user", (1, {})),
    ((ChatBody,), "messages", ([], "q", {}, ["q"], [None], None)),
    ((ChatBody,), "max_completion_tokens", (0, -1, "1")),
    ((ChatBody,), "logprobs", (1, "true")),
    ((ChatBody,), "top_logprobs", (-1, 21, "1")),
    ((ChatBody, TokenizeBody), "functions", ("f", [1], {})),
    ((ChatBody, TokenizeBody), "tools", ("f", ["f"], {})),
    ((ChatBody,), "function_call", ("required", 1, [])),
    ((ChatBody,), "tool_choice", ("always", 1, [])),
    (
        (CompletionBody,),
        "prompt",
        (1, {}, None, [1, "a"], ["a", 1], [[1], [-1]], [-1], [2**31], [[1, "a"]], [None]),
    ),
    ((CompletionBody,), "echo", (1, "true")),
    ((CompletionBody,), "logprobs", (-1, 21, True, "1")),
    ((OriginalBody,), "instruction", (1, None)),
    ((OriginalBody,), "text", (1, None)),
    ((OriginalBody,), "penalty_alpha", ("1", [])),
    ((OriginalBody,), "max_new_tokens", (0, -1, "1")),
    ((OriginalBody,), "temperature", (0, -1, 101, "1")),
    ((OriginalBody,), "do_sample", (1, "true")),
    ((OriginalBody,), "num_beams", (0, 65, "1")),
    ((OriginalBody,), "top_p", (0, 1.1, "1")),
    ((OriginalBody,), "top_k", (-1, 2**31, "1")),
    ((TokenizeBody,), "prompt", (1, ["a"])),
    ((TokenizeBody,), "messages", ("q", ["q"], {})),
    ((DetokenizeBody,), "model", (1, [])),
    ((DetokenizeBody,), "tokens", (None, 1, "a", [-1], ["a"], [[1]], [2**31])),
)
CASES = [(kind, name, value) for kinds, name, values in WRONG for kind in kinds for value in values]


def refusal(kind: type[Body], given: Any) -> ApiError:
    raw = given if isinstance(given, bytes) else json.dumps(given).encode()
    with pytest.raises(ApiError) as found:
        read_body(kind, raw)
    assert found.value.status == 400 and "\n" not in found.value.message
    return found.value


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    CASES,
    ids=[f"{kind.__name__}-{name}-{value!r:.20}" for kind, name, value in CASES],
)
def test_a_wrong_field_is_named(kind: type[Body], name: str, value: Any) -> None:
    error = refusal(kind, RIGHT[kind] | {name: value})
    assert error.param == name and name in error.message


def test_the_table_has_every_field() -> None:
    missing = [
        f"{kind.__name__}.{name}"
        for kind in RIGHT
        for name in kind.model_fields
        if name != "model" and not any(kind in kinds and name == n for kinds, n, _ in WRONG)
    ]
    # Told apart where the chat's prompt is made.
    assert set(missing) <= {
        "TokenizeBody.function_call", "TokenizeBody.tool_choice",
        "ChatBody.add_generation_prompt", "ChatBody.continue_final_message",
    }  # fmt: skip


@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_a_body_with_unknown_fields_is_read(kind: type[Body]) -> None:
    body = read_body(kind, json.dumps(RIGHT[kind] | {"new_field": [1], "x": None}).encode())
    assert not hasattr(body, "new_field")
    for name, value in RIGHT[kind].items():
        assert getattr(body, name) == value


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"1", b'"a"', b"\xff", b"[" * 10_000, b"{} {}"], ids=repr
)
@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_what_is_no_object_is_a_400_without_a_field(kind: type[Body], raw: bytes) -> None:
    assert refusal(kind, raw).param is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [(ChatBody, "messages"), (CompletionBody, "prompt"), (DetokenizeBody, "tokens")],
)
def test_a_field_that_must_be_there_is_named(kind: type[Body], name: str) -> None:
    assert refusal(kind, {}).param == name


def test_the_place_of_a_wrong_member_is_told() -> None:
    error = refusal(ChatBody, {"messages": [*MESSAGES, *MESSAGES, "q"]})
    assert "messages[2]" in error.message
    error = refusal(ChatBody, {"messages": MESSAGES, "stream_options": {"include_usage": 7}})
    assert "stream_options.include_usage" in error.message


@pytest.mark.parametrize("kind", BOTH, ids=lambda kind: kind.__name__)
def test_fields_that_are_not_supported_are_refused_unless_they_ask_for_nothing(
    kind: type[Body],
) -> None:
    assert kind.unsupported
    for name, harmless in kind.unsupported.items():
        for value in harmless:
            read_body(kind, json.dumps(RIGHT[kind] | {name: value}).encode())
        error = refusal(kind, RIGHT[kind] | {name: {"odd": [7]}})
        assert error.param == name and error.code == "unsupported_parameter"
