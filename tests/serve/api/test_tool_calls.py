"""Tool calls over the API: prompts as the official server's, replies read back, streamed too."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_ds.decode.stop import FinishReason
from qwen_ds.model.react import STOP, react_prompt
from serve.api.chat import with_calls_in_turn
from serve.api.jobs import Job
from tests.serve.api.running import events
from tests.serve.api.scripted import Says, ScriptedPool, scripted_app

GOLDEN = Path(__file__).parents[2] / "golden" / "react"
CONVERSATIONS = json.loads((GOLDEN / "conversations.json").read_text())
RESPONSES = json.loads((GOLDEN / "responses.json").read_text())
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
CALL = ["Thought: let me", " look\nAct", 'ion: f\nAction Input: {"a"', ": 1}\n"]
Json = dict[str, Any]


def ask(
    vocabulary: Path,
    says: Says,
    body: Json,
    path: str = "/v1/chat/completions",
    ends: FinishReason = "stop",
) -> tuple[httpx.Response, ScriptedPool]:
    app, pool = scripted_app(vocabulary, says)
    pool.ends = ends

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body)

    return asyncio.run(post()), pool


def choice_of(vocabulary: Path, text: str | list[str], body: Json) -> Json:
    pieces = [text] if isinstance(text, str) else text
    response, _ = ask(vocabulary, lambda job: pieces, body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


@pytest.mark.parametrize("case", CONVERSATIONS, ids=[c["about"] for c in CONVERSATIONS])
def test_prompts_of_the_official_server_are_what_the_engine_gets(
    vocab_path: Path, case: Json
) -> None:
    """What it refuses or dies of is refused; what it does not stream is streamed."""
    body = {"messages": case["messages"], "functions": case["functions"], "max_tokens": 5}
    body |= {"stop": case["stop"]} if case.get("stop") else {}
    response, pool = ask(vocab_path, lambda job: ["ok"], body)
    expected = case["expected"]
    if "error" in expected and case["id"] not in ("shared-c43", "shared-c45"):
        assert response.status_code == 400 and response.json()["error"]["message"]
        assert pool.jobs_seen == []
        return
    assert response.json()["choices"][0]["message"]["content"] == "ok"
    (job,) = pool.jobs_seen
    assert (STOP in job.stops) == bool(case["functions"])
    if "prompt_ids" in expected:
        assert list(job.ids) == expected["prompt_ids"]
        tokens, _ = ask(vocab_path, lambda job: ["ok"], body, "/tokenize")
        assert tokens.json()["tokens"] == expected["prompt_ids"]


@pytest.mark.parametrize("case", RESPONSES, ids=[c["about"] for c in RESPONSES])
def test_replies_are_answered_as_by_the_official_server(vocab_path: Path, case: Json) -> None:
    body = {"messages": [{"role": "user", "content": "q"}], "functions": [FUNCTION]}
    choice = choice_of(vocab_path, case["text"], body)
    message, expected = choice["message"], case["expected"]
    assert message["content"] == expected["content"]
    assert message.get("function_call") == expected["function_call"]
    assert choice["finish_reason"] == expected["finish_reason"]


def test_tools_are_called_by_id_and_results_come_back_in_turn(vocab_path: Path) -> None:
    tools = [{"type": "function", "function": FUNCTION}]
    question = {"role": "user", "content": "q"}
    choice = choice_of(vocab_path, CALL, {"messages": [question], "tools": tools})
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'} and call["id"]
    second = {**call, "id": "two", "function": {"name": "f", "arguments": "{}"}}
    assistant = {**choice["message"], "tool_calls": [call, second]}
    results = [
        {"role": "tool", "tool_call_id": "two", "content": "second"},
        {"role": "tool", "tool_call_id": call["id"], "content": "first"},
    ]
    body = {"messages": [question, assistant, *results], "tools": tools}
    _, pool = ask(vocab_path, lambda job: ["ok"], body)
    tokens, _ = ask(
        vocab_path, lambda job: [], {"tokens": list(pool.jobs_seen[0].ids)}, "/detokenize"
    )
    prompt = tokens.json()["prompt"]
    assert prompt.endswith(
        '<|im_start|>assistant\nThought: let me look\nAction: f\nAction Input: {"a": 1}\n'
        "Observation: first\nThought: \nAction: f\nAction Input: {}\nObservation: second\nThought:"
    )


@pytest.mark.parametrize("field", ["tools", "functions"])
def test_a_streamed_call_adds_up_to_the_whole_one(vocab_path: Path, field: str) -> None:
    given = [FUNCTION] if field == "functions" else [{"type": "function", "function": FUNCTION}]
    body = {"messages": [{"role": "user", "content": "q"}], field: given, "stream": True}
    response, _ = ask(vocab_path, lambda job: CALL, body)
    chunks = [one["choices"][0] for one in events(iter(response.text.splitlines()))]
    deltas = [chunk["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "let me look"
    if field == "tools":
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert calls[0]["id"] and calls[0]["type"] == "function"
        assert all(call["index"] == 0 for call in calls)
        functions = [call["function"] for call in calls]
    else:
        functions = [delta["function_call"] for delta in deltas if "function_call" in delta]
    assert [f["name"] for f in functions if "name" in f] == ["f"]
    assert "".join(f["arguments"] for f in functions) == '{"a": 1}'
    assert chunks[-1]["finish_reason"] == ("tool_calls" if field == "tools" else "function_call")


def test_a_choice_of_tools_is_honoured(vocab_path: Path) -> None:
    tools = [{"type": "function", "function": FUNCTION | {"name": name}} for name in ("f", "g")]
    body: Json = {"messages": [{"role": "user", "content": "q"}], "tools": tools}

    def job_of(choice: Any) -> Job:
        _, pool = ask(vocab_path, lambda job: ["ok"], body | {"tool_choice": choice})
        return pool.jobs_seen[0]

    assert job_of("none").stops == () and len(job_of("none").ids) < len(job_of("auto").ids)
    assert job_of("auto").structure is None
    for choice, names in (
        ("required", ["f", "g"]),
        ({"type": "function", "function": {"name": "g"}}, ["g"]),
    ):
        structure = job_of(choice).structure
        assert structure is not None and structure.kind == "call"
        assert list(structure.value["functions"]) == names
    wrong, _ = ask(
        vocab_path,
        lambda job: ["ok"],
        body | {"tool_choice": {"type": "function", "function": {"name": "h"}}},
    )
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "tool_choice"


def turn_of(identifier: str, argument: str) -> Json:
    """A message of the assistant with one call."""
    function = {"name": "f", "arguments": argument}
    call = {"id": identifier, "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def test_a_call_gets_its_own_turns_result_where_ids_come_again(vocab_path: Path) -> None:
    messages = [
        {"role": "user", "content": "q"},
        turn_of("call_0", "one"),
        {"role": "tool", "tool_call_id": "call_0", "content": "first"},
        turn_of("call_0", "two"),
        {"role": "tool", "tool_call_id": "call_0", "content": "second"},
    ]
    prompt = react_prompt([message for _, message in with_calls_in_turn(messages)])
    text = prompt.conversation.turns[-1].text
    assert text.index("one") < text.index("first") < text.index("two") < text.index("second")


def test_errors_tell_the_clients_own_places(vocab_path: Path) -> None:
    """Two calls in one message, their results the other way round, and wrong content behind."""
    both = turn_of("a", "1")
    both["tool_calls"] += turn_of("b", "2")["tool_calls"]
    results = [{"role": "tool", "tool_call_id": name, "content": name} for name in ("b", "a")]
    messages: list[Json] = [{"role": "user", "content": "q"}, both, *results]
    for wrong, place in (
        ([*messages, {"role": "user", "content": 7}], 4),
        ([*messages[:2], results[0] | {"content": 7}, results[1]], 2),
    ):
        response, _ = ask(vocab_path, lambda job: ["ok"], {"messages": wrong})
        error = response.json()["error"]
        assert response.status_code == 400 and error["param"] == "messages"
        assert error["message"].startswith(f"messages[{place}].content")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": ""}}])
def test_a_call_that_must_be_made_needs_a_name(vocab_path: Path, choice: Any) -> None:
    function = {key: value for key, value in FUNCTION.items() if key != "name"}
    body: Json = {"messages": [{"role": "user", "content": "q"}]}
    body |= {"tools": [{"type": "function", "function": function}]}
    response, pool = ask(vocab_path, lambda job: ["ok"], body | {"tool_choice": choice})
    assert response.status_code == 400 and response.json()["error"]["param"] == "tool_choice"
    assert pool.jobs_seen == []
    response, _ = ask(vocab_path, lambda job: ["ok"], body)
    assert response.status_code == 200


@pytest.mark.parametrize("field", ["tools", "functions"])
def test_a_call_that_is_cut_says_so(vocab_path: Path, field: str) -> None:
    """Its arguments are not whole, and a finish_reason of tool_calls would say they are."""
    given = [FUNCTION] if field == "functions" else [{"type": "function", "function": FUNCTION}]
    body: Json = {"messages": [{"role": "user", "content": "q"}], field: given}
    cases: tuple[tuple[FinishReason, str | None], ...] = (("length", "length"), ("stop", None))
    for ends, expected in cases:
        whole, _ = ask(vocab_path, lambda job: CALL[:-1], body, ends=ends)
        stream, _ = ask(vocab_path, lambda job: CALL[:-1], body | {"stream": True}, ends=ends)
        chunks = [one["choices"][0] for one in events(iter(stream.text.splitlines()))]
        reasons = whole.json()["choices"][0]["finish_reason"], chunks[-1]["finish_reason"]
        called = "tool_calls" if field == "tools" else "function_call"
        assert reasons == (expected or called,) * 2
        assert whole.json()["choices"][0]["message"][called]
