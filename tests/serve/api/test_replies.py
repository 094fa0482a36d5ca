"""A streamed reply adds up to what the whole reply is parsed to, wherever it is cut."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from qwen_ds.model.react import FunctionCall, parse_reply
from serve.api.replies import ReplyPart, ReplyParts

GOLDEN = Path(__file__).parents[2] / "golden" / "react" / "responses.json"
TEXTS = {case["about"]: case["text"] for case in json.loads(GOLDEN.read_text())}
# What has been sent stays sent; see the module.
SENT_TOO_EARLY = {
    "two final answers: the last one counts": ("first\nFinal Answer: second", None),
    "text before the thought is dropped in a call": (
        "好的。Thought: 去查",
        FunctionCall("f", "{}"),
    ),
    "call after a final answer": ("yes", FunctionCall("f", "{}")),
    "text-completion style: begins behind Thought:": (
        " 我已经知道答案了。\nFinal Answer: 成都今天31度。",
        None,
    ),
}


def put_together(parts: Iterable[ReplyPart]) -> tuple[str, FunctionCall | None]:
    parts = list(parts)
    kinds = [part.kind for part in parts]
    assert kinds == sorted(kinds, key=["content", "name", "arguments"].index)
    text = {kind: "".join(p.text for p in parts if p.kind == kind) for kind in set(kinds)}
    call = FunctionCall(text["name"], text.get("arguments", "")) if "name" in text else None
    return text.get("content", ""), call


def cut(text: str, rng: random.Random) -> list[str]:
    pieces = []
    while text:
        length = rng.choice((1, 1, 2, 3, 7, 40))
        pieces.append(text[:length])
        text = text[length:]
    return pieces


@pytest.mark.parametrize("about", TEXTS)
def test_parts_add_up_to_the_parsed_reply(about: str) -> None:
    text = TEXTS[about]
    content, call = parse_reply(text)
    early = SENT_TOO_EARLY.get(about, (content, call))
    for seed in range(20):
        reply = ReplyParts()
        parts = [part for piece in cut(text, random.Random(seed)) for part in reply.push(piece)]
        got, called = put_together([*parts, *reply.finish()])
        assert called == call
        if call:  # white space in front of one is sent before it is known to be at the end
            got = got.strip()
        assert got in (content, early[0])
        assert reply.is_call == (call is not None)


def test_an_answer_is_sent_as_it_comes_and_thoughts_are_not() -> None:
    reply = ReplyParts()
    assert reply.push("Thought: I now know the final answer.\nFinal Answer: 今") == [
        ReplyPart("content", "今")
    ]
    assert reply.push("天") == [ReplyPart("content", "天")]
    assert reply.push("\nAct") == []  # perhaps a label
    assert reply.push("ually, yes") == [ReplyPart("content", "\nActually, yes")]


def test_arguments_are_sent_as_they_come() -> None:
    reply = ReplyParts()
    assert reply.push("Thought: x\nAction: f\nAction Input:") == [
        ReplyPart("content", "x"),
        ReplyPart("name", "f"),
    ]
    assert reply.push(' {"a":') == [ReplyPart("arguments", '{"a":')]
    assert reply.push(" 1}\n") == [ReplyPart("arguments", " 1}")]
    assert reply.push("Observation: made up") == []
    assert reply.finish() == []


def test_a_reply_that_goes_on_from_a_thought_holds_it_back() -> None:
    reply = ReplyParts(continues_thought=True)
    assert reply.push(" I now know the final answer.") == []
    assert reply.push("\nFinal Answer: yes") == [ReplyPart("content", "yes")]
